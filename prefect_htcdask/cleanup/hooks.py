"""Flow hooks that remove what a flow run left behind, from outside its process.

A flow's module imports this one, on workers too: whatever costs time or is not there is imported by the hook itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from prefect import Flow
    from prefect.client.schemas.objects import FlowRun, State

F = TypeVar("F", bound="Flow[..., Any]")

_HOOKS = ("on_completion_hooks", "on_failure_hooks", "on_cancellation_hooks", "on_crashed_hooks")


def with_cleanup(flow: F) -> F:
    """Have a flow remove what its runs leave behind, at each of their ends: `remove_leftover_jobs` as a hook for all.

    Put it above ``@flow``::

        @with_cleanup
        @flow(task_runner=HTCDaskTaskRunner())
        def analysis(): ...

    The flow's own hooks stay, and come first. Prefect's processes that supervise a deployment's runs import the flow
    anew, so that they find these hooks too, and call them where the flow's own process is dead.

    Args:
        flow: the flow; it is changed in place.

    Returns:
        the same flow.

    Raises:
        TypeError: it was given no flow, but a function.
    """
    from prefect import Flow

    if not isinstance(flow, Flow):
        raise TypeError(f"with_cleanup takes a flow, not {flow!r}: write @with_cleanup above @flow(...), not below it")
    for name in _HOOKS:
        hooks = list(getattr(flow, name))
        if remove_leftover_jobs not in hooks:
            setattr(flow, name, [*hooks, remove_leftover_jobs])
    return flow


def remove_leftover_jobs(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """Remove the HTCondor jobs and gateway clusters that a flow run left behind; a hook for any of its ends.

    Use it as ``@flow(on_cancellation=[remove_leftover_jobs], on_crashed=[remove_leftover_jobs])``, or for all ends by
    `with_cleanup`. It needs the flow run's id and the settings only, and so works after the flow's process is dead.
    Running twice, or twice at once, is harmless. Jobs of a later attempt of the flow run are never touched, nor those
    that the flow's own process is about to close in order, which may still wait for its last task runs.

    What goes wrong is logged as one error of the flow run and not raised: its state is not this hook's to change, and
    the leases end what is left.

    Args:
        flow: the flow; the settings of its task runner are used.
        flow_run: the flow run.
        state: its state.
    """
    from prefect.logging.loggers import flow_run_logger

    from prefect_htcdask.cleanup.remove import remove_after_flow_run
    from prefect_htcdask.runner.ui.events import emit_cleanup

    logger = flow_run_logger(flow_run, flow)
    removed = remove_after_flow_run(flow, flow_run, state)
    if removed.jobs or removed.clusters:
        logger.info(
            "Removed %d leftover HTCondor jobs and stopped %d leftover gateway clusters",
            removed.jobs,
            len(removed.clusters),
        )
    if removed.jobs or removed.clusters or removed.problems:
        emit_cleanup(str(flow_run.id), flow_run.name, removed.jobs, removed.clusters, removed.problems)
    if removed.problems:
        logger.error(
            "Could not remove all that this flow run may have left behind. Its jobs and gateway clusters end by "
            "themselves when their lease is not renewed, and `prefect-htcdask sweep` removes them. In the way was: %s",
            "; ".join(removed.problems),
        )
