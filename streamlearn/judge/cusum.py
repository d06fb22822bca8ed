"""Page's cumulative sum (Page, 1954, Biometrika 41): has the level of a noisy value risen?

S = max(0, S + z - k), and an alarm where S >= h; z is the value in deviations from what it was a moment ago. The level
and the deviation are not known beforehand and move while a model learns, so both are running ones. The deviation is
that of neighbours (von Neumann et al., 1941: half the mean squared difference), which neither a slow fall nor one jump
makes larger.

Values are means of a few steps, since one step resembles the next. k and h are far above the textbook's 0.5 and 5,
which are for independent normal values: what a network says of itself wanders, and a false alarm wakes somebody. A
lasting rise of some deviations is seen after five values all the same, where ADWIN needs some 25: its bound
holds for any values from 0 to 1, and has a term of 2/3 log(2 / delta) / n.
"""

from __future__ import annotations

import numpy as np

from streamlearn.records import Array

STEPS_OF_A_VALUE = 4
FIRST_VALUES = 16
"""They are the first level and deviation, and raise no alarm."""
_RATE = 1 / 64
"""Of one value, in the running level and deviation."""
_SLACK = 2.0
"""k, in deviations: what is no further away does not add up."""
_THRESHOLD = 20.0
"""h, in deviations."""
_FURTHEST = 6.0
"""In deviations: a value further above counts as this far, so that one wild value is no alarm. Nor is it any part of
level and deviation: a jump would else become usual before it has added up."""
_LEAST_DEVIATION = 0.05
"""As a share of the level. With k it means: less than a tenth more is no rise, however steady."""
_TINY = 1e-9


class Cusum:
    """Fed one value a step, which must be finite. All of its state is saved, and has one size."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """As if nothing had been fed."""
        self._values = 0
        self._waiting = 0
        self._waiting_sum = 0.0
        self._level, self._variance, self._last = 0.0, 0.0, 0.0
        self._sum = 0.0

    @property
    def level(self) -> float | None:
        """The running mean; None before the first value."""
        return self._level if self._values else None

    def update(self, step_value: float) -> bool:
        """Whether this value raises the alarm; then everything begins anew."""
        self._waiting += 1
        self._waiting_sum += step_value
        if self._waiting < STEPS_OF_A_VALUE:
            return False
        value = self._waiting_sum / STEPS_OF_A_VALUE
        self._waiting, self._waiting_sum = 0, 0.0
        risen = self._take(value)
        if risen:
            self.begin()
        return risen

    def _take(self, value: float) -> bool:
        away, moved = value - self._level, abs(value - self._last)
        if self._values >= FIRST_VALUES:
            deviation = max(self._variance**0.5, _LEAST_DEVIATION * abs(self._level), _TINY)
            reach = _FURTHEST * deviation
            if away > reach:
                self._sum += _FURTHEST - _SLACK
                return self._sum >= _THRESHOLD
            away, moved = max(away, -reach), min(moved, reach)
            self._sum = max(0.0, self._sum + away / deviation - _SLACK)
        self._level += max(1 / (self._values + 1), _RATE) * away
        if self._values:
            self._variance += max(1 / self._values, _RATE) * (0.5 * moved**2 - self._variance)
        self._last = value
        self._values += 1
        return self._sum >= _THRESHOLD

    def state(self) -> Array:
        """A copy, as seven numbers."""
        counts = (self._values, self._waiting)
        return np.array((*counts, self._waiting_sum, self._level, self._variance, self._last, self._sum), np.float64)

    def load(self, state: Array) -> None:
        """Become what `state` saved."""
        values, waiting, *rest = state.tolist()
        self._values, self._waiting = int(values), int(waiting)
        self._waiting_sum, self._level, self._variance, self._last, self._sum = rest
