"""A back-off factor: halved at each failure, doubled again after a pause without one.

A function of steps, not of time. Leaving level l takes `first_pause_steps` * 2^(l-1) steps, so the pauses grow
exponentially with repeated failures.
"""

from __future__ import annotations

from dataclasses import dataclass

LEVELS = 6
"""Most halvings: the factor is at least 1/64."""


@dataclass(slots=True)
class Backoff:
    """The factor is 2^-level. `level` and `since_step` are all of the state. Steps must not decrease."""

    first_pause_steps: int
    level: int = 0
    since_step: int = 0

    def factor(self, step: int) -> float:
        """From 1/64 to 1."""
        return 0.5 ** self._settled(step)[0]

    def halve(self, step: int, times: int = 1) -> None:
        """Go up this many levels, at most to the highest. 0: only start the pause again at this step."""
        self.level, self.since_step = min(self._settled(step)[0] + times, LEVELS), step

    def reset(self) -> None:
        """Set the factor to 1."""
        self.level = 0

    @property
    def pause_steps(self) -> int:
        """Pause of the level that was set last."""
        return _pause(self.first_pause_steps, self.level)

    def _settled(self, step: int) -> tuple[int, int]:
        """(level, step at which it began), after the pauses that have ended by this step."""
        level, since = self.level, self.since_step
        while level and step - since >= (pause := _pause(self.first_pause_steps, level)):
            level, since = level - 1, since + pause
        return level, since


def _pause(first_steps: int, level: int) -> int:
    return first_steps << max(level - 1, 0)
