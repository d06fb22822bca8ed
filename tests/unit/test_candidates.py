"""The candidates that can be served: the teacher, and the label-only twin's average."""

from __future__ import annotations

import numpy as np

from streamlearn.learn.learner import Learner
from streamlearn.models.build import ModelSpec
from streamlearn.records import MicroBatch
from tests.unit.test_step import settings

CONVNET = ModelSpec("convnet", {"widths": [4, 6]}, (2, 6, 6), 3, normalise=True, scale=1.0)
TWIN = 1
X = np.random.default_rng(99).normal(size=(20, 2, 6, 6)).astype(np.float32)


def learner(*, twin: str = "measure") -> Learner:
    return Learner(CONVNET, settings(noise="none", twin=twin, ema_decay=0.9))


def learn(one: Learner, steps: range) -> Learner:
    for step in steps:
        x = np.random.default_rng(step).normal(size=(12, 2, 6, 6)).astype(np.float32)
        one.learn(MicroBatch(x[:8], 8, x[8:], np.arange(4) % 3, 4, []))
    return one


def test_the_served_candidate_answers_predictions():
    """`classify` still reports the teacher first."""
    one = learn(learner(), range(1, 6))
    before = one.predict(X).teacher_probs_BC

    one.serve(TWIN)

    found = one.classify(X)
    assert one.candidates == ("teacher", "twin")
    assert found.candidates_KB.shape == (2, 20)
    np.testing.assert_array_equal(found.candidates_KB[TWIN], found.twin_B)
    np.testing.assert_array_equal(one.predict(X).teacher_probs_BC.argmax(1), found.twin_B)
    np.testing.assert_array_equal(before.argmax(1), found.teacher_B)


def test_an_answer_that_is_not_finite_is_no_class():
    """No candidate is right by chance where it has no answer."""
    one = learn(learner(), range(1, 3))
    x = X.copy()
    x[3] = np.nan

    found = one.classify(x)

    assert (found.candidates_KB[:, 3] == -1).all()
    assert (found.candidates_KB[:, :3] >= 0).all()


def test_a_restart_keeps_the_served_candidate():
    """Weights and statistics continue bit-equal."""
    straight, saved = learn(learner(), range(1, 5)), learn(learner(), range(1, 5))
    for one in (straight, saved):
        one.serve(TWIN)
    again = learner()

    again.load_state(saved.state())

    assert again.served == TWIN
    one, other = learn(straight, range(5, 8)).state(), learn(again, range(5, 8)).state()
    assert one.keys() == other.keys()
    assert [name for name in one if not np.array_equal(one[name], other[name])] == []


def test_a_restart_without_the_twin_serves_the_teacher():
    """The candidate no longer exists."""
    first = learn(learner(), range(1, 3))
    first.serve(TWIN)
    other = learner(twin="off")

    other.load_state(first.state())

    assert other.served == 0


def test_further_averages_of_an_earlier_version_are_ignored():
    """Its index of the served candidate means another network, so the teacher is served."""
    first = learn(learner(), range(1, 5))
    first.serve(TWIN)
    state = first.state()
    state |= {f"bank.0.9.{name}": array for name, array in state.items() if name.startswith("teacher.")}
    other = learner()

    other.load_state(state)

    assert other.served == 0
    assert not any(name.startswith("bank.") for name in other.state())


def test_adopting_the_twin_serves_the_teacher():
    """The teacher has the twin's weights."""
    one = learn(learner(), range(1, 5))
    one.serve(TWIN)

    assert one.adopt_twin()

    found = one.classify(X)
    assert one.served == 0
    np.testing.assert_array_equal(found.teacher_B, found.twin_B)
