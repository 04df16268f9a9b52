"""The start script of a worker job: the guard, run for real."""

from __future__ import annotations

import importlib.util
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
from dask_gateway_server.tls import new_keypair

from prefect_htcdask.condor.staging import zip_package
from prefect_htcdask.embedded.ports import free_port
from prefect_htcdask.worker import start as worker_start
from tests.support.waiting import wait_until


@pytest.fixture
def sandbox(tmp_path: Path) -> Path:
    """What HTCondor would lay out, for a worker process that a test puts in place of Dask's."""
    for name in (worker_start.SECRETS_FILE, worker_start.KEY_FILE):
        (tmp_path / name).write_text("{}")
        (tmp_path / name).chmod(0o644)
    configure(tmp_path)
    return tmp_path


def configure(sandbox: Path, memory_limit: int = 0, vacate_time: float = 20, **versions: str) -> None:
    config = {"memory_limit": memory_limit, "vacate_time": vacate_time, "versions": versions}
    (sandbox / worker_start.CONFIG_FILE).write_text(json.dumps(config))


def start(sandbox: Path, worker: str, farewell: str = "return 0") -> subprocess.Popen[str]:
    """The guard, over a worker process that runs `worker`, some lines of Python, and takes leave by `farewell`."""
    script = sandbox / "start.py"
    source = Path(worker_start.__file__).read_text()
    functions = ""
    for name, lines in (("run_worker", worker), ("deregister", farewell)):
        body = "\n".join("    " + line for line in lines.splitlines())
        functions += f"def {name}(sandbox):\n{body}\n\n"
    script.write_text(source.replace('if __name__ == "__main__":', f"{functions}if True:"))
    return subprocess.Popen(
        [sys.executable, str(script)],
        env={**os.environ, "_CONDOR_SCRATCH_DIR": str(sandbox)},
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, stderr = process.communicate(timeout=30)
    return process.returncode, stderr


@pytest.mark.parametrize("status", [0, 3])
def test_the_worker_s_exit_status_is_the_job_s(sandbox: Path, status: int) -> None:
    assert finish(start(sandbox, f"return {status}")) == (status, "")


def test_secrets_are_the_owner_s_alone(sandbox: Path) -> None:
    finish(start(sandbox, "return 0"))
    for name in (worker_start.SECRETS_FILE, worker_start.KEY_FILE):
        assert (sandbox / name).stat().st_mode & 0o777 == 0o600


def test_a_worker_that_takes_too_much_memory_is_ended_with_its_children(sandbox: Path) -> None:
    configure(sandbox, memory_limit=120 * 2**20)
    child = "import time; x = bytearray(90 * 2**20); x[::4096] = b'1' * len(x[::4096]); time.sleep(60)"
    process = start(
        sandbox,
        f"children = [subprocess.Popen([sys.executable, '-c', {child!r}]) for _ in range(2)]\n"
        "Path('children').write_text(' '.join(str(c.pid) for c in children))\n"
        "time.sleep(60)",
    )
    status, stderr = finish(process)
    assert status == worker_start.EXIT_MEMORY
    assert "htcdask: the worker used" in stderr and "120 MiB" in stderr and "worker.memory" in stderr
    pids = [int(pid) for pid in (sandbox / "children").read_text().split()]
    wait_until(lambda: not [pid for pid in pids if alive(pid)], 5, "the worker's own processes are gone")


FAMILY = """
import mmap, multiprocessing as mp, os, sys, time
from multiprocessing import shared_memory
size = 64 * 2**20
ready = []

def stay(function=None):
    if function is not None:
        function()
    os.write(1, b"up\\n")
    time.sleep(60)

def touch(memory):
    for at in range(0, size, 4096):
        memory[at]

def start(how, function=None):
    child = mp.get_context(how).Process(target=stay, args=(function,), daemon=True)
    child.start()
"""


MEASURED = {
    # What 4 forked children share with their parent.
    "forked": ("x = bytearray(b'1') * size\nfor _ in range(4): start('fork')\nstay()", 5, 64, 64),
    # What forked children write is their own.
    "written": (
        "x = bytearray(b'1') * size\n"
        "def write():\n    for at in range(0, size, 4096): x[at] = 2\n"
        "for _ in range(4): start('fork', write)\nstay()",
        *(5, 5 * 64, 5 * 64),
    ),
    # A file that 3 processes have mapped.
    "mapped": (
        "with open('data', 'wb') as file: file.write(b'1' * size)\n"
        "file = open('data', 'rb')\nx = mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ)\n"
        "for _ in range(2): start('fork', lambda: touch(x))\ntouch(x)\nstay()",
        *(3, 0, 0),
    ),
    # As joblib does with large arrays: private, and written by nobody.
    "copy on write": (
        "with open('data', 'wb') as file: file.write(b'1' * size)\n"
        "file = open('data', 'rb')\nx = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)\n"
        "for _ in range(2): start('fork', lambda: touch(x))\ntouch(x)\nstay()",
        *(3, 0, 0),
    ),
    # Shared memory is memory, once.
    "shared": (
        "x = shared_memory.SharedMemory(create=True, size=size)\nx.unlink()\nx.buf[:] = b'1' * size\n"
        "for _ in range(3): start('fork', lambda: touch(x.buf))\nstay()",
        *(4, 64, 64),
    ),
}
"""Processes: Python that starts them, how many there are, and MiB that they use, at least and besides their own."""


@pytest.mark.parametrize("how", MEASURED)
def test_memory_is_what_is_used(how: str) -> None:
    """Pages that processes share count once, and the pages of files not at all."""
    code, number, least, most = MEASURED[how]
    # Where /tmp is in memory, its files are memory too.
    with tempfile.TemporaryDirectory(dir="/var/tmp") as directory:
        family = subprocess.Popen(
            [sys.executable, "-c", FAMILY + code], cwd=directory, stdout=subprocess.PIPE, text=True
        )
        measured(family, number, least, most)


def measured(family: subprocess.Popen[str], number: int, least: int, most: int) -> None:
    """Measure processes that come up, and end them."""
    try:
        assert family.stdout is not None
        for _ in range(number):
            assert family.stdout.readline() == "up\n"
        used, resident = worker_start.used_memory_of(family.pid), worker_start.memory_of(family.pid)
        assert least * 2**20 <= used <= (most + 8 * number + 24) * 2**20
        assert resident >= number * 64 * 2**20
        watch = worker_start.MemoryWatch((most + 8 * number + 24) * 2**20)
        assert watch.excess(family.pid) is None
        if least:
            assert worker_start.MemoryWatch(least * 2**20 - 1).excess(family.pid) == pytest.approx(used, rel=0.1)
    finally:
        for pid in [*worker_start.descendants(family.pid), family.pid]:
            os.kill(pid, signal.SIGKILL)
        family.wait(10)


def test_memory_of_a_process_that_does_not_show_its_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another user's, as of a container runtime; the tests run as root, who may read them all."""
    size, real = 64 * 2**20, Path.read_text
    block = bytearray(b"1") * size
    usual = worker_start.used_memory_of(os.getpid())

    def refused(self: Path, *arguments: object, **keywords: object) -> str:
        if self.name in hidden:
            raise PermissionError(13, "Permission denied", str(self))
        return real(self, *arguments, **keywords)  # type: ignore[arg-type]

    hidden = {"smaps_rollup"}
    monkeypatch.setattr(Path, "read_text", refused)
    assert len(block) <= worker_start.used_memory_of(os.getpid()) == pytest.approx(usual, rel=0.2)
    hidden = {"smaps_rollup", "status"}
    assert worker_start.used_memory_of(os.getpid()) >= usual
    hidden = {"smaps_rollup", "status", "statm"}
    assert worker_start.used_memory_of(os.getpid()) == 0


def test_the_pages_are_walked_through_for_a_part_of_the_time_only(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[float] = []
    now = 100.0

    def look(pid: int) -> int:
        nonlocal now
        looks.append(now)
        now += 0.3
        return 50

    monkeypatch.setattr(worker_start.time, "monotonic", lambda: now)  # type: ignore[attr-defined]
    monkeypatch.setattr(worker_start, "used_memory_of", look)
    monkeypatch.setattr(worker_start, "memory_of", lambda pid: 200)
    watch = worker_start.MemoryWatch(100)
    while now < 160:
        assert watch.excess(1) is None
        now += 0.5
    assert 15 <= len(looks) <= 20


def alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_are_passed_on_as_sigterm(sandbox: Path, signum: int) -> None:
    process = start(
        sandbox,
        "signal.signal(signal.SIGTERM, lambda *_: (say('told to leave'), os._exit(7)))\n"
        "Path('up').touch()\n"
        "time.sleep(60)",
    )
    wait_until((sandbox / "up").exists, 20, "the worker runs")
    process.send_signal(signum)
    assert finish(process) == (7, "htcdask: told to leave\n")


DEAF = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nPath('up').touch()\ntime.sleep(60)"


def test_leave_is_taken_for_a_worker_that_does_not_listen(sandbox: Path) -> None:
    configure(sandbox, vacate_time=6)
    process = start(sandbox, DEAF, "say('farewell')\nreturn 0")
    wait_until((sandbox / "up").exists, 20, "the worker runs")
    began = time.monotonic()
    process.terminate()
    status, stderr = finish(process)
    assert (status, stderr.splitlines()[0]) == (0, "htcdask: farewell")
    assert "did not end within its vacate time" in stderr.splitlines()[1]
    assert time.monotonic() - began < 6, "HTCondor would kill the guard then"


def test_a_worker_that_listens_takes_its_leave_itself(sandbox: Path) -> None:
    configure(sandbox, vacate_time=4)
    process = start(
        sandbox,
        "signal.signal(signal.SIGTERM, lambda *_: Path(LEAVING_FILE).touch())\n"
        "Path('up').touch()\n"
        "end = time.monotonic() + 60\n"
        "while time.monotonic() < end:\n"
        "    time.sleep(0.1)",
        "say('farewell')\nreturn 0",
    )
    wait_until((sandbox / "up").exists, 20, "the worker runs")
    process.terminate()
    status, stderr = finish(process)
    assert status == 0 and "farewell" not in stderr and "did not end within its vacate time" in stderr


def test_told_to_leave_before_it_has_begun(sandbox: Path) -> None:
    process = start(sandbox, "Path('up').touch()\ntime.sleep(60)")
    wait_until((sandbox / "up").exists, 20, "the worker runs")
    process.terminate()
    assert finish(process) == (0, "")


def test_nobody_says_farewell_for_a_worker_that_never_joined(sandbox: Path) -> None:
    assert worker_start.deregister(sandbox) == 0


def test_a_killed_worker_is_told_of(sandbox: Path) -> None:
    status, stderr = finish(start(sandbox, "os.kill(os.getpid(), signal.SIGKILL)"))
    assert status == 128 + signal.SIGKILL
    assert "ended by signal SIGKILL" in stderr


def test_descendants_are_found_to_the_last(tmp_path: Path) -> None:
    family = subprocess.Popen(["sh", "-c", "(sleep 60 & sleep 60; true); true"], start_new_session=True)
    try:
        wait_until(lambda: len(worker_start.descendants(family.pid)) == 3, 5, "a shell and two sleepers")
        assert set(worker_start.descendants(family.pid)) == {
            child.pid for child in psutil.Process(family.pid).children(recursive=True)
        }
        assert worker_start.memory_of(family.pid) > 0
    finally:
        os.killpg(family.pid, signal.SIGKILL)
        family.wait()
    assert worker_start.descendants(family.pid) == []
    assert worker_start.memory_of(family.pid) == 0


def test_versions_that_differ_end_the_worker_before_it_starts(sandbox: Path) -> None:
    configure(sandbox, python="2.7", dask="1.0")
    script = shutil.copy(worker_start.__file__, sandbox / "start.py")
    process = subprocess.Popen(
        [sys.executable, script],
        env={**os.environ, "_CONDOR_SCRATCH_DIR": str(sandbox)},
        stderr=subprocess.PIPE,
        text=True,
    )
    status, stderr = finish(process)
    assert status == worker_start.EXIT_VERSIONS
    assert "python" in stderr and "2.7 on the flow's host" in stderr and "dask" in stderr and "worker.python" in stderr
    assert not (sandbox / worker_start.SECRETS_FILE).exists(), "secrets are read once, then gone"


def test_an_installed_package_of_another_version_is_not_used(sandbox: Path, tmp_path: Path) -> None:
    """Neither by the worker nor by the process that speaks to the scheduler for it."""
    installed = tmp_path / "installed" / "prefect_htcdask"
    installed.mkdir(parents=True)
    (installed / "__init__.py").write_text("raise SystemExit('an installed prefect_htcdask was imported')")
    zip_package(sandbox / worker_start.PACKAGE_FILE)
    certificate, key = new_keypair("test")
    (sandbox / worker_start.CERTIFICATE_FILE).write_bytes(certificate)
    (sandbox / worker_start.KEY_FILE).write_bytes(key)
    config = json.loads((sandbox / worker_start.CONFIG_FILE).read_text())
    nobody_there = {"scheduler_address": f"tls://127.0.0.1:{free_port()}", "death_timeout": 1, "nthreads": 1}
    (sandbox / worker_start.CONFIG_FILE).write_text(json.dumps({**config, **nobody_there}))
    (sandbox / worker_start.ADDRESS_FILE).write_text("tls://127.0.0.1:1")
    # The second has nothing to say: this worker speaks for itself.
    for process, outcome in (("run_worker", "could not join the scheduler"), ("speak_for", "")):
        code = f"import runpy, sys; runpy.run_path(sys.argv[1])['{process}'](__import__('pathlib').Path(sys.argv[2]))"
        done = subprocess.run(
            [sys.executable, "-c", code, worker_start.__file__, str(sandbox)],
            env={**os.environ, "PYTHONPATH": str(installed.parent)},
            cwd=sandbox,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert "an installed prefect_htcdask was imported" not in done.stderr
        assert outcome in done.stderr, done.stderr


def test_an_interpreter_without_dask_says_so(sandbox: Path) -> None:
    script = shutil.copy(worker_start.__file__, sandbox / "start.py")
    # -S: no site-packages, as on a bare execute host. The worker process is started by the same interpreter.
    process = subprocess.Popen(
        [sys.executable, "-S", script, "--worker"],
        env={"_CONDOR_SCRATCH_DIR": str(sandbox), "PATH": os.environ["PATH"]},
        stderr=subprocess.PIPE,
        text=True,
    )
    status, stderr = finish(process)
    assert status == worker_start.EXIT_MISSING
    assert "has no distributed" in stderr and "worker.container_image" in stderr


@pytest.mark.parametrize(
    ("ad", "identity"),
    [
        ("ClusterId = 12\nProcId = 3\nNumJobStarts = 2\n", ("12.3", 2)),
        ("ClusterId = 12\nProcId = 3\nNumShadowStarts = 4\nNumJobStarts = 2\nOther = 9\n", ("12.3", 4)),
        ("", ("0.0", 0)),
    ],
)
def test_the_job_s_identity_is_in_its_ad(
    ad: str, identity: tuple[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ad").write_text(ad)
    monkeypatch.setenv("_CONDOR_JOB_AD", str(tmp_path / "ad"))
    assert worker_start.job_identity() == identity


def test_its_first_half_needs_the_standard_library_only() -> None:
    done = subprocess.run(
        [sys.executable, "-S", "-c", "import runpy, sys; runpy.run_path(sys.argv[1])", worker_start.__file__],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert importlib.util.find_spec("distributed") is not None


@pytest.mark.parametrize("stream", ["stderr", "stdout"])
def test_what_a_worker_writes_is_bounded(sandbox: Path, stream: str) -> None:
    """It is kept on the submitting host, whose disk others need too."""
    lines = 400_000
    worker = f"for n in range({lines}):\n    print(f'line {{n:09}}' + 50 * '.', file=sys.{stream})\nreturn 3"
    script = start(sandbox, worker)
    if stream == "stdout":
        script.kill()
        script.wait()
        command = [sys.executable, str(sandbox / "start.py")]
        environment = {**os.environ, "_CONDOR_SCRATCH_DIR": str(sandbox)}
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, timeout=120)
        status, text = done.returncode, done.stdout
    else:
        _, text = script.communicate(timeout=120)
        status = script.returncode
    assert status == 3
    assert 2_000_000 < len(text) < 2_400_000
    assert text.startswith("line 000000000.") and f"line {lines - 1:09}" in text.splitlines()[-1]
    assert "bytes are left out here]" in text


def test_a_worker_is_quiet_while_the_submitting_host_s_disk_is_full(sandbox: Path) -> None:
    worker = (
        "def write(text, word):\n    print(text, file=sys.stderr, flush=True)\n"
        "    while not Path(word).exists():\n        time.sleep(0.02)\n"
        "write('before', 'read')\nbe_quiet(sandbox, True)\nPath('is-quiet').touch()\nwrite('within', 'room')\n"
        "be_quiet(sandbox, False)\nwrite('after', 'full')\nbe_quiet(sandbox, True)\n"
        "print('at the end', file=sys.stderr)\nreturn 0"
    )
    process = start(sandbox, worker)
    assert process.stderr is not None and process.stderr.readline() == "before\n"
    (sandbox / "read").touch()
    wait_until((sandbox / "is-quiet").exists, 60, "it is to be quiet")
    assert select.select([process.stderr], [], [], 1.0)[0] == []
    (sandbox / "room").touch()
    assert [process.stderr.readline() for _ in range(2)] == ["within\n", "after\n"]
    (sandbox / "full").touch()
    status, stderr = finish(process)
    assert (status, stderr) == (0, ""), "what it says while nobody can take it is lost"


def test_a_process_that_the_worker_leaves_behind_does_not_keep_the_job(sandbox: Path) -> None:
    worker = (
        "child = subprocess.Popen(['sleep', '60'], start_new_session=True)\n"
        "Path('child').write_text(str(child.pid))\nprint('last', file=sys.stderr, flush=True)\nreturn 0"
    )
    began = time.monotonic()
    process = start(sandbox, worker)
    try:
        assert process.stderr is not None and process.stderr.readline() == "last\n"
        assert process.wait(30) == 0 and time.monotonic() - began < 25
    finally:
        os.kill(int((sandbox / "child").read_text()), signal.SIGKILL)


def test_a_job_that_starts_again_says_so_first(sandbox: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its stderr goes on in the file of the start before."""
    ad = sandbox / ".job.ad"
    monkeypatch.setenv("_CONDOR_JOB_AD", str(ad))
    for starts, said in ((1, ""), (2, "--- start 2 of HTCondor job 7.3 on ")):
        ad.write_text(f"ClusterId = 7\nProcId = 3\nNumJobStarts = {starts - 1}\nNumShadowStarts = {starts}\n")
        (sandbox / worker_start.SECRETS_FILE).write_text("{}")
        _, stderr = finish(start(sandbox, "return 0"))
        assert stderr.startswith(said) and bool(stderr) == bool(said)
