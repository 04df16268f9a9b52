"""What is submitted again, and in which order: for any graph of task runs, and whatever of it is known or in hand."""

from __future__ import annotations

import cloudpickle
from dask._task_spec import DataNode
from dask.core import flatten
from hypothesis import given
from hypothesis import strategies as st

from prefect_htcdask.runner.client.task_spec import SendOptions, SharedData, TaskSpec, graphs, tasks_to_resubmit

PLAIN, COLOURED = SendOptions({}, None), SendOptions({"colour": "blue"}, {"GPU": 1.0})
SHARED = SharedData("shared_parameters-1", b"much")


@st.composite
def submitted(draw: st.DrawFn) -> list[TaskSpec]:
    """Tasks in the order in which they were submitted, each with upstream tasks among the earlier ones."""
    specs: list[TaskSpec] = []
    for number in range(draw(st.integers(1, 12))):
        upstreams = draw(st.lists(st.sampled_from(specs), max_size=3)) if specs else []
        shared = draw(st.sampled_from([None, b"few", SHARED]))
        spec = TaskSpec(f"task-{number:036}", ("run", "envelope"), b"call", shared, tuple(upstreams))
        spec.options = draw(st.sampled_from([PLAIN, COLOURED]))
        specs.append(spec)
    return specs


@given(submitted(), st.data())
def test_all_that_a_task_needs_is_there_before_it(specs: list[TaskSpec], data: st.DataObject) -> None:
    some = st.sets(st.sampled_from([spec.key for spec in specs]))
    chosen = data.draw(some)
    lost = [spec for spec in specs if spec.key in chosen]
    states = dict.fromkeys(data.draw(some) - {spec.key for spec in lost}, "a state")
    known = data.draw(some) - {spec.key for spec in lost}

    again = tasks_to_resubmit(lost, known, states.__contains__)
    there, sent = set(known), []
    for graph in graphs(again, states, batch=data.draw(st.integers(1, 5))):
        assert set(graph.keys) == set(graph.nodes)
        for key, node in graph.nodes.items():
            assert set(node.dependencies) <= there | set(graph.nodes), key
            if isinstance(node, DataNode):
                assert (key, node()) == SHARED
            elif key.startswith("state_in_hand-"):
                assert cloudpickle.dumps("a state") in flatten([list(node.args[1].args)], container=(list, tuple))
            else:
                sent.append(key)
                assert next(spec for spec in specs if spec.key == key).options is graph.options
        there |= set(graph.nodes)

    # Once each, in their old order; and nothing that is known or in hand, unless it was lost itself.
    assert sent == sorted(set(sent), key=[spec.key for spec in specs].index)
    assert {spec.key for spec in lost} <= set(sent)
    assert not (set(sent) & (known | set(states)))
