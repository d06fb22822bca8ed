"""Has the world changed? Alarms from what the model says of itself, before labels come, and from its errors after.

Each is an ADWIN (Bifet and Gavalda, 2007; river's): a window that is cut where two parts of it have different means.
Only a mean that rises is an alarm; one that falls is the model learning, and begins the window anew as well.

ADWIN is for independent values that fill the interval from 0 to 1. Errors do. What a model says of itself does not: it
stays within a small part of it, one step resembles the next, and it falls for as long as the model settles. So it is
taken as the mean of a few steps, in deviations from what it was a moment ago; and the deviation is that of neighbours
(von Neumann et al., 1941: half the mean squared difference), which neither a slow fall nor one jump makes larger. A
scale fixed by a window's first values, while the model still settled, made ten deviations look like one. How soon an
alarm rings depends on the stream all the same (`benchmarks/drift.py`).

River cannot save a detector but by pickle. So the values since the last change are kept and saved, and fed again: the
detector is a function of them. They are bounded; when full, the newest half begins a window of its own.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections import deque
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

import numpy as np
from river.drift import ADWIN

from streamlearn.records import Array

Source: TypeAlias = Literal["disagreement", "uncertainty", "error"]
SOURCES: tuple[Source, ...] = ("disagreement", "uncertainty", "error")
"""What is watched: a closed set, since each is a Prometheus label value."""

_WARMUP_STEPS = 500
"""A student that leaves its teacher for the first time is no change of the world."""
_MOST_VALUES = 8192
_STEPS_OF_A_VALUE = 4
"""Means over so many steps have little left of the likeness of neighbours."""
_FIRST_VALUES = 16
"""Of a window: their mean and deviation are its first scale."""
_BEFORE_VALUES = 96
"""A rise is told from the mean of so many before the newest ones: more than are there when a change is late seen."""
_SCALE_RATE = 1 / 64
"""Of one value, in the running mean and deviation. The mean follows a change, which is seen by then or was slow."""
_HALF_RANGE = 4.5
"""Deviations from the middle of ADWIN's interval to either end."""
_LEAST_DEVIATION = 0.05
"""As a share of the mean: less is no change worth an alarm."""
_LEAST_SCALE = 1e-4
_LEAST_RISE = 0.1
"""As a share of the mean just before: a smaller one is the model's own unrest."""
_CLOCK_STEPS = 32
"""Between two looks for a cut; river's own choice."""
_LAST_ALARMS = 8


class DriftMonitor:
    """Fed in the order of the log; each method says whether its value has raised the alarm.

    All of its state is saved: continuing after `load` equals never having stopped.
    """

    def __init__(self, delta: float, *, warmup_steps: int = _WARMUP_STEPS, most_values: int = _MOST_VALUES) -> None:
        """`delta` bounds, by ADWIN's theory, the chance that a value cuts a window without a change in it."""
        self._detectors: dict[Source, _Detector] = {
            "disagreement": _Detector(delta, most_values, label_free=True, skipped_values=warmup_steps),
            "uncertainty": _Detector(delta, most_values, label_free=True, skipped_values=warmup_steps),
            "error": _Detector(delta, most_values, label_free=False, skipped_values=0),
        }

    def disagreement(self, value: float, step: int) -> bool:
        """Once a step: total variation between student's and teacher's probabilities, mean over the arrivals."""
        return self._detectors["disagreement"].update(value, step)

    def uncertainty(self, value: float, step: int) -> bool:
        """Once a step: 1 - the teacher's highest probability, mean over the arrivals."""
        return self._detectors["uncertainty"].update(value, step)

    def error(self, wrong: bool, step: int) -> bool:
        """Once for each scored label: whether the answer on arrival was wrong."""
        return self._detectors["error"].update(float(wrong), step)

    def forget_label_free(self) -> None:
        """Other weights answer from here on, as after a rollback: what the old ones said is no measure for them."""
        self._detectors["disagreement"].begin()
        self._detectors["uncertainty"].begin()

    def report(self) -> dict[str, Any]:
        """Of each source: alarms and the steps of the last ones, mean since the last change, as JSON."""
        return {source: detector.report() for source, detector in self._detectors.items()}

    def state(self) -> dict[str, Array]:
        """Copies; each name begins with its source."""
        return {
            f"{source}.{name}": array
            for source, detector in self._detectors.items()
            for name, array in detector.state().items()
        }

    def load(self, state: Mapping[str, Array]) -> None:
        """Become what `state` saved. Feeds all values again: some ten milliseconds."""
        for source, detector in self._detectors.items():
            prefix = f"{source}."
            detector.load({name.removeprefix(prefix): state[name] for name in state if name.startswith(prefix)})


class _Detector:
    """An ADWIN, and what it was fed since its last change."""

    def __init__(self, delta: float, most_values: int, *, label_free: bool, skipped_values: int) -> None:
        assert 0.0 < delta < 1.0, delta
        assert most_values >= 4 * _FIRST_VALUES, most_values
        self._delta = delta
        self._most_values = most_values
        self._scaled = label_free
        self._steps_of_a_value = _STEPS_OF_A_VALUE if label_free else 1
        self._skipped_values = skipped_values
        self._fed = 0
        self._ignored = 0
        self._changes = 0
        self._alarms = 0
        self._alarm_steps: deque[int] = deque(maxlen=_LAST_ALARMS)
        self.begin()

    def begin(self) -> None:
        """A window with nothing in it."""
        self._adwin = ADWIN(delta=self._delta, clock=_CLOCK_STEPS // self._steps_of_a_value)
        self._values: list[float] = []
        self._waiting: list[float] = []
        self._fed_values: list[float] = []
        self._middle, self._variance = 0.0, 0.0

    def update(self, value: float, step: int) -> bool:
        if not math.isfinite(value):
            # The guard's business. Here it must neither raise nor spoil the window.
            self._ignored += 1
            return False
        self._fed += 1
        if self._fed <= self._skipped_values:
            return False
        self._waiting.append(value)
        if len(self._waiting) < self._steps_of_a_value:
            return False
        mean = sum(self._waiting) / len(self._waiting)
        self._waiting.clear()
        change = self._take(mean)
        self._changes += change != 0
        if change <= 0:
            return False
        self._alarms += 1
        self._alarm_steps.append(step)
        return True

    def _take(self, value: float) -> int:
        """1: the mean has risen; -1: it has fallen; 0: neither. After a change the window is empty."""
        if len(self._values) == self._most_values:
            self._begin_with(self._values[self._most_values // 2 :])
        self._values.append(value)
        if self._scaled:
            if len(self._values) <= _FIRST_VALUES:
                self._set_scale()
                return 0
            value = self._on_scale(value)
        self._fed_values.append(value)
        self._adwin.update(value)
        if not self._adwin.drift_detected:
            return 0
        risen = self._has_risen()
        self.begin()
        return 1 if risen else -1

    def _has_risen(self) -> bool:
        """Whether the mean is higher after a cut: what is left of the window, against all of it.

        Where the scale follows the values, the values themselves must have risen as well: on such a scale a fall that
        ends looks like a rise.
        """
        risen = self._adwin.estimation > statistics.fmean(self._fed_values)
        if not risen or not self._scaled:
            return risen
        newest, before = self._values[-_FIRST_VALUES:], self._values[:-_FIRST_VALUES][-_BEFORE_VALUES:]
        return statistics.fmean(newest) > (1.0 + _LEAST_RISE) * statistics.fmean(before)

    def _begin_with(self, values: list[float]) -> None:
        """Whatever change this finds was there before and is no news."""
        self.begin()
        for value in values:
            self._take(value)

    def _set_scale(self) -> None:
        """From the first values; the middle from the newer half, since they may be falling."""
        if len(self._values) == _FIRST_VALUES:
            self._middle = statistics.fmean(self._values[_FIRST_VALUES // 2 :])
            self._variance = statistics.fmean(0.5 * (b - a) ** 2 for a, b in itertools.pairwise(self._values))

    def _on_scale(self, value: float) -> float:
        """The newest value, from 0 to 1, by the scale of those before it; then the scale moves on."""
        deviation = max(math.sqrt(self._variance), _LEAST_DEVIATION * abs(self._middle), _LEAST_SCALE)
        reach = _HALF_RANGE * deviation
        away = min(max(value - self._middle, -reach), reach)
        moved = min(abs(value - self._values[-2]), reach)
        self._middle += _SCALE_RATE * away
        self._variance += _SCALE_RATE * (0.5 * moved**2 - self._variance)
        return 0.5 + 0.5 * away / reach

    def report(self) -> dict[str, Any]:
        return {
            "alarms": self._alarms,
            "last_alarm_steps": list(self._alarm_steps),
            "changes": self._changes,
            "values": self._fed,
            "ignored": self._ignored,
            "mean": statistics.fmean(self._values) if self._values else None,
        }

    def state(self) -> dict[str, Array]:
        return {
            "values": np.array(self._values, np.float64),
            "waiting": np.array(self._waiting, np.float64),
            "alarm_steps": np.array(self._alarm_steps, np.int64),
            "counts": np.array([self._fed, self._ignored, self._changes, self._alarms], np.int64),
        }

    def load(self, state: Mapping[str, Array]) -> None:
        self._begin_with(state["values"].tolist())
        self._waiting = state["waiting"].tolist()
        self._alarm_steps = deque(state["alarm_steps"].tolist(), maxlen=_LAST_ALARMS)
        self._fed, self._ignored, self._changes, self._alarms = state["counts"].tolist()
