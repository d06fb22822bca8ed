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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from streamlearn.judge.adwin import Adwin
from streamlearn.judge.cusum import Cusum
from streamlearn.judge.inputs import InputDistance
from streamlearn.records import Array, Column

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

    def __init__(self, columns: Sequence[Column] = (), *, warmup_steps: int = _WARMUP_STEPS) -> None:
        """`columns` of the samples, if they are rows of columns.

        `warmup_steps`: steps without alarms of disagreement and uncertainty.
        """
        self._distance = InputDistance(columns)
        self._channels: dict[Source, _Channel] = {
            "inputs": _Channel(Cusum(), skipped_values=0),
            "disagreement": _Channel(Cusum(), skipped_values=warmup_steps),
            "uncertainty": _Channel(Cusum(), skipped_values=warmup_steps),
            "error": _Channel(Adwin(ADWIN_DELTA), skipped_values=0),
        }

    def inputs(self, x: Array, step: int) -> bool:
        """Once a step: the samples that arrived, (B, *shape), B >= 1, finite, in the schema's dtype."""
        distance = self._distance.update(x)
        if distance is None or not self._channels["inputs"].update(distance, step):
            return False
        self._distance.reset()
        return True

    def disagreement(self, value: float, step: int) -> bool:
        """Once a step: total variation between the probabilities of student and teacher, mean over the arrivals."""
        return self._channels["disagreement"].update(value, step)

    def uncertainty(self, value: float, step: int) -> bool:
        """Once a step: 1 - the teacher's highest probability, mean over the arrivals."""
        return self._channels["uncertainty"].update(value, step)

    def error(self, wrong: bool, step: int) -> bool:
        """Once for each scored label: whether the first prediction was wrong.

        That may be the prediction of a pinned version that a client received, as in all scores of first predictions.
        """
        return self._channels["error"].update(float(wrong), step)

    def forget_answers(self) -> None:
        """Reset the detectors of predictions: other weights predict from here on, as after a rollback."""
        self._channels["disagreement"].reset()
        self._channels["uncertainty"].reset()

    def report(self) -> DriftReport:
        """By source."""
        return {source: channel.report() for source, channel in self._channels.items()}

    def state(self) -> dict[str, Array]:
        """Copies of all state; each name begins with its source."""
        parts = {source: channel.state() for source, channel in self._channels.items()}
        saved = {f"{source}.{name}": array for source, arrays in parts.items() for name, array in arrays.items()}
        return saved | {f"distance.{name}": array for name, array in self._distance.state().items()}

    def load(self, state: Mapping[str, Array]) -> None:
        """Restore what `state` saved."""
        parts: dict[str, dict[str, Array]] = {"distance": {}}
        for name, array in state.items():
            source, _, rest = name.partition(".")
            parts.setdefault(source, {})[rest] = array
        self._distance.load(parts["distance"])
        for source, channel in self._channels.items():
            channel.load(parts[source])


class _Channel:
    """A detector with the counts of its values and alarms."""

    def __init__(self, detector: Cusum | Adwin, *, skipped_values: int) -> None:
        self._detector = detector
        self._skipped_values = skipped_values
        self._fed = 0
        self._ignored = 0
        self._alarms = 0
        self._alarm_steps: deque[int] = deque(maxlen=_LAST_ALARMS)

    def reset(self) -> None:
        """Reset the detector, not the counts."""
        self._detector.reset()

    def update(self, value: float, step: int) -> bool:
        if not math.isfinite(value):
            # The guard handles it. Here it must neither raise an alarm nor enter the running statistics.
            self._ignored += 1
            return False
        self._fed += 1
        if self._fed <= self._skipped_values or not self._detector.update(value):
            return False
        self._alarms += 1
        self._alarm_steps.append(step)
        return True

    def report(self) -> SourceReport:
        return SourceReport(
            alarms=self._alarms,
            last_alarm_steps=tuple(self._alarm_steps),
            values=self._fed,
            ignored=self._ignored,
            mean=self._detector.level,
        )

    def state(self) -> dict[str, Array]:
        return {
            "detector": self._detector.state(),
            "alarm_steps": np.array(self._alarm_steps, np.int64),
            "counts": np.array([self._fed, self._ignored, self._alarms], np.int64),
        }

    def load(self, state: Mapping[str, Array]) -> None:
        self._detector.load(state["detector"])
        self._alarm_steps = deque(state["alarm_steps"].tolist(), maxlen=_LAST_ALARMS)
        self._fed, self._ignored, self._alarms = state["counts"].tolist()
