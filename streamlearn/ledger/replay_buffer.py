"""The replay buffer: labelled examples to learn from again, bounded and balanced by class.

Labels are rare, so each is used many times, and a new one first. Draws are a function of content, seed and step, so a
replay after a restart draws the same rows. Letters: N rows held, L rows drawn.

Rows are ordered by the log time of their label, then by id. While nothing was evicted, content and order are a function
of the last {class, payload, label time} of each id, in any order of arrival. So are draws, once every row was drawn
for the first time. At capacity, which rows are held depends on the order of arrival too. Each row still has the last
class of its id, and no class loses a row while another has at least two rows more.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from streamlearn.records import Array, Example, Schema

_FIRST_ROWS = 256
_LOOK_AHEAD = 64
"""How many rows an eviction checks for one that was drawn, before it takes one that never was."""

_Age: TypeAlias = Callable[[int], tuple[float, str]]


class _Rows:
    """The slots of one class, oldest first. Amortised O(1) at both ends, O(n) in the middle.

    The age of a slot must not change while it is here.
    """

    def __init__(self, age: _Age) -> None:
        self._age = age
        self._slots: list[int] = []
        self._head = 0

    def __len__(self) -> int:
        return len(self._slots) - self._head

    def __getitem__(self, place: int) -> int:
        return self._slots[self._head + place]

    def insert(self, slot: int) -> None:
        if not len(self) or self._age(self._slots[-1]) < self._age(slot):
            self._slots.append(slot)
        else:
            bisect.insort(self._slots, slot, lo=self._head, key=self._age)

    def remove(self, slot: int) -> None:
        at = bisect.bisect_left(self._slots, self._age(slot), lo=self._head, key=self._age)
        assert self._slots[at] == slot, "a slot is not at the place of its age"
        if at > self._head:
            del self._slots[at]
            return
        self._head += 1
        if self._head * 2 > len(self._slots):
            del self._slots[: self._head]
            self._head = 0


class ReplayBuffer:
    """At most `capacity` examples, one per sample id. When full, the largest class loses its oldest row."""

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
        self._labelled_at_s: list[float] = []
        self._slots: dict[str, int] = {}
        self._new: dict[str, int] = {}
        """Ids of rows that were never drawn, oldest first. New rows are numbered."""
        self.added = 0
        """New rows so far, in this process."""
        self.drawn_ids: list[str] = []
        """Ids of the last draw."""
        self._free: list[int] = []
        self._rows_C = [_Rows(self._age) for _ in range(self._schema.capacity)]
        self._counts_C = np.zeros(self._schema.capacity, np.int64)

    def __len__(self) -> int:
        return len(self._slots)

    def __contains__(self, sample_id: str) -> bool:
        return sample_id in self._slots

    @property
    def capacity(self) -> int:
        """Most rows that are held."""
        return self._capacity

    @property
    def new_count(self) -> int:
        """Rows that were never drawn."""
        return len(self._new)

    @property
    def drawn_below(self) -> int:
        """New rows with a number below this one were drawn, or have left the buffer."""
        return next(iter(self._new.values()), self.added)

    def add(self, example: Example) -> None:
        """Add an example, to be drawn next. It replaces the example of the same sample: a correction."""
        assert example.x.shape == self._schema.shape, example.x.shape
        assert 0 <= example.class_index < len(self._rows_C), example.class_index
        if example.sample_id in self._slots:
            self._remove(self._slots[example.sample_id])
        elif len(self) == self._capacity:
            self._evict(example.class_index)
        slot = self._take_slot()
        self._x[slot] = example.x
        self._ids[slot] = example.sample_id
        self._labelled_at_s[slot] = example.labelled_at_s
        self._slots[example.sample_id] = slot
        self._mark_new(example.sample_id)
        self._link(slot, example.class_index)

    def relabel(self, sample_id: str, class_index: int, labelled_at_s: float | None = None) -> bool:
        """Change class and label time of a row, and keep its payload. With another class, it is new again.

        Without a time, the time stays. Returns whether there is such a row.
        """
        slot = self._slots.get(sample_id)
        if slot is None:
            return False
        if class_index != self._classes[slot]:
            self._mark_new(sample_id)
        self._unlink(slot)
        if labelled_at_s is not None:
            self._labelled_at_s[slot] = labelled_at_s
        self._link(slot, class_index)
        return True

    def remove(self, sample_id: str) -> bool:
        """Remove the row of a sample, and overwrite its payload. Returns whether there was one."""
        slot = self._slots.get(sample_id)
        if slot is None:
            return False
        self._remove(slot)
        self._x[slot] = 0
        return True

    def draw_into(self, x_L: Array, y_L: npt.NDArray[np.int64], step: int) -> list[str]:
        """Fill the caller's rows in place: new rows first, oldest first, then an equal share of each class.

        Returns the ids that are drawn for the first time. A row repeats only if its class has fewer rows than its
        share. A remainder goes to random classes. An empty buffer fills nothing.
        """
        if not len(self) or not len(y_L):
            self.drawn_ids = []
            return []
        new_ids = list(itertools.islice(self._new, len(y_L)))
        for sample_id in new_ids:
            del self._new[sample_id]
        slots_L = [self._slots[sample_id] for sample_id in new_ids]
        slots_L += self._choose(len(y_L) - len(new_ids), step)
        self.drawn_ids = [self._ids[slot] for slot in slots_L]
        np.take(self._x, slots_L, axis=0, out=x_L, mode="clip")  # "raise" would copy through a buffer
        y_L[:] = [self._classes[slot] for slot in slots_L]
        return new_ids

    def rows(self, sample_ids: Sequence[str]) -> tuple[Array, npt.NDArray[np.int64]]:
        """Copies of the rows of these samples, and their classes."""
        slots = [self._slots[sample_id] for sample_id in sample_ids]
        return self._x[slots], np.array([self._classes[slot] for slot in slots], np.int64)

    def probe(self, n: int, step: int) -> tuple[Array, npt.NDArray[np.int64]]:
        """At most n rows and their classes, balanced, a function of the step. Changes nothing."""
        slots_P = self._choose(min(n, len(self)), step)
        return self._x[slots_P], np.array([self._classes[slot] for slot in slots_P], np.int64)

    def _choose(self, n: int, step: int) -> list[int]:
        """Balanced slots. Each class is cut by age into as many slices as its share, and one row of each is drawn.

        A random rotation gives all rows of a class the same chance.
        """
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
        """Copies of all rows, oldest first: x (N, *shape), y (N,), labelled_at_s (N,), ids as UTF-8 with N + 1 offsets.

        `new` (N,) is the index of a row among those never drawn, or -1.
        """
        order_N = sorted(self._slots.values(), key=self._age)
        places = {sample_id: place for place, sample_id in enumerate(self._new)}
        ids_N = [self._ids[slot].encode("utf-8", "surrogatepass") for slot in order_N]
        return {
            "x": self._x[order_N],
            "y": np.array([self._classes[slot] for slot in order_N], np.int64),
            "labelled_at_s": np.array([self._labelled_at_s[slot] for slot in order_N], np.float64),
            "new": np.array([places.get(self._ids[slot], -1) for slot in order_N], np.int64),
            "ids": np.frombuffer(b"".join(ids_N), np.uint8).copy(),
            "id_offsets": np.cumsum([0, *map(len, ids_N)], dtype=np.int64),
        }

    def load(self, state: Mapping[str, Array]) -> None:
        """Restore what `state` returned. With a smaller capacity, the newest rows stay, balanced.

        Columns that were added since are missing in all rows.
        """
        self._clear()
        bounds = itertools.pairwise(state["id_offsets"].tolist())
        ids = [state["ids"][begin:end].tobytes().decode("utf-8", "surrogatepass") for begin, end in bounds]
        x_N, labelled_at_s_N = self._schema.padded(state["x"]), state["labelled_at_s"].tolist()
        rows = zip(ids, x_N, state["y"].tolist(), labelled_at_s_N, strict=True)
        for sample_id, x, y, labelled_at_s in rows:
            self.add(Example(sample_id, x, y, labelled_at_s))
        place_of = dict(zip(ids, state["new"].tolist(), strict=True))
        new_ids = sorted((i for i in self._slots if place_of[i] >= 0), key=place_of.__getitem__)
        self._new = {sample_id: n for n, sample_id in enumerate(new_ids)}
        self.added = len(new_ids)

    def _mark_new(self, sample_id: str) -> None:
        """Draw this row before others. A row that is new keeps its place."""
        if sample_id not in self._new:
            self._new[sample_id] = self.added
            self.added += 1

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
        self._labelled_at_s.append(0.0)
        return slot

    def _age(self, slot: int) -> tuple[float, str]:
        return self._labelled_at_s[slot], self._ids[slot]

    def _link(self, slot: int, class_index: int) -> None:
        self._classes[slot] = class_index
        self._rows_C[class_index].insert(slot)
        self._counts_C[class_index] += 1

    def _unlink(self, slot: int) -> None:
        class_index = self._classes[slot]
        self._rows_C[class_index].remove(slot)
        self._counts_C[class_index] -= 1

    def _remove(self, slot: int) -> None:
        self._unlink(slot)
        del self._slots[self._ids[slot]]
        self._new.pop(self._ids[slot], None)
        self._free.append(slot)

    def _evict(self, incoming_class: int) -> None:
        """Make room: the class that would be largest loses its oldest row. Of several, the one with the oldest row.

        Rows that were drawn go before rows that were not, so a label that is read late is learned once.
        """
        counts_C = self._counts_C.copy()
        counts_C[incoming_class] += 1
        largest = np.flatnonzero(counts_C == counts_C.max()).tolist()
        candidates = [c for c in largest if len(self._rows_C[c])]
        rows = self._rows_C[min(candidates, key=lambda c: self._age(self._rows_C[c][0]))]
        oldest = (rows[place] for place in range(min(_LOOK_AHEAD, len(rows))))
        self._remove(next((slot for slot in oldest if self._ids[slot] not in self._new), rows[0]))
