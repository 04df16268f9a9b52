"""Jobs of a row's flow, and how it ends."""

from __future__ import annotations

from tests.faults.arena import Arena
from tests.faults.flow_process import FlowProcess
from tests.faults.row import Row


def jobs_of(arena: Arena, flow: FlowProcess) -> list[str]:
    """Ids of the jobs that carry a flow run's id."""
    return sorted(
        f"{job['ClusterId']}.{job['ProcId']}"
        for job in arena.jobs("PrefectFlowRunId")
        if job["PrefectFlowRunId"] == flow.flow_run_id
    )


def finish(arena: Arena, row: Row, flow: FlowProcess, again: int) -> None:
    """Let the flow end well, and measure."""
    flow.let_go()
    row.expect(flow.wait(120) == 0, f"the flow failed: {flow.tail(5)}")
    row.gone(arena, flow.said("ended")["time"], 20, 20)
    row.judge(arena, [flow], ["Completed"], again=again)
    row.check()
