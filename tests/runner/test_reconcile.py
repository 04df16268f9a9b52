"""As a flow run ends, the Prefect API has every task run in its true final state, whatever of its events was lost."""

from __future__ import annotations

import socket
import threading
import time
import tracemalloc
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from uuid import UUID, uuid4

import distributed
import pytest
from prefect import flow, get_client, task
from prefect.client.base import PrefectHttpxSyncClient
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import State, StateDetails, StateType
from prefect.runtime import flow_run as flow_run_runtime
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Completed, Failed, Running
from prefect.utilities.engine import emit_task_run_state_change_event

from prefect_htcdask import HTCDaskTaskRunner
from prefect_htcdask.embedded.ports import free_port
from prefect_htcdask.runner.futures.compact_state import CompactState
from prefect_htcdask.runner.futures.pending_result import PendingResult
from prefect_htcdask.runner.states import cancelling, reconcile
from prefect_htcdask.runner.states import reporter as task_run_states
from prefect_htcdask.runner.states.ended_task_runs import REMEMBERED, EndedTaskRuns
from prefect_htcdask.runner.states.reconcile import InterruptedTaskRuns, StateReconciler
from prefect_htcdask.runner.states.reporter import Ended, StateReporter
from tests.support.waiting import wait_until
from tools.prefect_server import prefect_server as running_server

NOTHING_CUT = InterruptedTaskRuns(frozenset(), StateType.CRASHED, "", interrupted=True)


@task
def fall_silent() -> str:
    """From here on nothing that its worker has to tell Prefect arrives: the word of this task's own end is lost."""
    from prefect.events.clients import NullEventsClient
    from prefect.events.worker import EventsWorker

    EventsWorker.set_client_override(NullEventsClient)
    return "silent"


@task(tags=["unheard"])
def unheard(fails: bool) -> str:
    if fails:
        raise ValueError("no luck")
    return "fine"


@pytest.fixture
def pool() -> Iterator[distributed.LocalCluster]:
    """One worker of its own, which is mute afterwards."""
    with distributed.LocalCluster(
        n_workers=1, threads_per_worker=1, processes=True, dashboard_address="127.0.0.1:0"
    ) as cluster:
        yield cluster


def task_runs(flow_run_id: Any) -> dict[str, list[Any]]:
    """The flow run's task runs, by the name of their task."""
    with get_client(sync_client=True) as client:
        found: dict[str, list[Any]] = {}
        for run in client.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[flow_run_id]))):
            found.setdefault(run.task_key.partition("-")[0], []).append(run)
        return found


@pytest.mark.usefixtures("prefect_api")
def test_ends_that_no_worker_could_tell_of_are_told_of_as_the_flow_ends(
    pool: distributed.LocalCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The events of a worker are lost from some moment on, as in an outage of the API that it does not outlive."""
    monkeypatch.setattr(reconcile, "AGE", 0.0)
    ids: dict[str, Any] = {}

    @flow(task_runner=HTCDaskTaskRunner(cluster=pool))
    def computing() -> str:
        ids["flow"] = flow_run_runtime.id
        silent = fall_silent.submit()
        silent.wait()
        ids["silent"] = silent.state
        fine, failed = unheard.submit(False), unheard.submit(True)
        return str((fine.result(), failed.wait(), silent.result()))

    assert computing() == "('fine', None, 'silent')"
    runs = wait_until(
        lambda: found if len((found := task_runs(ids["flow"])).get("unheard", [])) == 2 else None, 10, "all are known"
    )
    (silent,) = runs["fall_silent"]
    assert silent.state_name == "Completed"
    # As if its worker had told of it: when it ended, and under the id of its state, so that nothing is told twice.
    assert (silent.state.id, silent.end_time) == (ids["silent"].id, ids["silent"].timestamp)
    assert silent.total_run_time == silent.end_time - silent.start_time
    fine, failed = sorted(runs["unheard"], key=lambda run: run.state_name)
    assert (fine.state_name, failed.state_name) == ("Completed", "Failed")
    assert "no luck" in failed.state.message
    assert fine.tags == ["unheard"]


@pytest.mark.usefixtures("prefect_api")
def test_a_flow_whose_events_arrive_asks_once(
    local_pool: distributed.LocalCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    send = PrefectHttpxSyncClient.send

    def counted(self: PrefectHttpxSyncClient, request: Any, *args: Any, **kwargs: Any) -> Any:
        if threading.current_thread() is ends:
            asked.append(f"{request.method} {request.url.path}")
        return send(self, request, *args, **kwargs)

    settle = StateReconciler.reconcile
    ends: Any = None

    def watched(self: StateReconciler, *args: Any, **kwargs: Any) -> None:
        nonlocal ends
        ends = threading.current_thread()
        monkeypatch.setattr(PrefectHttpxSyncClient, "send", counted)
        settle(self, *args, **kwargs)
        ends = None

    monkeypatch.setattr(StateReconciler, "reconcile", watched)

    @flow(task_runner=HTCDaskTaskRunner(cluster=local_pool))
    def computing() -> list[str]:
        return unheard.map([False] * 10).result()

    assert computing() == ["fine"] * 10
    # Beside what Prefect's client itself asks before its first request.
    assert [one for one in asked if "csrf-token" not in one] == ["POST /api/task_runs/filter"]


@pytest.mark.slow
def test_an_api_that_is_away_at_the_end_is_told_when_it_is_back(tmp_path: Path) -> None:
    port = free_port()
    said: list[tuple[str, str]] = []
    with running_server(tmp_path / "server", port=port) as server, temporary_settings({PREFECT_API_URL: server.url}):
        with get_client(sync_client=True) as client:
            flow_run = client.create_flow_run(flow(name="left")(lambda: None))
            known = [
                client.create_task_run(unheard, flow_run.id, dynamic_key=str(n), state=Running()) for n in range(3)
            ]
        reporter, ended_task_runs = StateReporter(flow_run.id), EndedTaskRuns()
        reconciler = StateReconciler(reporter, ended_task_runs, lambda level, text: said.append((level, text)), True)
    ended_task_runs.ended(
        [record(known[0].id, Completed(message="done")), record(known[1].id, Failed(message="no luck"))]
    )
    reporter.report(Ended(known[0].id, "one", unheard, Completed(message="done")))
    reconciler.reconcile(InterruptedTaskRuns(frozenset([known[2].id]), StateType.CANCELLED, "cut short"))
    (thread,) = [thread for thread in threading.enumerate() if thread.name == "htcdask-account"]
    assert not thread.daemon
    with running_server(tmp_path / "server", port=port) as server, temporary_settings({PREFECT_API_URL: server.url}):
        thread.join(30)
        assert not thread.is_alive()
        found = {run.id: (run.state_name, run.state.message) for run in task_runs(flow_run.id)["unheard"]}
    assert found == {
        known[0].id: ("Completed", "done"),
        known[1].id: ("Failed", "no luck"),
        known[2].id: ("Cancelled", "cut short"),
    }
    assert said == [("info", "1 task runs were cut short by the end of the flow run")]


@pytest.mark.slow
def test_an_api_that_stays_away_is_given_up_and_the_log_says_what_helps(caplog: pytest.LogCaptureFixture) -> None:
    said: list[tuple[str, str]] = []
    with temporary_settings({PREFECT_API_URL: f"http://127.0.0.1:{free_port()}/api"}):
        reconciler = StateReconciler(StateReporter(uuid4()), EndedTaskRuns(), lambda *words: said.append(words), True)
        reconciler.reconcile(NOTHING_CUT)
    for thread in threading.enumerate():
        if thread.name == "htcdask-account":
            thread.join(20)
    # The flow run's own log goes to the API.
    assert said == []
    assert "prefect-htcdask sweep" in caplog.text


@pytest.mark.slow
def test_an_api_that_does_not_answer_holds_a_cancelled_flow_up_for_seconds_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It takes connections and says nothing. Prefect's client would try for six minutes, at 60 s a request."""
    for module in (task_run_states, cancelling):
        monkeypatch.setattr(module, "TIMEOUT", 1.0)
    said: list[tuple[str, str]] = []
    flow_run_id = uuid4()
    with socket.create_server(("127.0.0.1", 0), backlog=100) as silent:
        with temporary_settings({PREFECT_API_URL: f"http://127.0.0.1:{silent.getsockname()[1]}/api"}):
            reporter = StateReporter(flow_run_id)
            reconciler = StateReconciler(reporter, EndedTaskRuns(), lambda *words: said.append(words), True)
            reporter.report(Ended(uuid4(), "one", unheard, Completed()))
            interrupted_runs = InterruptedTaskRuns(
                frozenset([uuid4()]), StateType.CANCELLED, "cut short", interrupted=True
            )
            since = time.monotonic()
            reconciler.reconcile(interrupted_runs)
            settled = time.monotonic() - since
            ending = cancelling.end_cancelling(flow_run_id)
        ending.join(60)
        for thread in threading.enumerate():
            if thread.name == "htcdask-account":
                thread.join(60)
        ended = time.monotonic() - since
    print(f"settle returned after {settled:.1f} s, the last thread ended after {ended:.1f} s")
    assert settled < reconcile.INTERRUPTED_TIMEOUT
    assert ended < settled + reconcile.INTERRUPTED_TIMEOUT + 10
    assert said == []


def record(task_run_id: UUID, state: State[Any] | None) -> PendingResult:
    """The record of a task run that has ended, its final state in hand or not."""
    result = PendingResult(task_run_id, cast(Any, SimpleNamespace(status="finished")), "unheard", unheard)
    result.packed = CompactState(state) if state is not None else None
    return result


def test_of_task_runs_that_ended_long_ago_the_kind_of_end_is_known_for_few_bytes_each() -> None:
    words, done = EndedTaskRuns(), Completed()
    failed = [uuid4() for _ in range(10)]
    unknown = [uuid4() for _ in range(10)]
    late = [uuid4() for _ in range(10)]
    words.ended(record(task_run_id, Failed(message="no luck")) for task_run_id in failed)
    words.ended(record(task_run_id, None) for task_run_id in [*unknown, *late])
    words.ended(record(uuid4(), done) for _ in range(REMEMBERED))
    # Somebody asked for their results at last.
    words.ended(record(task_run_id, Completed()) for task_run_id in late)
    words.ended(record(uuid4(), done) for _ in range(REMEMBERED))
    tracemalloc.start()
    for _ in range(20_000):
        words.ended([record(uuid4(), done)])
    per_task = tracemalloc.get_traced_memory()[0] / 20_000
    tracemalloc.stop()
    print(f"{per_task:.1f} bytes a task run")
    assert per_task < 512 and len(words._recent) == REMEMBERED
    stranger = uuid4()
    found = {one.task_run_id: one.state for one in words.lookup([*failed, *unknown, *late, stranger])}
    assert set(found) == {*failed, *unknown, *late}
    assert {found[one].name for one in failed} == {"Failed"}  # type: ignore[union-attr]
    assert {found[one].name for one in late} == {"Completed"}  # type: ignore[union-attr]
    assert {found[one] for one in unknown} == {None}


def test_what_has_just_ended_is_given_time() -> None:
    words = EndedTaskRuns()
    one = uuid4()
    words.ended([record(one, Completed())])
    assert words.lookup([one], before=10.0) == []
    assert [ended.task_run_id for ended in words.lookup([one])] == [one]


@task
def sleeps(marker: Path) -> None:
    marker.touch()
    time.sleep(60)


@pytest.mark.usefixtures("prefect_api")
def test_a_task_run_of_whose_start_the_api_hears_only_after_the_flow_is_not_running_for_ever(
    pool: distributed.LocalCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interrupted flow, and a backlog of events: the worker's word of the task's start comes last."""
    monkeypatch.setattr(reconcile, "AGE", 0.0)  # so that the one that fell silent is ended as well
    started: list[Any] = []

    @flow(task_runner=HTCDaskTaskRunner(cluster=pool))
    def interrupted() -> None:
        fall_silent.submit().wait()
        futures = [sleeps.submit(tmp_path / name) for name in ("runs", "waits")]
        wait_until((tmp_path / "runs").exists, 60, "the first runs")
        started.append((flow_run_runtime.id, futures[0].task_run_id))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    ((flow_run_id, task_run_id),) = started

    def known() -> list[Any]:
        return task_runs(flow_run_id).get("sleeps", [])

    (run,) = wait_until(known, 20, "the API has heard of the one that started, and of no other")
    assert (run.id, run.state_name) == (task_run_id, "Crashed") and "ended while this task ran" in run.state.message
    late = Running(timestamp=run.start_time or run.state.timestamp - timedelta(seconds=5))
    late.state_details = StateDetails(task_run_id=task_run_id, flow_run_id=flow_run_id)
    word = run.model_copy(update={"state": late, "state_type": late.type, "state_name": late.name})
    emit_task_run_state_change_event(task_run=word, initial_state=None, validated_state=late)

    def states() -> set[str]:
        with get_client(sync_client=True) as client:
            return {state.name for state in client.read_task_run_states(task_run_id)}

    wait_until(lambda: "Running" in states(), 30, "the word of the start has arrived")
    (run,) = known()
    assert run.state_name == "Crashed"
    assert all(run.state.is_final() for run in task_runs(flow_run_id).get("fall_silent", []))
