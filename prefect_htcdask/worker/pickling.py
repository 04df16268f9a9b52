"""Whether a value can be pickled, and exceptions that can be unpickled in any process.

An exception's pickle calls its class with its `args`, which fails, or gives another message, where the class has a
constructor of its own; and one value that pickle refuses, anywhere in its chain, loses all of it. So each exception of
the chain is serialized by itself, and tried, and the traceback as names and line numbers.
"""

from __future__ import annotations

import io
import pickle
import re
import traceback
from collections.abc import Iterator
from contextlib import suppress
from types import SimpleNamespace, TracebackType
from typing import Any, NamedTuple, cast

import cloudpickle
from distributed.protocol.serialize import dask_deserialize, dask_serialize
from tblib import Traceback  # type: ignore[import-untyped]

from prefect_htcdask.errors import RemoteTaskError

MOST_EXCEPTIONS = 100
"""Exceptions of one chain that are serialized: one that a loop raises again and again has a chain without end."""

MOST_FRAMES = 50
"""Frames that are kept of either end of a traceback; a `RecursionError` has a thousand."""
_ADDRESS = re.compile(r"0x[0-9a-fA-F]+")


class _Discard:
    """A file that keeps nothing: a large result is pickled without a copy."""

    def write(self, data: Any) -> int:
        return len(data)


class _Pickler(cloudpickle.Pickler):
    """What `distributed.protocol.pickle.dumps` can do: functions by value, and the types that Dask has a way for."""

    def reducer_override(self, obj: Any) -> Any:
        if type(obj).__module__.partition(".")[0] not in ("builtins", "numpy", "pandas"):
            try:
                serialize = dask_serialize.dispatch(type(obj))
                return dask_deserialize.dispatch(type(obj)), serialize(obj)
            except TypeError:
                pass
        return super().reducer_override(obj)


def why_unpicklable(value: Any) -> Exception | None:
    """Why Dask could not send a value; `None` where it can. What is pickled is not kept."""
    for pickler in (pickle.Pickler, _Pickler):
        try:
            pickler(cast(Any, _Discard()), protocol=pickle.HIGHEST_PROTOCOL, buffer_callback=_out_of_band).dump(value)
        except Exception as exc:
            error = exc
        else:
            return None
    return error


def _out_of_band(buffer: pickle.PickleBuffer) -> None:
    """Large arrays are sent as they are."""


class _Frame(NamedTuple):
    file: str
    module: str
    function: str
    line: int


class _Serialized(NamedTuple):
    """One exception of a chain, in plain values.

    Attributes:
        name: its class, as errors call it.
        message: what `str` gives.
        whole: its pickle, where that gives the same again.
        cls: its class, pickled, where the exception itself cannot be: it is made without its constructor.
        args: what can be pickled of its `args`; of the rest, the `repr`.
        state: what can be pickled of its attributes.
        notes: its `__notes__`.
        frames: its traceback.
        cause: number of its `__cause__` in the list of all.
        context: number of its `__context__`.
        members: numbers of the exceptions of a group.
        suppress_context: its `__suppress_context__`.
    """

    name: str
    message: str
    whole: bytes | None
    cls: bytes | None
    args: tuple[bytes, ...]
    state: dict[str, bytes]
    notes: tuple[str, ...]
    frames: tuple[_Frame, ...]
    cause: int | None
    context: int | None
    members: tuple[int, ...]
    suppress_context: bool


def dump_exception(exc: BaseException) -> bytes:
    """Serialize an exception with its chain, groups, notes and tracebacks, so that `load_exception` can read it."""
    numbers: dict[int, int] = {}
    found: list[BaseException] = []

    def number(one: BaseException | None) -> int | None:
        if one is None:
            return None
        if id(one) not in numbers:
            if len(found) >= MOST_EXCEPTIONS:
                return None
            numbers[id(one)] = len(found)
            found.append(one)
        return numbers[id(one)]

    number(exc)
    serialized: list[_Serialized] = []
    while len(serialized) < len(found):
        one = found[len(serialized)]
        members = tuple(place for member in _members(one) if (place := number(member)) is not None)
        whole = None if members else _whole(one)
        cls, args, state = (None, (), {}) if whole is not None else _parts(one, bool(members))
        serialized.append(
            _Serialized(
                name=_name(type(one)),
                message=_message(one),
                whole=whole,
                cls=cls,
                args=args,
                state=state,
                notes=_notes(one),
                frames=tuple(_frames(one.__traceback__)),
                cause=number(one.__cause__),
                context=number(one.__context__),
                members=members,
                suppress_context=one.__suppress_context__,
            )
        )
    return pickle.dumps([tuple(one) for one in serialized], pickle.HIGHEST_PROTOCOL)


def load_exception(blob: bytes) -> BaseException:
    """The exception that `dump_exception` serialized; a `RemoteTaskError` where its class cannot be had here."""
    serialized = [_Serialized(*one) for one in pickle.loads(blob)]
    made: list[BaseException | None] = [None] * len(serialized)
    # The members of a group come behind it, and it is made of them.
    for place in reversed(range(len(serialized))):
        one = serialized[place]
        members = [member for number in one.members if (member := made[number]) is not None]
        made[place] = _load(one, members)
    for place, one in enumerate(serialized):
        exc = cast(BaseException, made[place])
        exc.__cause__ = made[one.cause] if one.cause is not None else None
        exc.__context__ = made[one.context] if one.context is not None else None
        exc.__suppress_context__ = one.suppress_context
        exc.__traceback__ = _traceback(one.frames)
        if one.notes:
            exc.__notes__ = list(one.notes)  # type: ignore[attr-defined]
    return cast(BaseException, made[0])


class _WithoutChain(cloudpickle.Pickler):
    """Pickles exceptions as their classes say, without the chain and traceback that tblib has pickle take along."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, BaseException):
            return obj.__reduce_ex__(pickle.HIGHEST_PROTOCOL)
        return super().reducer_override(obj)


def _dumps(value: Any) -> bytes:
    file = io.BytesIO()
    _WithoutChain(file, protocol=pickle.HIGHEST_PROTOCOL).dump(value)
    return file.getvalue()


def _whole(exc: BaseException) -> bytes | None:
    """The pickle of an exception, if that gives an exception of the same class and message again."""
    try:
        blob = _dumps(exc)
        again = pickle.loads(blob)
    except Exception:
        return None
    return blob if _is_like(again, exc) else None


def _is_like(again: Any, exc: BaseException) -> bool:
    return _name(type(again)) == _name(type(exc)) and _same(_message(again), _message(exc))


def _same(one: str, other: str) -> bool:
    # Where an object has no `repr` of its own, that tells its address.
    return _ADDRESS.sub("0x", one) == _ADDRESS.sub("0x", other)


def _parts(exc: BaseException, group: bool) -> tuple[bytes | None, tuple[bytes, ...], dict[str, bytes]]:
    """An exception's class, and what can be pickled of its `args` and attributes."""
    cls = _proven(type(exc))
    # A group's exceptions are serialized each by itself.
    args = [getattr(exc, "message", "")] if group else list(exc.args)
    pickled = tuple(_proven(arg) or pickle.dumps(_safe_repr(arg)) for arg in args)
    attributes = {name: blob for name, value in vars(exc).items() if (blob := _proven(value)) is not None}
    attributes.pop("__notes__", None)
    return cls, pickled, attributes


def _proven(value: Any) -> bytes | None:
    try:
        blob = _dumps(value)
        pickle.loads(blob)
    except Exception:
        return None
    return blob


def _load(one: _Serialized, members: list[BaseException]) -> BaseException:
    problem: BaseException | None = None
    if one.whole is not None:
        try:
            exc = pickle.loads(one.whole)
            if isinstance(exc, BaseException):
                return exc
        except Exception as error:
            problem = error
    if one.cls is not None:
        try:
            return _remake(one, pickle.loads(one.cls), members)
        except Exception as error:
            problem = error
    exc = RemoteTaskError(one.name, one.message, _text(problem))
    if members:
        exc.__notes__ = [f"with {_name(type(member))}: {_message(member)}" for member in members]  # type: ignore[attr-defined]
    return exc


def _remake(one: _Serialized, cls: type[BaseException], members: list[BaseException]) -> BaseException:
    """An exception of this class, made without its constructor."""
    args = tuple(pickle.loads(arg) for arg in one.args)
    exc = _new(cls, (*args, members) if members else args)
    for name, blob in one.state.items():
        with suppress(Exception):
            exc.__dict__[name] = pickle.loads(blob)
    if not _same(_message(exc), one.message):
        # It is made of what did not come along.
        message = one.message
        derived = type(cls.__name__, (cls,), {"__str__": lambda self: message, "__module__": cls.__module__})
        derived.__qualname__ = cls.__qualname__
        with suppress(TypeError):
            exc.__class__ = derived
    return exc


def _new(cls: type[BaseException], args: tuple[Any, ...]) -> BaseException:
    """An object of an exception class, by the nearest of its `__new__` that takes these arguments."""
    for base in cls.__mro__:
        new = vars(base).get("__new__")
        if new is None:
            continue
        try:
            exc = new.__get__(None, cls)(cls, *args) if isinstance(new, staticmethod) else base.__new__(cls, *args)
        except Exception:
            continue
        if isinstance(exc, BaseException):
            return exc
    raise TypeError(f"no object of {_name(cls)} can be made of {len(args)} arguments")


def _frames(tb: TracebackType | None) -> Iterator[_Frame]:
    steps = list(traceback.walk_tb(tb))
    if len(steps) > 2 * MOST_FRAMES:
        steps = steps[:MOST_FRAMES] + steps[-MOST_FRAMES:]
    for frame, line in steps:
        code = frame.f_code
        yield _Frame(code.co_filename, str(frame.f_globals.get("__name__", "?")), code.co_name, line)


def _traceback(frames: tuple[_Frame, ...]) -> TracebackType | None:
    following: SimpleNamespace | None = None
    for step in reversed([_Frame(*one) for one in frames]):
        code = SimpleNamespace(co_filename=step.file, co_name=step.function)
        frame = SimpleNamespace(
            f_code=code,
            f_globals={"__name__": step.module, "__file__": step.file},
            f_locals={},
            f_lineno=step.line,
        )
        following = SimpleNamespace(tb_frame=frame, tb_lineno=step.line, tb_next=following)
    return None if following is None else cast("TracebackType | None", Traceback(following).as_traceback())


def _members(exc: BaseException) -> tuple[BaseException, ...]:
    """The exceptions of a group, also of the `exceptiongroup` that Python 3.10 has instead."""
    members = getattr(exc, "exceptions", ()) if hasattr(type(exc), "derive") else ()
    return tuple(member for member in members if isinstance(member, BaseException))


def _notes(exc: BaseException) -> tuple[str, ...]:
    notes = getattr(exc, "__notes__", None)
    return tuple(str(note) for note in notes) if isinstance(notes, (list, tuple)) else ()


def _name(cls: type) -> str:
    # Neither the builtins nor a module that a loader has named, such as ``__main__``.
    plain = cls.__module__ == "builtins" or cls.__module__.startswith("__")
    return cls.__qualname__ if plain else f"{cls.__module__}.{cls.__qualname__}"


def _message(exc: BaseException) -> str:
    try:
        return str(exc)
    except Exception:
        return _safe_repr(exc.args)


def _safe_repr(value: Any) -> str:
    try:
        return repr(value)
    except Exception:
        return object.__repr__(value)


def _text(exc: BaseException | None) -> str:
    return f"{_name(type(exc))}: {_message(exc)}" if exc is not None else "its class cannot be pickled"
