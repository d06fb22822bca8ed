"""Retention of the embedded log: by age and by bytes, inside the transaction of an append.

Records below a partition's committed offset were read by the learner; the others are unread. Retention by age removes
only read records. Retention by bytes removes read records first, then unread ones, which it reports as an error. In a
partition without a committed offset every record counts as read. Both run before the transaction adds its own records,
so they never remove one of these.

The age of a record counts from its append, not from its own timestamp, so that replayed history is not removed at once.
It counts up to the clock's time or up to the newest append before this one, whichever is earlier: one append by a clock
that is far ahead removes nothing. The bytes of a topic count key, value, headers, and 64 bytes for each row. A topic
may exceed its bound by the last transaction.
"""

from __future__ import annotations

import math
import sqlite3
import time
from collections import Counter

import structlog

from streamlearn.log.sqlite import OFFSET_BITS
from streamlearn.records import NewRecord

MAX_AGE_S = 30 * 86400.0
"""Records that the learner has read, and saved a checkpoint past, are removed at this age."""
ROW_OVERHEAD_BYTES = 64
TRIM_CHUNK_RECORDS = 2048
TRIM_MAX_CHUNKS = 4
REPORT_EVERY_S = 10.0
"""Shortest time between two reports of unread records that were removed."""

log = structlog.get_logger(__name__)


def weight_bytes(record: NewRecord) -> int:
    """Return what a record counts against the bounds."""
    return record.size_bytes + 8 * len(record.headers) + ROW_OVERHEAD_BYTES


class Retention:
    """Bounds each topic of one log. `db` is always the writing connection, in a transaction."""

    def __init__(self, *, max_bytes: int, max_age_s: float) -> None:
        self._max_bytes = max_bytes
        self._max_age_s = max_age_s
        self._last_age_trim_s = -math.inf
        self._unread_trimmed: Counter[str] = Counter()
        """Unread records removed since the last report, by topic."""
        self._reported_at_s = -math.inf

    def trim(self, db: sqlite3.Connection, topic: str, added_bytes: int, now_ms: int) -> Counter[str]:
        """Remove a bounded part of what is too old or too much. Return the removed unread records by topic.

        Call it before the transaction adds `added_bytes` to the topic. Retention by age is due every few seconds; it
        looks at all topics, and at their bytes too.
        """
        topics = [topic]
        every_s, now_s = min(self._max_age_s / 16, 10.0), now_ms / 1000
        if not 0 <= now_s - self._last_age_trim_s < every_s:
            self._last_age_trim_s = now_s
            self._trim_by_age(db, now_ms)
            topics = [name for (name,) in db.execute("SELECT name FROM topics").fetchall()]
        unread: Counter[str] = Counter()
        for name in topics:
            unread[name] += self._trim_by_bytes(db, name, added_bytes if name == topic else 0)
        return +unread

    def _trim_by_age(self, db: sqlite3.Connection, now_ms: int) -> None:
        query = (
            "SELECT max(appended_ms) FROM partitions JOIN records"
            " ON records.id = (partitions.id << ? | (partitions.next - 1))"
        )
        (newest_ms,) = db.execute(query, (OFFSET_BITS,)).fetchone()
        oldest_ms = min(now_ms, newest_ms or 0) - int(self._max_age_s * 1000)
        query = "SELECT id, beginning, min(next, coalesce(committed, next)) FROM partitions"
        for number, beginning, read_to in db.execute(query).fetchall():
            until = min(read_to, beginning + TRIM_CHUNK_RECORDS * TRIM_MAX_CHUNKS)
            base = number << OFFSET_BITS
            # appended_ms never decreases by much within a partition, so a scan from the oldest finds the first to keep
            first = db.execute(
                "SELECT id FROM records WHERE id >= ? AND id < ? AND appended_ms >= ? ORDER BY id LIMIT 1",
                (base + beginning, base + until, oldest_ms),
            ).fetchone()
            _drop(db, number, beginning, until if first is None else first[0] - base)

    def _trim_by_bytes(self, db: sqlite3.Connection, topic: str, added_bytes: int) -> int:
        """Return how many unread records were removed."""
        unread = 0
        query = "SELECT bytes, id, beginning, next, coalesce(committed, next) FROM partitions WHERE topic = ?"
        for _ in range(TRIM_MAX_CHUNKS):
            rows = db.execute(query, (topic,)).fetchall()
            excess = sum(row[0] for row in rows) + added_bytes - self._max_bytes
            read = [(size, number, begin, min(end, committed)) for size, number, begin, end, committed in rows]
            are_read = any(begin < end for *_, begin, end in read)
            parts = read if are_read else [row[:4] for row in rows]
            candidates = [part for part in parts if part[2] < part[3]]
            if excess <= 0 or not candidates:
                break
            _, number, beginning, end = max(candidates)
            keep = _first_to_keep(db, number, beginning, end, excess)
            _drop(db, number, beginning, keep)
            unread += 0 if are_read else keep - beginning
        return unread

    def report(self, unread: Counter[str]) -> None:
        """Log the removal of unread records: the first at once, then at most every `REPORT_EVERY_S`."""
        self._unread_trimmed += unread
        now_s = time.monotonic()
        if self._unread_trimmed and now_s - self._reported_at_s >= REPORT_EVERY_S:
            self._reported_at_s = now_s
            self.report_rest()

    def report_rest(self) -> None:
        """Log what was removed since the last report."""
        for topic, records in self._unread_trimmed.items():
            log.error("unread_records_trimmed", topic=topic, records=records, max_bytes=self._max_bytes)
        self._unread_trimmed.clear()


def _first_to_keep(db: sqlite3.Connection, number: int, beginning: int, end: int, excess: int) -> int:
    """Return the offset up to which a partition's oldest records make up the excess; at most one chunk."""
    base = number << OFFSET_BITS
    bounds = (base + beginning, base + min(end, beginning + TRIM_CHUNK_RECORDS))
    keep = beginning
    for record_id, weight in db.execute("SELECT id, weight FROM records WHERE id >= ? AND id < ? ORDER BY id", bounds):
        keep, excess = record_id - base + 1, excess - weight
        if excess <= 0:
            break
    return keep


def _drop(db: sqlite3.Connection, number: int, beginning: int, keep: int) -> None:
    """Remove the records of a partition from `beginning` up to `keep`."""
    if keep <= beginning:
        return
    bounds = (number << OFFSET_BITS | beginning, number << OFFSET_BITS | keep)
    (size_bytes,) = db.execute("SELECT sum(weight) FROM records WHERE id >= ? AND id < ?", bounds).fetchone()
    db.execute("DELETE FROM records WHERE id >= ? AND id < ?", bounds)
    update = "UPDATE partitions SET beginning = ?, bytes = bytes - ? WHERE id = ?"
    db.execute(update, (keep, size_bytes, number))
