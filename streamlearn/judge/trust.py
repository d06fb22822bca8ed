"""How far may the teacher be believed about what comes now? A factor of the consistency weight.

What unlabelled samples teach is what the teacher says of them. After a change of the world it says what held before,
and the student, held to that, learns the new more slowly than one that sees labels alone. So

    factor = min(1, (a + e) / b)^4        e = sqrt(b (1 - b) / (2 h - 1))

with a the teacher's accuracy on the last h labels, b that on the last 10 h, both exponentially faded, and e the
standard error of the first if nothing has changed: luck alone lowers the weight little. In a world that stays, a is at
least b and the factor 1, however bad the teacher is: it teaches what it knows, as early in a stream. The fourth power
makes a half of the usual accuracy next to nothing.

Labels come late, alarms without labels at once. After one nothing is believed until labels of samples come that were
answered since, and then they alone count for a, behind two that were wrong, so that a lucky one is no proof. It is the
average that is asked, whatever a method's targets are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from streamlearn.records import Array

_USUAL = 10
"""So many times as many labels are what is usual."""
_POWER = 4
_MOST_PASSED = 100
"""So many times h older labels are passed by after an alarm; then all count. A server that is pinned to an old version
answers what is new with it, and nobody would be believed again."""
_WRONG_BEFORE = 2
"""Labels that the teacher is taken to have been wrong about since the alarm, before the first."""
_NAMES = ("labels", "usual", "counted", "recent", "since_step", "passed")
_NEVER = -1


class Trust:
    """Fed one label at a time, in the order of the log. All of its state is saved: six numbers."""

    def __init__(self, horizon_labels: int) -> None:
        """`horizon_labels` is h; 0: the factor is always 1."""
        assert horizon_labels >= 0, horizon_labels
        self._horizon = horizon_labels
        self._labels, self._usual = 0, 0.0
        self._counted, self._recent = 0, 0.0
        self._since_step, self._passed = _NEVER, 0

    def lose(self, step: int) -> None:
        """The world has changed at this step: labels of samples that came before say nothing of the teacher now.

        Before the first labels there is nothing to lose: what is right was never usual. Nor is there while it is lost,
        or alarms that come faster than labels would keep it so for ever.
        """
        if self._labels >= self._horizon and self._counted:
            self._counted, self._recent = 0, 0.0
            self._since_step, self._passed = step, 0

    def update(self, *, right: bool, version: int) -> None:
        """A label came: whether the teacher, asked now, is right; its sample was answered after step `version`."""
        if not self._horizon:
            return
        self._labels += 1
        self._usual += max(1 / self._labels, 1 / (_USUAL * self._horizon)) * (right - self._usual)
        if version < self._since_step and self._passed < _MOST_PASSED * self._horizon:
            self._passed += 1
        else:
            self._counted += 1
            before = 0 if self._since_step == _NEVER else _WRONG_BEFORE
            self._recent += max(1 / (self._counted + before), 1 / self._horizon) * (right - self._recent)

    @property
    def factor(self) -> float:
        """From 0 to 1. Of the first h labels each is too large a share for them to disagree."""
        if not self._horizon or self._labels < self._horizon:
            return 1.0
        if self._counted == 0:
            return 0.0
        error = math.sqrt(self._usual * (1.0 - self._usual) / (2 * self._horizon - 1))
        return min(1.0, (self._recent + error) / self._usual) ** _POWER if self._usual else 1.0

    def report(self) -> dict[str, float | None]:
        """As JSON; no accuracies before the first label."""
        return {
            "factor": self.factor,
            "recent_accuracy": self._recent if self._counted else None,
            "usual_accuracy": self._usual if self._labels else None,
        }

    def state(self) -> dict[str, Array]:
        """Each a 0-d array."""
        values = (self._labels, self._usual, self._counted, self._recent, self._since_step, self._passed)
        return {name: np.array(value) for name, value in zip(_NAMES, values, strict=True)}

    def load(self, state: Mapping[str, Array]) -> None:
        """Become what `state` saved."""
        self._labels, self._counted = int(state["labels"]), int(state["counted"])
        self._usual, self._recent = float(state["usual"]), float(state["recent"])
        self._since_step, self._passed = int(state["since_step"]), int(state["passed"])
