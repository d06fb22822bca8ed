"""The guard: findings of scripted looks, remedies, and that every freeze ends."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamlearn.judge.guard import LOOK_EVERY_STEPS, REASONS, Action, Guard, Signals

PATIENCE, ENTROPY_RATIO = 3, 0.5
HEALTHY = Signals(
    updates=0,
    skipped_in_a_row=0,
    finite=True,
    distance=0.1,
    probe_entropy=2.2,
    probe_label_entropy=2.3,
    twin_probe_entropy=None,
    gain_high=None,
    gain_count=0,
)
WITH_TWIN: dict[str, Any] = {"twin_probe_entropy": 2.2, "gain_high": 0.02, "gain_count": 500}
COLLAPSED: dict[str, Any] = {"probe_entropy": 0.1}
TWIN_AHEAD: dict[str, Any] = {**WITH_TWIN, "gain_high": -0.05}
SKIPPING: dict[str, Any] = {"skipped_in_a_row": 3}
NO, KEEP, BACK, TWIN, ACCEPT = Action.NONE, Action.KEEP_GOOD, Action.ROLL_BACK, Action.ADOPT_TWIN, Action.ACCEPT


class Verdict(NamedTuple):
    healthy: bool
    reasons: tuple[str, ...]
    action: Action


class Watched:
    """A guard that looks every 20 steps, with an update in each step."""

    def __init__(self, *, on: bool = True, **settings: int) -> None:
        self.guard = Guard(on, **settings)
        self.step = 0

    def look(self, **signals: Any) -> Verdict:
        self.step += LOOK_EVERY_STEPS
        action = self.guard.look(self.step, dataclasses.replace(HEALTHY, **{"updates": self.step, **signals}))
        return Verdict(not self.guard.frozen, self.guard.reasons, action)

    def looks(self, count: int, **signals: Any) -> list[Action]:
        return [self.look(**signals).action for _ in range(count)]

    @property
    def factors(self) -> tuple[float, float]:
        return self.factors_at(self.step + 1)

    def factors_at(self, step: int) -> tuple[float, float]:
        factors = self.guard.factors(step)
        return factors.consistency_weight, factors.learning_rate


def healthy_for_long(**signals: Any) -> Watched:
    """After 30 healthy looks: two copies, and usual values of everything."""
    guarded = Watched()
    guarded.looks(30, **signals)
    return guarded


class TestNonFiniteTeacher:
    def test_is_frozen_and_rolled_back_at_once_and_never_accepted(self):
        """NaN weights cannot become healthy, however often remedies fail."""
        guarded = healthy_for_long()

        verdicts = [guarded.look(finite=False) for _ in range(60)]

        assert verdicts[0].action is BACK
        assert verdicts[0].reasons == ("nonfinite",)
        assert not any(verdict.healthy for verdict in verdicts)
        assert not {ACCEPT, KEEP} & {verdict.action for verdict in verdicts}


class TestHealth:
    def test_is_copied_every_200_steps(self):
        """A copy at the end of each healthy stretch, none before the first."""
        actions = Watched().looks(31)

        assert [place for place, action in enumerate(actions, start=1) if action is KEEP] == [11, 21, 31]

    def test_is_copied_only_after_a_whole_stretch(self):
        """An unhealthy look restarts the stretch."""
        guarded = Watched()
        guarded.looks(9)
        guarded.look(**SKIPPING)

        actions = guarded.looks(11)

        assert actions == [NO] * 10 + [KEEP]

    def test_of_every_look_changes_nothing(self):
        """No freeze, no reason, factors of 1."""
        guarded = healthy_for_long(**WITH_TWIN)

        assert (guarded.guard.frozen, guarded.guard.report().reasons, guarded.factors) == (False, (), (1.0, 1.0))


class TestNonFiniteSteps:
    def test_roll_back_at_once(self):
        """Three in a row need no second look."""
        guarded = healthy_for_long()

        verdict = guarded.look(**SKIPPING)

        assert verdict == Verdict(healthy=False, reasons=("nonfinite",), action=BACK)
        assert guarded.factors == (1.0, 0.5)

    def test_that_have_ended_need_no_remedy(self):
        """They changed nothing."""
        verdict = healthy_for_long().look(skipped_in_a_row=2)

        assert verdict.healthy

    def test_roll_back_again_only_after_a_pause_that_doubles(self):
        """After 200, 400, 800 and 1600 steps, while they continue."""
        guarded = healthy_for_long()
        first = guarded.step + 20

        steps = [guarded.step for _ in range(160) if guarded.look(**SKIPPING).action is BACK]

        assert [step - first for step in steps] == [0, 200, 600, 1400, 3000]
        assert guarded.factors == (1.0, 1 / 32)

    def test_come_before_other_findings(self):
        """Nothing is learned, so nothing else can improve or deteriorate."""
        guarded = healthy_for_long()
        guarded.look(**SKIPPING)

        assert guarded.looks(5, **SKIPPING, **COLLAPSED) == [NO] * 5

    def test_adopt_the_twin_the_second_time(self):
        """The copy failed in the same way."""
        guarded = healthy_for_long(**WITH_TWIN)

        actions = guarded.looks(11, **WITH_TWIN, **SKIPPING)

        assert [action for action in actions if action is not NO] == [BACK, TWIN]

    def test_only_lower_the_rate_without_a_copy_and_a_twin(self):
        """At the very start."""
        guarded = Watched()

        assert guarded.looks(5, **SKIPPING) == [NO] * 5
        assert guarded.factors == (1.0, 0.5)
        assert guarded.guard.frozen

    def test_adopt_the_twin_before_the_first_copy(self):
        """It has the only other weights."""
        assert Watched().look(**WITH_TWIN, **SKIPPING).action is TWIN

    def test_restore_the_learning_rate_after_the_pause(self):
        """200 steps after the last unhealthy look."""
        guarded = healthy_for_long()
        guarded.look(**SKIPPING)

        guarded.looks(9)
        braked = guarded.factors_at(guarded.step + 19)

        assert (braked, guarded.factors_at(guarded.step + 20)) == ((1.0, 0.5), (1.0, 1.0))


class TestCollapse:
    def test_is_treated_at_the_third_look(self):
        """Publication is frozen from the first."""
        guarded = healthy_for_long()

        assert guarded.looks(3, **COLLAPSED) == [NO, NO, BACK]
        assert guarded.guard.frozen

    def test_with_a_healthy_twin_adopts_the_twin(self):
        """It has the newest labels; its learning rate is not the cause."""
        guarded = healthy_for_long(**WITH_TWIN)

        assert guarded.looks(3, **WITH_TWIN, **COLLAPSED) == [NO, NO, TWIN]
        assert guarded.factors == (0.5, 1.0)

    def test_without_a_twin_lowers_both_factors(self):
        """The cause is unknown."""
        guarded = healthy_for_long()

        guarded.looks(3, **COLLAPSED)

        assert guarded.factors == (0.5, 0.5)

    def test_is_no_collapse_where_the_twin_is_as_low(self):
        """Constant input, or random labels: other weights would not help."""
        guarded = healthy_for_long(**WITH_TWIN)

        assert guarded.look(**{**WITH_TWIN, **COLLAPSED, "twin_probe_entropy": 0.15}).healthy

    def test_is_no_collapse_where_the_labels_have_few_classes(self):
        """The replay buffer holds little else by now."""
        assert healthy_for_long().look(probe_entropy=0.1, probe_label_entropy=0.15).healthy

    def test_is_not_found_in_a_teacher_that_was_never_better(self):
        """A long start at chance, without a twin."""
        guarded = Watched()

        guarded.looks(50, **COLLAPSED)

        assert guarded.guard.report().looks["collapsed"] == 0

    def test_is_not_measured_against_an_untrained_teacher(self):
        """Its many classes were noise: the first stretch of probes does not count."""
        guarded = Watched()
        guarded.looks(40, probe_entropy=None, probe_label_entropy=None)
        guarded.looks(9)

        assert guarded.look(**COLLAPSED).healthy

    def test_is_found_in_a_slow_fall(self):
        """Each look is close to the one before, and far from the highest."""
        guarded = healthy_for_long()

        reasons = [guarded.look(probe_entropy=entropy).reasons for entropy in (1.9, 1.6, 1.3, 1.2, 1.0)]

        assert reasons == [()] * 4 + [("collapsed",)]

    def test_is_found_early_with_a_healthy_twin(self):
        """After the first stretch the twin tells the classes apart, from the same labels."""
        guarded = Watched()

        reasons = [guarded.look(**WITH_TWIN, **COLLAPSED).reasons for _ in range(10)]

        assert reasons == [()] * 9 + [("collapsed",)]

    def test_is_not_found_when_new_classes_arrive(self):
        """A class-sorted stream: labels of ten classes, a teacher that has met two and forgotten none."""
        guarded = Watched()
        guarded.looks(30, probe_entropy=0.69, probe_label_entropy=0.69)

        assert guarded.look(probe_entropy=0.69, probe_label_entropy=2.3).healthy

    def test_is_over_with_the_first_healthy_look(self):
        """The remedy helped; publication resumes, with half of both factors."""
        guarded = healthy_for_long()
        guarded.looks(3, **COLLAPSED)

        assert guarded.look().healthy
        assert (guarded.guard.frozen, guarded.factors) == (False, (0.5, 0.5))

    def test_that_is_suspected_has_hysteresis(self):
        """Looks that oscillate around the threshold are one collapse."""
        guarded = healthy_for_long(**WITH_TWIN)

        actions = [guarded.look(**WITH_TWIN, probe_entropy=entropy).action for entropy in (1.0, 1.2, 1.2)]

        assert actions == [NO, NO, TWIN]

    def test_adopts_an_unhealthy_twin_without_a_copy(self):
        """It still tells more classes apart than the teacher."""
        guarded = Watched(keep_good_every_steps=60)

        actions = guarded.looks(5, twin_probe_entropy=0.6, probe_entropy=0.1)

        assert actions == [NO, NO, NO, NO, TWIN]

    def test_that_an_unhealthy_twin_does_not_cure_is_accepted(self):
        """Only a healthy twin proves that better weights exist."""
        actions = Watched(keep_good_every_steps=60).looks(11, twin_probe_entropy=0.6, probe_entropy=0.1)

        assert [action for action in actions if action is not NO] == [TWIN, TWIN, ACCEPT]

    def test_that_was_accepted_with_an_unhealthy_twin_is_not_treated_again(self):
        """Remedies have not helped, so the freeze ends."""
        guarded = Watched(keep_good_every_steps=60)
        guarded.looks(11, twin_probe_entropy=0.6, probe_entropy=0.1)

        actions = guarded.looks(40, twin_probe_entropy=0.6, probe_entropy=0.1)

        assert set(actions) <= {NO, KEEP}
        assert not guarded.guard.frozen

    @pytest.mark.parametrize("later", [{"twin_probe_entropy": 0.6, "probe_entropy": 0.01}, WITH_TWIN | COLLAPSED])
    def test_is_treated_after_another_was_accepted(self, later):
        """Where the entropy falls further, or where the twin has become healthy."""
        guarded = Watched(keep_good_every_steps=60)
        guarded.looks(11, twin_probe_entropy=0.6, probe_entropy=0.1)

        actions = guarded.looks(5, **later)

        assert {BACK, TWIN} & set(actions)

    def test_that_recurs_lowers_the_weight_each_time(self):
        """Three collapses with a healthy look in between."""
        guarded = healthy_for_long(**WITH_TWIN)

        for _ in range(3):
            guarded.looks(3, **WITH_TWIN, **COLLAPSED)
            guarded.looks(1, **WITH_TWIN)

        assert guarded.factors == (1 / 8, 1.0)

    @pytest.mark.parametrize(("later", "factors"), [(199, (0.5, 0.5)), (200, (0.5, 1.0)), (1000, (1.0, 1.0))])
    def test_restores_the_factors_after_the_last_unhealthy_look(self, later, factors):
        """Here the look after the remedy. The weight recovers more slowly than the learning rate."""
        guarded = healthy_for_long()
        guarded.looks(4, **COLLAPSED)
        last = guarded.step

        guarded.looks(1)

        assert guarded.factors_at(last + later) == factors
        assert guarded.factors_at(last + 999)[0] == 0.5

    def test_that_the_first_remedy_does_not_cure_minimises_both_factors(self):
        """So the next looks show the restored weights and not what training made of them."""
        guarded = healthy_for_long(**WITH_TWIN)

        assert guarded.looks(6, **WITH_TWIN, **COLLAPSED) == [NO, NO, TWIN] * 2
        assert guarded.factors == (1 / 64, 1 / 64)

    def test_that_no_remedy_cures_is_accepted(self):
        """The probe has changed: the second remedy minimised the factors, and showed it."""
        guarded = healthy_for_long()

        assert [action for action in guarded.looks(9, **COLLAPSED) if action is not NO] == [BACK, BACK, ACCEPT]
        assert (guarded.guard.frozen, guarded.factors) == (False, (1.0, 1.0))
        assert guarded.look(**COLLAPSED).healthy

    def test_that_no_remedy_cures_is_never_accepted_with_a_healthy_twin(self):
        """Better weights exist, and are adopted and published each time."""
        guarded = healthy_for_long(**WITH_TWIN)

        actions = guarded.looks(30, **WITH_TWIN, **COLLAPSED)

        assert actions == [NO, NO, TWIN] * 10
        assert guarded.factors == (1 / 64, 1 / 64)


class TestDistance:
    @pytest.mark.parametrize("distance", [0.71, math.inf, math.nan])
    def test_too_far_rolls_back(self, distance):
        """At the third look."""
        guarded = healthy_for_long()

        assert guarded.looks(3, distance=distance) == [NO, NO, BACK]
        assert guarded.guard.report().reasons == ("exploded",)
        assert guarded.factors == (1.0, 0.5)

    def test_many_times_the_usual_is_not_too_far(self):
        """A student that follows a drift."""
        assert healthy_for_long(distance=0.01).look(distance=0.35).healthy

    @pytest.mark.parametrize(("distance", "healthy"), [(0.98, True), (1.02, False)])
    def test_is_measured_against_a_large_usual_distance(self, distance, healthy):
        """A very long horizon keeps teacher and student far apart."""
        assert healthy_for_long(distance=0.5).look(distance=distance).healthy is healthy

    def test_of_zero_does_not_enter_the_usual_distance(self):
        """A network that moves again has not exploded."""
        guarded = healthy_for_long(distance=0.5)
        guarded.looks(30, distance=0.0)

        assert guarded.look(distance=0.9).healthy

    def test_soon_after_a_remedy_does_not_enter_the_usual_distance(self):
        """Teacher and student start equal, and separate again."""
        guarded = healthy_for_long(**WITH_TWIN, distance=0.5)
        guarded.look(**TWIN_AHEAD)
        guarded.looks(3, **WITH_TWIN, distance=0.001)

        assert guarded.look(**WITH_TWIN, distance=0.9).healthy

    def test_that_grows_from_zero_is_no_explosion(self):
        """Teacher and student start equal."""
        guarded = Watched()

        assert all(guarded.look(distance=0.001 * 3**look).healthy for look in range(10))

    def test_that_stays_is_accepted(self):
        """A longer horizon of the average causes it too."""
        guarded = healthy_for_long()

        assert [action for action in guarded.looks(9, distance=5.0) if action is not NO] == [BACK, BACK, ACCEPT]
        assert guarded.look(distance=5.0).healthy

    def test_that_is_not_finite_is_never_accepted(self):
        """Such weights are never published."""
        guarded = healthy_for_long()

        assert ACCEPT not in guarded.looks(40, distance=math.nan)
        assert guarded.guard.frozen

    def test_of_zero_is_only_reported(self):
        """A teacher without an average equals its student."""
        guarded = healthy_for_long()

        verdicts = [guarded.look(distance=0.0) for _ in range(3)]

        assert [verdict.reasons for verdict in verdicts] == [(), (), ("stuck",)]
        assert verdicts[-1].healthy

    def test_of_zero_is_not_reported_without_updates(self):
        """Nothing moves while nothing is learned."""
        guarded = healthy_for_long()

        assert [guarded.look(distance=0.0, updates=600).reasons for _ in range(5)] == [()] * 5


class TestWorseThanTwin:
    def test_adopts_the_twin_at_once(self):
        """The window of labels is evidence enough."""
        guarded = healthy_for_long(**WITH_TWIN)

        assert guarded.look(**TWIN_AHEAD) == Verdict(healthy=False, reasons=("worse_than_twin",), action=TWIN)
        assert guarded.factors == (0.5, 1.0)

    @pytest.mark.parametrize(
        "change",
        [{"gain_high": -0.01}, {"gain_count": 99}, {"gain_high": None}, {"twin_probe_entropy": None}],
        ids=["margin", "few", "none", "gone"],
    )
    def test_needs_evidence_and_a_twin(self, change):
        """Not for too small a lead or too few labels, nor when the window has outlived its twin."""
        assert healthy_for_long(**WITH_TWIN).look(**{**TWIN_AHEAD, **change}).healthy

    def test_does_not_adopt_twice_for_the_same_labels(self):
        """Although the window was not emptied; after a rest the evidence counts again."""
        guarded = healthy_for_long(**WITH_TWIN)

        assert guarded.looks(5, **TWIN_AHEAD) == [TWIN, NO, NO, NO, TWIN]


class TestOff:
    def test_finds_nothing_and_does_nothing(self):
        """For any signals."""
        guarded = Watched(on=False)

        assert (guarded.guard.frozen, guarded.factors, guarded.guard.due(20)) == (False, (1.0, 1.0), False)
        assert guarded.guard.report().state == "off"

    def test_ends_the_freeze_of_a_guard_that_was_on(self):
        """An operator who switches the guard off has no frozen model."""
        guarded = healthy_for_long()
        guarded.looks(3, **COLLAPSED)
        off = Watched(on=False)

        off.guard.load(guarded.guard.state())

        assert (off.guard.frozen, off.factors) == (False, (1.0, 1.0))


class TestReport:
    def test_has_state_reasons_counts_and_factors(self):
        """As JSON."""
        guarded = healthy_for_long()
        guarded.looks(4, **COLLAPSED)

        assert json.loads(json.dumps(dataclasses.asdict(guarded.guard.report()))) == {
            "state": "treated",
            "since_step": 660,
            "frozen": True,
            "reasons": ["collapsed"],
            "looks": {"nonfinite": 0, "collapsed": 4, "exploded": 0, "stuck": 0, "worse_than_twin": 0},
            "actions": {"keep_good": 2, "roll_back": 1, "adopt_twin": 0, "accept": 0},
            "factors": {"consistency_weight": 0.5, "learning_rate": 0.5},
        }

    def test_is_suspect_before_the_first_remedy(self):
        """Since the look that froze publication."""
        guarded = healthy_for_long()
        guarded.looks(2, **COLLAPSED)

        assert (guarded.guard.report().state, guarded.guard.report().since_step) == ("suspect", 620)


def test_is_due_every_20_steps():
    """A function of the step, so a replay looks at the same steps."""
    guard = Guard(True)

    assert [step for step in range(1, 61) if guard.due(step)] == [20, 40, 60]


ENTROPIES = st.one_of(st.none(), st.sampled_from([0.0, 0.1, 1.1, 2.2]))
LOOKS = st.lists(
    st.fixed_dictionaries(
        {
            "skipped_in_a_row": st.sampled_from([0, 0, 0, 2, 3]),
            "distance": st.sampled_from([0.0, 0.1, 0.1, 5.0, math.nan]),
            "probe_entropy": ENTROPIES,
            "probe_label_entropy": st.just(2.3),
            "twin_probe_entropy": ENTROPIES,
            "gain_high": st.sampled_from([None, 0.1, -0.1]),
            "gain_count": st.just(500),
        }
    ),
    max_size=40,
)


def guarded_after(looks: int) -> Watched:
    guarded = Watched()
    guarded.looks(looks)
    return guarded


STARTS = st.sampled_from([0, 5, 30]).map(guarded_after)


class TestAlways:
    @given(STARTS, LOOKS)
    def test_a_healthy_look_ends_the_freeze(self, guarded, looks):
        """Whatever came before."""
        for look in looks:
            guarded.look(**look)

        guarded.look()

        assert not guarded.guard.frozen

    @given(STARTS, LOOKS)
    def test_a_freeze_is_treated_or_ended_within_three_looks(self, guarded, looks):
        """While steps and weights are finite."""
        waited = 0
        for look in looks:
            verdict = guarded.look(**{**look, "skipped_in_a_row": 0, "distance": 0.1})

            waited = 0 if verdict.healthy or verdict.action is not NO else waited + 1
            assert waited < PATIENCE

    @given(STARTS, LOOKS)
    def test_the_factors_stay_within_their_bounds(self, guarded, looks):
        """From 1/64 to 1."""
        for look in looks:
            guarded.look(**look)

            assert all(1 / 64 <= factor <= 1.0 for factor in guarded.factors)

    @given(STARTS, LOOKS)
    def test_a_rollback_needs_a_copy_and_an_adoption_a_better_twin(self, guarded, looks):
        """The twin is healthy, ahead, or the only other weights there are.

        The last is without a copy, when the teacher's entropy is far below that of the twin.
        """
        for look in looks:
            copies = guarded.guard.report().actions["keep_good"]
            verdict = guarded.look(**look)

            assert verdict.action is not BACK or copies > 0
            if verdict.action is TWIN:
                teacher, twin = look["probe_entropy"], look["twin_probe_entropy"]
                assert twin is not None, "there is no twin"
                healthy = twin >= ENTROPY_RATIO * look["probe_label_entropy"]
                ahead = "worse_than_twin" in verdict.reasons and "nonfinite" not in verdict.reasons
                # A suspected collapse clears only above 1.5 times the threshold.
                collapsed = "collapsed" in verdict.reasons and teacher < 1.5 * ENTROPY_RATIO * min(twin, 2.3)
                assert healthy or ahead or (copies == 0 and collapsed)

    @given(STARTS, LOOKS, LOOKS)
    def test_continuing_after_load_equals_an_uninterrupted_run(self, guarded, before, after):
        """At any look: the same verdicts and the same report."""
        for look in before:
            guarded.look(**look)
        other = Watched()
        other.step = guarded.step

        other.guard.load(guarded.guard.state())

        assert other.guard.report() == guarded.guard.report()
        for look in after:
            assert other.look(**look) == guarded.look(**look)
            assert other.guard.report() == guarded.guard.report()


class TestScenarios:
    def test_a_burst_of_nonfinite_steps(self):
        """One rollback, a lowered rate, and then everything as before."""
        guarded = healthy_for_long()

        actions = guarded.looks(3, **SKIPPING) + guarded.looks(11)

        assert [action for action in actions if action is not NO] == [BACK, KEEP]
        assert (guarded.guard.frozen, guarded.factors) == (False, (1.0, 1.0))

    def test_constant_input(self):
        """Teacher and twin predict one class: the weights are not the cause, so nothing is frozen."""
        guarded = healthy_for_long(**WITH_TWIN)

        guarded.looks(50, **{**WITH_TWIN, "probe_entropy": 0.0, "twin_probe_entropy": 0.0})

        assert guarded.guard.report().actions["adopt_twin"] == 0
        assert not guarded.guard.frozen

    def test_no_labels_for_long(self):
        """Without probe and gain the model counts as healthy, and is copied."""
        guarded = Watched()

        actions = guarded.looks(780, probe_entropy=None, probe_label_entropy=None)

        assert set(actions) == {NO, KEEP}

    def test_a_teacher_that_follows_wrong_labels(self):
        """The twin leads repeatedly: each lead is adopted, and consistency fades out."""
        guarded = healthy_for_long(**WITH_TWIN)

        for _ in range(8):
            guarded.looks(1, **TWIN_AHEAD)
            guarded.looks(9, **WITH_TWIN)

        assert guarded.guard.report().actions["adopt_twin"] == 8
        assert guarded.factors == (1 / 64, 1.0)


def test_every_reason_can_be_found():
    """None of the closed set is dead."""
    guarded = healthy_for_long(**WITH_TWIN)
    found: set[str] = set()

    found |= set(guarded.look(**TWIN_AHEAD, **COLLAPSED, skipped_in_a_row=9, distance=9.0).reasons)
    for _ in range(3):
        found |= set(guarded.look(distance=0.0).reasons)

    assert found == set(REASONS)
