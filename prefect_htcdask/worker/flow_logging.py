"""The logging of a flow's process, on the workers of its flow run.

Prefect sets logging up at its import, from the environment and the files of the host that it is on. So the flow's
process describes what it has: levels, handlers and formatters, with the contents of its own logging file and the
variables that override them, and the extra loggers. A worker takes that on with the context of the flow run. One that
works for several flow runs at a time has the levels and extra loggers of each for its own task runs; handlers and
formatters are the process's, and are those of the flow run that came last.
"""

from __future__ import annotations

import logging
import logging.config
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import Any

EXTRA = "prefect.extra"
"""Prefect's name of the logger whose handlers the extra loggers get."""

MAX_KNOWN = 32
"""Different ones that are kept in a worker process."""

logger = logging.getLogger("prefect_htcdask.worker.flow_logging")


@dataclass(frozen=True)
class FlowLogging:
    """How one flow's process logs.

    Attributes:
        config: for `logging.config.dictConfig`, made of plain values.
        extra: names of further loggers whose records belong to the flow run.
    """

    config: Mapping[str, Any]
    extra: tuple[str, ...] = ()

    @cached_property
    def levels(self) -> dict[str, int]:
        """The levels of loggers by their names, "" for the root; those that are unset are 0."""
        named = {"": self.config["root"]} if self.config.get("root") else {}
        named.update(self.config.get("loggers") or {})
        return {name: _level(each.get("level")) for name, each in named.items()}

    def has_handlers_of(self, other: FlowLogging) -> bool:
        """Whether nothing differs but the levels of loggers.

        Prefect leaves the root logger out where the process has given that handlers of its own: workers have not.
        """
        mine, theirs = dict(self.config), dict(other.config)
        if "root" not in mine or "root" not in theirs:
            mine.pop("root", None)
            theirs.pop("root", None)
        return _without_levels(mine) == _without_levels(theirs)

    def has_extra(self, name: str) -> bool:
        """Whether a logger is one of the extra ones, or below one."""
        return any(name == each or name.startswith(f"{each}.") for each in self.extra)


def _without_levels(config: Mapping[str, Any]) -> dict[str, Any]:
    def without(each: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in each.items() if key != "level"}

    loggers = {name: without(each) for name, each in (config.get("loggers") or {}).items()}
    return {**config, "root": without(config.get("root") or {}), "loggers": loggers}


def _level(value: Any) -> int:
    if value is None:
        return logging.NOTSET
    text = str(value)
    found = int(text) if text.isdecimal() else logging.getLevelName(text.upper())
    return found if isinstance(found, int) else logging.NOTSET


_current: ContextVar[FlowLogging | None] = ContextVar("prefect_htcdask_logging", default=None)


def describe() -> FlowLogging:
    """How this process logs, or on a worker the process of the flow whose task run asks."""
    from prefect.logging.configuration import PROCESS_LOGGING_CONFIG, ensure_logging_setup
    from prefect.settings import PREFECT_LOGGING_EXTRA_LOGGERS

    if (flows := _current.get()) is not None:
        return flows
    ensure_logging_setup()
    config = {key: value for key, value in PROCESS_LOGGING_CONFIG.items() if key != "incremental"}
    return FlowLogging(config, tuple(sorted(PREFECT_LOGGING_EXTRA_LOGGERS.value() or ())))


_lock = threading.Lock()
_known: list[FlowLogging] = []
_applied: FlowLogging | None = None
_attached: list[tuple[logging.Logger, logging.Handler]] = []


def take_on(wanted: FlowLogging) -> FlowLogging:
    """Have this process log as a flow's process does, for the task runs of its flow run (`logging_as`).

    Returns:
        what `logging_as` takes.
    """
    global _applied
    with _lock:
        before = _applied or describe()
        if wanted not in _known:
            _known[:] = [*_known[1 - MAX_KNOWN :], wanted]
        if wanted != before:
            if not wanted.has_handlers_of(before):
                _configure(wanted, before)
            _set_extra_loggers()
        if wanted != before or len(_known) > 1:
            _set_levels()
        _applied = wanted
    return wanted


def _configure(wanted: FlowLogging, before: FlowLogging) -> None:
    """Make the handlers; where they cannot be made here, those that there are stay."""
    from prefect.logging.configuration import PROCESS_LOGGING_CONFIG

    try:
        # The worker's own loggers and Dask's stay, whatever the flow's process does with its own.
        logging.config.dictConfig(
            {"version": 1, **wanted.config, "incremental": False, "disable_existing_loggers": False}
        )
    except Exception as exc:  # such as a log file in a directory of the flow's host
        cause = exc.__cause__ or exc
        logging.getLogger("htcdask").warning(
            "the handlers in the flow's logging configuration cannot be made on %s (%s: %s); its levels and extra "
            "loggers hold",
            _host(),
            type(cause).__name__,
            cause,
        )
        return
    for name in before.levels.keys() - wanted.levels.keys() - {""}:
        left = logging.getLogger(name)
        left.handlers.clear()
        left.setLevel(logging.NOTSET)
        left.propagate = True
    PROCESS_LOGGING_CONFIG.clear()
    PROCESS_LOGGING_CONFIG.update(wanted.config, incremental=False)


def _host() -> str:
    import os

    return os.uname().nodename


def _set_extra_loggers() -> None:
    while _attached:
        extra_logger, handler = _attached.pop()
        extra_logger.removeHandler(handler)
    for name in {name for one in _known for name in one.extra}:
        extra_logger = logging.getLogger(name)
        for handler in logging.getLogger(EXTRA).handlers:
            if handler not in extra_logger.handlers:
                extra_logger.addHandler(handler)
                _attached.append((extra_logger, handler))


def _set_levels() -> None:
    """Each logger lets through what any flow run wants; the handlers ask whose record it is."""
    names = {name for one in _known for name in one.levels}
    for name in names:
        asked = {one.levels.get(name, logging.NOTSET) for one in _known}
        lowest = asked.pop() if len(asked) == 1 else min(_effective(name, one) for one in _known)
        if name or lowest:
            logging.getLogger(name or None).setLevel(lowest)
    if len(_known) > 1:
        extra = logging.getLogger(EXTRA).handlers
        for name in {"", EXTRA, *names}:
            for handler in logging.getLogger(name or None).handlers:
                handler.addFilter(_of_extra_loggers if handler in extra else _of_all)


def _effective(name: str, one: FlowLogging) -> int:
    """The level of a logger where a flow's process logs as `one` does.

    What no flow's configuration names has the level that it has here, as a library gives it to its own loggers.
    """
    while True:
        configured = any(name in known.levels for known in _known)
        level = one.levels.get(name, logging.NOTSET) if configured else logging.getLogger(name or None).level
        if level or not name:
            return level
        name = name.rpartition(".")[0]


class _Wanted(logging.Filter):
    """Lets through what the flow run wants whose task run a record is of.

    Args:
        extra: whether the handler is one that extra loggers get.
    """

    def __init__(self, extra: bool) -> None:
        super().__init__()
        self._extra = extra

    def filter(self, record: logging.LogRecord) -> bool:
        """See `logging.Filter`."""
        mine = _current.get() or _applied
        if mine is None:
            return True
        if self._extra and not mine.has_extra(record.name) and any(one.has_extra(record.name) for one in _known):
            return False
        return record.levelno >= _effective(record.name, mine)


_of_all, _of_extra_loggers = _Wanted(False), _Wanted(True)


@contextmanager
def logging_as(one: FlowLogging | None) -> Iterator[None]:
    """While it lasts, records of this context are of a flow run that logs so."""
    token = _current.set(one)
    try:
        yield
    finally:
        _current.reset(token)
