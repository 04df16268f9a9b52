"""What can be known of a runner without running anything."""

from __future__ import annotations

import pickle
from typing import Any

import cloudpickle
import pytest
from dask.utils import key_split
from hypothesis import given
from hypothesis import strategies as st
from prefect import flow, task
from prefect.utilities.annotations import allow_failure, opaque, quote, unmapped
from prefect_dask import DaskTaskRunner

from prefect_htcdask import HTCDaskTaskRunner, HTCGatewayCluster
from prefect_htcdask.runner.preflight import check_api_reachable
from prefect_htcdask.runner.submit.map import expand_mapping
from prefect_htcdask.runner.submit.submitter import key_prefix
from prefect_htcdask.scheduler.worker_groups import group_resource
from prefect_htcdask.settings import SettingsError, load_settings


class OurCluster(HTCGatewayCluster):
    """A site's own subclass."""


def test_it_is_a_dask_task_runner_with_a_name_of_its_own() -> None:
    runner = HTCDaskTaskRunner()
    assert isinstance(runner, DaskTaskRunner)
    assert runner.name == "htcdask"


def test_entering_provisions_nothing() -> None:
    with HTCDaskTaskRunner(gateway={"address": "http://127.0.0.1:1"}) as runner:
        assert runner._live_key is None


@pytest.mark.parametrize("copier", [pickle, cloudpickle])
def test_pickling_keeps_settings_and_drops_handles(copier: Any) -> None:
    runner = HTCDaskTaskRunner(
        cluster_kwargs={"memory": "1 GiB"}, adapt_kwargs={"maximum": 3}, worker={"cpus": 2}, performance_report_path="r"
    )
    with runner:
        runner._live_key = "some flow run"
        other = copier.loads(copier.dumps(runner))
        runner._live_key = None
    assert other == runner
    assert other._live_key is None
    assert not other._started
    with other:
        pass


def test_duplicates_are_equal_and_not_started() -> None:
    runner = HTCDaskTaskRunner(adapt_kwargs={"minimum": 1, "maximum": 3})
    with runner:
        duplicate = runner.duplicate()
    assert duplicate == runner and duplicate is not runner
    assert not duplicate._started
    assert runner != HTCDaskTaskRunner()
    assert runner != HTCDaskTaskRunner(adapt_kwargs={"minimum": 1, "maximum": 3}, cpus=2)
    assert runner != DaskTaskRunner(adapt_kwargs={"minimum": 1, "maximum": 3})


@pytest.mark.parametrize("given", ["keyword", "cluster_kwargs", "settings"])
def test_worker_groups_are_given_in_their_order(given: str) -> None:
    groups = {"small": {"cpus": 2}, "gpu": {"gpus": 1, "nthreads": 1}, "big": {"memory": "8 GiB"}}
    runner = {
        "keyword": lambda: HTCDaskTaskRunner(workers=groups, memory="1 GiB"),
        "cluster_kwargs": lambda: HTCDaskTaskRunner(cluster_kwargs={"workers": groups, "memory": "1 GiB"}),
        "settings": lambda: HTCDaskTaskRunner(settings=load_settings(workers=groups, worker={"memory": "1 GiB"})),
    }[given]()
    for one in (runner, runner.duplicate(), pickle.loads(pickle.dumps(runner))):
        settings = one.effective_settings()
        assert [group.memory >> 30 for group in settings.groups.values()] == [1, 1, 8]
        assert list((one._known_offers() or {}).items()) == [
            ("small", {group_resource("small"): 2}),
            ("gpu", {group_resource("gpu"): 1, "GPU": 1}),
            ("big", {group_resource("big"): 1}),
        ]
    assert HTCDaskTaskRunner(gpus=1)._known_offers() == {"default": {"GPU": 1}}
    assert HTCDaskTaskRunner(address="tcp://127.0.0.1:1")._known_offers() is None


def test_what_travels_to_workers_holds_no_secret() -> None:
    runner = HTCDaskTaskRunner(gateway={"password": "sesame"}, cluster_kwargs={"environment": {"A": "sesame"}})
    assert b"sesame" in pickle.dumps(runner)
    assert b"sesame" not in pickle.dumps(runner.for_workers())


def test_a_runner_is_used_only_when_started() -> None:
    @task
    def nothing() -> None: ...

    with pytest.raises(RuntimeError, match="must be started"):
        HTCDaskTaskRunner().submit(nothing, {})


@pytest.mark.parametrize("cluster_class", [HTCGatewayCluster, OurCluster, "prefect_htcdask.HTCGatewayCluster"])
def test_cluster_class_may_be_ours(cluster_class: Any) -> None:
    assert issubclass(HTCDaskTaskRunner(cluster_class=cluster_class).resolved_cluster_class, HTCGatewayCluster)


@pytest.mark.parametrize("cluster_class", ["distributed.LocalCluster", dict, lambda: None])
def test_other_cluster_classes_belong_to_another_runner(cluster_class: Any) -> None:
    with pytest.raises(TypeError, match="DaskTaskRunner"):
        HTCDaskTaskRunner(cluster_class=cluster_class)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"adapt_kwargs": {"minimum": 5, "maximum": 2}}, "minimum"),
        ({"adapt_kwargs": {"minimum": -1}}, "minimum"),
        ({"adapt_kwargs": {"interval": "5s"}}, "interval"),
        ({"cluster_kwargs": {"memory": "lots"}}, "worker.memory"),
        ({"memory": "lots"}, "worker.memory"),
        ({"worker": {"cpus": 0}}, "worker.cpus"),
        ({"worker": 3}, "worker"),
        ({"colour": "blue"}, "colour"),
        ({"worker": {"colour": "blue"}}, "colour"),
        ({"settings": load_settings(), "cpus": 2}, "settings"),
        ({"workers": 2}, "workers"),
        ({"workers": {"gpu": 2}}, "workers.gpu"),
        ({"workers": {"gpu": {"memory": "lots"}}}, "workers.gpu.memory"),
        ({"cluster_kwargs": {"workers": {"gpu": {"colour": "blue"}}}}, "colour"),
    ],
)
def test_bad_values_are_one_clear_error(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(SettingsError, match=named):
        HTCDaskTaskRunner(**arguments)


def test_arguments_exclude_each_other_as_in_prefect_dask() -> None:
    with pytest.raises(ValueError, match="address"):
        HTCDaskTaskRunner(address="tcp://127.0.0.1:1", cluster_kwargs={"cpus": 2})
    with pytest.raises(ValueError, match="asynchronous"):
        HTCDaskTaskRunner(client_kwargs={"asynchronous": True})


def test_settings_come_from_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_INTEGRATIONS_HTCDASK_ADAPTIVE_MAXIMUM", "7")
    monkeypatch.setenv("PREFECT_INTEGRATIONS_HTCDASK_WORKER_CPUS", "3")
    settings = HTCDaskTaskRunner(memory="1 GiB", adapt_kwargs={"minimum": 2}).effective_settings()
    assert (settings.adaptive.minimum, settings.adaptive.maximum) == (2, 7)
    assert (settings.worker.cpus, settings.worker.memory) == (3, 1024**3)
    given_ = HTCDaskTaskRunner(settings=load_settings(worker={"cpus": 5})).effective_settings()
    assert given_.worker.cpus == 5


def test_a_flow_takes_the_class_or_an_instance() -> None:
    @flow(task_runner=HTCDaskTaskRunner)
    def first() -> None: ...

    assert isinstance(first.task_runner, HTCDaskTaskRunner)


@given(st.text(max_size=60))
def test_dask_reads_one_word_from_any_key(name: str) -> None:
    prefix = key_prefix(name)
    key = f"{prefix}-0199a1b2-c3d4-7e5f-8a9b-0c1d2e3f4a5b"
    assert prefix
    assert key_split(key) == prefix


@pytest.mark.parametrize("name", ["load", "load-data", "load_data", "Load2"])
def test_plain_names_stay_as_they_are(name: str) -> None:
    assert key_prefix(name) == name


@pytest.mark.parametrize("annotation", [quote, opaque, allow_failure, unmapped])
def test_annotations_survive_pickling(annotation: Any) -> None:
    import prefect_htcdask.runner.submit.submitter  # noqa: F401

    for copier in (pickle, cloudpickle):
        again = copier.loads(copier.dumps(annotation([1, 2])))
        assert type(again) is annotation
        assert again.unwrap() == [1, 2]


def _call(x: Any, y: Any = 5, *args: Any, **kwargs: Any) -> None: ...


values = st.one_of(
    st.integers(),
    st.text(max_size=3),
    st.lists(st.integers(), min_size=2, max_size=2),
    st.tuples(st.booleans(), st.none()),
)


@given(
    st.dictionaries(
        st.sampled_from(["x", "y", "kwargs"]),
        st.one_of(values, values.map(unmapped), values.map(allow_failure)),
        min_size=1,
    )
)
def test_mapping_expands_as_prefects_own(parameters: dict[str, Any]) -> None:
    """The judge is `prefect.task_runners.TaskRunner.map`, on a runner that writes down what it is given."""
    from prefect.task_runners import TaskRunner

    called: list[dict[str, Any]] = []

    class Recorder(TaskRunner):  # type: ignore[type-arg]
        def duplicate(self) -> Recorder:
            return self

        def submit(self, task: Any, parameters: dict[str, Any], wait_for: Any = None, dependencies: Any = None) -> Any:
            called.append(parameters)
            return object()

    parameters = dict(parameters)
    if "kwargs" in parameters:
        parameters["kwargs"] = {"more": parameters["kwargs"]}
    mapped = task(_call)
    try:
        with Recorder() as recorder:
            recorder.map(mapped, parameters)
    except Exception as expected:
        with pytest.raises(type(expected)):
            expand_mapping(mapped, parameters)
    else:
        calls, shared = expand_mapping(mapped, parameters)
        assert [{**call, **shared} for call in calls] == called


@pytest.mark.parametrize(
    ("url", "loopback"),
    [
        ("http://127.0.0.1:4200/api", True),
        ("http://localhost:4200/api", True),
        ("http://[::1]:4200/api", True),
        ("http://0.0.0.0:4200/api", True),
        ("https://api.prefect.cloud/api", False),
        ("http://192.0.2.7:4200/api", False),
    ],
)
def test_an_api_on_loopback_is_refused_for_workers_elsewhere(url: str, loopback: bool) -> None:
    check_api_reachable(url, workers_are_local=True)
    if loopback:
        with pytest.raises(SettingsError, match="PREFECT_API_URL"):
            check_api_reachable(url, workers_are_local=False)
    else:
        check_api_reachable(url, workers_are_local=False)


def test_no_api_at_all_is_refused() -> None:
    with pytest.raises(SettingsError, match="PREFECT_API_URL"):
        check_api_reachable(None, workers_are_local=True)
