"""What a caller orders of the keeper that it starts, handed over in a private file."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from prefect_htcdask.embedded.condor_binaries import CondorBinaries
from prefect_htcdask.embedded.state import StateDirectory
from prefect_htcdask.utils.private_file import write_private


@dataclass(frozen=True)
class LaunchOrder:
    """What to start.

    Attributes:
        id: tells this order from others.
        username: the gateway's only user.
        idle_timeout: seconds without jobs and clusters after which to stop; 0: never.
        binaries: HTCondor's programs for a personal pool; `None` for none.
        cpus: cores that the pool offers; `None` for the machine's.
        memory: bytes that the pool offers; `None` for the machine's.
        identity: as whom HTCondor runs: see `child`.
        versions: of what is used, for the record.
    """

    id: str
    username: str
    idle_timeout: float
    binaries: CondorBinaries | None = None
    cpus: int | None = None
    memory: int | None = None
    identity: str = "same"
    versions: dict[str, str] = field(default_factory=dict)

    def write(self, directory: StateDirectory) -> None:
        write_private(directory.launch_file, json.dumps(asdict(self), default=str, indent=1))

    @classmethod
    def read(cls, directory: StateDirectory) -> LaunchOrder:
        raw: dict[str, Any] = json.loads(directory.launch_file.read_text())
        binaries = raw.pop("binaries")
        if binaries is not None:
            binaries["release"] = Path(binaries["release"])
        return cls(binaries=CondorBinaries(**binaries) if binaries else None, **raw)
