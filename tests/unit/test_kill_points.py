"""Named places where a harness has a process killed: met in order, counted, and out of reach of any setting."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from streamlearn.config import load_config
from streamlearn.errors import ConfigError
from streamlearn.state import kill_points as points
from streamlearn.state.kill_points import POINTS, VARIABLE, arm, arm_from, disarm, reached


@pytest.fixture(autouse=True)
def disarmed() -> Iterator[None]:
    """No test leaves a mine behind."""
    yield
    disarm()


def test_the_nth_pass_of_the_place_is_met_and_no_other() -> None:
    """Other places do not count, and what was met once is not met again."""
    met: list[int] = []
    arm("checkpoint.renamed", 3, lambda: met.append(number))

    for number in range(1, 6):  # noqa: B007 - what is called at the place looks at it
        reached("checkpoint", "written")
        reached("checkpoint", "renamed")

    assert met == [3]


def test_nothing_is_armed_unless_the_variable_says_so() -> None:
    """A process that nobody harms passes every place."""
    arm_from({})

    assert points._armed is None


@pytest.mark.parametrize(
    "told",
    [
        "checkpoint.renmaed",
        "checkpoint",
        "checkpoint.renamed:0",
        "checkpoint.renamed:x",
        "checkpoint.renamed:1:stpo",
    ],
)
def test_a_place_that_is_not_there_is_an_error(told: str) -> None:
    """Or a test that kills nobody would pass."""
    with pytest.raises(ValueError, match=r"no pass|invalid literal|nothing is known"):
        arm_from({VARIABLE: told})


def test_the_variable_is_no_setting() -> None:
    """It is passed by where settings are read from the environment."""
    assert load_config(environ={VARIABLE: "checkpoint.renamed:1"}) == load_config(environ={})


def test_no_setting_of_that_name_is_taken() -> None:
    """Neither a file nor a command line reaches it."""
    with pytest.raises(ConfigError, match="no such setting"):
        load_config(environ={}, overrides={"crash_at": "checkpoint.renamed:1"})


def test_each_place_has_one_name() -> None:
    """`operation.place`."""
    assert len(set(POINTS)) == len(POINTS)
    assert all(point.count(".") == 1 for point in POINTS)
