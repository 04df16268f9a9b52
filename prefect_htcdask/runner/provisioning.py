"""Opens the live handles of a flow run at its first submit."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import distributed
from prefect.context import FlowRunContext, SettingsContext
from prefect.logging.loggers import get_run_logger

from prefect_htcdask.runner.client.client import ReconnectingClient
from prefect_htcdask.runner.flow_run import FlowRunSession, Logger
from prefect_htcdask.runner.preflight import check_api_reachable, warn_of_local_storage
from prefect_htcdask.runner.submit import source_code
from prefect_htcdask.runner.ui.console import StartConsole, log_console
from prefect_htcdask.scheduler.client_recovery import ClientRecoveryPlugin
from prefect_htcdask.scheduler.pickle_by_value import install
from prefect_htcdask.scheduler.worker_loss import WorkerLossPlugin
from prefect_htcdask.settings import CodeSettings, HTCDaskSettings
from prefect_htcdask.utils.api_identity import current_api
from prefect_htcdask.worker import code_plugin


@dataclass(frozen=True)
class RunnerOptions:
    """What a task runner was made with, as far as it matters to a flow run's cluster.

    Attributes:
        owner: names the runner among those of this process, and its duplicates.
        cluster: a running cluster to use, which is not closed.
        address: of a running scheduler to use, likewise.
        cluster_class: of the cluster that is made where there is neither; `HTCGatewayCluster` by default.
        cluster_kwargs: its arguments.
        adapt_kwargs: `minimum` and `maximum`, for a running cluster.
        client_kwargs: arguments of the Dask client.
        performance_report_path: where Dask's performance report is written.
        settings: reads all settings; those of a flow run are read as it begins.
        code: which files of the flow travel to workers.
        logger: what is logged to outside of flow runs.
    """

    owner: str
    cluster: Any
    address: str | None
    cluster_class: type[Any] | None
    cluster_kwargs: Mapping[str, Any]
    adapt_kwargs: Mapping[str, Any]
    client_kwargs: Mapping[str, Any]
    performance_report_path: str | None
    settings: Callable[[], HTCDaskSettings]
    code: CodeSettings
    logger: logging.Logger


def open_run(runner: RunnerOptions, key: str, context: FlowRunContext | None) -> FlowRunSession:
    """Connect to the given cluster, or make one for the flow run. What was begun is undone when it fails.

    Raises:
        SettingsError: a setting cannot work, or workers could not reach the Prefect API.
        HTCDaskError: the cluster cannot be had.
    """
    logger = _logger(runner, context)
    api_url = _api_url(context)
    makes_cluster = runner.cluster is None and not runner.address
    waiting = StartConsole(log_console() if makes_cluster else None)
    relay = _MessageBuffer(waiting)
    cluster: Any | None = None
    with ExitStack() as undo:
        undo.callback(waiting.close)
        options = dict(runner.client_kwargs)
        if runner.cluster is not None:
            logger.info("Connecting to existing Dask cluster %s", runner.cluster)
            target: Any = runner.cluster
            if runner.adapt_kwargs:
                target.adapt(**runner.adapt_kwargs)
        elif runner.address:
            logger.info("Connecting to an existing Dask cluster at %s", runner.address)
            target = runner.address
        else:
            cluster = target = _make_cluster(runner, context, api_url, relay, logger, waiting)
            undo.callback(cluster.close)
        if getattr(target, "security", None) is not None:
            options.setdefault("security", target.security)
        client = undo.enter_context(ReconnectingClient(target, **options))
        flow = context.flow if context is not None else None
        _send_code(client, flow, runner.code.data_files, with_package=cluster is None)
        install(client, WorkerLossPlugin())
        install(client, ClientRecoveryPlugin())
        if client.dashboard_link:
            logger.info("The Dask dashboard is available at %s", client.dashboard_link)
        run = FlowRunSession(
            key=key,
            client=client,
            cluster=cluster,
            owner=runner.owner,
            api_url=api_url,
            logger=logger,
            flow_run_id=context.flow_run.id if context is not None and context.flow_run is not None else None,
        )
        if runner.performance_report_path:
            run.stack.enter_context(distributed.Client.as_current(client))
            run.stack.enter_context(distributed.performance_report(runner.performance_report_path))
        run.stack.callback(waiting.close)
        # A result may be here before the word that its worker has joined.
        run.gatherer.on_first = waiting.close
        undo.pop_all()
    relay.connect(run)
    return run


class _MessageBuffer:
    """Holds what the cluster says before the live run exists."""

    def __init__(self, waiting: StartConsole) -> None:
        self._waiting = waiting
        self._early: list[dict[str, Any]] = []
        self._run: FlowRunSession | None = None

    def __call__(self, message: dict[str, Any]) -> None:
        self._waiting.take(message)
        if self._run is not None:
            self._run.on_message(message)
        else:
            self._early.append(message)

    def connect(self, run: FlowRunSession) -> None:
        self._run = run
        while self._early:
            run.on_message(self._early.pop(0))


def _make_cluster(
    runner: RunnerOptions,
    context: FlowRunContext | None,
    api_url: str | None,
    relay: _MessageBuffer,
    logger: Logger,
    waiting: StartConsole,
) -> Any:
    from prefect_htcdask.condor.submit_description import FlowRunTag
    from prefect_htcdask.embedded.progress import occasionally
    from prefect_htcdask.gateway.client import HTCGatewayCluster
    from prefect_htcdask.gateway.endpoints import resolve_endpoints

    settings = runner.settings()
    arguments = dict(runner.cluster_kwargs)
    tell = occasionally(logger.info)

    def progress(message: str) -> None:
        tell(message)
        waiting.say(message)

    parts = resolve_endpoints(
        settings,
        **{name: arguments.pop(name, None) for name in ("address", "proxy_address", "public_address", "auth")},
        progress=progress,
    )
    local = parts.workers_are_local
    if context is not None:
        check_api_reachable(api_url, local)
        warn_of_local_storage(context.result_store, context.persist_result, local, logger)
    tag = None
    if context is not None and context.flow_run is not None:
        flow_run = context.flow_run
        tag = FlowRunTag(
            id=str(flow_run.id),
            name=flow_run.name,
            flow_name=context.flow.name if context.flow is not None else "",
            attempt=flow_run.run_count or 1,
            api=current_api(),
        )
    cluster_class: Any = runner.cluster_class or HTCGatewayCluster
    logger.info("Creating a Dask cluster with HTCondor workers")
    waiting.say("the gateway starts a Dask scheduler")
    cluster = cluster_class(
        **arguments,
        settings=settings,
        parts=parts,
        flow_run=tag,
        worker_secrets=_worker_secrets(api_url),
        on_message=relay,
    )
    try:
        adaptive = list(cluster.worker_offers)
        if "n_workers" in runner.cluster_kwargs and not runner.adapt_kwargs:
            del adaptive[0]  # the default group, whose number is given
        for group in adaptive:
            cluster.adapt(group=group)
    except BaseException:
        cluster.close()
        raise
    return cluster


def _worker_secrets(api_url: str | None) -> dict[str, str]:
    """Environment of the workers that no other user may see: how to reach the Prefect API."""
    secrets: dict[str, str] = {}
    context = SettingsContext.get()
    if api_url:
        secrets["PREFECT_API_URL"] = api_url
    if context is not None:
        api = context.settings.api
        if api.key is not None:
            secrets["PREFECT_API_KEY"] = api.key.get_secret_value()
        if api.auth_string is not None:
            secrets["PREFECT_API_AUTH_STRING"] = api.auth_string.get_secret_value()
    return secrets


def _api_url(context: FlowRunContext | None) -> str | None:
    """The running API's address; with an ephemeral server, that of the server which the flow's client found."""
    settings = SettingsContext.get()
    if settings is not None and settings.settings.api.url:
        return str(settings.settings.api.url)
    if context is None:
        return None
    url = str(context.client.api_url).rstrip("/")
    return url if url.startswith("http") else None


def _send_code(client: distributed.Client, flow: Any | None, data_files: list[str], with_package: bool) -> None:
    code = source_code.collect(flow, data_files)
    code_plugin.send(client, code_plugin.make_plugin(code, source_code.own_package() if with_package else None))


def _logger(runner: RunnerOptions, context: FlowRunContext | None) -> Logger:
    logger: logging.Logger | logging.LoggerAdapter[Any] = runner.logger
    if context is not None and context.flow_run is not None:
        logger = get_run_logger(context)
    return logger
