"""The watermark: the event time that the stream has reached. Horizons and expiry are measured against it."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from streamlearn.records import Item, Sample

JUMP_S = 86_400.0
"""A larger jump must be confirmed."""
CONFIRMING_SAMPLES = 8
CONFIRMING_STEPS = 2


class Watermark:
    """The largest median record time of any step so far, in seconds since the epoch; it never decreases.

    The median, because one producer whose clock is years ahead must not make everything expire. A step may hold only
    records of that producer, so a jump of more than `JUMP_S` waits until `CONFIRMING_SAMPLES` samples in at least
    `CONFIRMING_STEPS` consecutive steps agree. Labels do not confirm, because one labeller may send hundreds at once.
    The first step needs no confirmation. A stream of less than one sample a day lags by up to 2 `CONFIRMING_SAMPLES`
    days.
    """

    def __init__(self) -> None:
        self.time_s = 0.0
        """0 before the first record."""
        self._jump_to_s = 0.0
        self._jump_samples = self._jump_steps = 0

    def advance(self, items: Sequence[Item]) -> None:
        """Advance by the records of one step."""
        if not items:
            return
        newest_s = statistics.median_low([item.timestamp_s for item in items])
        if self._is_jump(newest_s):
            times_s = [item.timestamp_s for item in items if isinstance(item, Sample)]
            if not times_s:
                return
            newest_s = statistics.median_low(times_s)
            if self._is_jump(newest_s):
                confirmed_s = self._confirm(newest_s, sum(self._is_jump(time_s) for time_s in times_s))
                if confirmed_s is None:
                    return
                newest_s = confirmed_s
        self._jump_to_s, self._jump_samples, self._jump_steps = 0.0, 0, 0
        self.time_s = max(self.time_s, newest_s)

    def as_json(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {"stream_time_s": self.time_s, "claimed": [self._jump_to_s, self._jump_samples, self._jump_steps]}

    def load(self, saved: Mapping[str, Any]) -> None:
        """Restore what `as_json` returned."""
        self.time_s = float(saved["stream_time_s"])
        self._jump_to_s, self._jump_samples, self._jump_steps = saved.get("claimed") or (0.0, 0, 0)

    def _is_jump(self, time_s: float) -> bool:
        return self.time_s > 0.0 and time_s > self.time_s + JUMP_S

    def _confirm(self, jump_to_s: float, samples: int) -> float | None:
        """Count a step that jumps; once enough agree, the earlier of the last two times."""
        before_s, self._jump_to_s = self._jump_to_s, jump_to_s
        self._jump_samples += samples
        self._jump_steps += 1
        if self._jump_steps < CONFIRMING_STEPS or self._jump_samples < CONFIRMING_SAMPLES:
            return None
        return min(jump_to_s, before_s)
