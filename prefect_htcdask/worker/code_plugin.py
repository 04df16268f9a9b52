"""The Dask worker plugin that brings the user's own modules to workers.

Every worker, also one that joins later, unpacks what `source_code` has collected, and puts it on `sys.path`, before it
gets a task.
"""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from distributed import Client
from distributed.diagnostics.plugin import WorkerPlugin

if TYPE_CHECKING:
    import zipfile

PLUGIN_PREFIX = "prefect-htcdask-"
"""How the names of the worker plugins begin."""


@dataclass(frozen=True)
class CodeArchive:
    """A zip of modules.

    Attributes:
        digest: names its content.
        names: the top-level modules in it.
        data: the zip.
        roots: the directories of this host that they come from, each with the names of its files.
        modules: top-level modules that the import system would not find by their files' names: name, file in the
            archive, and the directories in the archive in which its submodules are found, `None` for a module
            that has none.
    """

    digest: str
    names: tuple[str, ...]
    data: bytes
    roots: tuple[tuple[str, tuple[str, ...]], ...]
    modules: tuple[tuple[str, str, tuple[str, ...] | None], ...] = ()


def make_plugin(code: CodeArchive | None, package: CodeArchive | None) -> WorkerPlugin:
    """A worker plugin that brings `code`, and `package` where it is missing, and flushes Prefect at the worker's end.

    Its name says what is in it. The plugin's class is made in here, so that it travels by value: neither scheduler nor
    worker need this package.
    """

    home = (socket.gethostname(), os.getpid())
    # As objects of the standard library: a worker that has to be brought this package could not read its own.
    code_sent, package_sent = (SimpleNamespace(**vars(each)) if each else None for each in (code, package))

    class PrefectHTCDaskPlugin(WorkerPlugin):
        idempotent = False
        name = f"{PLUGIN_PREFIX}{code.digest if code else 'none'}-{package.digest if package else 'none'}"

        def __init__(self) -> None:
            self.paths: list[str] = []

        def setup(self, worker: Any) -> None:
            import contextlib
            import importlib
            import importlib.machinery
            import importlib.util
            import io
            import os
            import socket
            import sys
            import tempfile
            import zipfile

            class ByName:
                """Finds modules whose names are not their files', such as those that Prefect loads by a path."""

                def __init__(self, found: dict[str, tuple[str, list[str] | None]]) -> None:
                    self.found = found

                def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
                    if name not in self.found:
                        return None
                    file, locations = self.found[name]
                    return importlib.util.spec_from_file_location(name, file, submodule_search_locations=locations)

            def name_modules(archive: Any, mine: list[str]) -> None:
                home_of = {member: root for root, members in archive.roots for member in members}
                found: dict[str, tuple[str, list[str] | None]] = {}
                for name, file, inside in archive.modules:
                    base = home_of[file] if home_of[file] in mine else mine[0]
                    locations = (
                        None if inside is None else [os.path.join(b, i) if i else b for i in inside for b in mine]
                    )
                    found[name] = os.path.join(base, file), locations
                # As names of the last version only.
                finders = [each for each in sys.meta_path if type(each).__name__ == "ByName"]
                for finder in finders:
                    for name in found:
                        finder.found.pop(name, None)  # type: ignore[attr-defined]
                if found:
                    sys.meta_path.insert(0, ByName(found))

            def install(archive: Any) -> None:
                content = zipfile.ZipFile(io.BytesIO(archive.data))
                # The files beside the modules, which do not travel, are found as well where the modules are shared.
                mine = [root for root, _ in archive.roots] if shared(archive, content) else [unpack(archive, content)]
                self.paths += mine
                # What flow runs before this one have brought: another version of the same modules, perhaps.
                others = [
                    path
                    for plugin in worker.plugins.values()
                    for path in getattr(plugin, "paths", ())
                    if type(plugin).__name__ == type(self).__name__ and path not in mine
                ]
                for name, module in list(sys.modules.items()):
                    filename = getattr(module, "__file__", None) or ""
                    if name.partition(".")[0] in archive.names and filename.startswith(tuple(f"{p}/" for p in others)):
                        del sys.modules[name]
                behind = min((sys.path.index(path) for path in others if path in sys.path), default=len(sys.path))
                front = [path for path in mine if path not in sys.path[:behind]]
                sys.path[:] = front + [path for path in sys.path if path not in front]
                name_modules(archive, mine)
                importlib.invalidate_caches()

            def shared(archive: Any, content: zipfile.ZipFile) -> bool:
                trusted = {0, os.geteuid()}
                try:
                    for root, members in archive.roots:
                        # On a host of its own, the same path may be anybody's, with more in it than these files.
                        if os.stat(root).st_uid not in trusted:
                            return False
                        for member in members:
                            if os.stat(os.path.join(root, member)).st_uid not in trusted:
                                return False
                            with open(os.path.join(root, member), "rb") as file:
                                if file.read() != content.read(member):
                                    return False
                except OSError:
                    return False
                return True

            def unpack(archive: Any, content: zipfile.ZipFile) -> str:
                if worker.local_directory:
                    parent = os.path.join(worker.local_directory, "prefect_htcdask_code")
                    os.makedirs(parent, mode=0o700, exist_ok=True)
                else:  # a directory that another user could have made is no place for code
                    parent = tempfile.mkdtemp(prefix="prefect_htcdask_code-")
                target = os.path.join(parent, archive.digest)
                if not os.path.isdir(target):
                    unpacked = tempfile.mkdtemp(dir=parent)
                    content.extractall(unpacked)
                    for directory, _, members in os.walk(unpacked):
                        os.chmod(directory, 0o700)
                        for member in members:
                            os.chmod(os.path.join(directory, member), 0o600)
                    # Another worker of this host may be faster; the content is the same.
                    with contextlib.suppress(OSError):
                        os.rename(unpacked, target)
                return target

            if (socket.gethostname(), os.getpid()) == home:
                return
            if package_sent is not None and importlib.util.find_spec("prefect_htcdask") is None:
                install(package_sent)
            if code_sent is not None:
                install(code_sent)

        async def teardown(self, worker: Any) -> None:
            from distributed.worker import WORKER_ANY_RUNNING

            if worker.status in WORKER_ANY_RUNNING:
                # Another flow run's plugin takes this one's place. The worker goes on, and the services that send
                # Prefect's events and logs with it: once stopped, they are kept by Prefect for ever.
                return
            from prefect_htcdask.worker.run_task import dask_teardown

            await dask_teardown(worker)

    return PrefectHTCDaskPlugin()


def send(client: Client, plugin: WorkerPlugin) -> None:
    """Register `plugin` with the scheduler of `client`, unless it was the last of its kind to be registered there.

    A cluster that serves one flow run after another has the code then, on all of its workers. Another version that
    came in between is in front of it on them: it is sent once more, and comes last to those that join later.
    """

    def have(dask_scheduler: Any, name: str, prefix: str) -> bool:
        """Whether it is there; if it is not the last, as if it were not. Runs on the scheduler."""
        registered = [one for one in dask_scheduler.worker_plugins if one.startswith(prefix)]
        if registered[-1:] == [name]:
            return True
        dask_scheduler.worker_plugins.pop(name, None)
        return False

    with suppress(Exception):  # a scheduler that runs no functions for its clients is sent everything
        if client.run_on_scheduler(have, name=cast(Any, plugin).name, prefix=PLUGIN_PREFIX):
            return
    client.register_plugin(plugin)
