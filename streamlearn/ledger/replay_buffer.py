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
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from streamlearn.records import Array, Example, Schema

_FIRST_ROWS = 256
_LOOK_AHEAD = 64
"""How many rows an eviction checks for one that was drawn, before it takes one that never was."""


class _Row(NamedTuple):
    slot: int
    """Where the payload is."""
    class_index: int
    labelled_at_s: float


class _Ages:
    """Label time and id of the rows of one class, oldest first. Amortised O(1) at both ends, O(n) in the middle."""

    def __init__(self) -> None:
        self._ages: list[tuple[float, str]] = []
        self._head = 0

    def __len__(self) -> int:
        return len(self._ages) - self._head

    def __getitem__(self, place: int) -> tuple[float, str]:
        return self._ages[self._head + place]

    def insert(self, age: tuple[float, str]) -> None:
        bisect.insort(self._ages, age, lo=self._head)

    def remove(self, age: tuple[float, str]) -> None:
        at = bisect.bisect_left(self._ages, age, lo=self._head)
        assert self._ages[at] == age, "a row is not at the place of its age"
        if at > self._head:
            del self._ages[at]
            return
        self._head += 1
        if self._head * 2 > len(self._ages):
            del self._ages[: self._head]
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
        self._rows: dict[str, _Row] = {}
        self._new: dict[str, int] = {}
        """Ids of rows that were never drawn, oldest first. New rows are numbered."""
        self.added = 0
        """New rows so far, in this process."""
        self.drawn_ids: list[str] = []
        """Ids of the last draw."""
        self._free: list[int] = []
        self._ages_C = [_Ages() for _ in range(self._schema.capacity)]
        self._counts_C = np.zeros(self._schema.capacity, np.int64)

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, sample_id: str) -> bool:
        return sample_id in self._rows

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
        assert 0 <= example.class_index < len(self._ages_C), example.class_index
        if example.sample_id in self._rows:
            self._remove(example.sample_id)
        elif len(self) == self._capacity:
            self._evict(example.class_index)
        slot = self._free.pop() if self._free else len(self._rows)
        if slot == len(self._x):
            grown = np.zeros((min(2 * slot, self._capacity), *self._schema.shape), self._schema.dtype)
            grown[:slot] = self._x
            self._x = grown
        self._x[slot] = example.x
        self._mark_new(example.sample_id)
        self._link(example.sample_id, _Row(slot, example.class_index, example.labelled_at_s))

    def relabel(self, sample_id: str, class_index: int, labelled_at_s: float | None = None) -> bool:
        """Change class and label time of a row, and keep its payload. With another class, it is new again.

        Without a time, the time stays. Returns whether there is such a row.
        """
        if sample_id not in self._rows:
            return False
        row = self._unlink(sample_id)
        if class_index != row.class_index:
            self._mark_new(sample_id)
        at_s = row.labelled_at_s if labelled_at_s is None else labelled_at_s
        self._link(sample_id, _Row(row.slot, class_index, at_s))
        return True

    def remove(self, sample_id: str) -> bool:
        """Remove the row of a sample, and overwrite its payload. Returns whether there was one."""
        if sample_id not in self._rows:
            return False
        self._x[self._remove(sample_id)] = 0
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
        self.drawn_ids = new_ids + self._choose(len(y_L) - len(new_ids), step)
        slots_L, y_L[:] = self._places(self.drawn_ids)
        np.take(self._x, slots_L, axis=0, out=x_L, mode="clip")  # "raise" would copy through a buffer
        return new_ids

    def rows(self, sample_ids: Sequence[str]) -> tuple[Array, npt.NDArray[np.int64]]:
        """Copies of the rows of these samples, and their classes."""
        slots, classes = self._places(sample_ids)
        return self._x[slots], np.array(classes, np.int64)

    def probe(self, n: int, step: int) -> tuple[Array, npt.NDArray[np.int64]]:
        """At most n rows and their classes, balanced, a function of the step. Changes nothing."""
        return self.rows(self._choose(min(n, len(self)), step))

    def _places(self, sample_ids: Sequence[str]) -> tuple[list[int], list[int]]:
        """Slots and classes."""
        rows = [self._rows[sample_id] for sample_id in sample_ids]
        return [row.slot for row in rows], [row.class_index for row in rows]

    def _choose(self, n: int, step: int) -> list[str]:
        """Balanced ids. Each class is cut by age into as many slices as its share, and one row of each is drawn.

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
        return [self._ages_C[c][place][1] for c, place in zip(class_L.tolist(), place_L.tolist(), strict=True)]

    def state(self) -> dict[str, Array]:
        """Copies of all rows, oldest first: x (N, *shape), y (N,), labelled_at_s (N,), ids as UTF-8 with N + 1 offsets.

        `new` (N,) is the index of a row among those never drawn, or -1.
        """
        ages_N = sorted((row.labelled_at_s, sample_id) for sample_id, row in self._rows.items())
        places = {sample_id: place for place, sample_id in enumerate(self._new)}
        x_N, y_N = self.rows([sample_id for _, sample_id in ages_N])
        ids_N = [sample_id.encode("utf-8", "surrogatepass") for _, sample_id in ages_N]
        return {
            "x": x_N,
            "y": y_N,
            "labelled_at_s": np.array([labelled_at_s for labelled_at_s, _ in ages_N], np.float64),
            "new": np.array([places.get(sample_id, -1) for _, sample_id in ages_N], np.int64),
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
        new_ids = sorted((i for i in self._rows if place_of[i] >= 0), key=place_of.__getitem__)
        self._new = {sample_id: n for n, sample_id in enumerate(new_ids)}
        self.added = len(new_ids)

    def _mark_new(self, sample_id: str) -> None:
        """Draw this row before others. A row that is new keeps its place."""
        if sample_id not in self._new:
            self._new[sample_id] = self.added
            self.added += 1

    def _link(self, sample_id: str, row: _Row) -> None:
        self._rows[sample_id] = row
        self._ages_C[row.class_index].insert((row.labelled_at_s, sample_id))
        self._counts_C[row.class_index] += 1

    def _unlink(self, sample_id: str) -> _Row:
        row = self._rows.pop(sample_id)
        self._ages_C[row.class_index].remove((row.labelled_at_s, sample_id))
        self._counts_C[row.class_index] -= 1
        return row

    def _remove(self, sample_id: str) -> int:
        """Remove a row, and return its slot."""
        slot = self._unlink(sample_id).slot
        self._new.pop(sample_id, None)
        self._free.append(slot)
        return slot

    def _evict(self, incoming_class: int) -> None:
        """Make room: the class that would be largest loses its oldest row. Of several, the one with the oldest row.

        Rows that were drawn go before rows that were not, so a label that is read late is learned once.
        """
        counts_C = self._counts_C.copy()
        counts_C[incoming_class] += 1
        largest = np.flatnonzero(counts_C == counts_C.max()).tolist()
        ages = min((self._ages_C[c] for c in largest if len(self._ages_C[c])), key=lambda ages: ages[0])
        oldest = (ages[place][1] for place in range(min(_LOOK_AHEAD, len(ages))))
        self._remove(next((sample_id for sample_id in oldest if sample_id not in self._new), ages[0][1]))
