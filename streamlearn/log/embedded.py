"""The embedded log: Kafka's semantics on one disk, on SQLite in WAL mode with synchronous=FULL.

Any number of processes may append and read at once. They share only the database file, which must lie on a local disk;
SQLite's write lock serialises them. `benchmarks/logs.py` measures it. Retention runs inside the transaction of an
append (`retention`). The file may be 1.5 times as large as the bound; free pages are reused, not returned.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path

import structlog

from streamlearn.errors import ConfigError, LogError, LogUnavailableError
from streamlearn.log.base import MAX_RECORD_BYTES, POLL_BYTES, check_record
from streamlearn.log.lazy import LazyClient
from streamlearn.log.partitioner import partition_of
from streamlearn.log.retention import MAX_AGE_S, Retention, weight_bytes
from streamlearn.log.sqlite import (
    BUSY_TIMEOUT_S,
    MAX_PARTITIONS,
    OFFSET_BITS,
    connect,
    encode_headers,
    read_records,
    transaction,
    translated,
    truncate_wal,
)
from streamlearn.records import NewRecord, Offsets, Position, Record, TopicPartition

TRANSACTION_MAX_RECORDS = 4096
TRANSACTION_MAX_BYTES = 16 << 20
WAIT_FIRST_S = 0.002
WAIT_MAX_S = 0.02

log = structlog.get_logger(__name__)


class EmbeddedLog:
    """`Log` on one SQLite file, for any number of processes of one machine. The first use opens or creates the file."""

    def __init__(
        self,
        path: Path,
        *,
        max_bytes: int,
        max_age_s: float = MAX_AGE_S,
        max_record_bytes: int = MAX_RECORD_BYTES,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`path` is the database file; its folder is created. `max_bytes` and `max_age_s` bound each topic."""
        self._path = path
        self._max_record_bytes = min(max_record_bytes, max_bytes // 2)
        self._retention = Retention(max_bytes=max_bytes, max_age_s=max_age_s)
        self._clock = clock
        self._partition_ids: dict[TopicPartition, int] = {}
        self._counts: dict[str, int] = {}
        self._turn = count()
        self._queries = LazyClient(lambda wait_s: self._connect(BUSY_TIMEOUT_S, wait_s), sqlite3.Connection.close)
        self._writer = LazyClient(lambda wait_s: self._connect(0.0, wait_s), sqlite3.Connection.close)

    def _connect(self, busy_timeout_s: float, timeout_s: float) -> sqlite3.Connection:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            msg = f"{self._path.parent}: the folder of the log cannot be created: {error}"
            raise LogUnavailableError(msg) from error
        with translated(self._path, "open"):
            return connect(self._path, busy_timeout_s, timeout_s)

    # -- topics

    def create_topics(self, partitions: Mapping[str, int]) -> None:
        """See `Log.create_topics`."""
        with (
            self._queries.alone(BUSY_TIMEOUT_S) as db,
            translated(self._path, "create topics"),
            transaction(db, _deadline(BUSY_TIMEOUT_S)),
        ):
            for topic, partition_count in partitions.items():
                assert partition_count >= 1, (topic, partition_count)
                row = db.execute("SELECT partitions FROM topics WHERE name = ?", (topic,)).fetchone()
                if row is None:
                    _create(db, topic, partition_count)
                elif row[0] != partition_count:
                    msg = f"topic {topic} has {row[0]} partitions, not {partition_count}; they cannot be changed"
                    raise ConfigError(msg)

    def partition_count(self, topic: str) -> int:
        """See `Log.partition_count`."""
        if topic not in self._counts:
            query = "SELECT partition, id FROM partitions WHERE topic = ?"
            with self._queries.alone(BUSY_TIMEOUT_S) as db, translated(self._path, "look up a topic"):
                rows = db.execute(query, (topic,)).fetchall()
            if not rows:
                return 0
            self._partition_ids.update({TopicPartition(topic, partition): number for partition, number in rows})
            self._counts[topic] = len(rows)
        return self._counts[topic]

    def _partition_id(self, partition: TopicPartition) -> int:
        """Return the number by which `records.id` refers to a partition."""
        self._check_topic(partition.topic)
        if partition not in self._partition_ids:
            msg = f"{partition.topic} has no partition {partition.partition}, only {self._counts[partition.topic]}"
            raise LogError(msg)
        return self._partition_ids[partition]

    def _check_topic(self, topic: str) -> int:
        partitions = self.partition_count(topic)
        if not partitions:
            msg = f"{self._path}: no topic {topic}: create it first"
            raise LogError(msg)
        return partitions

    # -- appending

    def append(self, topic: str, records: Sequence[NewRecord], timeout_s: float = 10.0) -> list[Position]:
        """See `Appends.append`. One thread of a process writes at a time. Long sequences take several transactions."""
        deadline = _deadline(timeout_s)
        partitions = self._check_topic(topic)
        for record in records:
            check_record(topic, record, weight_bytes(record), self._max_record_bytes)
        positions: list[Position] = []
        with self._writer.alone(timeout_s) as db:
            for part in _parts(records):
                positions += self._write(db, topic, part, partitions, deadline)
        return positions

    def _write(
        self, db: sqlite3.Connection, topic: str, records: Sequence[NewRecord], partitions: int, deadline: float
    ) -> list[Position]:
        """One transaction, one sync."""
        with translated(self._path, "append"):
            with transaction(db, deadline):
                now_ms = int(self._clock() * 1000)
                oldest_ms = self._retention.oldest_ms(db, now_ms)
                positions, written_from = self._insert(db, topic, records, partitions, now_ms)
                unread = self._retention.trim(db, [topic], oldest_ms, written_from)
            self._retention.report(unread)
            truncate_wal(db, self._path, WAIT_MAX_S)
        return positions

    def _insert(
        self, db: sqlite3.Connection, topic: str, records: Sequence[NewRecord], partitions: int, now_ms: int
    ) -> tuple[list[Position], dict[int, int]]:
        """Return the positions, and the first new offset of each partition written to, by the partition's id."""
        written_from: dict[int, int] = {}
        nexts: dict[int, int] = {}
        added_bytes: dict[int, int] = {}
        rows: list[tuple[int, int, int, int, bytes | None, bytes | None, bytes | None]] = []
        positions: list[Position] = []
        for record in records:
            turn = next(self._turn) % partitions if record.key is None else partition_of(record.key, partitions)
            number = self._partition_ids[TopicPartition(topic, turn)]
            if number not in nexts:
                (first,) = db.execute("SELECT next FROM partitions WHERE id = ?", (number,)).fetchone()
                nexts[number] = written_from[number] = first
                added_bytes[number] = 0
            offset, weight = nexts[number], weight_bytes(record)
            nexts[number] += 1
            added_bytes[number] += weight
            stamp_ms = now_ms if record.timestamp_ms is None else record.timestamp_ms
            stored = (record.key, record.value, encode_headers(record.headers))
            rows.append((number << OFFSET_BITS | offset, stamp_ms, now_ms, weight, *stored))
            positions.append(Position(topic, turn, offset))
        db.executemany("INSERT INTO records VALUES (?, ?, ?, ?, ?, ?, ?)", rows)
        update = "UPDATE partitions SET next = ?, bytes = bytes + ? WHERE id = ?"
        db.executemany(update, [(nexts[number], added_bytes[number], number) for number in nexts])
        return positions, written_from

    # -- reading

    def reader(self, next_offsets: Offsets) -> EmbeddedReader:
        """See `Log.reader`."""
        numbers = {partition: self._partition_id(partition) for partition in next_offsets}
        return EmbeddedReader(self._path, numbers, next_offsets)

    def read(self, partition: TopicPartition, offset: int, max_records: int, timeout_s: float = 10.0) -> list[Record]:
        """See `Log.read`."""
        number = self._partition_id(partition)
        with self._queries.alone(timeout_s) as db, translated(self._path, "read"):
            return read_records(db, partition, number, offset, max_records)

    def beginning_offsets(self, topic: str) -> Offsets:
        """See `Log.beginning_offsets`."""
        return {partition: bounds[0] for partition, bounds in self._bounds(topic).items()}

    def end_offsets(self, topic: str) -> Offsets:
        """See `Log.end_offsets`."""
        return {partition: bounds[1] for partition, bounds in self._bounds(topic).items()}

    def committed_offsets(self, topic: str) -> Offsets:
        """Return the offsets of the last `commit`, of the partitions that it named."""
        return {partition: bounds[2] for partition, bounds in self._bounds(topic).items() if bounds[2] is not None}

    def _bounds(self, topic: str) -> dict[TopicPartition, tuple[int, int, int | None]]:
        """Return beginning, end and committed offset of each partition."""
        self._check_topic(topic)
        query = "SELECT partition, beginning, next, committed FROM partitions WHERE topic = ? ORDER BY partition"
        with self._queries.alone(BUSY_TIMEOUT_S) as db, translated(self._path, "look up offsets"):
            rows = db.execute(query, (topic,)).fetchall()
        return {TopicPartition(topic, row[0]): (row[1], row[2], row[3]) for row in rows}

    def commit(self, next_offsets: Offsets) -> None:
        """See `Log.commit`."""
        rows = [(offset, self._partition_id(partition)) for partition, offset in next_offsets.items()]
        try:
            with (
                self._queries.alone(BUSY_TIMEOUT_S) as db,
                translated(self._path, "commit"),
                transaction(db, _deadline(BUSY_TIMEOUT_S)),
            ):
                db.executemany("UPDATE partitions SET committed = ? WHERE id = ?", rows)
        except LogUnavailableError as error:
            log.warning("offsets_not_committed", error=str(error))

    def close(self) -> None:
        """See `Log.close`. What was acknowledged is on disk already."""
        self._writer.close()
        self._queries.close()
        self._retention.report_rest()


class EmbeddedReader:
    """`Reader` of an embedded log, on a connection of its own. While it waits it runs one pragma every 20 ms."""

    def __init__(self, path: Path, numbers: Mapping[TopicPartition, int], next_offsets: Offsets) -> None:
        """`numbers` has the id of each partition."""
        self._path = path
        self._numbers = dict(numbers)
        self._next_offsets = dict(next_offsets)
        self._turn = 0
        with translated(path, "open"):
            self._db = connect(path, BUSY_TIMEOUT_S, BUSY_TIMEOUT_S)

    def poll(self, partitions: Collection[TopicPartition], max_records: int, timeout_s: float) -> list[Record]:
        """See `Reader.poll`."""
        deadline = _deadline(timeout_s)
        wait_s = WAIT_FIRST_S
        with translated(self._path, "read"):
            version = self._data_version()
            while True:
                records = self._take(partitions, max_records)
                # others may write continuously, so neither the wait nor the deadline may depend on a quiet moment
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
        """Return a number that changes when another connection commits."""
        return int(self._db.execute("PRAGMA data_version").fetchone()[0])

    def _take(self, partitions: Collection[TopicPartition], max_records: int) -> list[Record]:
        """Take an equal share of each partition, then what is left; start with another partition each time."""
        order = sorted(partitions)
        self._turn += 1
        order = order[self._turn % len(order) :] + order[: self._turn % len(order)] if order else order
        records: list[Record] = []
        left_bytes = POLL_BYTES
        read_to = dict(self._next_offsets)
        shares = [*zip(range(len(order), 0, -1), order, strict=True), *((1, partition) for partition in order)]
        for left, partition in shares:
            if (share := -(-(max_records - len(records)) // left)) > 0 and left_bytes > 0:
                number = self._numbers[partition]
                found = read_records(self._db, partition, number, read_to[partition], share, max_bytes=left_bytes)
                read_to[partition] += len(found)
                left_bytes -= sum(len(record.key or b"") + len(record.value or b"") for record in found)
                records += found
        self._next_offsets = read_to  # only now: if a later partition cannot be read, nothing was taken
        return records

    def seek(self, partition: TopicPartition, offset: int) -> None:
        """See `Reader.seek`."""
        assert partition in self._numbers, partition
        self._next_offsets[partition] = offset

    def next_offsets(self) -> Offsets:
        """See `Reader.next_offsets`."""
        return dict(self._next_offsets)

    def end_offsets(self) -> Offsets:
        """See `Reader.end_offsets`. A query takes microseconds, so these are up to date."""
        with translated(self._path, "look up offsets"):
            query = "SELECT next FROM partitions WHERE id = ?"
            return {
                partition: self._db.execute(query, (number,)).fetchone()[0]
                for partition, number in self._numbers.items()
            }

    def close(self) -> None:
        """See `Reader.close`."""
        self._db.close()


def _create(db: sqlite3.Connection, topic: str, partitions: int) -> None:
    (used,) = db.execute("SELECT coalesce(max(id), 0) FROM partitions").fetchone()
    if used + partitions >= MAX_PARTITIONS:
        msg = f"topic {topic}: the log would have more than {MAX_PARTITIONS} partitions"
        raise ConfigError(msg)
    db.execute("INSERT INTO topics (name, partitions) VALUES (?, ?)", (topic, partitions))
    rows = [(used + 1 + partition, topic, partition) for partition in range(partitions)]
    db.executemany("INSERT INTO partitions (id, topic, partition) VALUES (?, ?, ?)", rows)


def _parts(records: Sequence[NewRecord]) -> Iterator[list[NewRecord]]:
    """Split records into transactions: within both bounds, or a single record."""
    part: list[NewRecord] = []
    size_bytes = 0
    for record in records:
        weight = weight_bytes(record)
        if part and (len(part) == TRANSACTION_MAX_RECORDS or size_bytes + weight > TRANSACTION_MAX_BYTES):
            yield part
            part, size_bytes = [], 0
        part.append(record)
        size_bytes += weight
    if part:
        yield part


def _deadline(timeout_s: float) -> float:
    return time.monotonic() + timeout_s
