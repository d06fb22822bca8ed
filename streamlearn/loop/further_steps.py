"""Steps without records: they repeat labelled and recent samples, so that idle time becomes accuracy.

New samples and labels allow them, and are always learned first. The clock paces them, so that a learner takes at most a
share of its threads' time, and none some time after the last record. They are journaled, so a replay asks no clock.

A pure state machine: the caller passes the time in. How many steps are allowed depends on records and steps alone.
"""

from __future__ import annotations

LABELS_PER_BATCH = 4
"""Labels that allow as many steps as a full micro-batch of samples."""
MOST_BATCHES = 4
"""Micro-batches whose steps are kept for later, when samples come faster than these steps are taken."""
IDLE_S = 30.0
"""After this long without a new sample or label none are taken: a slow network would need minutes for those left."""


class FurtherSteps:
    """How many steps without records are allowed, and when the next is due."""

    def __init__(self, steps: int, *, fresh: int, cpu_share: float) -> None:
        """`steps` per `fresh` samples, with the one that learns them."""
        assert 0.0 < cpu_share <= 1.0, cpu_share
        self._per_batch, self._fresh, self._cpu_share = steps - 1, fresh, cpu_share
        self.allowed = 0.0
        """In parts of a step too, since a micro-batch may be small."""
        self._resume_s = float("-inf")
        self._records_at_s = float("-inf")

    @property
    def any(self) -> bool:
        """Whether a step is allowed, whatever the time."""
        return self.allowed >= 1.0

    def step_done(self, samples: int, labels: int, *, began_s: float, now_s: float) -> None:
        """Count a step that took this many new samples and labels."""
        if samples or labels:
            batches = max(samples / self._fresh, min(1.0, labels / LABELS_PER_BATCH))
            self._records_at_s = now_s
            self.allow(self.allowed + batches * self._per_batch)
        else:
            self.allow(self.allowed - 1.0)
        self._resume_s = now_s + (now_s - began_s) * (1.0 / self._cpu_share - 1.0)

    def allow(self, steps: float) -> None:
        """Set the number of steps, within its bounds."""
        self.allowed = min(max(steps, 0.0), float(MOST_BATCHES * self._per_batch))

    def start(self, now_s: float) -> None:
        """A learner has just started: as if a record had come."""
        self._records_at_s = now_s

    def wait_s(self, now_s: float) -> float | None:
        """Seconds until the next step is due, 0 if it is now; None if there is none before another record."""
        if not self.any or now_s - self._records_at_s > IDLE_S:
            return None
        return max(0.0, self._resume_s - now_s)
