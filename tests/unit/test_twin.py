"""The label-only twin, the guard's remedies, and spare classes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from streamlearn.learn.learner import Learner
from streamlearn.models.build import ModelSpec
from tests.unit.test_learner import IMAGES, TABLE, after, batch, batches, differing, settings

PLAIN = ModelSpec("mlp", {"hidden": [16]}, (5,), 3, normalise=True, scale=1.0)
X = batch(TABLE, 99).fresh_x


def part(state, prefix):
    """Arrays of one part, without its prefix."""
    return {name.removeprefix(prefix): array for name, array in state.items() if name.startswith(prefix)}


class TestTwin:
    def test_changes_nothing_of_student_and_teacher(self):
        """The comparison must not change what it measures."""
        with_twin = after(TABLE, settings(twin="measure"), batches(TABLE, 1, 12)).state()
        without = after(TABLE, settings(), batches(TABLE, 1, 12)).state()

        for group in ("student.", "teacher.", "optimizer."):
            assert differing(part(with_twin, group), part(without, group)) == []

    def test_is_what_a_learner_of_labels_only_would_be(self):
        """Bit-equal to `method = supervised` on the same rows."""
        stream = batches(PLAIN, 1, 14)
        twin = after(PLAIN, settings(twin="measure", noise="none"), stream).state()
        rival = after(PLAIN, settings(method="supervised", noise="none"), stream).state()

        for group in ("student.net.", "teacher.net.", "optimizer.net."):
            assert differing(part(twin, f"twin.{group}"), part(rival, group)) == []

    def test_becomes_the_student_if_the_method_becomes_supervised(self):
        """The twin is what `supervised` would have learned, and the student may have collapsed."""
        before = after(PLAIN, settings(twin="measure", noise="none"), batches(PLAIN, 1, 14))
        learner = Learner(PLAIN, settings(method="supervised", noise="none"))
        rival = after(PLAIN, settings(method="supervised", noise="none"), batches(PLAIN, 1, 14))

        learner.load_state(before.state())
        for number in range(14, 20):
            learner.learn(batch(PLAIN, number))
            rival.learn(batch(PLAIN, number))

        assert np.array_equal(learner.classify(X).teacher_B, rival.classify(X).teacher_B)
        for group in ("student.net.", "teacher.net.", "optimizer.net."):
            assert differing(part(learner.state(), group), part(rival.state(), group)) == []

    def test_is_off_with_supervised(self):
        """Student and twin would be equal."""
        learner = after(TABLE, settings(method="supervised", twin="measure"), batches(TABLE, 1, 2))

        assert not any(name.startswith("twin.") for name in learner.state())
        assert learner.classify(X).twin_B is None
        assert not learner.adopt_twin()

    @pytest.mark.parametrize("spec", [TABLE, IMAGES], ids=["mlp", "convnet"])
    def test_a_restart_equals_no_restart(self, spec):
        """I3, with twin, good copies and restarted schedules."""
        of = settings(spec, twin="measure")
        whole = after(spec, of, batches(spec, 1, 6))
        whole.keep_good()
        whole.restart_average()
        restarted = Learner(spec, of)
        restarted.load_state(whole.state())

        for learner in (whole, restarted):
            for one in batches(spec, 7, 12):
                learner.learn(one)

        assert differing(whole.state(), restarted.state()) == []

    def test_that_was_off_before_starts_as_the_student(self):
        """A checkpoint without a twin is no error."""
        old = after(TABLE, settings(), batches(TABLE, 1, 8))
        learner = Learner(TABLE, settings(twin="measure"))

        learner.load_state(old.state())

        found = learner.classify(X)
        assert found.twin_B is not None
        assert np.array_equal(found.teacher_B, found.twin_B)

    def test_that_is_off_is_dropped_from_a_checkpoint(self):
        """A checkpoint with a twin is no error either."""
        old = after(TABLE, settings(twin="measure"), batches(TABLE, 1, 8))
        learner = Learner(TABLE, settings())

        learner.load_state(old.state())

        assert differing(part(learner.state(), "student."), part(old.state(), "student.")) == []


class TestServing:
    def test_the_served_candidate_answers_and_is_published(self):
        """The student still learns from the teacher."""
        learner = after(TABLE, settings(twin="measure"), batches(TABLE, 1, 12))
        teacher = learner.predict(X).teacher_probs_BC

        learner.serve(learner.candidates.index("twin"))

        found, published = learner.classify(X), learner.teacher_state()
        assert found.candidates_KB.shape == (2, len(X))
        assert np.array_equal(learner.predict(X).teacher_probs_BC.argmax(1), found.twin_B)
        assert np.array_equal(teacher.argmax(1), found.teacher_B)
        twin = part(learner.state(), "twin.teacher.net.")
        assert twin
        assert all(np.array_equal(published[f"net.{name}"], array) for name, array in twin.items())

    def test_it_stays_served_over_a_restart(self):
        """Until another is promoted."""
        learner = after(TABLE, settings(twin="measure"), batches(TABLE, 1, 3))
        learner.serve(1)
        restarted = Learner(TABLE, settings(twin="measure"))

        restarted.load_state(learner.state())

        assert restarted.served == 1

    @pytest.mark.parametrize("remedy", ["roll_back", "adopt_twin"])
    def test_after_a_remedy_the_teacher_is_served(self, remedy):
        """Its weights are new."""
        learner = after(TABLE, settings(twin="measure"), batches(TABLE, 1, 3))
        learner.keep_good()
        learner.serve(1)

        assert getattr(learner, remedy)()

        assert learner.served == 0

    def test_averages_of_earlier_versions_are_dropped_from_a_checkpoint(self):
        """They were candidates too, so the index of the served one does not hold."""
        learner = after(TABLE, settings(twin="measure"), batches(TABLE, 1, 3))
        learner.serve(1)
        bank = {"bank.0.9.net.weight": np.zeros(3, np.float32)}
        restarted = Learner(TABLE, settings(twin="measure"))

        restarted.load_state(learner.state() | bank)

        assert restarted.served == 0
        assert differing(part(restarted.state(), "student."), part(learner.state(), "student.")) == []


class TestRemedies:
    def test_adopting_the_twin_makes_its_answers_the_teachers(self):
        """The remedy for a collapse."""
        learner = after(TABLE, settings(twin="measure"), batches(TABLE, 1, 30))
        before = learner.state()

        assert learner.adopt_twin()

        state = learner.state()
        for group in ("student.net.", "teacher.net.", "optimizer.net."):
            assert differing(part(before, group), part(before, f"twin.{group}")), "the case shows nothing"
            assert differing(part(state, group), part(before, f"twin.{group}")) == []
        learner.learn(batch(TABLE, 31))
        assert np.isfinite(learner.predict(X).student_probs_BC).all()

    def test_rolling_back_restores_the_older_good_teacher(self):
        """The newer one may be from after the problem began."""
        learner = after(TABLE, settings(), batches(TABLE, 1, 5))
        good = learner.predict(X).teacher_probs_BC
        learner.keep_good()
        for one in batches(TABLE, 6, 10):
            learner.learn(one)
        learner.keep_good()
        learner.learn(batch(TABLE, 11))

        assert learner.roll_back()

        answers = learner.predict(X)
        # Input statistics are not rolled back, so the answers are only nearly the same.
        assert np.abs(answers.teacher_probs_BC - good).max() < 0.15
        assert np.array_equal(answers.teacher_probs_BC, answers.student_probs_BC)
        assert not any(array.any() for array in part(learner.state(), "optimizer.").values())

    @pytest.mark.parametrize("remedy", ["roll_back", "adopt_twin", "restart_average", "another_method"])
    @pytest.mark.parametrize(
        "method", [{"align": "labels", "gate": "softmatch"}, {"method": "temporal_ensembling", "ensemble_slots": 16}]
    )
    def test_remedies_reset_the_state_of_the_method(self, remedy, method):
        """Otherwise the restored student is compared with a collapsed teacher, or with data from before the drift."""
        learner = Learner(TABLE, settings(twin="measure", **method))
        first = part(learner.state(), "method.")
        learner.keep_good()
        for number in range(1, 6):
            learner.learn(replace(batch(TABLE, number), keys=np.arange(9), trained_ids=["one"]))
        assert differing(first, part(learner.state(), "method."))

        getattr(learner, remedy)()

        assert differing(first, part(learner.state(), "method.")) == []

    def test_without_a_good_copy_nothing_is_rolled_back(self):
        """`roll_back` returns False."""
        learner = after(TABLE, settings(), batches(TABLE, 1, 5))
        before = learner.state()

        assert not learner.roll_back()

        assert differing(before, learner.state()) == []

    def test_health_counts_skipped_steps_in_a_row(self):
        """One good step resets the count."""
        learner, seen = Learner(TABLE, settings()), []
        for number, bad in enumerate((False, True, True, True, False)):
            one = batch(TABLE, number)
            if bad:
                one.fresh_x[0, 0] = np.nan
            learner.learn(one)
            seen.append(learner.health().skipped_in_a_row)

        assert seen == [0, 1, 2, 3, 0]

    def test_distance_is_relative_to_the_students_weights(self):
        """Against numpy."""
        learner = after(PLAIN, settings(), batches(PLAIN, 1, 9))
        state = learner.state()
        student, teacher = (
            np.concatenate([a.ravel() for n, a in state.items() if n.startswith(f"{who}.net.")])
            for who in ("student", "teacher")
        )

        expected = np.linalg.norm(teacher - student) / np.linalg.norm(student)

        assert learner.health().distance == pytest.approx(expected, rel=1e-5)

    def test_factors_lower_weight_and_rate(self):
        """The step uses them, and the costs report them."""
        learner = Learner(TABLE, settings(rampup_steps=0))

        learner.learn(batch(TABLE, 1), weight_factor=0.5, learning_rate_factor=0.25)

        costs = learner.read_costs()
        assert (costs.consistency_weight, costs.learning_rate) == (2.5, 3e-3 / 4)


class TestSpareClasses:
    SPARE = ModelSpec("mlp", {"hidden": [16]}, (5,), 5, normalise=True, scale=1.0, spare=2)

    def test_have_probability_zero(self):
        """Exactly 0, and the others add up to 1."""
        stream = [batch(PLAIN, number) for number in range(10)]
        learner = after(self.SPARE, settings(twin="measure"), stream)

        probs_BC = learner.predict(X).teacher_probs_BC

        assert not probs_BC[:, 3:].any()
        assert probs_BC.sum(axis=1) == pytest.approx(1.0, abs=1e-5)
        assert all(np.isfinite(array).all() for array in learner.state().values())

    def test_are_answered_and_learned_once_admitted(self):
        """By teacher and twin, and a restart keeps it."""
        learner = after(self.SPARE, settings(twin="measure", learning_rate=0.02), [batch(PLAIN, n) for n in range(5)])
        learner.admit(4)
        for number in range(60):
            one = batch(PLAIN, number)
            one.labelled_y[: one.labelled_count] = 3
            one.labelled_x[: one.labelled_count] += 5.0
            learner.learn(one)

        restarted = Learner(self.SPARE, settings(twin="measure"))
        restarted.load_state(learner.state())
        found = restarted.classify(X + 5.0)

        assert (found.teacher_B == 3).all()
        assert found.twin_B is not None
        assert (found.twin_B == 3).all()
        assert not restarted.predict(X).teacher_probs_BC[:, 4].any()
