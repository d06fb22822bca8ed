"""ADWIN: equal to river's, and fully restored from its state."""

from __future__ import annotations

import numpy as np
import pytest
from river.drift import ADWIN

from streamlearn.judge.adwin import Adwin

DELTA = 0.002


def values(seed: int) -> list[float]:
    """Six stretches of coin flips with different probabilities; every third seed adds noise."""
    rng = np.random.default_rng(seed)
    flips = np.concatenate([rng.random(int(rng.integers(20, 2000))) < rng.random() for _ in range(6)]).astype(float)
    return (np.clip(flips + rng.normal(0, 0.1, len(flips)), 0, 1) if seed % 3 == 0 else flips).tolist()


class TestAgainstRiver:
    @pytest.mark.parametrize("seed", range(12))
    def test_has_the_changes_and_the_mean_of_rivers(self, seed):
        """After each value: the same changes in the same direction, and the same mean."""
        ours, theirs, cuts = Adwin(DELTA), ADWIN(delta=DELTA), 0
        total, count = 0.0, 0
        for value in values(seed):
            total, count = total + value, count + 1
            theirs.update(value)
            risen = ours.update(value)

            if theirs.drift_detected:
                cuts += 1
                assert risen == (theirs.estimation > total / count)
                assert ours.level is None
                total, count = 0.0, 0
            else:
                assert not risen
                assert ours.level == pytest.approx(theirs.estimation, abs=1e-9)
        assert cuts >= 2


class TestState:
    def test_continuing_after_load_equals_an_uninterrupted_run(self):
        """Saved and loaded every hundred values: the same rises and the same state."""
        whole, saved, rises = Adwin(DELTA), Adwin(DELTA), 0
        for n, value in enumerate(values(3)):
            if n % 100 == 0:
                state, saved = saved.state(), Adwin(DELTA)
                saved.load(state)
            rises += (risen := whole.update(value))
            assert saved.update(value) == risen
        assert rises >= 1
        assert np.array_equal(whole.state(), saved.state())

    def test_a_checkpoint_of_version_0_1_is_loaded(self):
        """It holds the values since the last change."""
        fed, loaded = Adwin(DELTA), Adwin(DELTA)
        window = [float(n % 10 == 0) for n in range(500)]
        for value in window:
            fed.update(value)

        loaded.load(np.array(window))

        assert np.array_equal(fed.state(), loaded.state())
