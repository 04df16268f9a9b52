"""Which group a task belongs to, by the resources that it asks for."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from prefect_htcdask.scheduler.worker_groups import GROUP_RESOURCE, group_for, group_resource

OFFERS = {
    "cpu": {group_resource("cpu"): 4},
    "gpu": {group_resource("gpu"): 2, "GPU": 1},
    "big": {group_resource("big"): 1, "GPU": 4, "MEMORY": 2e11},
}

amounts = st.floats(min_value=0.5, max_value=1e12)
resources_of = st.dictionaries(st.sampled_from(["GPU", "MEMORY", "licence", group_resource("a")]), amounts)
offers_of = st.dictionaries(st.text(min_size=1, max_size=5), resources_of, max_size=4)


def test_a_task_that_asks_for_nothing_goes_to_the_first_group() -> None:
    assert group_for(None, OFFERS) == "cpu"
    assert group_for({}, OFFERS) == "cpu"
    assert group_for(None, {}) is None


def test_a_task_goes_to_the_first_group_that_offers_enough() -> None:
    assert group_for({"GPU": 1}, OFFERS) == "gpu"
    assert group_for({"GPU": 2}, OFFERS) == "big"
    assert group_for({"GPU": 1, "MEMORY": 1e9}, OFFERS) == "big"
    assert group_for({"GPU": 8}, OFFERS) is None
    assert group_for({"licence": 1}, OFFERS) is None


def test_each_group_has_a_resource_of_its_own() -> None:
    assert group_resource("gpu") == GROUP_RESOURCE + "gpu" == "htcdask-group-gpu"
    for name in OFFERS:
        assert group_for({group_resource(name): 1}, OFFERS) == name


@given(resources_of, offers_of)
def test_the_chosen_group_has_it_all_and_none_before_it_has(
    resources: dict[str, float], offers: dict[str, dict[str, float]]
) -> None:
    def suits(group: str) -> bool:
        return all(
            resource in offers[group] and offers[group][resource] >= resources[resource] for resource in resources
        )

    chosen = group_for(resources, offers)
    assert chosen == next((group for group in offers if suits(group)), None)
