"""Trims the embedded log past the checkpoint of a dead learner, as retention does, and keeps a copy of what is trimmed.

So the records that the restarted learner loses are known exactly: from its checkpoint's offset to the new beginning of
the log. `verify` demands that it counts those as trimmed and loses no other.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field

from streamlearn.app.log import open_log
from streamlearn.config import Config
from streamlearn.log.base import Log
from streamlearn.log.embedded import EmbeddedLog
from streamlearn.records import NewRecord, Offsets, Position, Record, TopicPartition
from streamlearn.state.paths import StatePaths

_PAGE_RECORDS = 2000
_MAX_AGE_S = 1.0
_MOST_PASSES = 100
_TOPIC = "retention"
"""Trimming happens on append, so a record is appended here."""


@dataclass
class Trimmed:
    """Records that retention trimmed."""

    records: defaultdict[TopicPartition, list[Record]] = field(default_factory=lambda: defaultdict(list))
    """By partition, from offset 0 without a gap; the last ones may still be in the log."""
    beginnings: Offsets = field(default_factory=dict)
    """The new beginning of each trimmed partition."""
    lost: set[Position] = field(default_factory=set)
    """Records that were trimmed before they were learned."""


def records_of(log: Log, partition: TopicPartition, offset: int, end: int) -> Iterator[Record]:
    """Records of the log from `offset` up to but without `end`."""
    while offset < end:
        page = log.read(partition, offset, _PAGE_RECORDS)
        yield from page
        offset = page[-1].position.offset + 1


def trim(config: Config, learned: Mapping[TopicPartition, int], trimmed: Trimmed) -> bool:
    """Have retention trim all records; `learned` are the next offsets of the dead learner's checkpoint.

    Returns False and trims nothing if the log holds no record that is not learned.
    """
    now_s = time.time()
    with closing(open_log(config)) as log:
        ends = {partition: end for topic in config.source.topics for partition, end in log.end_offsets(topic).items()}
        if all(end <= learned[partition] for partition, end in ends.items()):
            return False
        for partition, end in (ends | log.end_offsets(config.log.dead_letters)).items():
            known = trimmed.records[partition]
            known += records_of(log, partition, len(known), end)
    beginnings = _take(config, now_s, ends)
    for partition, beginning in beginnings.items():
        lost = trimmed.records[partition][learned[partition] : beginning]
        trimmed.lost.update(record.position for record in lost)
        trimmed.beginnings[partition] = beginning
    return True


def _take(config: Config, before_s: float, ends: Offsets) -> Offsets:
    """Have retention by age trim all records appended before `before_s`; return the new beginnings.

    Retention trims committed records only, so their offsets are committed here. It trims in passes. The next learner
    commits its own offsets when it starts.
    """
    beginnings: Offsets = {}
    for _ in range(_MOST_PASSES):
        log = EmbeddedLog(
            StatePaths(config.state.dir).log,
            max_age_s=_MAX_AGE_S,
            max_bytes=config.log.max_bytes,
            clock=lambda: before_s + _MAX_AGE_S,
        )
        with closing(log):
            log.create_topics({_TOPIC: 1})
            log.commit(ends)
            before = dict(beginnings)
            log.append(_TOPIC, [NewRecord(b"now", b"")])
            for topic in {partition.topic for partition in ends}:
                beginnings |= log.beginning_offsets(topic)
        if beginnings == before:
            return beginnings
    msg = f"retention did not finish in {_MOST_PASSES} passes: {beginnings}"
    raise AssertionError(msg)
