"""What one worker job is: from a specification to the commands of a submit description.

Values in, values out: nothing here talks to HTCondor. A flow name with quotes, backslashes, macros or ClassAd operators
in it stays a string.
"""

from __future__ import annotations

import hashlib
import math
import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import classad2

MIB = 1024**2
KIB = 1024

CLUSTER_ATTRIBUTE = "HTCDaskClusterName"
GROUP_ATTRIBUTE = "HTCDaskWorkerGroup"
LEASE_ATTRIBUTE = "HTCDaskLeaseExpires"
FLOW_RUN_ATTRIBUTE = "PrefectFlowRunId"
API_ATTRIBUTE = "PrefectAPI"

# The shadow judges a running job, and hears of a renewal up to 30 s after it (SCHEDD_JOB_QUEUE_NOTIFY_UPDATES): only
# the first one after a job's start is signalled at once.
RUNNING_GRACE = 60

LEASE_REASON = (
    "prefect_htcdask did not renew this worker's lease: its supervisor is gone or could not reach the schedd, or the "
    "clocks of their hosts were set apart"
)

# Commands that make a worker job what it is, and the attributes that they set, without underscores: a site's own
# additions may not replace them.
# fmt: off
RESERVED_COMMANDS = frozenset([
    "accountinggroup", "acctgroup", "args", "arguments", "batchname", "cmd", "containerimage", "dockerimage",
    "encryptinputfiles", "env", "environment", "eraseoutputanderroronrestart", "err", "error", "executable", "getenv",
    "initialdir", "iwd",
    "jobbatchname", "jobleaseduration", "jobmaxvacatetime", "jobprio", "jobuniverse", "killsig", "leaveinqueue",
    "leavejobinqueue", "log", "maxidle", "maxmaterialize", "out", "output", "periodicremove",
    "periodicremovereason", "priority", "queue", "requestcpus", "requestdisk", "requestgpus", "requestmemory",
    "requirements", "shouldtransferfiles", "streamerr", "streamerror", "transferexecutable", "transferinput",
    "transferinputfiles", "transferoutput", "transferoutputfiles", "universe", "userlog", "wantgracefulremoval",
    "whentotransferoutput",
])
# fmt: on


class WorkerJobError(ValueError):
    """A worker cannot be described as an HTCondor job. The message names the setting, its value and the remedy."""


@dataclass(frozen=True)
class FlowRunTag:
    """The flow run that worker jobs belong to, as written in their ads.

    Attributes:
        id: id of the flow run (UUID as text).
        name: name of the flow run; becomes `JobBatchName`.
        flow_name: name of the flow.
        attempt: the flow run's run count, from 1; a flow retry is a new attempt.
        api: the Prefect API that knows it, without any login (`api_identity`); empty where that is unknown.
    """

    id: str
    name: str
    flow_name: str
    attempt: int = 1
    api: str = ""


@dataclass(frozen=True)
class WorkerSpec:
    """One kind of worker. Sizes in bytes, times in seconds."""

    cpus: int = 1
    memory: int = 2 * 1024 * MIB
    disk: int = 1024 * MIB
    gpus: int = 0
    nthreads: int | None = None
    container_image: str | None = None
    python: str = "python3"
    environment: Mapping[str, str] = field(default_factory=dict)
    requirements: str | None = None
    accounting_group: str | None = None
    priority: int = 0
    extra_submit: Mapping[str, str] = field(default_factory=dict)
    resources: Mapping[str, float] = field(default_factory=dict)
    lifetime: float | None = None
    lifetime_stagger: float | None = None
    vacate_time: float = 20.0

    @property
    def threads(self) -> int:
        """Tasks that the worker runs at once."""
        return self.nthreads or self.cpus


@dataclass(frozen=True)
class JobFiles:
    """Where a job's files are on the submitting host, and what travels with it.

    Attributes:
        directory: the job's initial directory; its output and error files come back to `logs` below it.
        start_script: the script that the job runs, by its name in the sandbox.
        inputs: absolute paths of the files that travel with the job.
        secret_inputs: base names of those that are encrypted on the wire.
        event_log: path of the job event log, or `None` where the schedd cannot write one here.
    """

    directory: str
    start_script: str
    inputs: tuple[str, ...]
    secret_inputs: tuple[str, ...]
    event_log: str | None


def submit_description(
    spec: WorkerSpec,
    files: JobFiles,
    *,
    cluster_name: str,
    group: str,
    flow_run: FlowRunTag | None,
    lease_expires: int,
    lost_schedd_lease: float,
) -> dict[str, str]:
    """The submit description of worker jobs.

    Args:
        spec: the kind of worker.
        files: the files of these jobs.
        cluster_name: name of the gateway cluster that the workers join; only its digest stands in the description.
        group: name of the worker group.
        flow_run: the flow run, or `None` for a cluster used by itself.
        lease_expires: Unix time, in seconds and by the schedd's clock, after which the schedd removes the jobs unless
            it was moved on.
        lost_schedd_lease: seconds after which a job leaves when its schedd is lost (job_lease_duration).

    Returns:
        submit commands and their values, ready for `htcondor2.Submit`.

    Raises:
        WorkerJobError: a value cannot stand in a submit description; the message names the setting.
    """
    commands = {
        "universe": "container" if spec.container_image else "vanilla",
        # env finds `python3` on the PATH of a site or image; HTCondor itself wants a full path.
        "executable": "/usr/bin/env",
        "transfer_executable": "false",
        "arguments": quote_arguments([spec.python, files.start_script]),
        "environment": quote_environment(spec.environment),
        "initialdir": _plain(files.directory, "condor.directory"),
        "output": "logs/worker.$(Cluster).$(Process).out",
        "error": "logs/worker.$(Cluster).$(Process).err",
        "should_transfer_files": "YES",
        "when_to_transfer_output": "ON_EXIT",
        "transfer_input_files": ",".join(_path(path, "condor.directory") for path in files.inputs),
        # Without this, HTCondor would bring back every new file in the sandbox, the Dask spill directory included.
        "transfer_output_files": '""',
        "encrypt_input_files": ",".join(files.secret_inputs),
        "request_cpus": str(spec.cpus),
        "request_memory": str(math.ceil(spec.memory / MIB)),
        "request_disk": str(math.ceil(spec.disk / KIB)),
        "priority": str(spec.priority),
        "periodic_remove": f"time() > {LEASE_ATTRIBUTE} + ifThenElse(JobStatus =?= 2, {RUNNING_GRACE}, 0)",
        f"My.{LEASE_ATTRIBUTE}": str(lease_expires),
        "My.PeriodicRemoveReason": quote(LEASE_REASON),
        # Spooling would keep finished jobs in the queue for ten days.
        "leave_in_queue": "false",
        "job_lease_duration": str(max(1, round(lost_schedd_lease))),
        "want_graceful_removal": "true",
        "kill_sig": "SIGTERM",
        "job_max_vacate_time": str(max(1, round(spec.vacate_time))),
        f"My.{CLUSTER_ATTRIBUTE}": quote(cluster_digest(cluster_name)),
        f"My.{GROUP_ATTRIBUTE}": quote(group),
        "My.HTCDaskAttempt": str(flow_run.attempt if flow_run else 1),
        "My.JobBatchName": quote(flow_run.name if flow_run else cluster_digest(cluster_name)),
    }
    if files.event_log:
        commands["log"] = _plain(files.event_log, "condor.directory")
        # HTCondor brings no output back of a job that is evicted or removed: what is written comes as it is written.
        commands["stream_error"] = "true"
        # A job that is started again writes on where it stopped: nobody else could keep that in time.
        commands["erase_output_and_error_on_restart"] = "false"
    if flow_run:
        commands[f"My.{FLOW_RUN_ATTRIBUTE}"] = quote(flow_run.id)
        commands["My.PrefectFlowName"] = quote(flow_run.flow_name)
        if flow_run.api:
            commands[f"My.{API_ATTRIBUTE}"] = quote(flow_run.api)
    if spec.gpus:
        commands["request_gpus"] = str(spec.gpus)
    if spec.container_image:
        commands["container_image"] = _plain(spec.container_image, "worker.container_image")
    if spec.requirements:
        commands["requirements"] = checked_expression(spec.requirements, "worker.requirements")
    if spec.accounting_group:
        commands["accounting_group"] = _plain(spec.accounting_group, "worker.accounting_group")
    commands.update(checked_extra_submit(spec.extra_submit))
    return commands


# What HTCondor would expand at match time (`$$(Attr)`), or what `$(DOLLAR)` cannot protect.
_EXPANDED = re.compile(r"\${2,}(?=\w*\()|\$(?=\(DOLLAR\))", re.IGNORECASE)


def quote(text: str) -> str:
    """A string literal for an attribute in a submit description, safe from its macro expansion.

    Submit descriptions and the wire use old ClassAd syntax, where a backslash is itself unless a quote follows
    (HTCondor, `ConvertEscapingOldToNew`); `classad2.quote` writes the new one. Control characters cannot stand in an
    ad: line breaks become spaces, others a question mark. Dollars that HTCondor would expand at match time, which
    would hold the job, are parted by spaces.
    """
    plain = "".join(" " if c in "\n\r\t" else "?" if unicodedata.category(c) in ("Cc", "Cs") else c for c in text)
    plain = _EXPANDED.sub(lambda match: "$ " * len(match.group()), plain)
    return '"' + _protect_dollars(plain.replace('"', '\\"')) + '"'


def _protect_dollars(text: str) -> str:
    """`text` with each lone dollar kept from macro expansion; a run of dollars is left alone by HTCondor."""
    return re.sub(r"(?<!\$)\$(?!\$)", "$(DOLLAR)", text)


def string_literal(text: str) -> str:
    """A ClassAd string literal for a constraint; non-ASCII characters stay as they are, as the schedd wants them."""
    return '"' + "".join(c if ord(c) > 127 else classad2.quote(c)[1:-1] for c in text) + '"'


def quote_arguments(arguments: Iterable[str]) -> str:
    """Arguments in HTCondor's new syntax (condor_submit manual, `arguments`)."""
    return '"' + " ".join(_new_syntax(argument, "arguments") for argument in arguments) + '"'


def quote_environment(environment: Mapping[str, str]) -> str:
    """Environment in HTCondor's new syntax (condor_submit manual, `environment`).

    Raises:
        WorkerJobError: a name is no variable name, or a value has a newline, which an ad cannot carry.
    """
    parts = []
    for name, value in environment.items():
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise WorkerJobError(f"worker.environment: {name!r} is no name of an environment variable")
        parts.append(name + "=" + _new_syntax(value, f"worker.environment[{name!r}]"))
    return '"' + " ".join(parts) + '"'


def _new_syntax(value: str, setting: str) -> str:
    value = _plain(value, setting).replace('"', '""')
    if value == "" or re.search(r"[\s']", value):
        return "'" + value.replace("'", "''") + "'"
    return value


def _plain(value: str, setting: str) -> str:
    if any(c in value for c in "\n\r\0"):
        raise WorkerJobError(f"{setting} = {value!r}: a submit description cannot hold a line break; remove it")
    if _EXPANDED.search(value):
        raise WorkerJobError(f"{setting} = {value!r}: HTCondor would expand the dollars in it; remove them")
    return _protect_dollars(value)


def _path(value: str, setting: str) -> str:
    if "," in value:
        raise WorkerJobError(f"{setting} = {value!r}: HTCondor takes no comma in a path here; choose another directory")
    return _plain(value, setting)


def checked_expression(expression: str, setting: str) -> str:
    """`expression`, if it is one whole ClassAd expression on one line.

    Raises:
        WorkerJobError: it does not parse; the message names the setting.
    """
    try:
        classad2.ExprTree(expression)
    except Exception as exc:  # classad2 raises ClassAdException and ValueError for the same fault
        raise WorkerJobError(
            f"{setting} = {expression!r} is no ClassAd expression; see HTCondor's manual on requirements"
        ) from exc
    return " ".join(expression.split())


def checked_extra_submit(extra: Mapping[str, str]) -> dict[str, str]:
    """A site's further submit commands, if they leave ours alone.

    Raises:
        WorkerJobError: a command replaces one of ours, holds a line break, or is no expression where it has to be one;
            the message names it.
    """
    checked = {}
    for command, value in extra.items():
        name = command.strip()
        plain = name.removeprefix("+").lower().removeprefix("my.").replace("_", "")
        if not re.fullmatch(r"(\+|[Mm][Yy]\.)?[A-Za-z_][A-Za-z0-9_.]*", name):
            raise WorkerJobError(f"worker.extra_submit: {command!r} is no submit command")
        if plain in RESERVED_COMMANDS or plain.startswith(("htcdask", "prefectflow", "prefectapi")):
            raise WorkerJobError(
                f"worker.extra_submit: {command!r} is set by prefect_htcdask itself; use the setting of its own, "
                "or leave it out"
            )
        if any(c in value for c in "\n\r\0"):
            raise WorkerJobError(f"worker.extra_submit[{command!r}] = {value!r}: remove the line break")
        if _is_expression(name) and value.strip() and not _MACRO.search(value):
            _check_expression(command, value.strip())
        checked[name] = value
    return checked


_MACRO = re.compile(r"\$\w*\(|\$\$\[")
_EXPRESSIONS = frozenset(
    ["rank", "preferences", "periodichold", "periodicrelease", "periodicvacate", "onexithold", "onexitremove"]
)


def _is_expression(name: str) -> bool:
    """Whether the value of a submit command goes into the job's ad as it is."""
    return _is_attribute(name) or name.lower().replace("_", "") in _EXPRESSIONS


def _is_attribute(name: str) -> bool:
    return name.lower().startswith(("+", "my."))


def _check_expression(command: str, value: str) -> None:
    try:
        # As in a submit description, where a backslash is itself unless a quote follows.
        classad2.ExprTree(re.sub(r'\\(?!")', r"\\\\", value))
    except Exception as exc:  # classad2 raises ClassAdException and ValueError for the same fault
        remedy = "see HTCondor's manual on ClassAd expressions"
        if '"' not in value and re.search(r"[A-Za-z]", value):
            remedy = f"a string needs quotes of its own: {_quoted(value)}"
        given = f"worker.extra_submit[{command!r}] = {value!r}"
        raise WorkerJobError(f"{given} is no ClassAd expression: {remedy}") from exc


def _quoted(value: str) -> str:
    return repr(f'"{value}"')


def bare_words(extra: Mapping[str, str]) -> list[str]:
    """Attributes of a site's own whose value is one word without quotes, which may be a forgotten string, in words."""
    words = {command: value.strip() for command, value in extra.items() if _is_attribute(command.strip())}
    return [
        f"worker.extra_submit[{command!r}] = {word!r} names an attribute of the job; a string needs quotes of its own: "
        f"{_quoted(word)}"
        for command, word in words.items()
        if re.fullmatch(r"[A-Za-z_]\w*", word) and word.lower() not in ("true", "false", "undefined", "error")
    ]


def settings_in(words: str, spec: WorkerSpec, where: str) -> list[str]:
    """The settings of a worker that HTCondor's words are about, with their values.

    Args:
        words: what it said of a job.
        spec: the worker.
        where: where its settings stand, such as ``worker``.
    """
    said = {word.replace("_", "") for word in re.findall(r"\w+", words.lower())}
    found = []
    for command, value in spec.extra_submit.items():
        name = command.strip().removeprefix("+").lower().removeprefix("my.").replace("_", "")
        if name in said or ("proxy" in said and "x509" in name):
            found.append(f"{where}.extra_submit[{command!r}] = {value!r}")
    others = {
        "requirements": spec.requirements,
        "accounting_group": spec.accounting_group,
        "container_image": spec.container_image,
    }
    for setting, given in others.items():
        if given and (setting.replace("_", "") in said or given in words):
            found.append(f"{where}.{setting} = {given!r}")
    return found


def cluster_digest(name: str) -> str:
    """What stands for a gateway cluster in job ads and paths: the first 128 bits of its name's SHA-256, in hexadecimal.

    Every user of a pool may read a job's ad, and who knows a cluster's name may open its dashboard. A gateway's names
    are random UUIDs (122 bits; `uuid4` in dask_gateway_server's backends), so that none is found by trying, without any
    salt; and no two of 128 bits are ever the same.

    Args:
        name: the cluster's name at its gateway.
    """
    return hashlib.sha256(name.encode()).hexdigest()[:32]


def cluster_constraint(digest: str) -> str:
    """Constraint for all worker jobs of a gateway cluster, given by the digest of its name."""
    return f"{CLUSTER_ATTRIBUTE} == {string_literal(digest)}"


def group_constraint(digest: str, group: str) -> str:
    """Constraint for the worker jobs of one group of a gateway cluster, given by the digest of its name."""
    return f"{cluster_constraint(digest)} && {GROUP_ATTRIBUTE} == {string_literal(group)}"


def flow_run_constraint(flow_run_id: str, before_attempt: int | None = None, api: str = "") -> str:
    """Constraint for the worker jobs of a flow run.

    Args:
        flow_run_id: the flow run.
        before_attempt: only those of attempts before this one, if given.
        api: only those that name this Prefect API or none, if given.
    """
    constraint = f"{FLOW_RUN_ATTRIBUTE} == {string_literal(flow_run_id)}"
    if before_attempt is not None:
        constraint += f" && HTCDaskAttempt < {int(before_attempt)}"
    if api:
        constraint += f" && ({API_ATTRIBUTE} =?= undefined || {API_ATTRIBUTE} == {string_literal(api)})"
    return constraint
