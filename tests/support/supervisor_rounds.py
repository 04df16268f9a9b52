"""A supervisor without a pool."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dask_gateway_server.tls import new_keypair

from prefect_htcdask.condor.address import ScheddAddress
from prefect_htcdask.condor.submit_description import WorkerSpec
from prefect_htcdask.supervisor.loop import Supervisor
from prefect_htcdask.supervisor.policy import Decision, Target
from prefect_htcdask.supervisor.protocol import GatewayAccess, GroupPlan, SupervisorConfig
from prefect_htcdask.supervisor.worker_group import WorkerGroup

ANSWER = {"status": "ok", "groups": {}, "in_hand": {}, "joined": [], "idle": {}}


class Rounds(Supervisor):
    """A supervisor without a pool: what it would do is written down, and fails where it is told so."""

    answer: dict[str, Any] = ANSWER

    def __init__(self, directory: Path) -> None:
        self.messages: list[dict[str, Any]] = []
        self.done: list[str] = []
        self.fails: dict[str, Exception] = {}
        cert, key = (part.decode() for part in new_keypair("c"))
        access = GatewayAccess("http://[::1]:1", "gateway://[::1]:1", "", None, "c", "tls://[::1]:1", cert, key)
        plan = SupervisorConfig(
            owner="o",
            parent_pid=1,
            access=access,
            schedd=ScheddAddress(),
            groups={name: GroupPlan(WorkerSpec(), 30.0, Target(fixed=1)) for name in ("cpu", "gpu")},
            worker_config={},
            worker_secrets={},
            flow_run=None,
            run_directory=str(directory),
            lease=30.0,
            scheduler_lease=30.0,
            lost_schedd=30.0,
            interval=0.05,
            residence=1.0,
            max_idle_jobs=10,
            max_failures=3,
        )
        super().__init__(plan, Any, self.messages.append)  # type: ignore[arg-type]

    def step(self, name: str) -> None:
        self.done.append(name)
        if name in self.fails:
            raise self.fails[name]

    async def read_jobs(self, at_once: bool = False) -> None:
        self.step("read")

    async def ask_scheduler(self) -> dict[str, Any] | None:
        self.step("ask")
        return self.answer

    async def act(self, group: WorkerGroup, decision: Decision) -> int:
        self.step(group.name)
        return 0

    async def renew(self) -> None:
        self.step("renew")
