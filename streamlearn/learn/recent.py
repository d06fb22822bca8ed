"""Recent samples: what the further steps of a micro-batch learn from, next to labelled rows.

A ring buffer without labels. A draw is a function of content, seed and step, so a restart draws the same. Letters: N
samples held, U drawn.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from streamlearn.records import Array, Schema

_DRAWS = 0x5EE9
"""Separates these random numbers from the replay buffer's, which has the same seed and step."""


RECENT_ROWS = 2048
"""Samples held, as far as `RECENT_BYTES` allow."""
RECENT_BYTES = 64 << 20
"""Bound of their bytes: they are in each checkpoint."""


class RecentSamples:
    """At most `capacity` samples with their keys. With capacity 0 it holds none, and has no state."""

    def __init__(self, capacity: int, schema: Schema, seed: int) -> None:
        assert capacity >= 0, capacity
        self.capacity = capacity
        self._x = np.zeros((capacity, *schema.shape), schema.dtype)
        self._keys = np.zeros(capacity, np.int64)
        self._seed = seed
        self._held = self._next = 0

    def __len__(self) -> int:
        return self._held

    def add(self, x: Array, keys: npt.NDArray[np.int64] | None = None) -> None:
        """Add (n, *shape) samples; they replace the oldest."""
        capacity = self.capacity
        if capacity == 0:
            return
        x, n = x[-capacity:], min(len(x), capacity)
        places = (self._next + np.arange(n)) % capacity
        self._x[places] = x
        self._keys[places] = 0 if keys is None else keys[-capacity:]
        self._next = (self._next + n) % capacity
        self._held = min(self._held + n, capacity)

    def remove(self, key: int) -> None:
        """Drop and overwrite the samples with this key. The others keep their order."""
        oldest_first = np.roll(np.arange(self._held), -self._next if self._held == self.capacity else 0)
        kept = oldest_first[self._keys[oldest_first] != key]
        if len(kept) == self._held:
            return
        x, keys = self._x[kept], self._keys[kept]
        self._x[:], self._keys[:] = 0, 0
        self._held = self._next = 0
        self.add(x, keys)

    def draw_into(self, x_U: Array, step: int) -> npt.NDArray[np.int64]:
        """Copy min(U, N) different random samples into the first rows; returns their keys."""
        rng = np.random.Generator(np.random.Philox(key=np.array([self._seed ^ _DRAWS, step], np.uint64)))
        chosen = rng.choice(self._held, size=min(len(x_U), self._held), replace=False)
        x_U[: len(chosen)] = self._x[chosen]
        keys: npt.NDArray[np.int64] = self._keys[chosen]
        return keys

    def state(self) -> dict[str, Array]:
        """Copies in ring order, since draws depend on the position of the ring."""
        if not self.capacity:
            return {}
        return {
            "x": self._x[: self._held].copy(),
            "keys": self._keys[: self._held].copy(),
            "next": np.array(self._next, np.int64),
        }

    def load(self, state: Mapping[str, Array]) -> None:
        """Restore what `state` saved. If that held more, the newest are kept."""
        if not state or not self.capacity:
            return
        x, keys, begin = state["x"], state["keys"], int(state["next"])
        self._held = self._next = 0
        if len(x) == self.capacity:
            self._x[:], self._keys[:], self._held, self._next = x, keys, len(x), begin
        else:
            oldest_first = np.roll(np.arange(len(x)), -begin)
            self.add(x[oldest_first], keys[oldest_first].astype(np.int64))
