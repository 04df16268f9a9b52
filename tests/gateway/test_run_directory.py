"""What is deleted of old clusters, and that nothing else is: whatever the directory, the links and the clocks."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from prefect_htcdask.condor.staging import RunDirectory
from prefect_htcdask.condor.submit_description import FlowRunTag, cluster_digest
from prefect_htcdask.embedded.errors import EmbeddedError
from prefect_htcdask.embedded.state import State, StateDirectory
from prefect_htcdask.gateway import run_directory as run_files
from prefect_htcdask.gateway.run_directory import prune, record_cluster, run_directory
from prefect_htcdask.settings import load_settings

DAY = 86400.0
TAG = FlowRunTag("0198", "tidy-fox", "analysis")


def age(path: Path, seconds: float) -> None:
    """Make a path, and all that is below it, so old."""
    when = time.time() - seconds
    for each in [*path.rglob("*"), path] if path.is_dir() and not path.is_symlink() else [path]:
        os.utime(each, (when, when), follow_symlinks=False)


def a_cluster(base: Path, name: str = "c1", *, old: float, flow_run: bool = True) -> RunDirectory:
    """What a cluster leaves whose supervisor and flow are gone."""
    directory = RunDirectory(base / cluster_digest(name))
    directory.prepare()
    if flow_run:
        record_cluster(directory.path, TAG, lease=60)
        record = directory.path / "cluster.json"
        record.write_text(record.read_text().replace(f'"pid": {os.getpid()}', '"pid": 4194303'))
    directory.stage("default", {}, tls_cert="c", tls_key="k", secrets={"KEY": "s"}, log_is_local=True)
    (directory.logs / "worker.7.0.err").write_text("said")
    directory.event_log.write_text("000 ...\n")
    for name in ("supervisor.log", "supervisor-0123456789ab.log", "failures.jsonl", "summary.json", "report.md"):
        (directory.path / name).write_text("x")
    if directory._held is not None:
        os.close(directory._held)  # as its process's end does
    age(directory.path, old)
    return directory


@pytest.mark.parametrize("flow_run", [True, False])
def test_an_old_cluster_is_deleted_whole_and_a_young_one_is_kept(tmp_path: Path, flow_run: bool) -> None:
    old = a_cluster(tmp_path, "old", old=8 * DAY, flow_run=flow_run)
    young = a_cluster(tmp_path, "young", old=6 * DAY, flow_run=flow_run)
    fresh = a_cluster(tmp_path, "fresh", old=600, flow_run=flow_run)
    prune(tmp_path, 7 * DAY, 60)
    assert not old.path.exists()
    assert (young.logs / "worker.7.0.err").read_text() == "said"
    assert not young.staging.exists(), "secrets of a dead one go sooner"
    assert (fresh.staging / "default" / "worker_secrets.json").exists()


def test_what_else_is_in_the_directory_stays(tmp_path: Path) -> None:
    """A directory that there was before, with the user's own work in it, old and new."""
    thesis = tmp_path / "thesis"
    (thesis / "staging").mkdir(parents=True)
    (thesis / "logs").mkdir()
    (thesis / "chapter1.tex").write_text("today")
    (thesis / "staging" / "worker_secrets.json").write_text("mine")
    (thesis / "cluster.json").write_text("{}")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "supervisor-of-my-thesis.log").write_text("mine")
    (tmp_path / "link").symlink_to(thesis)
    copy = tmp_path / "kept-for-the-paper"
    subprocess.run(["cp", "-a", a_cluster(tmp_path, "old", old=8 * DAY).path, copy], check=True)
    for path in tmp_path.iterdir():
        age(path, 400 * DAY)
    (thesis / "chapter2.tex").write_text("of today, in a directory that looks old")
    age_of = time.time() - 400 * DAY
    os.utime(thesis, (age_of, age_of))
    before = {path for path in tmp_path.rglob("*") if not path.is_relative_to(tmp_path / cluster_digest("old"))}
    prune(tmp_path, 7 * DAY, 60)
    assert {*tmp_path.rglob("*")} == before, "the copy under another name is the user's own, too"


def test_in_a_cluster_s_directory_only_files_of_ours_are_deleted(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "worker.7.0.err").write_text("mine")
    base = tmp_path / "runs"
    cluster = a_cluster(base, "old", old=0)
    (cluster.path / "plot.pdf").write_text("mine")
    (cluster.logs / "worker.8.0.err").symlink_to(elsewhere / "worker.7.0.err")
    (cluster.staging / "linked").symlink_to(elsewhere)
    age(cluster.path, 8 * DAY)
    prune(base, 7 * DAY, 60)
    left = {str(path.relative_to(cluster.path)) for path in cluster.path.rglob("*")}
    assert left == {"plot.pdf", ".htcdask", "logs", "logs/worker.8.0.err", "staging", "staging/linked"}
    assert (elsewhere / "worker.7.0.err").read_text() == "mine"


def test_logs_and_staging_that_lead_elsewhere_are_not_followed(tmp_path: Path) -> None:
    base, elsewhere = tmp_path / "runs", tmp_path / "elsewhere"
    cluster = a_cluster(base, "old", old=0)
    cluster.staging.rename(elsewhere)
    cluster.staging.symlink_to(elsewhere)
    inside = {*elsewhere.rglob("*")}
    age(cluster.path, 8 * DAY)
    prune(base, 7 * DAY, 60)
    cluster.clear_staging()
    assert {*elsewhere.rglob("*")} == inside


def test_the_newest_of_its_files_says_how_old_it_is(tmp_path: Path) -> None:
    cluster = a_cluster(tmp_path, "old", old=8 * DAY)
    os.utime(cluster.logs / "worker.7.0.err")
    prune(tmp_path, 7 * DAY, 60)
    assert cluster.staging.exists() and cluster.event_log.exists()


HOLDER = """
import sys
from pathlib import Path
from prefect_htcdask.condor.staging import RunDirectory
directory = RunDirectory(Path(sys.argv[1]))
directory.prepare()
print("held", flush=True)
sys.stdin.read()
"""


def test_a_living_cluster_is_safe_whatever_the_clock_says(tmp_path: Path) -> None:
    cluster = a_cluster(tmp_path, "living", old=8 * DAY)
    command = [sys.executable, "-c", HOLDER, str(cluster.path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        age(cluster.path, 8 * DAY)
        before = {*tmp_path.rglob("*")}
        prune(tmp_path, 7 * DAY, 60)
        assert {*tmp_path.rglob("*")} == before
        holder.kill()
    prune(tmp_path, 7 * DAY, 60)
    assert not cluster.path.exists(), "a killed supervisor's lock is gone with it"


def test_a_cluster_whose_flow_lives_is_safe_too(tmp_path: Path) -> None:
    cluster = a_cluster(tmp_path, "living", old=0)
    record_cluster(cluster.path, TAG, lease=60)
    assert f'"pid": {psutil.Process().pid}' in (cluster.path / "cluster.json").read_text()
    age(cluster.path, 8 * DAY)
    prune(tmp_path, 7 * DAY, 60)
    assert (cluster.staging / "default").exists()


def test_a_cluster_of_a_longer_lease_is_not_dead_sooner(tmp_path: Path) -> None:
    cluster = a_cluster(tmp_path, "long", old=0)
    record = cluster.path / "cluster.json"
    record.write_text(record.read_text().replace('"lease": 60', '"lease": 86400'))
    age(cluster.path, 1.5 * DAY)
    prune(tmp_path, 7 * DAY, 60)
    assert cluster.staging.exists()


def test_the_clock_of_the_file_system_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mock: no file server of another clock is at hand."""
    cluster = a_cluster(tmp_path, "c1", old=600)
    monkeypatch.setattr(time, "time", lambda: 4e9)
    prune(tmp_path, 7 * DAY, 60)
    assert cluster.staging.exists()
    monkeypatch.setattr(run_files, "clock_of", lambda _: 4e9)
    prune(tmp_path, 7 * DAY, 60)
    assert not cluster.path.exists()


def test_logs_of_supervisors_that_had_no_cluster_go_with_time(tmp_path: Path) -> None:
    old, young = tmp_path / "supervisor-0123456789ab.log", tmp_path / "supervisor-0123456789ac.log"
    old.touch()
    young.touch()
    age(old, 8 * DAY)
    prune(tmp_path, 7 * DAY, 60)
    assert not old.exists() and young.exists()


def test_a_directory_of_somebody_else_s_is_not_used(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a directory away")
    taken = tmp_path / "taken"
    taken.mkdir()
    os.chown(taken, 65534, 65534)
    with pytest.raises(PermissionError, match="somebody else"):
        RunDirectory(taken).prepare()
    cluster = a_cluster(tmp_path, "given", old=8 * DAY)
    os.chown(cluster.path, 65534, 65534)
    prune(tmp_path, 7 * DAY, 60)
    assert cluster.staging.exists()


def test_a_relative_directory_is_the_same_from_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("PREFECT_INTEGRATIONS_HTCDASK_CONDOR_DIRECTORY", "scratch/runs")
    monkeypatch.setenv("PREFECT_INTEGRATIONS_HTCDASK_EMBEDDED_DIRECTORY", "~/pool")
    monkeypatch.setenv("PREFECT_INTEGRATIONS_HTCDASK_CONDOR_TOKEN_FILE", "token")
    for place in (tmp_path, home):
        monkeypatch.chdir(place)
        settings = load_settings()
        assert run_directory(settings, "c1") == home / "scratch/runs/c1"
        assert settings.embedded.directory == str(home / "pool")
        assert settings.condor.token_file == str(place / "token"), "a file that is read is named where one stands"
    monkeypatch.chdir(tmp_path)
    assert settings.condor.token_file == str(home / "token"), "once"
    assert load_settings(condor={"directory": ""}).condor.directory is None


def test_the_embedded_pool_takes_no_directory_that_holds_other_files(tmp_path: Path) -> None:
    (tmp_path / "condor" / "spool").mkdir(parents=True)
    (tmp_path / "condor" / "spool" / "thesis.tex").touch()
    tmp_path.chmod(0o755)
    with pytest.raises(EmbeddedError, match=r"embedded\.directory"):
        StateDirectory(tmp_path).create()
    assert tmp_path.stat().st_mode & 0o777 == 0o755
    own = StateDirectory(tmp_path / "own")
    own.create()
    own.create()
    own.write(State(phase="stopped"))
    own.mark_file.unlink()  # as an earlier version left it
    own.create()
