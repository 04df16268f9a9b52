"""The private copy of a token: who may read it, and when it goes."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from prefect_htcdask.condor.token_directory import TokenDirectory, remove_abandoned

MAKER = """
import sys, time
from prefect_htcdask.condor.token_directory import TokenDirectory
print(TokenDirectory("secret").path, flush=True)
time.sleep(300)
"""


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A temporary directory of the test's own, also of the processes that it starts."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path


def make_old(path: Path) -> None:
    os.utime(path, (0, 0))


def test_only_its_owner_can_read_it_and_it_goes_when_closed() -> None:
    token = TokenDirectory("secret")
    assert [path.name for path in token.path.iterdir()] == ["token"]
    assert (token.path / "token").read_text() == "secret\n"
    assert token.path.stat().st_mode & 0o777 == 0o700
    assert (token.path / "token").stat().st_mode & 0o777 == 0o600
    token.close()
    token.close()
    assert not token.path.exists()


def test_what_a_killed_process_left_is_removed_and_a_living_one_s_is_not(temporary: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", MAKER], stdout=subprocess.PIPE, text=True) as maker:
        assert maker.stdout is not None
        path = Path(maker.stdout.readline().strip())
        assert path.parent == temporary
        make_old(path)
        remove_abandoned()
        assert path.exists(), "its maker lives"
        maker.kill()
    own = TokenDirectory("other")  # which looks for abandoned ones
    assert not path.exists() and own.path.exists()
    own.close()


def test_one_that_was_just_made_is_left_alone(temporary: Path) -> None:
    made = temporary / "htcdask-token-young"
    made.mkdir()
    remove_abandoned()
    assert made.exists()
    make_old(made)
    remove_abandoned()
    assert not made.exists()


def test_other_files_in_such_a_directory_stay(temporary: Path) -> None:
    own = temporary / "htcdask-token-thesis"
    own.mkdir()
    (own / "chapter.tex").touch()
    make_old(own)
    remove_abandoned()
    assert (own / "chapter.tex").exists()


def test_no_link_is_followed(temporary: Path) -> None:
    elsewhere = temporary / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "file").touch()
    link = temporary / "htcdask-token-link"
    link.symlink_to(elsewhere)
    os.utime(link, (0, 0), follow_symlinks=False)
    remove_abandoned()
    assert (elsewhere / "file").exists()
