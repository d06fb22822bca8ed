"""Teacher and label-only twin on the same samples, when the label arrives."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamlearn.judge.gain import CumulativeGain, TwinGain

Event = tuple[int, int, int | None, int | None]
CLASSES = st.integers(0, 2)
EVENTS = st.lists(st.tuples(CLASSES, CLASSES, st.none() | CLASSES, st.none() | CLASSES), max_size=20)
"""Truth, teacher, twin, first prediction."""


def feed(gain: TwinGain, events: Sequence[Event]) -> None:
    for true, teacher, twin, first in events:
        gain.update(true, teacher, twin, first_class=first, served_class=teacher)


class TestGain:
    def test_is_teacher_minus_twin_on_the_samples_that_both_answered(self) -> None:
        """Answers without a twin count for the teacher only."""
        gain = TwinGain(10)

        feed(gain, [(1, 1, None, None), (1, 1, None, None), (1, 1, 0, None), (1, 1, 1, None), (1, 0, 0, None)])

        report = gain.report()
        assert (report.teacher, report.count) == (0.8, 5)
        assert (report.twin, report.paired) == (pytest.approx(1 / 3), 3)
        assert report.gain == pytest.approx(1 / 3)

    def test_is_of_the_window_only(self) -> None:
        """An old lead does not count."""
        gain = TwinGain(2)

        feed(gain, [(1, 1, 0, None), (1, 0, 1, None), (1, 0, 1, None)])

        assert gain.report().gain == -1.0
        assert len(gain) == 2

    def test_without_a_twin_is_none(self) -> None:
        """The teacher's accuracy is known all the same."""
        gain = TwinGain(2)

        gain.update(1, 1, None)

        report = gain.report()
        assert (report.teacher, report.paired) == (1.0, 0)
        assert (report.twin, report.gain, report.interval) == (None, None, None)

    def test_interval_is_narrow_where_both_err_on_the_same_samples(self) -> None:
        """Its width depends on the discordant pairs."""
        alike, apart = TwinGain(100), TwinGain(100)
        feed(alike, [(1, 1, 1, None)] * 60 + [(1, 0, 0, None)] * 30 + [(1, 1, 0, None)] * 10)
        feed(apart, [(1, 1, 1, None)] * 30 + [(1, 0, 1, None)] * 30 + [(1, 1, 0, None)] * 40)

        low, high = alike.report().interval or (0.0, 0.0)
        low_apart, high_apart = apart.report().interval or (0.0, 0.0)

        assert alike.report().gain == apart.report().gain == pytest.approx(0.1)
        assert 0.0 < low < 0.1 < high
        assert low_apart < 0.0 < high_apart

    def test_restart_empties_the_window(self) -> None:
        """The guard has changed the teacher."""
        gain = TwinGain(4)
        feed(gain, [(1, 0, 1, 1)] * 3)

        gain.restart()

        assert gain.report() == replace(TwinGain(4).report(), cumulative=gain.report().cumulative)
        assert gain.first_minus_at_label() is None

    def test_cumulative_accuracies_survive_window_and_restart(self) -> None:
        """On the samples that both answered: 3 of 4 against 1 of 4."""
        gain = TwinGain(2)
        feed(gain, [(1, 1, None, None), (1, 1, 0, None), (1, 1, 0, None)])

        gain.restart()
        feed(gain, [(1, 0, 0, None), (1, 1, 1, None)])

        assert gain.report().cumulative == CumulativeGain(paired=4, teacher=0.75, twin=0.25)


class TestFirstPrediction:
    def test_is_compared_with_the_answer_at_the_label_on_the_same_samples(self) -> None:
        """Below 0: the model improved on a sample before its label arrived."""
        gain = TwinGain(10)

        feed(gain, [(1, 1, None, 0), (1, 1, None, 0), (1, 1, None, 1), (1, 0, None, 1), (1, 0, None, None)])

        assert gain.first_minus_at_label() == 0.5 - 0.75

    def test_is_compared_with_the_served_candidate(self) -> None:
        """The twin is served and is wrong both times; the teacher is right but not served."""
        gain = TwinGain(window=4)

        gain.update(1, 1, 0, first_class=0, served_class=0)

        assert gain.first_minus_at_label() == 0.0


class TestSaving:
    @given(EVENTS, st.integers(0, 20))
    def test_continuing_after_load_equals_an_uninterrupted_run(self, events: list[Event], fed: int) -> None:
        """At any label."""
        gain, other = TwinGain(3), TwinGain(3)
        feed(gain, events[:fed])

        other.load(gain.state())
        feed(gain, events[fed:])
        feed(other, events[fed:])

        assert other.report() == gain.report()
        for name, array in gain.state().items():
            np.testing.assert_array_equal(other.state()[name], array)

    @given(EVENTS)
    def test_the_report_is_json(self, events: list[Event]) -> None:
        """Without NaN."""
        gain = TwinGain(5)
        feed(gain, events)

        assert json.dumps(asdict(gain.report()), allow_nan=False)
