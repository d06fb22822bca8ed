"""Labels of classes that the schema does not have. They are held, and released once the schema has the class.

held        number → HeldRow, oldest first
held_of     hash of a sample id → the numbers of its held labels, oldest first
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Collection
from typing import NamedTuple

import numpy as np

from streamlearn.ledger.rows import KEPT_RECORDS, Counters, key_of
from streamlearn.ledger.store import Store, Table
from streamlearn.ledger.store_view import Get
from streamlearn.records import Label

MAX_HELD = 10_000
"""How many labels are held, at most."""
NAMES_REPORTED = 100
"""How many class names are reported: those with most labels."""
_HEAD = struct.Struct("<dHiqdH")
_NUMBERS = np.dtype(">u8")


class HeldRow(NamedTuple):
    """One held label."""

    time_s: float
    """Log time."""
    topic: int
    partition: int
    offset: int
    held_at_s: float
    """The watermark when it was read."""
    class_name: str
    sample_id: str

    def pack(self) -> bytes:
        """The row of `held`."""
        name = self.class_name.encode()
        return b"".join((_HEAD.pack(*self[:5], len(name)), name, self.sample_id.encode("utf-8", "surrogatepass")))

    @classmethod
    def unpack(cls, data: bytes) -> HeldRow:
        """The inverse of `pack`."""
        time_s, topic, partition, offset, held_at_s, name_bytes = _HEAD.unpack_from(data)
        ends = _HEAD.size + name_bytes
        name, sample_id = data[_HEAD.size : ends].decode(), data[ends:].decode("utf-8", "surrogatepass")
        return cls(time_s, topic, partition, offset, held_at_s, name, sample_id)


class HeldLabels:
    """At most `most` labels, and at most `KEPT_RECORDS` of one sample. Beyond, the oldest are dropped and counted."""

    def __init__(self, store: Store, counters: Counters, *, most: int) -> None:
        self._c, self._most = counters, most
        self._rows: Table[int, bytes] = store.tables["held"]
        self._of: Table[bytes, bytes] = store.tables["held_of"]
        self._names: Counter[str] = Counter()

    def load(self) -> None:
        """Count the labels by class name."""
        self._names = Counter(HeldRow.unpack(row).class_name for _, row in self._rows.items())

    def names(self) -> dict[str, int]:
        """How many labels are held by class name, the most frequent `NAMES_REPORTED` names first."""
        ordered = sorted(self._names.items(), key=lambda item: (-item[1], item[0]))
        return dict(ordered[:NAMES_REPORTED])

    def of(self, key: bytes) -> list[int]:
        """The numbers of a sample's held labels."""
        return _numbers(self._of.get(key)) if self._c.held else []

    def has(self, key: bytes, place: tuple[int, int, int]) -> bool:
        """Whether the record at this position is held."""
        return any(self._row(row)[1:4] == place for row in self.of(key))

    def hold(self, key: bytes, label: Label, place: tuple[int, int, int]) -> None:
        """Hold a label."""
        c = self._c
        assert label.class_name is not None, label.position
        mine = self.of(key)
        if len(mine) == KEPT_RECORDS:
            self._remove(mine.pop(0))
            c.held_dropped += 1
        row = HeldRow(label.timestamp_s, *place, c.now_s, label.class_name, label.sample_id)
        self._rows.insert(c.held_high, row.pack())
        self._of.put(key, np.array([*mine, c.held_high], _NUMBERS).tobytes())
        self._names[row.class_name] += 1
        c.held_high += 1
        c.held += 1

    def expire(self, limit: int, *, oldest_s: float) -> None:
        """Drop labels that are too many or too old, the oldest first, at most `limit`."""
        c = self._c
        for _ in range(limit):
            oldest = self._rows.first() if c.held else None
            if oldest is None:
                break
            if c.held <= self._most and HeldRow.unpack(oldest[1]).held_at_s >= oldest_s:
                break
            self._remove(oldest[0])
            c.held_dropped += 1

    def release(self, known: Collection[str], limit: int) -> list[HeldRow]:
        """Remove and return labels whose class is now known. Checks at most `limit` labels; the next call continues."""
        c, released = self._c, []
        if not any(name in self._names for name in known):
            return []
        first = self._rows.first()
        assert first is not None, "names without labels"
        # Labels of a known class are not held, so one pass from the oldest to the newest is enough.
        at = c.held_seen if first[0] <= c.held_seen < c.held_high else first[0]
        ends = min(at + limit, c.held_high)
        for row_number in range(at, ends):
            data = self._rows.get(row_number)
            if data is not None and (row := HeldRow.unpack(data)).class_name in known:
                self._remove(row_number)
                released.append(row)
        c.held_seen = ends
        return released

    def _row(self, row_number: int) -> HeldRow:
        data = self._rows.get(row_number)
        assert data is not None, "a number without a held label"
        return HeldRow.unpack(data)

    def _remove(self, row_number: int) -> None:
        row = self._row(row_number)
        key = key_of(row.sample_id)
        others = [other for other in self.of(key) if other != row_number]
        self._of.put(key, np.array(others, _NUMBERS).tobytes() or None)
        self._rows.delete(row_number)
        self._names -= Counter([row.class_name])  # it drops names without labels
        self._c.held -= 1


def newest_held(get: Get, key: bytes) -> HeldRow | None:
    """The newest held label of a sample, read through a view."""
    numbers = _numbers(get("held_of", key))
    return HeldRow.unpack(get("held", numbers[-1])) if numbers else None


def _numbers(data: bytes | None) -> list[int]:
    numbers: list[int] = np.frombuffer(data or b"", _NUMBERS).tolist()
    return numbers
