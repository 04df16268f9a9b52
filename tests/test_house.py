"""The rules of the house that a reader of docs and design relies on, checked against the code itself."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from prefect.plugins import load_prefect_collections
from pydantic import BaseModel

from prefect_htcdask.settings import HTCDaskSettings, WorkerGroupSettings
from tests.support.file_order import LONG

CHECKOUT = Path(__file__).resolve().parent.parent
PACKAGE = CHECKOUT / "prefect_htcdask"
NAME = PACKAGE.name

ARCHITECTURE = CHECKOUT / "docs" / "architecture.md"

LIBRARIES = {
    "Dask": {"dask", "distributed"},
    "Dask Gateway": {"dask_gateway"},
    "HTCondor": {"htcondor", "htcondor2", "classad2"},
    "Prefect": {"prefect", "prefect_dask"},
}
"""What a room may import only where the architecture page says so."""

RUNNER_FLOORS = ("runner", "runner/submit", "runner/ui", "runner/states", "runner/futures", "runner/client")
"""Directories of the room `runner`: every import goes to a later one, or stays."""

MAX_FILES = 25
MAX_UTILS_LINES = 400

PURE = {
    "condor.submit_description",
    "supervisor.policy",
    "supervisor.report.markdown",
    "supervisor.report.plot",
    "supervisor.report.recommendations",
    "supervisor.report.timeline",
}
"""Functions from values to values."""


def table_of_rooms() -> dict[str, set[str]]:
    """The architecture page's rooms in their order, the uppermost first, and the libraries that each may import."""
    rows = re.findall(r"^\| `(\w+)` \|.*\| ([^|]*)\|$", ARCHITECTURE.read_text(), re.MULTILINE)
    return {room: {name.strip() for name in names.split(",") if name.strip()} for room, names in rows}


def modules() -> dict[str, Path]:
    """The package's modules by their full names."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(CHECKOUT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()
ROOMS = table_of_rooms()
each_module = pytest.mark.parametrize("name", list(MODULES))


def imports(name: str) -> Iterator[str]:
    """Every module that a module imports, wherever in it and whatever for; modules of this package by full name.

    `from package import name` is the module of that name, where there is one.
    """
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports {'.' * node.level}{node.module}: imports are absolute"
            base = node.module or ""
            for alias in node.names:
                yield f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base


def own_imports(name: str) -> set[str]:
    """The modules of this package that a module imports."""
    return {module for module in imports(name) if module in MODULES and module != name}


def libraries(name: str) -> set[str]:
    """Top-level names of what a module imports from outside of this package."""
    return {module.partition(".")[0] for module in imports(name) if module.partition(".")[0] != NAME}


def room_of(name: str) -> str | None:
    """The room of a module; the package itself has none, and stands above all."""
    return name.split(".")[1] if "." in name else None


def directory_of(name: str) -> str:
    return MODULES[name].relative_to(PACKAGE).parent.as_posix()


def test_every_module_has_a_room() -> None:
    assert {room_of(name) for name in MODULES} - {None} == set(ROOMS)


@each_module
def test_every_import_goes_down(name: str) -> None:
    rank = list(ROOMS).index
    room = room_of(name)
    for other in own_imports(name):
        assert (below := room_of(other)) is not None, f"{name} imports the package itself"
        if room is not None:
            assert rank(room) <= rank(below), f"{name} imports {other}, which is in a room above"
        floors = (directory_of(name), directory_of(other))
        if set(floors) <= set(RUNNER_FLOORS):
            assert RUNNER_FLOORS.index(floors[0]) <= RUNNER_FLOORS.index(floors[1]), f"{name} imports {other}"


def test_no_modules_import_each_other_in_a_circle() -> None:
    try:
        list(TopologicalSorter({name: own_imports(name) for name in MODULES}).static_order())
    except CycleError as exc:
        pytest.fail(f"a circle of imports: {' -> '.join(exc.args[1])}")


@each_module
def test_rooms_know_only_the_libraries_that_they_are_for(name: str) -> None:
    room = room_of(name)
    allowed = set().union(*(LIBRARIES[library] for library in ROOMS[room])) if room else set()
    assert libraries(name) & set().union(*LIBRARIES.values()) <= allowed


INHERITED = {
    "gateway.cluster": {"_init_internal", "_cluster_options", "_cluster_kwargs", "_clients"},
    "runner.task_runner": {"_cluster", "_started"},
    "scheduler.stealing": {"_get_prefix_duration"},
    "condor.schedd": {"_addr"},
}
"""Private names of other libraries that stay where they are: attributes of base classes; what runs on the scheduler,
and imports nothing; and the address of a schedd in HTCondor's bindings."""

PUBLIC_UNDERSCORES = {"_exit", "_asdict", "_replace", "_fields"}
"""Names of Python's standard library that are public."""


@each_module
def test_what_is_private_to_others_is_used_in_compat_only(name: str) -> None:
    room = room_of(name)
    if room == "compat":
        return
    tree = ast.parse(MODULES[name].read_text())
    for module in imports(name):
        assert module.startswith((NAME, "_")) or "._" not in module, f"{name} imports {module}"
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not (node.module or "").startswith(NAME):
            private = [alias.name for alias in node.names if re.match("_[a-z]", alias.name)]
            assert not private, f"{name} imports {private} from {node.module}"
    own = INHERITED.get(name.removeprefix(f"{NAME}."), set()) | PUBLIC_UNDERSCORES
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            own.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if isinstance(node.value, ast.Name) and node.value.id == "self":
                own.add(node.attr)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            own.add(node.target.id)
        elif isinstance(node, ast.Assign) and any(getattr(one, "id", "") == "__slots__" for one in node.targets):
            own |= {one.value for one in ast.walk(node.value) if isinstance(one, ast.Constant)}
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and re.match("_[a-z]", node.attr)}
    assert used <= own, f"{name} uses {sorted(used - own)}"


def test_rooms_are_small_enough_to_be_learnt() -> None:
    for directory in {path.parent for path in MODULES.values()}:
        assert len(list(directory.glob("*.py"))) <= MAX_FILES, directory
        purpose = (ast.get_docstring(ast.parse((directory / "__init__.py").read_text())) or "").splitlines()
        assert purpose and len(purpose[0]) > 20, f"{directory} does not say what it is for"
    lines = sum(len(path.read_text().splitlines()) for path in (PACKAGE / "utils").glob("*.py"))
    assert lines <= MAX_UTILS_LINES


@pytest.mark.parametrize("name", sorted(PURE))
def test_pure_modules_know_neither_prefect_nor_dask_nor_htcondor(name: str) -> None:
    forbidden = {"prefect", "prefect_dask", "dask", "distributed", "dask_gateway", "htcondor2", "asyncio"}
    # Nor by way of another module of the package.
    reached, todo = set(), {f"{NAME}.{name}"}
    while todo:
        module = todo.pop()
        reached.add(module)
        todo |= own_imports(module) - reached
    for module in reached:
        assert not libraries(module) & forbidden, f"by way of {module}"


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


def test_files_that_take_long_are_there() -> None:
    assert [name for name in LONG if not (CHECKOUT / name).exists()] == []


def test_no_test_imports_a_test() -> None:
    for path in sorted((CHECKOUT / "tests").rglob("*.py")):
        found = re.findall(
            r"^\s*(?:from|import) tests(?:\.\w+)*(?:\.| import )test_\w+", path.read_text(), re.MULTILINE
        )
        assert found == [], f"{path}: what several tests use lies in tests/support"
