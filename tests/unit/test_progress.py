"""The consistency weight by updates and labels, and what the first label restarts."""

from __future__ import annotations

import math

import pytest

from streamlearn.learn.methods.settings import MeanTeacherOptions, SupervisedOptions
from streamlearn.learn.progress import Progress


def options(**changed: object) -> MeanTeacherOptions:
    return MeanTeacherOptions.model_validate({"consistency_weight": 2.0, "rampup_steps": 0, **changed})


def test_the_lower_ramp_holds() -> None:
    """By steps or by labels."""
    of = options(rampup_steps=10, rampup_labels=4)

    by_labels = Progress(labels=1).consistency_weight(10, of)
    by_steps = Progress(labels=4).consistency_weight(1, of)

    assert by_labels == pytest.approx(2.0 * math.exp(-5 * (1 - 1 / 4) ** 2))
    assert by_steps == pytest.approx(2.0 * math.exp(-5 * (1 - 1 / 10) ** 2))
    assert Progress(labels=4).consistency_weight(10, of) == 2.0


def test_ramps_are_counted_from_where_they_started() -> None:
    """After another method the counts do not start at zero."""
    started = Progress(updates=100, ramped_at=100, labels=50, ramped_at_label=50)

    assert started.consistency_weight(105, options(rampup_steps=10)) == pytest.approx(2.0 * math.exp(-5 / 4))
    assert started.consistency_weight(101, options(rampup_labels=10)) == pytest.approx(2.0 * math.exp(-5))


def test_before_the_first_label_the_weight_is_zero() -> None:
    """With a ramp by labels; without one it does not depend on labels."""
    assert Progress().consistency_weight(9, options(rampup_labels=4)) == 0.0
    assert Progress().consistency_weight(9, options()) == 2.0


def test_the_first_label_restarts_average_and_ramp() -> None:
    """Later labels restart nothing."""
    progress = Progress(updates=7)

    progress.count_labels(0, options(rampup_labels=4))
    progress.count_labels(2, options(rampup_labels=4))
    progress.updates = 9
    progress.count_labels(1, options(rampup_labels=4))

    assert progress == Progress(updates=9, averaged_at=7, ramped_at=7, labels=3)


def test_the_first_label_leaves_a_ramp_by_steps_alone() -> None:
    """Only the average restarts."""
    progress = Progress(updates=7)

    progress.count_labels(1, options(rampup_steps=10))

    assert progress == Progress(updates=7, averaged_at=7, labels=1)


def test_a_method_without_consistency_has_no_weight() -> None:
    """Supervised."""
    assert Progress(labels=9).consistency_weight(9, SupervisedOptions()) == 0.0
