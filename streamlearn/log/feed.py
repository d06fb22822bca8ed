"""Reads and decodes ahead of the learner, in a thread of its own, into bounded queues, one for each partition.

The loop never waits for the log, and the log's client is never kept waiting by a step: a full queue only stops asking
for that partition. The thread is the one user of its reader. What stops it is raised in the learner's thread.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Literal

import structlog

from streamlearn.errors import LogUnavailableError, OffsetOutOfRangeError, RecordError
from streamlearn.log.base import POLL_BYTES, Log, Reader
from streamlearn.records import BadRecord, Gap, Item, Label, Offsets, Position, Record, Sample, Schema, TopicPartition

_log = structlog.get_logger(__name__)
PREFETCH_RECORDS = 2048
"""Decoded records waiting, for each partition."""
PREFETCH_BYTES = 256 << 20
"""Bound of the samples in all queues together. Each partition has an equal share, and room for one sample at least."""
_POLL_RECORDS = 512
_POLL_S = 0.2
_BAD_BYTES = 64 << 20
"""The same of records that are no sample and no label: they are kept as they were, however large."""
_JOIN_S = 30.0
_RETRY_S = (0.1, 5.0)
"""First and longest wait between tries while the log is away."""


class Feed:
    """Queues of decoded records. One thread fills, one thread takes (deques make that safe without a lock)."""

    def __init__(
        self,
        log: Log,
        next_offsets: Offsets,
        *,
        schema: Schema,
        sample_topic: str,
        decode_sample: Callable[[Record], Sample],
        decode_label: Callable[[Record], Label],
        max_records: int = PREFETCH_RECORDS,
        on_trimmed: Literal["stop", "skip"],
    ) -> None:
        self.queues: dict[TopicPartition, deque[Item]] = {tp: deque() for tp in sorted(next_offsets)}
        self.available = True
        self._log_, self._reader = log, log.reader(next_offsets)
        self._decode_sample, self._decode_label, self._sample_topic = decode_sample, decode_label, sample_topic
        self._on_trimmed = on_trimmed
        self._poll_records = schema.rows_within(_POLL_RECORDS, POLL_BYTES)
        shares = max(1, sum(tp.topic == sample_topic for tp in self.queues))
        max_samples = schema.rows_within(max_records, PREFETCH_BYTES // shares)
        self._max_records = {tp: max_samples if tp.topic == sample_topic else max_records for tp in self.queues}
        self._max_bad_bytes = _BAD_BYTES // max(1, len(self.queues))
        self._read_to: Offsets = dict(next_offsets)
        self._ends: Offsets = dict.fromkeys(next_offsets, -1)
        self._wanted: set[TopicPartition] = set(next_offsets)
        self._bad_bytes: dict[TopicPartition, int] = dict.fromkeys(next_offsets, 0)
        """Of bad records that came since the queue was empty."""
        self._changed = threading.Event()
        self._stopping = threading.Event()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._work, name="feed", daemon=True)

    def start(self) -> None:
        """Begin to read."""
        self._thread.start()

    def behind(self, partition: TopicPartition) -> bool:
        """The log holds more of this partition than was read so far, or nobody knows yet."""
        return self._ends[partition] < 0 or self._read_to[partition] < self._ends[partition]

    def wait(self, timeout_s: float) -> None:
        """Wait until more was read, at most so long.

        Raises:
            Exception: what stopped the reading.
        """
        self._changed.wait(timeout_s)
        self._changed.clear()
        if self._error is not None:
            raise self._error

    def lag(self) -> Offsets:
        """Records of each partition that are in the log and not yet in a step."""
        return {
            tp: max(0, self._ends[tp] - (queue[0].position.offset if queue else self._read_to[tp]))
            for tp, queue in self.queues.items()
        }

    def waiting(self, topic: str) -> int:
        """Records of a topic that were read and are in no batch yet."""
        return sum(len(queue) for tp, queue in self.queues.items() if tp.topic == topic)

    def close(self) -> None:
        """Stop reading."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(_JOIN_S)
            if self._thread.is_alive():  # it ends with the process; to wait for it would end that by SIGKILL
                _log.error("feed_does_not_end", after_s=_JOIN_S)
                return
        self._reader.close()

    def _work(self) -> None:
        retry_s = _RETRY_S[0]
        while not self._stopping.is_set():
            try:
                self._read_some(self._reader)
                retry_s, self.available = _RETRY_S[0], True
            except LogUnavailableError as error:
                if self.available:
                    _log.warning("log_unavailable", error=str(error))
                self.available = False
                self._stopping.wait(retry_s)
                retry_s = min(2 * retry_s, _RETRY_S[1])
            except Exception as error:  # a bug too: a learner whose feed is dead would wait for ever
                self._error = error
                self._changed.set()
                return

    def _read_some(self, reader: Reader) -> None:
        self._choose()
        if not self._wanted:
            self._stopping.wait(0.002)
            return
        try:
            records = reader.poll(self._wanted, self._poll_records, _POLL_S)
        except OffsetOutOfRangeError as error:
            self._skip_gap(reader, error)
            return
        for record in records:
            tp, item = record.position.topic_partition, self._decode(record)
            if isinstance(item, BadRecord):
                self._bad_bytes[tp] += len(record.key or b"") + len(record.value or b"")
            self.queues[tp].append(item)
        self._read_to.update(reader.next_offsets())
        self._ends.update(reader.end_offsets())
        self._changed.set()

    def _choose(self) -> None:
        """Stop asking for a partition whose queue is full; ask again once it is half empty, since a change costs."""
        for tp, queue in self.queues.items():
            if not queue:
                self._bad_bytes[tp] = 0
            if len(queue) >= self._max_records[tp] or self._bad_bytes[tp] >= self._max_bad_bytes:
                self._wanted.discard(tp)
            elif 2 * len(queue) <= self._max_records[tp]:
                self._wanted.add(tp)

    def _decode(self, record: Record) -> Item:
        try:
            if record.position.topic == self._sample_topic:
                return self._decode_sample(record)
            return self._decode_label(record)
        except RecordError as error:
            return BadRecord(record, error)

    def _skip_gap(self, reader: Reader, error: OffsetOutOfRangeError) -> None:
        """Follow `log.on_trimmed`: stop, or go on at the oldest record there is, and count what is missing."""
        if self._on_trimmed == "stop":
            way_out = 'raise retention, restore an older log, or accept the loss with log.on_trimmed = "skip"'
            msg = f"{error}; {way_out}"
            raise OffsetOutOfRangeError(msg) from error
        skipped = False
        for topic in {tp.topic for tp in self.queues}:
            for tp, beginning in self._log_.beginning_offsets(topic).items():
                position = reader.next_offsets().get(tp)
                if position is not None and position < beginning:
                    _log.error("records_trimmed", topic=topic, partition=tp.partition, begin=position, end=beginning)
                    self.queues[tp].append(Gap(Position(*tp, beginning - 1), missing=beginning - position))
                    reader.seek(tp, beginning)
                    skipped = True
        if not skipped:
            raise error
