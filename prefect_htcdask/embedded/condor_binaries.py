"""HTCondor's binaries: the machine's own, or Debian's packages unpacked into the user's cache.

The packages are fetched and verified by apt itself, in a private state directory and from the machine's own mirror, and
then pointed at their own libraries with patchelf. That needs no root and leaves the system untouched.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import platformdirs
from filelock import FileLock

from prefect_htcdask.embedded.errors import EmbeddedError
from prefect_htcdask.embedded.progress import Progress, telling_of_files
from prefect_htcdask.embedded.state import APPLICATION

SUITE = "trixie"
"""The Debian release whose `condor` package is used. Its binaries bring their own libc, so they run on older ones."""

KEYRINGS = ("/usr/share/keyrings/debian-archive-keyring.gpg", "/usr/share/keyrings/debian-archive-keyring.pgp")

VERSION_TIMEOUT = 300.0
"""Seconds for a program of HTCondor's to say its version, on however busy a machine."""

NOT_NEEDED = (
    "libboost-python", "libdebconf", "libjs-", "libpam", "libperl", "libpython", "libsemanage", "libsepol"
)  # fmt: skip
"""Libraries that only HTCondor's Python and Perl tools, or the installation of packages, need."""

REMEDY = (
    "install HTCondor (https://htcondor.org), or point condor.config_file at a configured pool, or gateway.address at "
    "a Dask Gateway and condor.* at its pool"
)


@dataclass(frozen=True)
class CondorBinaries:
    """Where HTCondor's programs are.

    Attributes:
        release: the directory with bin, sbin, lib and libexec (RELEASE_DIR).
        unpacked: whether they are ours from the cache, and not the machine's.
        version: HTCondor's version, such as "23.9.6".
    """

    release: Path
    unpacked: bool
    version: str

    @property
    def master(self) -> Path:
        return self.release / "sbin" / "condor_master"

    @property
    def libexec(self) -> Path:
        packaged = self.release / "libexec" / "condor"
        return packaged if packaged.is_dir() else self.release / "libexec"

    @property
    def lib(self) -> Path:
        packaged = self.release / "lib" / "condor"
        return packaged if packaged.is_dir() else self.release / "lib"


def condor_binaries(progress: Progress) -> CondorBinaries:
    """The machine's HTCondor, or else the cached one, or else one fetched now (some 30 MB).

    Args:
        progress: is told what takes time, and how far the download is.

    Raises:
        EmbeddedError: where HTCondor is not installed and cannot be had.
    """
    return installed() or _unpacked(progress)


def installed() -> CondorBinaries | None:
    """The HTCondor that is installed on this machine, or `None`."""
    found = shutil.which("condor_master", path=os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin")))
    if found is None:
        return None
    release = Path(found).resolve().parent.parent
    version = _version(release)
    return CondorBinaries(release, unpacked=False, version=version) if version else None


def _version(release: Path) -> str | None:
    """The version that `condor_version` tells, or `None` where it does not run.

    Raises:
        EmbeddedError: it does not end: a busy machine or a file server that hangs, and no damage.
    """
    try:
        result = subprocess.run(
            [release / "bin" / "condor_version"],
            env={**os.environ, "CONDOR_CONFIG": "/dev/null"},
            capture_output=True,
            text=True,
            timeout=VERSION_TIMEOUT,
            check=True,
        )
    except subprocess.TimeoutExpired as error:
        raise EmbeddedError(
            f"{release}/bin/condor_version did not end within {VERSION_TIMEOUT:.0f} s: is the disk or file server slow?"
        ) from error
    except (OSError, subprocess.SubprocessError):
        return None
    words = result.stdout.split()  # $CondorVersion: 23.9.6 2026-07-12 ... $
    return words[1] if len(words) > 1 and words[0] == "$CondorVersion:" else None


def _unpacked(progress: Progress) -> CondorBinaries:
    cache = platformdirs.user_cache_path(APPLICATION)
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / "condor.lock"):
        pattern = f"condor-*-{SUITE}-{platform.machine()}"
        for tree in sorted(cache.glob(pattern), key=lambda path: path.stat().st_mtime, reverse=True):
            version = _version(tree / "usr")
            if version:
                return CondorBinaries(tree / "usr", unpacked=True, version=version)
            shutil.rmtree(tree)  # moved, or damaged
        progress("bringing HTCondor from Debian's packages (once; some 30 MB)")
        with tempfile.TemporaryDirectory(prefix=".condor-", dir=cache) as scratch:
            return _fetch(cache, Path(scratch), progress)


def _fetch(cache: Path, scratch: Path, progress: Progress) -> CondorBinaries:
    patchelf = _patchelf()
    packages = _download(scratch, progress)
    condor = next(path for path in packages if path.name.startswith("condor_"))
    version = condor.name.split("_")[1].split("+")[0].split("-")[0]
    tree = scratch / "tree"
    final = cache / f"condor-{version}-{SUITE}-{platform.machine()}"
    progress(f"unpacking HTCondor {version}")
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        for _ in pool.map(lambda path: _run(["dpkg-deb", "-x", path, tree], "unpacking"), packages):
            pass
    for needless in (tree / "usr" / "share" / "doc", tree / "usr" / "lib" / "python3"):
        shutil.rmtree(needless, ignore_errors=True)
    _use_own_libraries(tree, final, patchelf)
    os.rename(tree, final)
    found = _version(final / "usr")
    if found is None:
        raise EmbeddedError(
            f"the HTCondor {version} unpacked from Debian's packages at {final} does not run on this machine; {REMEDY}"
        )
    return CondorBinaries(final / "usr", unpacked=True, version=found)


def _patchelf() -> str:
    scripts = sysconfig.get_path("scripts")
    found = shutil.which("patchelf", path=os.pathsep.join((scripts, os.environ.get("PATH", ""))))
    if found is None:
        raise EmbeddedError("patchelf is missing; install prefect-htcdask[embedded]")
    return found


def _run(command: list[str | Path], doing: str, cwd: Path | None = None) -> str:
    try:
        result = subprocess.run(
            command, cwd=cwd, capture_output=True, text=True, timeout=600, env={**os.environ, "LC_ALL": "C"}
        )
    except FileNotFoundError as error:
        raise EmbeddedError(
            f"HTCondor is not installed on this machine, and {command[0]}, which would bring it from Debian's "
            f"packages, is missing; {REMEDY}"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise EmbeddedError(f"{doing} HTCondor from Debian's packages took over 600 s; {REMEDY}") from error
    if result.returncode != 0:
        last = " ".join(result.stderr.strip().splitlines()[-3:])
        raise EmbeddedError(
            f"HTCondor is not installed on this machine, and {doing} it from Debian's packages failed: {last}; check "
            f"the network and apt's sources, or {REMEDY}"
        )
    return result.stdout


def _download(scratch: Path, progress: Progress) -> list[Path]:
    """Fetch the `condor` package and the libraries it needs; apt resolves them and verifies each."""
    apt = scratch / "apt"
    for part in ("lists/partial", "cache/archives/partial", "sources"):
        (apt / part).mkdir(parents=True)
    (apt / "status").touch()  # nothing is installed, so the closure comes whole, libc included
    own = ["-o", f"Dir::State={apt}", "-o", f"Dir::State::lists={apt}/lists", "-o", f"Dir::Cache={apt}/cache"]
    if os.geteuid() == 0:
        # apt as root changes to a user who cannot write here.
        own += ["-o", "APT::Sandbox::User=root"]
    source = f"Types: deb\nURIs: {_mirror(own)}\nSuites: {SUITE}\nComponents: main\n"
    keyring = next((path for path in KEYRINGS if os.path.exists(path)), None)
    if keyring:
        source += f"Signed-By: {keyring}\n"
    (apt / "sources" / "debian.sources").write_text(source)
    own += ["-o", "Dir::Etc::sourcelist=/dev/null", "-o", f"Dir::Etc::sourceparts={apt}/sources"]
    own += ["-o", f"Dir::State::status={apt}/status"]
    _run(["apt-get", *own, "-qq", "-o", "APT::Update::Error-Mode=any", "update"], "fetching")
    install: list[str | Path] = ["apt-get", *own, "-qq", "-y", "--no-install-recommends", "--print-uris"]
    install += ["install", "condor"]
    # Each line is: 'URI' file size hash
    offered = [line.split() for line in _run(install, "resolving").splitlines() if line.startswith("'")]
    sizes = {file.split("_")[0]: int(size) for _, file, size, *_ in offered}
    needed = [name for name in sizes if name == "condor" or _is_needed(name)]
    packages = scratch / "packages"
    packages.mkdir()
    with telling_of_files(progress, "fetching HTCondor", packages, sum(sizes[name] for name in needed)):
        _run(["apt-get", *own, "-qq", "download", *needed], "fetching", cwd=packages)
    return sorted(packages.glob("*.deb"))


def _is_needed(library: str) -> bool:
    return library.startswith("lib") and not library.startswith(NOT_NEEDED)


def _mirror(own: list[str]) -> str:
    """The address of this machine's Debian mirror, from apt's configuration in whichever format it is."""
    release = platform.freedesktop_os_release()
    if release.get("ID") != "debian":
        raise EmbeddedError(
            f"HTCondor is not installed on this machine, and can be brought only on Debian, not on "
            f"{release.get('PRETTY_NAME', 'this system')}; {REMEDY}"
        )
    codename = release.get("VERSION_CODENAME", SUITE)
    sources = []
    for line in _run(["apt-get", *own, "--print-uris", "update"], "looking for a mirror of").splitlines():
        address = line.split()[0].strip("'")
        base, separator, rest = address.partition("/dists/")
        if separator and rest.endswith("/InRelease"):
            sources.append((base, rest.removesuffix("/InRelease")))
    for base, suite in sources:
        if suite in (SUITE, codename):
            return base
    raise EmbeddedError(
        f"HTCondor is not installed on this machine, and apt's sources name no Debian mirror for {codename}; {REMEDY}"
    )


def _use_own_libraries(tree: Path, final: Path, patchelf: str) -> None:
    """Point each program in `tree`, which will lie at `final`, to the unpacked loader and libraries."""
    library_root = tree / "usr" / "lib"
    loader = next(library_root.glob("*/ld-linux*"), None)
    if loader is None:
        raise EmbeddedError(f"Debian's packages for {platform.machine()} hold no loader; {REMEDY}")
    directories = (loader.parent, library_root, library_root / "condor")
    rpath = ":".join(str(final / directory.relative_to(tree)) for directory in directories)
    settings = ["--set-interpreter", str(final / loader.relative_to(tree)), "--force-rpath", "--set-rpath", rpath]

    def patch(program: Path) -> None:
        with program.open("rb") as file:
            if file.read(4) != b"\x7fELF":
                return
        # A shared object without an interpreter finds its libraries by the program's rpath.
        if subprocess.run([patchelf, "--print-interpreter", program], capture_output=True).returncode == 0:
            _run([patchelf, *settings, program], "patching")

    programs = [
        path
        for part in ("bin", "sbin", "libexec/condor")
        for path in (tree / "usr" / part).glob("*")
        if path.is_file() and not path.is_symlink()
    ]
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        for _ in pool.map(patch, programs):
            pass
