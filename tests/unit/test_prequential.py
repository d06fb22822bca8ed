"""Prequential scores of two networks and two baselines: windowed, faded, cumulative, and after a restart.

Accuracy, balanced accuracy, kappa and log loss are compared with river's in `test_scores_against_river.py`.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamlearn.judge.prequential import NETWORKS, Prequential

PROBABILITIES_C = np.array([0.5, 0.25, 0.25], np.float32)


def score(judge: Prequential, *pairs: str) -> None:
    """Score samples like "1 112-": true class; teacher, student, majority, no change ("-": no answer)."""
    for pair in pairs:
        truth, answers = pair.split()
        teacher, student, majority, no_change = (None if a == "-" else int(a) for a in answers)
        assert teacher is not None
        assert student is not None
        judge.update(
            true_class=int(truth),
            teacher_class=teacher,
            student_class=student,
            teacher_probabilities_C=PROBABILITIES_C,
            majority_class=majority,
            no_change_class=no_change,
        )


def windowed(judge: Prequential) -> list[float | None]:
    return [judge.windowed(network) for network in NETWORKS]


def cumulative(judge: Prequential) -> list[float | None]:
    return list(judge.report().cumulative.accuracy.values())


def faded(judge: Prequential) -> list[float | None]:
    return list(judge.report().faded.accuracy.values())


Event = tuple[int, int, int | None, int | None, tuple[float, ...]]
EVENTS = st.lists(
    st.tuples(
        *[st.integers(0, 2)] * 2,
        *[st.none() | st.integers(0, 2)] * 2,
        st.sampled_from([(1.0, 0.0, 0.0), (0.0, 0.25, 0.75), (0.2, 0.5, 0.3), (0.34, 0.33, 0.33)]),
    ),
    max_size=40,
)
"""True class, student, majority, no change, the teacher's probabilities."""


def feed(judge: Prequential, events: list[Event]) -> None:
    for true, student, majority, no_change, p in events:
        judge.update(
            true_class=true,
            teacher_class=int(np.argmax(p)),
            student_class=student,
            teacher_probabilities_C=np.array(p, np.float32),
            majority_class=majority,
            no_change_class=no_change,
        )


def drawn(count: int, classes: int = 4, seed: int = 3) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """True classes, and probabilities correlated with them."""
    rng = np.random.default_rng(seed)
    true_N = rng.integers(0, classes, count)
    logits_NC = rng.normal(size=(count, classes)) + 1.5 * np.eye(classes)[true_N]
    p_NC = np.exp(2.0 * logits_NC)
    return true_N, (p_NC / p_NC.sum(axis=1, keepdims=True)).astype(np.float32)


def judged(true_N: np.ndarray[Any, Any], p_NC: np.ndarray[Any, Any], **settings: Any) -> Prequential:
    judge = Prequential(p_NC.shape[1], **settings)
    for true, p_C in zip(true_N, p_NC, strict=True):
        teacher = int(p_C.argmax())
        judge.update(true_class=int(true), teacher_class=teacher, student_class=0, teacher_probabilities_C=p_C)
    return judge


class TestAccuracy:
    def test_is_none_before_the_first_score(self) -> None:
        """An undefined score has no value."""
        judge = Prequential(3, window=4)

        assert windowed(judge) == faded(judge) == cumulative(judge) == [None] * 4
        assert judge.scored == 0

    def test_is_the_share_of_right_answers_of_each_network(self) -> None:
        """Each by its own answers on the same samples."""
        judge = Prequential(3, window=10)

        score(judge, "1 1012", "1 1101", "2 2001", "0 1011")

        assert cumulative(judge) == windowed(judge) == [0.75, 0.5, 0.25, 0.25]

    def test_of_the_window_is_of_the_last_scores(self) -> None:
        """The cumulative one is of all."""
        judge = Prequential(3, window=2)

        score(judge, "1 1111", "1 0111", "1 0011", "1 1001")

        assert windowed(judge) == [0.5, 0.0, 0.5, 1.0]
        assert cumulative(judge) == [0.5, 0.5, 0.75, 1.0]

    def test_of_a_baseline_counts_only_its_answers(self) -> None:
        """Before the first label a baseline has no answer, which is neither right nor wrong."""
        judge = Prequential(3, window=3)

        score(judge, "1 11--", "1 111-", "1 1101")

        assert windowed(judge) == [1.0, 1.0, 0.5, 1.0]
        assert cumulative(judge) == [1.0, 1.0, 0.5, 1.0]
        assert judge.scored == 3

    def test_faded_weighs_each_sample_half_of_the_next(self) -> None:
        """With `fading` 1/2 the last four weigh 1, 1/2, 1/4, 1/8."""
        judge = Prequential(3, window=4, fading=0.5)

        score(judge, "1 11--", "1 111-", "1 0111", "1 1001")

        assert faded(judge) == pytest.approx([11 / 15, 7 / 15, 6 / 14, 1.0])

    def test_faded_equals_the_definition_on_a_long_stream(self) -> None:
        """Sum of fading^age of the right over that of all, after several rescalings of the sums."""
        true_N, p_NC = drawn(3000)

        judge = judged(true_N, p_NC, window=10, fading=0.7)

        age_N = np.arange(3000)[::-1]
        weight_N = 0.7 ** age_N.astype(np.float64)
        expected = weight_N[p_NC.argmax(axis=1) == true_N].sum() / weight_N.sum()
        assert judge.report().faded.accuracy["teacher"] == pytest.approx(expected, rel=1e-12)
        assert judge.report().faded.count == pytest.approx(1 / (1 - 0.7))


class TestSkill:
    def test_is_over_a_baseline_on_the_samples_that_it_answered(self) -> None:
        """Teacher 3 of 4 against majority's 2 of 4, and 2 of 3 against no change's 1 of 3."""
        judge = Prequential(3, window=9)

        score(judge, "1 11--", "1 111-", "0 1110", "2 2122", "1 1101")
        report = judge.report()

        assert report.windowed.kappa_m == report.cumulative.kappa_m == pytest.approx((0.75 - 0.5) / 0.5)
        assert report.windowed.kappa_t is report.cumulative.kappa_t is None

    def test_of_no_change_falls_below_zero_where_classes_come_in_runs(self) -> None:
        """A teacher that is right 3 times of 4 has no skill where the last label is right 7 times of 8."""
        judge = Prequential(3, window=8)

        score(judge, *["1 1011"] * 3, "1 0011", *["1 1011"] * 3, "1 0000")

        assert judge.report().windowed.kappa_t == pytest.approx((6 / 8 - 7 / 8) / (1 / 8))


class TestCalibration:
    @pytest.mark.parametrize(
        ("form", "count", "fading"), [("windowed", 300, 1.0), ("cumulative", 800, 1.0), ("faded", 800, 0.99)]
    )
    def test_error_is_that_of_the_samples_of_the_form(self, form: str, count: int, fading: float) -> None:
        """Computed bin by bin from the probabilities."""
        true_N, p_NC = drawn(800)

        found = judged(true_N, p_NC, window=300, fading=fading, bins=10).report()

        weight_N = (fading ** np.arange(800.0)[::-1])[-count:]
        confidence_N, right_N = p_NC.max(axis=1)[-count:].astype(float), (p_NC.argmax(axis=1) == true_N)[-count:]
        gaps = [
            abs((weight_N * (right_N - confidence_N))[(m / 10 < confidence_N) & (confidence_N <= (m + 1) / 10)].sum())
            for m in range(10)
        ]
        assert getattr(found, form).ece == pytest.approx(sum(gaps) / weight_N.sum())

    def test_diagram_counts_the_window(self) -> None:
        """Every sample in one bin, by the confidence of its answer."""
        true_N, p_NC = drawn(50)

        bins = judged(true_N, p_NC, window=20, bins=5).report().windowed.reliability

        held = np.histogram(p_NC.max(axis=1)[-20:], bins=5, range=(0.0, 1.0))[0]
        assert [bin_.count for bin_ in bins] == held.tolist()

    def test_brier_is_the_mean_squared_distance_to_the_truth(self) -> None:
        """Summed over the classes."""
        true_N, p_NC = drawn(60)

        report = judged(true_N, p_NC, window=25).report()

        distance_N = ((p_NC - np.eye(4)[true_N]) ** 2).sum(axis=1)
        assert report.windowed.brier == pytest.approx(distance_N[-25:].mean(), rel=1e-6)
        assert report.cumulative.brier == pytest.approx(distance_N.mean(), rel=1e-6)


class TestReport:
    def test_without_samples_is_undefined(self) -> None:
        """All scores are None, and counts are 0."""
        report = Prequential(2, window=4, bins=1).report()

        assert report.windowed.recall == [None, None]
        for form in (report.windowed, report.faded, report.cumulative):
            assert form.count == 0
            undefined = (form.balanced_accuracy, form.kappa, form.kappa_m, form.log_loss, form.brier, form.ece)
            assert set(undefined) == {None}

    def test_of_one_class_has_an_accuracy_and_no_kappa(self) -> None:
        """With one possible answer there is no skill."""
        judge = Prequential(1, window=4)

        judge.update(true_class=0, teacher_class=0, student_class=0, teacher_probabilities_C=np.ones(1, np.float32))

        report = judge.report().cumulative
        assert (report.accuracy["teacher"], report.balanced_accuracy, report.kappa) == (1.0, 1.0, None)
        assert (report.log_loss, report.brier, report.ece) == (0.0, 0.0, 0.0)

    @given(EVENTS)
    def test_is_json(self, events: list[Event]) -> None:
        """Without NaN or infinity, after any events."""
        judge = Prequential(3, window=5)
        feed(judge, events)

        assert json.dumps(asdict(judge.report()), allow_nan=False)

    @given(EVENTS)
    def test_of_a_window_longer_than_the_stream_is_the_cumulative_one(self, events: list[Event]) -> None:
        """Two ways to compute the same sums."""
        judge = Prequential(3, window=40, fading=1.0)
        feed(judge, events)

        report = judge.report()
        for name, value in asdict(report.cumulative).items():
            assert getattr(report.windowed, name) == pytest.approx(value), name
            assert getattr(report.faded, name) == pytest.approx(value), name


class TestLogLoss:
    def test_is_the_mean_over_the_window(self) -> None:
        """-ln p(true class), in nats."""
        judge = Prequential(3, window=2)

        score(judge, "0 0000", "0 0000", "1 0000")

        assert judge.report().windowed.log_loss == pytest.approx((math.log(2) + math.log(4)) / 2)

    def test_is_finite_for_a_probability_of_zero(self) -> None:
        """One confident error must not spoil the mean."""
        judge = Prequential(2, window=2)

        judge.update(
            true_class=1, teacher_class=0, student_class=0, teacher_probabilities_C=np.array([1.0, 0.0], np.float32)
        )

        assert judge.report().windowed.log_loss == pytest.approx(7 * math.log(10))


class TestSaving:
    @given(EVENTS, st.integers(0, 40))
    def test_continuing_after_load_equals_an_uninterrupted_run(self, events: list[Event], scored: int) -> None:
        """Bit-equal at any sample: before the window is full, when it is, and after it has wrapped around."""
        judge, other = Prequential(3, window=3, fading=1e-99), Prequential(3, window=3, fading=1e-99)
        feed(judge, events[:scored])

        other.load(judge.state())
        feed(judge, events[scored:])
        feed(other, events[scored:])

        assert other.report() == judge.report()
        assert other.scored == judge.scored == len(events)
        for name, array in judge.state().items():
            np.testing.assert_array_equal(other.state()[name], array)

    def test_classes_may_be_added(self) -> None:
        """New classes have no counts; the others keep theirs."""
        judge, other = Prequential(3, window=4), Prequential(5, window=4)
        score(judge, "1 1000", "2 1000")

        other.load(judge.state())

        assert other.report().windowed.recall == [None, 1.0, 0.0, None, None]
        assert other.report().cumulative.accuracy["teacher"] == 0.5

    def test_the_state_is_a_copy(self) -> None:
        """Another thread writes it while scoring continues."""
        judge = Prequential(3, window=2)
        score(judge, "1 1111")
        state = judge.state()

        score(judge, "1 0000", "1 0000")

        assert state["window.teacher"].tolist() == [1]
        assert state["cumulative.hits"].tolist() == [0.0, 1.0, 0.0]
        assert state["count.scored"].tolist() == [1]
