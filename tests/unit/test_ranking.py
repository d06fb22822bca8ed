"""PR-AUC, precision and recall of single classes: against scikit-learn, and over a bounded window."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, precision_recall_curve, precision_score, recall_score

from streamlearn.judge import scores
from streamlearn.judge.prequential import Prequential
from streamlearn.judge.ranking import ALL_CELLS, Ranking, ranked_classes


def drawn(count: int, classes: int = 4, seed: int = 3) -> tuple[Any, Any]:
    """True classes, one of them rare, and probabilities with many ties."""
    rng = np.random.default_rng(seed)
    shares_C = 0.3 ** np.arange(classes)
    true_N = rng.choice(classes, count, p=shares_C / shares_C.sum())
    p_NC = np.exp(np.round(rng.normal(size=(count, classes)) + 1.5 * np.eye(classes)[true_N], 1))
    return true_N, (p_NC / p_NC.sum(axis=1, keepdims=True)).astype(np.float32)


class TestAveragePrecision:
    @given(st.lists(st.tuples(st.booleans(), st.integers(0, 5)), min_size=1, max_size=60))
    def test_equals_scikit_learn(self, rows: list[tuple[bool, int]]) -> None:
        """Ties included. scikit-learn has 0 and a warning without positives."""
        positive_N, scores_N = np.array([row[0] for row in rows]), np.array([row[1] / 5 for row in rows], np.float32)
        found = scores.average_precision(positive_N, scores_N)

        if not positive_N.any():
            assert found is None
        else:
            assert found == pytest.approx(average_precision_score(positive_N, scores_N), abs=1e-12)

    def test_is_the_area_under_the_curve_of_scikit_learn(self) -> None:
        """As steps, without interpolation."""
        true_N, p_NC = drawn(500)
        precision, recall, _ = precision_recall_curve(true_N == 2, p_NC[:, 2])

        assert scores.average_precision(true_N == 2, p_NC[:, 2]) == pytest.approx(
            -(np.diff(recall) * precision[:-1]).sum()
        )


class TestReport:
    def test_equals_scikit_learn_over_the_window(self) -> None:
        """Every class against all others; older samples are gone."""
        judge, window = Prequential(4, 200, top_k=20), 200
        true_N, p_NC = drawn(350)
        for true, p_C in zip(true_N.tolist(), p_NC, strict=True):
            answer = int(p_C.argmax())
            judge.update(true_class=true, teacher_class=answer, student_class=answer, teacher_probabilities_C=p_C)

        report = judge.report().windowed
        true_W, p_WC, answers_W = true_N[-window:], p_NC[-window:], p_NC[-window:].argmax(axis=1)
        areas = [average_precision_score(true_W == c, p_WC[:, c]) for c in range(4)]
        assert [found.average_precision for found in report.by_class] == pytest.approx(areas)
        assert report.pr_auc == pytest.approx(np.mean(areas))
        for found in report.by_class:
            is_c, said_c = true_W == found.class_index, answers_W == found.class_index
            top_W = np.argsort(-p_WC[:, found.class_index], kind="stable")[:20]
            assert found.count == is_c.sum()
            assert found.precision == pytest.approx(precision_score(is_c, said_c))
            assert found.recall == pytest.approx(recall_score(is_c, said_c))
            assert found.precision_at_k == pytest.approx(is_c[top_W].mean())
            assert found.recall_at_k == pytest.approx(is_c[top_W].sum() / is_c.sum())

    def test_undefined_scores_are_none(self) -> None:
        """A class that did not occur, and a window of fewer than k samples."""
        judge = Prequential(2, 10, top_k=5)
        p_C = np.array([0.75, 0.25], np.float32)
        judge.update(true_class=0, teacher_class=0, student_class=0, teacher_probabilities_C=p_C)

        zero, one = judge.report().windowed.by_class
        assert (zero.average_precision, zero.precision_at_k, zero.recall_at_k) == (1.0, None, None)
        assert (one.average_precision, one.precision, one.recall) == (None, None, None)
        assert judge.report().windowed.pr_auc == 1.0

    def test_precision_is_of_the_answer_that_was_given(self) -> None:
        """Such as one by a threshold: it is not the most probable class."""
        judge = Prequential(2, 10)
        for true in (1, 1, 0):
            judge.update(
                true_class=true,
                teacher_class=1,
                student_class=0,
                teacher_probabilities_C=np.array([0.8, 0.2], np.float32),
            )

        one = judge.report().windowed.by_class[1]
        assert (one.precision, one.recall) == (pytest.approx(2 / 3), 1.0)


class TestBounds:
    def test_many_classes_are_ranked_by_name_only(self) -> None:
        """Else 10,000 classes would take 40 MB per 1000 samples."""
        assert ranked_classes(10, 1000, ()) == tuple(range(10))
        assert ranked_classes(10_000, 1000, (7, 3, 7)) == (3, 7)
        assert ranked_classes(10, ALL_CELLS, (1,)) == (1,)

    def test_no_class_may_be_ranked(self) -> None:
        """Then there is no report, and the mean is undefined."""
        judge = Prequential(3, 10, ranked=())
        p_C = np.array([1.0, 0.0, 0.0], np.float32)
        judge.update(true_class=0, teacher_class=0, student_class=0, teacher_probabilities_C=p_C)

        assert judge.report().windowed.by_class == []
        assert judge.report().windowed.pr_auc is None

    def test_a_large_window_is_not_sorted_for_each_label(self) -> None:
        """The report may lack the newest hundredth."""
        ranking = Ranking([0, 1], 200_000, top_k=1)
        ranking._window.extend(np.zeros(150_000, np.int32), np.full((150_000, 2), 0.5, np.float32))
        first = ranking.report()
        ranking.update(0, np.array([0.5, 0.5], np.float32))
        assert ranking.report() is first
        for _ in range(1600):
            ranking.update(0, np.array([0.5, 0.5], np.float32))
        assert ranking.report()[0].count == 151_601


class TestSaving:
    def test_continues_with_the_same_window(self) -> None:
        """As after a restart."""
        true_N, p_NC = drawn(30)
        one, other = Ranking(range(4), 20, top_k=3), Ranking(range(4), 20, top_k=3)
        for n in range(25):
            one.update(int(true_N[n]), p_NC[n])
        other.load(one.state())
        for n in range(25, 30):
            one.update(int(true_N[n]), p_NC[n])
            other.update(int(true_N[n]), p_NC[n])

        assert other.report() == one.report()

    @pytest.mark.parametrize("saved", [{}, Ranking([0, 1], 20, top_k=3).state()])
    def test_without_the_same_classes_it_starts_empty(self, saved: Any) -> None:
        """A checkpoint of an earlier version, or of other settings."""
        true_N, p_NC = drawn(5)
        ranking = Ranking(range(4), 20, top_k=3)
        ranking.update(int(true_N[0]), p_NC[0])

        ranking.load(saved)

        assert [found.count for found in ranking.report()] == [0, 0, 0, 0]
