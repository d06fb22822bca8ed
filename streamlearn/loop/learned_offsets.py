"""How far the labels topics are learned: every label record below these offsets is in the weights or was settled."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

from streamlearn.records import Offsets, TopicPartition

MAX_UNLEARNED_STEPS = 4096
"""Steps tracked while labels arrive faster than they are learned; later ones are reported with a later step."""


class LearnedOffsets:
    """Follows the replay buffer: a step's labels are learned once every row added up to that step was drawn."""

    def __init__(self, start: Offsets) -> None:
        self.offsets = dict(start)
        self._waiting: deque[tuple[int, Offsets]] = deque()
        """For each step that is not learned yet: rows added to the buffer up to it, and its next offsets."""

    def step_done(self, next_offsets: Offsets, *, rows_added: int, rows_drawn: int) -> None:
        """Count one step. `rows_added`: new rows of the replay buffer so far; `rows_drawn`: those drawn once."""
        if len(self._waiting) < MAX_UNLEARNED_STEPS:
            self._waiting.append((rows_added, next_offsets))
        while self._waiting and self._waiting[0][0] <= rows_drawn:
            self.offsets = self._waiting.popleft()[1]

    def as_json(self) -> dict[str, int]:
        """For the checkpoint and the published teacher."""
        return {f"{topic}:{partition}": offset for (topic, partition), offset in self.offsets.items()}

    def load(self, saved: Mapping[str, int]) -> None:
        """Restore what `as_json` returned."""
        self._waiting.clear()
        self.offsets = {}
        for name, offset in saved.items():
            topic, _, partition = name.rpartition(":")
            self.offsets[TopicPartition(topic, int(partition))] = offset
