"""The rules of the house that a reader of docs and design relies on, checked against the code itself."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from prefect.plugins import load_prefect_collections
from pydantic import BaseModel

from prefect_htcdask.settings import HTCDaskSettings, WorkerGroupSettings

CHECKOUT = Path(__file__).resolve().parent.parent
PACKAGE = CHECKOUT / "prefect_htcdask"
NAME = PACKAGE.name

KNOW_PREFECT = {
    "abandoned",
    "access_settings",
    "api_identity",
    "artifacts",
    "blocks",
    "cancellation",
    "cleanup",
    "cli",
    "cli_flow_runs",
    "clients",
    "code_plugin",
    "collector",
    "credentials",
    "cluster_owners",
    "descriptions",
    "doctor",
    "doctor_command",
    "doctor_links",
    "envelopes",
    "final_account",
    "first_worker",
    "flow_events",
    "flow_run_log",
    "futures",
    "last_words",
    "leftovers",
    "lease_settings",
    "live",
    "losses",
    "mapping",
    "prefect_api",
    "packed_states",
    "portable_states",
    "preflight",
    "provisioning",
    "recall",
    "reconnection",
    "removal",
    "report_settings",
    "rerun",
    "scheduler_metadata",
    "setting_sources",
    "settings",
    "source_code",
    "submission",
    "supervisor.flow_watch",
    "held_state",
    "states_in_hand",
    "sweep",
    "task_run_states",
    "task_run_sweep",
    "task_runner",
    "unawaited",
    "upstreams",
    "worker_console",
    "worker_context",
    "worker_engine",
    "worker_events",
    "worker_jobs",
    "worker_logging",
    "worker_runtime",
    "worker_settings",
}
"""The side that faces Prefect; `gateway`, `scaling`, `condor` and `embedded` work without a flow."""

FLOW_SIDE = KNOW_PREFECT - {
    "access_settings",
    "lease_settings",
    "prefect_api",
    "report_settings",
    "settings",
    "supervisor.flow_watch",
    "worker_settings",
}

MUST_NOT_IMPORT = {
    "scaling": FLOW_SIDE | {"gateway", "supervisor", "condor", "embedded"},
    "condor": FLOW_SIDE | {"gateway", "supervisor", "scaling", "embedded"},
    "embedded": FLOW_SIDE | {"gateway", "supervisor", "scaling", "condor"},
    "supervisor": FLOW_SIDE | {"gateway", "embedded"},
    "gateway": FLOW_SIDE,
    "gateway_cluster": FLOW_SIDE | {"gateway"},
    "hand_off": FLOW_SIDE | {"gateway", "gateway_cluster"},
    "settings": FLOW_SIDE | {"gateway", "supervisor", "scaling", "condor", "embedded"},
    "access_settings": FLOW_SIDE | {"gateway", "supervisor", "scaling", "condor", "embedded", "settings"},
    "lease_settings": FLOW_SIDE | {"gateway", "supervisor", "scaling", "condor", "embedded", "settings"},
    "report_settings": FLOW_SIDE | {"gateway", "supervisor", "scaling", "condor", "embedded", "settings"},
    "worker_settings": FLOW_SIDE | {"gateway", "supervisor", "scaling", "condor", "embedded", "settings"},
}
"""Arrows point one way: the flow's side to the gateway, that to the supervisor, that to scaling and condor."""

PURE = {"advice", "condor.worker_job", "picture", "report", "scaling.policy", "supervisor.timeline"}
"""Functions from values to values."""


def modules() -> dict[str, Path]:
    """The package's modules, named as within it: ``condor.schedd``."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, path: Path) -> Iterator[tuple[str, bool]]:
    """Every module that a module imports, wherever in it; names from this package as `modules` has them, and True.

    What is imported for type checking alone does not count: it does not happen.
    """
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in runtime_nodes(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield own(alias.name)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1] if package else []
                base = ".".join([NAME, *filter(None, above), *filter(None, [base])])
            if base == NAME:
                yield from (own(f"{base}.{alias.name}") for alias in node.names)
            else:
                yield own(base)
                yield from (own(f"{base}.{alias.name}") for alias in node.names if base.startswith(f"{NAME}."))


def runtime_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from runtime_nodes(node)


def own(module: str) -> tuple[str, bool]:
    return (module.removeprefix(f"{NAME}."), True) if module.startswith(f"{NAME}.") else (module, False)


def outsiders(name: str, path: Path) -> set[str]:
    """Top-level modules from outside of the package that a module imports."""
    return {module.partition(".")[0] for module, ours in imports(name, path) if not ours}


def is_in(module: str, rooms: set[str]) -> bool:
    return any(module == room or module.startswith(f"{room}.") for room in rooms)


MODULES = modules()
each_module = pytest.mark.parametrize("name", [name for name in MODULES if name])


@each_module
def test_only_condor_and_embedded_import_the_bindings(name: str) -> None:
    if not is_in(name, {"condor", "embedded"}):
        assert not outsiders(name, MODULES[name]) & {"htcondor2", "htcondor"}


@each_module
def test_only_the_flow_side_knows_prefect(name: str) -> None:
    if name not in KNOW_PREFECT:
        assert not outsiders(name, MODULES[name]) & {"prefect", "prefect_dask"}


@each_module
def test_arrows_point_one_way(name: str) -> None:
    imported = {module for module, ours in imports(name, MODULES[name]) if ours}
    for room, forbidden in MUST_NOT_IMPORT.items():
        if is_in(name, {room}):
            assert {module for module in imported if is_in(module, forbidden)} == set()


@pytest.mark.parametrize("name", sorted(PURE))
def test_pure_modules_know_neither_prefect_nor_dask_nor_htcondor(name: str) -> None:
    forbidden = {"prefect", "prefect_dask", "dask", "distributed", "dask_gateway", "htcondor2", "asyncio"}
    assert not outsiders(name, MODULES[name]) & forbidden
    # Nor by way of another module of the package.
    reached, todo = set(), {name}
    while todo:
        module = todo.pop()
        reached.add(module)
        ours = {other for other, mine in imports(module, MODULES[module]) if mine and other in MODULES}
        todo |= ours - reached
    for module in reached:
        assert not outsiders(module, MODULES[module]) & forbidden, f"by way of {module}"


def test_every_setting_is_described() -> None:
    todo: list[type[BaseModel]] = [HTCDaskSettings, WorkerGroupSettings]
    seen = 0
    while todo:
        group = todo.pop()
        for name, field in group.model_fields.items():
            seen += 1
            assert field.description and len(field.description) > 10, f"{group.__name__}.{name}"
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                todo.append(field.annotation)
    assert seen > 20


def tracked_files() -> list[Path]:
    """What git tracks; in an unpacked archive, what there is."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=CHECKOUT, capture_output=True, text=True)
    if listed.returncode == 0 and listed.stdout:
        return [path for name in listed.stdout.split("\0") if name and (path := CHECKOUT / name).is_file()]
    rooms = ("prefect_htcdask", "flows", "tools", "tests", "deployments", "benchmarks", "docs")
    return [path for room in rooms for path in (CHECKOUT / room).rglob("*.*") if path.is_file()]


# Put together here, so that this file does not contain them itself.
REGISTRIES = ["py" + "pi.org", "pythonhosted" + ".org", "conda." + "anaconda", "artifact" + "ory", "pkg." + "dev"]
MACHINE_PATHS = ["/" + "work/", "/" + "opt/lab", "/" + "root/", "/opt/" + "wheels", "/opt/" + "py" + "pi"]


def test_no_file_names_a_registry_or_a_path_of_one_machine() -> None:
    forbidden = re.compile("|".join(map(re.escape, [*REGISTRIES, *MACHINE_PATHS])))
    found = []
    for path in tracked_files():
        try:
            lines = path.read_text().splitlines()
        except UnicodeDecodeError:
            continue
        found += [f"{path}:{number}: {line}" for number, line in enumerate(lines, 1) if forbidden.search(line)]
    assert found == []


def test_exact_versions_have_no_address() -> None:
    lines = [line for line in (CHECKOUT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pattern = re.compile(r"[a-z0-9][a-z0-9-]*==[A-Za-z0-9.!+-]+(; python_version (<|>=) '3\.\d+')?")
    assert len(lines) > 150 and [line for line in lines if not pattern.fullmatch(line)] == []


def test_prefect_finds_the_collection() -> None:
    found = [entry for entry in entry_points(group="prefect.collections") if entry.name == "prefect_htcdask"]
    assert [entry.value for entry in found] == ["prefect_htcdask.blocks"]
    assert not isinstance(load_prefect_collections()["prefect_htcdask"], Exception)
    # Prefect loads it whenever it is asked for its collections: that may not take the whole of Dask and HTCondor.
    for module, heavy in (
        ("prefect_htcdask", {"prefect", "dask", "distributed", "htcondor2"}),
        ("prefect_htcdask.blocks", {"dask", "distributed", "dask_gateway", "htcondor2"}),
    ):
        code = f"import sys, {module}; print(*({heavy} & set(sys.modules)))"
        loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert loaded.stdout.split() == [], module


def test_public_names_exist() -> None:
    import prefect_htcdask

    for name in prefect_htcdask.__all__:
        assert getattr(prefect_htcdask, name) is not None
