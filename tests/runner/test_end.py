"""The stages of a flow run's end: none keeps a later one from being tried."""

from __future__ import annotations

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
