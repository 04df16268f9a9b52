"""Flow runs on a warm pool: what `DaskTaskRunner` documents holds here too."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path
from typing import Any

import dask
import distributed
import pytest
from prefect import flow, get_client, get_run_logger, tags, task
from prefect.cache_policies import INPUTS
from prefect.client.schemas.objects import StateType
from prefect.exceptions import MappingLengthMismatch, MappingMissingIterable
from prefect.futures import as_completed, wait
from prefect.runtime import flow_run as flow_run_runtime
from prefect.runtime import task_run as task_run_runtime
from prefect.states import Failed
from prefect.utilities.annotations import allow_failure, quote, unmapped

from prefect_htcdask import HTCDaskTaskRunner, get_async_dask_client, get_dask_client

pytestmark = pytest.mark.usefixtures("prefect_api")


@task
def double(x: int) -> int:
    return 2 * x


@task
def add(x: int, y: int) -> int:
    return x + y


@task
async def async_double(x: int) -> int:
    await asyncio.sleep(0)
    return 2 * x


@task
def fail(message: str) -> None:
    raise ValueError(message)


def test_submit_and_map(runner: HTCDaskTaskRunner) -> None:
    @flow(task_runner=runner)
    def computing() -> Any:
        one = double.submit(1)
        many = double.map([1, 2, 3])
        both = add.submit(one, many[2])
        return one.result(), many.result(), both.result(), add.map(many, 1).result()

    assert computing() == (2, [2, 4, 6], 8, [3, 5, 7])


def test_the_class_itself_is_a_runner() -> None:
    @flow(task_runner=HTCDaskTaskRunner)
    def nothing() -> int:
        return 1

    assert nothing() == 1


async def test_async_flow_and_tasks(runner: HTCDaskTaskRunner) -> None:
    @flow(task_runner=runner)
    async def computing() -> Any:
        one = async_double.submit(1)
        many = async_double.map([1, 2, 3])
        mixed = add.submit(one, many[0])
        return one.result(), many.result(), mixed.result()

    assert await computing() == (2, [2, 4, 6], 4)


def test_sync_flow_with_async_tasks(runner: HTCDaskTaskRunner) -> None:
    @flow(task_runner=runner)
    def computing() -> Any:
        return async_double.map(range(4)).result()

    assert computing() == [0, 2, 4, 6]


def test_map_with_unmapped_defaults_and_keywords(runner: HTCDaskTaskRunner) -> None:
    @task
    def describe(x: int, items: list[int], scale: int = 10, **more: Any) -> Any:
        items.append(x)
        return x * scale, items, more

    @flow(task_runner=runner)
    def computing() -> Any:
        plain = describe.map([1, 2], unmapped([7])).result()
        keywords = describe.map([1, 2], unmapped([7]), scale=2, extra=["a", "b"], same=unmapped([0])).result()
        return plain, keywords

    plain, keywords = computing()
    # Every call has a copy of its own of what they share.
    assert plain == [(10, [7, 1], {}), (20, [7, 2], {})]
    assert keywords == [(2, [7, 1], {"extra": "a", "same": [0]}), (4, [7, 2], {"extra": "b", "same": [0]})]


def test_map_shares_large_parameters(runner: HTCDaskTaskRunner) -> None:
    @task
    def pick(index: int, values: bytes) -> int:
        return values[index]

    @flow(task_runner=runner)
    def computing() -> Any:
        small = pick.map([0, 1], unmapped(b"ab" * 50_000)).result()
        large = pick.map(list(range(10)), unmapped(bytes(range(10)) * 1_000_000)).result()
        return small, large

    assert computing() == ([97, 98], list(range(10)))


def test_wait_for_takes_one_or_many_as_prefect_does(runner: HTCDaskTaskRunner) -> None:
    @flow(task_runner=runner)
    def computing() -> Any:
        first, broken, many = double.submit(1), fail.submit("no"), double.map([1, 2])
        sound = [
            first,
            [first],
            (first, many),
            {"a": first},
            {first},
            iter([first]),
            many,
            5,
            "text",
            None,
            [[[first]]],
        ]
        done = [add.submit(1, 1, wait_for=one).result() for one in sound]
        sound[5] = iter([first])
        mapped = [sum(double.map([1, 2], wait_for=one).result()) for one in sound]
        despite = double.submit(1, wait_for=allow_failure(broken)).result()
        waiting = [
            double.submit(1, wait_for=one) for one in (broken, [first, [broken]], {"a": broken}, iter([first, broken]))
        ]
        waiting += double.map([1, 2], wait_for=iter([broken]))
        wait(waiting, timeout=60)
        return set(done), set(mapped), despite, {one.state.name for one in waiting}

    assert computing() == ({2}, {6}, 2, {"NotReady"})


def test_map_complains_as_prefect_does(runner: HTCDaskTaskRunner) -> None:
    @flow(task_runner=runner)
    def computing() -> None:
        with pytest.raises(MappingMissingIterable):
            double.map(1)  # type: ignore[arg-type]
        with pytest.raises(MappingLengthMismatch):
            add.map([1, 2], [1, 2, 3])
        assert double.map([]).result() == []

    computing()


def test_futures_deep_inside_parameters(runner: HTCDaskTaskRunner) -> None:
    @task
    def total(values: dict[str, Any]) -> int:
        return sum(values["list"]) + values["nested"]["one"]

    @flow(task_runner=runner)
    def computing() -> Any:
        futures = [double.submit(i) for i in range(3)]
        return total.submit({"list": futures, "nested": {"one": double.submit(50)}}).result()

    assert computing() == 106


def test_quote_is_not_looked_into(runner: HTCDaskTaskRunner) -> None:
    @task
    def kind(value: Any) -> str:
        return type(value).__name__

    @flow(task_runner=runner)
    def computing() -> Any:
        return kind.submit(quote([1, 2])).result()

    assert computing() == "list"


def test_a_collected_future_is_passed_on_by_value(runner: HTCDaskTaskRunner) -> None:
    @flow(task_runner=runner)
    def computing() -> Any:
        first = double.submit(21)
        assert first.result() == 42
        return add.submit(first, 0).result(), add.map([first, first], 1).result()

    assert computing() == (42, [43, 43])


def test_wait_for_orders_tasks(runner: HTCDaskTaskRunner, tmp_path: Path) -> None:
    marker = tmp_path / "marker"

    @task
    def create() -> None:
        time.sleep(0.5)
        marker.touch()

    @task
    def seen(_: int = 0) -> bool:
        return marker.exists()

    @flow(task_runner=runner)
    def computing() -> Any:
        created = create.submit()
        return seen.submit(wait_for=[created]).result(), seen.map([1, 2], wait_for=[created]).result()

    assert computing() == (True, [True, True])


def test_failures_reach_the_flow_and_tasks_downstream(runner: HTCDaskTaskRunner) -> None:
    @flow(task_runner=runner)
    def computing() -> Any:
        broken = fail.submit("no")
        after = add.submit(broken, 1)  # type: ignore[arg-type]
        despite = double.submit(1, wait_for=[allow_failure(broken)])
        despite.wait()
        after.wait()
        with pytest.raises(ValueError, match="no"):
            broken.result()
        assert isinstance(broken.result(raise_on_failure=False), ValueError)
        return broken.state.type, after.state.type, after.state.name, despite.result()

    assert computing() == (StateType.FAILED, StateType.PENDING, "NotReady", 2)


def test_a_flow_fails_with_its_tasks(runner: HTCDaskTaskRunner) -> None:
    @flow(task_runner=runner)
    def computing() -> Any:
        return [double.submit(1), fail.submit("no")]

    state = computing(return_state=True)
    assert state.is_failed()
    assert "1/2 states failed" in state.message


def test_nested_submission(runner: HTCDaskTaskRunner) -> None:
    @task
    def outer(n: int) -> int:
        futures = [double.submit(i) for i in range(n)]
        return sum(future.result() for future in futures) + sum(double.map([1, 2]).result())

    @flow(task_runner=runner)
    def computing() -> Any:
        # More outer tasks than the pool has threads: each frees its own while it waits.
        return outer.map([2, 2, 2, 2]).result()

    assert computing() == [8] * 4


async def test_nested_submission_from_async_tasks(runner: HTCDaskTaskRunner) -> None:
    @task
    async def outer(n: int) -> int:
        return sum(double.map(list(range(n))).result())

    @flow(task_runner=runner)
    async def computing() -> Any:
        return outer.map([3, 3, 3]).result()

    assert await computing() == [6, 6, 6]


def test_subflows(runner: HTCDaskTaskRunner) -> None:
    @flow(task_runner=runner)
    def child(n: int) -> int:
        return sum(double.map(range(n)).result())

    @flow
    def plain_child(future: Any) -> int:
        return double.submit(future).result()

    @flow(task_runner=runner)
    def parent() -> Any:
        future = double.submit(1)
        return child(3), future.result(), plain_child(future)

    assert parent() == (6, 2, 4)


def test_task_retries(runner: HTCDaskTaskRunner, tmp_path: Path) -> None:
    @task(retries=2, retry_delay_seconds=0)
    def flaky() -> int:
        with (tmp_path / "tries").open("a") as file:
            file.write("x")
        if (tmp_path / "tries").stat().st_size < 3:
            raise ValueError("again")
        return task_run_runtime.run_count  # type: ignore[no-any-return]

    @flow(task_runner=runner)
    def computing() -> Any:
        return flaky.submit().result()

    assert computing() == 3


def test_flow_retries_use_a_fresh_run(runner: HTCDaskTaskRunner, tmp_path: Path) -> None:
    @flow(task_runner=runner, retries=1)
    def computing() -> Any:
        value = double.submit(4).result()
        if not (tmp_path / "tried").exists():
            (tmp_path / "tried").touch()
            raise ValueError("again")
        return value, flow_run_runtime.run_count

    assert computing() == (8, 2)


def test_caching_and_persisted_results(runner: HTCDaskTaskRunner, tmp_path: Path) -> None:
    storage = tmp_path / "results"
    storage.mkdir()
    calls = tmp_path / "calls"

    @task(cache_policy=INPUTS, persist_result=True, result_storage=storage)
    def counted(x: int) -> int:
        with calls.open("a") as file:
            file.write("x")
        return 2 * x

    @flow(task_runner=runner, result_storage=storage)
    def computing() -> Any:
        first = counted.submit(3)
        first.wait()
        second = counted.submit(3)
        second.wait()
        return first.state.name, second.state.name, second.result()

    assert computing() == ("Completed", "Cached", 6)
    assert calls.read_text() == "x"
    assert any((tmp_path / "results").iterdir())


def test_as_completed_wait_and_callbacks(runner: HTCDaskTaskRunner) -> None:
    @task
    def nap(seconds: float) -> float:
        time.sleep(seconds)
        return seconds

    @flow(task_runner=runner)
    def computing() -> Any:
        nap.map([0, 0]).wait()
        slow, fast = nap.submit(1.5), nap.submit(0.1)
        order = [future.result() for future in as_completed([slow, fast])]
        called = threading.Event()
        states: list[Any] = []
        again = nap.submit(0.2)
        again.add_done_callback(lambda future: (states.append(future._final_state), called.set()))
        assert called.wait(20)
        later = nap.submit(3.0)
        with pytest.raises(TimeoutError):
            later.result(timeout=0.1)
        later.wait(timeout=0.1)
        done, not_done = wait([again, later], timeout=0.2)
        return order, states[0].name, (done, not_done) == ({again}, {later}), later.result()

    assert computing() == ([0.1, 1.5], "Completed", True, 3.0)


def test_dask_clients_in_tasks_and_flows(runner: HTCDaskTaskRunner) -> None:
    @task
    def summing() -> int:
        with get_dask_client(timeout="20 s") as client:
            return sum(client.gather(client.map(abs, [-1, -2, 3])))

    @task
    async def async_summing() -> int:
        async with get_async_dask_client() as client:
            return sum(await client.gather(client.map(abs, [-1, -2, 3])))

    @flow(task_runner=runner)
    def computing() -> Any:
        # Before anything was submitted: the client provisions.
        with get_dask_client() as client:
            in_flow = client.submit(abs, -5).result()
        return in_flow, summing.submit().result(), async_summing.submit().result()

    assert computing() == (5, 6, 6)


def test_prefect_dask_finds_the_client_too(runner: HTCDaskTaskRunner) -> None:
    from prefect_dask import get_dask_client as stock_get_dask_client

    @flow(task_runner=runner)
    def computing() -> Any:
        with stock_get_dask_client() as client:
            return client.submit(abs, -5).result()

    assert computing() == 5


def test_annotations_reach_dask(runner: HTCDaskTaskRunner) -> None:
    @task
    def where() -> tuple[dict[str, Any], int, str]:
        worker = distributed.get_worker()
        state = worker.state.tasks[worker.get_current_task()]
        return dict(state.resource_restrictions or {}), state.priority[0], worker.address

    @flow(task_runner=runner)
    def computing() -> Any:
        address = next(iter(runner._cluster.scheduler_info["workers"]))
        with dask.annotate(resources={"GPU": 1}, priority=7, workers=[address]):
            annotated = where.submit()
        return annotated.result(), where.submit().result(), address

    (resources, priority, at), (no_resources, usual, _), address = computing()
    assert (resources, priority, at) == ({"GPU": 1}, -7, address)
    assert (no_resources, usual) == ({}, 0)


def test_dask_learns_durations_by_task_name(runner: HTCDaskTaskRunner) -> None:
    @task(name="load data / step-2")
    def oddly_named() -> str:
        return str(distributed.get_worker().get_current_task())

    @flow(task_runner=runner)
    def computing() -> Any:
        return oddly_named.submit().result(), double.submit(1).wrapped_future.key

    from dask.utils import key_split

    odd, plain = computing()
    assert key_split(odd) == "load_data_step_2"
    assert key_split(plain) == "double"


def test_logs_tags_names_and_hooks(runner: HTCDaskTaskRunner, tmp_path: Path) -> None:
    def note(task: Any, run: Any, state: Any) -> None:
        (tmp_path / f"{state.name}").touch()

    @task(task_run_name="twice-{x}", tags=["own"], on_completion=[note], on_running=[note], log_prints=True)
    def told(x: int) -> int:
        get_run_logger().info("the logger speaks %s", x)
        print("the print speaks", x)
        return 2 * x

    @flow(task_runner=runner)
    def computing() -> Any:
        with tags("outer"):
            future = told.submit(5)
        future.wait()
        return future.task_run_id, flow_run_runtime.id

    task_run_id, flow_run_id = computing()
    assert {path.name for path in tmp_path.iterdir()} == {"Completed", "Running"}
    run = _read_when(task_run_id, lambda run: run.state.is_completed())
    assert run.name == "twice-5"
    assert set(run.tags) == {"own", "outer"}
    messages = _logs_when(flow_run_id, lambda found: any("the print speaks 5" in line for line in found))
    assert any("the logger speaks 5" in line for line in messages)


def test_changed_tasks_and_settings_make_new_envelopes(runner: HTCDaskTaskRunner) -> None:
    from prefect.settings import PREFECT_LOGGING_LOG_PRINTS, get_current_settings, temporary_settings

    @task(retries=1)
    def retries() -> tuple[Any, bool]:
        from prefect.context import TaskRunContext

        return TaskRunContext.get().task.retries, get_current_settings().logging.log_prints

    @flow(task_runner=runner)
    def computing() -> Any:
        found = [retries.submit().result(), retries.with_options(retries=5).submit().result()]
        retries.retries = 3
        found.append(retries.submit().result())
        with temporary_settings({PREFECT_LOGGING_LOG_PRINTS: True}):
            found.append(retries.submit().result())
        return found

    assert computing() == [(1, False), (5, False), (3, False), (3, True)]


def test_tasks_see_the_flow_run(runner: HTCDaskTaskRunner) -> None:
    @task
    def look() -> Any:
        return flow_run_runtime.id, flow_run_runtime.parameters, task_run_runtime.parameters

    @flow(task_runner=runner)
    def computing(number: int) -> Any:
        return look.submit().result(), flow_run_runtime.id

    (seen_id, parameters, own), flow_run_id = computing(number=3)
    assert (seen_id, parameters, own) == (flow_run_id, {"number": 3}, {})


def test_returned_states_and_timeouts(runner: HTCDaskTaskRunner) -> None:
    @task
    def states() -> Any:
        return Failed(message="on purpose")

    @task(timeout_seconds=0.5)
    async def sleepy() -> None:
        await asyncio.sleep(20)

    @flow(task_runner=runner)
    def computing() -> Any:
        failed, late = states.submit(), sleepy.submit()
        failed.wait()
        late.wait()
        return failed.state.message, late.state.name

    assert computing() == ("on purpose", "TimedOut")


def test_return_state_and_flow_results(runner: HTCDaskTaskRunner) -> None:
    @flow(task_runner=runner)
    def computing() -> Any:
        return double.submit(1, return_state=True)

    assert computing(return_state=True).is_completed()


def _read_when(task_run_id: Any, condition: Any, timeout: float = 20) -> Any:
    deadline = time.monotonic() + timeout
    with get_client(sync_client=True) as client:
        while True:
            try:
                run = client.read_task_run(task_run_id)
                if condition(run):
                    return run
            except Exception:
                if time.monotonic() > deadline:
                    raise
            assert time.monotonic() < deadline, "the API does not show it"
            time.sleep(0.1)


def _logs_when(flow_run_id: Any, condition: Any, timeout: float = 20) -> list[str]:
    from prefect.client.schemas.filters import LogFilter, LogFilterFlowRunId

    deadline = time.monotonic() + timeout
    with get_client(sync_client=True) as client:
        while True:
            logs = client.read_logs(log_filter=LogFilter(flow_run_id=LogFilterFlowRunId(any_=[flow_run_id])))
            messages = [log.message for log in logs]
            if condition(messages):
                return messages
            assert time.monotonic() < deadline, messages
            time.sleep(0.2)


def test_a_loop_that_changes_what_a_task_closes_over(runner: HTCDaskTaskRunner) -> None:
    @flow(task_runner=runner)
    def computing() -> list[list[bool]]:
        cut = 0

        @task
        def select(x: int) -> bool:
            return x > cut

        found = []
        for cut in (0, 1, 2):  # noqa: B007
            found.append(select.map(range(3)))
        return [futures.result() for futures in found]

    assert computing() == [[False, True, True], [False, False, True], [False, False, False]]


def test_a_result_in_hand_that_is_only_waited_for_does_not_travel(runner: HTCDaskTaskRunner) -> None:
    @task
    def large() -> bytes:
        return bytes(1024**2)

    @flow(task_runner=runner)
    def computing() -> Any:
        first = large.submit()
        assert len(first.result()) == 1024**2
        futures = double.map(range(3), wait_for=[first])
        specs = [future.pending_result.spec for future in futures]
        assert all(spec is None or len(spec.payload) < 50_000 for spec in specs)
        assert futures.result() == [0, 2, 4]
        # What failed keeps its say.
        failed = fail.submit("no luck")
        failed.wait()
        waiting = double.submit(1, wait_for=[failed])
        waiting.wait()
        return waiting.state.name, double.submit(1, wait_for=[allow_failure(failed)]).result()

    assert computing(return_state=True).result(raise_on_failure=False) == ("NotReady", 2)
