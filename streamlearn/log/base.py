"""What a log is, in Kafka's own vocabulary. `kafka` and `embedded` obey it; one contract suite holds both to it.

A topic has partitions, a partition is a sequence of records at offsets that grow by one from `beginning` to `end`.
`next_offset` is the offset to read next: it is what is saved, committed and compared.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

from streamlearn.records import NewRecord, Offsets, Position, Record, TopicPartition

POLL_BYTES = 16 << 20
"""A poll ends with the record by which its keys and values reach this size, so it always returns one where there is
one."""


class Reader(Protocol):
    """Reads some partitions forward from given offsets. Used by one thread. It never commits and joins no group."""

    def poll(self, wanted: Collection[TopicPartition], max_records: int, timeout_s: float) -> list[Record]:
        """Records of the wanted partitions, in offset order within each; empty after `timeout_s` without any.

        At most `max_records`, and about `POLL_BYTES`. Partitions that are not wanted now keep their place.

        Raises:
            OffsetOutOfRangeError: the next offset of a partition was trimmed (or never written).
            LogUnavailableError: the log is away; the same call may be made again.
        """
        ...

    def seek(self, partition: TopicPartition, offset: int) -> None:
        """Read `offset` next."""
        ...

    def next_offsets(self) -> Offsets:
        """The offset that each partition reads next."""
        ...

    def end_offsets(self) -> Offsets:
        """Each partition's end as last seen, without asking the log anew where a poll has just told it."""
        ...

    def close(self) -> None:
        """Let go of connections and threads."""
        ...


class Appends(Protocol):
    """What takes records; any thread may call it."""

    def append(self, topic: str, records: Sequence[NewRecord], timeout_s: float = 10.0) -> list[Position]:
        """Append, and return each record's position once all are durable (Kafka: acks=all; embedded: fsync).

        Records with equal keys land in one partition, in order.

        Raises:
            LogUnavailableError: not acknowledged in time; some may be in the log all the same.
            LogError: refused for good (too large, no such topic).
        """
        ...


class Log(Appends, Protocol):
    """A durable, partitioned, append-only log. `append` and `read` may be called by any thread."""

    def create_topics(self, partitions: Mapping[str, int]) -> None:
        """Create the topics that are missing, with so many partitions.

        Raises:
            ConfigError: a topic exists with another number of partitions.
        """
        ...

    def partition_count(self, topic: str) -> int:
        """How many partitions a topic has; 0 where there is no such topic."""
        ...

    def reader(self, next_offsets: Offsets) -> Reader:
        """A reader of these partitions, from these offsets."""
        ...

    def read(self, partition: TopicPartition, offset: int, max_records: int, timeout_s: float = 10.0) -> list[Record]:
        """Up to `max_records` records from `offset` on, by position; empty at the end.

        Raises:
            OffsetOutOfRangeError: as in `Reader.poll`.
            LogUnavailableError: not answered in time.
        """
        ...

    def beginning_offsets(self, topic: str) -> Offsets:
        """The oldest offset still there, for each partition."""
        ...

    def end_offsets(self, topic: str) -> Offsets:
        """The offset that the next record will get, for each partition."""
        ...

    def commit(self, next_offsets: Offsets) -> None:
        """Record that the learner has read, and saved, everything before these offsets.

        Lag dashboards show it, and the embedded log trims what is before it first. The learner never reads it back.
        """
        ...

    def close(self) -> None:
        """Flush what was acknowledged and let go of connections, files and threads. May be called twice."""
        ...
