"""Guard, drift monitor and trust on a real learner, before and after a restart."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest

from streamlearn.judge.election import Election
from streamlearn.judge.guard import Guard
from streamlearn.judge.scoreboard import Scoreboard
from streamlearn.learn.learner import Learner, Predictions
from streamlearn.ledger.replay_buffer import ReplayBuffer
from streamlearn.loop.guarding import Guarding
from streamlearn.models.build import ModelSpec
from streamlearn.records import UNLABELLED, Example, MicroBatch, Schema
from tests.unit.test_learner import differing, settings

SCHEMA = Schema((4,), np.dtype(np.float32), ("a", "b", "c"))
SPEC = ModelSpec("mlp", {"hidden": [16]}, (4,), 3, normalise=False, scale=1.0)
CENTRES_CF = np.array([[3, 0, 0, 0], [0, 3, 0, 0], [0, 0, 3, 0]], np.float32)


class Loop:
    """A learner of three easy classes, and the guard that checks it every fifth step."""

    def __init__(self, *, reaction: Literal["alarm", "renew"] = "alarm", on: bool = True) -> None:
        self.learner = Learner(SPEC, settings(twin="measure", noise="none", learning_rate=0.02))
        self.replay, self.board = ReplayBuffer(100, SCHEMA, 0), Scoreboard(SCHEMA.classes, window=200)
        rng = np.random.default_rng(0)
        for n in range(60):
            x = (CENTRES_CF[n % 3] + rng.normal(0, 0.3, 4)).astype(np.float32)
            self.replay.add(Example(f"s{n}", x, n % 3))
        self.guarding = Guarding(
            self.learner,
            self.replay,
            self.board,
            Election(self.learner.candidates),
            guard=Guard(on, look_every_steps=5, keep_good_every_steps=20, backoff_steps=20),
            reaction=reaction,
            trust_labels=5,
        )
        self.allowed: list[bool] = []

    def run(self, steps: int, *, bad: bool = False) -> Loop:
        for _ in range(steps):
            step = self.learner.step + 1
            fresh_x = np.random.default_rng(step).normal(1, 1, (8, 4)).astype(np.float32)
            if bad:
                fresh_x[0] = np.nan
            x_L, y_L = np.zeros((6, 4), np.float32), np.zeros(6, np.int64)
            self.replay.draw_into(x_L, y_L, step)
            factors = self.guarding.factors(step)
            batch = MicroBatch(fresh_x, 8, x_L, y_L, 6)
            self.learner.learn(
                batch, weight_factor=factors.consistency_weight, learning_rate_factor=factors.learning_rate
            )
            self.guarding.check(step)
            self.allowed.append(self.guarding.may_publish)
        return self

    def labels(self, count: int, *, right: bool, version: int = 0) -> Loop:
        """Labels of samples that this version answered."""
        for _ in range(count):
            self.guarding.compared(right=right, version=version)
        return self

    def collapse(self) -> None:
        """Student and teacher answer the first class to every input."""
        for network in ("student", "teacher"):
            self.change(f"{network}.net.layers.3.weight", 0.0)
            self.change(f"{network}.net.layers.3.bias", np.array([50.0, -50.0, -50.0], np.float32))

    def change(self, prefix: str, value: object) -> None:
        """Overwrite the learner's arrays of these names."""
        state = self.learner.state()
        names = [name for name in state if name.startswith(prefix)]
        assert names, prefix
        for name in names:
            state[name] = np.broadcast_to(value, state[name].shape).astype(state[name].dtype)
        self.learner.load_state(state)

    def teacher_accuracy(self) -> float:
        found = self.learner.classify(CENTRES_CF)
        return float((found.teacher_B == np.arange(3)).mean())


class TestCollapse:
    def test_is_repaired_by_the_twin_and_never_published(self):
        """Nothing is published from the first bad check until the twin is adopted."""
        loop = Loop().run(100)
        assert all(loop.allowed)
        assert loop.teacher_accuracy() == 1.0
        loop.collapse()
        assert loop.teacher_accuracy() < 0.5

        loop.run(15)

        assert loop.allowed[-11:] == [False] * 10 + [True], "suspect at the first check, repaired at the third"
        assert loop.guarding.just_repaired
        assert loop.teacher_accuracy() == 1.0
        assert loop.guarding.report().guard.actions["adopt_twin"] == 1
        assert loop.guarding.factors(loop.learner.step + 1).consistency_weight == 0.5

    def test_is_left_alone_if_the_guard_is_off(self):
        """`guard.on = false`."""
        loop = Loop(on=False).run(100)
        loop.collapse()

        loop.run(15)

        assert all(loop.allowed)
        assert loop.guarding.report().guard.actions["adopt_twin"] == 0

    def test_resets_the_comparison_with_the_twin(self):
        """The scores belong to the teacher before the repair."""
        loop = Loop().run(100)
        for _ in range(50):
            loop.board.gain.update(0, 1, 0)
        loop.collapse()

        loop.run(15)

        assert len(loop.board.gain) == 0


class TestWorseThanTwin:
    def test_gives_the_twins_weights_to_the_teacher(self):
        """When labels show with confidence that unlabelled samples did harm."""
        loop = Loop().run(100)
        for n in range(200):
            loop.board.gain.update(0, int(n % 5 == 0), 0)

        loop.run(5)

        assert loop.guarding.report().guard.actions["adopt_twin"] == 1
        found = loop.learner.classify(np.random.default_rng(3).normal(1, 2, (50, 4)).astype(np.float32))
        assert found.twin_B is not None
        assert (found.teacher_B == found.twin_B).all()


class TestNotFinite:
    def test_three_skipped_steps_in_a_row_roll_back(self):
        """To good weights, at a lower learning rate."""
        loop = Loop().run(100)

        loop.run(5, bad=True)

        report = loop.guarding.report().guard
        assert report.actions["roll_back"] == 1
        assert loop.guarding.factors(loop.learner.step + 1).learning_rate == 0.5
        assert loop.teacher_accuracy() == 1.0

    @pytest.mark.parametrize("where", ["weight", "answers"])
    def test_a_teacher_that_is_not_finite_is_neither_published_nor_kept(self, where):
        """Whether a weight is NaN, or finite weights give infinite answers."""
        loop = Loop().run(100)
        if where == "weight":
            loop.change("teacher.net.layers.3.bias", np.nan)
        else:
            loop.change("teacher.net.layers.3.weight", 3e38)
            loop.change("teacher.net.layers.3.bias", -3e38)
        loop.guarding.check(105)

        report = loop.guarding.report().guard
        assert report.looks["nonfinite"] == 1
        assert report.actions["roll_back"] == 1
        assert loop.teacher_accuracy() == 1.0
        assert all(np.isfinite(array).all() for name, array in loop.learner.state().items() if name.startswith("good."))

    def test_a_twin_that_is_not_finite_is_not_adopted(self):
        """Its NaN answers count as no class."""
        loop = Loop().run(100)
        loop.collapse()
        loop.change("twin.teacher.", np.nan)

        found = loop.learner.classify(CENTRES_CF)
        for step in (105, 110, 115):
            loop.guarding.check(step)

        assert found.twin_B is not None
        assert found.twin_B.tolist() == [UNLABELLED] * 3
        assert loop.guarding.report().guard.actions["adopt_twin"] == 0
        assert loop.teacher_accuracy() == 1.0

    @pytest.mark.parametrize("on", [False, True])
    def test_a_labelled_row_that_fails_alone_is_evicted(self, on):
        """Replay would make every step fail that draws it. I3: the same after a restart."""
        loop = Loop(on=on).run(100)
        loop.replay.add(Example("bad", np.full(4, np.nan, np.float32), 1))
        loop.run(2)
        resumed = Loop(on=on)
        resumed.learner.load_state(loop.learner.state())
        resumed.replay.load(loop.replay.state())
        resumed.guarding.load(loop.guarding.state())

        held = [["bad" in one.run(1).replay for _ in range(250)] for one in (loop, resumed)]

        assert held[0] == held[1]
        assert held[0][0]
        assert not held[0][-1]
        assert len(loop.replay) == 60
        assert differing(loop.learner.state(), resumed.learner.state()) == []
        assert loop.learner.health().skipped_in_a_row == 0

    def test_no_row_is_evicted_if_the_weights_are_the_cause(self):
        """Then all rows fail."""
        loop = Loop(on=False).run(100)
        loop.change("student.", np.nan)

        loop.run(20)

        assert loop.learner.health().skipped_in_a_row == 20
        assert len(loop.replay) == 60

    def test_a_short_burst_is_forgotten(self):
        """Two skipped steps are no reason to roll back."""
        loop = Loop().run(101)

        loop.run(2, bad=True).run(20)

        assert loop.guarding.report().guard.actions["roll_back"] == 0
        assert all(loop.allowed)


class TestDrift:
    def answers(self, apart: float) -> Predictions:
        """Four samples on which student and teacher differ by `apart`."""
        teacher_BC = np.tile(np.array([0.9, 0.05, 0.05], np.float32), (4, 1))
        return Predictions(teacher_BC, teacher_BC + np.array([-apart, apart, 0], np.float32))

    @pytest.mark.parametrize(("reaction", "averaged_at"), [("alarm", 0), ("renew", 50)])
    @pytest.mark.parametrize("source", ["inputs", "error"])
    def test_reacts_as_set(self, reaction, averaged_at, source):
        """With `renew` the average restarts, and without labels the teacher loses trust."""
        loop, rng = Loop(reaction=reaction).run(50).labels(20, right=True), np.random.default_rng(0)
        for changed in (False, True):
            for _ in range(300):
                if source == "error":
                    loop.guarding.scored(wrong=changed)
                else:
                    loop.guarding.arrived(rng.normal(5.0 * changed, size=(4, 2)), self.answers(0.05))

        assert loop.guarding.report().drift[source].alarms >= 1
        assert int(loop.learner.state()["learner.averaged_at"]) == averaged_at
        lost = (reaction, source) == ("renew", "inputs")
        assert loop.guarding.factors(51).consistency_weight == (0.0 if lost else 1.0)

    def test_trust_returns_with_labels_of_new_samples(self):
        """Labels of samples from before the drift do not count."""
        loop, rng = Loop(reaction="renew").run(50).labels(20, right=True), np.random.default_rng(0)
        for shift in (0.0, 5.0):
            for _ in range(300):
                loop.guarding.arrived(rng.normal(shift, size=(4, 2)), self.answers(0.05))

        loop.labels(20, right=True, version=50)
        before = loop.guarding.factors(51).consistency_weight
        loop.labels(20, right=True, version=51)

        assert before == 0.0
        assert loop.guarding.factors(51).consistency_weight > 0.9

    def test_several_alarms_restart_the_average_once(self):
        """An average that restarted at each alarm would stay short. I3: also after a restart."""
        loop = Loop(reaction="renew").run(50)
        for wrong in (False, True):
            for _ in range(300):
                loop.guarding.scored(wrong=wrong)
        loop.run(50)
        restarted = Loop(reaction="renew")
        restarted.learner.load_state(loop.learner.state())
        restarted.guarding.load(loop.guarding.state())

        for wrong in (False, True):
            for _ in range(300):
                restarted.guarding.scored(wrong=wrong)

        assert restarted.guarding.report().drift["error"].alarms >= 2
        assert int(restarted.learner.state()["learner.averaged_at"]) == 50

    def test_is_detected_without_labels(self):
        """Student and teacher disagree on new inputs."""
        loop, rng = Loop(), np.random.default_rng(0)
        for _ in range(1500):
            loop.guarding.arrived(rng.normal(size=(4, 2)), self.answers(0.05 + rng.uniform(-0.01, 0.01)))
        before = loop.guarding.report().drift["disagreement"].alarms

        for _ in range(300):
            loop.guarding.arrived(rng.normal(size=(4, 2)), self.answers(0.4 + rng.uniform(-0.01, 0.01)))

        assert before == 0
        assert loop.guarding.report().drift["disagreement"].alarms >= 1

    def test_disagreement_raises_an_alarm_without_a_reaction(self):
        """It has many reasons other than drift."""
        loop, rng = Loop(reaction="renew").run(50), np.random.default_rng(0)

        for apart in (0.05, 0.4):
            for _ in range(1000):
                loop.guarding.arrived(rng.normal(size=(4, 2)), self.answers(apart + rng.uniform(-0.01, 0.01)))

        assert loop.guarding.report().drift["disagreement"].alarms >= 1
        assert int(loop.learner.state()["learner.averaged_at"]) == 0


class TestRestart:
    @pytest.mark.parametrize("at", [100, 105, 107])
    def test_in_the_middle_of_a_collapse_changes_nothing(self, at):
        """I3: healthy, suspect, and between two checks."""
        whole, restarted = Loop(), Loop()
        whole.run(100)
        whole.collapse()
        whole.run(at - 100)
        restarted.learner.load_state(whole.learner.state())
        restarted.replay.load(whole.replay.state())
        restarted.board.load(whole.board.state())
        restarted.guarding.load(whole.guarding.state())

        whole.run(30)
        restarted.run(30)

        one, other = whole.learner.state(), restarted.learner.state()
        assert [name for name in one if not np.array_equal(one[name], other[name])] == []
        assert whole.allowed[-30:] == restarted.allowed[-30:]
        assert whole.guarding.report() == restarted.guarding.report()
