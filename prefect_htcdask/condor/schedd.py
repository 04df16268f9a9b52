"""The schedd, as far as worker jobs need it: locate, submit, renew, remove, query.

The bindings hold the GIL during calls to a schedd, so this module is used in the supervisor and in one-shot processes
only, never in the flow's own.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import classad2
import htcondor2

from .token import TokenDirectory
from .worker_job import LEASE_ATTRIBUTE, string_literal


class ScheddError(RuntimeError):
    """The schedd cannot be had or refused. The message says which, why, and what to do."""


@dataclass(frozen=True)
class ScheddAddress:
    """How to reach a schedd.

    Attributes:
        collector: address of the pool's collector, or `None` for the configuration's.
        schedd: name of the schedd, or `None` for the local one.
        config_file: CONDOR_CONFIG, or `None` for HTCondor's own search.
        token_file: file with an IDTOKEN, or `None`.
        spool: whether input files are spooled to the schedd.
        token: an IDTOKEN's text in place of a file, or `None`.
    """

    collector: str | None = None
    schedd: str | None = None
    config_file: str | None = None
    token_file: str | None = None
    spool: bool = False
    token: str | None = field(default=None, repr=False)

    @property
    def is_local(self) -> bool:
        """Whether the schedd sees this host's files, and so can write the job event log here."""
        return not self.spool and self.schedd is None and self.collector is None


def check_description(commands: Mapping[str, str]) -> Any:
    """The submit description as HTCondor reads it.

    Raises:
        ScheddError: HTCondor does not take it.
    """
    try:
        return htcondor2.Submit(dict(commands))
    except Exception as exc:  # the bindings raise many kinds for one fault
        raise ScheddError(f"HTCondor does not take the submit description: {exc}") from exc


class ScheddClient:
    """One schedd, located once and found again when it moved (a restart changes its address).

    Args:
        address: how to reach it.

    Raises:
        ScheddError: the configuration file or token file cannot be read.
    """

    def __init__(self, address: ScheddAddress) -> None:
        self.address = address
        self._schedd: Any = None
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

    def _not_found(self, collector: Any, where: str) -> str:
        known = [str(ad.get("Name")) for ad in collector.query(htcondor2.AdType.Schedd, projection=["Name"])]
        return (
            f"condor.schedd = {self.address.schedd!r}: the collector at {where} knows no schedd of that name; "
            f"it knows {', '.join(known) or 'none'}"
        )

    def _unreachable(self, where: str, exc: Exception) -> str:
        named = f"condor.schedd = {self.address.schedd!r}" if self.address.schedd else "the schedd"
        if "authenticat" in str(exc).lower():
            return (
                f"{named} does not accept our login (collector: {where}): {exc}. Check condor.token_file or "
                "condor.credentials_block, and the authentication methods of condor.config_file"
            )
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
            # A restarted schedd has a new address: look it up again at the next call.
            self._schedd = None
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

    def submit(self, commands: Mapping[str, str], count: int) -> list[str]:
        """Submit `count` jobs in one transaction.

        Returns:
            the ids of the jobs, ``cluster.proc``.

        Raises:
            ScheddError: the schedd is unreachable or refused; nothing was submitted.
        """
        submit = check_description(commands)
        result = self._call(
            f"{count} worker jobs could not be submitted", "submit", submit, count, spool=self.address.spool
        )
        if self.address.spool:
            try:
                self._call("the workers' input could not be spooled", "spool", result)
            except ScheddError:
                # They would be held for their input for ever, while others are submitted in their place.
                with suppress(ScheddError):
                    self.remove(f"ClusterId == {result.cluster()}", "prefect_htcdask: its input could not be spooled")
                raise
        cluster, first = result.cluster(), result.first_proc()
        return [f"{cluster}.{proc}" for proc in range(first, first + result.num_procs())]

    def renew(self, constraint: str, duration: float) -> int:
        """Move the lease of jobs to `duration` seconds from now; returns how many jobs there were.

        SetDirty makes the schedd tell the shadows: the shadow judges a running job's periodic expressions.
        """
        expires = int(time.time() + duration)
        if not self.query(constraint, ["ClusterId"], limit=1):
            return 0  # an edit that matches no job raises
        edited: int = self._call(
            "the lease of the worker jobs could not be renewed",
            "edit",
            constraint,
            LEASE_ATTRIBUTE,
            str(expires),
            htcondor2.TransactionFlag.SetDirty,
        )
        return edited

    def remove(self, jobs: Sequence[str] | str, reason: str) -> int:
        """Remove jobs, given by ids or by one constraint; returns how many were told to go."""
        if not jobs:
            return 0
        spec = jobs if isinstance(jobs, str) else list(jobs)
        # A plain string is dropped by the bindings: the reason goes as (text, code).
        result = self._call("worker jobs could not be removed", "act", htcondor2.JobAction.Remove, spec, (reason, 1))
        return int(result["TotalSuccess"]) if result else 0

    def forget(self, constraint: str, reason: str) -> int:
        """Take jobs out of the queue that are being removed and do not go (`condor_rm -forcex`); returns how many."""
        action = htcondor2.JobAction.RemoveX
        result = self._call("worker jobs could not be forgotten", "act", action, constraint, (reason, 1))
        return int(result["TotalSuccess"]) if result else 0

    def query(self, constraint: str, projection: Sequence[str] = (), limit: int = -1) -> list[dict[str, Any]]:
        """Job ads in the queue that meet a constraint, as plain dictionaries of evaluated values."""
        ads = self._call("the queue could not be read", "query", constraint, list(projection), limit=limit)
        return [_plain_ad(ad) for ad in ads]

    def history(self, constraint: str, projection: Sequence[str], limit: int = 1000) -> list[dict[str, Any]]:
        """Ads of jobs that left the queue, newest first."""
        ads = self._call("the history could not be read", "history", constraint, list(projection), limit)
        return [_plain_ad(ad) for ad in ads]

    def waiting_job(self, constraint: str) -> classad2.ClassAd | None:
        """The ad of an idle job that meets a constraint, with its expressions as they are; `None` if there is none."""
        idle = f"({constraint}) && JobStatus == 1"
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
        try:
            collector = htcondor2.Collector(self.address.collector) if self.address.collector else htcondor2.Collector()
            return list(collector.query(kind, constraint, list(attributes)))
        except Exception as exc:  # the bindings raise many kinds for one fault
            raise ScheddError(f"the collector could not be asked for {what}: {exc}") from exc


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
