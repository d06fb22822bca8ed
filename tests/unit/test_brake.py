"""A factor that halves, and comes back step by step."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamlearn.judge.brake import LEVELS, Brake


class TestBrake:
    def test_halves_until_its_floor(self):
        """However often something goes wrong, some learning is left."""
        brake = Brake(100)
        factors = []

        for step in range(LEVELS + 2):
            brake.halve(step)
            factors.append(brake.factor(step))

        assert factors == [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 64, 1 / 64]

    @pytest.mark.parametrize(("step", "factor"), [(1, 1 / 4), (200, 1 / 4), (201, 1 / 2), (300, 1 / 2), (301, 1.0)])
    def test_leaves_its_lower_level_more_slowly(self, step, factor):
        """The first pause after one halving, twice that after the second."""
        brake = Brake(100)
        brake.halve(0)

        brake.halve(1)

        assert brake.factor(step) == factor

    def test_comes_back_only_from_when_it_was_last_held(self):
        """While something is wrong, time does not count."""
        brake = Brake(100)
        brake.halve(0)

        brake.hold(99)

        assert (brake.factor(198), brake.factor(199)) == (1 / 2, 1.0)

    def test_pressed_is_at_its_floor_at_once(self):
        """And takes its longest pause."""
        brake = Brake(100)

        brake.press(5)

        assert (brake.factor(5), brake.pause_steps) == (1 / 64, 3200)

    def test_released_brakes_no_more(self):
        """What did not help is undone."""
        brake = Brake(100)
        brake.press(5)

        brake.release()

        assert brake.factor(5) == 1.0

    @given(st.lists(st.tuples(st.sampled_from(["halve", "press", "hold"]), st.integers(0, 5000)), max_size=20))
    def test_stays_within_its_bounds(self, doings):
        """Whatever is done to it, and when."""
        brake, step = Brake(50), 0

        for name, later in doings:
            step += later
            getattr(brake, name)(step)

            assert 1 / 64 <= brake.factor(step) <= brake.factor(step + 100) <= 1.0
