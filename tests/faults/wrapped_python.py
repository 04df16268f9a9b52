"""Interpreters for worker jobs that put their worker where a fault can be made: a small disk, a network of its own."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

_SMALL_SCRATCH = """\
#!/bin/sh
# The job's scratch directory becomes a small file system, with what HTCondor put there.
set -eu
if [ "${{1-}}" != --inside ]; then
    exec {unshare} --user --map-current-user --keep-caps --mount "$0" --inside "$@"
fi
shift
new=$(mktemp -d "$_CONDOR_SCRATCH_DIR/small.XXXXXX")
mount -t tmpfs -o size={megabytes}m,mode=0700 tmpfs "$new"
for file in "$_CONDOR_SCRATCH_DIR"/* "$_CONDOR_SCRATCH_DIR"/.[!.]*; do
    if [ "$file" != "$new" ] && [ -e "$file" ]; then cp -a "$file" "$new"; fi
done
mount --move "$new" "$_CONDOR_SCRATCH_DIR"
cd "$_CONDOR_SCRATCH_DIR"
exec {python} "$@"
"""


def small_scratch(directory: Path, megabytes: int) -> tuple[Path, str]:
    """An interpreter whose job has a scratch directory of so many megabytes.

    Returns:
        its path, and why it cannot be had here; empty where it can.
    """
    unshare = shutil.which("unshare")
    if unshare is None:
        return directory, "there is no unshare(1) to give a job a file system of its own"
    trial = [unshare, "--user", "--map-current-user", "--keep-caps", "--mount", "mount", "-t", "tmpfs", "none", "/tmp"]
    tried = subprocess.run(trial, capture_output=True, text=True)
    if tried.returncode != 0:
        return directory, f"user namespaces that may mount are not to be had: {tried.stderr.strip()}"
    text = _SMALL_SCRATCH.format(unshare=unshare, megabytes=megabytes, python=sys.executable)
    return _written(directory / "python-small-scratch", text), ""


_OWN_NETWORK = """\
#!/bin/sh
# The first worker gets a network of its own, into which somebody else puts an interface; the others share the host's.
set -eu
if [ "${{1-}}" != --inside ]; then
    if mkdir {claim} 2>/dev/null; then
        exec {unshare} --user --map-current-user --net "$0" --inside "$@"
    fi
    exec {python} "$@"
fi
shift
echo $$ > {claim}/pid.part
mv {claim}/pid.part {claim}/pid
while ! [ -e {claim}/ready ]; do sleep 0.05; done
exec {python} "$@"
"""


def own_network(directory: Path) -> tuple[Path, Path]:
    """An interpreter whose first job has a network namespace of its own.

    Returns:
        its path, and a directory in which it leaves its process id as `pid` and waits for a file `ready`.
    """
    unshare = shutil.which("unshare")
    claim = directory / "claim"
    text = _OWN_NETWORK.format(unshare=unshare, claim=claim, python=sys.executable)
    return _written(directory / "python-own-network", text), claim


def _written(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path
