"""Asks HTCondor why jobs wait: one of them, the pool's slots and its accounting, for `diagnosis_idle`."""

from __future__ import annotations

import logging

import classad2

from prefect_htcdask.condor.diagnosis import Diagnosis
from prefect_htcdask.condor.diagnosis_idle import Request, Share, diagnose_idle
from prefect_htcdask.condor.match_analysis import SLOT_ATTRIBUTES, analyse, unknown_references
from prefect_htcdask.condor.schedd import ScheddClient, ScheddError

logger = logging.getLogger(__name__)


class IdleJobs:
    """Explains idle jobs. What slots have to be asked for is learned from the first look at a pool.

    Args:
        schedd: the schedd.
    """

    def __init__(self, schedd: ScheddClient) -> None:
        self._schedd = schedd
        self._attributes = {name.lower() for name in SLOT_ATTRIBUTES}

    def explain(self, constraint: str, waiting: int, settings: str = "worker") -> Diagnosis | None:
        """Why idle jobs do not start; `None` where none is idle any more.

        One projected query for slots, and one for the users of the pool. A pool whose slots' policy refers to more
        than they are asked for is asked once again.

        Args:
            constraint: jobs of one kind; one of the idle ones stands for all.
            waiting: how many are idle.
            settings: where these workers' settings are.

        Raises:
            ScheddError: schedd or collector cannot be asked.
        """
        job = self._schedd.waiting_job(constraint)
        if job is None:
            return None
        own = unknown_references(job, []) - self._attributes
        self._attributes |= own
        slots = self._schedd.slots(sorted(self._attributes))
        if unknown := unknown_references(job, slots) - self._attributes:
            self._attributes |= unknown
            slots = self._schedd.slots(sorted(self._attributes))
        return diagnose_idle(
            analyse(job, slots),
            Request.of({name: job.eval(name) for name in job if name.lower().startswith("request")}),
            waiting=max(1, waiting),
            settings=settings,
            share=self._share(job),
            rejected=str(job.get("LastRejMatchReason") or ""),
        )

    def _share(self, job: classad2.ClassAd) -> Share | None:
        """The place of the job's owner in the pool; `None` where it is not known, to us or at all."""
        submitter = _submitter(job)
        try:
            users = self._schedd.accounting(submitter)
        except ScheddError as exc:
            logger.info("%s", exc)
            return None
        users = [user for user in users if not user.get("IsAccountingGroup")]
        own = next((user for user in users if user.get("Name") == submitter), None)
        if own is None:
            return None
        priority = float(own.get("Priority") or 0.0)
        ahead = [
            float(user.get("ResourcesUsed") or 0.0)
            for user in users
            if user is not own and float(user.get("Priority") or 0.0) < priority and user.get("ResourcesUsed")
        ]
        return Share(priority, float(own.get("ResourcesUsed") or 0.0), len(ahead), sum(ahead))


def _submitter(job: classad2.ClassAd) -> str:
    """As whom the negotiator knows the job's owner: ``user@domain`` or ``group.user@domain``."""
    user = str(job.get("User") or "")
    group = job.get("AccountingGroup")
    return f"{group}@{user.rpartition('@')[2]}" if isinstance(group, str) and group else user
