"""Fakes for tests: a log in memory, a manual clock, an injected crash, a faulty disk.

`MemoryLog` fulfils the contract of `streamlearn.log.base` (the contract suite runs against it). It can inject faults:
the n-th next call of an operation raises, before or after it takes effect.
"""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Literal

from streamlearn.errors import (
    ConfigError,
    LogError,
    LogUnavailableError,
    OffsetOutOfRangeError,
    WriterFencedError,
)
from streamlearn.log.base import MAX_RECORD_BYTES, POLL_BYTES, check_record
from streamlearn.log.partitioner import partition_of
from streamlearn.records import NewRecord, Offsets, Position, Record, TopicPartition
from streamlearn.state.files import Chunk, Files

Operation = Literal[
    "append", "poll", "read", "create_topics", "beginning_offsets", "end_offsets", "commit", "writer", "write"
]


class InjectedCrash(BaseException):
    """Simulates the end of the process. A BaseException, so that no handler catches it."""


class ManualClock:
    """A clock that moves only by `advance`. Call it for the time in seconds."""

    def __init__(self, now_s: float = 1_700_000_000.0) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        """The current time."""
        return self.now_s

    def advance(self, seconds: float) -> None:
        """Move the clock forward."""
        assert seconds >= 0, seconds
        self.now_s += seconds


def lost_acknowledgement() -> LogUnavailableError:
    """Error of an append with unknown outcome, for `MemoryLog.fail("append", …, applied=True)`."""
    return LogUnavailableError("not acknowledged in time; it may be in the log nevertheless")


@dataclass(slots=True)
class _Fault:
    """An injected failure of one operation."""

    error: BaseException
    after: int
    """Calls that succeed before it."""
    times: int
    applied: bool


@dataclass(slots=True)
class _Partition:
    beginning: int = 0
    records: list[Record] = field(default_factory=list)

    @property
    def end(self) -> int:
        return self.beginning + len(self.records)


class _Shared:
    """State shared by a log and its readers, protected by `changed`."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.topics: dict[str, list[_Partition]] = {}
        self.faults: dict[str, list[_Fault]] = {}
        self.epochs: dict[tuple[str, int], int] = {}
        self.positions: dict[str, Offsets] = {}
        self.closed = False

    def enter(self, operation: Operation) -> _Fault | None:
        """Start an operation: raise a due fault, or return one that is due after the operation."""
        if self.closed:
            msg = "the log is closed"
            raise LogError(msg)
        for fault in self.faults.get(operation, []):
            if fault.after > 0:
                fault.after -= 1
            elif fault.times > 0:
                fault.times -= 1
                if fault.applied:
                    return fault
                raise fault.error
        return None

    def partition(self, partition: TopicPartition) -> _Partition:
        partitions = self.topics.get(partition.topic)
        if partitions is None or not 0 <= partition.partition < len(partitions):
            msg = f"no topic {partition.topic} with a partition {partition.partition}: create it first"
            raise LogError(msg)
        return partitions[partition.partition]

    def slice(self, partition: TopicPartition, offset: int, max_records: int) -> list[Record]:
        held = self.partition(partition)
        if not held.beginning <= offset <= held.end:
            msg = f"{Position(*partition, offset)}: the log holds {held.beginning} to {held.end}"
            raise OffsetOutOfRangeError(msg)
        first = offset - held.beginning
        return held.records[first : first + max_records]


class MemoryLog:
    """`Log` in memory, for threads of one process. Only `poll` of a reader waits."""

    def __init__(self, *, clock: Callable[[], float] = time.time, max_record_bytes: int = MAX_RECORD_BYTES) -> None:
        self.committed: Offsets = {}
        """Committed offsets."""
        self._clock = clock
        self._max_record_bytes = max_record_bytes
        self._shared = _Shared()
        self._turn = count()

    # -- faults

    def fail(
        self, operation: Operation, error: BaseException, *, after: int = 0, times: int = 1, applied: bool = False
    ) -> None:
        """After `after` successful calls of `operation`, raise `error` from the next `times` calls.

        With `applied`, an append or a write takes effect and only its acknowledgement is lost.
        """
        assert not applied or operation in ("append", "write"), operation
        with self._shared.changed:
            self._shared.faults.setdefault(operation, []).append(_Fault(error, after, times, applied))

    def reopen(self) -> MemoryLog:
        """Another handle of the same log. Each is closed by itself."""
        again = MemoryLog(clock=self._clock, max_record_bytes=self._max_record_bytes)
        again.committed, again._turn = self.committed, self._turn
        again._shared.changed, again._shared.topics = self._shared.changed, self._shared.topics
        again._shared.faults = self._shared.faults
        again._shared.epochs, again._shared.positions = self._shared.epochs, self._shared.positions
        return again

    def put(self, record: Record) -> None:
        """Append a record unchecked, as another client may have."""
        with self._shared.changed:
            held = self._shared.partition(record.position.topic_partition)
            assert record.position.offset == held.end, (record.position, held.end)
            held.records.append(record)
            self._shared.changed.notify_all()

    def trim(self, partition: TopicPartition, beginning: int) -> None:
        """Drop all records before `beginning`, as retention does."""
        with self._shared.changed:
            held = self._shared.partition(partition)
            assert held.beginning <= beginning <= held.end, (held.beginning, beginning, held.end)
            del held.records[: beginning - held.beginning]
            held.beginning = beginning

    def records(self, topic: str) -> list[Record]:
        """All records of a topic, partition by partition."""
        with self._shared.changed:
            return [record for held in self._shared.topics[topic] for record in held.records]

    # -- Log

    def create_topics(self, partitions: Mapping[str, int]) -> None:
        """See `Log.create_topics`."""
        with self._shared.changed:
            self._shared.enter("create_topics")
            for topic, wanted in partitions.items():
                assert wanted >= 1, (topic, wanted)
                there = self._shared.topics.get(topic)
                if there is not None and len(there) != wanted:
                    msg = f"topic {topic} has {len(there)} partitions, wanted {wanted}"
                    raise ConfigError(msg)
            for topic, wanted in partitions.items():
                self._shared.topics.setdefault(topic, [_Partition() for _ in range(wanted)])

    def topics(self) -> list[str]:
        """See `Log.topics`."""
        with self._shared.changed:
            return sorted(self._shared.topics)

    def partition_count(self, topic: str) -> int:
        """See `Log.partition_count`."""
        return len(self._shared.topics.get(topic, ()))

    def append(self, topic: str, records: Sequence[NewRecord], timeout_s: float = 10.0) -> list[Position]:
        """See `Log.append`."""
        assert timeout_s >= 0, timeout_s
        with self._shared.changed:
            fault = self._shared.enter("append")
            self._shared.partition(TopicPartition(topic, 0))
            for record in records:
                size_bytes = len(record.key or b"") + len(record.value or b"")
                check_record(topic, record, size_bytes, self._max_record_bytes)
            positions = [self._append(topic, record) for record in records]
            self._shared.changed.notify_all()
            if fault is not None:
                raise fault.error
            return positions

    def _append(self, topic: str, record: NewRecord) -> Position:
        partitions = self._shared.topics[topic]
        turn = next(self._turn) if record.key is None else partition_of(record.key, len(partitions))
        index = turn % len(partitions)
        held = partitions[index]
        position = Position(topic, index, held.end)
        stamp_ms = int(self._clock() * 1000) if record.timestamp_ms is None else record.timestamp_ms
        held.records.append(Record(position, stamp_ms, record.key, record.value, record.headers))
        return position

    def writer(self, group: str, instance: int) -> MemoryWriter:
        """See `Log.writer`."""
        with self._shared.changed:
            self._shared.enter("writer")
            epoch = self._shared.epochs[group, instance] = self._shared.epochs.get((group, instance), 0) + 1
        return MemoryWriter(self, group, instance, epoch)

    def committed_by(self, group: str) -> Offsets:
        """The offsets of a group of writers."""
        with self._shared.changed:
            return dict(self._shared.positions.get(group, {}))

    def write(
        self, who: tuple[str, int], epoch: int, topic: str, records: Sequence[NewRecord], next_offsets: Offsets
    ) -> None:
        """See `Writer.write`."""
        with self._shared.changed:
            fault = self._shared.enter("write")
            if self._shared.epochs[who] != epoch:
                msg = f"{who}: another process writes under the same name"
                raise WriterFencedError(msg)
            self.append(topic, records)
            self._shared.positions.setdefault(who[0], {}).update(next_offsets)
            if fault is not None:
                raise fault.error

    def reader(self, next_offsets: Offsets) -> MemoryReader:
        """See `Log.reader`."""
        with self._shared.changed:
            for partition in next_offsets:
                self._shared.partition(partition)
        return MemoryReader(self._shared, next_offsets)

    def read(self, partition: TopicPartition, offset: int, max_records: int, timeout_s: float = 10.0) -> list[Record]:
        """See `Log.read`."""
        assert timeout_s >= 0, timeout_s
        with self._shared.changed:
            self._shared.enter("read")
            return self._shared.slice(partition, offset, max_records)

    def beginning_offsets(self, topic: str) -> Offsets:
        """See `Log.beginning_offsets`."""
        with self._shared.changed:
            self._shared.enter("beginning_offsets")
            self._shared.partition(TopicPartition(topic, 0))
            return {TopicPartition(topic, i): held.beginning for i, held in enumerate(self._shared.topics[topic])}

    def end_offsets(self, topic: str) -> Offsets:
        """See `Log.end_offsets`."""
        with self._shared.changed:
            self._shared.enter("end_offsets")
            self._shared.partition(TopicPartition(topic, 0))
            return {TopicPartition(topic, i): held.end for i, held in enumerate(self._shared.topics[topic])}

    def commit(self, next_offsets: Offsets) -> None:
        """See `Log.commit`."""
        with self._shared.changed:
            self._shared.enter("commit")
            self.committed.update(next_offsets)

    def close(self) -> None:
        """See `Log.close`."""
        with self._shared.changed:
            self._shared.closed = True
            self._shared.changed.notify_all()


class MemoryWriter:
    """`Writer` of a `MemoryLog`."""

    def __init__(self, opened: MemoryLog, group: str, instance: int, epoch: int) -> None:
        self._log, self._who, self._epoch = opened, (group, instance), epoch

    def next_offsets(self, partitions: Collection[TopicPartition]) -> Offsets:
        """See `Writer.next_offsets`."""
        found = self._log.committed_by(self._who[0])
        return {partition: found[partition] for partition in partitions if partition in found}

    def write(self, topic: str, records: Sequence[NewRecord], next_offsets: Offsets, timeout_s: float = 10.0) -> None:
        """See `Writer.write`."""
        assert timeout_s >= 0, timeout_s
        self._log.write(self._who, self._epoch, topic, records, next_offsets)

    def close(self) -> None:
        """See `Writer.close`."""


class MemoryReader:
    """`Reader` of a `MemoryLog`."""

    def __init__(self, shared: _Shared, next_offsets: Offsets) -> None:
        self._shared = shared
        self._next_offsets = dict(next_offsets)
        self._turn = 0
        self._closed = False

    def poll(self, partitions: Collection[TopicPartition], max_records: int, timeout_s: float) -> list[Record]:
        """See `Reader.poll`."""
        deadline = time.monotonic() + timeout_s
        with self._shared.changed:
            self._shared.enter("poll")
            while not self._closed and not self._shared.closed:
                records = self._take(partitions, max_records)
                left_s = deadline - time.monotonic()
                if records or left_s <= 0:
                    return records
                self._shared.changed.wait(left_s)
        msg = "the log is closed"
        raise LogError(msg)

    def _take(self, partitions: Collection[TopicPartition], max_records: int) -> list[Record]:
        order = sorted(partitions)
        self._turn += 1
        order = order[self._turn % len(order) :] + order[: self._turn % len(order)] if order else order
        taken: list[Record] = []
        left_bytes = POLL_BYTES
        for partition in order:
            for record in self._shared.slice(partition, self._next_offsets[partition], max_records - len(taken)):
                if left_bytes <= 0:
                    break
                left_bytes -= len(record.key or b"") + len(record.value or b"")
                self._next_offsets[partition] += 1
                taken.append(record)
        return taken

    def seek(self, partition: TopicPartition, offset: int) -> None:
        """See `Reader.seek`."""
        assert partition in self._next_offsets, partition
        self._next_offsets[partition] = offset

    def next_offsets(self) -> Offsets:
        """See `Reader.next_offsets`."""
        return dict(self._next_offsets)

    def end_offsets(self) -> Offsets:
        """See `Reader.end_offsets`."""
        with self._shared.changed:
            return {partition: self._shared.partition(partition).end for partition in self._next_offsets}

    def close(self) -> None:
        """See `Reader.close`."""
        self._closed = True


class FaultyFiles(Files):
    """A disk whose n-th operation fails, once or from then on. A missing sync changes the count."""

    def __init__(self, *, fail_at: int, lasting: bool = False) -> None:
        self._left, self._lasting = fail_at, lasting

    def _count(self, operation: str) -> None:
        self._left -= 1
        if self._left == 0 or (self._lasting and self._left < 0):
            msg = f"injected fault in {operation}"
            raise OSError(errno.ENOSPC, msg)

    def write(self, path: Path, chunks: Iterable[Chunk]) -> None:
        """A fault leaves half of the bytes on disk."""
        whole = b"".join(bytes(chunk) for chunk in chunks)
        try:
            self._count("write")
        except OSError:
            path.write_bytes(whole[: len(whole) // 2])
            raise
        super().write(path, [whole])

    def append(self, descriptor: int, line: bytes) -> int:
        """A fault leaves half of the line on disk."""
        try:
            self._count("append")
        except OSError:
            super().append(descriptor, line[: len(line) // 2])
            raise
        return super().append(descriptor, line)

    def sync_data(self, descriptor: int) -> None:
        """See `Files`; counted."""
        self._count("sync_data")
        super().sync_data(descriptor)

    def sync(self, descriptor: int) -> None:
        """See `Files`; counted."""
        self._count("sync")
        super().sync(descriptor)

    def replace(self, source: Path, target: Path) -> None:
        """See `Files`; counted."""
        self._count("replace")
        super().replace(source, target)

    def sync_folder(self, folder: Path) -> None:
        """See `Files`; counted."""
        self._count("sync_folder")
        super().sync_folder(folder)
