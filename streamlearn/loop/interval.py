"""When an action that is repeated is due again. Pure: the caller passes step and time in."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Interval:
    """The step and the time of the last action, and the least time between two of them."""

    every_s: float
    last_s: float
    last_step: int

    def due(self, step: int, now_s: float, *, share: float = 1.0) -> bool:
        """Whether steps were taken since, and this share of the least time has passed."""
        return step > self.last_step and now_s - self.last_s >= share * self.every_s

    def done(self, step: int, now_s: float) -> None:
        """The action was taken after this step."""
        self.last_step, self.last_s = step, now_s
