"""The embedded log: Kafka's semantics on one disk, on SQLite in WAL mode with synchronous=FULL.

How fast it is: `benchmarks/logs.py`, figures in ARCHITECTURE.md under D2. Any number of processes may append
and read at once; the database file is all they share, and it must lie on a local disk. Between processes SQLite's write
lock decides who writes; threads of one process write together (`grouping`).

Retention runs inside the transaction of an append. Records below a partition's committed offset have been read by the
learner; the others have not. Retention by age removes only read records. Retention by bytes removes read records first,
then unread ones, which it reports as an error; it never removes a record of the transaction it runs in. In a partition
without a committed offset nobody reads, and every record counts as read.

The age of a record is counted from its append, not from its own timestamp, so that replayed history is not trimmed at
once. It ends at the clock's time or at the newest append before this one, whichever is earlier: one append by a clock
that is far ahead trims nothing. The byte bound of a topic counts key, value, headers, and 64 bytes for each row. A
topic may exceed it by the last transaction. The file on disk is up to 1.5 times as large; free pages are reused, not
returned.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import count
from pathlib import Path

import structlog

from streamlearn.errors import ConfigError, LogError, LogUnavailableError
from streamlearn.log.base import POLL_BYTES
from streamlearn.log.group_commit import GroupCommit, Ticket
from streamlearn.log.partitioner import partition_of
from streamlearn.log.sqlite import (
    BUSY_TIMEOUT_S,
    MAX_PARTITIONS,
    OFFSET_BITS,
    WAL_MAX_BYTES,
    connect,
    encode_headers,
    read_records,
    transaction,
    translated,
)
from streamlearn.records import NewRecord, Offsets, Position, Record, TopicPartition

MAX_AGE_S = 30 * 86400.0
"""Older records are removed once the learner has read them and saved a checkpoint past them."""
ROW_OVERHEAD_BYTES = 64
TRIM_CHUNK_RECORDS = 2048
TRIM_MAX_CHUNKS = 4
REPORT_EVERY_S = 10.0
"""Between two reports of unread records that were trimmed."""
WAIT_FIRST_S = 0.002
WAIT_MAX_S = 0.02

log = structlog.get_logger(__name__)


def weight_bytes(record: NewRecord) -> int:
    """What a record weighs against the bounds."""
    headers = sum(len(name) + len(value) + 8 for name, value in record.headers)
    return len(record.key or b"") + len(record.value or b"") + headers + ROW_OVERHEAD_BYTES


class EmbeddedLog:
    """`Log` on one SQLite file, for any number of processes of one machine."""

    def __init__(
        self,
        path: Path,
        *,
        max_bytes: int,
        max_age_s: float = MAX_AGE_S,
        clock: Callable[[], float] = time.time,
        max_record_bytes: int = 64 << 20,
    ) -> None:
        """`path` is the database file; its folder is made. Bounds are for each topic.

        Raises:
            LogUnavailableError: the file cannot be opened now.
            LogError: it is no log, or one of a later version.
        """
        self._path = path
        self._max_age_s = max_age_s
        self._max_bytes = max_bytes
        self._max_record_bytes = min(max_record_bytes, max_bytes // 2)
        self._clock = clock
        self._partitions: dict[TopicPartition, int] = {}
        self._counts: dict[str, int] = {}
        self._turn = count()
        self._last_age_trim_s: float | None = None
        self._unread_trimmed: Counter[str] = Counter()
        """Unread records trimmed since the last report, by topic."""
        self._reported_at_s: float | None = None
        self._grouping = GroupCommit(self._write_group)
        self._asking = threading.Lock()
        self._closed = False
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            msg = f"{path.parent}: the folder of the log cannot be made: {error}"
            raise LogUnavailableError(msg) from error
        with translated(path, "open"):
            self._asker = connect(path, busy_timeout_s=BUSY_TIMEOUT_S)
            try:
                self._writer = connect(path, busy_timeout_s=0.0)
            except BaseException:
                self._asker.close()
                raise

    # -- topics

    def create_topics(self, partitions: Mapping[str, int]) -> None:
        """See `Log.create_topics`."""
        with self._asking, translated(self._path, "create topics"), transaction(self._asker, _deadline(BUSY_TIMEOUT_S)):
            for topic, wanted in partitions.items():
                assert wanted >= 1, (topic, wanted)
                row = self._asker.execute("SELECT partitions FROM topics WHERE name = ?", (topic,)).fetchone()
                if row is None:
                    self._create(topic, wanted)
                elif row[0] != wanted:
                    msg = f"topic {topic} has {row[0]} partitions, wanted {wanted}: partitions cannot be changed later"
                    raise ConfigError(msg)

    def _create(self, topic: str, partitions: int) -> None:
        (used,) = self._asker.execute("SELECT coalesce(max(id), 0) FROM partitions").fetchone()
        if used + partitions >= MAX_PARTITIONS:
            msg = f"topic {topic}: the log would have more than {MAX_PARTITIONS} partitions"
            raise ConfigError(msg)
        self._asker.execute("INSERT INTO topics (name, partitions) VALUES (?, ?)", (topic, partitions))
        rows = [(used + 1 + partition, topic, partition) for partition in range(partitions)]
        self._asker.executemany("INSERT INTO partitions (id, topic, partition) VALUES (?, ?, ?)", rows)

    def partition_count(self, topic: str) -> int:
        """See `Log.partition_count`."""
        if topic not in self._counts:
            with self._asking, translated(self._path, "look up a topic"):
                rows = self._asker.execute("SELECT partition, id FROM partitions WHERE topic = ?", (topic,)).fetchall()
            if not rows:
                return 0
            self._partitions.update({TopicPartition(topic, partition): number for partition, number in rows})
            self._counts[topic] = len(rows)
        return self._counts[topic]

    def _partition_id(self, partition: TopicPartition) -> int:
        """The number that `records.id` holds of it."""
        self._check_topic(partition.topic)
        if partition not in self._partitions:
            msg = f"{partition.topic} has no partition {partition.partition}, only {self._counts[partition.topic]}"
            raise LogError(msg)
        return self._partitions[partition]

    def _check_topic(self, topic: str) -> int:
        partitions = self.partition_count(topic)
        if not partitions:
            msg = f"{self._path}: no topic {topic}: create it first"
            raise LogError(msg)
        return partitions

    # -- appending

    def append(self, topic: str, records: Sequence[NewRecord], timeout_s: float = 10.0) -> list[Position]:
        """See `Log.append`. Long sequences are written in several transactions."""
        self._check_open()
        deadline = time.monotonic() + timeout_s
        partitions = self._check_topic(topic)
        positions: list[Position] = []
        for ticket in self._tickets(topic, records, partitions):
            self._grouping.submit(ticket, deadline)
            positions += ticket.positions
        assert len(positions) == len(records)
        return positions

    def _tickets(self, topic: str, records: Sequence[NewRecord], partitions: int) -> list[Ticket]:
        tickets = [Ticket(topic)]
        for record in records:
            size_bytes = weight_bytes(record)
            if record.key is None and record.value is None:
                msg = f"{topic}: a record needs a key or a value"
                raise LogError(msg)
            if size_bytes > self._max_record_bytes:
                msg = f"{topic}: a record of {size_bytes} bytes, at most {self._max_record_bytes} are taken"
                raise LogError(msg)
            if tickets[-1].records and not tickets[-1].has_room(size_bytes):
                tickets.append(Ticket(topic))
            chosen = partition_of(record.key, partitions) if record.key is not None else next(self._turn) % partitions
            tickets[-1].records.append((chosen, record))
            tickets[-1].size_bytes += size_bytes
        return tickets if records else []

    def _write_group(self, group: list[Ticket], deadline: float) -> None:
        """One transaction, one sync, for all of them."""
        with translated(self._path, "append"):
            with transaction(self._writer, deadline):
                now_ms = int(self._clock() * 1000)
                oldest_ms = self._oldest_ms(now_ms)
                written_from: dict[int, int] = {}
                for ticket in group:
                    ticket.positions = self._insert(ticket, now_ms, written_from)
                unread = self._trim({ticket.topic for ticket in group}, oldest_ms, written_from)
            self._report_unread(unread)
            self._bound_wal()

    def _insert(self, ticket: Ticket, now_ms: int, written_from: dict[int, int]) -> list[Position]:
        """Insert records; `written_from` gets the first offset that this transaction writes in each partition."""
        nexts: dict[int, int] = {}
        added_bytes: dict[int, int] = {}
        rows: list[tuple[int, int, int, int, bytes | None, bytes | None, bytes | None]] = []
        positions: list[Position] = []
        for partition, record in ticket.records:
            number = self._partitions[TopicPartition(ticket.topic, partition)]
            if number not in nexts:
                query = "SELECT next FROM partitions WHERE id = ?"
                (nexts[number],) = self._writer.execute(query, (number,)).fetchone()
                written_from.setdefault(number, nexts[number])
                added_bytes[number] = 0
            offset = nexts[number]
            nexts[number] += 1
            weight = weight_bytes(record)
            added_bytes[number] += weight
            stamp_ms = now_ms if record.timestamp_ms is None else record.timestamp_ms
            stored = (record.key, record.value, encode_headers(record.headers))
            rows.append((number << OFFSET_BITS | offset, stamp_ms, now_ms, weight, *stored))
            positions.append(Position(ticket.topic, partition, offset))
        self._writer.executemany("INSERT INTO records VALUES (?, ?, ?, ?, ?, ?, ?)", rows)
        update = "UPDATE partitions SET next = ?, bytes = bytes + ? WHERE id = ?"
        self._writer.executemany(update, [(nexts[number], added_bytes[number], number) for number in nexts])
        return positions

    # -- retention

    def _oldest_ms(self, now_ms: int) -> int | None:
        """Read records appended before this time are too old; None where retention by age is not due."""
        every_s, now_s = min(self._max_age_s / 16, 10.0), now_ms / 1000
        if self._last_age_trim_s is not None and 0 <= now_s - self._last_age_trim_s < every_s:
            return None
        self._last_age_trim_s = now_s
        query = (
            "SELECT max(appended_ms) FROM partitions JOIN records"
            " ON records.id = (partitions.id << ? | (partitions.next - 1))"
        )
        (newest_ms,) = self._writer.execute(query, (OFFSET_BITS,)).fetchone()
        return min(now_ms, newest_ms or 0) - int(self._max_age_s * 1000)

    def _trim(self, topics: set[str], oldest_ms: int | None, written_from: Mapping[int, int]) -> Counter[str]:
        """Inside a write transaction: remove what is too old or too much, a bounded part of it at a time.

        Returns how many unread records were removed, by topic.
        """
        if oldest_ms is not None:
            topics = set(self._counts)
        unread: Counter[str] = Counter()
        for topic in topics:
            if oldest_ms is not None:
                self._trim_by_age(topic, oldest_ms)
            unread[topic] += self._trim_by_bytes(topic, written_from)
        return +unread

    def _trim_by_age(self, topic: str, oldest_ms: int) -> None:
        query = "SELECT id, beginning, next, committed FROM partitions WHERE topic = ?"
        for number, beginning, end, committed in self._writer.execute(query, (topic,)).fetchall():
            read_to = end if committed is None else min(committed, end)
            until = min(read_to, beginning + TRIM_CHUNK_RECORDS * TRIM_MAX_CHUNKS)
            base = number << OFFSET_BITS
            # appended_ms never falls by much along a partition, so a walk from the oldest finds the first to keep
            first = self._writer.execute(
                "SELECT id FROM records WHERE id >= ? AND id < ? AND appended_ms >= ? ORDER BY id LIMIT 1",
                (base + beginning, base + until, oldest_ms),
            ).fetchone()
            self._drop(number, beginning, until if first is None else first[0] - base)

    def _trim_by_bytes(self, topic: str, written_from: Mapping[int, int]) -> int:
        """Returns how many unread records had to be removed."""
        unread = 0
        query = "SELECT id, beginning, next, bytes, committed FROM partitions WHERE topic = ?"
        for _ in range(TRIM_MAX_CHUNKS):
            rows = self._writer.execute(query, (topic,)).fetchall()
            excess = sum(row[3] for row in rows) - self._max_bytes
            if excess <= 0:
                break
            # (bytes, id, beginning, end) of each partition; `end` is where the part that may be removed ends
            old = [(size, number, begin, written_from.get(number, end)) for number, begin, end, size, _ in rows]
            committed = {row[0]: row[4] for row in rows if row[4] is not None}
            read = [(size, n, begin, min(end, committed.get(n, end))) for size, n, begin, end in old]
            of_read = any(begin < end for *_, begin, end in read)
            candidates = [part for part in (read if of_read else old) if part[2] < part[3]]
            if not candidates:
                break
            _, number, beginning, end = max(candidates)
            keep = self._first_to_keep(number, beginning, end, excess)
            self._drop(number, beginning, keep)
            unread += 0 if of_read else keep - beginning
        return unread

    def _first_to_keep(self, number: int, beginning: int, end: int, excess: int) -> int:
        """Where a partition begins once its oldest records, one by one, make up the excess; a chunk at most."""
        base = number << OFFSET_BITS
        bounds = (base + beginning, base + min(end, beginning + TRIM_CHUNK_RECORDS))
        keep = beginning
        for record_id, weight in self._writer.execute(
            "SELECT id, weight FROM records WHERE id >= ? AND id < ? ORDER BY id", bounds
        ):
            keep, excess = record_id - base + 1, excess - weight
            if excess <= 0:
                break
        return keep

    def _drop(self, number: int, beginning: int, keep: int) -> None:
        if keep <= beginning:
            return
        bounds = (number << OFFSET_BITS | beginning, number << OFFSET_BITS | keep)
        (size_bytes,) = self._writer.execute(
            "SELECT sum(weight) FROM records WHERE id >= ? AND id < ?", bounds
        ).fetchone()
        self._writer.execute("DELETE FROM records WHERE id >= ? AND id < ?", bounds)
        update = "UPDATE partitions SET beginning = ?, bytes = bytes - ? WHERE id = ?"
        self._writer.execute(update, (keep, size_bytes, number))

    def _report_unread(self, trimmed: Counter[str]) -> None:
        """Log unread records that were trimmed: at once, then at most every `REPORT_EVERY_S`."""
        if not trimmed and not self._unread_trimmed:
            return
        self._unread_trimmed += trimmed
        now_s = time.monotonic()
        if self._reported_at_s is None or now_s - self._reported_at_s >= REPORT_EVERY_S:
            self._reported_at_s = now_s
            self._log_unread()

    def _log_unread(self) -> None:
        for topic, records in self._unread_trimmed.items():
            log.error("unread_records_trimmed", topic=topic, records=records, max_bytes=self._max_bytes)
        self._unread_trimmed.clear()

    def _bound_wal(self) -> None:
        """SQLite restarts its WAL by itself where readers let it; under constant reading, make it happen."""
        wal = self._path.with_name(self._path.name + "-wal")
        try:
            if wal.stat().st_size < WAL_MAX_BYTES:
                return
        except FileNotFoundError:
            return
        self._writer.execute(f"PRAGMA busy_timeout = {int(WAIT_MAX_S * 1000)}")
        self._writer.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        self._writer.execute("PRAGMA busy_timeout = 0")

    # -- reading

    def reader(self, next_offsets: Offsets) -> EmbeddedReader:
        """See `Log.reader`."""
        self._check_open()
        numbers = {partition: self._partition_id(partition) for partition in next_offsets}
        return EmbeddedReader(self._path, numbers, next_offsets)

    def read(self, partition: TopicPartition, offset: int, max_records: int, timeout_s: float = 10.0) -> list[Record]:
        """See `Log.read`."""
        number = self._partition_id(partition)
        if not self._asking.acquire(timeout=timeout_s):
            msg = f"{partition.topic}[{partition.partition}]@{offset}: not read in {timeout_s} s"
            raise LogUnavailableError(msg)
        try:
            with translated(self._path, "read"):
                return read_records(self._asker, partition, number, offset, max_records)
        finally:
            self._asking.release()

    def beginning_offsets(self, topic: str) -> Offsets:
        """See `Log.beginning_offsets`."""
        return {partition: bounds[0] for partition, bounds in self._bounds(topic).items()}

    def end_offsets(self, topic: str) -> Offsets:
        """See `Log.end_offsets`."""
        return {partition: bounds[1] for partition, bounds in self._bounds(topic).items()}

    def committed_offsets(self, topic: str) -> Offsets:
        """The offsets of the last `commit`, for the partitions it named."""
        return {partition: bounds[2] for partition, bounds in self._bounds(topic).items() if bounds[2] is not None}

    def _bounds(self, topic: str) -> dict[TopicPartition, tuple[int, int, int | None]]:
        self._check_topic(topic)
        query = "SELECT partition, beginning, next, committed FROM partitions WHERE topic = ? ORDER BY partition"
        with self._asking, translated(self._path, "ask for offsets"):
            rows = self._asker.execute(query, (topic,)).fetchall()
        return {TopicPartition(topic, row[0]): (row[1], row[2], row[3]) for row in rows}

    def commit(self, next_offsets: Offsets) -> None:
        """See `Log.commit`. A failure is logged, not raised: the next commit makes up for it."""
        rows = [(offset, self._partition_id(partition)) for partition, offset in next_offsets.items()]
        try:
            with self._asking, translated(self._path, "commit"), transaction(self._asker, _deadline(BUSY_TIMEOUT_S)):
                self._asker.executemany("UPDATE partitions SET committed = ? WHERE id = ?", rows)
        except LogUnavailableError as error:
            log.warning("offsets_not_committed", error=str(error))

    def _check_open(self) -> None:
        if self._closed:
            msg = f"{self._path}: the log is closed"
            raise LogError(msg)

    def close(self) -> None:
        """See `Log.close`. What was acknowledged is on disk already."""
        self._closed = True
        with self._grouping.nobody_writing(BUSY_TIMEOUT_S):
            self._log_unread()
            self._writer.close()
        with self._asking:
            self._asker.close()


class EmbeddedReader:
    """`Reader` of an embedded log, on a connection of its own. Waiting costs one pragma every 20 ms."""

    def __init__(self, path: Path, numbers: Mapping[TopicPartition, int], next_offsets: Offsets) -> None:
        self._path = path
        self._numbers = dict(numbers)
        self._next_offsets = dict(next_offsets)
        self._turn = 0
        with translated(path, "open"):
            self._db = connect(path, busy_timeout_s=BUSY_TIMEOUT_S)

    def poll(self, wanted: Collection[TopicPartition], max_records: int, timeout_s: float) -> list[Record]:
        """See `Reader.poll`."""
        deadline = time.monotonic() + timeout_s
        wait_s = WAIT_FIRST_S
        with translated(self._path, "read"):
            version = self._data_version()
            while True:
                records = self._take(wanted, max_records)
                # others may write without rest, so neither the wait nor the deadline may depend on a quiet moment
                seen = version
                while not records and version == seen:
                    left_s = deadline - time.monotonic()
                    if left_s <= 0:
                        return []
                    time.sleep(min(wait_s, left_s))
                    wait_s = min(wait_s * 2, WAIT_MAX_S)
                    version = self._data_version()
                if records:
                    return records

    def _data_version(self) -> int:
        """Changes when any other connection has committed."""
        return int(self._db.execute("PRAGMA data_version").fetchone()[0])

    def _take(self, wanted: Collection[TopicPartition], max_records: int) -> list[Record]:
        """An equal share of each partition at first, then whatever there is, beginning with another each time."""
        order = sorted(wanted)
        self._turn += 1
        order = order[self._turn % len(order) :] + order[: self._turn % len(order)] if order else order
        records: list[Record] = []
        left_bytes = POLL_BYTES
        read_to = dict(self._next_offsets)
        shares = [*zip(range(len(order), 0, -1), order, strict=True), *((1, partition) for partition in order)]
        for left, partition in shares:
            if (wanted_here := -(-(max_records - len(records)) // left)) > 0 and left_bytes > 0:
                number = self._numbers[partition]
                found = read_records(self._db, partition, number, read_to[partition], wanted_here, max_bytes=left_bytes)
                read_to[partition] += len(found)
                left_bytes -= sum(len(record.key or b"") + len(record.value or b"") for record in found)
                records += found
        self._next_offsets = read_to  # not before: what was taken is lost where a later partition cannot be read
        return records

    def seek(self, partition: TopicPartition, offset: int) -> None:
        """See `Reader.seek`."""
        assert partition in self._numbers, partition
        self._next_offsets[partition] = offset

    def next_offsets(self) -> Offsets:
        """See `Reader.next_offsets`."""
        return dict(self._next_offsets)

    def end_offsets(self) -> Offsets:
        """See `Reader.end_offsets`. Asking costs microseconds here, so it asks."""
        with translated(self._path, "ask for offsets"):
            query = "SELECT next FROM partitions WHERE id = ?"
            return {
                partition: self._db.execute(query, (number,)).fetchone()[0]
                for partition, number in self._numbers.items()
            }

    def close(self) -> None:
        """See `Reader.close`."""
        self._db.close()


def _deadline(timeout_s: float) -> float:
    return time.monotonic() + timeout_s
