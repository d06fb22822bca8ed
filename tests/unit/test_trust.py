"""How far the teacher is believed: what lowers it, what brings it back, and what must not move it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamlearn.judge.trust import Trust, TrustReport


def fed(trust: Trust, count: int, accuracy: float, *, version: int = 0, seed: int = 0) -> Trust:
    """So many labels of which that share is right, in random places."""
    for right in np.random.default_rng(seed).random(count) < accuracy:
        trust.update(right=bool(right), version=version)
    return trust


class TestAWorldThatStays:
    @pytest.mark.parametrize("accuracy", [0.0, 0.1, 0.5, 0.9, 1.0])
    def test_leaves_a_teacher_its_weight_however_bad_it_is(self, accuracy):
        """It teaches what it knows. Luck costs a tenth in the mean."""
        trust = Trust(10)

        assert np.mean([fed(trust, 10, accuracy, seed=seed).factor for seed in range(100)]) > 0.88

    def test_may_get_better(self):
        """A learner does."""
        assert fed(fed(Trust(10), 100, 0.2), 100, 0.9).factor == 1.0

    def test_is_not_judged_by_the_first_labels(self):
        """One of nine right, by chance the first."""
        trust = fed(Trust(10), 1, 1.0)
        factors = [fed(trust, 1, 0.0).factor for _ in range(8)]

        assert factors == [1.0] * 8

    @pytest.mark.parametrize("lost", [False, True])
    def test_nothing_lowers_where_it_is_off(self, lost):
        """`trust_labels = 0`, also after a restart of a learner that had it on."""
        before, trust = fed(Trust(10), 100, 0.5), Trust(0)
        if lost:
            before.distrust(5)
        trust.load(before.state())
        fed(trust, 100, 0.0)
        trust.distrust(5)

        assert (fed(Trust(0), 100, 0.0).factor, trust.factor) == (1.0, 1.0)


class TestAWorldThatChanges:
    def test_is_told_by_labels_within_the_horizon(self):
        """From .9 to .1: ten labels bring the weight to a fifth."""
        assert fed(fed(Trust(10), 200, 0.9), 10, 0.1).factor < 0.2

    def test_is_forgiven_when_the_teacher_is_as_good_as_it_was(self):
        """Or after a hundred labels if it never is."""
        trust = fed(fed(Trust(10), 200, 0.9), 30, 0.1)

        assert fed(trust, 30, 0.9).factor > 0.9
        assert fed(fed(trust, 30, 0.1), 300, 0.3, seed=1).factor > 0.5

    def test_of_inputs_is_answered_for_by_samples_that_came_since(self):
        """An alarm at step 70: labels that come late, of samples from before, say nothing."""
        trust = fed(Trust(10), 100, 0.9)
        trust.distrust(70)

        assert trust.factor == 0.0
        assert fed(trust, 100, 1.0, version=69).factor == 0.0
        assert fed(trust, 15, 1.0, version=70).factor == 1.0
        assert fed(trust, 10, 0.2, version=75).factor < 0.2

    def test_is_not_over_by_one_lucky_label(self):
        """Nor by a second; some ten that are right are proof."""
        trust = fed(Trust(10), 100, 0.9)
        trust.distrust(70)

        factors = [fed(trust, 1, 1.0, version=70).factor for _ in range(15)]

        assert factors == sorted(factors)
        assert factors[0] < 0.1
        assert factors[-1] > 0.95

    def test_of_inputs_is_forgotten_where_no_newer_answer_ever_comes(self):
        """A pinned server answers by the version of long ago: a thousand labels are passed by, and no more."""
        trust = fed(Trust(10), 100, 0.9)
        trust.distrust(70)

        assert fed(trust, 1000, 0.9, version=5).factor == 0.0
        assert fed(trust, 15, 1.0, version=5).factor == 1.0
        trust.distrust(2000)
        assert fed(trust, 1000, 1.0, version=5).factor == 0.0

    def test_again_before_any_newer_label_came_prolongs_nothing(self):
        """Alarms that come faster than labels would keep the weight at 0 for ever."""
        trust = fed(Trust(10), 100, 0.9)
        for step in range(100, 1000, 100):
            trust.distrust(step)
            fed(trust, 1, 1.0, version=step - 150)

        assert fed(trust, 15, 1.0, version=800).factor == 1.0

    def test_costs_nothing_before_the_first_labels(self):
        """There was nothing to believe, and nothing was lost."""
        trust = fed(Trust(10), 9, 0.5)
        trust.distrust(70)

        assert trust.factor == 1.0


class TestReport:
    def test_has_both_accuracies_once_there_are_labels(self):
        """None before."""
        assert Trust(10).report() == TrustReport(factor=1.0, recent_accuracy=None, usual_accuracy=None)
        assert fed(Trust(10), 10, 1.0).report() == TrustReport(1.0, 1.0, 1.0)


LABELS = st.lists(st.tuples(st.booleans(), st.integers(0, 5)) | st.integers(0, 5), max_size=60)


@given(LABELS, LABELS)
def test_a_loaded_one_goes_on_as_the_saved_one(before, after):
    """At any point, the same bits; and a factor is from 0 to 1."""

    def feed(trust, events):
        factors = []
        for event in events:
            if isinstance(event, tuple):
                trust.update(right=event[0], version=event[1])
            else:
                trust.distrust(event)
            factors.append(trust.factor)
        return factors

    trust, other = Trust(4), Trust(4)
    assert all(0.0 <= factor <= 1.0 for factor in feed(trust, before))
    other.load(trust.state())

    assert feed(other, after) == feed(trust, after)
    assert other.state() == trust.state()
