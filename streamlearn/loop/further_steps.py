"""Steps without records that may follow a micro-batch: how many are left."""

from __future__ import annotations

from collections.abc import Mapping


class FurtherSteps:
    """Counts down by the steps themselves, so that a replay of the journal ends with the same numbers."""

    def __init__(self, *, per_batch: int, idle: int) -> None:
        """Each micro-batch is followed by `per_batch` steps, and by up to `idle` more while no record arrives."""
        self._per_batch, self._idle = per_batch, idle
        self.of_batch = self.idle = 0

    def __bool__(self) -> bool:
        return bool(self.of_batch or self.idle)

    def step_done(self, *, with_records: bool) -> None:
        """Count one step."""
        if with_records:
            self.of_batch, self.idle = self._per_batch, self._idle
        elif self.of_batch:
            self.of_batch -= 1
        elif self.idle:
            self.idle -= 1

    def apply_settings(self) -> None:
        """Lower counts that were restored from other settings. Call it after the journal is replayed."""
        self.of_batch, self.idle = min(self.of_batch, self._per_batch), min(self.idle, self._idle)

    def as_json(self) -> dict[str, int]:
        """For the checkpoint."""
        return {"further_steps": self.of_batch, "idle_steps": self.idle}

    def load(self, saved: Mapping[str, int]) -> None:
        """Restore what `as_json` returned. Checkpoints of the first version have no such steps."""
        self.of_batch, self.idle = saved.get("further_steps", 0), saved.get("idle_steps", 0)
