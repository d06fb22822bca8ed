"""Drift alarms: what raises them, what does not, and that a restart changes none."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from river.drift import ADWIN

from streamlearn.judge.drift import ADWIN_DELTA, SOURCES, DriftMonitor


def flips(*parts: tuple[int, float], seed: int = 0) -> list[bool]:
    """`count` coin flips with each probability, one part after the other."""
    rng = np.random.default_rng(seed)
    return [bool(hit) for count, chance in parts for hit in rng.random(count) < chance]


def noisy(*parts: tuple[int, float], scale: float = 1.0, seed: int = 0) -> list[float]:
    """`count` values around each mean, with deviation 0.01, all times `scale`."""
    rng = np.random.default_rng(seed)
    return [float(scale * rng.normal(mean, 0.01)) for count, mean in parts for _ in range(count)]


def uncertain(values: Sequence[float], monitor: DriftMonitor | None = None) -> list[int]:
    """The steps, from 1, at which these values raise an alarm as uncertainty."""
    monitor = monitor or DriftMonitor(warmup_steps=0)
    return [step for step, value in enumerate(values, start=1) if monitor.update("uncertainty", value, step)]


def changed(values: Sequence[float], monitor: DriftMonitor) -> list[int]:
    """The same as inputs, two samples a step."""
    return [step for step, x in enumerate(values, start=1) if monitor.inputs(np.array([[x], [2 * x]]), step)]


def wrong(errors: Sequence[bool], monitor: DriftMonitor | None = None) -> list[int]:
    monitor = monitor or DriftMonitor()
    return [step for step, error in enumerate(errors, start=1) if monitor.update("error", error, step)]


class TestErrors:
    @pytest.mark.parametrize("seed", range(5))
    def test_raise_an_alarm_where_rivers_detector_does(self, seed):
        """At the same steps, except for falls."""
        errors = flips((1500, 0.1), (800, 0.5), (800, 0.1), (800, 0.3), seed=seed)
        theirs, alarms = ADWIN(delta=ADWIN_DELTA), []
        for step, error in enumerate(errors, start=1):
            before = theirs.estimation
            theirs.update(float(error))
            if theirs.drift_detected and theirs.estimation > before:
                alarms.append(step)

        assert wrong(errors) == alarms
        assert len(alarms) >= 2

    def test_that_become_rarer_are_no_alarm(self):
        """The model learns. The window restarts all the same."""
        monitor = DriftMonitor()

        assert wrong(flips((1000, 0.6), (1000, 0.1)), monitor) == []
        assert monitor.report()["error"].mean < 0.2


class TestLabelFree:
    def test_a_rise_of_uncertainty_or_disagreement_is_detected_within_thirty_steps(self):
        """Each raises an alarm of its own source."""
        for source in ("uncertainty", "disagreement"):
            monitor = DriftMonitor(warmup_steps=0)
            found = [
                step
                for step, value in enumerate(noisy((1000, 0.1), (30, 0.5)), start=1)
                if monitor.update(source, value, step)
            ]

            assert len(found) == 1
            assert found[0] > 1000
            assert {name: of.alarms for name, of in monitor.report().items()} == {
                name: int(name == source) for name in SOURCES
            }

    def test_there_are_no_alarms_during_the_warm_up(self):
        """The student departs from its teacher, which is no drift."""
        values = noisy((200, 0.01), (400, 0.3))

        assert uncertain(values) != []
        assert uncertain(values, DriftMonitor(warmup_steps=200)) == []

    def test_a_change_of_inputs_is_detected_once_within_thirty_steps(self):
        """Two features change places for good; then these inputs are normal."""
        monitor, rng = DriftMonitor(), np.random.default_rng(0)
        x = rng.normal(size=(2000, 16, 2)) * np.array([1.0, 3.0])
        x[1000:] = x[1000:, :, ::-1]

        alarms = [step for step, batch in enumerate(x, start=1) if monitor.inputs(batch, step)]

        assert len(alarms) == 1
        assert 1000 < alarms[0] <= 1030
        assert monitor.report()["inputs"].last_alarm_steps == tuple(alarms)

    @pytest.mark.parametrize("batch", [1, 4, 64])
    def test_inputs_without_a_change_raise_no_alarm(self, batch):
        """Normal, log-normal and rare features, in batches of any size."""
        monitor, rng = DriftMonitor(), np.random.default_rng(0)
        shape = (8000, batch)
        x = np.stack([rng.normal(size=shape), rng.lognormal(0, 1.5, shape), rng.random(shape) < 0.01], axis=2)

        assert [step for step, each in enumerate(x) if monitor.inputs(each, step)] == []

    def test_forget_answers_resets_the_detectors_of_predictions(self):
        """The inputs, which other weights do not change, keep their statistics."""
        monitor = DriftMonitor(warmup_steps=0)
        for step, value in enumerate(noisy((1000, 0.1)), start=1):
            monitor.inputs(np.array([[value]]), step)
            monitor.update("disagreement", value, step)
            monitor.update("uncertainty", value, step)
        usual = monitor.report()["inputs"].mean

        monitor.forget_answers()

        report = monitor.report()
        assert [report[source].mean for source in SOURCES] == [usual, None, None, None]
        assert usual is not None


class TestBadValues:
    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_are_ignored_and_counted(self, value):
        """The guard handles weights that are not finite; the detector keeps its state."""
        monitor = DriftMonitor(warmup_steps=0)
        values = noisy((1000, 0.1), (300, 0.15))

        alarms = uncertain([each_or_bad for each in values for each_or_bad in (value, each)], monitor)

        assert alarms == [2 * step for step in uncertain(values)] != []
        assert monitor.report()["uncertainty"].ignored == 1300


class TestBound:
    def test_the_window_takes_logarithmic_memory(self):
        """100,000 errors without a change take fewer than 100 buckets."""
        monitor = DriftMonitor()

        wrong(flips((100_000, 0.1)), monitor)

        assert len(monitor.state()["error.detector"]) < 100

    def test_the_steps_of_the_last_alarms_are_bounded(self):
        """Eight are kept."""
        monitor = DriftMonitor()

        alarms = wrong(flips(*[(300, 0.05), (300, 0.8)] * 10), monitor)

        assert monitor.report()["error"].last_alarm_steps == tuple(alarms[-8:])
        assert monitor.report()["error"].alarms == len(alarms) > 8


PARTS = st.lists(st.tuples(st.integers(0, 200), st.sampled_from([0.02, 0.1, 0.3, 0.8])), max_size=3)


class TestSaving:
    @given(PARTS, PARTS, st.integers(0, 3))
    @settings(deadline=None)
    def test_continuing_after_load_equals_an_uninterrupted_run(self, before, after, seed):
        """At any step: the same alarms and the same report."""
        monitor, other = (DriftMonitor(warmup_steps=20) for _ in range(2))
        uncertain(noisy(*before, seed=seed), monitor)
        changed(noisy(*before, seed=seed), monitor)
        wrong(flips(*before, seed=seed), monitor)

        other.load(monitor.state())

        assert uncertain(noisy(*after), other) == uncertain(noisy(*after), monitor)
        assert changed(noisy(*after), other) == changed(noisy(*after), monitor)
        assert wrong(flips(*after), other) == wrong(flips(*after), monitor)
        assert other.report() == monitor.report()

    def test_the_state_is_a_copy(self):
        """Another thread writes it while values arrive."""
        monitor = DriftMonitor()
        monitor.update("error", True, 1)
        state = monitor.state()

        monitor.update("error", False, 2)

        assert state["error.detector"].tolist() == [[1.0, 0.0], [0.0, 1.0]]
        assert state["error.counts"].tolist() == [1, 0, 0]

    def test_the_report_has_a_mean_after_the_first_value(self):
        """And is JSON."""
        monitor = DriftMonitor()
        monitor.update("error", True, 1)

        report = monitor.report()

        assert (report["error"].mean, report["uncertainty"].mean) == (1.0, None)
        assert json.dumps({source: asdict(of) for source, of in report.items()}, allow_nan=False)
