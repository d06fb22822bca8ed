"""Drift detection: alarms from inputs and predictions before labels arrive, and from errors after.

Without labels, Page's cumulative sum (`judge/cusum.py`) watches three values of each step for a rise: the distance of
the inputs from earlier inputs (`judge/inputs.py`), the teacher's uncertainty, and the disagreement of student and
teacher. The first depends on no network and detects most changes within five values. The others detect changes that
matter to the model, some of them only when new labels contradict it: a network can be confidently wrong.

ADWIN (`judge/adwin.py`) watches errors. Only a rise of its mean is an alarm; a fall means that the model learns. ADWIN
assumes independent values over the whole interval from 0 to 1 and needs some 25 of them: too late for the others.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np

from streamlearn.judge.adwin import Adwin
from streamlearn.judge.cusum import Cusum
from streamlearn.judge.inputs import InputDistance
from streamlearn.judge.window import group_of, joined
from streamlearn.records import Array

Source: TypeAlias = Literal["inputs", "disagreement", "uncertainty", "error"]
SOURCES: tuple[Source, ...] = ("inputs", "disagreement", "uncertainty", "error")

ADWIN_DELTA = 0.002
"""In ADWIN's theory it bounds the chance of a false alarm at each check, not over the whole stream; the formula in use
is the normal approximation of that bound. The cumulative sums have no bound: `benchmarks/drift.py` measures their false
alarms."""
_WARMUP_STEPS = 500
"""At the start of training the student departs from its teacher; that is no drift."""
_LAST_ALARMS = 8


@dataclass(frozen=True, slots=True)
class SourceReport:
    """What one detector has seen."""

    alarms: int
    last_alarm_steps: tuple[int, ...]
    """At most 8."""
    values: int
    ignored: int
    """Values that were not finite."""
    mean: float | None
    """Since the last alarm or reset; None before the first value."""


DriftReport: TypeAlias = dict[Source, SourceReport]


class DriftMonitor:
    """Takes values in the order of the log; each method returns whether its value raises an alarm.

    All state is saved: continuing after `load` equals an uninterrupted run.
    """

    def __init__(self, *, warmup_steps: int = _WARMUP_STEPS) -> None:
        """`warmup_steps`: steps without alarms of disagreement and uncertainty."""
        self._distance = InputDistance()
        self._channels: dict[Source, _Channel] = {
            "inputs": _Channel(Cusum()),
            "disagreement": _Channel(Cusum(), skipped_values=warmup_steps),
            "uncertainty": _Channel(Cusum(), skipped_values=warmup_steps),
            "error": _Channel(Adwin(ADWIN_DELTA)),
        }

    def inputs(self, x: Array, step: int) -> bool:
        """Once a step: the samples that arrived, (B, *shape), B >= 1, finite, in the schema's dtype."""
        distance = self._distance.update(x)
        if distance is None or not self._channels["inputs"].update(distance, step):
            return False
        self._distance.reset()
        return True

    def update(self, source: Literal["disagreement", "uncertainty", "error"], value: float, step: int) -> bool:
        """Add a value of one of the other sources.

        - disagreement, once a step: total variation between the probabilities of student and teacher, mean over the
          arrivals;
        - uncertainty, once a step: 1 - the teacher's highest probability, mean over the arrivals;
        - error, once for each scored label: 1 if the first prediction was wrong, else 0. That may be the prediction of
          a pinned version that a client received, as in all scores of first predictions.
        """
        return self._channels[source].update(value, step)

    def forget_answers(self) -> None:
        """Reset the detectors of predictions: other weights predict from here on, as after a rollback."""
        self._channels["disagreement"].detector.reset()
        self._channels["uncertainty"].detector.reset()

    def report(self) -> DriftReport:
        """By source."""
        return {source: channel.report() for source, channel in self._channels.items()}

    def state(self) -> dict[str, Array]:
        """Copies of all state; each name begins with its source."""
        parts: dict[str, dict[str, Array]] = {"distance": self._distance.state()}
        return joined(parts | {source: channel.state() for source, channel in self._channels.items()})

    def load(self, state: Mapping[str, Array]) -> None:
        """Restore what `state` saved."""
        self._distance.load(group_of(state, "distance"))
        for source, channel in self._channels.items():
            channel.load(group_of(state, source))


@dataclass(slots=True)
class _Channel:
    """A detector with the counts of its values and alarms."""

    detector: Cusum | Adwin
    skipped_values: int = 0
    fed: int = 0
    ignored: int = 0
    alarms: int = 0
    alarm_steps: deque[int] = field(default_factory=lambda: deque(maxlen=_LAST_ALARMS))

    def update(self, value: float, step: int) -> bool:
        if not math.isfinite(value):
            # The guard handles it. Here it must neither raise an alarm nor enter the running statistics.
            self.ignored += 1
            return False
        self.fed += 1
        if self.fed <= self.skipped_values or not self.detector.update(value):
            return False
        self.alarms += 1
        self.alarm_steps.append(step)
        return True

    def report(self) -> SourceReport:
        return SourceReport(
            alarms=self.alarms,
            last_alarm_steps=tuple(self.alarm_steps),
            values=self.fed,
            ignored=self.ignored,
            mean=self.detector.level,
        )

    def state(self) -> dict[str, Array]:
        return {
            "detector": self.detector.state(),
            "alarm_steps": np.array(self.alarm_steps, np.int64),
            "counts": np.array([self.fed, self.ignored, self.alarms], np.int64),
        }

    def load(self, state: Mapping[str, Array]) -> None:
        self.detector.load(state["detector"])
        self.alarm_steps = deque(state["alarm_steps"].tolist(), maxlen=_LAST_ALARMS)
        self.fed, self.ignored, self.alarms = state["counts"].tolist()
