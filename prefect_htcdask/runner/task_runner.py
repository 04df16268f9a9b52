"""`HTCDaskTaskRunner`: what Prefect sees."""

from __future__ import annotations

import copy
import uuid
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeVar, cast

import distributed
from prefect.client.schemas.objects import RunInput
from prefect.context import FlowRunContext
from prefect.futures import PrefectFuture, PrefectFutureList
from prefect.tasks import Task
from prefect.utilities.engine import collect_task_run_inputs_sync
from prefect.utilities.importtools import from_qualified_name
from prefect_dask.task_runners import DaskTaskRunner

from prefect_htcdask.compat.prefect import stop_if_suspended
from prefect_htcdask.gateway.scale_requests import is_unbounded
from prefect_htcdask.runner import flow_run as sessions
from prefect_htcdask.runner.futures.futures import HTCDaskFuture, HTCDaskFutureList
from prefect_htcdask.runner.futures.pending_result import PendingResult
from prefect_htcdask.runner.nested import NestedRun, nested_run
from prefect_htcdask.runner.submit.map import expand_mapping
from prefect_htcdask.runner.submit.submitter import current_tags
from prefect_htcdask.runner.submit.worker_groups import resources_of
from prefect_htcdask.scheduler.worker_groups import Offers
from prefect_htcdask.settings import HTCDaskSettings, SettingsError, WorkerSettings, load_settings

if TYPE_CHECKING:
    from distributed import Client
    from distributed.deploy.cluster import Cluster

    from prefect_htcdask.runner.provisioning import RunnerOptions

R = TypeVar("R")


class HTCDaskTaskRunner(DaskTaskRunner):
    """Runs a flow's tasks on Dask workers that are HTCondor jobs, behind a Dask Gateway.

    The first submit of a flow run provisions a gateway cluster and worker jobs for it; their number follows the number
    of queued tasks; at the end of the flow run all of it is removed. Entering the runner provisions nothing.

    Args:
        cluster: a running Dask cluster to use. It is not closed at the end (a warm pool).
        address: address of a running Dask scheduler, likewise.
        cluster_class: `HTCGatewayCluster` (the default), a subclass, or the qualified name of one.
        cluster_kwargs: arguments of the cluster class: settings of the workers, `n_workers`, cluster options.
        adapt_kwargs: `minimum` and `maximum` number of workers. Unset: the settings ``adaptive.minimum`` and
            ``adaptive.maximum``, unless `cluster_kwargs` has `n_workers`.
        client_kwargs: arguments of the Dask client.
        performance_report_path: where Dask's performance report is written at the end.
        settings: all settings at once, instead of those of environment, ``prefect.toml`` and profile.
        keywords: single settings: a group (``worker={"memory": "4 GiB"}``) or a field of the group `worker`
            (``memory="4 GiB"``). ``workers={"cpu": {}, "gpu": {"gpus": 1}}`` gives several kinds of workers, each
            scaled by its own queue; `worker_group` or a tag says which a task goes to, and others go to the first.

    Raises:
        SettingsError: a setting cannot work; the message names it, its value and the remedy.
        TypeError: `cluster_class` is another cluster class.
        ValueError: arguments that exclude each other, as with `DaskTaskRunner`.
    """

    def __init__(
        self,
        cluster: Cluster | None = None,
        address: str | None = None,
        cluster_class: str | type[Any] | None = None,
        cluster_kwargs: dict[str, Any] | None = None,
        adapt_kwargs: dict[str, Any] | None = None,
        client_kwargs: dict[str, Any] | None = None,
        performance_report_path: str | None = None,
        *,
        settings: HTCDaskSettings | None = None,
        **keywords: Any,
    ) -> None:
        super().__init__(
            cluster=cluster,
            address=address,
            cluster_class=_check_cluster_class(cluster_class),
            cluster_kwargs=cluster_kwargs,
            adapt_kwargs=adapt_kwargs,
            client_kwargs=client_kwargs,
            performance_report_path=performance_report_path,
        )
        if settings is not None and keywords:
            raise SettingsError(f"give either settings= or single settings ({', '.join(keywords)}), not both")
        self.settings = settings
        self.overrides = _as_groups(keywords)
        if cluster is None and address is None:
            # Found out here rather than when the flow is half done.
            self.effective_settings()
        self._family = uuid.uuid4().hex
        self._live_key: str | None = None
        self._for_workers = False

    def effective_settings(self) -> HTCDaskSettings:
        """The settings of environment, ``prefect.toml`` and profile, with this runner's own on top.

        Raises:
            SettingsError: a setting cannot work.
        """
        if self.settings is not None:
            groups = self.settings.stated()
        else:
            groups = {name: dict(values) for name, values in self.overrides.items()}
        if "workers" in self.cluster_kwargs:
            groups["workers"] = self.cluster_kwargs["workers"]
        worker = {k: v for k, v in self.cluster_kwargs.items() if k in WorkerSettings.model_fields}
        groups["worker"] = {**groups.get("worker", {}), **worker}
        unknown = sorted(set(self.adapt_kwargs) - {"minimum", "maximum"})
        if unknown:
            raise SettingsError(
                f"adapt_kwargs = {self.adapt_kwargs!r}: {', '.join(unknown)} cannot be set, only minimum and maximum"
            )
        limits = {name: value for name, value in self.adapt_kwargs.items() if not is_unbounded(value)}
        groups["adaptive"] = {**groups.get("adaptive", {}), **limits}
        return load_settings(**groups)

    def __eq__(self, other: object) -> bool:
        """Whether another runner has the same settings."""
        return (
            isinstance(other, HTCDaskTaskRunner)
            and super().__eq__(other)
            and self._cluster is other._cluster
            and self.settings == other.settings
            and self.overrides == other.overrides
            and self.performance_report_path == other.performance_report_path
        )

    __hash__ = object.__hash__

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        # Handles of this process. A given cluster object is one too; elsewhere its scheduler's address serves.
        cluster = state.pop("_cluster", None)
        if cluster is not None and state["address"] is None and not self._for_workers:
            state["address"] = getattr(cluster, "scheduler_address", None)
        state["_cluster"] = None
        state["_live_key"] = None
        state["_started"] = False
        for handle in ("_exit_stack", "_client", "_connect_to", "logger"):
            state.pop(handle, None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        from contextlib import ExitStack

        from prefect.logging.loggers import get_logger

        self.__dict__.update(state)
        self._exit_stack = ExitStack()
        self.logger = get_logger(f"task_runner.{self.name}")

    def duplicate(self) -> HTCDaskTaskRunner:
        """A runner with the same settings, not started."""
        new = copy.copy(self)
        new._cluster = self._cluster
        new.address = self.address
        return new

    def for_workers(self) -> HTCDaskTaskRunner:
        """The runner as it travels to workers: without settings, which may hold secrets, and without a cluster."""
        new = copy.copy(self)
        new.settings, new.overrides = None, {}
        new.cluster_kwargs, new.adapt_kwargs, new.client_kwargs = {}, {}, {"set_as_default": False}
        new.address, new._cluster, new.performance_report_path = None, None, None
        new._for_workers = True
        return new

    @property
    def client(self) -> Client:  # type: ignore[override]
        """The Dask client of the flow run; asking for it provisions the cluster, as the first submit does."""
        return self._run().client

    @property  # type: ignore[override]
    def _client(self) -> Client | None:
        # prefect_dask's get_dask_client looks here.
        return self._run().client if getattr(self, "_started", False) else None

    @_client.setter
    def _client(self, value: Client | None) -> None:
        if value is not None:
            raise AttributeError("the client of an HTCDaskTaskRunner is found by its flow run")

    def submit(  # type: ignore[override]
        self,
        task: Task[Any, R],
        parameters: dict[str, Any],
        wait_for: PrefectFuture[Any] | Iterable[Any] | None = None,
        dependencies: dict[str, set[RunInput]] | None = None,
    ) -> HTCDaskFuture[R]:
        """Submit one task run.

        Raises:
            HTCDaskError: the cluster cannot be had or has failed.
            UnknownWorkerGroupError: no worker group is named or can do what the task asks for; nothing was started.
            SettingsError: a setting cannot work.
        """
        self._require_started()
        resources = self._resources_of(task)
        run = self._run()
        run.check()
        sent = run.submitter.submit(task, parameters, wait_for, dependencies, resources)
        result = PendingResult(sent.task_run_id, sent.future, task.name, task, sent.upstreams, sent.spec)
        run.track([result])
        return HTCDaskFuture(result, run.gatherer)

    def map(  # type: ignore[override]
        self,
        task: Task[Any, R],
        parameters: dict[str, Any],
        wait_for: PrefectFuture[Any] | Iterable[Any] | None = None,
    ) -> PrefectFutureList[HTCDaskFuture[R]]:
        """Submit one task run for each element of the iterable parameters, as one Dask graph.

        Raises:
            MappingMissingIterable: no parameter is iterable.
            MappingLengthMismatch: the iterables differ in length.
            HTCDaskError: the cluster cannot be had or has failed.
            UnknownWorkerGroupError: no worker group is named or can do what the task asks for; nothing was started.
            SettingsError: a setting cannot work.
        """
        self._require_started()
        stop_if_suspended()
        inputs = {k: collect_task_run_inputs_sync(v, max_depth=0) for k, v in parameters.items()}
        calls, shared = expand_mapping(task, parameters)
        resources = self._resources_of(task)
        run = self._run()
        run.check()
        submitted = run.submitter.submit_many(task, calls, shared, wait_for, inputs, resources)
        results = [
            PendingResult(sent.task_run_id, sent.future, task.name, task, sent.upstreams, sent.spec)
            for sent in submitted
        ]
        run.track(results)
        futures: list[HTCDaskFuture[R]] = [HTCDaskFuture(result, run.gatherer) for result in results]
        return HTCDaskFutureList(futures)  # type: ignore[abstract, arg-type]

    def cancel_all(self) -> None:
        """Cancel the task runs of this runner's flow run. Prefect calls it on the runner that was duplicated."""
        import threading

        context = FlowRunContext.get()
        keys = [self._live_key] if self._live_key else []
        if context is not None and context.flow_run is not None:
            keys.append(str(context.flow_run.id))
        runs = [run for key in keys if (run := sessions.find(key)) is not None]
        for run in runs or sessions.owned_by(self._family, threading.get_ident()):
            run.cancel()

    def __enter__(self) -> HTCDaskTaskRunner:
        """Start the runner. Nothing is provisioned yet."""
        super().__enter__()
        return self

    def __exit__(self, *args: Any) -> None:
        """End the flow run's work: see `sessions.FlowRunSession.close`. A second call does nothing."""
        key, self._live_key = self._live_key, None
        try:
            if key is not None:
                sessions.close(key, args[1] if len(args) > 1 else None)
        finally:
            super().__exit__(*(args or (None, None, None)))

    def _require_started(self) -> None:
        if not self._started:
            raise RuntimeError("The task runner must be started before submitting work.")

    def _run(self) -> sessions.FlowRunSession | NestedRun:
        """The live handles: the flow run's, opened when first asked for; on a worker, its own client."""
        if _on_worker():
            return nested_run()
        context = FlowRunContext.get()
        if self._live_key is None:
            flow_run = context.flow_run if context is not None else None
            self._live_key = str(flow_run.id) if flow_run is not None else uuid.uuid4().hex
        key = self._live_key
        return sessions.find_or_open(key, lambda: self._open(key, context))

    def _open(self, key: str, context: FlowRunContext | None) -> sessions.FlowRunSession:
        from prefect_htcdask.runner.provisioning import open_run

        run = open_run(self._options(), key, context)
        try:
            run.set_worker_resources(getattr(run.cluster, "worker_offers", None) or self._known_offers())
        except BaseException as exc:
            run.close(exc)
            raise
        return run

    def _options(self) -> RunnerOptions:
        from prefect_htcdask.runner.provisioning import RunnerOptions

        settings = self.settings or load_settings(code=self.overrides.get("code"))
        return RunnerOptions(
            owner=self._family,
            cluster=self._cluster,
            address=self.address,
            cluster_class=cast(Any, self.resolved_cluster_class),
            cluster_kwargs=self.cluster_kwargs,
            adapt_kwargs=self.adapt_kwargs,
            client_kwargs=self.client_kwargs,
            performance_report_path=self.performance_report_path,
            settings=self.effective_settings,
            code=settings.code,
            logger=self.logger,
        )

    def _resources_of(self, task: Task[Any, Any]) -> dict[str, float] | None:
        """The Dask resources that a task asks for, by the worker group that it is for."""
        run: sessions.FlowRunSession | NestedRun | None = None
        if _on_worker():
            run = nested_run()
        elif self._live_key is not None:
            run = sessions.find(self._live_key)
        if run is None and (self._cluster is not None or self.address is not None):
            # It runs already, and its scheduler may tell.
            run = self._run()
        # Else the settings, before anything is provisioned.
        offers = run.offers if run is not None else self._known_offers()
        return resources_of(task.name, {*task.tags, *current_tags()}, offers)

    def _known_offers(self) -> Offers | None:
        """What the worker groups offer, as far as this process knows without asking a scheduler."""
        if self._cluster is not None or self.address is not None:
            return getattr(self._cluster, "worker_offers", None)
        from prefect_htcdask.gateway.endpoints import worker_offers

        return worker_offers(self.effective_settings())


def _on_worker() -> bool:
    try:
        distributed.get_worker()
    except ValueError:
        return False
    return True


def _check_cluster_class(cluster_class: str | type[Any] | None) -> type[Any] | None:
    if cluster_class is None:
        return None
    from prefect_htcdask.gateway.client import HTCGatewayCluster

    resolved = from_qualified_name(cluster_class) if isinstance(cluster_class, str) else cluster_class
    if not (isinstance(resolved, type) and issubclass(resolved, HTCGatewayCluster)):
        raise TypeError(
            f"cluster_class = {cluster_class!r} is neither HTCGatewayCluster nor a subclass of it; use "
            "prefect_dask.DaskTaskRunner for other cluster classes, or pass a running cluster as cluster="
        )
    return resolved


def _as_groups(keywords: dict[str, Any]) -> dict[str, dict[str, Any]]:
    groups: dict[str, dict[str, Any]] = {}
    for name, value in keywords.items():
        if name in HTCDaskSettings.model_fields:
            if not isinstance(value, dict):
                raise SettingsError(f"{name} = {value!r} is no mapping of settings, such as {{'field': value}}")
            groups.setdefault(name, {}).update(value)
        elif name in WorkerSettings.model_fields:
            groups.setdefault("worker", {})[name] = value
        else:
            raise SettingsError(
                f"{name} = {value!r} is no setting of HTCDaskTaskRunner; there are the groups "
                f"{', '.join(HTCDaskSettings.model_fields)} and the fields of worker: "
                f"{', '.join(WorkerSettings.model_fields)}"
            )
    return groups
