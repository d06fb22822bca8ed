"""All scores as one report and one state."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamlearn.judge.gain import CumulativeGain
from streamlearn.judge.scoreboard import Scoreboard
from streamlearn.records import Prediction

CLASSES = ("ant", "bee")
Event = tuple[bool, int, int, int | None]
EVENTS = st.lists(
    st.tuples(st.booleans(), st.integers(0, 1), st.integers(0, 1), st.none() | st.integers(0, 1)), max_size=30
)
"""Whether there is ground truth on arrival; true class; prediction on arrival; the twin's at the label."""


def board(window: int = 4) -> Scoreboard:
    return Scoreboard(CLASSES, window=window)


def feed(scoreboard: Scoreboard, events: list[Event]) -> None:
    """Each sample arrives together with its label."""
    for has_truth, true, answer, twin in events:
        p_C = np.array([0.75, 0.25] if answer == 0 else [0.25, 0.75], np.float32)
        score: dict[str, Any] = {"true_class": true, "teacher_class": answer, "teacher_probabilities_C": p_C}
        scoreboard.traffic.arrived([Prediction(answer, p_C, 0)])
        if has_truth:
            scoreboard.oracle.update(**score, student_class=0)
            scoreboard.oracle_gain.update(true, answer, 1)
        scoreboard.prequential.update(**score, student_class=0)
        scoreboard.gain.update(true, 1, twin, first_class=answer, served_class=1)
        scoreboard.traffic.labelled(Prediction(answer, p_C, 0), 2.0)


class TestReport:
    def test_has_every_score_by_name(self) -> None:
        """The keys of `GET /score`."""
        scoreboard = board()

        feed(scoreboard, [(True, 0, 0, 1), (True, 1, 0, 1)])

        report = scoreboard.report()
        assert list(asdict(report)) == [
            "classes",
            "at_arrival",
            "at_label",
            "first_minus_at_label",
            "calibration",
            "traffic",
            "oracle",
        ]
        assert report.classes == ("ant", "bee")
        assert report.at_arrival.windowed.accuracy["teacher"] == 0.5
        assert report.at_label.twin == 0.5
        assert report.traffic.delay_s.p50 == 2.0
        assert report.oracle is not None
        assert report.oracle.cumulative.count == 2
        assert report.oracle.twin is not None
        assert report.oracle.twin.cumulative == CumulativeGain(paired=2, teacher=0.5, twin=0.5)

    def test_classes_without_a_name_do_not_count_for_the_entropy(self) -> None:
        """They cannot be predicted yet."""
        scoreboard = Scoreboard(CLASSES, window=4, spare=2)
        for p_C in ([0.9, 0.1, 0, 0], [0.1, 0.9, 0, 0]):
            scoreboard.traffic.arrived([Prediction(int(np.argmax(p_C)), np.array(p_C, np.float32), 0)])
        before = scoreboard.report()
        scoreboard.name([*CLASSES, "crab"])
        after = scoreboard.report()

        assert before.classes == ("ant", "bee", "spare 0", "spare 1")
        assert before.traffic.class_entropy == pytest.approx(1.0)
        assert after.classes == ("ant", "bee", "crab", "spare 1")
        assert after.traffic.class_entropy == pytest.approx(np.log(2) / np.log(3))

    def test_has_no_twin_in_the_oracle_without_its_predictions(self) -> None:
        """They are optional, since they cost a forward pass."""
        scoreboard = board()

        scoreboard.oracle.update(
            true_class=0, teacher_class=0, student_class=0, teacher_probabilities_C=np.array([1.0, 0.0], np.float32)
        )

        oracle = scoreboard.report().oracle
        assert oracle is not None
        assert oracle.twin is None

    def test_has_no_oracle_without_ground_truth(self) -> None:
        """Only a simulation has it."""
        scoreboard = board()

        feed(scoreboard, [(False, 0, 0, 1)])

        assert scoreboard.report().oracle is None

    def test_without_samples_is_json(self) -> None:
        """A server may read it before the first sample."""
        report = board().report()

        assert json.dumps(asdict(report), allow_nan=False)
        assert report.first_minus_at_label is None

    def test_first_minus_at_label_is_of_the_same_samples(self) -> None:
        """On arrival 1 of 3 is right, at the label 2 of 3."""
        scoreboard = board()

        feed(scoreboard, [(False, 1, 1, None), (False, 1, 0, None), (False, 0, 1, None)])

        assert scoreboard.report().first_minus_at_label == pytest.approx(1 / 3 - 2 / 3)


class TestSaving:
    @given(EVENTS, st.integers(0, 30))
    def test_continuing_after_load_equals_an_uninterrupted_run(self, events: list[Event], fed: int) -> None:
        """All parts, at any event."""
        scoreboard, other = board(), board()
        feed(scoreboard, events[:fed])

        other.load(scoreboard.state())
        feed(scoreboard, events[fed:])
        feed(other, events[fed:])

        assert other.report() == scoreboard.report()
        for name, array in scoreboard.state().items():
            np.testing.assert_array_equal(other.state()[name], array)

    def test_a_shorter_window_keeps_the_newest(self) -> None:
        """In all parts alike."""
        scoreboard, shorter = board(window=4), board(window=1)
        feed(scoreboard, [(True, 0, 0, 0), (True, 1, 0, 0)])

        shorter.load(scoreboard.state())

        report = shorter.report()
        assert report.at_arrival.windowed.accuracy["teacher"] == 0.0
        assert report.at_arrival.cumulative.accuracy["teacher"] == 0.5
        assert report.at_label.gain == 1.0
        assert report.oracle is not None
        assert report.oracle.windowed.count == 1

    def test_state_is_one_flat_mapping(self) -> None:
        """As a checkpoint needs it."""
        state = board().state()

        assert {name.partition(".")[0] for name in state} == {
            "prequential",
            "oracle",
            "oracle_gain",
            "gain",
            "calibration",
            "traffic",
        }
        assert all(isinstance(array, np.ndarray) for array in state.values())
