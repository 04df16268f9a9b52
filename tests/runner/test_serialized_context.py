"""When a task is described anew: with whatever has become of it, and of what its function refers to."""

from __future__ import annotations

import gc
import uuid
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from prefect import task
from prefect.context import use_profile
from prefect.settings import Profile

from prefect_htcdask.runner.submit.serialized_context import INLINE_LIMIT, ContextPublisher
from prefect_htcdask.worker.metadata_cache import METADATA_ROOT

factor = 2


def scaled(x: int) -> int:
    return x * factor


@task
def by_a_global(x: int) -> int:
    return x * factor


@task
def through_a_helper(x: int) -> list[int]:
    return [scaled(y) for y in (x,)]


@task(tags=["one"])
def plain(x: int) -> int:
    return len(str(x))


Published = Callable[[Any], Any]
"""Where the description of a task is left."""


@pytest.fixture
def published(local_pool: Any) -> Iterator[Published]:
    with local_pool.get_client() as client:
        descriptions = ContextPublisher(client, f"run-{uuid.uuid4()}", None)
        yield lambda one: descriptions.envelope(one, None)
        descriptions.clear()


def test_an_unchanged_task_is_described_once(published: Published) -> None:
    for one in (by_a_global, through_a_helper, plain):
        assert published(one) == published(one)


def test_a_global_that_is_rebound_is_seen(published: Published, monkeypatch: pytest.MonkeyPatch) -> None:
    before = published(by_a_global), published(plain)
    monkeypatch.setattr(f"{__name__}.factor", 3)
    assert published(by_a_global) != before[0]
    assert published(plain) == before[1]


def test_a_helper_of_a_module_is_imported_by_the_worker_and_not_looked_into(
    published: Published, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = published(through_a_helper)
    monkeypatch.setattr(f"{__name__}.factor", 3)
    assert published(through_a_helper) == before


def test_what_a_local_helper_closes_over_is_seen(published: Published) -> None:
    """Also what is changed in place."""
    cut, weights = 10, [1, 2]

    def passes(x: int) -> bool:
        return x * sum(weights) > cut

    @task
    def select(x: int) -> bool:
        return (lambda y: passes(y))(x)

    before = published(select)
    assert published(select) == before
    cut = 20
    rebound = published(select)
    assert rebound != before
    weights.append(3)
    assert published(select) not in (before, rebound)


def test_an_empty_cell_is_no_error(published: Published) -> None:
    @task
    def early(x: int) -> int:
        return later(x)  # type: ignore[no-any-return, has-type]

    before = published(early)

    def later(x: int) -> int:
        return x

    assert published(early) != before


def test_tags_and_hooks_that_are_added_are_seen(published: Published) -> None:
    one = plain.with_options()
    before = published(one)
    one.tags.add("two")
    tagged = published(one)
    assert tagged != before
    one.on_failure(lambda task, run, state: None)
    assert published(one) not in (before, tagged)


def test_other_objects_with_the_same_options_are_described_once(local_pool: Any) -> None:
    """As of ``task.with_options(...).submit()`` in a loop: the scheduler keeps one description, for all rounds."""
    with local_pool.get_client() as client:
        descriptions = ContextPublisher(client, f"run-{uuid.uuid4()}", None)
        rounds = [plain.with_options(name="round", retries=2) for _ in range(100)]
        places = {descriptions.envelope(one, None) for one in rounds}
        assert len(places) == 1
        held = descriptions.held_bytes
        assert descriptions.envelope(plain.with_options(name="round", retries=3), None) not in places
        assert descriptions.held_bytes > held
        for place in descriptions.metadata_keys():
            assert client.get_metadata([METADATA_ROOT, *place])
        descriptions.clear()
        assert descriptions.held_bytes == 0 and descriptions.metadata_keys() == []


def test_logins_of_the_flows_host_do_not_travel(local_pool: Any) -> None:
    """A profile holds the gateway's password, as docs/site.md has it, or a server's database; workers need neither."""
    held = {
        "PREFECT_INTEGRATIONS_HTCDASK_GATEWAY_PASSWORD": "hunter2",
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": "postgresql+asyncpg://prefect:hunter2@db/prefect",
        "PREFECT_TASKS_DEFAULT_RETRIES": "7",
    }
    profile = Profile(name="mine", settings=held, source=None)
    with use_profile(profile, override_environment_variables=True), local_pool.get_client() as client:
        descriptions = ContextPublisher(client, f"run-{uuid.uuid4()}", None)
        descriptions.envelope(plain, None)
        blobs = [bytes(client.get_metadata([METADATA_ROOT, *place])) for place in descriptions.metadata_keys()]
        descriptions.clear()
    assert blobs and not [blob for blob in blobs if b"hunter2" in blob]
    assert [blob for blob in blobs if b"PREFECT_TASKS_DEFAULT_RETRIES" in blob]


def test_who_takes_away_what_he_left_leaves_the_same_bytes_to_others(local_pool: Any) -> None:
    """Two task runs that submit further ones share the flow run's part of the metadata."""
    blob = bytes(2 * INLINE_LIMIT)
    with local_pool.get_client() as client:
        run = f"run-{uuid.uuid4()}"
        one, other = ContextPublisher(client, run, None), ContextPublisher(client, run, None)
        place = one.put(blob)
        assert other.put(blob) != place
        for theirs in other.metadata_keys():
            client.set_metadata([METADATA_ROOT, *theirs], None)
        assert bytes(client.get_metadata([METADATA_ROOT, *place])) == blob


def test_what_was_described_is_not_kept_alive(local_pool: Any) -> None:
    def made(number: int) -> Any:
        @task
        def one(x: int) -> int:
            return x + number

        return one

    with local_pool.get_client() as client:
        descriptions = ContextPublisher(client, f"run-{uuid.uuid4()}", None)
        first = made(0)
        place, function = descriptions.envelope(first, None), weakref.ref(first.fn)
        assert descriptions.envelope(first, None) == place
        del first
        gc.collect()
        assert function() is None
        # Another function with the same words, and perhaps at the same address, may have a cache of its own.
        assert descriptions.envelope(made(0), None) != place
        descriptions.clear()
