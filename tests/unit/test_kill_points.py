"""Named points at which a fault harness kills the process."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from streamlearn.config import load_config
from streamlearn.errors import ConfigError
from streamlearn.state.kill_points import POINTS, VARIABLE, arm_from, reached


@pytest.fixture(autouse=True)
def disarmed() -> Iterator[None]:
    """No test leaves a point armed."""
    yield
    arm_from({})


@pytest.mark.parametrize(("act", "sent"), [("", signal.SIGKILL), (":stop", signal.SIGSTOP)])
def test_acts_at_the_nth_pass(monkeypatch: pytest.MonkeyPatch, act: str, sent: signal.Signals) -> None:
    """Other points do not count, and it acts once."""
    met: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "kill", lambda _, number_of_signal: met.append((number, number_of_signal)))
    arm_from({VARIABLE: f"checkpoint.renamed:3{act}"})

    for number in range(1, 6):  # noqa: B007 - the action looks at it
        reached("checkpoint", "written")
        reached("checkpoint", "renamed")

    assert met == [(3, sent)]


def test_nothing_is_armed_without_the_variable() -> None:
    """Every point is passed."""
    arm_from({})

    for point in POINTS:
        reached(*point.split("."))


@pytest.mark.parametrize(
    "value",
    [
        "checkpoint.renmaed",
        "checkpoint",
        "checkpoint.renamed:0",
        "checkpoint.renamed:x",
        "checkpoint.renamed:1:stpo",
    ],
)
def test_an_unknown_point_is_an_error(value: str) -> None:
    """Else a test that kills nothing would pass."""
    with pytest.raises(ValueError, match=r"no pass|invalid literal|the action must be"):
        arm_from({VARIABLE: value})


def test_the_variable_is_no_setting() -> None:
    """It is ignored when settings are read from the environment."""
    assert load_config(environ={VARIABLE: "checkpoint.renamed:1"}) == load_config(environ={})


def test_no_setting_arms_a_point() -> None:
    """Neither a file nor the command line."""
    with pytest.raises(ConfigError, match="no such setting"):
        load_config(environ={}, overrides={"crash_at": "checkpoint.renamed:1"})


def test_each_point_has_one_name() -> None:
    """`operation.point`."""
    assert len(set(POINTS)) == len(POINTS)
    assert all(point.count(".") == 1 for point in POINTS)
