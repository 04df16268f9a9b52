"""HTCondor's binaries: found, or brought from Debian with apt as this machine configures it."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from prefect_htcdask.embedded import condor_binaries as module
from prefect_htcdask.embedded.condor_binaries import condor_binaries, installed
from prefect_htcdask.embedded.errors import EmbeddedError
from prefect_htcdask.embedded.progress import Fetched

MIRROR = "http://mirror.invalid/somewhere/debian"

FORMATS = {
    "debian.list": (
        "# comment\n"
        "deb [arch=amd64] http://other.invalid/apt stable main\n"
        "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] {mirror} {suite} main contrib\n"
    ),
    "debian.sources": (
        "Types: deb\nURIs: http://other.invalid/apt\nSuites: stable\nComponents: main\n\n"
        "Types: deb\nURIs: {mirror}\nSuites: {suite} {suite}-updates\nComponents: main\n"
    ),
}


@pytest.fixture
def apt_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that apt takes its sources from, instead of the machine's."""
    sources = tmp_path / "sources.d"
    sources.mkdir()
    config = tmp_path / "apt.conf"
    config.write_text(f'Dir::Etc::sourcelist "/dev/null";\nDir::Etc::sourceparts "{sources}";\n')
    monkeypatch.setenv("APT_CONFIG", str(config))
    return sources


@pytest.fixture
def no_condor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a machine that has HTCondor look like one that has not."""
    if installed() is not None:
        monkeypatch.setattr(module, "installed", lambda: None)


def own_state(tmp_path: Path) -> list[str]:
    (tmp_path / "state" / "lists" / "partial").mkdir(parents=True)
    return ["-o", f"Dir::State={tmp_path}/state", "-o", f"Dir::State::lists={tmp_path}/state/lists"]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("suite", ["bookworm", "trixie"])
def test_the_mirror_is_the_machines_own(
    name: str, suite: str, apt_sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = {"ID": "debian", "VERSION_CODENAME": suite}
    monkeypatch.setattr(module.platform, "freedesktop_os_release", lambda: release)
    (apt_sources / name).write_text(FORMATS[name].format(mirror=MIRROR, suite=suite))
    assert module._mirror(own_state(tmp_path)) == MIRROR


def test_a_copy_that_answers_late_is_kept(no_condor: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pool may run on it: a busy machine is no damage."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(module, "VERSION_TIMEOUT", 0.5)
    name = f"condor-23.9.6-{module.SUITE}-{module.platform.machine()}"
    program = tmp_path / module.APPLICATION / name / "usr" / "bin" / "condor_version"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\nexec sleep 600\n")
    program.chmod(0o700)
    with pytest.raises(EmbeddedError, match="did not end within"):
        condor_binaries(lambda message: None)
    assert program.exists()


def test_no_mirror_is_a_clear_error(apt_sources: Path, tmp_path: Path) -> None:
    (apt_sources / "other.list").write_text("deb http://other.invalid/apt stable main\n")
    with pytest.raises(EmbeddedError, match=r"name no Debian mirror.*install HTCondor"):
        module._mirror(own_state(tmp_path))


def test_another_system_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = {"ID": "other", "PRETTY_NAME": "Other Linux 9"}
    monkeypatch.setattr(module.platform, "freedesktop_os_release", lambda: other)
    with pytest.raises(EmbeddedError, match=r"Other Linux 9.*install HTCondor"):
        module._mirror(own_state(tmp_path))


def test_a_mirror_out_of_reach_is_a_clear_error(
    apt_sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_condor: None
) -> None:
    (apt_sources / "debian.list").write_text("deb http://127.0.0.1:9/debian bookworm main\n")
    monkeypatch.setattr(
        module.platform, "freedesktop_os_release", lambda: {"ID": "debian", "VERSION_CODENAME": "bookworm"}
    )
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(EmbeddedError, match=r"fetching it from Debian's packages failed.*check the network"):
        condor_binaries(lambda message: None)
    assert [path.name for path in (tmp_path / "cache" / "prefect-htcdask").iterdir()] == ["condor.lock"]


def test_no_apt_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_condor: None) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(module.platform, "freedesktop_os_release", lambda: {"ID": "debian"})
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EmbeddedError, match=r"apt-get.*is missing; install HTCondor.*gateway\.address"):
        condor_binaries(lambda message: None)


def test_an_installed_htcondor_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = condor_binaries(lambda message: None)
    (tmp_path / "sbin").mkdir()
    (tmp_path / "sbin" / "condor_master").symlink_to(real.master)
    monkeypatch.setenv("PATH", f"{tmp_path}/sbin:{os.environ['PATH']}")
    found = condor_binaries(lambda message: None)
    assert (found.release, found.unpacked, found.version) == (real.release, False, real.version)


@pytest.mark.daemons
def test_brought_from_debian_once_and_then_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_condor: None
) -> None:
    """From this machine's mirror, for real; the second time needs neither apt nor network."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    told: list[str] = []
    first = condor_binaries(told.append)
    assert told and first.unpacked and first.release.is_relative_to(tmp_path)
    fetched = [message for message in told if isinstance(message, Fetched)]
    assert fetched[-1].done == fetched[-1].total > 10_000_000, "all bytes that apt announced have arrived"
    assert [message.done for message in fetched] == sorted({message.done for message in fetched})
    for program in (first.master, first.libexec / "condor_shared_port", first.release / "sbin" / "condor_starter"):
        command = [module._patchelf(), "--print-interpreter", str(program)]
        loader = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        assert Path(loader).is_relative_to(tmp_path)
    told.clear()
    monkeypatch.setenv("PATH", os.path.dirname(shutil.which("true") or "/bin/true"))
    monkeypatch.setenv("APT_CONFIG", "/nonexistent")
    assert condor_binaries(told.append) == first
    assert told == []


@pytest.mark.daemons
def test_a_damaged_copy_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_condor: None) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    broken = tmp_path / "prefect-htcdask" / f"condor-1.0-{module.SUITE}-{module.platform.machine()}"
    (broken / "usr" / "bin").mkdir(parents=True)
    assert condor_binaries(lambda message: None).version != "1.0"
    assert not broken.exists()
