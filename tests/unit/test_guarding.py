"""The guard in the loop: what it asks of learner, memory and scores, what it does to them, also after a restart."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pytest
import torch

from streamlearn.judge.board import Scoreboard
from streamlearn.judge.guard import GuardSettings
from streamlearn.learn.learner import Learner, Predictions
from streamlearn.ledger.replay_buffer import ReplayBuffer
from streamlearn.loop.guarding import Guarding, WatchSettings
from streamlearn.models.build import ModelSpec
from streamlearn.records import UNLABELLED, Example, MicroBatch, Schema
from tests.unit.test_learner import differing, one_thread, settings  # noqa: F401

SCHEMA = Schema((4,), np.dtype(np.float32), ("a", "b", "c"))
SPEC = ModelSpec("mlp", {"hidden": [16]}, (4,), 3, normalise=False, scale=1.0)
CENTRES_CF = np.array([[3, 0, 0, 0], [0, 3, 0, 0], [0, 0, 3, 0]], np.float32)


class Loop:
    """Learner, memory and scores of three easy classes, and the guard that looks every fifth step."""

    def __init__(self, *, reaction: Literal["alarm", "renew"] = "alarm", **guard: Any) -> None:
        base: dict[str, Any] = {
            "on": True, "look_every_steps": 5, "max_skipped": 3, "patience": 2, "entropy_ratio": 0.5, "max_loss": 0.02,
            "keep_good_every_steps": 20, "backoff_steps": 20,
        }  # fmt: skip
        self.learner = Learner(SPEC, settings(twin=True, noise="none", learning_rate=0.02))
        self.memory, self.board = ReplayBuffer(100, SCHEMA, 0), Scoreboard(SCHEMA.classes, window=200)
        rng = np.random.default_rng(0)
        for n in range(60):
            x = (CENTRES_CF[n % 3] + rng.normal(0, 0.3, 4)).astype(np.float32)
            self.memory.add(Example(f"s{n}", x, n % 3))
        watch = WatchSettings(GuardSettings(**base | guard), drift_delta=0.002, drift_reaction=reaction, trust_labels=5)
        self.guarding = Guarding(self.learner, self.memory, self.board, watch)
        self.allowed: list[bool] = []

    def run(self, steps: int, *, bad: bool = False) -> Loop:
        for _ in range(steps):
            step = self.learner.step + 1
            fresh_x = np.random.default_rng(step).normal(1, 1, (8, 4)).astype(np.float32)
            if bad:
                fresh_x[0] = np.nan
            x_L, y_L = np.zeros((6, 4), np.float32), np.zeros(6, np.int64)
            self.memory.draw_into(x_L, y_L, step)
            factors = self.guarding.factors(step)
            batch = MicroBatch(fresh_x, 8, x_L, y_L, 6)
            self.learner.learn(
                batch, weight_factor=factors.consistency_weight, learning_rate_factor=factors.learning_rate
            )
            self.guarding.look(step)
            self.allowed.append(self.guarding.may_publish)
        return self

    def labels(self, count: int, *, right: bool, version: int = 0) -> Loop:
        """So many come, of samples that were answered by that version."""
        for _ in range(count):
            self.guarding.compared(right=right, version=version)
        return self

    def collapse(self) -> None:
        """Student and teacher answer the first class, whatever they see."""
        with torch.no_grad():
            for network in (self.learner.trainee.student, self.learner.trainee.teacher):
                *_, last = (layer for layer in network.net.modules() if isinstance(layer, torch.nn.Linear))
                last.weight.zero_()
                last.bias.copy_(torch.tensor([50.0, -50.0, -50.0]))

    def teacher_accuracy(self) -> float:
        found = self.learner.classify(CENTRES_CF)
        return float((found.teacher_B == np.arange(3)).mean())


class TestCollapse:
    def test_is_mended_by_the_twin_and_never_shown(self):
        """From the first bad look until the twin is adopted nothing is published; from then on it is."""
        loop = Loop().run(100)
        assert all(loop.allowed)
        assert loop.teacher_accuracy() == 1.0
        loop.collapse()
        assert loop.teacher_accuracy() < 0.5

        loop.run(10)

        assert loop.allowed[-6:] == [False] * 5 + [True], "suspect at the first look, mended at the second"
        assert loop.guarding.just_mended
        assert loop.teacher_accuracy() == 1.0
        assert loop.guarding.report()["guard"]["actions"]["adopt_twin"] == 1
        assert loop.guarding.factors(loop.learner.step + 1).consistency_weight == 0.5

    def test_is_let_be_where_the_guard_is_off(self):
        """A setting that does nothing would be no setting."""
        loop = Loop(on=False).run(100)
        loop.collapse()

        loop.run(10)

        assert all(loop.allowed)
        assert loop.guarding.report()["guard"]["actions"]["adopt_twin"] == 0

    def test_forgets_the_scores_of_the_teacher_that_was(self):
        """The next comparison with the twin is about the teacher as it is now."""
        loop = Loop().run(100)
        for _ in range(50):
            loop.board.gain.update(0, 1, 0)
        loop.collapse()

        loop.run(10)

        assert len(loop.board.gain) == 0


class TestWorseThanTwin:
    def test_gives_the_twins_weights_to_the_teacher(self):
        """When labels say with certainty that unlabelled samples did harm."""
        loop = Loop().run(100)
        for n in range(200):
            loop.board.gain.update(0, int(n % 5 == 0), 0)

        loop.run(5)

        assert loop.guarding.report()["guard"]["actions"]["adopt_twin"] == 1
        found = loop.learner.classify(np.random.default_rng(3).normal(1, 2, (50, 4)).astype(np.float32))
        assert found.twin_B is not None
        assert (found.teacher_B == found.twin_B).all()


class TestNotFinite:
    def test_three_steps_in_a_row_bring_good_weights_back_at_a_lower_rate(self):
        """The weights were not touched, but something about them may be what no step is finite from."""
        loop = Loop().run(100)

        loop.run(5, bad=True)

        report = loop.guarding.report()["guard"]
        assert report["actions"]["roll_back"] == 1
        assert loop.guarding.factors(loop.learner.step + 1).learning_rate == 0.5
        assert loop.teacher_accuracy() == 1.0

    @pytest.mark.parametrize("where", ["weight", "answers"])
    def test_a_teacher_that_is_not_finite_is_neither_published_nor_kept(self, where):
        """Its answers were class 0; a collapse that remedies did not end was accepted, and it was published."""
        loop = Loop().run(100)
        *_, last = (m for m in loop.learner.trainee.teacher.net.modules() if isinstance(m, torch.nn.Linear))
        with torch.no_grad():
            if where == "weight":
                last.bias.fill_(torch.nan)
            else:  # finite weights whose products are not
                last.weight.fill_(3e38)
                last.bias.fill_(-3e38)
        loop.guarding.look(105)

        report = loop.guarding.report()["guard"]
        assert report["looks"]["nonfinite"] == 1
        assert report["actions"]["roll_back"] == 1
        assert loop.teacher_accuracy() == 1.0
        assert all(np.isfinite(array).all() for name, array in loop.learner.state().items() if name.startswith("good."))

    def test_a_twin_that_is_not_finite_is_not_adopted(self):
        """NaN answers were class 0 of the twin as well."""
        loop = Loop().run(100)
        loop.collapse()
        assert loop.learner.twin is not None
        with torch.no_grad():
            for parameter in loop.learner.twin.trainee.teacher.parameters():
                parameter.fill_(torch.nan)

        found = loop.learner.classify(CENTRES_CF)
        loop.guarding.look(105)
        loop.guarding.look(110)

        assert found.twin_B is not None
        assert found.twin_B.tolist() == [UNLABELLED] * 3
        assert loop.guarding.report()["guard"]["actions"]["adopt_twin"] == 0
        assert loop.teacher_accuracy() == 1.0

    @pytest.mark.parametrize("on", [False, True])
    def test_a_labelled_row_that_fails_alone_is_evicted(self, on):
        """Replay would make every step fail that draws it. I3: the same after a restart."""
        loop = Loop(on=on).run(100)
        loop.memory.add(Example("bad", np.full(4, np.nan, np.float32), 1))
        loop.run(2)
        resumed = Loop(on=on)
        resumed.learner.load_state(loop.learner.state())
        resumed.memory.load(loop.memory.state())
        resumed.guarding.load(loop.guarding.state())

        held = [["bad" in one.run(1).memory for _ in range(250)] for one in (loop, resumed)]

        assert held[0] == held[1]
        assert held[0][0]
        assert not held[0][-1]
        assert len(loop.memory) == 60
        assert differing(loop.learner.state(), resumed.learner.state()) == []
        assert loop.learner.health().skipped_in_a_row == 0

    def test_no_row_is_evicted_where_the_weights_are_the_cause(self):
        """All rows fail then, so none of them is to blame."""
        loop = Loop(on=False).run(100)
        with torch.no_grad():
            for parameter in loop.learner.trainee.student.parameters():
                parameter.fill_(torch.nan)

        loop.run(20)

        assert loop.learner.health().skipped_in_a_row == 20
        assert len(loop.memory) == 60

    def test_a_short_burst_is_forgotten(self):
        """Two steps that were skipped, and the stream goes on."""
        loop = Loop().run(101)

        loop.run(2, bad=True).run(20)

        assert loop.guarding.report()["guard"]["actions"]["roll_back"] == 0
        assert all(loop.allowed)


class TestDrift:
    def answers(self, apart: float) -> Predictions:
        """Four samples on which student and teacher are so far apart."""
        teacher_BC = np.tile(np.array([0.9, 0.05, 0.05], np.float32), (4, 1))
        return Predictions(teacher_BC, teacher_BC + np.array([-apart, apart, 0], np.float32))

    @pytest.mark.parametrize(("reaction", "averaged_at"), [("alarm", 0), ("renew", 50)])
    @pytest.mark.parametrize("source", ["inputs", "error"])
    def test_does_what_the_setting_says(self, reaction, averaged_at, source):
        """The alarm is told, or the average begins anew; the teacher loses trust where no labels say how much."""
        loop, rng = Loop(reaction=reaction).run(50).labels(20, right=True), np.random.default_rng(0)
        for changed in (False, True):
            for _ in range(300):
                if source == "error":
                    loop.guarding.scored(wrong=changed)
                else:
                    loop.guarding.arrived(rng.normal(5.0 * changed, size=(4, 2)), self.answers(0.05))

        assert loop.guarding.report()["drift"][source]["alarms"] >= 1
        assert int(loop.learner.state()["learner.averaged_at"]) == averaged_at
        lost = (reaction, source) == ("renew", "inputs")
        assert loop.guarding.factors(51).consistency_weight == (0.0 if lost else 1.0)

    def test_is_over_when_labels_of_new_samples_say_that_the_teacher_is_right(self):
        """Those of samples that came before say nothing of what comes now."""
        loop, rng = Loop(reaction="renew").run(50).labels(20, right=True), np.random.default_rng(0)
        for shift in (0.0, 5.0):
            for _ in range(300):
                loop.guarding.arrived(rng.normal(shift, size=(4, 2)), self.answers(0.05))

        loop.labels(20, right=True, version=50)
        before = loop.guarding.factors(51).consistency_weight
        loop.labels(20, right=True, version=51)

        assert before == 0.0
        assert loop.guarding.factors(51).consistency_weight > 0.9

    def test_is_reacted_to_once_for_the_several_alarms_it_raises(self):
        """An average that begins anew at each of them would stay short."""
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

        assert restarted.guarding.report()["drift"]["error"]["alarms"] >= 2
        assert int(restarted.learner.state()["learner.averaged_at"]) == 50

    def test_is_seen_before_any_label_comes(self):
        """Student and teacher no longer agree on what comes in."""
        loop, rng = Loop(), np.random.default_rng(0)
        for _ in range(1500):
            loop.guarding.arrived(rng.normal(size=(4, 2)), self.answers(0.05 + rng.uniform(-0.01, 0.01)))
        before = loop.guarding.report()["drift"]["disagreement"]["alarms"]

        for _ in range(300):
            loop.guarding.arrived(rng.normal(size=(4, 2)), self.answers(0.4 + rng.uniform(-0.01, 0.01)))

        assert before == 0
        assert loop.guarding.report()["drift"]["disagreement"]["alarms"] >= 1

    def test_of_what_the_networks_disagree_on_is_told_and_not_reacted_to(self):
        """They may for many reasons."""
        loop, rng = Loop(reaction="renew").run(50), np.random.default_rng(0)

        for apart in (0.05, 0.4):
            for _ in range(1000):
                loop.guarding.arrived(rng.normal(size=(4, 2)), self.answers(apart + rng.uniform(-0.01, 0.01)))

        assert loop.guarding.report()["drift"]["disagreement"]["alarms"] >= 1
        assert int(loop.learner.state()["learner.averaged_at"]) == 0


class TestRestart:
    @pytest.mark.parametrize("at", [100, 105, 107])
    def test_in_the_middle_of_a_collapse_goes_on_as_if_there_had_been_none(self, at):
        """I3: healthy, suspect, and between two looks."""
        whole, restarted = Loop(), Loop()
        whole.run(100)
        whole.collapse()
        whole.run(at - 100)
        restarted.learner.load_state(whole.learner.state())
        restarted.memory.load(whole.memory.state())
        restarted.board.load(whole.board.state())
        restarted.guarding.load(whole.guarding.state())

        whole.run(30)
        restarted.run(30)

        one, other = whole.learner.state(), restarted.learner.state()
        assert [name for name in one if not np.array_equal(one[name], other[name])] == []
        assert whole.allowed[-30:] == restarted.allowed[-30:]
        assert whole.guarding.report() == restarted.guarding.report()
