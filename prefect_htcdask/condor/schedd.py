"""The schedd, as far as worker jobs need it: locate, submit, renew, remove, query.

Every constraint names our own user: `ScheddClient` adds the owner itself, so that no caller can forget it. What other
users write into their ads is neither edited, removed, counted nor explained.

The bindings hold the GIL during calls to a schedd, so this module is used in the supervisor and in one-shot processes
only, never in the flow's own.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import classad2
import htcondor2

from prefect_htcdask.condor.address import ScheddAddress
from prefect_htcdask.condor.event_times import SERVER_TIME, seconds_ahead
from prefect_htcdask.condor.submit_description import LEASE_ATTRIBUTE, string_literal
from prefect_htcdask.condor.token_directory import TokenDirectory
from prefect_htcdask.embedded.listeners import PORT_OWNERS, ForeignListenerError, check_pool

logger = logging.getLogger(__name__)

_EDIT_REFUSED = re.compile(r"Unable to (edit jobs?\b|commit transaction)")
"""What the bindings say of an edit that the schedd answered with a refusal (htcondor2/schedd.cpp)."""

_NOBODY = frozenset({"", "unauthenticated", "unmapped"})
"""Names of a schedd's for who has not proved to be anybody."""


class ScheddError(RuntimeError):
    """The schedd cannot be had or refused. The message says which, why, and what to do."""


class EditRefused(ScheddError):
    """The schedd answered, and did not take an edit: one refusal stands for all jobs that the edit was to change."""


class ScheddRefusal(ScheddError):
    """Jobs are refused for what they say or whose they are: the same ones would be refused again."""


class ScheddLimit(ScheddError):
    """The schedd takes no more jobs than these, at a time or in one submission.

    Attributes:
        fits: how many would be taken now.
        in_one_submission: whether others may follow at once.
    """

    def __init__(self, text: str, fits: int, in_one_submission: bool = False) -> None:
        super().__init__(text)
        self.fits = fits
        self.in_one_submission = in_one_submission


def judge_submission(said: str) -> ScheddError | None:
    """What an exception of `htcondor2.Schedd.submit` means; `None` where it may pass, such as a lost connection.

    The bindings raise one class for everything, so their words tell (`_schedd_submit` in HTCondor's
    ``python-bindings/htcondor2/schedd.cpp``). They make the jobs' ads here, ask the schedd for each job's number,
    which is a code where it gives none (``NEWJOB_ERR_`` in ``qmgmt.h``), and have the schedd commit them all.

    Args:
        said: the exception's text.
    """
    words = " ".join(said.split())
    if number := _NO_NUMBER.search(words):
        fits, code = int(number.group(1)), int(number.group(2))
        if code in _LIMITS:
            if _LIMITS[code] == _PER_SUBMISSION and fits == 0:
                return ScheddRefusal(f"the schedd takes no jobs at all ({_PER_SUBMISSION})")
            text = f"the schedd takes no more jobs at a time ({_LIMITS[code]})"
            return ScheddLimit(text, fits, _LIMITS[code] == _PER_SUBMISSION)
        if code in _NOT_ALLOWED:
            return ScheddRefusal(f"the schedd takes no jobs from us: the user is {_NOT_ALLOWED[code]} there")
        return None
    if "MAX_JOBS_SUBMITTED exceeded" in words:
        return ScheddLimit(f"the schedd takes no more jobs at a time ({words.rpartition(':')[2].strip()})", 0)
    for beginning in _REFUSALS:
        if words.startswith(beginning) and (why := words.removeprefix(beginning).strip()):
            return ScheddRefusal(re.sub(r"Submit:-?\d+:", "", why))
    return None


_SAID = re.compile(r"\bSCHEDD:\d+:\S|expected next ProcId|^Failed to (set|create new cluster)")
"""What the schedd itself has said, so that it was reached."""

_PER_SUBMISSION = "MAX_JOBS_PER_SUBMISSION"
_LIMITS = {-2: "MAX_JOBS_SUBMITTED", -3: "MAX_JOBS_PER_OWNER", -4: _PER_SUBMISSION}
_NOT_ALLOWED = {-5: "disabled", -6: "unknown", -7: "not allowed"}
_NO_NUMBER = re.compile(r"expected next ProcId to be (\d+), but Schedd says (-\d+)")
_REFUSALS = (
    "Failed to create job ad, errmsg=",
    "Failed to create a cluster ad, errmsg=",
    "Failed to create new cluster.SCHEDD:13:",  # EACCES: a user that is disabled or not known
    "Unable to commit transaction, SCHEDD:2:",  # a submit requirement; each of its verdicts has its number
    "Unable to commit transaction, SCHEDD:1:",
    "Unable to commit transaction, SCHEDD:3:",
    "Unable to commit transaction, SCHEDD:30:",  # a required job transform
)


def check_description(commands: Mapping[str, str]) -> Any:
    """The submit description as HTCondor reads it.

    Raises:
        ScheddError: HTCondor does not take it, or a credential that it names is not there.
    """
    _check_proxy({name.strip().lower(): value.strip() for name, value in commands.items()})
    try:
        return htcondor2.Submit(dict(commands))
    except Exception as exc:  # the bindings raise many kinds for one fault
        raise ScheddError(f"HTCondor does not take the submit description: {exc}") from exc


def _check_proxy(commands: Mapping[str, str]) -> None:
    """Look for the grid proxy that jobs are to have, as condor_submit does.

    Raises:
        ScheddError: it cannot be read.
    """
    named = commands.get("x509userproxy", "")
    if named:
        setting, path = f"worker.extra_submit['x509userproxy'] = {named!r}", named
    elif commands.get("use_x509userproxy", "").lower() in ("true", "t", "yes", "1"):
        path = os.environ.get("X509_USER_PROXY") or f"/tmp/x509up_u{os.getuid()}"
        setting = f"worker.extra_submit['use_x509userproxy'] is set, and the grid proxy {path}"
    else:
        return
    if "$" in path:
        return  # HTCondor fills it in
    if not os.path.isabs(path):
        raise ScheddError(f"{setting} is no full path; give one, since jobs are submitted from another directory")
    if not os.access(path, os.R_OK):
        raise ScheddError(f"{setting} cannot be read; make one (voms-proxy-init, grid-proxy-init), or name another")


class ScheddClient:
    """One schedd, located once and found again when it moved (a restart changes its address).

    Args:
        address: how to reach it.

    Attributes:
        clock_ahead: seconds that the schedd's clock is ahead of this host's, at least, when it was last seen; negative
            where it is behind, and 0 as long as the difference may be the question's own time.
        limit: the limit for which the last submission took fewer jobs than were asked for, in words; else empty.

    Raises:
        ScheddError: the configuration file or token file cannot be read.
    """

    def __init__(self, address: ScheddAddress) -> None:
        self.address = address
        self.clock_ahead = 0.0
        self.limit = ""
        self._most_at_once = sys.maxsize
        self._schedd: Any = None
        self._owner: str | None = None
        self._token: TokenDirectory | None = None
        if address.config_file:
            if not os.access(address.config_file, os.R_OK):
                raise ScheddError(
                    f"condor.config_file = {address.config_file!r} cannot be read; name an HTCondor configuration file"
                )
            os.environ["CONDOR_CONFIG"] = address.config_file
            htcondor2.reload_config()
        if address.token is not None:
            self._use_token(address.token)
        elif address.token_file:
            self._use_token(_token_in(Path(address.token_file)))
        if "SEC_FS_ENFORCE_CHANNEL_BINDING" not in htcondor2.param:
            # 25.x refuses FS authentication with 23.x daemons otherwise.
            htcondor2.param["SEC_FS_ENFORCE_CHANNEL_BINDING"] = "FALSE"

    def _use_token(self, token: str) -> None:
        self._token = TokenDirectory(token)
        htcondor2.param["SEC_TOKEN_DIRECTORY"] = str(self._token.path)

    def close(self) -> None:
        """Forget the token's copy."""
        if self._token is not None:
            self._token.close()

    def locate(self) -> Any:
        """The schedd, located through the collector where one is named.

        Raises:
            ScheddError: it cannot be found; the message names the setting and the remedy.
        """
        self._check_port()
        if self._schedd is not None:
            return self._schedd
        where = self.address.collector or htcondor2.param.get("COLLECTOR_HOST") or "no COLLECTOR_HOST configured"
        try:
            if self.address.collector is None and self.address.schedd is None:
                self._schedd = htcondor2.Schedd()
                return self._schedd
            collector = htcondor2.Collector(self.address.collector) if self.address.collector else htcondor2.Collector()
            ad = (
                collector.locate(htcondor2.DaemonType.Schedd, self.address.schedd)
                if self.address.schedd
                else collector.locate(htcondor2.DaemonType.Schedd)
            )
            if ad is None:
                raise ScheddError(self._not_found(collector, where))
            self._schedd = htcondor2.Schedd(ad)
        except ScheddError:
            raise
        except Exception as exc:  # the bindings raise many kinds for one fault
            raise ScheddError(self._unreachable(where, exc)) from exc
        return self._schedd

    def _check_port(self) -> None:
        """Look who listens at the embedded pool's port, before we prove there who we are.

        Raises:
            ScheddError: it is somebody else.
        """
        if self.address.collector is not None:
            return
        try:
            check_pool(htcondor2.param.get(PORT_OWNERS), htcondor2.param.get("COLLECTOR_HOST"))
        except ForeignListenerError as exc:
            raise ScheddError(str(exc)) from exc

    def _not_found(self, collector: Any, where: str) -> str:
        known = [str(ad.get("Name")) for ad in collector.query(htcondor2.AdType.Schedd, projection=["Name"])]
        return (
            f"condor.schedd = {self.address.schedd!r}: the collector at {where} knows no schedd of that name; "
            f"it knows {', '.join(known) or 'none'}"
        )

    def _unreachable(self, where: str, exc: Exception) -> str:
        named = f"condor.schedd = {self.address.schedd!r}" if self.address.schedd else "the schedd"
        if any(word in str(exc) for word in ("uthenticat", "DENIED")):
            return (
                f"{named} does not accept our login (collector: {where}): {exc}. Check condor.token_file or "
                "condor.credentials_block, and the authentication methods of condor.config_file"
            )
        if _SAID.search(str(exc)):
            return f"{named} answers (collector: {where}): {' '.join(str(exc).split())}"
        return (
            f"{named} cannot be reached (collector: {where}): {exc}. Check that HTCondor runs there, and "
            "condor.collector, condor.schedd and condor.config_file"
        )

    def _call(self, what: str, function: str, *args: Any, **kwargs: Any) -> Any:
        try:
            schedd = self.locate()
            if self._token is not None:
                # A schedd of release 23.9 ends the connection of a client that begins a session with a question for the
                # queue and has only a token. It takes one who begins with WRITE, and then the question in that session,
                # which lasts a minute.
                htcondor2.ping(schedd._addr, "WRITE")
            return getattr(schedd, function)(*args, **kwargs)
        except ScheddError:
            raise
        except Exception as exc:
            if _EDIT_REFUSED.search(str(exc)):
                raise EditRefused(f"{what}: the schedd refused: {exc}") from exc
            # A restarted schedd has a new address: look it up again at the next call.
            self._schedd = self._owner = None
            where = self.address.collector or htcondor2.param.get("COLLECTOR_HOST") or "no COLLECTOR_HOST configured"
            raise ScheddError(f"{what}: {self._unreachable(where, exc)}") from exc

    def user(self) -> str:
        """As whom the schedd knows us, such as ``anne@example.org``, once it would take jobs from us.

        Raises:
            ScheddError: it would not; the message says as whom we came.
        """
        location = self.locate()._addr
        try:
            answer = htcondor2.ping(location, "WRITE")
        except Exception as exc:
            raise ScheddError(
                f"the schedd at {location} does not let us in: {exc}. Check condor.token_file or "
                "condor.credentials_block, and that the schedd accepts this user (ALLOW_WRITE)"
            ) from exc
        user = str(answer.get("MyRemoteUserName") or "us")
        if not answer.get("AuthorizationSucceeded", True):
            raise ScheddError(
                f"the schedd at {location} refuses {user}: not authorized to submit (WRITE). Check condor.token_file "
                "or condor.credentials_block, or ask for access to the pool"
            )
        return user

    def _mine(self, condition: str) -> str:
        """The constraint for those of our own jobs that meet a condition.

        Raises:
            ScheddError: the schedd does not say who we are, so that no job is known to be ours.
        """
        if self._owner is None:
            # Without its domain: a schedd gives jobs the Owner that it knows us as, and a User of its own UID_DOMAIN,
            # from wherever our login is; by default it compares owners without their domains, too (HTCondor,
            # qmgmt.cpp, SetAttribute and UserCheck2). A job's AccountingGroup changes neither.
            try:
                user = self.user()
            except ScheddError:
                # A ping does not tell a schedd that is away from one that does not let us in; a question does.
                self._call("the queue could not be read", "query", "false", ["ClusterId"], limit=1)
                raise
            name, _, domain = user.partition("@")
            if name in _NOBODY or domain in _NOBODY - {""}:
                raise ScheddError(
                    f"the schedd knows us as {user!r} only, and so no job as ours. Check condor.token_file or "
                    "condor.credentials_block, and the schedd's map of users (CERTIFICATE_MAPFILE)"
                )
            self._owner = name
        return f"Owner =?= {string_literal(self._owner)} && ({condition})"  # `==` takes Anne for anne

    def submit(self, commands: Mapping[str, str], count: int) -> list[str]:
        """Submit `count` jobs in one transaction, or in several where the schedd takes fewer in one.

        Returns:
            the ids of the jobs, ``cluster.proc``; fewer than `count` where the schedd takes no more (`limit` says why).

        Raises:
            ScheddRefusal: the jobs are refused, and would be again; nothing was submitted.
            ScheddLimit: the schedd takes none of them now; nothing was submitted.
            ScheddError: the schedd is unreachable, or said something else; nothing was submitted.
        """
        self.limit = ""
        job_ids: list[str] = []
        left = count
        try:
            while left > 0:
                wanted = min(left, self._most_at_once)
                try:
                    job_ids += self._submit(commands, wanted)
                    left -= wanted
                except ScheddLimit as exc:
                    if not 0 < exc.fits < wanted:
                        raise
                    if exc.in_one_submission:
                        self._most_at_once = exc.fits
                    else:
                        self.limit, left = str(exc), exc.fits
        except ScheddError as exc:
            if not job_ids:
                raise
            self.limit = str(exc)
        return job_ids

    def _submit(self, commands: Mapping[str, str], count: int) -> list[str]:
        submit = check_description(commands)
        what = f"{count} worker jobs could not be submitted"
        try:
            result = self._call(what, "submit", submit, count, spool=self.address.spool)
        except ScheddError as exc:
            judged = judge_submission(str(exc.__cause__ or ""))
            if judged is None:
                raise
            raise judged from exc.__cause__
        if self.address.spool:
            try:
                self._call("the workers' input could not be spooled", "spool", result)
            except ScheddError:
                # They would be held for their input for ever, while others are submitted in their place.
                with suppress(ScheddError):
                    self.remove(_ids_of(result), "prefect_htcdask: its input could not be spooled")
                raise
        return _ids_of(result)

    def now(self) -> float:
        """The time by the schedd's clock, by which it and its shadows judge the leases: Unix time in seconds.

        Raises:
            ScheddError: the schedd is unreachable.
        """
        asked = time.time()
        summary = htcondor2.QueryOpts.SummaryOnly
        ads = self._call("the schedd's clock could not be read", "query", "false", [SERVER_TIME], opts=summary)
        return self._saw_clock(ads, asked)

    def _saw_clock(self, ads: Sequence[Mapping[str, Any]], asked: float) -> float:
        """Take in what an answer to a question, asked at `asked`, tells of the schedd's clock; returns its time now."""
        answered = time.time()
        told = ads[0].get(SERVER_TIME) if ads else None
        if told is None:  # no release that is in use; but it has its own clock, whatever it says of it
            return answered + self.clock_ahead
        seen = float(told)
        self.clock_ahead = seconds_ahead(seen, asked, answered)
        return seen

    def renew(self, condition: str, duration: float) -> int:
        """Move the lease of our jobs that meet a condition to `duration` seconds from now; returns how many they were.

        SetDirty makes the schedd tell the shadows: the shadow judges a running job's periodic expressions.

        Raises:
            ScheddError: the schedd is unreachable, or refused for jobs that are in the queue; the others were renewed.
        """
        asked = time.time()
        found = self.query(condition, [SERVER_TIME], limit=1)
        if not found:
            return 0  # an edit that matches no job raises
        expires = int(self._saw_clock(found, asked) + duration)
        try:
            return self._move_lease(self._mine(condition), expires)
        except EditRefused as exc:
            return self._renew_each(condition, expires, exc)

    def _move_lease(self, jobs: Sequence[str] | str, expires: int) -> int:
        edited: int = self._call(
            "the lease of the worker jobs could not be renewed",
            "edit",
            jobs if isinstance(jobs, str) else list(jobs),
            LEASE_ATTRIBUTE,
            str(expires),
            htcondor2.TransactionFlag.SetDirty,
        )
        return edited

    def _renew_each(self, condition: str, expires: int, refusal: EditRefused) -> int:
        """Renew by ids what the schedd did not take as a whole: one job that it refuses stands in nobody else's way."""
        ids = self._ids(condition)
        if not ids:
            return 0  # they have just left the queue
        parts = [ids]
        while parts:
            ids = parts.pop()
            try:
                self._move_lease(ids, expires)
            except EditRefused:
                there = set(self._ids(condition))
                left = [job for job in ids if job in there]
                if len(left) < len(ids):
                    parts += [left] if left else []
                elif half := len(ids) // 2:
                    parts += [ids[:half], ids[half:]]
        # The bindings do not wait for the answer to each edit: only the queue tells what was done.
        renewed = self._ids(f"({condition}) && {LEASE_ATTRIBUTE} >= {expires}")
        if missed := sorted(set(self._ids(condition)) - set(renewed)):
            raise ScheddError(f"{refusal} (jobs {', '.join(missed[:3])}{'…' if len(missed) > 3 else ''})") from refusal
        logger.warning("%s; %d jobs were renewed by their ids", refusal, len(renewed))
        return len(renewed)

    def _ids(self, condition: str) -> list[str]:
        return [f"{ad['ClusterId']}.{ad['ProcId']}" for ad in self.query(condition, ["ClusterId", "ProcId"])]

    def remove(self, jobs: Sequence[str] | str, reason: str) -> int:
        """Remove jobs, given by ids or, those of our own, by a condition; returns how many were told to go."""
        if not jobs:
            return 0
        spec = self._mine(jobs) if isinstance(jobs, str) else list(jobs)
        # A plain string is dropped by the bindings: the reason goes as (text, code).
        result = self._call("worker jobs could not be removed", "act", htcondor2.JobAction.Remove, spec, (reason, 1))
        return int(result["TotalSuccess"]) if result else 0

    def forget(self, condition: str, reason: str) -> int:
        """Take our jobs out of the queue that are being removed and do not go (`condor_rm -forcex`); returns how many.

        Args:
            condition: which of them.
            reason: the reason, for the job ads.
        """
        constraint, action = self._mine(condition), htcondor2.JobAction.RemoveX
        result = self._call("worker jobs could not be forgotten", "act", action, constraint, (reason, 1))
        return int(result["TotalSuccess"]) if result else 0

    def query(self, condition: str, projection: Sequence[str] = (), limit: int = -1) -> list[dict[str, Any]]:
        """Ads of our jobs in the queue that meet a condition, as plain dictionaries of evaluated values."""
        constraint = self._mine(condition)
        ads = self._call("the queue could not be read", "query", constraint, list(projection), limit=limit)
        return [_plain_ad(ad) for ad in ads]

    def history(self, condition: str, projection: Sequence[str], limit: int = 1000) -> list[dict[str, Any]]:
        """Ads of our jobs that left the queue and meet a condition, newest first."""
        ads = self._call("the history could not be read", "history", self._mine(condition), list(projection), limit)
        return [_plain_ad(ad) for ad in ads]

    def waiting_job(self, condition: str) -> classad2.ClassAd | None:
        """The ad of an idle job of ours that meets a condition, with its expressions as they are, if there is one."""
        idle = self._mine(f"({condition}) && JobStatus == 1")
        ads = self._call("the queue could not be read", "query", idle, [], limit=1)
        return ads[0] if ads else None

    def slots(self, attributes: Sequence[str]) -> list[classad2.ClassAd]:
        """The pool's slots, with their expressions as they are.

        Args:
            attributes: what is asked for of each.

        Raises:
            ScheddError: the collector cannot be asked.
        """
        return self._ask_collector("slots", htcondor2.AdType.Slot, None, attributes)

    def machines(self) -> set[str]:
        """Names of the pool's machines.

        Raises:
            ScheddError: the collector cannot be asked.
        """
        return {str(slot.get("Machine")) for slot in self.slots(["Machine"])}

    def accounting(self, submitter: str) -> list[dict[str, Any]]:
        """Who uses the pool, with what priority; `submitter` in any case, if the negotiator knows them.

        Raises:
            ScheddError: the collector cannot be asked.
        """
        constraint = f"ResourcesUsed > 0 || Name == {string_literal(submitter)}"
        attributes = ["Name", "Priority", "ResourcesUsed", "IsAccountingGroup"]
        found = self._ask_collector("its accounting", htcondor2.AdType.Accounting, constraint, attributes)
        return [_plain_ad(ad) for ad in found]

    def _ask_collector(
        self, what: str, kind: htcondor2.AdType, constraint: str | None, attributes: Sequence[str]
    ) -> list[classad2.ClassAd]:
        self._check_port()
        try:
            collector = htcondor2.Collector(self.address.collector) if self.address.collector else htcondor2.Collector()
            return list(collector.query(kind, constraint, list(attributes)))
        except Exception as exc:  # the bindings raise many kinds for one fault
            raise ScheddError(f"the collector could not be asked for {what}: {exc}") from exc


def _ids_of(result: Any) -> list[str]:
    """Ids of the jobs that a submission made."""
    cluster, first = result.cluster(), result.first_proc()
    return [f"{cluster}.{proc}" for proc in range(first, first + result.num_procs())]


def _token_in(path: Path) -> str:
    try:
        return path.read_text()
    except OSError as exc:
        raise ScheddError(f"condor.token_file = {str(path)!r} cannot be read: {exc.strerror}") from exc


def _plain_ad(ad: Any) -> dict[str, Any]:
    plain = {}
    for name in ad:
        try:
            value = ad.eval(name)
        except Exception:
            value = str(ad[name])
        if isinstance(value, classad2.Value):
            value = None
        plain[name] = value
    return plain
