"""A factor below one that halves when something goes wrong, and comes back by itself when nothing does.

A function of steps, not of time. Leaving level l takes `first_pause_steps` * 2^(l-1) steps, so what had to be braked
again and again is tried again ever more seldom.
"""

from __future__ import annotations

from dataclasses import dataclass

LEVELS = 6
"""It halves so often at most: down to 1/64."""


@dataclass(slots=True)
class Brake:
    """The factor is 1/2 to the power of a level. Level and `since_step` are all of its state."""

    first_pause_steps: int
    level: int = 0
    since_step: int = 0

    def factor(self, step: int) -> float:
        """At a step not before the last one that it was told of."""
        return 0.5 ** self._settled(step)[0]

    def halve(self, step: int) -> None:
        """One level more, from this step on."""
        self.level, self.since_step = min(self._settled(step)[0] + 1, LEVELS), step

    def press(self, step: int) -> None:
        """All the way down, from this step on."""
        self.level, self.since_step = LEVELS, step

    def hold(self, step: int) -> None:
        """Something is still wrong: the way back from this level begins here."""
        self.level, self.since_step = self._settled(step)[0], step

    def release(self) -> None:
        """The factor is 1 again."""
        self.level = 0

    @property
    def pause_steps(self) -> int:
        """Of the level that it was put to last."""
        return _pause(self.first_pause_steps, self.level)

    def _settled(self, step: int) -> tuple[int, int]:
        """Level at this step, and since when."""
        level, since = self.level, self.since_step
        while level and step - since >= (pause := _pause(self.first_pause_steps, level)):
            level, since = level - 1, since + pause
        return level, since


def _pause(first_steps: int, level: int) -> int:
    return first_steps << max(level - 1, 0)
