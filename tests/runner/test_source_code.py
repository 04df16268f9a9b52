"""The user's own modules reach workers that share no directory with the flow."""

from __future__ import annotations

import io
import json
import logging
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
from distributed.protocol.pickle import dumps

from prefect_htcdask.runner.submit import source_code
from prefect_htcdask.settings import SettingsError, load_settings
from prefect_htcdask.worker import code_plugin


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


BY_PATH = {
    "my_pkg/__init__.py": "",
    "my_pkg/sub/__init__.py": "",
    "my_pkg/sub/helper.py": "def triple(x):\n    return 3 * x\n",
    "my_pkg/late.py": "def late(x):\n    return -x\n",
    "lib/late.py": "def late(x):\n    return 10 * x\n",
    "my_pkg/calc.py": """
        import enum, os, sys
        from dataclasses import dataclass
        from prefect import flow, task
        from prefect_htcdask import HTCDaskTaskRunner
        from .sub.helper import triple

        class Kind(enum.Enum):
            A = "a"

        @dataclass
        class Row:
            n: int
            kind: Kind

        class OwnError(Exception):
            def __init__(self, n):
                super().__init__(n)
                self.n = n

        def local_helper(x):
            return x + 1

        @task
        def make(n):
            from .late import late
            from lib import late as of_the_working_directory
            return Row(local_helper(triple(n)) + late(n) + of_the_working_directory.late(n), Kind.A), late.__module__

        @task
        def check(made):
            return isinstance(made[0], Row) and made[0].kind is Kind.A

        @task
        def fail(n):
            raise OwnError(n)

        @flow(task_runner=HTCDaskTaskRunner(address=sys.argv[1]))
        def main():
            made = make.submit(2)
            for directory in ("my_pkg", "lib"):
                # From now on nobody finds the source here.
                os.rename(directory, f"hidden-{directory}")
            row, module = made.result(timeout=60)
            caught = None
            try:
                fail.submit(7).result(timeout=60)
            except OwnError as exc:
                caught = exc.n
            assert module == f"{__name__}.late"
            checked = check.submit(made).result(timeout=60)
            print("RESULT", isinstance(row, Row), row.kind is Kind.A, row.n, checked, caught)
    """,
}


@pytest.mark.parametrize("entrypoint", ["my_pkg/calc.py:main", "my_pkg/json.py:main"])
def test_a_flow_loaded_by_its_path_imports_relatively_on_workers(
    entrypoint: str, scheduler: tuple[Path, str], tmp_path: Path, prefect_api: Any
) -> None:
    """As Prefect's workers and `prefect deploy` load flows: a module that is a package to itself.

    Prefect gives a name of its own to a file whose name is another module's.
    """
    directory, address = scheduler
    source = tmp_path / "source"
    _write(source, {**BY_PATH, "my_pkg/json.py": BY_PATH["my_pkg/calc.py"]})
    load = f"from prefect.flows import load_flow_from_entrypoint; load_flow_from_entrypoint({entrypoint!r})()"
    flow = subprocess.Popen(
        [sys.executable, "-c", load, address],
        cwd=source,
        env={**os.environ, **prefect_api.environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    worker = None
    try:
        _until(lambda: (source / "hidden-lib").exists() or flow.poll() is not None)
        worker = _dask(directory, "worker", "--nthreads", "1")
        out, _ = flow.communicate(timeout=90)
        assert flow.returncode == 0, out
        assert "RESULT True True 25 True 7" in out
    finally:
        for process in (flow, worker):
            if process is not None and process.poll() is None:
                process.terminate()
                process.wait(20)


def test_a_flow_loaded_by_its_path_sends_nothing_from_above_its_directories(tmp_path: Path) -> None:
    """Its module says that it is a package; the directory above its own is not where it was found."""
    _write(tmp_path, {**BY_PATH, "above.py": ""})
    for directory, expected in ((tmp_path, True), (tmp_path / "my_pkg", False)):
        load = (
            "import os, pickle, sys; from prefect.flows import load_flow_from_entrypoint;"
            "from prefect_htcdask.runner.submit import source_code;"
            f"flow = load_flow_from_entrypoint({str(tmp_path / 'my_pkg/calc.py')!r} + ':main');"
            "sys.stdout.buffer.write(pickle.dumps(source_code.collect(flow)))"
        )
        done = subprocess.run(
            [sys.executable, "-c", load, "tcp://127.0.0.1:1"], cwd=directory, capture_output=True, timeout=60
        )
        assert done.returncode == 0, done.stderr.decode()
        names = _names(pickle.loads(done.stdout))
        assert {"calc.py", "sub/helper.py", "late.py"} <= names
        assert ("above.py" in names) is expected


def _said(client: Client) -> dict[str, str]:
    """What each worker's version of the module says."""

    def said() -> str:
        import importlib

        return str(importlib.import_module("analysis.version").SAYS)

    return dict(client.run(said))


def _modes(client: Client) -> set[int]:
    """The modes of what workers have unpacked, and of the directories in it."""

    def modes(dask_worker: Worker) -> list[int]:
        root = os.path.join(dask_worker.local_directory, "prefect_htcdask_code")
        found = [os.path.join(place, name) for place, inner, names in os.walk(root) for name in (*inner, *names)]
        return [os.stat(path).st_mode & 0o777 for path in found]

    return {mode for found in client.run(modes).values() for mode in found}


def _plugins(client: Client) -> dict[str, list[tuple[str, int]]]:
    """The code that each worker has been sent, each time anew as another object."""
    prefix = code_plugin.PLUGIN_PREFIX

    def plugins(dask_worker: Worker) -> list[tuple[str, int]]:
        return [(name, id(one)) for name, one in dask_worker.plugins.items() if name.startswith(prefix)]

    return dict(client.run(plugins))


@pytest.mark.slow
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
                assert _modes(client) == (set() if files_are_shared else {0o700, 0o600})
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


SET_UP = """
import pickle, sys, types

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "prefect_htcdask" and not any("htcdask_code" in path for path in sys.path):
            raise ModuleNotFoundError(name, name=name)

sys.path[:] = [path for path in sys.path if path]
if sys.argv[1] == "without the package":
    sys.meta_path.insert(0, Missing())
    import importlib.util
    real = importlib.util.find_spec
    importlib.util.find_spec = lambda name, package=None: None if name == "prefect_htcdask" else real(name, package)
plugin = pickle.load(sys.stdin.buffer)
plugin.setup(types.SimpleNamespace(local_directory=sys.argv[2], plugins={}))
import alone
print(alone.__file__)
"""


def _set_up(plugin: Any, directory: Path, how: str = "") -> str:
    """Where a process elsewhere, with the plugin set up in it, finds a module that was sent."""
    done = subprocess.run(
        [sys.executable, "-c", SET_UP, how, str(directory)],
        input=dumps(plugin),
        capture_output=True,
        timeout=60,
        cwd=directory,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode().strip()


@pytest.mark.slow
def test_the_code_reaches_a_worker_that_has_not_even_this_package(tmp_path: Path) -> None:
    source, elsewhere = tmp_path / "source", tmp_path / "elsewhere"
    _write(source, {"alone.py": "import prefect\n@prefect.flow\ndef main(): ...\n"})
    elsewhere.mkdir()
    plugin = code_plugin.make_plugin(_archive(source, "alone"), source_code.own_package())
    shutil.rmtree(source)
    found = _set_up(plugin, elsewhere, "without the package")
    assert found.startswith(f"{elsewhere}/prefect_htcdask_code/")


@pytest.mark.slow
def test_the_same_path_of_another_user_is_not_shared(tmp_path: Path) -> None:
    """On an execute host, who may write below /tmp could have the same files there, and others beside them."""
    source, elsewhere = tmp_path / "source", tmp_path / "elsewhere"
    _write(source, {"alone.py": "import prefect\n@prefect.flow\ndef main(): ...\n"})
    elsewhere.mkdir()
    plugin = code_plugin.make_plugin(_archive(source, "alone"), None)
    assert _set_up(plugin, elsewhere) == str(source / "alone.py")
    if os.geteuid() != 0:
        pytest.skip("only root can give files to another user")
    for path in (source / "alone.py", source):
        os.chown(path, 65534, -1)
        assert _set_up(plugin, elsewhere).startswith(f"{elsewhere}/prefect_htcdask_code/")
        os.chown(path, 0, -1)


def _archives(root: Path, module: str, *data_files: list[str]) -> list[source_code.CodeArchive]:
    """What is sent for the flow in `module` with each of these settings, found by a fresh process in `root`."""
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import pickle, sys, importlib; from prefect_htcdask.runner.submit import source_code;"
            f"flow = importlib.import_module({module!r}).main;"
            f"sys.stdout.buffer.write(pickle.dumps([source_code.collect(flow, named) for named in {data_files!r}]))",
            "tcp://127.0.0.1:1",
        ],
        cwd=root,
        capture_output=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert done.returncode == 0, done.stderr.decode()
    archives: list[source_code.CodeArchive] = pickle.loads(done.stdout)
    return archives


def _archive(root: Path, module: str) -> source_code.CodeArchive:
    """What is sent where no data files are named."""
    (archive,) = _archives(root, module, [])
    return archive


def test_what_is_sent(tmp_path: Path) -> None:
    _write(tmp_path, {**FILES, "venv/pyvenv.cfg": "", "venv/lib.py": "", "other/module.py": ""})
    (tmp_path / "big.csv").write_text("x" * 2_000_000)
    archive = _archive(tmp_path, "analysis.flows")
    names = set(zipfile.ZipFile(io.BytesIO(archive.data)).namelist())
    assert {"analysis/flows.py", "analysis/late.py", "analysis/table.json", "other/module.py", "script.py"} <= names
    assert not [n for n in names if ".git" in n or "venv" in n or n in ("big.csv", "analysis/events.root")]
    assert not [n for n in names if n.startswith(("prefect", "dask", "distributed"))]


def _names(archive: source_code.CodeArchive | None) -> set[str]:
    assert archive is not None
    return set(zipfile.ZipFile(io.BytesIO(archive.data)).namelist())


PRIVATE = {
    "prefect.toml": '[api]\nkey = "pnu_1"\n',
    "pyproject.toml": "",
    "prefect.yaml": "",
    "profiles.toml": "",
    "client_secrets.json": "{}",
    "my-token.txt": "",
    "apikey.txt": "",
    "db-Password.cfg": "",
    "credentials/db.json": "{}",
    ".env": "",
    "closed.json": "{}",
    "closed/table.json": "{}",
    "leak.csv": "",
    "id_rsa.txt": "",
    "server.pem": "",
    "x509up_u1000": "",
    "prod.env": "",
}
"""Names of data files that never travel; `_private` closes some of them."""


def _private(directory: Path) -> None:
    _write(directory, PRIVATE)
    (directory / "closed.json").chmod(0o600)
    (directory / "closed").chmod(0o700)
    (directory / "leak.csv").unlink()
    outside = directory.parent.parent / "outside.csv"
    outside.write_text("another's")
    (directory / "leak.csv").symlink_to(outside)


def test_data_travels_from_imported_packages_only_and_secrets_never(tmp_path: Path) -> None:
    """Whatever stands beside a flow, such as Prefect's own configuration with the key of its API, stays there."""
    source = tmp_path / "source"
    more = {"other/__init__.py": "", "other/table.json": "{}", "cuts.yaml": "", "analysis/tokenizer.json": "{}"}
    _write(source, {**FILES, **more, "analysis/data/cuts.yaml": ""})
    _private(source)
    _private(source / "analysis")
    (source / "linked.py").symlink_to(tmp_path / "elsewhere.py")
    (tmp_path / "elsewhere.py").write_text("")
    names = _names(_archive(source, "analysis.flows"))
    data = {name for name in names if not name.endswith(".py")}
    assert data == {"analysis/table.json", "analysis/data/cuts.yaml", "analysis/tokenizer.json"}
    assert {"other/__init__.py", "script.py"} <= names and "linked.py" not in names


@pytest.mark.parametrize("umask", ["077", "022"])
def test_code_travels_whatever_its_mode(umask: str, tmp_path: Path) -> None:
    _write(tmp_path, FILES)
    for path in tmp_path.rglob("*"):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~int(umask, 8))
    names = _names(_archive(tmp_path, "analysis.flows"))
    assert {"analysis/flows.py", "analysis/late.py", "script.py"} <= names
    assert ("analysis/table.json" in names) == (umask == "022")


def test_data_files_that_the_setting_names_travel(tmp_path: Path) -> None:
    source = tmp_path / "source"
    more = {"cuts.yaml": "", "tables/a.csv": "", "tables/deep/b.csv": "", "tables/c.root": "", "big.parquet": ""}
    _write(source, {**more, "alone.py": "import prefect\n@prefect.flow\ndef main(): ...\n"})
    (source / "big.parquet").write_bytes(b"x" * 2_000_000)
    _private(source)
    some = ["cuts.yaml", "tables/**/*.csv", "big.parquet"]
    archives = _archives(source, "alone", [], some, ["tables"], ["*", *PRIVATE, "credentials"])
    assert [_names(archive) - {"alone.py"} for archive in archives] == [
        set(),
        {"cuts.yaml", "tables/a.csv", "tables/deep/b.csv", "big.parquet"},
        {name for name in more if "tables" in name},
        set(more),
    ]
    assert all("alone.py" in _names(archive) for archive in archives)


def test_what_is_left_behind_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _write(tmp_path, {"alone_and_told.py": "import prefect\n@prefect.flow\ndef main(): ...\n", "token.csv": ""})
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(source_code.logger, "handlers", [caplog.handler])
    caplog.set_level(logging.INFO, source_code.logger.name)
    import importlib

    flow = importlib.import_module("alone_and_told").main
    source_code.collect(flow, ["token.csv"])
    assert f"Not sent to workers: {tmp_path / 'token.csv'} (the name of a secret)" in caplog.text
    source_code.collect(flow, ["cuts.yaml"])
    assert "code.data_files = ['cuts.yaml']: there are none such in" in caplog.text


@pytest.mark.parametrize("text", ["cuts.yaml, t/*.csv", '["cuts.yaml", "t/*.csv"]'])
def test_data_files_in_the_environment(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_INTEGRATIONS_HTCDASK_CODE_DATA_FILES", text)
    assert load_settings().code.data_files == ["cuts.yaml", "t/*.csv"]


@pytest.mark.parametrize("pattern", ["/etc/passwd", "../other.csv", "a/../../b", "~/x", ""])
def test_data_files_outside_of_the_flows_directory_are_refused(pattern: str) -> None:
    with pytest.raises(SettingsError, match=r"code\.data_files.* relative to it"):
        load_settings(code={"data_files": [pattern]})


def test_a_directory_is_looked_through_no_further_than_agreed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A flow in a directory of a million files, none of which would travel, does not wait until all are seen."""
    _write(tmp_path, {f"many{n}/out{m}.root": "" for n in range(10) for m in range(20)})
    package = {"big_package/__init__.py": "", "big_package/used.py": "", "big_package/unused.py": ""}
    _write(tmp_path, {**package, **{f"big_package/data/{n}.bin": "" for n in range(120)}})
    _write(tmp_path, {"flow_among_many.py": "import prefect, big_package.used\n@prefect.flow\ndef main(): ...\n"})
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(source_code, "MAX_VISITED", 100)
    monkeypatch.setattr(source_code.logger, "handlers", [caplog.handler])
    seen = []
    real = os.scandir

    class Counted:
        def __init__(self, path: Any) -> None:
            self.entries = real(path)

        def __enter__(self) -> Iterator[Any]:
            return (seen.append(entry.path) or entry for entry in self.entries)  # type: ignore[func-returns-value]

        def __exit__(self, *_: object) -> None:
            self.entries.close()

    import importlib

    flow = importlib.import_module("flow_among_many").main
    monkeypatch.setattr(source_code.os, "scandir", Counted)  # type: ignore[attr-defined]
    names = _names(source_code.collect(flow))
    assert len([path for path in seen if path.startswith(str(tmp_path))]) <= 2 * 101
    assert {"flow_among_many.py", "big_package/__init__.py", "big_package/used.py"} <= names
    assert "big_package/unused.py" not in names
    assert "The package" in caplog.text and "looked through" in caplog.text


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
