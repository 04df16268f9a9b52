"""From what a user asks for to what the supervisor is asked for."""

from __future__ import annotations

from typing import Any

import pytest

from prefect_htcdask.gateway.scale_requests import adapt_request, hold_request, scale_request, worker_count
from prefect_htcdask.settings import load_settings

GROUPS = {"cpu": {}, "gpu": {}, "far": {}}


def adapt(minimum: Any = None, maximum: Any = None, group: str | None = None) -> tuple[str, int, int]:
    settings = load_settings(
        workers={"cpu": {}, "gpu": {"minimum": 1, "maximum": 4}}, adaptive={"minimum": 2, "maximum": 9}
    )
    request = adapt_request(minimum, maximum, group, GROUPS, settings)
    assert request.pop("op") == "adapt"
    return request["group"], request["minimum"], request["maximum"]


def test_what_is_not_said_is_as_in_the_settings() -> None:
    assert adapt() == ("cpu", 0, 9)
    assert adapt(group="gpu") == ("gpu", 1, 4)
    assert adapt(minimum=6, group="gpu") == ("gpu", 6, 6), "a minimum of the user's own is not refused"
    assert adapt(maximum=1, group="gpu") == ("gpu", 1, 1)
    assert adapt(group="far") == ("far", 0, 9), "a group that these settings do not know"


@pytest.mark.parametrize(("minimum", "maximum"), [(3, 2), (-1, 2), (1, 2.5), ("1", None), (None, True)])
def test_limits_that_cannot_be(minimum: Any, maximum: Any) -> None:
    with pytest.raises(ValueError, match=r"minimum = 3 is above maximum = 2|no number of workers"):
        adapt(minimum, maximum)


def test_each_wish_is_for_one_group() -> None:
    assert scale_request(3, None, GROUPS) == {"op": "scale", "n": 3, "group": "cpu"}
    assert scale_request(0, "gpu", GROUPS) == {"op": "scale", "n": 0, "group": "gpu"}
    assert hold_request(None, GROUPS) == {"op": "hold", "group": "cpu"}
    for ask in (
        lambda: scale_request(1, "tpu", GROUPS),
        lambda: hold_request("tpu", GROUPS),
        lambda: adapt(group="tpu"),
    ):
        with pytest.raises(ValueError, match=r"group='tpu' .* cpu, gpu, far"):
            ask()


@pytest.mark.parametrize("n", [-1, 1.5, "2", True, None])
def test_a_number_of_workers_is_a_number(n: Any) -> None:
    with pytest.raises(ValueError, match="no number of workers"):
        worker_count(n)
