"""How to reach a schedd: a value without HTCondor's bindings, which the flow's process must not import."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class ScheddAddress:
    """How to reach a schedd.

    Attributes:
        collector: address of the pool's collector, or `None` for the configuration's.
        schedd: name of the schedd, or `None` for the local one.
        config_file: CONDOR_CONFIG, or `None` for HTCondor's own search.
        token_file: file with an IDTOKEN, or `None`.
        spool: whether input files are spooled to the schedd.
        token: an IDTOKEN's text in place of a file, or `None`.
    """

    collector: str | None = None
    schedd: str | None = None
    config_file: str | None = None
    token_file: str | None = None
    spool: bool = False
    token: str | None = field(default=None, repr=False)

    @property
    def is_local(self) -> bool:
        """Whether the schedd sees this host's files, and so can write the job event log here."""
        return not self.spool and self.schedd is None and self.collector is None
