"""The connection between the flow's process and the Dask scheduler breaks: what goes on, what is submitted again."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import dask
import pytest
from prefect import flow, get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import State
from prefect.runtime import flow_run as flow_run_runtime

from prefect_htcdask import HTCDaskTaskRunner
from prefect_htcdask.errors import HTCDaskError, TaskRunLost
from prefect_htcdask.runner import flow_run
from prefect_htcdask.runner.client import client as reconnection
from prefect_htcdask.runner.submit import large_states
from tests.support.marked_tasks import after, gated, history, marked, runs
from tests.support.this_flow import client_of_this_flow, run_of_this_flow
from tests.support.waiting import wait_until
from tests.support.wire import PATIENCE, Wire, nothing_is_kept

pytestmark = pytest.mark.usefixtures("prefect_api")


def told(caplog: pytest.LogCaptureFixture, words: str) -> list[str]:
    return [record.getMessage() for record in caplog.records if words in record.getMessage()]


def test_tasks_run_on_while_the_connection_is_away(
    wire: Wire, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing is submitted again, since the scheduler has kept all of it; what ended meanwhile is heard of."""
    ids: dict[str, Any] = {}

    @flow(task_runner=HTCDaskTaskRunner(address=wire.address))
    def computing() -> list[Any]:
        ids["flow"] = flow_run_runtime.id
        early = marked.submit(tmp_path, "early")
        early.result(timeout=PATIENCE)
        ended = marked.submit(tmp_path, "ended")
        wait_until(lambda: ended.wrapped_future.status == "finished", PATIENCE, "one has ended, and is not collected")
        first, second = gated.submit(tmp_path, "first"), gated.submit(tmp_path, "second")
        queued = marked.submit(tmp_path, "queued", wait_for=[first])
        called: list[Any] = []
        second.add_done_callback(called.append)
        wait_until(lambda: runs(tmp_path, "first") and runs(tmp_path, "second"), PATIENCE, "both run")
        wire.cut()
        wait_until(lambda: client_of_this_flow().status == "connecting", PATIENCE, "the loss is noticed")
        assert first.is_pending() and not first.state.is_final()
        (tmp_path / "second.go").touch()
        threading.Timer(2, wire.mend).start()
        # Waits for the connection.
        late = marked.submit(tmp_path, "late", wait_for=[queued])
        assert second.result(timeout=PATIENCE) == "second"
        wait_until(lambda: called == [second], PATIENCE, "the callback was called")
        (tmp_path / "first.go").touch()
        late.result(timeout=PATIENCE)
        return [first.result(timeout=PATIENCE), early.result()[0] > 0, ended.result(timeout=PATIENCE)[0] > 0]

    assert computing() == ["first", True, True]
    for name in ("early", "ended", "first", "second", "queued", "late"):
        assert len(runs(tmp_path, name)) == 1, name
    (line,) = told(caplog, "is there again")
    assert "of 4 unfinished task runs the scheduler has kept 4, and 0 were submitted again; 1 results in hand" in line
    assert nothing_is_kept(wire.scheduler)


def test_what_the_scheduler_never_got_is_submitted_again(
    wire: Wire, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Graphs that were on their way as the connection broke, with upstream tasks here, there and nowhere."""

    @flow(task_runner=HTCDaskTaskRunner(address=wire.address))
    def computing() -> list[Any]:
        in_hand = marked.submit(tmp_path, "in-hand")
        gate = gated.submit(tmp_path, "gate")
        # The scheduler has heard of this task before, as of each whose envelope it must have.
        after.submit(1, tmp_path, "before").result(timeout=PATIENCE)
        wait_until(lambda: runs(tmp_path, "gate"), PATIENCE, "the gate runs")
        wire.swallow()
        with dask.annotate(priority=7, colour="blue"):
            of_kept = after.submit(gate, tmp_path, "of-kept")
        nowhere = marked.submit(tmp_path, "nowhere")
        of_nowhere = after.submit([nowhere, of_kept], tmp_path, "of-nowhere")
        mapped = after.map([in_hand, nowhere, 3], tmp_path, [f"mapped-{n}" for n in range(3)])
        del nowhere
        wire.cut()
        wait_until(lambda: client_of_this_flow().status == "connecting", PATIENCE, "the loss is noticed")
        wire.mend()
        key = of_kept.wrapped_future.key
        annotations = wait_until(
            lambda: key in (tasks := wire.scheduler.tasks) and tasks[key].annotations, PATIENCE, "sent"
        )
        (tmp_path / "gate.go").touch()
        second, kept = of_nowhere.result(timeout=PATIENCE)
        return [annotations["colour"], annotations["priority"], kept, second[0] > 0, mapped.result(timeout=PATIENCE)[2]]

    assert computing() == ["blue", 7, "gate", True, 3]
    for name in ("in-hand", "gate", "nowhere"):
        assert len(runs(tmp_path, name)) == 1, name
    (line,) = told(caplog, "is there again")
    assert "of 8 unfinished task runs the scheduler has kept 2, and 6 were submitted again" in line


def test_what_the_scheduler_forgot_is_submitted_again(
    wire: Wire, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """No one stood in for the client: what it had wanted is gone, results that only workers had among it."""
    ids: dict[str, Any] = {}

    @flow(task_runner=HTCDaskTaskRunner(address=wire.address))
    def computing() -> list[Any]:
        ids["flow"] = flow_run_runtime.id
        gate = gated.submit(tmp_path, "gate")
        wait_until(lambda: runs(tmp_path, "gate"), PATIENCE, "the gate runs")
        in_hand = marked.submit(tmp_path, "in-hand")
        late = after.submit([in_hand, gate], tmp_path, "late")
        in_hand.result(timeout=PATIENCE)
        wait_until(lambda: _run_counts(ids["flow"]).get("gated"), PATIENCE, "the API has heard that the gate runs")
        _keep_nothing(wire)
        wire.cut()
        wait_until(lambda: client_of_this_flow().status == "connecting", PATIENCE, "the loss is noticed")
        wait_until(
            lambda: gate.wrapped_future.key not in wire.scheduler.tasks, PATIENCE, "the scheduler has forgotten it"
        )
        wire.mend()
        wait_until(lambda: wire.has(gate), PATIENCE, "it has it again")
        (tmp_path / "gate.go").touch()
        return list(late.result(timeout=PATIENCE)[1:])

    assert computing() == ["gate"]
    assert len(runs(tmp_path, "in-hand")) == 1
    (line,) = told(caplog, "is there again")
    assert "of 2 unfinished task runs the scheduler has kept 0, and 2 were submitted again; 1 results in hand" in line


@pytest.mark.parametrize("kept", [True, False])
def test_a_large_state_in_hand_is_sent_again(
    wire: Wire, tmp_path: Path, caplog: pytest.LogCaptureFixture, kept: bool
) -> None:
    """It is Dask data then, which the scheduler has forgotten, or of which it has never heard."""

    @flow(task_runner=HTCDaskTaskRunner(address=wire.address))
    def computing() -> list[bool]:
        large = marked.submit(tmp_path, "large", 2 * large_states.LIMIT)
        result = large.result(timeout=PATIENCE)
        # The scheduler has heard of this task before, as of each whose envelope it must have.
        first = after.submit(large if kept else 1, tmp_path, "first")
        wait_until(lambda: first.wrapped_future.status == "finished", PATIENCE, "it has ended")
        if kept:
            _keep_nothing(wire)
        wire.swallow()
        second = after.submit(large, tmp_path, "second")
        client = client_of_this_flow()
        client.submit_buffer.flush()
        (key,) = client.held_states
        wire.cut()
        wait_until(lambda: client.status == "connecting", PATIENCE, "the loss is noticed")
        wait_until(lambda: key not in wire.scheduler.tasks, PATIENCE, "the scheduler does not have it")
        wire.mend()
        found = second.result(timeout=PATIENCE) == result
        third = after.submit(large, tmp_path, "third").result(timeout=PATIENCE) == result
        return [found, third, list(client.held_states) == [key]]

    assert computing() == [True, True, True]
    assert len(runs(tmp_path, "large")) == 1
    (line,) = told(caplog, "is there again")
    assert "0, and 2 were submitted again" in line if kept else "1, and 1 were submitted again" in line


def test_a_map_that_is_described_while_the_connection_is_lost(wire: Wire, tmp_path: Path) -> None:
    """What was brought back for its first call is sent again, though no task that needs it has left yet."""

    @flow(task_runner=HTCDaskTaskRunner(address=wire.address))
    def computing() -> list[Any]:
        large = marked.submit(tmp_path, "large", 2 * large_states.LIMIT)
        result = large.result(timeout=PATIENCE)
        after.submit(1, tmp_path, "before").result(timeout=PATIENCE)
        run = run_of_this_flow()
        describe = run.submitter._describe_call

        def describe_slowly(*args: Any, **kwargs: Any) -> Any:
            described = describe(*args, **kwargs)
            if wire.swallows:
                wire.cut()
                wait_until(lambda: run.client.status == "connecting", PATIENCE, "the loss is noticed")
                wire.mend()
                wait_until(lambda: run.client.status == "running", PATIENCE, "it is there again")
            return described

        run.submitter._describe_call = describe_slowly  # type: ignore[method-assign]
        wire.swallow()
        mapped = after.map([large, 2], tmp_path, ["one", "two"])
        return [mapped.result(timeout=PATIENCE) == [result, 2], len(runs(tmp_path, "large"))]

    assert computing() == [True, 1]


def test_what_cannot_be_submitted_again_fails_the_flow(wire: Wire, tmp_path: Path) -> None:
    """It does not wait for ever for tasks of which nobody hears any more."""

    @flow(task_runner=HTCDaskTaskRunner(address=wire.address))
    def computing() -> None:
        kept = gated.submit(tmp_path, "gate")
        wait_until(lambda: runs(tmp_path, "gate"), PATIENCE, "the gate runs")
        in_hand = marked.submit(tmp_path, "in-hand")
        late = after.submit([in_hand, kept], tmp_path, "late")
        result = in_hand.result(timeout=PATIENCE)
        assert in_hand.packed.data is result
        in_hand.packed.data = threading.Lock()
        _keep_nothing(wire)
        wire.cut()
        wait_until(lambda: late.wrapped_future.key not in wire.scheduler.tasks, PATIENCE, "it is forgotten")
        wire.mend()
        late.result(timeout=PATIENCE)

    state = computing(return_state=True)
    (tmp_path / "gate.go").touch()
    assert state.is_failed() and "could not be submitted again" in (state.message or "")


def _run_counts(flow_run_id: Any) -> dict[str, int]:
    with get_client(sync_client=True) as client:
        found = client.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[flow_run_id])))
    return {run.task_key.partition("-")[0]: run.run_count for run in found}


def _keep_nothing(wire: Wire) -> None:
    plugin: Any = wire.scheduler.plugins["htcdask-kept-work"]
    wire.scheduler.loop.add_callback(plugin.seconds.clear)
    wait_until(lambda: not plugin.seconds, PATIENCE, "the scheduler will keep nothing")


def test_a_result_that_was_forgotten_is_computed_again(wire: Wire, tmp_path: Path) -> None:
    """Prefect's history tells why."""
    ids: dict[str, Any] = {}

    @flow(task_runner=HTCDaskTaskRunner(address=wire.address))
    def computing() -> int:
        ids["flow"] = flow_run_runtime.id
        future = marked.submit(tmp_path, "ended")
        history(ids["flow"], "marked")
        _keep_nothing(wire)
        wire.cut()
        wait_until(
            lambda: future.wrapped_future.key not in wire.scheduler.tasks, PATIENCE, "the scheduler has forgotten it"
        )
        wire.mend()
        return int(future.result(timeout=PATIENCE)[0])

    assert computing() == runs(tmp_path, "ended")[1]
    run, states = history(ids["flow"], "marked")
    assert [name for name, _ in states] == ["Pending", "Running", "Completed", "AwaitingRetry", "Running", "Completed"]
    assert "lost with the connection to the Dask scheduler" in dict(states)["AwaitingRetry"]
    assert run.run_count == 2


def test_a_connection_that_stays_away_fails_the_flow(wire: Wire, tmp_path: Path) -> None:
    @flow(task_runner=HTCDaskTaskRunner(address=wire.address, client_kwargs={"timeout": "4 s"}))
    def computing() -> None:
        gate = gated.submit(tmp_path, "gate")
        wait_until(lambda: runs(tmp_path, "gate"), PATIENCE, "the gate runs")
        wire.cut()
        with pytest.raises(TaskRunLost, match="could not be made again within 4 s"):
            gate.result(timeout=PATIENCE)
        with pytest.raises(HTCDaskError, match="could not be made again within 4 s"):
            marked.submit(tmp_path, "more")
        gate.result()

    state = computing(return_state=True)
    assert state.is_failed() and "connection to the Dask scheduler" in (state.message or "")
    (tmp_path / "gate.go").touch()


def test_a_connection_that_breaks_again_and_again_is_given_up(
    wire: Wire, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reconnection, "LOSSES", 2)

    @flow(task_runner=HTCDaskTaskRunner(address=wire.address))
    def computing() -> None:
        gate = gated.submit(tmp_path, "gate")
        wait_until(lambda: runs(tmp_path, "gate"), PATIENCE, "the gate runs")
        client = client_of_this_flow()
        for _ in range(2):
            wire.cut()
            wait_until(lambda: client.status == "connecting", PATIENCE, "the loss is noticed")
            wire.mend()
            wait_until(lambda: client.status == "running", PATIENCE, "it is there again")
        wire.cut()
        with pytest.raises(TaskRunLost, match="was lost 3 times within"):
            gate.result(timeout=PATIENCE)
        gate.result()

    assert computing(return_state=True).is_failed()
    (tmp_path / "gate.go").touch()


def test_what_is_cancelled_while_the_connection_is_away_does_not_go_on(wire: Wire, tmp_path: Path) -> None:
    keys: list[str] = []

    @flow(task_runner=HTCDaskTaskRunner(address=wire.address))
    def computing() -> None:
        gate = gated.submit(tmp_path, "gate")
        behind = marked.submit(tmp_path, "behind", wait_for=[gate])
        keys.extend(str(future.wrapped_future.key) for future in (gate, behind))
        wait_until(lambda: runs(tmp_path, "gate"), PATIENCE, "the gate runs")
        wire.cut()
        run = flow_run.find(str(flow_run_runtime.id))
        assert run is not None
        wait_until(lambda: run.client.status == "connecting", PATIENCE, "the loss is noticed")
        run.cancel()
        wire.mend()
        wait_until(lambda: run.client.status == "running", PATIENCE, "it is there again")
        wait_until(lambda: not set(keys) & set(wire.scheduler.tasks), PATIENCE, "the scheduler has forgotten them")
        behind.wait(timeout=10)
        assert behind.state.is_cancelled()
        raise ValueError("cancelled")

    assert computing(return_state=True).is_failed()
    assert not runs(tmp_path, "behind")


def test_a_flow_that_ends_while_the_connection_is_away(wire: Wire, tmp_path: Path) -> None:
    """Nothing is taken up again, and nobody waits for the connection."""

    @flow(task_runner=HTCDaskTaskRunner(address=wire.address))
    def computing() -> None:
        gate = gated.submit(tmp_path, "gate")
        wait_until(lambda: runs(tmp_path, "gate"), PATIENCE, "the gate runs")
        wire.cut()
        wait_until(lambda: client_of_this_flow().status == "connecting", PATIENCE, "the loss is noticed")
        assert gate.is_pending()
        raise ValueError("the end")

    started = time.monotonic()
    state: State[Any] = computing(return_state=True)
    assert state.is_failed() and "the end" in (state.message or "")
    assert time.monotonic() - started < 60
    (tmp_path / "gate.go").touch()
