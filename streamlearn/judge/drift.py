"""Has the world changed? Alarms from inputs and from what the model says, before labels come, and from errors after.

Without labels three values of each step are watched for a rise, by Page's cumulative sum (`judge/cusum.py`): how far
the inputs are from those before (`judge/inputs.py`), how unsure the teacher is, and how far student and teacher are
apart. The first needs no network, and sees most changes within five values. What the model says sees those that matter
to it, though some only when labels of the changed world begin to contradict: a network that is sure and wrong is sure.

Errors go to ADWIN (`judge/adwin.py`): a window that is cut where two parts of it have different means. Only a mean
that rises is an alarm; one that falls is the model learning, and restarts the window as well. ADWIN is for independent
values that fill the interval from 0 to 1, and needs some 25 of them before it cuts: too late for the other three.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

import numpy as np

from streamlearn.judge.adwin import Adwin
from streamlearn.judge.cusum import Cusum
from streamlearn.judge.inputs import InputDistance
from streamlearn.records import Array

Source: TypeAlias = Literal["inputs", "disagreement", "uncertainty", "error"]
SOURCES: tuple[Source, ...] = ("inputs", "disagreement", "uncertainty", "error")
"""What is watched: a closed set, since each is a Prometheus label value."""

_WARMUP_STEPS = 500
"""A student that leaves its teacher for the first time is no change of the world."""
_LAST_ALARMS = 8


class DriftMonitor:
    """Fed in the order of the log; each method says whether its value has raised the alarm.

    All of its state is saved: continuing after `load` equals never having stopped.
    """

    def __init__(self, delta: float, *, warmup_steps: int = _WARMUP_STEPS) -> None:
        """`delta`: ADWIN's confidence parameter for errors.

        By ADWIN's theory it bounds the chance of a false alarm at each check, not over the stream, and the formula in
        use is the normal approximation of the bound. The cumulative sums have no bound: their false alarms were
        measured (`benchmarks/drift.py`).
        """
        self._distance = InputDistance()
        self._watched: dict[Source, _Watched] = {
            "inputs": _Watched(Cusum(), skipped_values=0),
            "disagreement": _Watched(Cusum(), skipped_values=warmup_steps),
            "uncertainty": _Watched(Cusum(), skipped_values=warmup_steps),
            "error": _Watched(Adwin(delta), skipped_values=0),
        }

    def inputs(self, x: Array, step: int) -> bool:
        """Once a step: the samples that arrived, (B, *shape), B >= 1, finite, as they were sent."""
        distance = self._distance.update(x)
        if distance is None or not self._watched["inputs"].update(distance, step):
            return False
        self._distance.begin()
        return True

    def disagreement(self, value: float, step: int) -> bool:
        """Once a step: total variation between student's and teacher's probabilities, mean over the arrivals."""
        return self._watched["disagreement"].update(value, step)

    def uncertainty(self, value: float, step: int) -> bool:
        """Once a step: 1 - the teacher's highest probability, mean over the arrivals."""
        return self._watched["uncertainty"].update(value, step)

    def error(self, wrong: bool, step: int) -> bool:
        """Once for each scored label: whether the answer on arrival was wrong.

        Where clients are answered by a pinned version, that is its answer, as in all scores of first predictions.
        """
        return self._watched["error"].update(float(wrong), step)

    def forget_answers(self) -> None:
        """Other weights answer from here on, as after a rollback: what the old ones said is no measure for them."""
        self._watched["disagreement"].begin()
        self._watched["uncertainty"].begin()

    def report(self) -> dict[str, Any]:
        """Of each source: alarms and the steps of the last ones, mean since the last change, as JSON."""
        return {source: watched.report() for source, watched in self._watched.items()}

    def state(self) -> dict[str, Array]:
        """Copies; each name begins with its source."""
        parts = {source: watched.state() for source, watched in self._watched.items()}
        saved = {f"{source}.{name}": array for source, arrays in parts.items() for name, array in arrays.items()}
        return saved | {f"distance.{name}": array for name, array in self._distance.state().items()}

    def load(self, state: Mapping[str, Array]) -> None:
        """Become what `state` saved."""
        parts: dict[str, dict[str, Array]] = {"distance": {}}
        for name, array in state.items():
            source, _, rest = name.partition(".")
            parts.setdefault(source, {})[rest] = array
        self._distance.load(parts["distance"])
        for source, watched in self._watched.items():
            watched.load(parts[source])


class _Watched:
    """A detector, and an account of what it was fed and has found."""

    def __init__(self, detector: Cusum | Adwin, *, skipped_values: int) -> None:
        self._detector = detector
        self._skipped_values = skipped_values
        self._fed = 0
        self._ignored = 0
        self._alarms = 0
        self._alarm_steps: deque[int] = deque(maxlen=_LAST_ALARMS)

    def begin(self) -> None:
        """The detector has seen nothing."""
        self._detector.begin()

    def update(self, value: float, step: int) -> bool:
        if not math.isfinite(value):
            # The guard's business. Here it must neither raise nor spoil what is usual.
            self._ignored += 1
            return False
        self._fed += 1
        if self._fed <= self._skipped_values or not self._detector.update(value):
            return False
        self._alarms += 1
        self._alarm_steps.append(step)
        return True

    def report(self) -> dict[str, Any]:
        return {
            "alarms": self._alarms,
            "last_alarm_steps": list(self._alarm_steps),
            "values": self._fed,
            "ignored": self._ignored,
            "mean": self._detector.level,
        }

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
