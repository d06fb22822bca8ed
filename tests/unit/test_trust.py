"""Trust in the teacher: what lowers it, what restores it, and what must not change it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamlearn.judge.trust import Trust, TrustReport


def fed(trust: Trust, count: int, accuracy: float, *, version: int = 0, seed: int = 0) -> Trust:
    """Add `count` labels of which the teacher predicts the share `accuracy`, at random positions."""
    for right in np.random.default_rng(seed).random(count) < accuracy:
        trust.update(right=bool(right), version=version)
    return trust


class TestWithoutDrift:
    @pytest.mark.parametrize("accuracy", [0.0, 0.1, 0.5, 0.9, 1.0])
    def test_the_factor_is_about_1_for_any_accuracy(self, accuracy):
        """Chance costs a tenth on average."""
        trust = Trust(10)

        assert np.mean([fed(trust, 10, accuracy, seed=seed).factor for seed in range(100)]) > 0.88

    def test_a_teacher_that_improves_has_a_factor_of_1(self):
        """As in normal training."""
        assert fed(fed(Trust(10), 100, 0.2), 100, 0.9).factor == 1.0

    def test_the_first_labels_leave_the_factor_at_1(self):
        """One of nine is right, the first by chance."""
        trust = fed(Trust(10), 1, 1.0)
        factors = [fed(trust, 1, 0.0).factor for _ in range(8)]

        assert factors == [1.0] * 8

    @pytest.mark.parametrize("distrusted", [False, True])
    def test_horizon_0_keeps_the_factor_at_1(self, distrusted):
        """Also after a restart with state of another horizon."""
        before, trust = fed(Trust(10), 100, 0.5), Trust(0)
        if distrusted:
            before.distrust(5)
        trust.load(before.state())
        fed(trust, 100, 0.0)
        trust.distrust(5)

        assert (fed(Trust(0), 100, 0.0).factor, trust.factor) == (1.0, 1.0)


class TestDrift:
    def test_lowers_the_factor_within_the_horizon(self):
        """From .9 to .1: ten labels lower the factor to a fifth."""
        assert fed(fed(Trust(10), 200, 0.9), 10, 0.1).factor < 0.2

    def test_ends_when_the_accuracy_is_restored_or_usual(self):
        """Or after some hundred labels where the lower accuracy becomes the usual one."""
        trust = fed(fed(Trust(10), 200, 0.9), 30, 0.1)

        assert fed(trust, 30, 0.9).factor > 0.9
        assert fed(fed(trust, 30, 0.1), 300, 0.3, seed=1).factor > 0.5

    def test_of_inputs_ends_by_labels_of_newer_samples(self):
        """After an alarm at step 70, late labels of earlier samples do not count."""
        trust = fed(Trust(10), 100, 0.9)
        trust.distrust(70)

        assert trust.factor == 0.0
        assert fed(trust, 100, 1.0, version=69).factor == 0.0
        assert fed(trust, 15, 1.0, version=70).factor == 1.0
        assert fed(trust, 10, 0.2, version=75).factor < 0.2

    def test_needs_more_than_one_lucky_label(self):
        """Some ten right ones restore the factor."""
        trust = fed(Trust(10), 100, 0.9)
        trust.distrust(70)

        factors = [fed(trust, 1, 1.0, version=70).factor for _ in range(15)]

        assert factors == sorted(factors)
        assert factors[0] < 0.1
        assert factors[-1] > 0.95

    def test_of_inputs_skips_at_most_1000_labels(self):
        """A pinned server predicts with an old version indefinitely."""
        trust = fed(Trust(10), 100, 0.9)
        trust.distrust(70)

        assert fed(trust, 1000, 0.9, version=5).factor == 0.0
        assert fed(trust, 15, 1.0, version=5).factor == 1.0
        trust.distrust(2000)
        assert fed(trust, 1000, 1.0, version=5).factor == 0.0

    def test_a_second_alarm_without_newer_labels_has_no_effect(self):
        """Alarms that are more frequent than labels would keep the factor at 0 indefinitely."""
        trust = fed(Trust(10), 100, 0.9)
        for step in range(100, 1000, 100):
            trust.distrust(step)
            fed(trust, 1, 1.0, version=step - 150)

        assert fed(trust, 15, 1.0, version=800).factor == 1.0

    def test_an_alarm_before_the_first_labels_has_no_effect(self):
        """There is no usual accuracy yet."""
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
def test_continuing_after_load_equals_an_uninterrupted_run(before, after):
    """Bit-equal at any label; the factor is from 0 to 1."""

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
