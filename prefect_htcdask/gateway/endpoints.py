"""From settings to the parts in use: which gateway, which schedd, what a worker is.

Where nothing is configured, the embedded pool and gateway are started.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any
from urllib.parse import urlparse

import dask
from dask_gateway.auth import BasicAuth, GatewayAuth, JupyterHubAuth, get_auth
from dask_gateway.utils import format_template

from prefect_htcdask.condor.address import ScheddAddress
from prefect_htcdask.condor.submit_description import WorkerSpec
from prefect_htcdask.scheduler.worker_groups import group_resource
from prefect_htcdask.settings import CondorSettings, GatewaySettings, HTCDaskSettings, SettingsError, WorkerSettings
from prefect_htcdask.supervisor.gateway_http import EmbeddedAuth
from prefect_htcdask.utils.net import is_loopback


@dataclass(frozen=True)
class Endpoints:
    """The gateway and the schedd to use.

    Attributes:
        address: URL of the gateway.
        proxy_address: where its proxy takes TLS connections, or `None` for the same host and port.
        public_address: URL for browsers, or `None` for `address`.
        auth: how to log in.
        schedd: how to reach the schedd.
        embedded: whether they are the embedded ones, so that workers run on this machine.
    """

    address: str
    proxy_address: str | int | None
    public_address: str | None
    auth: GatewayAuth
    schedd: ScheddAddress
    embedded: bool

    @property
    def gateway_arguments(self) -> dict[str, Any]:
        """The arguments of dask_gateway's classes that say which gateway."""
        return {
            "address": self.address,
            "proxy_address": self.proxy_address,
            "public_address": self.public_address,
            "auth": self.auth,
        }

    @property
    def workers_are_local(self) -> bool:
        """Whether all workers run on this machine: no other could reach a proxy that listens on loopback."""
        # A number is a port of the gateway's host.
        proxy = self.proxy_address if isinstance(self.proxy_address, str) else None
        return self.embedded or is_loopback(proxy or self.address)


def resolve_endpoints(
    settings: HTCDaskSettings,
    *,
    address: str | None = None,
    proxy_address: str | int | None = None,
    public_address: str | None = None,
    auth: str | GatewayAuth | None = None,
    progress: Callable[[str], None] | None = None,
) -> Endpoints:
    """Find the gateway and the schedd: arguments first, then settings, then Dask's configuration, then embedded.

    Raises:
        SettingsError: nothing is configured and the embedded pool is disabled, or credentials cannot be had.
        EmbeddedError: the embedded pool could not be started.
    """
    address = address or settings.gateway.address or dask_setting("address")
    condor = settings.condor
    # Before anything is started: a block that there is not is found out here.
    login = auth if isinstance(auth, GatewayAuth) else None
    if address is not None and login is None:
        login = gateway_auth(_with_block(settings.gateway), auth if isinstance(auth, str) else None)
    schedd = ScheddAddress(
        condor.collector, condor.schedd, condor.config_file, condor.token_file, condor.spool, _token(condor)
    )
    pool_configured = any((condor.collector, condor.schedd, condor.config_file))
    if address is not None and (pool_configured or _condor_is_configured()):
        return _configured(settings, address, proxy_address, public_address, login, schedd)
    if not settings.embedded.enabled:
        missing = "gateway.address" if address is None else "condor.config_file, condor.collector or condor.schedd"
        raise SettingsError(
            f"nothing says where to find the {'Dask Gateway' if address is None else 'HTCondor pool'}, and "
            f"embedded.enabled is False: set {missing}"
        )
    from prefect_htcdask.embedded import ensure_running

    endpoint = ensure_running(settings.embedded, progress=progress)
    if not pool_configured:
        schedd = ScheddAddress(
            config_file=str(endpoint.condor_config) if endpoint.condor_config else None,
            token_file=condor.token_file,
            token=schedd.token,
        )
    if address is not None:
        return _configured(settings, address, proxy_address, public_address, login, schedd)
    return Endpoints(
        address=endpoint.gateway_address,
        proxy_address=endpoint.proxy_address,
        public_address=settings.gateway.public_address,
        auth=EmbeddedAuth(username=endpoint.username, password=endpoint.password),
        schedd=schedd,
        embedded=not pool_configured,
    )


def resolve_running_endpoints(settings: HTCDaskSettings) -> Endpoints | None:
    """Find the gateway and the schedd without starting anything; `None` where the embedded ones do not run.

    Raises:
        SettingsError: a setting cannot work.
    """
    from prefect_htcdask.embedded import find

    address = settings.gateway.address or dask_setting("address")
    condor = settings.condor
    needs_embedded = address is None or not (
        any((condor.collector, condor.schedd, condor.config_file)) or _condor_is_configured()
    )
    if needs_embedded and find(settings.embedded) is None:
        return None
    return resolve_endpoints(settings)


def _configured(
    settings: HTCDaskSettings,
    address: str,
    proxy_address: str | int | None,
    public_address: str | None,
    login: GatewayAuth | None,
    schedd: ScheddAddress,
) -> Endpoints:
    assert login is not None
    if urlparse(address).scheme not in ("http", "https"):
        raise SettingsError(f"gateway.address = {address!r} is no URL; write http://host:port or https://host")
    return Endpoints(
        address=address,
        proxy_address=proxy_address or settings.gateway.proxy_address or dask_setting("proxy-address"),
        public_address=public_address or settings.gateway.public_address or dask_setting("public-address"),
        auth=login,
        schedd=schedd,
        embedded=False,
    )


def dask_setting(name: str) -> Any:
    """A value of Dask's own configuration of gateways, such as ``address``, with ``{VARIABLE}`` filled in.

    The environment gives the variables, as in dask_gateway, whose sites write such values for all of their users.

    Raises:
        SettingsError: a variable is not set, or the braces are wrong.
    """
    value = dask.config.get(f"gateway.{name}", None)
    try:
        return format_template(value)
    except KeyError as exc:
        problem = f"the environment has no variable {exc.args[0]}"
    except (ValueError, IndexError, AttributeError) as exc:
        problem = str(exc)
    raise SettingsError(
        f"gateway.{name} = {value!r} of Dask's configuration cannot be filled in: {problem}; set it, or set "
        f"gateway.{name.replace('-', '_')} of prefect_htcdask"
    )


def _with_block(gateway: GatewaySettings) -> GatewaySettings:
    """The settings, with what their credentials block holds. Prefect is asked only where they name one.

    Raises:
        SettingsError: there is no such block, or Prefect's API cannot be asked.
    """
    if gateway.credentials_block is None:
        return gateway
    from prefect_htcdask.gateway.credentials import gateway_login

    return gateway_login(gateway)


def _token(condor: CondorSettings) -> str | None:
    """The IDTOKEN of the credentials block, if the settings name one; errors as in `_with_block`."""
    if condor.credentials_block is None:
        return None
    from prefect_htcdask.gateway.credentials import condor_token

    return condor_token(condor)


def _condor_is_configured() -> bool:
    """Whether HTCondor's own search would find a configuration (HTCondor manual, CONDOR_CONFIG)."""
    if os.environ.get("CONDOR_CONFIG") not in (None, "ONLY_ENV"):
        return True
    return any(os.path.exists(path) for path in ("/etc/condor/condor_config", "/usr/local/etc/condor_config"))


def gateway_auth(gateway: GatewaySettings, auth: str | None) -> GatewayAuth:
    """How to log in to the gateway.

    Raises:
        SettingsError: the kind of authentication is unknown or lacks its secret.
    """
    kind = auth or gateway.auth
    if kind is None:
        kind = "basic" if gateway.password else "jupyterhub" if gateway.token else None
    try:
        if kind == "basic" and (gateway.username or gateway.password):
            return BasicAuth(
                username=gateway.username,
                password=gateway.password.get_secret_value() if gateway.password else None,
            )
        if kind == "jupyterhub" and gateway.token:
            return JupyterHubAuth(api_token=gateway.token.get_secret_value())
        # What the settings do not say, Dask's configuration does.
        return get_auth(kind)
    except KeyError as exc:
        raise SettingsError(
            f"gateway.auth.kwargs of Dask's configuration cannot be filled in: the environment has no variable "
            f"{exc.args[0]}; set it, or set gateway.auth of prefect_htcdask and its secret"
        ) from exc
    except (ImportError, TypeError, ValueError, AttributeError) as exc:
        raise SettingsError(
            f"gateway.auth = {kind!r} cannot be used: {exc}; it is 'basic', 'jupyterhub', 'kerberos' or a class's name"
        ) from exc


def worker_offers(settings: HTCDaskSettings) -> dict[str, dict[str, float]]:
    """The Dask resources that one worker of each group offers, by the group's name, the default group first.

    GPUs are offered as `GPU`. Where there are several kinds of workers (`workers`), each also offers its group's own
    resource, as much as it has threads, for tasks that name the group.
    """
    return {
        name: {
            **({group_resource(name): group.threads} if settings.workers else {}),
            **({"GPU": group.gpus} if group.gpus else {}),
            **group.resources,
        }
        for name, group in settings.groups.items()
    }


def worker_specs(settings: HTCDaskSettings) -> dict[str, WorkerSpec]:
    """What one worker of each group is, by the group's name, the default group first.

    Raises:
        SettingsError: a container image does not exist.
    """
    offers = worker_offers(settings)
    return {
        name: replace(worker_spec(group, f"workers.{name}" if settings.workers else "worker"), resources=offers[name])
        for name, group in settings.groups.items()
    }


def worker_spec(worker: WorkerSettings, setting: str = "worker") -> WorkerSpec:
    """What one worker is, as the supervisor needs it.

    Args:
        worker: its settings.
        setting: how errors call them.

    Raises:
        SettingsError: the container image does not exist.
    """
    image = worker.container_image or (f"docker://{worker.image}" if worker.image else None)
    if worker.container_image and "://" not in worker.container_image:
        # HTCondor would look from the cluster's run directory.
        image = os.path.abspath(os.path.expanduser(worker.container_image))
        check_image_file(image, setting)
    stagger = worker.lifetime_stagger
    if worker.lifetime and stagger is None:
        stagger = 0.1 * worker.lifetime
    # What has the same name there is the same.
    names = type(worker).model_fields.keys() & {field.name for field in fields(WorkerSpec)}
    same = WorkerSpec(**{name: getattr(worker, name) for name in names - {"python"}})
    python = worker.python or ("python3" if image else sys.executable)
    return replace(same, container_image=image, python=python, lifetime_stagger=stagger)


def check_image_file(image: str, setting: str = "worker") -> None:
    """Check that a container image on a file system exists here.

    Raises:
        SettingsError: it does not.
    """
    if image.startswith("/cvmfs/") and not os.path.isdir("/cvmfs"):
        return  # mounted on the execute hosts only, as many sites do
    if not os.path.exists(image):
        raise SettingsError(
            f"{setting}.container_image = {image!r} does not exist; name a .sif file or image directory, or an address "
            "such as docker://image:tag"
        )
