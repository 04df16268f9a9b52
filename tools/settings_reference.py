"""The reference of settings and commands, as Markdown, made from the code itself: it cannot be out of date."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

import typer
from dask.utils import format_bytes
from prefect.settings.base import PrefectBaseSettings
from pydantic import SecretStr
from pydantic.fields import FieldInfo

from prefect_htcdask.settings import ENV_PREFIX, WORKERS_VARIABLE, HTCDaskSettings, WorkerGroupSettings, WorkerSettings

_UNITS = (("days", 86400), ("hours", 3600), ("minutes", 60))
_PLAIN = {str: "text", int: "whole number", float: "number", bool: "true or false", SecretStr: "secret text"}
_BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


def settings_reference() -> str:
    """A section for each group of settings, and one below it for each field."""
    parts = []
    for name, about in HTCDaskSettings.model_fields.items():
        if name == "workers":
            parts += [
                f"## `workers` {{#workers}}\n\n{about.description}\n",
                f"mapping of names to mappings · variable `{WORKERS_VARIABLE}`, as JSON\n",
                "Besides the fields of [`worker`](#worker), which a group takes where it does not say its own:\n",
                *_fields("workers.NAME", WorkerGroupSettings, without=WorkerSettings),
            ]
            continue
        group = about.annotation
        assert isinstance(group, type) and issubclass(group, PrefectBaseSettings)
        parts += [f"## `{name}` {{#{name}}}\n\n{(group.__doc__ or '').strip()}\n", *_fields(name, group)]
    return "\n".join(parts)


def _fields(
    group: str, model: type[PrefectBaseSettings], without: type[PrefectBaseSettings] | None = None
) -> Iterator[str]:
    for name, field in model.model_fields.items():
        if without is not None and name in without.model_fields:
            continue
        facts = [kind(field), f"default: {default(field)}"]
        if without is None:
            facts.append(f"variable `{ENV_PREFIX}{group.upper()}_{name.upper()}`")
        anchor = f"{group}{name}".lower().replace(".", "")
        yield f"### `{group}.{name}` {{#{anchor}}}\n\n{' · '.join(facts)}\n\n{field.description}\n"


def kind(field: FieldInfo) -> str:
    """What a field takes, in words: ``size``, ``duration``, ``whole number, at least 1``."""
    names = list(dict.fromkeys(_kinds(field.annotation, field.metadata)))
    bounds = [
        f"{word} {getattr(one, attribute)}"
        for one in field.metadata
        for attribute, word in _BOUNDS.items()
        if getattr(one, attribute, None) is not None
    ]
    return ", ".join([" or ".join(names), *bounds])


def _kinds(annotation: Any, metadata: Any = ()) -> Iterator[str]:
    # Sizes and durations are numbers that are read by a function of their own.
    readers = [getattr(getattr(one, "func", None), "__name__", "") for one in metadata]
    for reader, name in (("_size", "size"), ("_duration", "duration")):
        if reader in readers:
            yield name
            return
    inner = get_args(annotation)
    if hasattr(annotation, "__metadata__"):
        yield from _kinds(inner[0], annotation.__metadata__)
    elif getattr(annotation, "__origin__", None) is dict:
        yield f"mapping of text to {next(iter(_kinds(inner[1])))}"
    elif inner:
        for one in inner:
            if one is not type(None):
                yield from _kinds(one)
    else:
        yield _PLAIN[annotation]


def default(field: FieldInfo) -> str:
    """A field's default as a user would write it; ``unset`` where it has none."""
    value = field.get_default(call_default_factory=True)
    if value is None:
        return "unset"
    if value == {}:
        return "empty"
    name = next(iter(_kinds(field.annotation, field.metadata)))
    if name == "size":
        return f"`{format_bytes(value).replace('.00', '')}`"
    if name == "duration":
        return f"`{_duration(value)}`"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _duration(seconds: float) -> str:
    for unit, length in _UNITS:
        if seconds >= length and seconds % length == 0:
            count = int(seconds // length)
            return f"{count} {unit if count > 1 else unit.removesuffix('s')}"
    return f"{seconds:g} s"


def command_reference() -> str:
    """A section for each command: its help and its options."""
    from prefect_htcdask.cli import app

    group: Any = typer.main.get_command(app)
    parts = []
    for name, command in group.commands.items():
        options = [
            f"- `{', '.join(one.opts)}`: {one.help}{_said_default(one)}"
            for one in command.params
            if getattr(one, "help", None) and not getattr(one, "hidden", False)
        ]
        parts.append(f"## `prefect-htcdask {name}` {{#{name}}}\n\n{command.help}\n")
        parts.append("\n".join([*options, "- `--help`: Show this and exit."]) + "\n")
    return "\n".join(parts)


def _said_default(option: Any) -> str:
    value = option.default
    return f" Default: `{value}`." if isinstance(value, int | float) and not isinstance(value, bool) else ""
