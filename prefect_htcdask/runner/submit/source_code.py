"""The user's own modules, for workers that share no filesystem with the flow's host.

cloudpickle carries a flow and its tasks by value, but whatever they import has to be importable where they run. So
the modules that do not come from an installed package travel as one zip, named by its content, in a Dask worker
plugin (`code_plugin`). Code travels; data does only from inside packages that the flow has imported, or where the
setting `code.data_files` names it, and never what may be a secret (`_is_private`).
"""

from __future__ import annotations

import hashlib
import importlib.resources
import io
import logging
import os
import re
import site
import stat
import sys
import sysconfig
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pathspec
from dask.utils import format_bytes

from prefect_htcdask.worker.code_plugin import CodeArchive

SKIPPED_DIRECTORIES = frozenset(
    {"__pycache__", "node_modules", "site-packages", "dist-packages", "venv", "env", "build", "dist", "htmlcov"}
)
CODE_SUFFIXES = frozenset({".py", ".pyi", ".so"})
DATA_SUFFIXES = frozenset({".json", ".toml", ".yaml", ".yml", ".cfg", ".ini", ".txt", ".csv", ".sql"})
"""What of a package's data travels without being asked for."""

MAX_DATA_FILE = 1024**2
"""Bytes; a larger file of a package that is no code stays behind."""

MAX_TOTAL = 50 * 1024**2
MAX_FILES = 5000
MAX_VISITED = 20_000
"""Directory entries that are looked at below one directory, whatever they are: a home directory may hold millions."""

# fmt: off
_CONFIGURATIONS = frozenset({
    "prefect.toml", "pyproject.toml", "profiles.toml", "prefect.yaml", "netrc", "_netrc", "pgpass", "kubeconfig",
    "usercert", "userkey",
})
# fmt: on
_SECRET_NAMES = re.compile(
    r"secret|credential|passw|passphrase|token(?!i[sz])|api[_-]?key|private[_-]?key|auth[_-]?key|service[_-]?account"
    r"|^id_(rsa|dsa|ecdsa|ed25519)|^x509up|\.(pem|key|p12|pfx|jks|keystore|keytab|kdbx|gpg|pgp|asc|ppk|env)$",
    re.IGNORECASE,
)

logger = logging.getLogger("prefect.task_runner.htcdask")


class _TooManyError(Exception):
    """A directory holds more entries than are looked at."""


@dataclass
class _Collected:
    """Files by their names in the archive; the first of a name counts.

    Attributes:
        files: paths of this host.
        kept_back: data that is not sent since it may be a secret, with why.
    """

    files: dict[str, Path] = field(default_factory=dict)
    kept_back: dict[Path, str] = field(default_factory=dict)
    size: int = 0

    def add(self, root: Path, path: Path) -> None:
        name = path.relative_to(root).as_posix()
        if name not in self.files and os.access(path, os.R_OK):
            self.files[name] = path
            self.size += path.stat().st_size

    def fill_up(self, other: _Collected) -> None:
        for name, path in other.files.items():
            if name not in self.files:
                self.files[name] = path
                self.size += path.stat().st_size
        self.kept_back.update(other.kept_back)

    @property
    def is_too_large(self) -> bool:
        return len(self.files) > MAX_FILES or self.size > MAX_TOTAL


def collect(flow: Any | None, data_files: Iterable[str] = ()) -> CodeArchive | None:
    """Zip the modules of the user's own that `flow` may need on workers.

    These are the modules that this process has imported from outside of installed packages and the standard library,
    each with the whole package that it belongs to, and the Python sources beside the flow's own file, which a task may
    import only when it runs.

    Args:
        flow: the Prefect flow.
        data_files: further files, relative to the directory of the flow's file, as patterns of a ``.gitignore``.

    Returns:
        the archive; none where there is nothing to ship.
    """
    found, modules = _imported()
    packages, own_files = _imported_packages(), _imported_files()
    sent = _Collected()
    for root, names in found.items():
        for name in sorted(names):
            path, whole = root / name, _Collected()
            try:
                _take(whole, root, path, packages, own_files)
                sent.fill_up(whole)
            except _TooManyError:
                logger.warning(
                    "The package %s holds more than %s files and directories: of it, workers are sent the modules "
                    "that are imported already. Keep data outside of packages.",
                    path,
                    MAX_VISITED,
                )
                for file in sorted(own_files):
                    if Path(file).is_relative_to(path):
                        sent.add(root, Path(file))
    for directory in flow_roots(flow):
        beside = _Collected()
        try:
            _take(beside, directory, directory, frozenset(), own_files)
            too_large = beside.is_too_large
        except _TooManyError:
            too_large = True
        if too_large:
            logger.warning(
                "The directory of the flow, %s, holds more than workers are sent (%s modules or %s) or than is looked "
                "through for them (%s files and directories): only the modules that are imported already go to them. "
                "Keep flows in a directory of their own, or install the package that they need on the workers.",
                directory,
                MAX_FILES,
                format_bytes(MAX_TOTAL),
                MAX_VISITED,
            )
        else:
            sent.fill_up(beside)
    patterns = list(data_files)
    if patterns:
        _take_data(sent, flow, patterns)
    if sent.kept_back:
        logger.info("Not sent to workers: %s", _told(sent.kept_back))
    if not sent.files:
        return None
    if sent.size > MAX_TOTAL:
        logger.warning(
            "The modules that the flow imports take %s; workers get at most %s. They are sent none: install them on "
            "the workers, or move large files out of the packages.",
            format_bytes(sent.size),
            format_bytes(MAX_TOTAL),
        )
        return None
    return _pack(sent.files, {name: module for name, module in modules.items() if module[0] in sent.files})


def _told(kept_back: dict[Path, str], most: int = 5) -> str:
    listed = [f"{path} ({why})" for path, why in list(kept_back.items())[:most]]
    return ", ".join(listed) + (f" and {len(kept_back) - most} more" if len(kept_back) > most else "")


def flow_roots(flow: Any | None) -> list[Path]:
    """The directories that have to be on `sys.path` for the modules beside a flow to be found, its own one first.

    Where Prefect has loaded the flow by its path, that is also the working directory of then, if it is above it.
    """
    file, module = _flow_file(flow)
    if file is None:
        return []
    roots = [file.parent]
    if module is not None and _is_script(module):
        spec = module.__spec__
        assert spec is not None
        roots += [path for each in spec.submodule_search_locations or () if (path := Path(each).resolve()) != roots[0]]
        roots = [path for path in roots if file.is_relative_to(path)]
    else:
        package = (getattr(module, "__package__", None) or "").split(".")
        if file.parent.parts[-len(package) :] == tuple(package):
            roots = [file.parents[len(package)]]
    # A home directory or the root of a filesystem is nobody's source directory.
    return [root for root in roots if root not in (Path.home().resolve(), Path(root.anchor), Path("/tmp"))]


def _flow_file(flow: Any | None) -> tuple[Path | None, ModuleType | None]:
    """The file of a flow that is no part of an installed package, and its module."""
    fn = getattr(flow, "fn", None)
    module = sys.modules.get(getattr(fn, "__module__", None) or "")
    filename = getattr(module, "__file__", None)
    if filename is None:
        code = getattr(fn, "__code__", None)
        filename = code.co_filename if code is not None else None
    if not filename or not os.path.isfile(filename):
        return None, None
    path = Path(filename).resolve()
    return (None, None) if _is_installed(path) else (path, module)


def _is_script(module: ModuleType | None) -> bool:
    """Whether a module was loaded from a file as if that were a package (`prefect.utilities.importtools`).

    Its name then is the file's or one that Prefect makes up, and submodules are looked for beside the file.
    """
    spec, filename = getattr(module, "__spec__", None), getattr(module, "__file__", None)
    locations = getattr(spec, "submodule_search_locations", None)
    return locations is not None and filename is not None and Path(filename).name != "__init__.py"


def _imported() -> tuple[dict[Path, set[str]], dict[str, tuple[str, tuple[str, ...] | None]]]:
    """Modules of the user's own that are found in a directory rather than in a package.

    Returns:
        their files or directories, by the directory that they are found in; and of those whose files are named
        otherwise, file and search path (`CodeArchive.modules`).
    """
    found: dict[Path, set[str]] = {}
    named: dict[str, tuple[str, tuple[str, ...] | None]] = {}
    for name, module in list(sys.modules.items()):
        parent, _, _ = name.rpartition(".")
        if name.partition(".")[0] in ("__main__", "__mp_main__", "prefect_htcdask"):
            continue
        if parent and not _is_script(sys.modules.get(parent)):
            continue
        path = _top_level(module)
        if path is None or _is_installed(path):
            continue
        found.setdefault(path.parent, set()).add(path.name)
        if parent:
            continue
        if _is_script(module):
            named[name] = (path.name, ("",))
        elif path.is_dir() and path.name != name and (path / "__init__.py").is_file():
            named[name] = (f"{path.name}/__init__.py", (path.name,))
        elif not path.is_dir() and path.name.partition(".")[0] != name:
            named[name] = (path.name, None)
    return found, named


def _top_level(module: ModuleType) -> Path | None:
    filename = getattr(module, "__file__", None)
    spec = getattr(module, "__spec__", None)
    if filename is None:
        locations = list(getattr(spec, "submodule_search_locations", None) or ())
        return Path(locations[0]).resolve() if len(locations) == 1 and os.path.isdir(locations[0]) else None
    path = Path(filename)
    if path.suffix not in (".py", ".so") or not path.is_file():
        return None
    path = path.resolve()
    return path.parent if path.name == "__init__.py" else path


def _imported_files() -> frozenset[str]:
    """Files of modules that are imported, by where their directories really are: they may be links themselves."""
    files = {getattr(module, "__file__", None) for module in list(sys.modules.values())}
    return frozenset(
        os.path.join(os.path.realpath(os.path.dirname(file)), os.path.basename(file))
        for file in files
        if isinstance(file, str) and not file.startswith(_installed_texts())
    )


def _imported_packages() -> frozenset[Path]:
    """Directories of imported packages."""
    return frozenset(Path(file).parent for file in _imported_files() if os.path.basename(file) == "__init__.py")


@cache
def _installed_prefixes() -> tuple[Path, ...]:
    paths = {*sysconfig.get_paths().values(), *site.getsitepackages(), site.getusersitepackages()}
    paths -= {sysconfig.get_paths()["scripts"], sysconfig.get_paths()["data"]}
    return tuple(Path(path).resolve() for path in paths)


@cache
def _installed_texts() -> tuple[str, ...]:
    return tuple(f"{prefix}{os.sep}" for prefix in _installed_prefixes())


def _is_installed(path: Path) -> bool:
    return any(path.is_relative_to(prefix) for prefix in _installed_prefixes())


def _walk(root: Path) -> Iterator[Path]:
    """Files below a directory, in a stable order; a link to a directory is not followed.

    Raises:
        _TooManyError: it holds more entries than are looked at.
    """
    todo, visited = [root], 0
    while todo:
        directory = todo.pop()
        directories, files = [], []
        with suppress(OSError), os.scandir(directory) as entries:
            for entry in entries:
                visited += 1
                if visited > MAX_VISITED:
                    raise _TooManyError
                if entry.name.startswith("."):
                    continue
                if not entry.is_dir(follow_symlinks=False):
                    files.append(Path(entry.path))
                elif (
                    entry.name not in SKIPPED_DIRECTORIES
                    and not entry.name.endswith(".egg-info")
                    and not os.path.exists(os.path.join(entry.path, "pyvenv.cfg"))
                ):
                    directories.append(Path(entry.path))
        yield from sorted(files)
        todo += sorted(directories, reverse=True)


def _take(
    into: _Collected, root: Path, path: Path, packages: frozenset[Path], own_files: frozenset[str] = frozenset()
) -> None:
    """Add what travels of a file, or of what is below a directory, by its name relative to `root`.

    Args:
        packages: directories of imported packages, whose data travels too.
        own_files: files of imported modules, which may be links to elsewhere.
    """
    for file in _walk(path) if path.is_dir() else [path]:
        if file.suffix in CODE_SUFFIXES:
            if (str(file) in own_files or _stays_within(file, path)) and file.is_file():
                into.add(root, file)
        elif file.suffix in DATA_SUFFIXES and not packages.isdisjoint(file.parents):
            if why := _is_private(file, path):
                into.kept_back[file] = why
            elif file.is_file() and file.stat().st_size <= MAX_DATA_FILE:
                into.add(root, file)
        if len(into.files) > 2 * MAX_FILES:
            return


def _stays_within(file: Path, directory: Path) -> bool:
    return not file.is_symlink() or file.resolve().is_relative_to(directory.resolve())


def _is_private(file: Path, directory: Path) -> str | None:
    """Why a data file below `directory` is not to travel: a reason in words, or `None` where it may.

    The directory's own mode is not looked at, nor those above it: many a home directory is closed to others as a whole.
    """
    parts = file.relative_to(directory).parts
    if any(part.startswith(".") for part in parts):
        return "hidden"
    if file.name.lower() in _CONFIGURATIONS or file.stem.lower() in _CONFIGURATIONS:
        return "a configuration that holds secrets"
    if any(_SECRET_NAMES.search(part) for part in parts):
        return "the name of a secret"
    if not _stays_within(file, directory):
        return "a link that leads out of its directory"
    try:
        if not file.stat().st_mode & stat.S_IROTH:
            return "not readable by others here"
        inner = list(file.parents)[: len(parts) - 1]
        if not all(each.stat().st_mode & stat.S_IXOTH for each in inner):
            return "in a directory that is closed to others here"
    except OSError:
        return "not readable"
    return None


def _take_data(sent: _Collected, flow: Any | None, patterns: list[str]) -> None:
    """Add the data files that the setting names."""
    file, _ = _flow_file(flow)
    if file is None:
        logger.warning("code.data_files = %r: the flow has no file, so they are not found and not sent", patterns)
        return
    directory = file.parent
    # Without the home directory's exception: what is named is meant.
    root = next(iter(flow_roots(flow)), directory)
    before = len(sent.files) + len(sent.kept_back)
    try:
        for path in _matching(directory, patterns):
            if why := _is_private(path, directory):
                sent.kept_back[path] = why
            elif path.is_file():
                sent.add(root, path)
    except _TooManyError:
        logger.warning(
            "code.data_files = %r: %s holds more than %s files and directories, and not all were looked at. Name the "
            "files without wildcards, or keep the flow in a directory of its own.",
            patterns,
            directory,
            MAX_VISITED,
        )
    if len(sent.files) + len(sent.kept_back) == before:
        logger.warning("code.data_files = %r: there are none such in %s", patterns, directory)


def _matching(directory: Path, patterns: list[str]) -> Iterator[Path]:
    wild = []
    for pattern in patterns:
        path = directory / pattern.lstrip("/")
        if path.is_file():
            yield path
        elif path.is_dir():
            yield from _walk(path)
        else:
            wild.append(pattern)
    if wild:
        matches: Callable[[str], bool] = pathspec.GitIgnoreSpec.from_lines(wild).match_file
        yield from (path for path in _walk(directory) if matches(path.relative_to(directory).as_posix()))


def _pack(files: dict[str, Path], modules: dict[str, tuple[str, tuple[str, ...] | None]] | None = None) -> CodeArchive:
    buffer = io.BytesIO()
    digest = hashlib.sha256()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(files):
            content = files[name].read_bytes()
            digest.update(f"{name}\0{len(content)}\0".encode())
            digest.update(content)
            # Without the file's own date, so that equal content makes an equal archive.
            archive.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)
    named = tuple((name, *module) for name, module in sorted((modules or {}).items()))
    digest.update(repr(named).encode() if named else b"")
    names = sorted({*(name.partition("/")[0].partition(".")[0] for name in files), *(name for name, *_ in named)})
    roots: dict[str, list[str]] = {}
    for name in sorted(files):
        roots.setdefault(str(files[name])[: -len(name)].rstrip("/"), []).append(name)
    return CodeArchive(
        digest.hexdigest()[:16],
        tuple(names),
        buffer.getvalue(),
        tuple((root, tuple(members)) for root, members in roots.items()),
        named,
    )


def own_package() -> CodeArchive:
    """This package itself, for workers of a cluster that was started without it."""
    package = _Collected()
    directory = Path(str(importlib.resources.files(__name__.partition(".")[0]))).resolve()
    _take(package, directory.parent, directory, frozenset())
    return _pack(package.files)
