"""Workers that leave, on the real pool: evicted by HTCondor, killed, or at the end of their lifetime."""

from __future__ import annotations

import os
import re
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import htcondor2
import psutil
import pytest
from distributed import Future

from prefect_htcdask.condor.schedd import ScheddClient
from prefect_htcdask.condor.submit_description import FlowRunTag
from prefect_htcdask.gateway import HTCGatewayCluster
from prefect_htcdask.worker.graceful_shutdown import RESCHEDULED
from tests.support.cluster_fixtures import Stopwatch, jobs_of, texts
from tests.support.vacating import vacate
from tests.support.waiting import wait_until

pytestmark = pytest.mark.pool

NewCluster = Callable[..., HTCGatewayCluster]
Messages = list[dict[str, Any]]
Function = TypeVar("Function", bound=Callable[..., Any])


def travels(function: Function) -> Function:
    """Have a function pickled by value, as one of a script is: workers and scheduler have no `tests`."""
    function.__module__ = "__main__"
    return function


class Marks:
    """Where tasks leave word of each time that they run: one line with worker and process."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(mode=0o700)
        self.directory = directory

    def lines(self, name: str) -> list[str]:
        path = self.directory / name
        return path.read_text().splitlines() if path.exists() else []

    def workers(self, name: str) -> list[str]:
        """Names of the workers on which a task has begun, in order."""
        return [line.split()[0] for line in self.lines(name)]

    def counts(self) -> dict[str, int]:
        return {path.name: len(self.lines(path.name)) for path in self.directory.iterdir() if path.suffix != ".go"}

    def begins(self, name: str, times: int, timeout: float = 60) -> str:
        """Wait until a task has begun so many times; returns the worker's name."""
        return wait_until(lambda: self.workers(name)[times - 1 :], timeout, f"{name} runs for the {times}. time")[0]

    def let_go(self, name: str) -> None:
        (self.directory / f"{name}.go").touch()


@pytest.fixture
def marks(tmp_path: Path) -> Marks:
    return Marks(tmp_path / "marks")


@travels
def gated(directory: str, name: str) -> str:
    """Runs until it is let go."""
    import os
    import time
    from pathlib import Path

    from distributed import get_worker

    with open(f"{directory}/{name}", "a") as stream:
        stream.write(f"{get_worker().name} {os.getpid()}\n")
    while not Path(f"{directory}/{name}.go").exists():
        time.sleep(0.02)
    return name


@travels
def timed(directory: str, name: str, seconds: float) -> str:
    """Runs for a time."""
    import os
    import time

    from distributed import get_worker

    with open(f"{directory}/{name}", "a") as stream:
        stream.write(f"{get_worker().name} {os.getpid()}\n")
    time.sleep(seconds)
    return name


@travels
def deaf(directory: str, name: str) -> str:
    """Keeps the interpreter's lock, as an extension module may: nothing else in its process runs, signals included."""
    import ctypes
    import os
    from pathlib import Path

    from distributed import get_worker

    with open(f"{directory}/{name}", "a") as stream:
        stream.write(f"{get_worker().name} {os.getpid()}\n")
    if not Path(f"{directory}/{name}.go").exists():
        ctypes.PyDLL(None).sleep(120)
    return name


@travels
def no_mark_is_forgiven(dask_scheduler: Any) -> None:
    """One suspicion fails a task."""
    dask_scheduler.allowed_failures = 0


@travels
def suspicions(dask_scheduler: Any) -> dict[str, int]:
    return {str(key): task.suspicious for key, task in dask_scheduler.tasks.items() if task.suspicious}


def ends(cluster: HTCGatewayCluster) -> Counter[str]:
    """How the runs of a cluster's jobs ended, from the job event log."""
    found: Counter[str] = Counter()
    log = htcondor2.JobEventLog(str(cluster.run_directory / "jobs.log"))
    for event in log.events(stop_after=0):
        name = event.type.name
        if name == "JOB_TERMINATED":
            how = f"exit {event['ReturnValue']}" if event.get("TerminatedNormally") else "signal"
            found[how] += 1
        elif name in ("JOB_EVICTED", "JOB_ABORTED", "JOB_HELD", "SHADOW_EXCEPTION"):
            found[name] += 1
    log.close()
    return found


def evicted(messages: Messages) -> list[str]:
    """Jobs of which the supervisor said that they were evicted, in order."""
    return [message["job_id"] for message in messages if message["kind"] == "job" and message["what"] == "evicted"]


def stderr_of(cluster: HTCGatewayCluster) -> str:
    """What the workers said, of those jobs whose files have come back."""
    return "\n".join(
        path.read_text(errors="replace") for path in sorted((cluster.run_directory / "logs").glob("*.err"))
    )


@pytest.mark.filterwarnings("ignore:task .* was taken from its worker")
def test_evictions_cost_the_task_in_hand_and_nothing_else(
    new_cluster: NewCluster, queue: ScheddClient, marks: Marks, messages: Messages
) -> None:
    """condor_vacate_job, five times in a row, on whichever worker runs the same task."""
    where = str(marks.directory)
    with new_cluster(n_workers=3) as cluster, cluster.get_client() as client:
        client.wait_for_workers(3, timeout=60)
        client.run_on_scheduler(no_mark_is_forgiven)
        kept = client.map(timed, [where] * 12, [f"kept-{n}" for n in range(12)], [0] * 12)
        client.gather(kept)
        long = client.submit(gated, where, "long")
        took, vacated = [], []
        for n in range(1, 6):
            worker = marks.begins("long", n)
            others = client.map(timed, [where] * 4, [f"other-{n}-{i}" for i in range(4)], [0.3] * 4)
            client.gather(others)
            watch = Stopwatch()
            vacated.append(vacate(queue, worker))
            assert marks.begins("long", n + 1) != worker
            took.append(watch())
            kept += [*others]
            assert client.run_on_scheduler(suspicions) == {}
        events = client.get_events(RESCHEDULED)
        assert [event["times"] for _, event in events] == [1, 2, 3, 4, 5]
        marks.let_go("long")
        assert long.result(timeout=30) == "long"
        assert len(client.gather(kept)) == 32
        # A replacement that is no longer needed may be told of as evicted when it is removed.
        wait_until(lambda: not Counter(vacated) - Counter(evicted(messages)), 20, "word of the last eviction")
        client.wait_for_workers(3, timeout=60)
        counts = marks.counts()
    print(f"evicted: the task ran again after {', '.join(f'{seconds:.1f}' for seconds in took)} s")
    assert counts.pop("long") == 6
    assert {name: n for name, n in counts.items() if n != 1} == {}
    assert max(took) < 15
    assert cluster.summary["evicted"] >= 5
    assert texts(messages, "failed") == ""
    assert [m["text"] for m in messages if m["kind"] == "log" and m["level"] in ("warning", "error")] == []


def test_an_eviction_moves_results_and_lets_a_short_task_end(
    new_cluster: NewCluster, queue: ScheddClient, marks: Marks
) -> None:
    where = str(marks.directory)
    with new_cluster(n_workers=2) as cluster, cluster.get_client() as client:
        client.wait_for_workers(2, timeout=60)
        client.run_on_scheduler(no_mark_is_forgiven)
        worker = sorted(client.run_on_scheduler(names))[0]
        pinned: dict[str, Any] = {"workers": [worker], "allow_other_workers": True}
        held = [client.submit(timed, where, f"held-{n}", 0, **pinned) for n in range(20)]
        client.gather(held)
        short = client.submit(timed, where, "short", 1.5, **pinned)
        assert marks.begins("short", 1) == worker
        vacate(queue, worker)
        assert short.result(timeout=30) == "short"
        wait_until(lambda: worker not in client.run_on_scheduler(names), 30, "the worker has gone")
        assert client.gather(held) == [f"held-{n}" for n in range(20)]
        assert set(marks.counts().values()) == {1}


@travels
def names(dask_scheduler: Any) -> list[str]:
    return [str(ws.name) for ws in dask_scheduler.workers.values()]


def test_a_task_that_does_not_let_its_worker_listen_is_handed_back_all_the_same(
    new_cluster: NewCluster, queue: ScheddClient, marks: Marks, messages: Messages
) -> None:
    with new_cluster(n_workers=2) as cluster, cluster.get_client() as client:
        client.wait_for_workers(2, timeout=60)
        client.run_on_scheduler(no_mark_is_forgiven)
        future = client.submit(deaf, str(marks.directory), "deaf")
        worker = marks.begins("deaf", 1)
        marks.let_go("deaf")
        watch = Stopwatch()
        job = vacate(queue, worker)
        assert future.result(timeout=40) == "deaf"
        print(f"the task of a worker that does not listen ran again after {watch():.1f} s")
        assert len(marks.lines("deaf")) == 2
        assert client.run_on_scheduler(suspicions) == {}
        # The guard ends it within its vacate time.
        pid = int(marks.lines("deaf")[0].split()[1])
        wait_until(lambda: not psutil.pid_exists(pid), 20, "its process has ended")
        assert watch() < 20
        wait_until(lambda: evicted(messages) == [job], 10, "word of the eviction")


def test_prefect_s_events_are_sent_off_before_an_evicted_worker_goes(
    new_cluster: NewCluster, queue: ScheddClient, marks: Marks
) -> None:
    def watch_flush(directory: str) -> str:
        from pathlib import Path

        from distributed import get_worker

        from prefect_htcdask.worker import run_task

        name = str(get_worker().name)
        run_task.flush = lambda *_: Path(f"{directory}/flushed-{name}").touch()  # type: ignore[assignment]
        return name

    tag = FlowRunTag("0f1e", "run", "flow", 1)
    url = {"PREFECT_API_URL": "http://127.0.0.1:9/api"}
    with (
        new_cluster(n_workers=2, flow_run=tag, worker_secrets=url) as cluster,
        cluster.get_client() as client,
    ):
        client.wait_for_workers(2, timeout=60)
        evicted, retired = sorted(client.run_on_scheduler(names))
        for worker in (evicted, retired):
            assert (
                client.submit(watch_flush, str(marks.directory), workers=[worker], pure=False).result(timeout=30)
                == worker
            )
        busy = client.submit(gated, str(marks.directory), "busy", workers=[evicted], allow_other_workers=True)
        assert marks.begins("busy", 1) == evicted
        vacate(queue, evicted)
        wait_until((marks.directory / f"flushed-{evicted}").exists, 20, "the evicted worker's events are sent")
        assert marks.begins("busy", 2) != evicted
        marks.let_go("busy")
        assert busy.result(timeout=20) == "busy"
        del busy  # a worker with a result that is still wanted would stay
        cluster.scale(0)
        wait_until((marks.directory / f"flushed-{retired}").exists, 20, "the retired worker's events are sent")


def test_workers_leave_before_their_lifetime_ends_and_are_replaced(
    new_cluster: NewCluster, queue: ScheddClient, marks: Marks, messages: Messages
) -> None:
    """A stream of one-second tasks for forty seconds, on three workers that live for fifteen at most."""
    where = str(marks.directory)
    seen: list[tuple[float, int]] = []
    running: list[int] = []
    joined: set[str] = set()
    lives: dict[str, list[float]] = {}
    with (
        new_cluster(n_workers=3, lifetime="15 s", lifetime_stagger="9 s") as cluster,
        cluster.get_client() as client,
    ):
        client.wait_for_workers(3, timeout=60)
        client.run_on_scheduler(no_mark_is_forgiven)
        watch = Stopwatch()
        futures: list[Future] = []
        while watch() < 40:
            unfinished = sum(1 for future in futures[-20:] if not future.done())
            for _ in range(max(0, 6 - unfinished)):
                futures.append(client.submit(timed, where, f"t{len(futures)}", 1.0))
            now = client.run_on_scheduler(names)
            seen.append((watch(), len(now)))
            running.append(client.run_on_scheduler(lambda dask_scheduler: len(dask_scheduler.running)))
            joined.update(now)
            for name in now:
                lives.setdefault(name, [watch(), watch()])[1] = watch()
            time.sleep(0.1)
        assert client.gather(futures) == [f"t{n}" for n in range(len(futures))]
        assert client.run_on_scheduler(suspicions) == {}
        counts = marks.counts()
    gone = [end - start for start, end in lives.values() if end < 39]
    print(
        f"{len(futures)} tasks on {len(joined)} workers, at least {min(n for _, n in seen)} at any time; "
        f"{sum(running) / len(running):.1f} took tasks in the mean; "
        f"those that left had been there for {min(gone):.1f} to {max(gone):.1f} s"
    )
    assert {name: n for name, n in counts.items() if n != 1} == {} and len(counts) == len(futures)
    # The client keeps all results: the last to leave may wait for a worker that takes them.
    assert len(joined) >= 7 and max(gone) <= 20
    assert min(n for _, n in seen) >= 1, seen
    found = ends(cluster)
    assert found["exit 0"] >= len(gone) and found["JOB_HELD"] == found["signal"] == cluster.summary["evicted"] == 0
    assert not [how for how in found if how.startswith("exit") and how != "exit 0"]
    assert texts(messages, "failed") == ""
    assert [m["text"] for m in messages if m["kind"] == "log" and m["level"] in ("warning", "error")] == []


def test_a_task_longer_than_the_lifetime_runs_once(new_cluster: NewCluster, marks: Marks) -> None:
    # A worker on a busy machine takes seconds of it to join.
    with new_cluster(n_workers=2, lifetime="10 s") as cluster, cluster.get_client() as client:
        client.wait_for_workers(1, timeout=60)
        client.run_on_scheduler(no_mark_is_forgiven)
        future = client.submit(timed, str(marks.directory), "long", 20.0)
        assert future.result(timeout=60) == "long"
        worker = marks.begins("long", 1)
        wait_until(lambda: worker not in client.run_on_scheduler(names), 20, "its worker has gone")
        assert marks.counts() == {"long": 1}
        # The result went to a worker that came meanwhile.
        assert future.result(timeout=20) == "long" and marks.counts() == {"long": 1}
        wait_until(lambda: "past worker.lifetime" in stderr_of(cluster), 20, "the worker's word of it")


@pytest.mark.filterwarnings("ignore:task .* was taken from its worker")
def test_a_task_that_is_evicted_again_and_again_is_told_of(
    new_cluster: NewCluster, queue: ScheddClient, marks: Marks
) -> None:
    shown: list[Any] = []
    with new_cluster(n_workers=2) as cluster, cluster.get_client() as client:
        client.wait_for_workers(2, timeout=60)
        client.subscribe_topic("warn", lambda event: shown.append(event[1]))
        future = client.submit(gated, str(marks.directory), "endless")
        for n in range(1, 4):
            assert shown == [], "not before the third time"
            vacate(queue, marks.begins("endless", n))
            marks.begins("endless", n + 1)
        (message,) = wait_until(lambda: shown, 10, "a warning")
        assert b"3 times" in message["message"] and str(future.key).encode() in message["message"]
        marks.let_go("endless")
        assert future.result(timeout=20) == "endless"


def test_killed_workers_are_replaced_and_their_results_kept_elsewhere(
    new_cluster: NewCluster, marks: Marks, messages: Messages
) -> None:
    """SIGKILL of the worker process, which Dask cannot tell from a task that crashes it: up to three are borne."""
    where = str(marks.directory)
    with new_cluster(n_workers=2) as cluster, cluster.get_client() as client:
        client.wait_for_workers(2, timeout=60)
        long = client.submit(gated, where, "long")
        for n in range(1, 4):
            marks.begins("long", n)
            os.kill(int(marks.lines("long")[n - 1].split()[1]), signal.SIGKILL)
            marks.begins("long", n + 1)
            blamed = {str(long.key): n}
            wait_until(lambda blamed=blamed: client.run_on_scheduler(suspicions) == blamed, 10, "a mark for each")
        marks.let_go("long")
        assert long.result(timeout=30) == "long"
    assert len(re.findall("ended by signal SIGKILL", texts(messages, "log"))) >= 1


def test_fast_evictions_and_removals_are_held_against_no_task(
    new_cluster: NewCluster, queue: ScheddClient, marks: Marks, messages: Messages
) -> None:
    """condor_vacate_job -fast gives a worker no time to hand anything back; six times in a row."""
    where = str(marks.directory)
    with new_cluster(n_workers=2) as cluster, cluster.get_client() as client:
        client.wait_for_workers(2, timeout=60)
        long = client.submit(gated, where, "long")
        for n in range(1, 7):
            worker = marks.begins("long", n)
            vacate(queue, worker, htcondor2.JobAction.VacateFast)
            marks.begins("long", n + 1)
            wait_until(lambda: client.run_on_scheduler(suspicions) == {}, 10, "the mark is taken back")
        marks.let_go("long")
        assert long.result(timeout=30) == "long"
        assert marks.counts() == {"long": 7}
    assert texts(messages, "failed") == ""


def test_closing_does_not_wait_for_a_job_that_is_slow_to_leave(
    new_cluster: NewCluster, queue: ScheddClient, marks: Marks
) -> None:
    """Its task keeps the worker from listening, until the guard ends it; the supervisor sees to that alone."""
    cluster = new_cluster(n_workers=1)
    with cluster.get_client() as client:
        client.wait_for_workers(1, timeout=60)
        future = client.submit(deaf, str(marks.directory), "deaf")
        marks.begins("deaf", 1)
        assert future.status == "pending"
        assert cluster._supervisor is not None
        supervisor = cluster._supervisor.pid
    watch = Stopwatch()
    cluster.close()
    closed = watch()
    assert psutil.pid_exists(supervisor) and cluster.summary["left"] == 1
    assert closed < 10
    wait_until(lambda: jobs_of(queue, cluster.name) == [], 60, "no job left")
    # Not even a zombie of it.
    wait_until(lambda: not psutil.pid_exists(supervisor), 30, "the supervisor ended and was reaped")
    print(f"closed after {closed:.1f} s, all gone after {watch():.1f} s")
    assert not (cluster.run_directory / "staging").exists()
