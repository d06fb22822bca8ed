"""Alarms of a changing world: what raises them, what does not, and that a restart changes none."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from river.drift import ADWIN

from streamlearn.judge.drift import SOURCES, DriftMonitor

DELTA = 0.002


def flips(*parts: tuple[int, float], seed: int = 0) -> list[bool]:
    """So many coins of such a chance, one part after the other."""
    rng = np.random.default_rng(seed)
    return [bool(hit) for count, chance in parts for hit in rng.random(count) < chance]


def noisy(*parts: tuple[int, float], scale: float = 1.0, seed: int = 0) -> list[float]:
    """So many values around such a mean, with deviation 0.01, all of it times `scale`."""
    rng = np.random.default_rng(seed)
    return [float(scale * rng.normal(mean, 0.01)) for count, mean in parts for _ in range(count)]


def settling(count: int) -> list[float]:
    """A model that becomes sure, from 0.2 down to 0.035, with neighbours that differ by a tenth of that."""
    rng = np.random.default_rng(0)
    return [0.035 + 0.165 * math.exp(-step / 100) + float(rng.normal(0.0, 0.01)) for step in range(count)]


def uncertain(values: Sequence[float], monitor: DriftMonitor | None = None) -> list[int]:
    """The places, from 1, at which these raise the alarm as uncertainty."""
    monitor = monitor or DriftMonitor(DELTA, warmup_steps=0)
    return [step for step, value in enumerate(values, start=1) if monitor.uncertainty(value, step)]


def wrong(errors: Sequence[bool], monitor: DriftMonitor | None = None) -> list[int]:
    monitor = monitor or DriftMonitor(DELTA)
    return [step for step, error in enumerate(errors, start=1) if monitor.error(error, step)]


class TestErrors:
    @pytest.mark.parametrize("seed", range(5))
    def test_raise_the_alarm_where_rivers_own_detector_does(self, seed):
        """The same values, the same places, but for changes to the better."""
        errors = flips((1500, 0.1), (800, 0.5), (800, 0.1), (800, 0.3), seed=seed)
        theirs, alarms = ADWIN(delta=DELTA), []
        for step, error in enumerate(errors, start=1):
            before = theirs.estimation
            theirs.update(float(error))
            if theirs.drift_detected and theirs.estimation > before:
                alarms.append(step)

        assert wrong(errors) == alarms
        assert len(alarms) >= 2

    def test_that_become_rarer_are_no_alarm(self):
        """The model learns. It is a change all the same, and counted as one."""
        monitor = DriftMonitor(DELTA)

        assert wrong(flips((1000, 0.6), (1000, 0.1)), monitor) == []
        assert monitor.report()["error"]["changes"] >= 1

    def test_raise_it_sooner_where_more_false_alarms_are_allowed(self):
        """What delta is for."""
        errors = flips((1000, 0.1), (1000, 0.2))

        assert wrong(errors, DriftMonitor(0.5))[0] < wrong(errors, DriftMonitor(1e-6))[0]


class TestLabelFree:
    def test_a_rise_of_two_deviations_is_seen_within_two_hundred_steps(self):
        """Though it is a fiftieth of ADWIN's interval."""
        alarms = uncertain(noisy((1000, 0.1), (200, 0.12)))

        assert len(alarms) == 1
        assert alarms[0] > 1000

    def test_a_great_rise_is_seen_within_a_hundred_and_twenty_steps(self):
        """Windows are looked at every 32 steps, of which a value holds four."""
        assert 1000 < uncertain(noisy((1000, 0.1), (120, 0.5)))[0] <= 1120

    def test_one_wild_value_neither_raises_it_nor_blinds_it(self):
        """Nothing is further from the middle than the end of the interval."""
        alarms = uncertain(noisy((500, 0.1), (1, 1e9), (500, 0.1), (200, 0.2)))

        assert len(alarms) == 1
        assert alarms[0] > 1001

    @pytest.mark.parametrize("scale", [0.1, 5.0])
    def test_the_scale_of_the_values_does_not_matter(self, scale):
        """A sure model's uncertainty is small, and doubles all the same."""
        parts = ((1000, 0.1), (300, 0.15))

        assert uncertain(noisy(*parts, scale=scale)) == uncertain(noisy(*parts)) != []

    def test_a_rise_that_is_small_beside_the_mean_is_none(self):
        """However surely it is there: a hundredth more of it calls nobody."""
        rng = np.random.default_rng(0)
        values = rng.normal(0.5, 1e-4, 2000) + np.where(np.arange(2000) < 1000, 0.0, 0.005)

        assert uncertain(values.tolist()) == []

    def test_a_fall_is_no_alarm(self):
        """The model becomes sure of what it sees."""
        assert uncertain(noisy((1000, 0.2), (1000, 0.1))) == []

    def test_a_rise_is_seen_soon_though_the_model_was_settling_until_then(self):
        """What it said while it settled is no measure of what it says when it has."""
        alarms = uncertain([*settling(500), *noisy((130, 0.13))])

        assert len(alarms) == 1
        assert 500 < alarms[0] <= 630

    def test_a_fall_that_ends_is_no_alarm(self):
        """Beside a scale that follows the values it looks like a rise."""
        assert uncertain([*settling(500), *noisy((1500, 0.035))]) == []

    def test_neighbours_that_are_alike_raise_few_alarms(self):
        """An autoregression of .9, as of a network that moves slowly: fed one by one, it would raise dozens."""
        rng, value, values = np.random.default_rng(0), 0.0, []
        for _ in range(20_000):
            value = 0.9 * value + rng.normal(0.0, 0.01)
            values.append(0.3 + value)

        assert len(uncertain(values)) <= 1

    def test_the_beginning_is_left_out(self):
        """A student leaves its teacher: that is no change of the world."""
        values = noisy((200, 0.01), (400, 0.3))

        assert uncertain(values) != []
        assert uncertain(values, DriftMonitor(DELTA, warmup_steps=200)) == []

    def test_disagreement_has_a_window_of_its_own(self):
        """What one of them sees is nothing to the other."""
        monitor = DriftMonitor(DELTA, warmup_steps=0)
        for step, value in enumerate(noisy((1000, 0.1), (300, 0.15)), start=1):
            monitor.disagreement(value, step)

        alarms = {source: monitor.report()[source]["alarms"] for source in SOURCES}

        assert alarms == {"disagreement": 1, "uncertainty": 0, "error": 0}

    def test_forgotten_values_are_no_measure_for_new_ones(self):
        """Other weights answer now."""
        monitor = DriftMonitor(DELTA, warmup_steps=0)
        for step, value in enumerate(noisy((1000, 0.1)), start=1):
            monitor.disagreement(value, step)
            monitor.uncertainty(value, step)

        monitor.forget_label_free()

        assert [len(monitor.state()[f"{source}.values"]) for source in ("disagreement", "uncertainty")] == [0, 0]


class TestBadValues:
    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_are_ignored_and_counted(self, value):
        """Weights that are no numbers are the guard's business; the window stays clean."""
        monitor = DriftMonitor(DELTA, warmup_steps=0)
        values = noisy((1000, 0.1), (300, 0.15))

        alarms = uncertain([each_or_bad for each in values for each_or_bad in (value, each)], monitor)

        assert alarms == [2 * step for step in uncertain(values)] != []
        assert monitor.report()["uncertainty"]["ignored"] == 1300


class TestBound:
    def test_the_values_kept_are_bounded(self):
        """When there are too many, the newest half stays."""
        monitor = DriftMonitor(DELTA, most_values=256)
        errors = flips((257, 0.1))

        wrong(errors, monitor)

        assert monitor.state()["error.values"].tolist() == errors[128:]

    def test_a_change_is_seen_after_values_were_let_go(self):
        """The window that was begun anew knows what was usual."""
        monitor = DriftMonitor(DELTA, most_values=256)

        alarms = wrong(flips((2000, 0.1), (200, 0.6)), monitor)

        assert len(alarms) == 1
        assert 2000 < alarms[0] < 2100

    def test_the_steps_of_the_last_alarms_are_bounded(self):
        """Eight of them."""
        monitor = DriftMonitor(DELTA)

        alarms = wrong(flips(*[(300, 0.05), (300, 0.8)] * 10), monitor)

        assert monitor.report()["error"]["last_alarm_steps"] == alarms[-8:]
        assert monitor.report()["error"]["alarms"] == len(alarms) > 8


PARTS = st.lists(st.tuples(st.integers(0, 200), st.sampled_from([0.02, 0.1, 0.3, 0.8])), max_size=3)


class TestSaving:
    @given(PARTS, PARTS, st.sampled_from([128, 8192]), st.integers(0, 3))
    def test_a_loaded_monitor_goes_on_as_the_saved_one(self, before, after, most_values, seed):
        """At any point, before and after values were let go: the same alarms and the same report."""
        monitor, other = (DriftMonitor(DELTA, warmup_steps=20, most_values=most_values) for _ in range(2))
        uncertain(noisy(*before, seed=seed), monitor)
        wrong(flips(*before, seed=seed), monitor)

        other.load(monitor.state())

        assert uncertain(noisy(*after), other) == uncertain(noisy(*after), monitor)
        assert wrong(flips(*after), other) == wrong(flips(*after), monitor)
        assert other.report() == monitor.report()

    def test_the_state_is_a_copy(self):
        """It is written by another thread while values come in."""
        monitor = DriftMonitor(DELTA)
        monitor.error(True, 1)
        state = monitor.state()

        monitor.error(False, 2)

        assert state["error.values"].tolist() == [1.0]
        assert state["error.counts"].tolist() == [1, 0, 0, 0]

    def test_the_report_is_json(self):
        """Before the first value and after."""
        monitor = DriftMonitor(DELTA)
        monitor.error(True, 1)

        report = json.loads(json.dumps(monitor.report()))

        assert (report["error"]["mean"], report["uncertainty"]["mean"]) == (1.0, None)
