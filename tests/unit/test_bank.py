"""Averages of other horizons: each is what a teacher of that decay would be, and one of them may be served."""

from __future__ import annotations

import numpy as np
import pytest

from streamlearn.learn.learner import Learner
from streamlearn.models.build import ModelSpec
from streamlearn.records import MicroBatch
from tests.unit.test_step import settings

CONVNET = ModelSpec("convnet", {"widths": [4, 6]}, (2, 6, 6), 3, normalise=True, scale=1.0)


def learner(**changed: object) -> Learner:
    options = {"noise": "none", "bank_decays": (0.5, 0.99), "twin_every": 1, "ema_decay": 0.9}
    return Learner(CONVNET, settings(**(options | changed)))


def batch(step: int, *, nan: bool = False) -> MicroBatch:
    rng = np.random.default_rng(step)
    x = rng.normal(size=(12, 2, 6, 6)).astype(np.float32)
    if nan:
        x[0] = np.nan
    return MicroBatch(x[:8], 8, x[8:], np.arange(4) % 3, 4, [])


def learn(one: Learner, steps: range, *, nan_at: int = -1) -> Learner:
    for step in steps:
        one.learn(batch(step, nan=step == nan_at))
    return one


X = np.random.default_rng(99).normal(size=(20, 2, 6, 6)).astype(np.float32)


class TestBank:
    @pytest.mark.parametrize("place", [1, 2])
    def test_a_member_is_the_average_of_that_decay(self, place):
        """Without consistency the student is the same whatever its teacher, so the teacher of another learner tells."""
        one = learn(learner(consistency_weight=0.0), range(1, 9), nan_at=4)
        alone = learner(consistency_weight=0.0, bank_decays=(), ema_decay=(0.5, 0.99)[place - 1])
        learn(alone, range(1, 9), nan_at=4)

        one.serve(place)

        for name, array in alone.teacher_state().items():
            np.testing.assert_array_equal(one.teacher_state()[name], array, err_msg=name)

    def test_who_is_served_answers_and_is_published(self):
        """And the guard still hears of the teacher that the student learns from."""
        one = learn(learner(), range(1, 6))
        before = one.predict(X).teacher_probs_BC

        one.serve(one.candidates.index("twin"))

        found = one.classify(X)
        assert one.candidates == ("teacher", "ema 0.5", "ema 0.99", "twin")
        assert found.candidates_KB.shape == (4, 20)
        np.testing.assert_array_equal(found.candidates_KB[3], found.twin_B)
        np.testing.assert_array_equal(one.predict(X).teacher_probs_BC.argmax(1), found.twin_B)
        np.testing.assert_array_equal(before.argmax(1), found.teacher_B)

    def test_a_restart_equals_no_restart(self):
        """Weights, statistics and who is served."""
        without, with_one = learn(learner(), range(1, 5)), learn(learner(), range(1, 5))
        for one in (without, with_one):
            one.serve(2)
        again = learner()
        again.load_state(with_one.state())

        one, other = learn(without, range(5, 8)).state(), learn(again, range(5, 8)).state()

        assert one.keys() == other.keys()
        assert [name for name in one if not np.array_equal(one[name], other[name])] == []

    def test_without_a_bank_the_twin_stays_served_over_a_restart(self):
        """A bank of none is no other bank."""
        first = learn(learner(bank_decays=()), range(1, 3))
        first.serve(1)
        again = learner(bank_decays=())

        again.load_state(first.state())

        assert again.served == 1

    def test_another_bank_begins_as_the_teacher_and_serves_it(self):
        """One changes the decays in the config."""
        first = learn(learner(), range(1, 5))
        first.serve(1)
        other = learner(bank_decays=(0.7,))

        other.load_state(first.state())

        assert other.served == 0
        found = other.classify(X)
        np.testing.assert_array_equal(found.candidates_KB[1], found.teacher_B)

    def test_mending_serves_the_mended_teacher(self):
        """Averages of a student that went astray are of no use."""
        one = learn(learner(), range(1, 5))
        one.serve(2)

        assert one.adopt_twin()

        found = one.classify(X)
        assert one.served == 0
        for place in range(4):
            np.testing.assert_array_equal(found.candidates_KB[place], found.twin_B)
