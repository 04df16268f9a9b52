"""The fault matrix: each row breaks one thing under a real flow, and measures what is left afterwards."""

from __future__ import annotations

from pathlib import Path


def analysis_path() -> Path:
    """The flow's script."""
    return Path(__file__).with_name("analysis.py")
