"""Labels whose sample has not come: they wait, then are orphans, then are removed.

early    hash of a sample id → LabelRow
queue    number → when it was queued, and the hash of the sample id; oldest first
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from streamlearn.ledger import LabelState
from streamlearn.ledger.rows import Counters, LabelRow
from streamlearn.ledger.store import Store, Table
from streamlearn.records import ERASED

_QUEUED_AT = struct.Struct("<d")


class WaitingLabels:
    """A queue of labels, by the watermark at which they were read. Retractions and erasures wait in it too."""

    def __init__(self, store: Store, counters: Counters) -> None:
        self._c = counters
        self._rows: Table[bytes, bytes] = store.tables["early"]
        self._queue: Table[int, bytes] = store.tables["queue"]

    def get(self, key: bytes) -> LabelRow | None:
        """The label of a sample that is not known."""
        data = self._rows.get(key) if self._c.queued else None
        return None if data is None else LabelRow.unpack(data)

    def erased(self, keys: Sequence[bytes]) -> set[bytes]:
        """Those samples that were erased before they arrived."""
        if not self._c.queued:
            return set()
        rows = self._rows.fetch(keys)
        return {key for key in keys if (row := rows.get(key)) and LabelRow.unpack(row).class_index == ERASED}

    def add(self, key: bytes, row: LabelRow) -> None:
        """Put a label at the end of the queue."""
        c = self._c
        row.queue_row = c.queue_high
        c.queue_high += 1
        c.queued += 1
        self._queue.insert(row.queue_row, _QUEUED_AT.pack(c.now_s) + key)
        self._rows.put(key, row.pack())

    def update(self, key: bytes, row: LabelRow) -> None:
        """Write a label that keeps its place in the queue."""
        self._rows.put(key, row.pack())

    def remove(self, key: bytes, row: LabelRow) -> None:
        """Remove a label."""
        self._queue.delete(row.queue_row)
        row.queue_row = -1
        self._c.queued -= 1
        self._rows.delete(key)

    def expire(self, limit: int, *, most: int, oldest_s: float) -> None:
        """Make labels older than `oldest_s` orphans, oldest first, at most `limit`.

        An orphan is kept for one more horizon, so that it can be asked for. Beyond `most` labels, the oldest are
        removed at once.
        """
        c = self._c
        for _ in range(limit):
            oldest = self._queue.first() if c.queued else None
            if oldest is None:
                break
            (queued_s,), key = _QUEUED_AT.unpack_from(oldest[1]), oldest[1][_QUEUED_AT.size :]
            crowded = c.queued > most
            if not crowded and queued_s >= oldest_s:
                break
            row = self.get(key)
            assert row is not None, "a queued label has no row"
            self.remove(key, row)
            if row.state is LabelState.WAITING:
                c.waiting -= 1
                c.orphan += 1
                if not crowded:
                    row.state = LabelState.ORPHAN
                    self.add(key, row)
