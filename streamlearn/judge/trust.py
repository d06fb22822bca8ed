"""Trust in the teacher: a factor of the consistency weight, from its recent accuracy on labels.

Unlabelled samples teach the student what the teacher predicts. After a drift the teacher predicts what held before, and
consistency with it slows the student down. So

    factor = min(1, (a + e) / b)^4        e = sqrt(b (1 - b) / (2 h - 1))

a is the teacher's accuracy on the last h labels, b that on the last 10 h, both exponentially faded, and e the standard
error of a if nothing has changed, so that chance alone lowers the weight little. Without drift a is about b and the
factor is 1, however inaccurate the teacher is, as early in training. The fourth power makes half of the usual accuracy
almost 0.

Labels are late, but alarms without labels are immediate. After such an alarm the factor is 0 until labels arrive of
samples that were predicted after it. Only these count for a, after two assumed errors, so that one lucky label does not
restore the trust. The accuracy is that of the average, whatever the method's targets are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from streamlearn.records import Array

_USUAL = 10
"""Horizon of the usual accuracy, in multiples of h."""
_POWER = 4
_MOST_SKIPPED = 100
"""After an alarm at most this many times h labels of older samples are skipped; then all count. Otherwise a server that
is pinned to an old version, and predicts new samples with it, would keep the factor at 0 indefinitely."""
_ASSUMED_WRONG = 2
"""Labels that count as errors of the teacher after an alarm, before the first."""
_NAMES = ("labels", "usual", "counted", "recent", "since_step", "passed")
_NEVER = -1


@dataclass(frozen=True, slots=True)
class TrustReport:
    """The factor and what it follows from; None before the first label that counts."""

    factor: float
    recent_accuracy: float | None
    usual_accuracy: float | None


class Trust:
    """Takes one label at a time, in the order of the log. All state is saved, as six numbers."""

    def __init__(self, horizon_labels: int) -> None:
        """`horizon_labels` is h; 0: the factor is always 1."""
        assert horizon_labels >= 0, horizon_labels
        self._horizon = horizon_labels
        self._labels, self._usual = 0, 0.0
        self._counted, self._recent = 0, 0.0
        self._since_step, self._skipped = _NEVER, 0

    def distrust(self, step: int) -> None:
        """Set the factor to 0 after an alarm: labels of samples from before `step` do not count.

        No effect before the first h labels, when there is no usual accuracy yet. Nor while the factor is 0, since
        alarms that are more frequent than labels would keep it there indefinitely.
        """
        if self._labels >= self._horizon and self._counted:
            self._counted, self._recent = 0, 0.0
            self._since_step, self._skipped = step, 0

    def update(self, *, right: bool, version: int) -> None:
        """Add a label: whether the teacher predicts it now; `version` is the step that predicted its sample."""
        if not self._horizon:
            return
        self._labels += 1
        self._usual += max(1 / self._labels, 1 / (_USUAL * self._horizon)) * (right - self._usual)
        if version < self._since_step and self._skipped < _MOST_SKIPPED * self._horizon:
            self._skipped += 1
        else:
            self._counted += 1
            before = 0 if self._since_step == _NEVER else _ASSUMED_WRONG
            self._recent += max(1 / (self._counted + before), 1 / self._horizon) * (right - self._recent)

    @property
    def factor(self) -> float:
        """From 0 to 1; 1 for the first h labels, which are too few for an estimate."""
        if not self._horizon or self._labels < self._horizon:
            return 1.0
        if self._counted == 0:
            return 0.0
        error = math.sqrt(self._usual * (1.0 - self._usual) / (2 * self._horizon - 1))
        return min(1.0, (self._recent + error) / self._usual) ** _POWER if self._usual else 1.0

    def report(self) -> TrustReport:
        """The factor now, and both accuracies."""
        return TrustReport(
            factor=self.factor,
            recent_accuracy=self._recent if self._counted else None,
            usual_accuracy=self._usual if self._labels else None,
        )

    def state(self) -> dict[str, Array]:
        """Each number as a 0-d array."""
        values = (self._labels, self._usual, self._counted, self._recent, self._since_step, self._skipped)
        return {name: np.array(value) for name, value in zip(_NAMES, values, strict=True)}

    def load(self, state: Mapping[str, Array]) -> None:
        """Restore what `state` saved."""
        self._labels, self._counted = int(state["labels"]), int(state["counted"])
        self._usual, self._recent = float(state["usual"]), float(state["recent"])
        self._since_step, self._skipped = int(state["since_step"]), int(state["passed"])
