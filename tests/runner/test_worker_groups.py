"""From what a flow says of a task to the Dask resources that the task asks for."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import dask
import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefect_htcdask import HTCDaskError, UnknownWorkerGroupError, worker_group
from prefect_htcdask.errors import WorkerGroupError
from prefect_htcdask.runner.submit.worker_groups import TAG_PREFIX, resolve, resources_of
from prefect_htcdask.scheduler.worker_groups import GROUP_RESOURCE, group_for, group_resource

OFFERS = {
    "cpu": {group_resource("cpu"): 4},
    "gpu": {group_resource("gpu"): 2, "GPU": 1},
    "big": {group_resource("big"): 1, "GPU": 4, "licence": 1},
}
ONE = {"default": {"GPU": 1}}
CPU, GPU = {group_resource("cpu"): 1}, {group_resource("gpu"): 1}


def resolved(
    group: str | None = None,
    tags: list[str] | None = None,
    annotated: Any = None,
    offers: Mapping[str, Mapping[str, float]] | None = OFFERS,
) -> dict[str, float] | None:
    return resolve("fit", group=group, tags=tags or [], annotated=annotated, offers=offers)


def test_a_task_goes_to_the_group_that_is_named() -> None:
    assert resolved("gpu") == resolved(tags=["x", "worker-group:gpu"]) == GPU
    # The context manager counts more than a tag.
    assert resolved("gpu", ["worker-group:cpu"]) == GPU
    assert resolved("big", annotated={"GPU": 2}) == {group_resource("big"): 1, "GPU": 2}
    assert resolved("big", annotated={"GPU": numpy.int64(2)}) == {group_resource("big"): 1, "GPU": 2}


def test_a_task_that_names_nothing_goes_to_the_first_group() -> None:
    assert resolved() == resolved(tags=["x"]) == resolved(annotated={}) == CPU


def test_resources_alone_lead_to_whoever_offers_them() -> None:
    assert resolved(annotated={"GPU": 1}) == {"GPU": 1}
    assert resolved(annotated={group_resource("big"): 1}) == {group_resource("big"): 1}


def test_with_one_group_tasks_ask_for_what_they_say_only() -> None:
    assert resolved(offers=ONE) is None
    assert resolved("default", offers=ONE) is None
    assert resolved("cpu", offers={"cpu": {group_resource("cpu"): 4}}) is None
    assert resolved("default", annotated={"GPU": 1}, offers=ONE) == {"GPU": 1}


@pytest.mark.parametrize("offers", [None, {}])
def test_where_nobody_knows_the_groups_nothing_is_checked(offers: dict[str, dict[str, float]] | None) -> None:
    assert resolved(offers=offers) is None
    assert resolved("any", annotated={"GPU": 99}, offers=offers) == {group_resource("any"): 1, "GPU": 99}


def test_an_annotation_that_is_a_function_is_left_to_dask() -> None:
    assert resolved(annotated=lambda key: {"GPU": 1}) is None
    with pytest.raises(WorkerGroupError, match=r"'fit'.*'gpu'.*mapping"):
        resolved("gpu", annotated=lambda key: {"GPU": 1})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"group": "gpux"}, ["'fit'", "'gpux'", "there are cpu, gpu, big", "workers="]),
        ({"tags": ["worker-group:Gpu"]}, ["'fit'", "'Gpu'", "cpu, gpu, big"]),
        ({"tags": ["worker-group:"]}, ["'fit'", "''", "cpu, gpu, big"]),
        ({"group": "gpu", "offers": ONE}, ["'fit'", "'gpu'", "there is default", "workers="]),
        ({"annotated": {"GPU": 8}}, ["'fit'", "GPU=8", "cpu has none, gpu has GPU=1, big has GPU=4, licence=1"]),
        ({"annotated": {"GPU": 2}, "group": "gpu"}, ["'fit'", "'gpu'", "GPU=2", "gpu has GPU=1"]),
        ({"annotated": {"FPGA": 1}, "offers": ONE}, ["'fit'", "FPGA=1", "default has GPU=1"]),
    ],
)
def test_what_there_is_not_is_an_error_that_says_what_there_is(arguments: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UnknownWorkerGroupError) as caught:
        resolved(**arguments)
    assert isinstance(caught.value, HTCDaskError)
    for word in words:
        assert word in str(caught.value)
    assert GROUP_RESOURCE not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        ({"tags": ["worker-group:cpu", "worker-group:gpu"]}, r"'fit' has tags of several .*\(cpu, gpu\).*worker_group"),
        ({"annotated": ["GPU"]}, r"'fit'.*\['GPU'\].*mapping"),
        ({"annotated": {"GPU": "one"}}, r"'fit'.*'GPU': 'one'.*number"),
        ({"annotated": {"GPU": -1}}, r"'GPU': -1"),
        ({"annotated": {"GPU": float("nan")}}, r"'GPU': nan"),
        ({"annotated": {"GPU": True}}, r"'GPU': True"),
        ({"annotated": {7: 1}}, r"in 7: 1"),
    ],
)
@pytest.mark.parametrize("offers", [OFFERS, None])
def test_what_makes_no_sense_is_an_error(arguments: dict[str, Any], pattern: str, offers: Any) -> None:
    with pytest.raises(WorkerGroupError, match=pattern):
        resolved(**arguments, offers=offers)


names = st.sampled_from(["cpu", "gpu", "big", "none"])
resources = st.dictionaries(st.sampled_from(["GPU", "licence"]), st.integers(0, 5), max_size=2)


@given(
    group=st.none() | names,
    tags=st.lists(names.map(TAG_PREFIX.__add__) | st.text(max_size=5), max_size=3),
    annotated=st.none() | resources,
    names_of_groups=st.lists(st.sampled_from(list(OFFERS)), unique=True, min_size=1),
)
def test_what_is_asked_for_is_what_the_group_offers(
    group: str | None, tags: list[str], annotated: dict[str, int] | None, names_of_groups: list[str]
) -> None:
    offers = {name: OFFERS[name] for name in names_of_groups}
    tagged = {tag.removeprefix(TAG_PREFIX) for tag in tags if tag.startswith(TAG_PREFIX)}
    named = group if group is not None else next(iter(tagged)) if len(tagged) == 1 else None
    before = dict(annotated or {})
    try:
        asked = resolved(group, tags, annotated, offers)
    except UnknownWorkerGroupError:
        where = offers if named is None else {named: offers[named]} if named in offers else {}
        assert group_for(before, where) is None
    except WorkerGroupError:
        assert group is None and len(tagged) > 1
    else:
        assert dict(annotated or {}) == before, "the annotation is the flow's, and stays as it is"
        there = group_for(asked, offers)
        assert there is not None
        assert named in (None, there) or len(offers) == 1
        assert {name: amount for name, amount in (asked or {}).items() if name in ("GPU", "licence")} == before


def asked_here() -> dict[str, float] | None:
    return resources_of("fit", [], OFFERS)


def test_context_managers_nest() -> None:
    with worker_group("big"):
        with worker_group("gpu"), dask.annotate(resources={"GPU": 1}):
            assert asked_here() == {"GPU": 1, **GPU}
        assert asked_here() == {group_resource("big"): 1}
        with pytest.raises(ZeroDivisionError), worker_group("gpu"):
            raise ZeroDivisionError
        assert asked_here() == {group_resource("big"): 1}
    assert asked_here() == CPU


@pytest.mark.parametrize("name", [None, 1, ["gpu"]])
def test_the_name_of_a_group_is_a_string(name: Any) -> None:
    with pytest.raises(TypeError, match=re.escape(repr(name))), worker_group(name):
        pass


def test_a_function_can_be_decorated() -> None:
    decorated = worker_group("gpu")(asked_here)
    assert [decorated(), decorated(), asked_here()] == [GPU, GPU, CPU]


async def test_coroutines_and_threads_do_not_disturb_each_other() -> None:
    entered = asyncio.Barrier(2) if hasattr(asyncio, "Barrier") else None

    async def within(name: str | None) -> list[Any]:
        with worker_group(name) if name else nullcontext():
            await (entered.wait() if entered else asyncio.sleep(0.05))
            return [asked_here(), await asyncio.to_thread(asked_here)]

    assert await asyncio.gather(within("gpu"), within(None)) == [[GPU, GPU], [CPU, CPU]]
    with worker_group("gpu"), ThreadPoolExecutor(1) as pool:
        assert pool.submit(asked_here).result() == CPU
