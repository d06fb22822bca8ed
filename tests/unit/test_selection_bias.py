"""Labelled samples beside all samples: how many, how late, and how like the rest."""

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

SURE, DOUBTFUL, OTHER = (0.9, 0.1), (0.6, 0.4), (0.2, 0.8)


def answer(probabilities: tuple[float, ...], version: int = 0) -> Prediction:
    probabilities_C = np.array(probabilities, np.float32)
    return Prediction(int(probabilities_C.argmax()), probabilities_C, version)


def batch(*answers: tuple[float, ...], version: int = 0) -> list[Prediction]:
    return [answer(probabilities, version) for probabilities in answers]


Event = list[tuple[float, float]] | tuple[int, float, float]
EVENTS = st.lists(
    st.lists(st.sampled_from([SURE, DOUBTFUL, OTHER]), min_size=1, max_size=30)
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
    def test_is_of_labels_to_arrivals(self) -> None:
        """3 of 8 since the beginning."""
        traffic = SelectionBias(2, window=4)

        feed(traffic, [[SURE] * 8, *[(0, 0.9, 1.0)] * 3])

        assert traffic.report().labelled_share == LabelledShare(windowed=3 / 8, cumulative=3 / 8)

    def test_of_the_window_tells_that_labels_have_stopped(self) -> None:
        """More labels than the window has are counted too, and only those of the remembered arrivals' time."""
        traffic = SelectionBias(2, window=4)
        arrivals = ARRIVALS_PER_LABEL * 4

        feed(traffic, [[SURE] * arrivals, *[(0, 0.9, 1.0)] * 20, [SURE] * (arrivals // 2)])
        assert traffic.report().labelled_share == LabelledShare(20 / arrivals, 20 / (1.5 * arrivals))

        feed(traffic, [[SURE] * (arrivals // 2)])
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
        """Above 0 the easy samples get the labels."""
        traffic = SelectionBias(2, window=4)

        feed(traffic, [[SURE, DOUBTFUL], (0, 0.9, 0.0)])

        report = traffic.report()
        assert report.confidence == pytest.approx(0.75)
        assert report.confidence_gap == pytest.approx(0.15)

    def test_class_mix_distance_is_between_labelled_and_all(self) -> None:
        """Labels on class 1 alone, where it is 1 answer of 4."""
        traffic = SelectionBias(2, window=4)

        feed(traffic, [[SURE, SURE, SURE, OTHER], (1, 0.8, 0.0)])

        assert traffic.report().class_mix_distance == 0.75
        assert traffic.report().class_mix_by_chance == pytest.approx(0.3455, abs=1e-4)

    def test_class_entropy_is_of_the_arrivals(self) -> None:
        """1 where all classes are answered alike often, 0 where one is answered alone."""
        even, one = SelectionBias(2, window=4), SelectionBias(2, window=4)

        feed(even, [[SURE, OTHER], (0, 0.9, 0.0)])
        feed(one, [[SURE, SURE], (1, 0.9, 0.0)])

        assert (even.report().class_entropy, one.report().class_entropy) == (1.0, 0.0)

    def test_arrivals_beyond_the_window_are_forgotten(self) -> None:
        """One large micro-batch may be all of it."""
        traffic = SelectionBias(2, window=1)

        feed(traffic, [[SURE] * 25, [OTHER] * ARRIVALS_PER_LABEL])

        assert traffic.report().class_entropy == 0.0
        assert traffic.report().confidence == pytest.approx(0.8)
        assert traffic.report().arrived == 25 + ARRIVALS_PER_LABEL


class TestSameModel:
    """A label is compared with arrivals that were answered by the model that answered its sample."""

    def test_a_pinned_version_beside_the_newest_is_no_gap(self) -> None:
        """Clients are answered by a pinned version that is less sure, and these samples alone get labels."""
        traffic = SelectionBias(2, window=100)
        for step in range(1000, 1300):
            traffic.arrived([*batch(SURE, SURE, SURE, version=step), *batch(DOUBTFUL, OTHER, version=17)])
            traffic.labelled(answer(DOUBTFUL if step % 2 else OTHER, 17), 10.0)

        report = traffic.report()
        assert report.compared == 100
        assert report.confidence_gap == pytest.approx(0.0)
        assert report.class_mix_distance == pytest.approx(0.0)

    def test_a_model_that_has_become_surer_since_is_no_gap(self) -> None:
        """Labels come late: their samples were answered by the model of that time."""
        traffic = SelectionBias(2, window=10)
        traffic.arrived(batch(*[DOUBTFUL] * 20, version=0))
        traffic.arrived(batch(*[SURE] * 20, version=SAME_MODEL_STEPS))

        traffic.labelled(answer(DOUBTFUL, 0), 60.0)

        assert traffic.report().confidence_gap == pytest.approx(0.0)

    def test_each_model_weighs_as_much_as_among_the_labels(self) -> None:
        """Three labels of the sure model's, one of the other's; and one easy sample too many among the latter."""
        traffic = SelectionBias(2, window=10)
        traffic.arrived(batch(SURE, SURE, SURE, OTHER, version=0))
        traffic.arrived(batch(DOUBTFUL, SURE, version=SAME_MODEL_STEPS))
        for sure in (SURE, SURE, OTHER):
            traffic.labelled(answer(sure, SAME_MODEL_STEPS - 1), 1.0)
        traffic.labelled(answer(SURE, 2 * SAME_MODEL_STEPS - 1), 1.0)

        report = traffic.report()
        reference = (3 * (3 * 0.9 + 0.8) / 4 + (0.6 + 0.9) / 2) / 4
        assert report.confidence_gap == pytest.approx((0.9 + 0.9 + 0.8 + 0.9) / 4 - reference)
        assert report.class_mix_distance == pytest.approx(abs(1 / 4 - 3 / 4 / 4))

    def test_labels_whose_model_left_the_window_are_not_compared(self) -> None:
        """Nothing is known of how sure it was of all samples."""
        traffic = SelectionBias(2, window=1)
        traffic.arrived(batch(SURE, version=0))
        traffic.arrived(batch(*[DOUBTFUL] * ARRIVALS_PER_LABEL, version=SAME_MODEL_STEPS))

        traffic.labelled(answer(SURE, 0), 1e6)

        report = traffic.report()
        assert report.compared == 0
        assert report.confidence_gap is report.class_mix_distance is report.class_mix_by_chance is None
        assert report.labelled_share.cumulative == pytest.approx(1 / 11)


class TestEdges:
    def test_nothing_has_no_numbers(self) -> None:
        """None, and a count of zero."""
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
        """A step of labels alone is legal."""
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
    def test_a_loaded_one_goes_on_as_the_saved_one(self, events: list[Event], fed: int) -> None:
        """Wherever it stopped, and all of it is JSON."""
        traffic, other = SelectionBias(2, window=2), SelectionBias(2, window=2)
        feed(traffic, events[:fed])

        other.load(traffic.state())
        feed(traffic, events[fed:])
        feed(other, events[fed:])

        assert other.report() == traffic.report()
        assert json.dumps(asdict(traffic.report()), allow_nan=False)
        for name, array in traffic.state().items():
            np.testing.assert_array_equal(other.state()[name], array)

    def test_a_shorter_window_keeps_the_newest(self) -> None:
        """Totals are those of the whole stream."""
        traffic, other = SelectionBias(2, window=8), SelectionBias(2, window=1)
        feed(traffic, [[SURE] * 20, [OTHER] * 10, (0, 0.9, 5.0), (1, 0.9, 7.0)])

        other.load(traffic.state())

        report = other.report()
        assert (report.class_entropy, report.delay_s.p50, report.arrived) == (0.0, 7.0, 30)
