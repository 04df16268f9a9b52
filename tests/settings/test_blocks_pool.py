"""A flow on a server that knows no secret: password and IDTOKEN come from blocks, and nobody else can read them."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import LogFilter, LogFilterFlowRunId

from prefect_htcdask import HTCDaskCondorCredentials, HTCDaskGatewayCredentials
from prefect_htcdask.embedded import EmbeddedEndpoint, ensure_running, stop
from prefect_htcdask.embedded.condor_binaries import condor_binaries
from prefect_htcdask.embedded.pool import pool_user
from prefect_htcdask.settings import EmbeddedSettings
from tests.support.prefect_fixtures import PrefectServer
from tests.support.secret_search import files, holding, readable
from tests.support.waiting import wait_until

pytestmark = pytest.mark.pool

DAEMONS = """
# Whoever has a token of this pool may come, too.
SEC_DEFAULT_AUTHENTICATION_METHODS = FS, IDTOKENS
SEC_TOKEN_POOL_SIGNING_KEY_FILE = {key}
TRUST_DOMAIN = localhost
"""

CLIENT = """
include : {pool}
# Nothing but a token lets this host in, and it has none of its own.
SEC_CLIENT_AUTHENTICATION_METHODS = IDTOKENS
SEC_TOKEN_DIRECTORY = {nowhere}
SEC_TOKEN_SYSTEM_DIRECTORY = {nowhere}
"""

FLOW = """
    import sys, time
    from pathlib import Path
    from prefect import flow, task
    from prefect.runtime import flow_run
    from prefect_htcdask import HTCDaskTaskRunner

    @task
    def waits(directory):
        (Path(directory) / "runs").touch()
        while not (Path(directory) / "go").exists():
            time.sleep(0.2)
        return 42

    @flow(task_runner=HTCDaskTaskRunner(memory="300 MiB", disk="100 MiB", adapt_kwargs={"maximum": 1}))
    def watched(directory):
        (Path(directory) / "flow_run").write_text(str(flow_run.id))
        return waits.submit(directory).result()

    print(watched(sys.argv[1]))
"""


@dataclass(frozen=True)
class TokenPool:
    """A pool and gateway of its own, of which a client needs a token and a password.

    Attributes:
        endpoint: pool and gateway.
        client_config: HTCondor configuration of a host that has no token.
        token: a token of the pool.
    """

    endpoint: EmbeddedEndpoint
    client_config: Path
    token: str

    def condor(self, *command: str) -> str:
        """Run one of HTCondor's commands as the pool's operator."""
        release = condor_binaries(lambda _text: None).release
        path = f"{release / 'bin'}:{release / 'sbin'}:{os.environ['PATH']}"
        environment = {**os.environ, "CONDOR_CONFIG": str(self.endpoint.condor_config), "PATH": path}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@pytest.fixture
def token_pool(tmp_path: Path) -> Iterator[TokenPool]:
    settings = EmbeddedSettings(directory=str(tmp_path / "pool"), idle_timeout=600, use_configured_pool=False)
    endpoint = ensure_running(settings)
    try:
        assert endpoint.condor_config is not None
        # The collector made it as it started.
        key = endpoint.condor_config.parent / "passwords.d" / "POOL"
        with endpoint.condor_config.open("a") as config:
            config.write(DAEMONS.format(key=key))
        client_config = tmp_path / "client_config"
        client_config.write_text(CLIENT.format(pool=endpoint.condor_config, nowhere=tmp_path / "nowhere"))
        pool = TokenPool(endpoint, client_config, "")
        pool.condor("condor_reconfig")
        identity = f"{pool_user().pw_name}@localhost"
        token = pool.condor("condor_token_create", "-identity", identity, "-key", "POOL").strip()
        yield TokenPool(endpoint, client_config, token)
    finally:
        stop(settings)


@pytest.mark.timeout(400)
def test_a_flow_with_credentials_in_blocks_and_nowhere_else(
    token_pool: TokenPool, prefect_api: PrefectServer, tmp_path: Path
) -> None:
    endpoint = token_pool.endpoint
    known = {"password of the gateway": endpoint.password, "token of the pool": token_pool.token}
    HTCDaskGatewayCredentials(username=endpoint.username, password=endpoint.password).save("site", overwrite=True)
    HTCDaskCondorCredentials(token=token_pool.token).save("site", overwrite=True)
    here, temporary, runs = tmp_path / "here", tmp_path / "tmp", tmp_path / "runs"
    here.mkdir()
    temporary.mkdir()
    script = here / "watched.py"
    script.write_text(textwrap.dedent(FLOW))
    prefix = "PREFECT_INTEGRATIONS_HTCDASK"
    environment = {
        **os.environ,
        "TMPDIR": str(temporary),
        f"{prefix}_GATEWAY_ADDRESS": endpoint.gateway_address,
        f"{prefix}_GATEWAY_PROXY_ADDRESS": endpoint.proxy_address,
        f"{prefix}_GATEWAY_CREDENTIALS_BLOCK": "site",
        f"{prefix}_CONDOR_CONFIG_FILE": str(token_pool.client_config),
        f"{prefix}_CONDOR_DIRECTORY": str(runs),
        f"{prefix}_EMBEDDED_ENABLED": "false",
    }

    def start(**more: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, str(script), str(here)],
            env={**environment, **more},
            cwd=here,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    refused = start()
    said, _ = refused.communicate(timeout=120)
    assert refused.returncode != 0 and "condor.credentials_block" in said, "the pool lets in whoever comes"

    flow = start(**{f"{prefix}_CONDOR_CREDENTIALS_BLOCK": "site"})
    try:
        wait_until(lambda: (here / "runs").exists() or flow.poll() is not None, 150, "the task runs")
        if flow.poll() is None:
            ads = token_pool.condor("condor_q", "-allusers", "-long")
            assert "PrefectFlowRunId" in ads and not holding(ads, known)
            for process in [psutil.Process(flow.pid), *psutil.Process(flow.pid).children(recursive=True)]:
                assert not holding(Path(f"/proc/{process.pid}/environ").read_text(errors="replace"), known), process
            for process in psutil.process_iter(["cmdline"]):
                assert not holding(" ".join(process.info["cmdline"] or []), known), process
            assert not readable(files(tmp_path), known)
            (copy,) = [one for one in files(temporary) if holding(one.read_text(errors="replace"), known)]
            assert (copy.name, copy.stat().st_mode & 0o777, copy.parent.stat().st_mode & 0o777) == (
                "token",
                0o600,
                0o700,
            )
    finally:
        (here / "go").touch()
        said, _ = flow.communicate(timeout=150)
    assert flow.returncode == 0 and said.split()[-1] == "42", said
    assert not holding(said, known)

    flow_run_id = (here / "flow_run").read_text()
    with get_client(sync_client=True) as client:
        logs = client.read_logs(LogFilter(flow_run_id=LogFilterFlowRunId(any_=[flow_run_id])))
    assert not holding(" ".join(log.message for log in logs), known)
    wait_until(lambda: not list(temporary.glob("htcdask-token-*")), 30, "the token's copies are removed")
    left = [one for one in files(runs, here, temporary) if holding(one.read_bytes().decode(errors="replace"), known)]
    assert left == []
    history = token_pool.condor("condor_history", "-long")
    assert flow_run_id in history and not holding(history, known)
