"""A Prefect server that is behind with its events: the ends of task runs are waited for, and it is asked little.

The client is a stand-in: how fast a real server works its backlog off cannot be set.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any
from unittest import mock
from uuid import UUID, uuid4

import pytest
from prefect._internal.uuid7 import uuid7
from prefect.client.schemas.filters import TaskRunFilter
from prefect.states import Completed, Running

from prefect_htcdask.runner.states import reporter as task_run_states
from prefect_htcdask.runner.states.reporter import PAGE, Ended, StateReporter


class Behind:
    """An API at which, with each look from the start of the queue, `each` more of `coming` have arrived."""

    def __init__(self, coming: Iterable[UUID], each: int) -> None:
        self.coming = iter(coming)
        self.each = each
        self.arrived: set[UUID] = set()
        self.pages = self.looks = 0
        self.told: list[UUID] = []

    def arrive(self) -> None:
        self.looks += 1
        self.arrived.update(itertools.islice(self.coming, self.each))

    def read_task_runs(self, task_run_filter: TaskRunFilter, limit: int) -> list[Any]:
        assert task_run_filter.id is not None and task_run_filter.id.any_ is not None
        assert limit == PAGE >= len(task_run_filter.id.any_)
        self.pages += 1
        return [
            SimpleNamespace(id=one, state=Completed() if one in self.arrived else Running())
            for one in task_run_filter.id.any_
        ]

    def set_task_run_state(self, task_run_id: UUID, state: Any, force: bool) -> None:
        assert force and state.is_completed()
        self.told.append(task_run_id)


class Reporter(StateReporter):
    """A reporter that talks to such an API, and notes what it would have sent as events."""

    def __init__(self, api: Behind) -> None:
        super().__init__(uuid4())
        self.api = api
        self.emitted: list[UUID] = []

    def ensure_final_states(self, *args: Any, **kwargs: Any) -> int:
        with mock.patch.object(task_run_states, "open_client", lambda *_: nullcontext(self.api)):
            return super().ensure_final_states(*args, **kwargs)

    def _look(self, client: Any, missing: dict[UUID, Any], unchanged: int = 10**9) -> None:
        self.api.arrive()
        super()._look(client, missing, unchanged)

    def _emit_end(self, ended: Ended, task_run: Any) -> None:
        self.emitted.append(ended.task_run_id)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task_run_states, "LONGEST_PAUSE", 0.01)


def in_order(count: int) -> list[UUID]:
    """Ids of task runs; those of one millisecond have no order of their own."""
    return sorted(uuid7() for _ in range(count))


def ended(ids: Iterable[UUID]) -> list[Ended]:
    return [Ended(one, "one", None, Completed()) for one in ids]


@pytest.mark.usefixtures("quick")
def test_a_backlog_is_waited_for_with_a_few_pages_at_a_time() -> None:
    ids = in_order(5_000)
    api = Behind(ids, each=100)
    reporter = Reporter(api)
    assert reporter.ensure_final_states(ended(reversed(ids))) == 0
    assert (reporter.emitted, api.told) == ([], [])
    # All of them each time would be about 25 pages at 50 looks.
    assert api.looks <= 52 and api.pages <= 3 * api.looks


@pytest.mark.usefixtures("quick")
def test_lost_ones_at_the_head_of_a_backlog_hide_none_of_it_and_are_told_of() -> None:
    ids = in_order(3 * PAGE + 1_000)
    lost, late = ids[: 3 * PAGE], ids[3 * PAGE :]
    api = Behind(late, each=200)
    reporter = Reporter(api)
    assert reporter.ensure_final_states(ended(ids), settle=0.05) == len(lost)
    assert reporter.emitted == api.told == lost


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("workers_gone", "events", "emitted", "told"),
    [(False, True, 0, 0), (True, True, 1, 0), (True, False, 0, 1)],
    ids=["workers that live on tell themselves", "events say it for those that are gone", "no events any more"],
)
def test_a_backlog_that_outlasts_all_patience(
    workers_gone: bool, events: bool, emitted: int, told: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(task_run_states, "AT_MOST", 0.2)
    ids = in_order(10_000)
    api = Behind(ids, each=1)
    reporter = Reporter(api)
    count = reporter.ensure_final_states(ended(ids[:50]), events=events, workers_gone=workers_gone)
    left = [one for one in ids[:50] if one not in api.arrived]
    assert left, "the test's backlog was too short"
    assert count == (len(left) if workers_gone else 0)
    assert reporter.emitted == left * emitted
    assert api.told == left * told
