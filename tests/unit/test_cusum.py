"""Page's cumulative sum with a running level and deviation: what adds up to an alarm, and what does not."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamlearn.judge.cusum import FIRST_VALUES, STEPS_OF_A_VALUE, Cusum

FIRST_STEPS = FIRST_VALUES * STEPS_OF_A_VALUE


def noisy(*parts: tuple[int, float], scale: float = 1.0, seed: int = 0) -> list[float]:
    """So many values around such a mean, with deviation 0.01, all of it times `scale`."""
    rng = np.random.default_rng(seed)
    return [float(scale * rng.normal(mean, 0.01)) for count, mean in parts for _ in range(count)]


def settling(count: int) -> list[float]:
    """A model that becomes sure, from 0.2 down to 0.035, with neighbours that differ by a tenth of that."""
    rng = np.random.default_rng(0)
    return [0.035 + 0.165 * math.exp(-step / 100) + float(rng.normal(0.0, 0.01)) for step in range(count)]


def alarms(values: Sequence[float], cusum: Cusum | None = None) -> list[int]:
    """The places, from 1, at which these raise the alarm."""
    cusum = cusum or Cusum()
    return [step for step, value in enumerate(values, start=1) if cusum.update(value)]


class TestARise:
    def test_of_many_deviations_is_seen_within_six_values(self):
        """Each counts as 6 deviations, less the slack of 2: five of them pass 20, and the first may hold old steps."""
        assert 1000 < alarms(noisy((1000, 0.1), (24, 0.5)))[0] <= 1000 + 6 * STEPS_OF_A_VALUE

    def test_of_many_deviations_is_seen_as_soon_when_little_was_seen_before(self):
        """A jump is no part of the deviation that it is measured in, which few values have made."""
        found = alarms(noisy((FIRST_STEPS + 2 * STEPS_OF_A_VALUE, 0.1), (6 * STEPS_OF_A_VALUE, 0.5)))

        assert len(found) == 1

    def test_that_passes_is_not_learned_from(self):
        """Three values far above, and those after are measured as those before."""
        parts = ((1000, 0.1), (3 * STEPS_OF_A_VALUE, 0.5), (100, 0.1))
        jumped, plain = Cusum(), Cusum()
        assert alarms(noisy(*parts), jumped) == []
        alarms([*noisy(*parts)[:1000], *noisy(*parts)[1000 + 3 * STEPS_OF_A_VALUE :]], plain)

        assert jumped.level == plain.level

    def test_of_two_deviations_is_seen_within_a_hundred_steps(self):
        """Of one step: that is four of a value."""
        found = alarms(noisy((1000, 0.1), (100, 0.12)))

        assert len(found) == 1
        assert found[0] > 1000

    @pytest.mark.parametrize("scale", [0.1, 5.0])
    def test_is_seen_at_the_same_place_on_every_scale(self, scale):
        """A sure model's uncertainty is small, and doubles all the same."""
        parts = ((1000, 0.1), (300, 0.15))

        assert alarms(noisy(*parts, scale=scale)) == alarms(noisy(*parts)) != []

    def test_is_seen_soon_though_the_model_was_settling_until_then(self):
        """What it said while it settled is no measure of what it says when it has."""
        found = alarms([*settling(500), *noisy((60, 0.13))])

        assert len(found) == 1
        assert 500 < found[0] <= 560

    def test_begins_everything_anew(self):
        """The new level is the usual one, and a second rise above it is seen as well."""
        assert len(alarms(noisy((500, 0.1), (500, 0.2), (500, 0.4)))) == 2


class TestNoAlarm:
    def test_is_raised_by_one_wild_value(self):
        """It counts as six deviations, and neither raises the alarm nor hides a rise that follows."""
        found = alarms(noisy((500, 0.1), (1, 1e9), (500, 0.1), (200, 0.2)))

        assert len(found) == 1
        assert found[0] > 1001

    def test_is_raised_by_a_rise_that_is_small_beside_the_level(self):
        """However surely it is there: a hundredth more of it calls nobody."""
        rng = np.random.default_rng(0)
        values = rng.normal(0.5, 1e-4, 2000) + np.where(np.arange(2000) < 1000, 0.0, 0.005)

        assert alarms(values.tolist()) == []

    def test_is_raised_by_a_fall(self):
        """The model becomes sure of what it sees."""
        assert alarms(noisy((1000, 0.2), (1000, 0.1))) == []

    def test_is_raised_by_a_fall_that_ends(self):
        """Beside a level that follows the values it looks like a rise."""
        assert alarms([*settling(500), *noisy((1500, 0.035))]) == []

    def test_is_raised_by_independent_values(self):
        """A hundred thousand steps without a change."""
        assert alarms(noisy((100_000, 0.1))) == []

    def test_is_raised_by_values_of_which_some_are_large(self):
        """Log-normal: what a distance of few samples looks like."""
        rng = np.random.default_rng(0)

        assert alarms(rng.lognormal(0.0, 1.0, 50_000).tolist()) == []

    def test_or_few_are_raised_by_neighbours_that_are_alike(self):
        """An autoregression of .9, as of a network that moves slowly: at most one in twenty thousand steps."""
        rng, value, values = np.random.default_rng(0), 0.0, []
        for _ in range(20_000):
            value = 0.9 * value + rng.normal(0.0, 0.01)
            values.append(0.3 + value)

        assert len(alarms(values)) <= 1

    def test_is_raised_by_the_first_values(self):
        """They are what is usual."""
        assert alarms(noisy((FIRST_STEPS // 2, 0.1), (FIRST_STEPS // 2, 0.5))) == []


class TestLevel:
    def test_is_the_running_mean_of_the_values(self):
        """None before the first is whole."""
        cusum = Cusum()
        levels = []
        for value in (1.0, 2.0, 3.0, 4.0, 3.0, 3.0, 3.0, 4.5):
            cusum.update(value)
            levels.append(cusum.level)

        assert levels[:3] == [None] * 3
        assert (levels[3], levels[7]) == (2.5, pytest.approx((2.5 + 3.375) / 2))


PARTS = st.lists(st.tuples(st.integers(0, 200), st.sampled_from([0.02, 0.1, 0.3, 0.8])), max_size=3)


class TestSaving:
    @given(PARTS, PARTS, st.integers(0, 3))
    @settings(deadline=None)
    def test_a_loaded_one_goes_on_as_the_saved_one(self, before, after, seed):
        """At any point, in the middle of a value too: the same alarms, and the same bits."""
        cusum, other = Cusum(), Cusum()
        alarms(noisy(*before, seed=seed), cusum)

        other.load(cusum.state())

        assert alarms(noisy(*after), other) == alarms(noisy(*after), cusum)
        assert other.state().tolist() == cusum.state().tolist()
