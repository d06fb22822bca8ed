"""The back-off factor: halved at failures, and restored step by step."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamlearn.judge.backoff import LEVELS, Backoff


class TestBackoff:
    def test_halves_down_to_its_minimum(self):
        """Repeated failures never stop learning entirely."""
        backoff = Backoff(100)
        factors = []

        for step in range(LEVELS + 2):
            backoff.halve(step)
            factors.append(backoff.factor(step))

        assert factors == [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 64, 1 / 64]

    @pytest.mark.parametrize(("step", "factor"), [(1, 1 / 4), (200, 1 / 4), (201, 1 / 2), (300, 1 / 2), (301, 1.0)])
    def test_leaves_a_higher_level_more_slowly(self, step, factor):
        """The first pause after one halving, twice that after the second."""
        backoff = Backoff(100)
        backoff.halve(0)

        backoff.halve(1)

        assert backoff.factor(step) == factor

    def test_hold_starts_the_pause_again(self):
        """Time while something is wrong does not count."""
        backoff = Backoff(100)
        backoff.halve(0)

        backoff.halve(99, times=0)

        assert (backoff.factor(198), backoff.factor(199)) == (1 / 2, 1.0)

    def test_maximise_goes_to_the_minimum_factor_at_once(self):
        """With the longest pause."""
        backoff = Backoff(100)

        backoff.halve(5, times=LEVELS)

        assert (backoff.factor(5), backoff.pause_steps) == (1 / 64, 3200)

    def test_reset_restores_the_factor_at_once(self):
        """Used where the back-off has not helped."""
        backoff = Backoff(100)
        backoff.halve(5, times=LEVELS)

        backoff.reset()

        assert backoff.factor(5) == 1.0

    @given(st.lists(st.tuples(st.sampled_from([0, 1, LEVELS]), st.integers(0, 5000)), max_size=20))
    def test_the_factor_stays_within_its_bounds_and_recovers(self, calls):
        """After any sequence of calls."""
        backoff, step = Backoff(50), 0

        for times, later in calls:
            step += later
            backoff.halve(step, times)

            assert 1 / 64 <= backoff.factor(step) <= backoff.factor(step + 100) <= 1.0
