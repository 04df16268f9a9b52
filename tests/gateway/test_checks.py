"""What is asked of a gateway before any worker is submitted."""

from __future__ import annotations

from typing import Any

import pytest

from prefect_htcdask.gateway.checks import check_scheduler_versions, local_versions
from prefect_htcdask.settings import SettingsError
from prefect_htcdask.worker.gateway_comm import GatewayBackend, GatewayConnector, gateway_address


def scheduler(**changes: str) -> dict[str, Any]:
    here = {**local_versions(), **changes}
    return {
        "host": {"python": f"{here['python']}.99.final.0"},
        "packages": {"dask": here["dask"], "distributed": here["distributed"], "numpy": None},
    }


def test_the_same_versions_pass_whatever_the_micro_number() -> None:
    check_scheduler_versions(scheduler(), "http://gateway")


@pytest.mark.parametrize("name", ["python", "dask", "distributed"])
def test_a_difference_is_named(name: str) -> None:
    with pytest.raises(SettingsError) as caught:
        check_scheduler_versions(scheduler(**{name: "1.2"}), "http://gateway")
    text = str(caught.value)
    assert f"{name} 1.2 on the scheduler, {local_versions()[name]} here" in text
    assert "http://gateway" in text and "worker.image" in text
    assert all(f"{other} " not in text for other in {"python", "dask", "distributed"} - {name})


def test_pairs_are_understood_too() -> None:
    """Older versions of distributed answer with pairs."""
    answer = scheduler(python="2.7")
    answer["host"] = list(answer["host"].items())
    with pytest.raises(SettingsError, match=r"python 2\.7"):
        check_scheduler_versions(answer, "http://gateway")


def test_what_the_scheduler_does_not_tell_is_no_difference() -> None:
    check_scheduler_versions({}, "http://gateway")


def test_gateway_addresses() -> None:
    address = gateway_address("10.0.0.1:8786", "c0ffee")
    backend = GatewayBackend()
    location = address.removeprefix("gateway://")
    assert backend.get_address_host_port(location) == ("10.0.0.1", 8786)
    assert backend.get_address_host(location) == "10.0.0.1"
    assert backend.resolve_address(location) == location
    assert isinstance(backend.get_connector(), GatewayConnector)
    with pytest.raises(NotImplementedError):
        backend.get_listener()
