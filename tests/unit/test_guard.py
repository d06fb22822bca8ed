"""The guard: what it finds in scripted looks, what it does about it, and that it never stays in the way."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamlearn.judge.guard import LOOK_EVERY_STEPS, REASONS, Action, Guard, Signals, Verdict

PATIENCE, ENTROPY_RATIO = 3, 0.5
WELL = Signals(
    updates=0,
    skipped_in_a_row=0,
    finite=True,
    distance=0.1,
    probe_entropy=2.2,
    probe_label_entropy=2.3,
    twin_probe_entropy=None,
    gain=None,
    gain_high=None,
    gain_count=0,
)
WITH_TWIN: dict[str, Any] = {"twin_probe_entropy": 2.2, "gain": 0.01, "gain_high": 0.02, "gain_count": 500}
COLLAPSED: dict[str, Any] = {"probe_entropy": 0.1}
TWIN_AHEAD: dict[str, Any] = {**WITH_TWIN, "gain": -0.1, "gain_high": -0.05}
SKIPPING: dict[str, Any] = {"skipped_in_a_row": 3}
NO, KEEP, BACK, TWIN, ACCEPT = Action.NONE, Action.KEEP_GOOD, Action.ROLL_BACK, Action.ADOPT_TWIN, Action.ACCEPT


class Watch:
    """A guard that is shown one look after the other, every 20 steps, each with an update a step."""

    def __init__(self, *, on: bool = True, **settings: int) -> None:
        self.guard = Guard(on, **settings)
        self.step = 0

    def look(self, **signals: Any) -> Verdict:
        self.step += LOOK_EVERY_STEPS
        return self.guard.look(self.step, dataclasses.replace(WELL, **{"updates": self.step, **signals}))

    def looks(self, count: int, **signals: Any) -> list[Action]:
        return [self.look(**signals).action for _ in range(count)]

    @property
    def factors(self) -> tuple[float, float]:
        return self.factors_at(self.step + 1)

    def factors_at(self, step: int) -> tuple[float, float]:
        factors = self.guard.factors(step)
        return factors.consistency_weight, factors.learning_rate


def well_for_long(**signals: Any) -> Watch:
    """After 30 healthy looks: two copies are kept, everything is usual."""
    watch = Watch()
    watch.looks(30, **signals)
    return watch


class TestNotFiniteTeacher:
    def test_is_frozen_and_rolled_back_at_once_and_never_accepted(self):
        """NaN weights cannot become healthy, however often remedies fail."""
        watch = well_for_long()

        verdicts = [watch.look(finite=False) for _ in range(60)]

        assert verdicts[0].action is BACK
        assert verdicts[0].reasons == ("nonfinite",)
        assert not any(verdict.healthy for verdict in verdicts)
        assert not {ACCEPT, KEEP} & {verdict.action for verdict in verdicts}


class TestHealth:
    def test_is_kept_every_so_often(self):
        """A copy at the end of each stretch of health, none before the first."""
        actions = Watch().looks(31)

        assert [place for place, action in enumerate(actions, start=1) if action is KEEP] == [11, 21, 31]

    def test_is_kept_only_after_a_whole_stretch(self):
        """One bad look, and the stretch begins anew after it."""
        watch = Watch()
        watch.looks(9)
        watch.look(**SKIPPING)

        actions = watch.looks(11)

        assert actions == [NO] * 10 + [KEEP]

    def test_of_every_look_leaves_all_as_it_is(self):
        """Nothing frozen, no reason, no brake."""
        watch = well_for_long(**WITH_TWIN)

        assert (watch.guard.frozen, watch.guard.report().reasons, watch.factors) == (False, (), (1.0, 1.0))


class TestStepsThatAreNotFinite:
    def test_roll_back_at_once(self):
        """As many in a row as were asked for need no second look."""
        watch = well_for_long()

        verdict = watch.look(**SKIPPING)

        assert verdict == Verdict(healthy=False, reasons=("nonfinite",), action=BACK)
        assert watch.factors == (1.0, 0.5)

    def test_that_have_ended_are_forgotten(self):
        """They changed nothing, so there is nothing to go back from."""
        verdict = well_for_long().look(skipped_in_a_row=2)

        assert verdict.healthy

    def test_roll_back_again_only_after_a_pause_that_doubles(self):
        """After 200, 400, 800 and 1600 steps, while they go on."""
        watch = well_for_long()
        first = watch.step + 20

        steps = [watch.step for _ in range(160) if watch.look(**SKIPPING).action is BACK]

        assert [step - first for step in steps] == [0, 200, 600, 1400, 3000]
        assert watch.factors == (1.0, 1 / 32)

    def test_leave_whatever_else_is_wrong_for_later(self):
        """Nothing is learned, so nothing else can be mended or made worse."""
        watch = well_for_long()
        watch.look(**SKIPPING)

        assert watch.looks(5, **SKIPPING, **COLLAPSED) == [NO] * 5

    def test_take_the_twin_the_second_time(self):
        """The copy has met the same end."""
        watch = well_for_long(**WITH_TWIN)

        actions = watch.looks(11, **WITH_TWIN, **SKIPPING)

        assert [action for action in actions if action is not NO] == [BACK, TWIN]

    def test_without_anything_to_go_back_to_only_brake(self):
        """At the very beginning."""
        watch = Watch()

        assert watch.looks(5, **SKIPPING) == [NO] * 5
        assert watch.factors == (1.0, 0.5)
        assert watch.guard.frozen

    def test_take_the_twin_where_no_copy_was_kept_yet(self):
        """The only other weights that there are."""
        assert Watch().look(**WITH_TWIN, **SKIPPING).action is TWIN

    def test_give_the_learning_rate_back_with_time(self):
        """Braked for `backoff_steps` from the last bad look."""
        watch = well_for_long()
        watch.look(**SKIPPING)

        watch.looks(9)
        braked = watch.factors_at(watch.step + 19)

        assert (braked, watch.factors_at(watch.step + 20)) == ((1.0, 0.5), (1.0, 1.0))


class TestCollapse:
    def test_takes_patience(self):
        """Frozen from the first look, treated at the third."""
        watch = well_for_long()

        assert watch.looks(3, **COLLAPSED) == [NO, NO, BACK]
        assert watch.guard.frozen

    def test_with_a_twin_that_is_well_takes_the_twin(self):
        """It knows the newest labels; its learning rate is not to blame."""
        watch = well_for_long(**WITH_TWIN)

        assert watch.looks(3, **WITH_TWIN, **COLLAPSED) == [NO, NO, TWIN]
        assert watch.factors == (0.5, 1.0)

    def test_without_a_twin_brakes_both(self):
        """Nobody knows which of them it was."""
        watch = well_for_long()

        watch.looks(3, **COLLAPSED)

        assert watch.factors == (0.5, 0.5)

    def test_is_no_collapse_where_the_twin_is_as_low(self):
        """Constant input, or labels without sense: other weights would not help."""
        watch = well_for_long(**WITH_TWIN)

        assert watch.look(**{**WITH_TWIN, **COLLAPSED, "twin_probe_entropy": 0.15}).healthy

    def test_is_no_collapse_where_the_labels_are_as_few(self):
        """The memory holds little else by now."""
        assert well_for_long().look(probe_entropy=0.1, probe_label_entropy=0.15).healthy

    def test_is_not_claimed_of_a_teacher_that_never_knew_better(self):
        """A long beginning at chance, without a twin."""
        watch = Watch()

        watch.looks(50, **COLLAPSED)

        assert watch.guard.report().looks["collapsed"] == 0

    def test_is_not_claimed_from_what_an_untrained_teacher_said(self):
        """Its many classes were noise. The first stretch with a probe says nothing."""
        watch = Watch()
        watch.looks(40, probe_entropy=None, probe_label_entropy=None)
        watch.looks(9)

        assert watch.look(**COLLAPSED).healthy

    def test_is_claimed_of_a_slow_fall(self):
        """Each look is near the one before, and far from what once was."""
        watch = well_for_long()

        reasons = [watch.look(probe_entropy=entropy).reasons for entropy in (1.9, 1.6, 1.3, 1.2, 1.0)]

        assert reasons == [()] * 4 + [("collapsed",)]

    def test_is_claimed_early_where_the_twin_is_well(self):
        """The same labels tell the classes apart, and learning has had its first stretch."""
        watch = Watch()

        reasons = [watch.look(**WITH_TWIN, **COLLAPSED).reasons for _ in range(10)]

        assert reasons == [()] * 9 + [("collapsed",)]

    def test_is_not_claimed_when_new_classes_come(self):
        """A class-sorted stream: labels of ten classes, a teacher that has met two and lost none."""
        watch = Watch()
        watch.looks(30, probe_entropy=0.69, probe_label_entropy=0.69)

        assert watch.look(probe_entropy=0.69, probe_label_entropy=2.3).healthy

    def test_is_over_with_the_first_healthy_look(self):
        """The remedy helped; publication goes on, at half the weight."""
        watch = well_for_long()
        watch.looks(3, **COLLAPSED)

        assert watch.look().healthy
        assert (watch.guard.frozen, watch.factors) == (False, (0.5, 0.5))

    def test_that_is_suspected_is_not_over_with_a_little_more(self):
        """Looks that waver about the bound are one collapse."""
        watch = well_for_long(**WITH_TWIN)

        actions = [watch.look(**WITH_TWIN, probe_entropy=entropy).action for entropy in (1.0, 1.2, 1.2)]

        assert actions == [NO, NO, TWIN]

    def test_takes_a_twin_that_is_ill_where_there_is_nothing_else(self):
        """It still tells more classes apart than the teacher."""
        watch = Watch(keep_good_every_steps=60)

        actions = watch.looks(5, twin_probe_entropy=0.6, probe_entropy=0.1)

        assert actions == [NO, NO, NO, NO, TWIN]

    def test_that_an_ill_twin_does_not_cure_is_accepted(self):
        """Only one that is well proves that better weights exist."""
        actions = Watch(keep_good_every_steps=60).looks(11, twin_probe_entropy=0.6, probe_entropy=0.1)

        assert [action for action in actions if action is not NO] == [TWIN, TWIN, ACCEPT]

    def test_that_was_accepted_beside_an_ill_twin_is_not_treated_again(self):
        """Nothing was cured by the remedies, and nothing will be by more of them: a freeze ends."""
        watch = Watch(keep_good_every_steps=60)
        watch.looks(11, twin_probe_entropy=0.6, probe_entropy=0.1)

        actions = watch.looks(40, twin_probe_entropy=0.6, probe_entropy=0.1)

        assert set(actions) <= {NO, KEEP}
        assert not watch.guard.frozen

    @pytest.mark.parametrize("later", [{"twin_probe_entropy": 0.6, "probe_entropy": 0.01}, WITH_TWIN | COLLAPSED])
    def test_is_treated_after_another_was_accepted(self, later):
        """Where it goes further down, or where the twin, by now, shows that it need not be."""
        watch = Watch(keep_good_every_steps=60)
        watch.looks(11, twin_probe_entropy=0.6, probe_entropy=0.1)

        actions = watch.looks(5, **later)

        assert {BACK, TWIN} & set(actions)

    def test_that_comes_back_brakes_harder_each_time(self):
        """Three collapses with a healthy look between."""
        watch = well_for_long(**WITH_TWIN)

        for _ in range(3):
            watch.looks(3, **WITH_TWIN, **COLLAPSED)
            watch.looks(1, **WITH_TWIN)

        assert watch.factors == (1 / 8, 1.0)

    @pytest.mark.parametrize(("later", "factors"), [(199, (0.5, 0.5)), (200, (0.5, 1.0)), (1000, (1.0, 1.0))])
    def test_leaves_its_brakes_on_from_the_last_bad_look(self, later, factors):
        """Here that is the look after the remedy. The weight comes back more slowly than the learning rate."""
        watch = well_for_long()
        watch.looks(4, **COLLAPSED)
        last = watch.step

        watch.looks(1)

        assert watch.factors_at(last + later) == factors
        assert watch.factors_at(last + 999)[0] == 0.5

    def test_that_the_first_remedy_does_not_cure_brakes_fully(self):
        """Both, now: so the next looks show the weights that were put back, and not what became of them."""
        watch = well_for_long(**WITH_TWIN)

        assert watch.looks(6, **WITH_TWIN, **COLLAPSED) == [NO, NO, TWIN] * 2
        assert watch.factors == (1 / 64, 1 / 64)

    def test_that_no_remedy_cures_is_accepted(self):
        """The probe is what has changed; the second remedy braked fully, and showed it."""
        watch = well_for_long()

        assert [action for action in watch.looks(9, **COLLAPSED) if action is not NO] == [BACK, BACK, ACCEPT]
        assert (watch.guard.frozen, watch.factors) == (False, (1.0, 1.0))
        assert watch.look(**COLLAPSED).healthy

    def test_that_no_remedy_cures_is_never_accepted_while_the_twin_is_well(self):
        """Better weights exist. They are taken, and may be shown, as often as it needs."""
        watch = well_for_long(**WITH_TWIN)

        actions = watch.looks(30, **WITH_TWIN, **COLLAPSED)

        assert actions == [NO, NO, TWIN] * 10
        assert watch.factors == (1 / 64, 1 / 64)


class TestDistance:
    @pytest.mark.parametrize("distance", [0.71, math.inf, math.nan])
    def test_too_far_rolls_back(self, distance):
        """For as long as patience lasts."""
        watch = well_for_long()

        assert watch.looks(3, distance=distance) == [NO, NO, BACK]
        assert watch.guard.report().reasons == ("exploded",)
        assert watch.factors == (1.0, 0.5)

    def test_many_times_the_usual_is_not_too_far(self):
        """A student that follows a drift."""
        assert well_for_long(distance=0.01).look(distance=0.35).healthy

    @pytest.mark.parametrize(("distance", "healthy"), [(0.98, True), (1.02, False)])
    def test_is_measured_against_a_usual_one_that_is_great(self, distance, healthy):
        """A very long horizon keeps them far apart."""
        assert well_for_long(distance=0.5).look(distance=distance).healthy is healthy

    def test_of_networks_that_stand_still_is_not_usual(self):
        """What moves again is no explosion."""
        watch = well_for_long(distance=0.5)
        watch.looks(30, distance=0.0)

        assert watch.look(distance=0.9).healthy

    def test_right_after_a_remedy_is_not_usual(self):
        """Teacher and student begin as one, and part again."""
        watch = well_for_long(**WITH_TWIN, distance=0.5)
        watch.look(**TWIN_AHEAD)
        watch.looks(3, **WITH_TWIN, distance=0.001)

        assert watch.look(**WITH_TWIN, distance=0.9).healthy

    def test_that_grows_from_zero_is_no_explosion(self):
        """Teacher and student begin as one."""
        watch = Watch()

        assert all(watch.look(distance=0.001 * 3**look).healthy for look in range(10))

    def test_that_stays_is_the_new_normal(self):
        """A longer horizon of the average does that."""
        watch = well_for_long()

        assert [action for action in watch.looks(9, distance=5.0) if action is not NO] == [BACK, BACK, ACCEPT]
        assert watch.look(distance=5.0).healthy

    def test_that_is_no_number_is_never_accepted(self):
        """Such weights are not shown, whatever was tried."""
        watch = well_for_long()

        assert ACCEPT not in watch.looks(40, distance=math.nan)
        assert watch.guard.frozen

    def test_of_exactly_zero_is_said_and_nothing_more(self):
        """A teacher without an average is its student."""
        watch = well_for_long()

        verdicts = [watch.look(distance=0.0) for _ in range(3)]

        assert [verdict.reasons for verdict in verdicts] == [(), (), ("stuck",)]
        assert verdicts[-1].healthy

    def test_of_exactly_zero_means_nothing_while_nothing_is_learned(self):
        """No update, no movement."""
        watch = well_for_long()

        assert [watch.look(distance=0.0, updates=600).reasons for _ in range(5)] == [()] * 5


class TestTwinAhead:
    def test_is_adopted_at_once(self):
        """The window of labels was patience enough."""
        watch = well_for_long(**WITH_TWIN)

        assert watch.look(**TWIN_AHEAD) == Verdict(healthy=False, reasons=("worse_than_twin",), action=TWIN)
        assert watch.factors == (0.5, 1.0)

    @pytest.mark.parametrize(
        "change",
        [{"gain_high": -0.01}, {"gain_count": 99}, {"gain_high": None}, {"twin_probe_entropy": None}],
        ids=["margin", "few", "none", "gone"],
    )
    def test_is_not_believed_without_evidence_and_a_twin(self, change):
        """Too small a lead, too few labels, or none; or a window that has outlived its twin."""
        assert well_for_long(**WITH_TWIN).look(**{**TWIN_AHEAD, **change}).healthy

    def test_is_not_adopted_twice_for_the_same_labels(self):
        """Though the window was not forgotten; after a rest the evidence counts again."""
        watch = well_for_long(**WITH_TWIN)

        assert watch.looks(5, **TWIN_AHEAD) == [TWIN, NO, NO, NO, TWIN]


class TestOff:
    def test_finds_nothing_and_does_nothing(self):
        """Whatever it sees."""
        watch = Watch(on=False)

        assert watch.looks(5, **SKIPPING) == [NO] * 5
        assert (watch.guard.frozen, watch.factors, watch.guard.due(20)) == (False, (1.0, 1.0), False)
        assert watch.guard.report().state == "off"

    def test_lets_go_of_what_it_held_when_it_was_on(self):
        """An operator who switches it off is not left with a frozen model."""
        watch = well_for_long()
        watch.looks(3, **COLLAPSED)
        off = Watch(on=False)

        off.guard.load(watch.guard.state())

        assert (off.guard.frozen, off.factors) == (False, (1.0, 1.0))


class TestReport:
    def test_says_how_things_stand_as_json(self):
        """State, since when, why, what was done, and how hard it brakes."""
        watch = well_for_long()
        watch.looks(4, **COLLAPSED)

        assert json.loads(json.dumps(dataclasses.asdict(watch.guard.report()))) == {
            "state": "treated",
            "since_step": 660,
            "frozen": True,
            "reasons": ["collapsed"],
            "looks": {"nonfinite": 0, "collapsed": 4, "exploded": 0, "stuck": 0, "worse_than_twin": 0},
            "actions": {"keep_good": 2, "roll_back": 1, "adopt_twin": 0, "accept": 0},
            "factors": {"consistency_weight": 0.5, "learning_rate": 0.5},
        }

    def test_is_suspect_before_anything_was_done(self):
        """The look that froze, and the step of it."""
        watch = well_for_long()
        watch.looks(2, **COLLAPSED)

        assert (watch.guard.report().state, watch.guard.report().since_step) == ("suspect", 620)


def test_is_due_every_so_many_steps():
    """A function of the step, so a replay looks where the run did."""
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
            "gain": st.just(0.0),
            "gain_high": st.sampled_from([None, 0.1, -0.1]),
            "gain_count": st.just(500),
        }
    ),
    max_size=40,
)


def watch_after(looks: int) -> Watch:
    watch = Watch()
    watch.looks(looks)
    return watch


BEGINNINGS = st.sampled_from([0, 5, 30]).map(watch_after)


class TestAlways:
    @given(BEGINNINGS, LOOKS)
    def test_a_healthy_look_thaws(self, watch, looks):
        """Whatever came before, the first look without a reason ends the freeze."""
        for look in looks:
            watch.look(**look)

        watch.look()

        assert not watch.guard.frozen

    @given(BEGINNINGS, LOOKS)
    def test_a_freeze_is_treated_or_ended_within_patience(self, watch, looks):
        """While steps are finite and so are weights, none lasts longer without a remedy."""
        waited = 0
        for look in looks:
            verdict = watch.look(**{**look, "skipped_in_a_row": 0, "distance": 0.1})

            waited = 0 if verdict.healthy or verdict.action is not NO else waited + 1
            assert waited < PATIENCE

    @given(BEGINNINGS, LOOKS)
    def test_the_factors_stay_within_their_bounds(self, watch, looks):
        """From 1/64 to 1."""
        for look in looks:
            watch.look(**look)

            assert all(1 / 64 <= factor <= 1.0 for factor in watch.factors)

    @given(BEGINNINGS, LOOKS)
    def test_nothing_is_rolled_back_to_before_it_was_kept(self, watch, looks):
        """And no twin is adopted that is neither well nor ahead, but where nothing else is left.

        That is where no copy was kept, and the teacher has collapsed beside that very twin, far below its entropy.
        """
        for look in looks:
            copies = watch.guard.report().actions["keep_good"]
            verdict = watch.look(**look)

            assert verdict.action is not BACK or copies > 0
            if verdict.action is TWIN:
                teacher, twin = look["probe_entropy"], look["twin_probe_entropy"]
                assert twin is not None, "there is no twin"
                well = twin >= ENTROPY_RATIO * look["probe_label_entropy"]
                ahead = "worse_than_twin" in verdict.reasons and "nonfinite" not in verdict.reasons
                # 1.5 times the bound: what is suspected already is over only above that.
                collapsed = "collapsed" in verdict.reasons and teacher < 1.5 * ENTROPY_RATIO * min(twin, 2.3)
                assert well or ahead or (copies == 0 and collapsed)

    @given(BEGINNINGS, LOOKS, LOOKS)
    def test_a_loaded_guard_goes_on_as_the_saved_one(self, watch, before, after):
        """At any point: the same verdicts, factors and report."""
        for look in before:
            watch.look(**look)
        other = Watch()
        other.step = watch.step

        other.guard.load(watch.guard.state())

        assert other.guard.report() == watch.guard.report()
        for look in after:
            assert other.look(**look) == watch.look(**look)
            assert other.guard.report() == watch.guard.report()


class TestHostileStories:
    def test_a_burst_of_bad_numbers(self):
        """Rolled back once, braked for a while, and all is as it was."""
        watch = well_for_long()

        actions = watch.looks(3, **SKIPPING) + watch.looks(11)

        assert [action for action in actions if action is not NO] == [BACK, KEEP]
        assert (watch.guard.frozen, watch.factors) == (False, (1.0, 1.0))

    def test_constant_input(self):
        """Teacher and twin give one class: not the weights' fault, so nothing is frozen for it."""
        watch = well_for_long(**WITH_TWIN)

        watch.looks(50, **{**WITH_TWIN, "probe_entropy": 0.0, "twin_probe_entropy": 0.0})

        assert watch.guard.report().actions["adopt_twin"] == 0
        assert not watch.guard.frozen

    def test_no_labels_for_long(self):
        """No probe, no gain: health is assumed, and copies are kept against what skipped steps may show."""
        watch = Watch()

        actions = watch.looks(780, probe_entropy=None, probe_label_entropy=None)

        assert set(actions) == {NO, KEEP}

    def test_a_teacher_that_follows_wrong_labels(self):
        """The twin leads again and again: consistency fades out, and every lead is adopted."""
        watch = well_for_long(**WITH_TWIN)

        for _ in range(8):
            watch.looks(1, **TWIN_AHEAD)
            watch.looks(9, **WITH_TWIN)

        assert watch.guard.report().actions["adopt_twin"] == 8
        assert watch.factors == (1 / 64, 1.0)


def test_every_reason_can_be_found():
    """None of the closed set is dead."""
    watch = well_for_long(**WITH_TWIN)
    found: set[str] = set()

    found |= set(watch.look(**TWIN_AHEAD, **COLLAPSED, skipped_in_a_row=9, distance=9.0).reasons)
    for _ in range(3):
        found |= set(watch.look(distance=0.0).reasons)

    assert found == set(REASONS)
