"""Takes the embedded log past what a dead learner had learned, as retention does, and remembers what was taken.

What a learner that comes back has lost is then known exactly: each record from its checkpoint's offset to where the log
begins now. `verify` demands that it lost those, counted them, and nothing else.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field

from streamlearn.app.log import APPEND_BYTES, open_log
from streamlearn.config import Config
from streamlearn.log.base import Log
from streamlearn.log.embedded import EmbeddedLog
from streamlearn.records import NewRecord, Offsets, Position, Record, TopicPartition
from streamlearn.state.paths import StatePaths

_PAGE_RECORDS = 2000
_MAX_AGE_S = 1.0
_MOST_PASSES = 100
_TOPIC = "retention"
"""Appends trim, so something must be appended."""


@dataclass
class Trimmed:
    """What retention took from the log."""

    records: defaultdict[TopicPartition, list[Record]] = field(default_factory=lambda: defaultdict(list))
    """By partition, from offset 0 on without a hole; some of the last ones may be in the log still."""
    beginnings: Offsets = field(default_factory=dict)
    """Where the log begins now, of partitions that lost something."""
    lost: set[Position] = field(default_factory=set)
    """Records that no learner has learned, nor will."""


def records_of(log: Log, partition: TopicPartition, offset: int, end: int) -> Iterator[Record]:
    """What the log holds from `offset` to `end`."""
    while offset < end:
        page = log.read(partition, offset, _PAGE_RECORDS)
        yield from page
        offset = page[-1].position.offset + 1


def trim(config: Config, learned: Mapping[TopicPartition, int], trimmed: Trimmed) -> bool:
    """Have retention take all that is in the log by now; `learned` is where the dead learner's checkpoint reads on.

    False, and nothing was taken, where no record is there that it had not learned.
    """
    now_s = time.time()
    with closing(open_log(config)) as log:
        ends = {
            partition: end
            for topic in (config.log.topics.samples, config.log.topics.labels)
            for partition, end in log.end_offsets(topic).items()
        }
        if all(end <= learned[partition] for partition, end in ends.items()):
            return False
        for partition, end in ends.items():
            known = trimmed.records[partition]
            known += records_of(log, partition, len(known), end)
    beginnings = _take(config, now_s, ends)
    for partition, beginning in beginnings.items():
        lost = trimmed.records[partition][learned[partition] : beginning]
        trimmed.lost.update(record.position for record in lost)
        trimmed.beginnings[partition] = beginning
    return True


def _take(config: Config, before_s: float, ends: Offsets) -> Offsets:
    """Retention by age takes what was appended before that time, a part at a time; where the log begins then.

    It takes read records only, so these are committed as read. The next learner commits its own offsets at its start.
    """
    beginnings: Offsets = {}
    for _ in range(_MOST_PASSES):
        log = EmbeddedLog(
            StatePaths(config.state.dir).log,
            max_age_s=_MAX_AGE_S,
            max_bytes=config.log.embedded_max_bytes,
            max_record_bytes=APPEND_BYTES,
            clock=lambda: before_s + _MAX_AGE_S,
        )
        with closing(log):
            log.create_topics({_TOPIC: 1})
            log.commit(ends)
            before = dict(beginnings)
            for topic in {partition.topic for partition in ends}:
                log.partition_count(topic)  # only topics that were asked for are trimmed
            log.append(_TOPIC, [NewRecord(b"now", b"")])
            for topic in {partition.topic for partition in ends}:
                beginnings |= log.beginning_offsets(topic)
        if beginnings == before:
            return beginnings
    msg = f"retention did not end in {_MOST_PASSES} passes: {beginnings}"
    raise AssertionError(msg)
