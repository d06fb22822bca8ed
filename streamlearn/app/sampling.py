"""Some records of a topic, for `streamlearn init` and `streamlearn check --sample`: the oldest and the newest.

All partitions have a share. Records, bytes and time are bounded, so that a topic of any size can be looked at.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from streamlearn.app.log import MOST_SIMILAR, similar_topics
from streamlearn.errors import ConfigError, OffsetOutOfRangeError
from streamlearn.log.base import Log
from streamlearn.records import Offsets, Record, TopicPartition

MAX_BYTES: Final = 64 << 20
"""Of keys and values, about: each range of a partition has an equal share, and is read some records at a time."""
MAX_S: Final = 20.0
_READ_RECORDS = 200
"""Records of one read: the bounds are checked between reads."""


@dataclass(frozen=True)
class TopicSample:
    """Some records of some topics."""

    topics: tuple[str, ...]
    records: tuple[Record, ...]
    """The oldest ones of each partition, then the newest."""
    held: int
    """Offsets that the topics hold in all: about the number of records."""
    partitions: int

    @property
    def is_whole(self) -> bool:
        """Whether it is all that the topics hold."""
        return len(self.records) >= self.held

    @property
    def span_s(self) -> tuple[float, float] | None:
        """The log's times of the oldest and the newest record, in seconds since 1970; None without records."""
        times = [record.timestamp_ms / 1000.0 for record in self.records]
        return (min(times), max(times)) if times else None

    @property
    def rate(self) -> float | None:
        """Records per second, from all that the topics hold and its span; None if it has no span."""
        span = self.span_s
        return self.held / (span[1] - span[0]) if span is not None and span[1] > span[0] else None


def read_some(log: Log, topics: Sequence[str], count: int) -> TopicSample:
    """Read about `count` records: of each partition the oldest and the newest ones.

    Raises:
        ConfigError: a topic does not exist.
        LogUnavailableError: the log is away.
    """
    assert count > 0
    begins, ends = _bounds(log, topics)
    held = {partition: ends[partition] - begins[partition] for partition in ends}
    old: Offsets = {}
    new: Offsets = {}
    for partition, share in _shares(held, count).items():
        begin, end = begins[partition], ends[partition]
        old[partition] = begin + (share if share == held[partition] else share // 2)
        new[partition] = max(old[partition], end - (share - share // 2))
    ranges = [(partition, begins[partition], end) for partition, end in old.items()]
    ranges += [(partition, begin, ends[partition]) for partition, begin in new.items()]
    ranges = [(partition, begin, end) for partition, begin, end in ranges if begin < end]
    deadline_s, bytes_each = time.monotonic() + MAX_S, MAX_BYTES // max(1, len(ranges))
    records: list[Record] = []
    for partition, begin, end in ranges:
        if time.monotonic() > deadline_s:
            break
        records += _read_range(log, partition, begin, end, bytes_each)
    return TopicSample(tuple(topics), tuple(records), sum(held.values()), len(held))


def _shares(held: Offsets, count: int) -> Offsets:
    """How many records to read of each partition, `count` in all.

    Equally many; what small partitions do not have goes to the others.
    """
    shares: Offsets = {}
    for done, partition in enumerate(sorted(held, key=lambda each: (held[each], each))):
        left = count - sum(shares.values())
        shares[partition] = min(held[partition], -(-left // (len(held) - done)))
    return dict(sorted(shares.items()))


def _bounds(log: Log, topics: Sequence[str]) -> tuple[Offsets, Offsets]:
    """The beginning and the end of each partition."""
    begins: Offsets = {}
    ends: Offsets = {}
    for topic in topics:
        if not log.partition_count(topic):
            msg = f"there is no topic {topic!r} in this log: {_instead(log, topic)}"
            raise ConfigError(msg)
        ends |= log.end_offsets(topic)
        begins |= log.beginning_offsets(topic)
    return begins, ends


def _instead(log: Log, wrong: str) -> str:
    """What may have been meant by a topic that does not exist."""
    if near := similar_topics(log, wrong):
        return f"did you mean {' or '.join(repr(name) for name in near)}?"
    topics = log.topics()
    more = f" and {len(topics) - MOST_SIMILAR} more" if len(topics) > MOST_SIMILAR else ""
    return f"it has {', '.join(repr(name) for name in topics[:MOST_SIMILAR])}{more}" if topics else "it has none yet"


def _read_range(log: Log, partition: TopicPartition, begin: int, end: int, max_bytes: int) -> list[Record]:
    """The records of one partition from `begin` to `end`. It ends early at records that were just trimmed."""
    found: list[Record] = []
    size_bytes, at = 0, begin
    while at < end and size_bytes < max_bytes:
        records: list[Record] = []
        with suppress(OffsetOutOfRangeError):
            records = log.read(partition, at, min(_READ_RECORDS, end - at))
        records = [record for record in records if record.position.offset < end]
        if not records:
            break
        found += records
        size_bytes += sum(record.size_bytes for record in records)
        at = records[-1].position.offset + 1
    return found
