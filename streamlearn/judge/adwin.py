"""ADWIN, adaptive windowing: detects a change of the mean of bounded values (Bifet and Gavalda, SDM 2007).

The window is an exponential histogram: buckets of 1, 2, 4, … values, at most `_MAX_BUCKETS` of each size, so n values
take O(log n) memory. Every `_CHECK_EVERY` values, each boundary between two buckets is a candidate cut. The mean has
changed where the means of the two parts differ by more than

    epsilon = sqrt(2 m v ln(2 ln(n) / delta)) + 2/3 m ln(2 ln(n) / delta),   m = 1/n0 + 1/n1

v is the variance of the window; n0 and n1 are the sizes of its parts, each less `_MIN_PART` - 1. The constants are
those of the authors' implementation in MOA and of river; tests compare with river value by value. After a change the
window restarts empty, as in river.
"""

from __future__ import annotations

import math

import numpy as np

from streamlearn.records import Array

_MAX_BUCKETS = 5
_CHECK_EVERY = 32
_MIN_PART = 5


class Adwin:
    """A window over values in [0, 1] that restarts where its older and its newer part have different means."""

    def __init__(self, delta: float) -> None:
        """`delta` bounds the probability of a false restart at each check."""
        assert 0.0 < delta < 1.0, delta
        self._delta = delta
        self.reset()

    def reset(self) -> None:
        """Empty the window."""
        self._width, self._total = 0, 0.0
        self._squares = 0.0
        """Sum of squared deviations from the mean."""
        self._sums: list[list[float]] = [[]]
        """Level k: the sum of each bucket of 2^k values, oldest first."""

    @property
    def level(self) -> float | None:
        """Mean of the window; None while it is empty."""
        return self._total / self._width if self._width else None

    def update(self, value: float) -> bool:
        """Add a value; True if the mean has risen. After a change in either direction the window restarts."""
        if self._width:
            self._squares += self._width * (value - self._total / self._width) ** 2 / (self._width + 1)
        self._width += 1
        self._total += value
        self._sums[0].append(value)
        self._merge()
        if self._width % _CHECK_EVERY or (rise := self._rise()) == 0.0:
            return False
        self.reset()
        return rise > 0.0

    def state(self) -> Array:
        """(sum, squared deviations) of the window, then (level, sum) of each bucket, oldest first."""
        return np.array([(self._total, self._squares), *self._buckets()], np.float64)

    def load(self, state: Array) -> None:
        """Restore what `state` saved. A checkpoint of 0.1 holds a flat array: the values since the last change."""
        self.reset()
        if state.ndim == 1:
            for value in state.tolist():
                self.update(value)
            return
        (self._total, self._squares), *buckets = state.tolist()
        self._sums = [[] for _ in range(int(max((level for level, _ in buckets), default=0)) + 1)]
        for level, total in buckets:
            self._sums[int(level)].append(total)
            self._width += 1 << int(level)

    def _merge(self) -> None:
        """Where a level is full, merge its two oldest buckets into one of the next level."""
        for level, sums in enumerate(self._sums):
            if len(sums) <= _MAX_BUCKETS:
                return
            if level + 1 == len(self._sums):
                self._sums.append([])
            self._sums[level + 1].append(sums.pop(0) + sums.pop(0))

    def _rise(self) -> float:
        """Mean of the newer part minus that of the older, at the first cut that is a change; 0 without a change."""
        log_term = math.log(2.0 * math.log(self._width) / self._delta)
        variance = self._squares / self._width
        n0, sum_0 = 0, 0.0
        for level, total in self._buckets():
            n0 += 1 << level
            sum_0 += total
            n1 = self._width - n0
            if n1 < _MIN_PART:
                break
            if n0 < _MIN_PART:
                continue
            m = 1.0 / (n0 - _MIN_PART + 1) + 1.0 / (n1 - _MIN_PART + 1)
            epsilon = math.sqrt(2.0 * m * variance * log_term) + 2.0 / 3.0 * m * log_term
            rise = (self._total - sum_0) / n1 - sum_0 / n0
            if abs(rise) > epsilon:
                return rise
        return 0.0

    def _buckets(self) -> list[tuple[int, float]]:
        """(level, sum) of each bucket, oldest first."""
        return [(level, total) for level in reversed(range(len(self._sums))) for total in self._sums[level]]
