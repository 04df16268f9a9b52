"""The stages of a flow run's end: none keeps a later one from being tried."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from prefect_htcdask.runner.end import Stage, run_stages


def test_each_stage_is_tried_and_the_first_fatal_failure_is_raised_at_the_end() -> None:
    done: list[str] = []
    logged: list[tuple[str, str]] = []

    def fails(what: Exception | BaseException) -> None:
        done.append(str(what))
        raise what

    stages = [
        Stage("quiet", lambda: fails(ValueError("a"))),
        Stage("told", lambda: fails(ValueError("b")), complaint="It did not close"),
        Stage("fatal", lambda: fails(RuntimeError("c")), is_fatal=True),
        Stage("fatal too", lambda: fails(RuntimeError("d")), is_fatal=True),
        Stage("well", lambda: done.append("e")),
    ]
    with pytest.raises(RuntimeError, match="c"):
        run_stages(stages, lambda level, text: logged.append((level, text)))
    assert done == ["a", "b", "c", "d", "e"]
    assert logged == [("warning", "It did not close: b")]


def test_a_second_ctrl_c_ends_one_stage_alone() -> None:
    done: list[str] = []

    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_stages([Stage("waiting", interrupted), Stage("settling", lambda: done.append("settled"))], print)
    assert done == ["settled"]


def test_a_slow_end_says_where_the_time_went(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    logged: list[str] = []

    def takes(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr("prefect_htcdask.runner.end.time", SimpleNamespace(monotonic=lambda: now[0]))
    quick = [Stage("closing", lambda: takes(9.0), 20.0), Stage("telling", lambda: takes(0.5))]
    run_stages(quick, lambda level, text: logged.append(text))
    assert logged == []
    run_stages([*quick, Stage("settling", lambda: takes(3.0))], lambda level, text: logged.append(text))
    assert logged == ["The end of the flow run took 12 s: closing 9 s (at most 20 s), settling 3 s"]
