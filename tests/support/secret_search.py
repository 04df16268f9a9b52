"""Where a secret can be read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path


def holding(text: str, secrets: dict[str, str]) -> list[str]:
    """Names of the secrets that stand in a text."""
    return [name for name, secret in secrets.items() if secret in text]


def files(*directories: Path) -> Iterator[Path]:
    for directory in directories:
        for path in directory.rglob("*"):
            if path.is_file() and not path.is_symlink():
                yield path


def readable(paths: Iterable[Path], secrets: dict[str, str]) -> list[str]:
    """Files with a secret that are for others than their owner, by their own mode."""
    found = []
    for path in paths:
        with suppress(FileNotFoundError):
            names = holding(path.read_bytes().decode(errors="replace"), secrets)
            mode = path.stat().st_mode & 0o777
            if names and mode & 0o177:
                found.append(f"{path} (mode {mode:o}): {', '.join(names)}")
    return found
