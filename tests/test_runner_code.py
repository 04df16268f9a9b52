"""The user's own modules reach workers that share no directory with the flow."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import textwrap
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from distributed import Client, Worker

from prefect_htcdask import code_plugin, source_code


def _write(root: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(content))


def _dask(directory: Path, *command: str) -> subprocess.Popen[bytes]:
    """A Dask scheduler or worker that starts in a directory of its own and gets no path from here."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "dask", *command, "--host", "127.0.0.1"),
            *("--scheduler-file", str(directory / "s.json"), "--no-dashboard"),
        ],
        cwd=directory,
        env=environment,
    )


def _until(condition: Any, timeout: float = 60) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.1)


@pytest.fixture
def scheduler(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A Dask scheduler elsewhere, without workers: its directory and address."""
    directory = tmp_path / "elsewhere"
    directory.mkdir()
    process = _dask(directory, "scheduler", "--port", "0")
    try:
        _until(lambda: (directory / "s.json").exists() and (directory / "s.json").read_text().endswith("}"))
        yield directory, json.loads((directory / "s.json").read_text())["address"]
    finally:
        process.terminate()
        process.wait(20)


FILES = {
    "analysis/__init__.py": "",
    "analysis/steps/__init__.py": "",
    "analysis/steps/cuts.py": "LIMIT = 7\ndef cut(x):\n    return min(x, LIMIT)\n",
    "analysis/late.py": "def late(x):\n    return -x\n",
    "analysis/table.json": '{"value": 100}',
    "analysis/.git/config": "no",
    "analysis/events.root": "x" * 10,
    "analysis/flows.py": """
        import json, os, sys
        from importlib.resources import files
        from prefect import flow, task
        from prefect_htcdask import HTCDaskTaskRunner
        from analysis.steps import cuts

        @task
        def measure(x):
            # Imported only where the task runs.
            from analysis.late import late
            table = json.loads(files("analysis").joinpath("table.json").read_text())
            return cuts.cut(x) + table["value"], late(x), cuts.__file__

        @flow(task_runner=HTCDaskTaskRunner(address=sys.argv[1]))
        def main():
            future = measure.submit(50)
            # From now on nobody finds the source here.
            os.rename("analysis", "hidden")
            value, late, file = future.result(timeout=60)
            print("RESULT", value, late, file)

        if __name__ == "__main__":
            main()
    """,
    "script.py": "import sys\nfrom analysis.flows import main\nmain()\n",
}


@pytest.mark.parametrize("command", [["-m", "analysis.flows"], ["script.py"]])
def test_a_package_reaches_workers_that_share_no_files(
    command: list[str], scheduler: tuple[Path, str], tmp_path: Path, prefect_api: Any
) -> None:
    directory, address = scheduler
    source = tmp_path / "source"
    _write(source, FILES)
    flow = subprocess.Popen(
        [sys.executable, *command, address],
        cwd=source,
        env={**os.environ, **prefect_api.environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    worker = None
    try:
        _until(lambda: (source / "hidden").exists() or flow.poll() is not None)
        # It joins when the source is gone: only what was sent is left.
        worker = _dask(directory, "worker", "--nthreads", "1")
        out, _ = flow.communicate(timeout=90)
        assert flow.returncode == 0, out
        assert "RESULT 107 -50" in out
        assert str(source) not in out.partition("RESULT")[2]
    finally:
        for process in (flow, worker):
            if process is not None and process.poll() is None:
                process.terminate()
                process.wait(20)


def _said(client: Client) -> dict[str, str]:
    """What each worker's version of the module says."""

    def said() -> str:
        import importlib

        return str(importlib.import_module("analysis.version").SAYS)

    return dict(client.run(said))


def _plugins(client: Client) -> dict[str, list[tuple[str, int]]]:
    """The code that each worker has been sent, each time anew as another object."""
    prefix = code_plugin.PLUGIN_PREFIX

    def plugins(dask_worker: Worker) -> list[tuple[str, int]]:
        return [(name, id(one)) for name, one in dask_worker.plugins.items() if name.startswith(prefix)]

    return dict(client.run(plugins))


@pytest.mark.parametrize("files_are_shared", [False, True])
def test_workers_run_the_last_version_and_are_sent_it_once(
    files_are_shared: bool, scheduler: tuple[Path, str], tmp_path: Path
) -> None:
    """Flow runs that share a cluster, of code that is changed, and changed back."""
    directory, address = scheduler
    archives = {}
    for says in ("one", "two"):
        source = tmp_path / says
        _write(source, {**FILES, "analysis/version.py": f"SAYS = {says!r}\n"})
        archives[says] = _archive(source, "analysis.flows")
        if not files_are_shared:
            shutil.rmtree(source)
    plugins = {says: code_plugin.make_plugin(archive, None) for says, archive in archives.items()}
    workers = [_dask(directory, "worker", "--nthreads", "1", "--no-nanny")]
    try:
        with Client(address, set_as_default=False) as client:
            client.wait_for_workers(1, timeout=60)
            for says in ("one", "two", "one"):
                code_plugin.send(client, plugins[says])
                assert set(_said(client).values()) == {says}
                sent = _plugins(client)
                assert all(sent.values())
                code_plugin.send(client, plugins[says])
                assert _plugins(client) == sent
            workers.append(_dask(directory, "worker", "--nthreads", "1", "--no-nanny"))
            client.wait_for_workers(2, timeout=60)
            assert list(_said(client).values()) == ["one", "one"]
    finally:
        for process in workers:
            process.terminate()
        for process in workers:
            process.wait(20)


def _archive(root: Path, module: str) -> source_code.CodeArchive:
    """What is sent for the flow in `module`, found by a fresh process that starts in `root`."""
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import pickle, sys, importlib; from prefect_htcdask import source_code;"
            f"flow = importlib.import_module({module!r}).main;"
            "sys.stdout.buffer.write(pickle.dumps(source_code.collect(flow)))",
            "tcp://127.0.0.1:1",
        ],
        cwd=root,
        capture_output=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert done.returncode == 0, done.stderr.decode()
    archive: source_code.CodeArchive = pickle.loads(done.stdout)
    return archive


def test_what_is_sent(tmp_path: Path) -> None:
    _write(tmp_path, {**FILES, "venv/pyvenv.cfg": "", "venv/lib.py": "", "other/module.py": ""})
    (tmp_path / "big.csv").write_text("x" * 2_000_000)
    archive = _archive(tmp_path, "analysis.flows")
    names = set(zipfile.ZipFile(io.BytesIO(archive.data)).namelist())
    assert {"analysis/flows.py", "analysis/late.py", "analysis/table.json", "other/module.py", "script.py"} <= names
    assert not [n for n in names if ".git" in n or "venv" in n or n in ("big.csv", "analysis/events.root")]
    assert not [n for n in names if n.startswith(("prefect", "dask", "distributed"))]


def test_equal_sources_make_equal_archives(tmp_path: Path) -> None:
    for copy in ("one", "two"):
        _write(tmp_path / copy, FILES)
    one, two = (_archive(tmp_path / copy, "analysis.flows") for copy in ("one", "two"))
    assert (one.digest, one.data) == (two.digest, two.data)
    (tmp_path / "two/analysis/late.py").write_text("def late(x):\n    return x\n")
    assert _archive(tmp_path / "two", "analysis.flows").digest != one.digest


def test_a_directory_that_is_too_large_sends_what_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _write(tmp_path, {**FILES, **{f"many/m{i}.py": "" for i in range(40)}})
    script = tmp_path / "flow_in_a_large_directory.py"
    script.write_text("import prefect\n@prefect.flow\ndef main(): ...\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(source_code, "MAX_FILES", 30)
    # Prefect's loggers do not propagate.
    monkeypatch.setattr(source_code.logger, "handlers", [caplog.handler])
    import importlib

    flow = importlib.import_module("flow_in_a_large_directory").main
    archive = source_code.collect(flow)
    assert archive is not None
    names = zipfile.ZipFile(io.BytesIO(archive.data)).namelist()
    assert "flow_in_a_large_directory.py" in names
    assert not [name for name in names if name.startswith("many/")]
    assert "holds more than workers are sent" in caplog.text
