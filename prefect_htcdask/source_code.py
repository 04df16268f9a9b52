"""The user's own modules, for workers that share no filesystem with the flow's host.

cloudpickle carries a flow and its tasks by value, but whatever they import has to be importable where they run. So
the modules that do not come from an installed package travel as one zip, named by its content, in a Dask worker
plugin (`code_plugin`).
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import site
import sys
import sysconfig
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from dask.utils import format_bytes

SKIPPED_DIRECTORIES = frozenset(
    {"__pycache__", "node_modules", "site-packages", "dist-packages", "venv", "env", "build", "dist", "htmlcov"}
)
SOURCE_SUFFIXES = frozenset(
    {".py", ".pyi", ".so", ".json", ".toml", ".yaml", ".yml", ".cfg", ".ini", ".txt", ".csv", ".sql"}
)
MAX_DATA_FILE = 1024**2
"""Bytes; a larger file that is no Python source is taken for data and stays behind."""

MAX_TOTAL = 50 * 1024**2
MAX_FILES = 5000

logger = logging.getLogger("prefect.task_runner.htcdask")


@dataclass(frozen=True)
class CodeArchive:
    """A zip of modules. `digest` names its content, `names` are the top-level modules in it, and `roots` the
    directories of this host that they come from, each with the names of its files."""

    digest: str
    names: tuple[str, ...]
    data: bytes
    roots: tuple[tuple[str, tuple[str, ...]], ...]


def collect(flow: Any | None) -> CodeArchive | None:
    """Zip the modules of the user's own that `flow` may need on workers.

    These are the modules that this process has imported from outside of installed packages and the standard library,
    each with the whole package that it belongs to, and the source files beside the flow's own file, which a task may
    import only when it runs.

    Returns:
        the archive; none where there is nothing to ship.
    """
    files: dict[str, Path] = {}
    for root, names in _imported().items():
        for name in sorted(names):
            _add(files, root, _walk(root / name) if (root / name).is_dir() else iter([root / name]))
    directory = flow_root(flow)
    if directory is not None:
        beside: dict[str, Path] = {}
        _add(beside, directory, _walk(directory))
        if len(beside) > MAX_FILES or _size(beside) > MAX_TOTAL:
            logger.warning(
                "The directory of the flow, %s, holds more than workers are sent (%s files or %s): only the modules "
                "that are imported already go to them. Keep flows in a directory of their own, or install the "
                "package that they need on the workers.",
                directory,
                MAX_FILES,
                format_bytes(MAX_TOTAL),
            )
        else:
            files = {**beside, **files}
    if not files:
        return None
    if _size(files) > MAX_TOTAL:
        logger.warning(
            "The modules that the flow imports take %s; workers get at most %s. They are sent none: install them on "
            "the workers, or move large files out of the packages.",
            format_bytes(_size(files)),
            format_bytes(MAX_TOTAL),
        )
        return None
    return _pack(files)


def flow_root(flow: Any | None) -> Path | None:
    """The directory that has to be on `sys.path` for the modules beside a flow to be found."""
    fn = getattr(flow, "fn", None)
    module = sys.modules.get(getattr(fn, "__module__", None) or "")
    filename = getattr(module, "__file__", None)
    if filename is None:
        code = getattr(fn, "__code__", None)
        filename = code.co_filename if code is not None else None
    if not filename or not os.path.isfile(filename):
        return None
    path = Path(filename).resolve()
    if _is_installed(path):
        return None
    package = getattr(module, "__package__", None) or ""
    root = path.parent
    for _ in package.split(".") if package else ():
        root = root.parent
    # A home directory or the root of a filesystem is nobody's source directory.
    if root in (Path.home().resolve(), Path(root.anchor), Path("/tmp")):
        return None
    return root


def _imported() -> dict[Path, set[str]]:
    """Top-level modules of the user's own: their files or directories, by the directory that they are found in."""
    found: dict[Path, set[str]] = {}
    for name, module in list(sys.modules.items()):
        if "." in name or name in ("__main__", "__mp_main__") or name.startswith("__prefect_loader"):
            continue
        if name.partition(".")[0] == "prefect_htcdask":
            continue
        path = _top_level(module)
        if path is not None and not _is_installed(path):
            found.setdefault(path.parent, set()).add(path.name)
    return found


def _top_level(module: ModuleType) -> Path | None:
    filename = getattr(module, "__file__", None)
    spec = getattr(module, "__spec__", None)
    if filename is None:
        locations = list(getattr(spec, "submodule_search_locations", None) or ())
        return Path(locations[0]).resolve() if len(locations) == 1 and os.path.isdir(locations[0]) else None
    path = Path(filename)
    if path.suffix != ".py" or not path.is_file():
        return None
    path = path.resolve()
    return path.parent if path.name == "__init__.py" else path


@cache
def _installed_prefixes() -> tuple[Path, ...]:
    paths = {*sysconfig.get_paths().values(), *site.getsitepackages(), site.getusersitepackages()}
    paths -= {sysconfig.get_paths()["scripts"], sysconfig.get_paths()["data"]}
    return tuple(Path(path).resolve() for path in paths)


def _is_installed(path: Path) -> bool:
    return any(path.is_relative_to(prefix) for prefix in _installed_prefixes())


def _walk(root: Path) -> Iterator[Path]:
    for directory, directories, names in os.walk(root):
        directories[:] = sorted(
            name
            for name in directories
            if not name.startswith(".")
            and name not in SKIPPED_DIRECTORIES
            and not name.endswith(".egg-info")
            and not os.path.exists(os.path.join(directory, name, "pyvenv.cfg"))
        )
        for name in sorted(names):
            if not name.startswith("."):
                yield Path(directory, name)


def _add(files: dict[str, Path], root: Path, paths: Iterator[Path]) -> None:
    for path in paths:
        if path.suffix not in SOURCE_SUFFIXES or not path.is_file():
            continue
        if path.suffix not in (".py", ".pyi", ".so") and path.stat().st_size > MAX_DATA_FILE:
            continue
        files.setdefault(path.relative_to(root).as_posix(), path)
        if len(files) > 2 * MAX_FILES:
            return


def _size(files: dict[str, Path]) -> int:
    return sum(path.stat().st_size for path in files.values())


def _pack(files: dict[str, Path]) -> CodeArchive:
    buffer = io.BytesIO()
    digest = hashlib.sha256()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(files):
            content = files[name].read_bytes()
            digest.update(f"{name}\0{len(content)}\0".encode())
            digest.update(content)
            # Without the file's own date, so that equal content makes an equal archive.
            archive.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)
    names = sorted({name.partition("/")[0].removesuffix(".py") for name in files})
    roots: dict[str, list[str]] = {}
    for name in sorted(files):
        roots.setdefault(str(files[name])[: -len(name)].rstrip("/"), []).append(name)
    return CodeArchive(
        digest.hexdigest()[:16],
        tuple(names),
        buffer.getvalue(),
        tuple((root, tuple(members)) for root, members in roots.items()),
    )


def own_package() -> CodeArchive:
    """This package itself, for workers of a cluster that was started without it."""
    import prefect_htcdask

    files: dict[str, Path] = {}
    directory = Path(prefect_htcdask.__file__).resolve().parent
    _add(files, directory.parent, _walk(directory))
    return _pack(files)
