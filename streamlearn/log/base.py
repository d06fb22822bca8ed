"""The log interface, in Kafka's vocabulary. `kafka` and `embedded` implement it; one contract suite tests both.

A topic has partitions. A partition is a sequence of records at increasing offsets, from `beginning` to `end`.
`next_offset` is the offset to read next; it is what is saved, committed and compared.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

from streamlearn.errors import LogError
from streamlearn.records import NewRecord, Offsets, Position, Record, TopicPartition

POLL_BYTES = 16 << 20
"""A poll ends with the record whose key and value bring it to this size, so it returns at least one."""
MAX_RECORD_BYTES = 64 << 20
"""Limit of an append. It is above `log.max_record_bytes`, so that a record too large to decode can be dead-lettered."""


class Reader(Protocol):
    """Reads some partitions forward from given offsets. Used by one thread. It never commits and joins no group."""

    def poll(self, partitions: Collection[TopicPartition], max_records: int, timeout_s: float) -> list[Record]:
        """Return records of these partitions, in offset order within each; empty after `timeout_s` without any.

        At most `max_records`, and about `POLL_BYTES`. The other partitions of the reader keep their next offset.

        Raises:
            OffsetOutOfRangeError: the next offset of a partition was trimmed, or never written.
            LogUnavailableError: the log is away; repeat the call.
        """
        ...

    def seek(self, partition: TopicPartition, offset: int) -> None:
        """Read `offset` of this partition next."""
        ...

    def next_offsets(self) -> Offsets:
        """Return the offset that each partition reads next: one past the last record that `poll` returned."""
        ...

    def end_offsets(self) -> Offsets:
        """Return the end of each partition as last seen. It may be older than `Log.end_offsets`, and is cheaper."""
        ...

    def close(self) -> None:
        """Release connections and threads. May be called twice."""
        ...


class Appends(Protocol):
    """The writing side of a log. Any thread may call it."""

    def append(self, topic: str, records: Sequence[NewRecord], timeout_s: float = 10.0) -> list[Position]:
        """Append, and return each record's position once all are durable (Kafka: acks=all; embedded: fsync).

        Records with equal keys go to one partition, in order. It costs a sync or a round trip, so append in batches.
        An empty append checks that the topic exists and that this client may append to it.

        Raises:
            LogUnavailableError: not acknowledged in time; some records may be in the log.
            LogError: refused permanently (too large, no such topic).
        """
        ...


class Writer(Protocol):
    """Appends to a topic, and moves its group's offsets, in one transaction: read, process, write exactly once.

    Readers of the log see all records of a transaction or none. Used by one thread. After any error of `write` the
    outcome is unknown: close this writer, open another, and continue from its `next_offsets`.
    """

    def next_offsets(self, partitions: Collection[TopicPartition]) -> Offsets:
        """Return the offsets that writers of the group committed; a partition without any is missing."""
        ...

    def write(self, topic: str, records: Sequence[NewRecord], next_offsets: Offsets, timeout_s: float = 10.0) -> None:
        """Append records, and commit these offsets, durably; or neither. Records with equal keys go to one partition.

        Raises:
            LogUnavailableError: not acknowledged in time.
            WriterFencedError: a writer of the same group and instance was opened since.
            LogError: refused permanently.
        """
        ...

    def close(self) -> None:
        """Release connections and threads. May be called twice."""
        ...


class Log(Appends, Protocol):
    """A durable, partitioned, append-only log. Any thread may call it.

    Opening it connects to nothing. The first call connects, and each call tries again while the log is away; it then
    raises LogUnavailableError.
    """

    def create_topics(self, partitions: Mapping[str, int]) -> None:
        """Create the missing topics, each with its number of partitions.

        Raises:
            ConfigError: a topic exists with another number of partitions.
        """
        ...

    def partition_count(self, topic: str) -> int:
        """Return the number of partitions of a topic; 0 if it does not exist."""
        ...

    def topics(self) -> list[str]:
        """Return the names of all topics, sorted; without a broker's own, which begin with two underscores."""
        ...

    def reader(self, next_offsets: Offsets) -> Reader:
        """Return a reader of these partitions, starting at these offsets."""
        ...

    def writer(self, group: str, instance: int) -> Writer:
        """Return a writer. Earlier ones of the same group and instance are fenced, and what they left open is undone.

        Writers of one group share their offsets, so two of them must not process the same partition.

        Raises:
            LogUnavailableError: the log is away.
        """
        ...

    def read(self, partition: TopicPartition, offset: int, max_records: int, timeout_s: float = 10.0) -> list[Record]:
        """Return up to `max_records` records from `offset` on; empty at the end of the partition.

        Raises:
            OffsetOutOfRangeError: as in `Reader.poll`.
            LogUnavailableError: no answer in time.
        """
        ...

    def beginning_offsets(self, topic: str) -> Offsets:
        """Return the oldest offset that each partition still holds."""
        ...

    def end_offsets(self, topic: str) -> Offsets:
        """Return the offset that the next record of each partition gets."""
        ...

    def commit(self, next_offsets: Offsets) -> None:
        """Record that everything before these offsets is read and saved. A failure is logged, not raised.

        Lag dashboards show it, and the embedded log removes records below it first. The learner never reads it back.
        """
        ...

    def close(self) -> None:
        """Release connections, files and threads. May be called twice. Later calls raise LogError."""
        ...


def check_record(topic: str, record: NewRecord, size_bytes: int, max_bytes: int) -> None:
    """Check what every log refuses.

    Raises:
        LogError: the record has neither key nor value, or is too large.
    """
    if record.key is None and record.value is None:
        raise LogError(f"{topic}: a record needs a key or a value")
    if size_bytes > max_bytes:
        raise LogError(f"{topic}: a record of {size_bytes} bytes exceeds the limit of {max_bytes}")


def check_partition(partition: TopicPartition, partitions: int) -> None:
    """Check that a topic with this number of partitions has this one.

    Raises:
        LogError: it has not.
    """
    if not 0 <= partition.partition < partitions:
        raise LogError(f"{partition.topic} has no partition {partition.partition}, only {partitions}")
