"""From probabilities to an answer: the correction of the class prior, and thresholds."""

from __future__ import annotations

import numpy as np
import pytest

from streamlearn.models.answer import Thresholds, corrected
from streamlearn.records import Schema

SCHEMA = Schema((1,), np.dtype(np.float32), ("a", "b", "c"), spare=1)


def choose(p_BC: list[list[float]], **by_name: float) -> list[int]:
    """Of the three classes; the spare one has probability 0."""
    rows = np.array([[*p_C, 0.0] for p_C in p_BC], np.float32)
    return Thresholds(SCHEMA, by_name).choose(rows).tolist()


class TestThresholds:
    def test_without_any_it_is_the_most_probable_class(self) -> None:
        """As ever."""
        assert choose([[0.2, 0.5, 0.3], [0.6, 0.2, 0.2]]) == [1, 0]

    def test_a_class_is_answered_from_its_threshold_on(self) -> None:
        """A high threshold costs recall, a low one precision."""
        assert choose([[0.1, 0.8, 0.1], [0.1, 0.79, 0.11]], b=0.8) == [1, 2]
        assert choose([[0.55, 0.25, 0.2], [0.55, 0.24, 0.21]], b=0.25) == [1, 0]

    def test_of_several_the_largest_ratio_wins(self) -> None:
        """.3 / .1 is more than .6 / .5."""
        assert choose([[0.6, 0.3, 0.1], [0.85, 0.05, 0.1]], a=0.5, b=0.1) == [1, 0]

    def test_the_others_are_compared_by_probability(self) -> None:
        """The class with the threshold is not among them, however probable."""
        assert choose([[0.3, 0.6, 0.1]], b=0.7) == [0]

    def test_where_every_class_has_a_threshold_one_is_answered(self) -> None:
        """Never a spare class."""
        assert choose([[0.3, 0.4, 0.3]], a=0.9, b=0.9, c=0.5) == [2]

    def test_an_impossible_class_is_not_answered(self) -> None:
        """Below its threshold, but the only class with any probability."""
        assert choose([[0.0, 1.0, 0.0]], b=1.0) == [1]
        assert choose([[0.0, 0.99, 0.01]], b=1.0) == [2]

    def test_rows_that_are_not_finite_do_no_harm(self) -> None:
        """The caller knows them."""
        Thresholds(SCHEMA, {"b": 0.5}).choose(np.full((2, 4), np.nan, np.float32))


class TestCorrected:
    def test_is_bayes_rule(self) -> None:
        """A network that learned halves, on a stream of 95 and 5 %."""
        p_BC = np.array([[0.5, 0.5], [0.1, 0.9]], np.float32)
        offsets_C = np.log(np.array([0.95, 0.05], np.float32) / 0.5)

        expected = [[0.95, 0.05], [0.095 / (0.095 + 0.045), 0.045 / (0.095 + 0.045)]]
        assert corrected(p_BC, offsets_C) == pytest.approx(np.array(expected), rel=1e-5)
        assert corrected(p_BC, offsets_C).dtype == np.float32

    def test_without_offsets_nothing_changes(self) -> None:
        """Not a bit."""
        p_BC = np.array([[0.3, 0.7]], np.float32)
        assert corrected(p_BC, np.zeros(2, np.float32)) is p_BC

    def test_stays_finite(self) -> None:
        """Large offsets, certain answers, and rows that are not finite themselves."""
        p_BC = np.array([[1.0, 0.0], [0.0, 1.0], [np.nan, np.nan]], np.float32)
        found = corrected(p_BC, np.array([-80.0, 80.0], np.float32))
        assert np.isfinite(found[:2]).all()
        assert np.isnan(found[2]).all()
