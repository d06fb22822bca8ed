"""The embedded log: Kafka's semantics on one disk, on SQLite in WAL mode with synchronous=FULL.

Any number of processes may append and read at once. They share only the database file, which must lie on a local disk;
SQLite's write lock serialises them. `benchmarks/logs.py` measures it. Retention runs inside the transaction of an
append (`retention`). The file may be 1.5 times as large as the bound; free pages are reused, not returned.
"""

from __future__ import annotations

import math
import sqlite3
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import structlog

from streamlearn.errors import ConfigError, LogError, LogUnavailableError
from streamlearn.log.base import MAX_RECORD_BYTES, POLL_BYTES, check_partition, check_record
from streamlearn.log.lazy import LazyClient
from streamlearn.log.partitioner import partition_of
from streamlearn.log.retention import MAX_AGE_S, Retention, weight_bytes
from streamlearn.log.sqlite import (
    BUSY_TIMEOUT_S,
    MAX_PARTITIONS,
    OFFSET_BITS,
    WriterFence,
    connect,
    encode_headers,
    move_offsets,
    read_records,
    take_epoch,
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
        self._ids: dict[str, list[int]] = {}
        """The id of each partition, by topic: `records.id` refers to it."""
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

    @contextmanager
    def _query(self, doing: str, timeout_s: float = BUSY_TIMEOUT_S) -> Iterator[sqlite3.Connection]:
        """Hold the connection for everything but appends."""
        with self._queries.alone(timeout_s) as db, translated(self._path, doing):
            yield db

    # -- topics

    def create_topics(self, partitions: Mapping[str, int]) -> None:
        """See `Log.create_topics`."""
        with self._query("create topics") as db, transaction(db, _deadline(BUSY_TIMEOUT_S)):
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
        return len(self._look_up(topic))

    def topics(self) -> list[str]:
        """See `Log.topics`."""
        with self._query("list topics") as db:
            return [name for (name,) in db.execute("SELECT name FROM topics ORDER BY name")]

    def _look_up(self, topic: str) -> list[int]:
        """Return the id of each partition; none if the topic does not exist."""
        ids = self._ids.get(topic)
        if not ids:
            query = "SELECT id FROM partitions WHERE topic = ? ORDER BY partition"
            with self._query("look up a topic") as db:
                ids = self._ids[topic] = [number for (number,) in db.execute(query, (topic,))]
        return ids

    def _ids_of(self, topic: str) -> list[int]:
        ids = self._look_up(topic)
        if not ids:
            raise LogError(f"{self._path}: no topic {topic}: create it first")
        return ids

    def _id_of(self, partition: TopicPartition) -> int:
        ids = self._ids_of(partition.topic)
        check_partition(partition, len(ids))
        return ids[partition.partition]

    # -- appending

    def append(self, topic: str, records: Sequence[NewRecord], timeout_s: float = 10.0) -> list[Position]:
        """See `Appends.append`. One thread of a process writes at a time. Long sequences take several transactions."""
        deadline = _deadline(timeout_s)
        self._ids_of(topic)
        for record in records:
            check_record(topic, record, weight_bytes(record), self._max_record_bytes)
        positions: list[Position] = []
        with self._writer.alone(timeout_s) as db:
            for part in _parts(records):
                positions += self._write(db, topic, part, deadline)
        return positions

    def _write(
        self,
        db: sqlite3.Connection,
        topic: str,
        records: Sequence[NewRecord],
        deadline: float,
        also: Callable[[], None] = lambda: None,
    ) -> list[Position]:
        """One transaction, one sync. `also` runs in it."""
        with translated(self._path, "append"):
            with transaction(db, deadline):
                also()
                now_ms = int(self._clock() * 1000)
                unread = self._retention.trim(db, topic, sum(map(weight_bytes, records)), now_ms)
                positions = self._insert(db, topic, records, now_ms)
            self._retention.report(unread)
            truncate_wal(db, self._path, WAIT_MAX_S)
        return positions

    def _insert(self, db: sqlite3.Connection, topic: str, records: Sequence[NewRecord], now_ms: int) -> list[Position]:
        ids = self._ids_of(topic)
        query = "SELECT next FROM partitions WHERE topic = ? ORDER BY partition"
        ends = [end for (end,) in db.execute(query, (topic,))]
        added_bytes = [0] * len(ids)
        rows: list[tuple[int, int, int, int, bytes | None, bytes | None, bytes | None]] = []
        positions: list[Position] = []
        for record in records:
            index = next(self._turn) % len(ids) if record.key is None else partition_of(record.key, len(ids))
            offset, weight = ends[index], weight_bytes(record)
            ends[index] += 1
            added_bytes[index] += weight
            stamp_ms = now_ms if record.timestamp_ms is None else record.timestamp_ms
            stored = (record.key, record.value, encode_headers(record.headers))
            rows.append((ids[index] << OFFSET_BITS | offset, stamp_ms, now_ms, weight, *stored))
            positions.append(Position(topic, index, offset))
        db.executemany("INSERT INTO records VALUES (?, ?, ?, ?, ?, ?, ?)", rows)
        update = "UPDATE partitions SET next = ?, bytes = bytes + ? WHERE id = ?"
        db.executemany(update, [row for row in zip(ends, added_bytes, ids, strict=True) if row[1]])
        return positions

    def writer(self, group: str, instance: int) -> EmbeddedWriter:
        """See `Log.writer`. The epoch in the database fences earlier writers."""
        with self._query("open a writer") as db:
            return EmbeddedWriter(self, group, instance, take_epoch(db, group, instance, _deadline(BUSY_TIMEOUT_S)))

    def committed(self, group: str) -> Offsets:
        """The offsets that writers of a group committed."""
        with self._query("look up offsets of a group") as db:
            rows = db.execute("SELECT topic, partition, next FROM positions WHERE writers = ?", (group,))
            return {TopicPartition(topic, partition): offset for topic, partition, offset in rows}

    def write(
        self, fence: WriterFence, topic: str, records: Sequence[NewRecord], next_offsets: Offsets, timeout_s: float
    ) -> None:
        """See `Writer.write`."""
        deadline = _deadline(timeout_s)
        for record in records:
            check_record(topic, record, weight_bytes(record), self._max_record_bytes)
        self._ids_of(topic)
        with self._writer.alone(timeout_s) as db:
            self._write(db, topic, records, deadline, lambda: move_offsets(db, fence, next_offsets))

    # -- reading

    def reader(self, next_offsets: Offsets) -> EmbeddedReader:
        """See `Log.reader`."""
        numbers = {partition: self._id_of(partition) for partition in next_offsets}
        return EmbeddedReader(self._path, numbers, next_offsets)

    def read(self, partition: TopicPartition, offset: int, max_records: int, timeout_s: float = 10.0) -> list[Record]:
        """See `Log.read`."""
        number = self._id_of(partition)
        with self._query("read", timeout_s) as db:
            return read_records(db, partition, number, offset, max_records)

    def beginning_offsets(self, topic: str) -> Offsets:
        """See `Log.beginning_offsets`."""
        return self._offsets(topic, "SELECT partition, beginning FROM partitions WHERE topic = ? ORDER BY partition")

    def end_offsets(self, topic: str) -> Offsets:
        """See `Log.end_offsets`."""
        return self._offsets(topic, "SELECT partition, next FROM partitions WHERE topic = ? ORDER BY partition")

    def _offsets(self, topic: str, query: str) -> Offsets:
        self._ids_of(topic)
        with self._query("look up offsets") as db:
            return {TopicPartition(topic, partition): offset for partition, offset in db.execute(query, (topic,))}

    def commit(self, next_offsets: Offsets) -> None:
        """See `Log.commit`."""
        rows = [(offset, self._id_of(partition)) for partition, offset in next_offsets.items()]
        try:
            with self._query("commit") as db, transaction(db, _deadline(BUSY_TIMEOUT_S)):
                db.executemany("UPDATE partitions SET committed = ? WHERE id = ?", rows)
        except LogUnavailableError as error:
            log.warning("offsets_not_committed", error=str(error))

    def close(self) -> None:
        """See `Log.close`. What was acknowledged is on disk already."""
        self._writer.close()
        self._queries.close()
        self._retention.report_rest()


class EmbeddedWriter:
    """`Writer` of an embedded log."""

    def __init__(self, opened: EmbeddedLog, group: str, instance: int, epoch: int) -> None:
        self._log, self._fence = opened, WriterFence(group, instance, epoch)

    def next_offsets(self, partitions: Collection[TopicPartition]) -> Offsets:
        """See `Writer.next_offsets`."""
        found = self._log.committed(self._fence.group)
        return {partition: found[partition] for partition in partitions if partition in found}

    def write(self, topic: str, records: Sequence[NewRecord], next_offsets: Offsets, timeout_s: float = 10.0) -> None:
        """See `Writer.write`."""
        self._log.write(self._fence, topic, records, next_offsets, timeout_s)

    def close(self) -> None:
        """See `Writer.close`. A transaction is open only within `write`."""


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
        wait_s, looked_at = WAIT_FIRST_S, -1
        with translated(self._path, "read"):
            while True:
                version = self._data_version()
                if version != looked_at:
                    looked_at = version
                    if records := self._take(partitions, max_records):
                        return records
                # others may write continuously, so neither the wait nor the deadline may depend on a quiet moment
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    return []
                time.sleep(min(wait_s, left_s))
                wait_s = min(wait_s * 2, WAIT_MAX_S)

    def _data_version(self) -> int:
        """Return a number that changes when another connection commits."""
        return int(self._db.execute("PRAGMA data_version").fetchone()[0])

    def _take(self, partitions: Collection[TopicPartition], max_records: int) -> list[Record]:
        """Take an equal share of each partition, then what is left; start with another partition each time."""
        order = deque(sorted(partitions))
        order.rotate(self._turn)
        self._turn += 1
        records: list[Record] = []
        left_bytes = POLL_BYTES
        read_to = dict(self._next_offsets)
        for share in (math.ceil(max_records / max(1, len(order))), max_records):
            for partition in order:
                wanted = min(share, max_records - len(records))
                if wanted > 0 and left_bytes > 0:
                    number = self._numbers[partition]
                    found = read_records(self._db, partition, number, read_to[partition], wanted, max_bytes=left_bytes)
                    read_to[partition] += len(found)
                    left_bytes -= sum(record.size_bytes for record in found)
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
        raise ConfigError(f"topic {topic}: the log would have more than {MAX_PARTITIONS} partitions")
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
