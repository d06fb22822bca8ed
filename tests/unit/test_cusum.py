"""Page's cumulative sum with a running level and deviation: what raises an alarm, and what does not."""

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
    """`count` values around each mean, with deviation 0.01, all times `scale`."""
    rng = np.random.default_rng(seed)
    return [float(scale * rng.normal(mean, 0.01)) for count, mean in parts for _ in range(count)]


def settling(count: int) -> list[float]:
    """Falling uncertainty of a learning model, from 0.2 to 0.035, with noise of 0.01."""
    rng = np.random.default_rng(0)
    return [0.035 + 0.165 * math.exp(-step / 100) + float(rng.normal(0.0, 0.01)) for step in range(count)]


def alarms(values: Sequence[float], cusum: Cusum | None = None) -> list[int]:
    """The positions, from 1, of values that raise an alarm."""
    cusum = cusum or Cusum()
    return [step for step, value in enumerate(values, start=1) if cusum.update(value)]


class TestRise:
    def test_of_many_deviations_is_detected_within_six_values(self):
        """Each counts as 6 deviations, less the slack of 2: five pass 20, and the first may contain earlier steps."""
        assert 1000 < alarms(noisy((1000, 0.1), (24, 0.5)))[0] <= 1000 + 6 * STEPS_OF_A_VALUE

    def test_of_many_deviations_is_detected_as_soon_after_few_values(self):
        """A jump does not enter the deviation that measures it."""
        found = alarms(noisy((FIRST_STEPS + 2 * STEPS_OF_A_VALUE, 0.1), (6 * STEPS_OF_A_VALUE, 0.5)))

        assert len(found) == 1

    def test_that_is_short_leaves_the_level_unchanged(self):
        """Three values far above do not enter the running level."""
        parts = ((1000, 0.1), (3 * STEPS_OF_A_VALUE, 0.5), (100, 0.1))
        jumped, plain = Cusum(), Cusum()
        assert alarms(noisy(*parts), jumped) == []
        alarms([*noisy(*parts)[:1000], *noisy(*parts)[1000 + 3 * STEPS_OF_A_VALUE :]], plain)

        assert jumped.level == plain.level

    def test_of_two_deviations_is_detected_within_a_hundred_steps(self):
        """Deviations of a step; these are four deviations of a value."""
        found = alarms(noisy((1000, 0.1), (100, 0.12)))

        assert len(found) == 1
        assert found[0] > 1000

    @pytest.mark.parametrize("scale", [0.1, 5.0])
    def test_is_detected_at_the_same_step_on_every_scale(self, scale):
        """The uncertainty of a confident model is small, and may double too."""
        parts = ((1000, 0.1), (300, 0.15))

        assert alarms(noisy(*parts, scale=scale)) == alarms(noisy(*parts)) != []

    def test_is_detected_soon_after_the_model_has_settled(self):
        """Earlier falling values do not raise the deviation."""
        found = alarms([*settling(500), *noisy((60, 0.13))])

        assert len(found) == 1
        assert 500 < found[0] <= 560

    def test_resets_the_detector(self):
        """The new level becomes normal, and a second rise above it is detected too."""
        assert len(alarms(noisy((500, 0.1), (500, 0.2), (500, 0.4)))) == 2


class TestNoAlarm:
    def test_is_raised_by_one_outlier(self):
        """It counts as six deviations, and does not hide a rise that follows."""
        found = alarms(noisy((500, 0.1), (1, 1e9), (500, 0.1), (200, 0.2)))

        assert len(found) == 1
        assert found[0] > 1001

    def test_is_raised_by_a_rise_that_is_small_relative_to_the_level(self):
        """A hundredth more is no alarm, however significant."""
        rng = np.random.default_rng(0)
        values = rng.normal(0.5, 1e-4, 2000) + np.where(np.arange(2000) < 1000, 0.0, 0.005)

        assert alarms(values.tolist()) == []

    def test_is_raised_by_a_fall(self):
        """The model becomes more confident."""
        assert alarms(noisy((1000, 0.2), (1000, 0.1))) == []

    def test_is_raised_by_a_fall_that_ends(self):
        """Relative to a level that follows the values its end looks like a rise."""
        assert alarms([*settling(500), *noisy((1500, 0.035))]) == []

    def test_is_raised_by_independent_values(self):
        """100,000 steps without a change."""
        assert alarms(noisy((100_000, 0.1))) == []

    def test_is_raised_by_heavy_tails(self):
        """Log-normal, as the distance of few samples."""
        rng = np.random.default_rng(0)

        assert alarms(rng.lognormal(0.0, 1.0, 50_000).tolist()) == []

    def test_is_raised_often_by_autocorrelated_values(self):
        """An autoregression of .9, as of a network that changes slowly: at most one alarm in 20,000 steps."""
        rng, value, values = np.random.default_rng(0), 0.0, []
        for _ in range(20_000):
            value = 0.9 * value + rng.normal(0.0, 0.01)
            values.append(0.3 + value)

        assert len(alarms(values)) <= 1

    def test_is_raised_during_the_warm_up(self):
        """The first values set the level."""
        assert alarms(noisy((FIRST_STEPS // 2, 0.1), (FIRST_STEPS // 2, 0.5))) == []


class TestLevel:
    def test_is_the_running_mean_of_the_values(self):
        """None before the first value of four steps is complete."""
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
    def test_continuing_after_load_equals_an_uninterrupted_run(self, before, after, seed):
        """At any step, also within a value: the same alarms and the same bits."""
        cusum, other = Cusum(), Cusum()
        alarms(noisy(*before, seed=seed), cusum)

        other.load(cusum.state())

        assert alarms(noisy(*after), other) == alarms(noisy(*after), cusum)
        assert other.state().tolist() == cusum.state().tolist()
