"""Labelled samples against all samples: how many, how late, and how different."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamlearn.judge.selection_bias import (
    ARRIVALS_PER_LABEL,
    SAME_MODEL_STEPS,
    LabelledShare,
    Quantiles,
    SelectionBias,
    SelectionReport,
)
from streamlearn.records import Prediction

CONFIDENT, DOUBTFUL, OTHER = (0.9, 0.1), (0.6, 0.4), (0.2, 0.8)


def answer(probabilities: tuple[float, ...], version: int = 0) -> Prediction:
    probabilities_C = np.array(probabilities, np.float32)
    return Prediction(int(probabilities_C.argmax()), probabilities_C, version)


def batch(*answers: tuple[float, ...], version: int = 0) -> list[Prediction]:
    return [answer(probabilities, version) for probabilities in answers]


Event = list[tuple[float, float]] | tuple[int, float, float]
EVENTS = st.lists(
    st.lists(st.sampled_from([CONFIDENT, DOUBTFUL, OTHER]), min_size=1, max_size=30)
    | st.tuples(st.integers(0, 1), st.sampled_from([0.6, 0.9]), st.floats(0.0, 1e6)),
    max_size=20,
)
"""Micro-batches of arrivals, and labels: class, confidence, delay in seconds."""


def feed(traffic: SelectionBias, events: Sequence[Event]) -> None:
    for event in events:
        if isinstance(event, list):
            traffic.arrived(batch(*event))
        else:
            class_index, confidence, delay_s = event
            rest = 1 - confidence
            traffic.labelled(answer((rest, confidence) if class_index else (confidence, rest)), delay_s)


class TestLabelledShare:
    def test_is_labels_over_arrivals(self) -> None:
        """3 of 8 since the start."""
        traffic = SelectionBias(2, window=4)

        feed(traffic, [[CONFIDENT] * 8, *[(0, 0.9, 1.0)] * 3])

        assert traffic.report().labelled_share == LabelledShare(windowed=3 / 8, cumulative=3 / 8)

    def test_of_the_window_falls_to_0_without_labels(self) -> None:
        """It counts all labels of the remembered arrivals' time, also more than the window of labels holds."""
        traffic = SelectionBias(2, window=4)
        arrivals = ARRIVALS_PER_LABEL * 4

        feed(traffic, [[CONFIDENT] * arrivals, *[(0, 0.9, 1.0)] * 20, [CONFIDENT] * (arrivals // 2)])
        assert traffic.report().labelled_share == LabelledShare(20 / arrivals, 20 / (1.5 * arrivals))

        feed(traffic, [[CONFIDENT] * (arrivals // 2)])
        assert traffic.report().labelled_share == LabelledShare(0.0, 20 / (2 * arrivals))


class TestDelay:
    def test_quantiles_are_of_the_window_of_labels(self) -> None:
        """Seconds; the last 101 of 200 labels."""
        traffic = SelectionBias(2, window=101)

        feed(traffic, [(0, 0.9, float(delay)) for delay in range(200)])

        assert asdict(traffic.report().delay_s) == pytest.approx(
            {"p50": 149.0, "p90": 189.0, "p99": 198.0, "max": 199.0}
        )


class TestSelection:
    def test_confidence_gap_is_labelled_minus_all(self) -> None:
        """Above 0: easy samples get the labels."""
        traffic = SelectionBias(2, window=4)

        feed(traffic, [[CONFIDENT, DOUBTFUL], (0, 0.9, 0.0)])

        report = traffic.report()
        assert report.confidence == pytest.approx(0.75)
        assert report.confidence_gap == pytest.approx(0.15)

    def test_class_mix_distance_is_between_labelled_and_all(self) -> None:
        """Labels on class 1 only, which is 1 prediction of 4."""
        traffic = SelectionBias(2, window=4)

        feed(traffic, [[CONFIDENT, CONFIDENT, CONFIDENT, OTHER], (1, 0.8, 0.0)])

        assert traffic.report().class_mix_distance == 0.75
        assert traffic.report().class_mix_by_chance == pytest.approx(0.3455, abs=1e-4)

    def test_class_entropy_is_of_the_arrivals(self) -> None:
        """1 for all classes alike, 0 for one class."""
        even, one = SelectionBias(2, window=4), SelectionBias(2, window=4)

        feed(even, [[CONFIDENT, OTHER], (0, 0.9, 0.0)])
        feed(one, [[CONFIDENT, CONFIDENT], (1, 0.9, 0.0)])

        assert (even.report().class_entropy, one.report().class_entropy) == (1.0, 0.0)

    def test_arrivals_beyond_the_window_are_forgotten(self) -> None:
        """One large micro-batch may fill it."""
        traffic = SelectionBias(2, window=1)

        feed(traffic, [[CONFIDENT] * 25, [OTHER] * ARRIVALS_PER_LABEL])

        assert traffic.report().class_entropy == 0.0
        assert traffic.report().confidence == pytest.approx(0.8)
        assert traffic.report().arrived == 25 + ARRIVALS_PER_LABEL


class TestSameModel:
    """A label is compared with arrivals that were predicted by the same model."""

    def test_a_pinned_version_is_no_gap(self) -> None:
        """It is less confident, answers the clients, and only their samples get labels."""
        traffic = SelectionBias(2, window=100)
        for step in range(1000, 1300):
            traffic.arrived(
                [*batch(CONFIDENT, CONFIDENT, CONFIDENT, version=step), *batch(DOUBTFUL, OTHER, version=17)]
            )
            traffic.labelled(answer(DOUBTFUL if step % 2 else OTHER, 17), 10.0)

        report = traffic.report()
        assert report.compared == 100
        assert report.confidence_gap == pytest.approx(0.0)
        assert report.class_mix_distance == pytest.approx(0.0)

    def test_a_model_that_has_become_more_confident_is_no_gap(self) -> None:
        """Late labels are of samples that an earlier model predicted."""
        traffic = SelectionBias(2, window=10)
        traffic.arrived(batch(*[DOUBTFUL] * 20, version=0))
        traffic.arrived(batch(*[CONFIDENT] * 20, version=SAME_MODEL_STEPS))

        traffic.labelled(answer(DOUBTFUL, 0), 60.0)

        assert traffic.report().confidence_gap == pytest.approx(0.0)

    def test_each_model_weighs_as_much_as_among_the_labels(self) -> None:
        """Three labels of the confident model, one of the other with one easy sample too many."""
        traffic = SelectionBias(2, window=10)
        traffic.arrived(batch(CONFIDENT, CONFIDENT, CONFIDENT, OTHER, version=0))
        traffic.arrived(batch(DOUBTFUL, CONFIDENT, version=SAME_MODEL_STEPS))
        for probabilities in (CONFIDENT, CONFIDENT, OTHER):
            traffic.labelled(answer(probabilities, SAME_MODEL_STEPS - 1), 1.0)
        traffic.labelled(answer(CONFIDENT, 2 * SAME_MODEL_STEPS - 1), 1.0)

        report = traffic.report()
        reference = (3 * (3 * 0.9 + 0.8) / 4 + (0.6 + 0.9) / 2) / 4
        assert report.confidence_gap == pytest.approx((0.9 + 0.9 + 0.8 + 0.9) / 4 - reference)
        assert report.class_mix_distance == pytest.approx(abs(1 / 4 - 3 / 4 / 4))

    def test_labels_whose_model_left_the_window_are_not_compared(self) -> None:
        """There are no arrivals of that model to compare with."""
        traffic = SelectionBias(2, window=1)
        traffic.arrived(batch(CONFIDENT, version=0))
        traffic.arrived(batch(*[DOUBTFUL] * ARRIVALS_PER_LABEL, version=SAME_MODEL_STEPS))

        traffic.labelled(answer(CONFIDENT, 0), 1e6)

        report = traffic.report()
        assert report.compared == 0
        assert report.confidence_gap is report.class_mix_distance is report.class_mix_by_chance is None
        assert report.labelled_share.cumulative == pytest.approx(1 / 11)


class TestEdges:
    def test_without_samples_is_undefined(self) -> None:
        """None, and counts of 0."""
        report = SelectionBias(2, window=4).report()

        assert report == SelectionReport(
            arrived=0,
            labelled=0,
            labelled_share=LabelledShare(None, None),
            delay_s=Quantiles(),
            confidence=None,
            compared=0,
            confidence_gap=None,
            class_mix_distance=None,
            class_mix_by_chance=None,
            class_entropy=None,
        )

    def test_an_empty_micro_batch_is_no_arrival(self) -> None:
        """A step may have labels only."""
        traffic = SelectionBias(2, window=4)

        traffic.arrived([])

        assert traffic.report() == SelectionBias(2, window=4).report()

    def test_one_class_alone_has_no_entropy(self) -> None:
        """There is nothing to choose."""
        traffic = SelectionBias(1, window=4)

        traffic.arrived(batch((1.0,)))

        assert traffic.report().class_entropy is None


class TestSaving:
    @given(EVENTS, st.integers(0, 20))
    def test_continuing_after_load_equals_an_uninterrupted_run(self, events: list[Event], fed: int) -> None:
        """At any event; the report is JSON."""
        traffic, other = SelectionBias(2, window=2), SelectionBias(2, window=2)
        feed(traffic, events[:fed])

        other.load(traffic.state())
        feed(traffic, events[fed:])
        feed(other, events[fed:])

        assert other.report() == traffic.report()
        assert json.dumps(asdict(traffic.report()), allow_nan=False)
        for name, array in traffic.state().items():
            np.testing.assert_array_equal(other.state()[name], array)
