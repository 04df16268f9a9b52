"""A headless browser for tests of web pages: the machine's chromium, or Debian's packages in the user's cache.

The packages that the machine lacks are fetched and verified by apt itself, in a private state directory and from the
machine's own sources, and unpacked: that needs no root and leaves the system untouched.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import platformdirs
from filelock import FileLock

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    # Containers often have a small /dev/shm.
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
)

FONTS = """<?xml version="1.0"?>
<fontconfig>
  <dir>/usr/share/fonts</dir>
  <dir>{fonts}</dir>
  <cachedir>{cache}</cachedir>
</fontconfig>
"""


class BrowserError(RuntimeError):
    """There is no browser, and none can be had. The message says why."""


@dataclass(frozen=True)
class Chromium:
    """Where the programs are.

    Attributes:
        browser: chromium's.
        driver: chromedriver's.
        environment: what both need in addition.
    """

    browser: Path
    driver: Path
    environment: dict[str, str] = field(default_factory=dict)


def chromium() -> Chromium:
    """The machine's chromium, or else the cached one, or else one fetched now (some 130 MB at most).

    Raises:
        BrowserError: where chromium is not installed and cannot be had.
    """
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if browser and driver:
        return Chromium(Path(browser), Path(driver))
    cache = platformdirs.user_cache_path("prefect-htcdask")
    cache.mkdir(parents=True, exist_ok=True)
    tree = cache / "chromium"
    with FileLock(cache / "chromium.lock"):
        if tree.exists() and not _runs(_in_tree(tree)):
            shutil.rmtree(tree)  # the machine has changed since
        if not tree.exists():
            with tempfile.TemporaryDirectory(prefix=".chromium-", dir=cache) as scratch:
                _unpack(_download(Path(scratch)), Path(scratch) / "tree")
                (Path(scratch) / "tree").rename(tree)
    found = _in_tree(tree)
    if not _runs(found):
        raise BrowserError(f"the chromium unpacked from Debian's packages at {tree} does not run on this machine")
    return found


def _in_tree(tree: Path) -> Chromium:
    libraries = sorted({path.parent for path in (tree / "usr" / "lib").glob("**/*.so*") if path.is_file()})
    own = [str(path) for path in libraries if "chromium" not in path.relative_to(tree).parts]
    fonts = tree / "fonts.conf"
    fonts.write_text(FONTS.format(fonts=tree / "usr" / "share" / "fonts", cache=tree / "fonts-cache"))
    environment = {
        "LD_LIBRARY_PATH": os.pathsep.join([*own, *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]),
        "FONTCONFIG_FILE": str(fonts),
    }
    # /usr/bin/chromium is a script that looks for the browser at its installed place.
    return Chromium(tree / "usr/lib/chromium/chromium", tree / "usr/bin/chromedriver", environment)


def _runs(found: Chromium) -> bool:
    environment = {**os.environ, **found.environment}
    for program in (found.browser, found.driver):
        try:
            subprocess.run([program, "--version"], env=environment, capture_output=True, check=True, timeout=60)
        except (OSError, subprocess.SubprocessError):
            return False
    return True


def _download(scratch: Path) -> list[Path]:
    """Fetch those packages that the machine lacks; apt resolves them and verifies each."""
    for part in ("lists/partial", "cache/archives/partial"):
        (scratch / part).mkdir(parents=True)
    apt = ["apt-get", "-qq", "-o", f"Dir::State::lists={scratch}/lists", "-o", f"Dir::Cache={scratch}/cache"]
    if os.geteuid() == 0:
        # apt as root changes to a user who cannot write here.
        apt += ["-o", "APT::Sandbox::User=root"]
    _run([*apt, "-o", "APT::Update::Error-Mode=any", "update"])
    install = ["-y", "--no-install-recommends", "--print-uris", "install", "chromium", "chromium-driver"]
    # Each line is: 'URI' file size hash
    names = [line.split()[1].split("_")[0] for line in _run([*apt, *install]).splitlines() if line.startswith("'")]
    packages = scratch / "packages"
    packages.mkdir()
    _run([*apt, "download", *names], cwd=packages)
    return sorted(packages.glob("*.deb"))


def _unpack(packages: list[Path], tree: Path) -> None:
    for package in packages:
        _run(["dpkg-deb", "-x", str(package), str(tree)])


def _run(command: list[str], cwd: Path | None = None) -> str:
    try:
        done = subprocess.run(
            command, cwd=cwd, capture_output=True, text=True, timeout=600, env={**os.environ, "LC_ALL": "C"}
        )
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise BrowserError(f"chromium is not installed, and {command[0]} cannot bring it: {exc}") from exc
    if done.returncode != 0:
        last = " ".join(done.stderr.strip().splitlines()[-3:])
        raise BrowserError(f"chromium is not installed, and bringing it from Debian's packages failed: {last}")
    return done.stdout


@contextmanager
def browser(profile: Path, *, width: int = 1400, height: int = 1600) -> Iterator[Any]:
    """A browser of one's own while the block lasts: a selenium driver.

    Args:
        profile: directory for its profile, which does not exist yet.
        width, height: of its window, in pixels.

    Raises:
        BrowserError: there is none.
    """
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    found = chromium()
    options = webdriver.ChromeOptions()
    options.binary_location = str(found.browser)
    for flag in (*FLAGS, f"--user-data-dir={profile}", f"--window-size={width},{height}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = Service(executable_path=str(found.driver), env={**os.environ, **found.environment})
    driver = webdriver.Chrome(options=options, service=service)
    try:
        yield driver
    finally:
        driver.quit()
