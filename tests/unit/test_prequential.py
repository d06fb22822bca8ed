"""Prequential scores: over a window and over all, of two networks and two baselines, kept over a restart."""

from __future__ import annotations

import math

import numpy as np
import pytest

from streamlearn.judge.prequential import NETWORKS, Prequential

PROBABILITIES_C = np.array([0.5, 0.25, 0.25], np.float32)


def score(judge: Prequential, *pairs: str) -> None:
    """Score samples like "1 112-": the truth; teacher, student, majority, no change ("-": no answer)."""
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
    return [judge.cumulative(network) for network in NETWORKS]


class TestAccuracy:
    def test_is_none_before_the_first_score(self):
        """No number is better than a made-up one."""
        judge = Prequential(3, window=4)

        assert windowed(judge) == cumulative(judge) == [None] * 4
        assert (judge.log_loss(), judge.scored) == (None, 0)

    def test_is_the_share_of_right_answers_of_each_network(self):
        """Each is judged by its own answers on the same samples."""
        judge = Prequential(3, window=10)

        score(judge, "1 1012", "1 1101", "2 2001", "0 1011")

        assert cumulative(judge) == windowed(judge) == [0.75, 0.5, 0.25, 0.25]

    def test_of_the_window_forgets_what_left_it(self):
        """The last `window` scores count, the cumulative ones never forget."""
        judge = Prequential(3, window=2)

        score(judge, "1 1111", "1 0111", "1 0011", "1 1001")

        assert windowed(judge) == [0.5, 0.0, 0.5, 1.0]
        assert cumulative(judge) == [0.5, 0.5, 0.75, 1.0]

    def test_of_a_baseline_counts_only_its_answers(self):
        """Before the first label a baseline knows nothing; that is neither right nor wrong."""
        judge = Prequential(3, window=3)

        score(judge, "1 11--", "1 111-", "1 1101")

        assert windowed(judge) == [1.0, 1.0, 0.5, 1.0]
        assert cumulative(judge) == [1.0, 1.0, 0.5, 1.0]
        assert judge.scored == 3


class TestLogLoss:
    def test_is_the_mean_cost_of_what_was_true_over_the_window(self):
        """-ln p(true), in nats."""
        judge = Prequential(3, window=2)

        score(judge, "0 0000", "0 0000", "1 0000")

        assert judge.log_loss() == pytest.approx((math.log(2) + math.log(4)) / 2)

    def test_stays_finite_where_the_truth_was_held_impossible(self):
        """One sure and wrong answer must not make the window's number useless."""
        judge = Prequential(2, window=2)

        judge.update(
            true_class=1, teacher_class=0, student_class=0, teacher_probabilities_C=np.array([1.0, 0.0], np.float32)
        )

        assert judge.log_loss() == pytest.approx(7 * math.log(10))


class TestSaving:
    @pytest.mark.parametrize("scored", [0, 2, 3, 8])
    def test_a_loaded_judge_goes_on_as_the_saved_one(self, scored):
        """Before the window is full, when it is, and after it has turned round."""
        stream = ["1 1012", "1 00-1", "2 201-", "0 1011", "1 1111", "0 02-1", "2 1012", "2 2210", "0 0000", "1 2121"]
        judge, other = Prequential(3, window=3), Prequential(3, window=3)
        score(judge, *stream[:scored])

        other.load(judge.state())

        for pair in stream[scored:]:
            assert (windowed(other), cumulative(other)) == (windowed(judge), cumulative(judge))
            assert (other.log_loss(), other.scored) == (judge.log_loss(), judge.scored)
            score(judge, pair)
            score(other, pair)

    def test_a_shorter_window_keeps_the_newest(self):
        """A changed setting takes effect at once and loses nothing of the cumulative numbers."""
        judge, other = Prequential(3, window=4), Prequential(3, window=2)
        score(judge, "1 0000", "1 0000", "1 1000", "1 1000", "1 1000")

        other.load(judge.state())

        assert other.windowed("teacher") == 1.0
        assert other.cumulative("teacher") == 0.6

    def test_a_longer_window_fills_up_from_what_was_saved(self):
        """What had left the shorter window is not made up."""
        judge, other = Prequential(3, window=2), Prequential(3, window=4)
        score(judge, "1 0000", "1 0000", "1 1000")
        other.load(judge.state())
        assert other.windowed("teacher") == 0.5

        score(other, "1 1000", "1 1000", "1 1000")

        assert other.windowed("teacher") == 1.0

    def test_the_state_is_a_copy(self):
        """It is written by another thread while scoring goes on."""
        judge = Prequential(3, window=2)
        score(judge, "1 1111")
        state = judge.state()

        score(judge, "1 0000", "1 0000")

        assert state["hits"].tolist() == [[1, 1, 1, 1]]
        assert state["scored"].tolist() == [1]
