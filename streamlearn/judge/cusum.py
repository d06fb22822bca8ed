"""Page's cumulative sum (Page, 1954, Biometrika 41): detects a rise of the level of a noisy value.

    S <- max(0, S + z - k)      alarm where S >= h

z is the distance of a value from the running level, in running deviations, since neither is known beforehand and both
move while a model learns. The deviation is that of successive values (von Neumann et al., 1941: half the mean squared
difference), which neither a slow fall nor a single jump increases.

A value is the mean of `STEPS_OF_A_VALUE` steps, because successive steps are correlated. k and h are far above the
textbook's 0.5 and 5, which assume independent normal values, to avoid false alarms. A lasting rise of several
deviations is still detected after five values. ADWIN needs some 25, because its bound holds for any values from 0 to 1
and has a term of 2/3 log(2 / delta) / n.
"""

from __future__ import annotations

import numpy as np

from streamlearn.records import Array

STEPS_OF_A_VALUE = 4
FIRST_VALUES = 16
"""Warm-up: these set the first level and deviation, and raise no alarm."""
_RATE = 1 / 64
"""Weight of a new value in the running level and deviation."""
_SLACK = 2.0
"""k, in deviations."""
_THRESHOLD = 20.0
"""h, in deviations."""
_MAX_DEVIATIONS = 6.0
"""A value further above the level is clipped, so that a single outlier raises no alarm. It is also left out of the
running level and deviation; otherwise a jump would become normal before it adds up to an alarm."""
_MIN_DEVIATION = 0.05
"""As a share of the level. Together with k: a rise of less than a tenth is no alarm, however steady the values."""
_TINY = 1e-9


class Cusum:
    """Takes one finite value a step. The saved state is all of the state, and has a fixed size."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Discard all values."""
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
        """Add the value of a step; True for an alarm, which resets the detector."""
        self._waiting += 1
        self._waiting_sum += step_value
        if self._waiting < STEPS_OF_A_VALUE:
            return False
        value = self._waiting_sum / STEPS_OF_A_VALUE
        self._waiting, self._waiting_sum = 0, 0.0
        risen = self._take(value)
        if risen:
            self.reset()
        return risen

    def _take(self, value: float) -> bool:
        away, moved = value - self._level, abs(value - self._last)
        if self._values >= FIRST_VALUES:
            deviation = max(self._variance**0.5, _MIN_DEVIATION * abs(self._level), _TINY)
            reach = _MAX_DEVIATIONS * deviation
            if away > reach:
                self._sum += _MAX_DEVIATIONS - _SLACK
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
        """Restore what `state` saved."""
        values, waiting, *rest = state.tolist()
        self._values, self._waiting = int(values), int(waiting)
        self._waiting_sum, self._level, self._variance, self._last, self._sum = rest
