"""Make `.venv` in this checkout: an environment with this package and all that its flows and tests need.

Needs nothing but a Python interpreter's standard library and, where that Python came without pip, Debian's
`apt-get download` (which needs no privilege). pip and apt are used as they are configured on this machine.
Runs in a fraction of a second when there is nothing to do.
"""

from __future__ import annotations

import fcntl
import glob
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time

SUPPORTED = ((3, 10), (3, 13))
CHECKOUT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
VENV = os.path.join(CHECKOUT, ".venv")
VENV_PYTHON = os.path.join(VENV, "bin", "python")
STAMP = os.path.join(VENV, ".stamp")
CONSTRAINTS = os.path.join(CHECKOUT, "constraints.txt")
EXTRAS = "bench"  # holds the others


class BootstrapError(Exception):
    """The environment cannot be made; the message says why and what to do."""


def main() -> int:
    _use_supported_python()
    digest = _digest()
    if _is_ready(digest):
        return 0
    if not os.access(CHECKOUT, os.W_OK):
        raise BootstrapError(
            f"{CHECKOUT} is not writable for you, and its .venv "
            + ("cannot be run by you" if os.path.lexists(VENV) else "is missing")
            + "; use a clone of your own: git clone "
            + CHECKOUT
        )
    with _lock():
        if _is_ready(digest):  # made by another run while this one waited
            return 0
        started = time.monotonic()
        _say(f"Setting up .venv with Python {sys.version.split()[0]} (once; needs the network)")
        _create()
        _install()
        with open(STAMP, "w") as stamp:
            stamp.write(digest)
        _say(f"Set up in {time.monotonic() - started:.0f} s")
    return 0


def _use_supported_python() -> None:
    """Go on with a Python of a supported version, should `python3` be another."""
    lowest, highest = SUPPORTED
    if lowest <= sys.version_info[:2] <= highest:
        return
    for minor in range(highest[1], lowest[1] - 1, -1):
        found = shutil.which(f"python3.{minor}")
        if found and _runs(found):
            os.execv(found, [found, *sys.argv])
    raise BootstrapError(
        "Python {}.{} to {}.{} is needed; {} is {}.{}. Install one, or name it: make PYTHON=/path/to/python3".format(
            *lowest, *highest, sys.executable, *sys.version_info[:2]
        )
    )


def _digest() -> str:
    """What the environment is made from; another value means that it has to be brought up to date."""
    content = hashlib.sha256(f"{EXTRAS}\n".encode())
    for path in (os.path.join(CHECKOUT, "pyproject.toml"), CONSTRAINTS, os.path.abspath(__file__)):
        with open(path, "rb") as file:
            content.update(file.read())
    return f"{CHECKOUT} {content.hexdigest()}"


def _stamp() -> str:
    try:
        with open(STAMP) as stamp:
            return stamp.read()
    except OSError:
        return ""


def _is_ready(digest: str) -> bool:
    return _stamp() == digest and _runs(VENV_PYTHON)


def _runs(python: str) -> bool:
    """Whether this user can run it: others cannot run what root made from an interpreter of its own."""
    try:
        return subprocess.run([python, "-c", ""], capture_output=True, timeout=60).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def _lock() -> object:
    """An open file, locked until it is closed: one run at a time changes the environment."""
    os.makedirs(os.path.join(CHECKOUT, ".cache"), exist_ok=True)
    file = open(os.path.join(CHECKOUT, ".cache", "bootstrap.lock"), "w")  # noqa: SIM115
    fcntl.flock(file, fcntl.LOCK_EX)
    return file


def _create() -> None:
    moved = not _stamp().startswith(f"{CHECKOUT} ")  # never finished, or copied from elsewhere
    if moved or not _runs(VENV_PYTHON):
        if os.path.islink(VENV):
            os.unlink(VENV)
        elif os.path.lexists(VENV):
            shutil.rmtree(VENV)
        import venv  # its absence is an error of its own, told by `_explained`

        venv.EnvBuilder(symlinks=True, with_pip=False).create(VENV)
        _bring_pip()


def _bring_pip() -> None:
    try:
        import ensurepip  # noqa: F401  Debian ships it in a package of its own
    except ImportError:
        wheel = _find_pip_wheel()
        _run([VENV_PYTHON, os.path.join(wheel, "pip"), "install", "--quiet", "-c", CONSTRAINTS, "pip"])
    else:
        _run([VENV_PYTHON, "-m", "ensurepip", "--default-pip"])


def _find_pip_wheel() -> str:
    """A pip to install pip with: Debian's wheel of it, from this machine or its package archive."""
    here = "/usr/share/python-wheels"
    for directory in (here, os.path.join(_cache_directory(), here[1:])):
        wheels = sorted(glob.glob(os.path.join(directory, "pip-*.whl")))
        if wheels:
            return wheels[-1]
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        raise BootstrapError(
            f"{sys.executable} has no ensurepip, and this is no Debian to bring pip from; "
            "install Python's venv and pip modules with your system's package manager"
        )
    _say("Bringing pip from Debian's package python3-pip-whl")
    with tempfile.TemporaryDirectory(prefix="bootstrap-") as scratch:
        debs = download_deb("python3-pip-whl", scratch)
        _run(["dpkg-deb", "-x", debs, _cache_directory()])
    return sorted(glob.glob(os.path.join(_cache_directory(), here[1:], "pip-*.whl")))[-1]


def download_deb(package: str, scratch: str) -> str:
    """Download one package without privilege, from the archives that apt is configured with.

    The machine's own package lists are used where there are some; else apt gets private ones.
    """
    for part in ("lists/partial", "archives/partial"):
        os.makedirs(os.path.join(scratch, part))
    common = [
        "apt-get",
        "--quiet=2",
        *("-o", f"Dir::Cache={scratch}", "-o", "Dir::Cache::archives=archives/"),
        # As root apt would change to a user that cannot write to the scratch directory.
        *("-o", "APT::Sandbox::User=root"),
    ]
    private = ["-o", f"Dir::State::lists={scratch}/lists/", "-o", "Dir::State::status=/var/lib/dpkg/status"]
    try:
        _run([*common, "download", package], cwd=scratch)
    except BootstrapError:
        _run([*common, *private, "update"], cwd=scratch)
        _run([*common, *private, "download", package], cwd=scratch)
    return glob.glob(os.path.join(scratch, f"{package}_*.deb"))[0]


def _cache_directory() -> str:
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    path = os.path.join(base, "prefect-htcdask", "bootstrap")
    try:
        os.makedirs(path, mode=0o700, exist_ok=True)
    except OSError as exc:
        raise BootstrapError(f"cannot make {path} ({exc.strerror}); XDG_CACHE_HOME sets another place") from exc
    return path


def _install() -> None:
    pip = [VENV_PYTHON, "-m", "pip", "install", "--no-input", "--disable-pip-version-check"]
    pip += ["-c", CONSTRAINTS]
    # setuptools first, so that the editable install needs no build environment with versions of its own.
    _run([*pip, "pip", "setuptools"])
    _run([*pip, "--no-compile", "--no-build-isolation", "--editable", f"{CHECKOUT}[{EXTRAS}]"])
    # All cores at once, where pip would use one; a file that does not compile is its package's affair.
    compile_all = [VENV_PYTHON, "-m", "compileall", "-q", "-q", "-j", "0", os.path.join(VENV, "lib")]
    subprocess.run(compile_all, capture_output=True)


def _run(command: list[str], cwd: str | None = None) -> None:
    done = subprocess.run(
        command,
        cwd=cwd or CHECKOUT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "LC_ALL": "C.UTF-8", "PIP_USER": "0"},
        text=True,
    )
    if done.returncode:
        tail = "\n".join(done.stdout.strip().splitlines()[-15:])
        raise BootstrapError(f"`{' '.join(command)}` failed:\n{tail}")


def _say(text: str) -> None:
    print(f"[setup] {text}", flush=True)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BootstrapError as exc:
        sys.exit(f"[setup] {exc}")
    except KeyboardInterrupt:
        sys.exit("[setup] interrupted; the next run begins again")
