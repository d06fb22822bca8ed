"""Labels of classes that the schema does not have: kept for a while, counted by name, given back once that is known.

held        number → HeldRow, oldest first
held_of     hash of a sample id → the numbers of its held labels, oldest first
held_names  class name → how many are held
"""

from __future__ import annotations

import struct
from collections.abc import Collection
from typing import NamedTuple

from streamlearn.ledger.rows import KEPT_RECORDS, Counters, key_of
from streamlearn.ledger.store import Get, Store, number
from streamlearn.records import Label

MAX_HELD = 10_000
"""Most labels that are held."""
NAMES_TOLD = 100
"""Most names that are reported: those with most labels."""
_HEAD = struct.Struct("<dHiqdH")
_NUMBER_BYTES = 8


class HeldRow(NamedTuple):
    """One held label."""

    time_s: float
    """When the log took it."""
    topic: int
    partition: int
    offset: int
    held_at_s: float
    """The stream's time then."""
    class_name: str
    sample_id: str

    def pack(self) -> bytes:
        """The row of `held`."""
        name = self.class_name.encode()
        return b"".join((_HEAD.pack(*self[:5], len(name)), name, self.sample_id.encode("utf-8", "surrogatepass")))

    @classmethod
    def unpack(cls, data: bytes) -> HeldRow:
        """From the row of `held`."""
        time_s, topic, partition, offset, held_at_s, name_bytes = _HEAD.unpack_from(data)
        ends = _HEAD.size + name_bytes
        name, sample_id = data[_HEAD.size : ends].decode(), data[ends:].decode("utf-8", "surrogatepass")
        return cls(time_s, topic, partition, offset, held_at_s, name, sample_id)


class HeldLabels:
    """At most `max_held`, and of one sample at most `KEPT_RECORDS`; past that the oldest are dropped, and counted.

    `counters` are the ledger's, set anew when it loads.
    """

    def __init__(self, store: Store, *, max_held: int) -> None:
        self.counters = Counters()
        self._max_held = max_held
        self._rows, self._of, self._names = (store.tables[name] for name in ("held", "held_of", "held_names"))
        self._counts: dict[str, int] = {}

    def load(self, counters: Counters) -> None:
        """Take what is kept in memory from the tables."""
        self.counters = counters
        self._counts = {name.decode(): int.from_bytes(count, "big") for name, count in self._names.items()}

    def names(self) -> dict[str, int]:
        """How many are held by class name: of the `NAMES_TOLD` names that have most, the largest first."""
        ordered = sorted(self._counts.items(), key=lambda item: (-item[1], item[0]))
        return dict(ordered[:NAMES_TOLD])

    def of(self, key: bytes) -> list[int]:
        """The numbers of a sample's held labels."""
        return _numbers(self._of.get(key)) if self.counters.held else []

    def has(self, key: bytes, place: tuple[int, int, int]) -> bool:
        """Whether the very record is held."""
        return any(self._row(row)[1:4] == place for row in self.of(key))

    def hold(self, key: bytes, label: Label, place: tuple[int, int, int]) -> None:
        """Keep one label, the newest."""
        c = self.counters
        assert label.class_name is not None, label.position
        mine = self.of(key)
        if len(mine) == KEPT_RECORDS:
            self._remove(mine[0])
            c.held_dropped += 1
        row = HeldRow(label.timestamp_s, *place, c.now_s, label.class_name, label.sample_id)
        self._rows.insert(number(c.held_high), row.pack())
        self._of.put(key, (self._of.get(key) or b"") + number(c.held_high))
        self._count(row.class_name, 1)
        c.held_high += 1
        c.held += 1

    def drop(self, limit: int, *, oldest_s: float) -> None:
        """Give up those that are too many or too old, the oldest first; at most `limit`."""
        c = self.counters
        for _ in range(limit):
            oldest = self._rows.first() if c.held else None
            if oldest is None:
                break
            if c.held <= self._max_held and HeldRow.unpack(oldest[1]).held_at_s >= oldest_s:
                break
            self._remove(int.from_bytes(oldest[0], "big"))
            c.held_dropped += 1

    def take(self, known: Collection[str], limit: int) -> list[HeldRow]:
        """Remove and return labels whose class is known by now. Looks at `limit` of all; the next steps go on."""
        c, taken = self.counters, []
        if not any(name in self._counts for name in known):
            return []
        first = self._rows.first()
        assert first is not None, "names without labels"
        oldest = int.from_bytes(first[0], "big")
        # Labels of a known class are not held, so one round from the oldest to the newest ends it.
        at = c.held_seen if oldest <= c.held_seen < c.held_high else oldest
        ends = min(at + limit, c.held_high)
        for row_number in range(at, ends):
            data = self._rows.get(number(row_number))
            if data is not None and (row := HeldRow.unpack(data)).class_name in known:
                self._remove(row_number)
                taken.append(row)
        c.held_seen = ends
        return taken

    def _row(self, row_number: int) -> HeldRow:
        data = self._rows.get(number(row_number))
        assert data is not None, "a held label left before its time"
        return HeldRow.unpack(data)

    def _remove(self, row_number: int) -> None:
        row = self._row(row_number)
        key = key_of(row.sample_id)
        others = b"".join(number(other) for other in self.of(key) if other != row_number)
        if others:
            self._of.put(key, others)
        else:
            self._of.delete(key)
        self._rows.delete(number(row_number))
        self._count(row.class_name, -1)
        self.counters.held -= 1

    def _count(self, name: str, by: int) -> None:
        count = self._counts.pop(name, 0) + by
        if count:
            self._counts[name] = count
            self._names.put(name.encode(), number(count))
        else:
            self._names.delete(name.encode())


def newest_held(get: Get, key: bytes) -> HeldRow | None:
    """The newest held label of a sample, as a view sees it."""
    numbers = _numbers(get("held_of", key))
    data = get("held", number(numbers[-1])) if numbers else None
    return None if data is None else HeldRow.unpack(data)


def _numbers(data: bytes | None) -> list[int]:
    data = data or b""
    return [int.from_bytes(data[at : at + _NUMBER_BYTES], "big") for at in range(0, len(data), _NUMBER_BYTES)]
