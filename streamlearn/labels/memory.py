"""Labelled examples to learn from again: bounded, balanced by class.

A label is rare and must be used many times; what has just arrived is used first. What is drawn is a function of the
content, the seed and the step, so a restart draws what the run without it would have drawn. Letters: N rows held,
L rows drawn.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt

from streamlearn.records import Array, Example, Schema

_FIRST_ROWS = 256


class _Rows:
    """The rows of one class, oldest first. Amortised O(1) at both ends, O(N) to take one from the middle."""

    def __init__(self) -> None:
        self._slots: list[int] = []
        self._head = 0

    def __len__(self) -> int:
        return len(self._slots) - self._head

    def __getitem__(self, place: int) -> int:
        return self._slots[self._head + place]

    def __iter__(self) -> Iterator[int]:
        return iter(self._slots[self._head :])

    def append(self, slot: int) -> None:
        self._slots.append(slot)

    def pop_oldest(self) -> int:
        slot = self._slots[self._head]
        self._head += 1
        if self._head * 2 > len(self._slots):
            del self._slots[: self._head]
            self._head = 0
        return slot

    def remove(self, slot: int) -> None:
        del self._slots[self._slots.index(slot, self._head)]


class LabelledMemory:
    """At most `capacity` examples, one for each sample id. When full, the largest class loses its oldest row."""

    def __init__(self, capacity: int, schema: Schema, seed: int) -> None:
        assert capacity >= 1, capacity
        self._capacity = capacity
        self._schema = schema
        self._seed = seed
        self._clear()

    def _clear(self) -> None:
        self._x: Array = np.zeros((min(_FIRST_ROWS, self._capacity), *self._schema.shape), self._schema.dtype)
        self._ids: list[str] = []
        self._classes: list[int] = []
        self._ages: list[int] = []
        self._slots: dict[str, int] = {}
        self._new: dict[str, None] = {}
        """Ids of rows that were never drawn, oldest first."""
        self._free: list[int] = []
        self._next_age = 0
        self._rows_C = [_Rows() for _ in self._schema.classes]
        self._counts_C = np.zeros(len(self._schema.classes), np.int64)

    def __len__(self) -> int:
        return len(self._slots)

    def __contains__(self, sample_id: str) -> bool:
        return sample_id in self._slots

    @property
    def new_count(self) -> int:
        """Rows that were never drawn."""
        return len(self._new)

    def add(self, example: Example) -> None:
        """Hold an example as the newest. An older one of the same sample is replaced: that is a correction."""
        assert example.x.shape == self._schema.shape, example.x.shape
        assert 0 <= example.class_index < len(self._rows_C), example.class_index
        if example.sample_id in self._slots:
            self._remove(self._slots[example.sample_id])
        elif len(self) == self._capacity:
            self._evict(example.class_index)
        slot = self._take_slot()
        self._x[slot] = example.x
        self._ids[slot] = example.sample_id
        self._slots[example.sample_id] = slot
        self._new[example.sample_id] = None
        self._file(slot, example.class_index)

    def relabel(self, sample_id: str, class_index: int) -> bool:
        """Correct a row whose payload is gone elsewhere: it becomes the newest of its new class. Whether it is held."""
        slot = self._slots.get(sample_id)
        if slot is None:
            return False
        self._unfile(slot)
        self._file(slot, class_index)
        self._new[sample_id] = None
        return True

    def draw_into(self, x_L: Array, y_L: npt.NDArray[np.int64], step: int) -> list[str]:
        """Fill the caller's rows: never drawn ones first, oldest first, then as many of each class.

        Returns the ids of those that are drawn for the first time. No other row repeats unless its class has fewer
        rows than its share. Where the classes do not divide the rows, chance gives the rest. An empty memory fills
        nothing.
        """
        if not len(self) or not len(y_L):
            return []
        new_ids = list(itertools.islice(self._new, len(y_L)))
        for sample_id in new_ids:
            del self._new[sample_id]
        slots_L = [self._slots[sample_id] for sample_id in new_ids]
        slots_L += self._choose(len(y_L) - len(new_ids), step)
        np.take(self._x, slots_L, axis=0, out=x_L, mode="clip")  # "raise" would copy through a buffer
        y_L[:] = [self._classes[slot] for slot in slots_L]
        return new_ids

    def _choose(self, n: int, step: int) -> list[int]:
        """Slots. Each class is cut by age into as many slices as its share; a random turn makes all its rows equal."""
        if n == 0:
            return []
        rng = np.random.Generator(np.random.Philox(key=np.array([self._seed, step], np.uint64)))
        present_K = np.flatnonzero(self._counts_C)
        shares_K = np.full(len(present_K), n // len(present_K))
        shares_K[rng.permutation(len(present_K))[: n % len(present_K)]] += 1
        counts_K = self._counts_C[present_K]

        share_L, count_L = np.repeat(shares_K, shares_K), np.repeat(counts_K, shares_K)
        turn_L = np.repeat((rng.random(len(present_K)) * counts_K).astype(np.int64), shares_K)
        slice_L = np.arange(n) - np.repeat(np.cumsum(shares_K) - shares_K, shares_K)
        low_L = slice_L * count_L // share_L
        size_L = np.maximum((slice_L + 1) * count_L // share_L - low_L, 1)
        place_L = (low_L + (rng.random(n) * size_L).astype(np.int64) + turn_L) % count_L
        class_L = np.repeat(present_K, shares_K)
        rows_C = self._rows_C
        return [rows_C[c][place] for c, place in zip(class_L.tolist(), place_L.tolist(), strict=True)]

    def state(self) -> dict[str, Array]:
        """Copies of all rows, oldest first: x (N, *shape), y (N,), ids as UTF-8 with N + 1 offsets.

        `new` (N,) is the place of a row among those never drawn, -1 where it was drawn.
        """
        order_N = sorted(self._slots.values(), key=self._ages.__getitem__)
        places = {sample_id: place for place, sample_id in enumerate(self._new)}
        ids_N = [self._ids[slot].encode("utf-8", "surrogatepass") for slot in order_N]
        return {
            "x": self._x[order_N],
            "y": np.array([self._classes[slot] for slot in order_N], np.int64),
            "new": np.array([places.get(self._ids[slot], -1) for slot in order_N], np.int64),
            "ids": np.frombuffer(b"".join(ids_N), np.uint8).copy(),
            "id_offsets": np.cumsum([0, *map(len, ids_N)], dtype=np.int64),
        }

    def load(self, state: Mapping[str, Array]) -> None:
        """Become what `state` saved. With less capacity than it had, the newest stay, balanced as ever."""
        self._clear()
        bounds = itertools.pairwise(state["id_offsets"].tolist())
        ids = [state["ids"][begin:end].tobytes().decode("utf-8", "surrogatepass") for begin, end in bounds]
        for sample_id, x, y in zip(ids, state["x"], state["y"].tolist(), strict=True):
            self.add(Example(sample_id, x, y))
        place_of = dict(zip(ids, state["new"].tolist(), strict=True))
        self._new = dict.fromkeys(sorted((i for i in self._slots if place_of[i] >= 0), key=place_of.__getitem__))

    def _take_slot(self) -> int:
        if self._free:
            return self._free.pop()
        slot = len(self._ids)
        if slot == len(self._x):
            grown = np.zeros((min(2 * slot, self._capacity), *self._schema.shape), self._schema.dtype)
            grown[:slot] = self._x
            self._x = grown
        self._ids.append("")
        self._classes.append(0)
        self._ages.append(0)
        return slot

    def _file(self, slot: int, class_index: int) -> None:
        self._classes[slot] = class_index
        self._ages[slot] = self._next_age
        self._next_age += 1
        self._rows_C[class_index].append(slot)
        self._counts_C[class_index] += 1

    def _unfile(self, slot: int) -> None:
        class_index = self._classes[slot]
        self._rows_C[class_index].remove(slot)
        self._counts_C[class_index] -= 1

    def _remove(self, slot: int) -> None:
        self._unfile(slot)
        self._forget(slot)

    def _forget(self, slot: int) -> None:
        del self._slots[self._ids[slot]]
        self._new.pop(self._ids[slot], None)
        self._free.append(slot)

    def _evict(self, incoming_class: int) -> None:
        """Make room: the class that would be largest loses its oldest row; of several, that with the oldest."""
        counts_C = self._counts_C.copy()
        counts_C[incoming_class] += 1
        largest = np.flatnonzero(counts_C == counts_C.max()).tolist()
        candidates = [c for c in largest if len(self._rows_C[c])]
        victim_class = min(candidates, key=lambda c: self._ages[self._rows_C[c][0]])
        slot = self._rows_C[victim_class].pop_oldest()
        self._counts_C[victim_class] -= 1
        self._forget(slot)
