"""Prefetch: a thread reads and decodes records into bounded queues, one for each partition.

The loop never waits for the log, and a long step never keeps the log's client waiting: a full queue only removes its
partition from the next poll. Only this thread uses the reader. An error that stops it is raised in the learner's
thread.

The predictions topic is read too, where the codec's source names one and the offsets have its partitions. Nothing that
happens to it stops the learner: unreadable and missing records of it are skipped.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Collection
from typing import Literal

import structlog

from streamlearn.errors import (
    LogUnavailableError,
    OffsetOutOfRangeError,
    RecordError,
    RegistryUnavailableError,
    SkippedError,
)
from streamlearn.log.base import POLL_BYTES, Log
from streamlearn.log.codec import Codec
from streamlearn.log.predictions import decode_prediction
from streamlearn.records import BadRecord, Gap, Item, Offsets, Position, Record, Skipped, TopicPartition
from streamlearn.schema.registry import until_available

_log = structlog.get_logger(__name__)
PREFETCH_RECORDS = 2048
"""Decoded records waiting, for each partition."""
PREFETCH_BYTES = 256 << 20
"""Bound of the samples in all queues, and of the published answers. Each partition has an equal share, and room for
at least one."""
_POLL_RECORDS = 512
_POLL_S = 0.2
_BAD_BYTES = 64 << 20
"""Bound of the bad records in all queues, which keep their original bytes."""
_JOIN_S = 30.0
_RETRY_S = (0.1, 5.0)
"""First and longest wait between retries while the log is away."""


class Feed:
    """Queues of decoded records. One thread fills them, one takes; deques make that safe without a lock."""

    def __init__(
        self,
        log: Log,
        next_offsets: Offsets,
        codec: Codec,
        *,
        sample_topics: Collection[str],
        max_records: int = PREFETCH_RECORDS,
        on_trimmed: Literal["stop", "skip"],
    ) -> None:
        """`max_records` bounds each queue, by up to one poll more; `PREFETCH_BYTES` bounds all samples."""
        self.queues: dict[TopicPartition, deque[Item]] = {tp: deque() for tp in sorted(next_offsets)}
        self.codec = codec
        self.available = True
        """Whether the last read reached the log."""
        self._log, self._reader = log, log.reader(next_offsets)
        self._sample_topics, self._on_trimmed = sample_topics, on_trimmed
        self._predictions_topic = codec.source.predictions.topic
        self._poll_records = codec.schema.rows_within(_POLL_RECORDS, POLL_BYTES)
        shares = max(1, sum(tp.topic in sample_topics for tp in self.queues))
        max_samples = codec.schema.rows_within(max_records, PREFETCH_BYTES // shares)
        max_answers = min(max_records, max(1, PREFETCH_BYTES // max(1, 4 * codec.schema.capacity * len(self.queues))))
        of_topic = dict.fromkeys(sample_topics, max_samples) | {self._predictions_topic: max_answers}
        self._max_records = {tp: of_topic.get(tp.topic, max_records) for tp in self.queues}
        self._max_bad_bytes = _BAD_BYTES // max(1, len(self.queues))
        self._read_to = dict(next_offsets)
        self._ends: Offsets = dict.fromkeys(next_offsets, -1)
        self._first_ends: Offsets = {}
        """The ends that were seen first."""
        self._with_room = set(next_offsets)
        """The partitions to poll."""
        self._bad_bytes: dict[TopicPartition, int] = dict.fromkeys(next_offsets, 0)
        """Of the bad records since the queue was last empty."""
        self._changed = threading.Event()
        self._stopping = threading.Event()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._work, name="feed", daemon=True)

    def start(self) -> None:
        """Start to read."""
        self._thread.start()

    def behind(self, partition: TopicPartition) -> bool:
        """Whether the log holds more of this partition than was read, or its end is not known yet.

        Of the predictions topic only what the log held at the start counts: nobody waits for a scorer.
        """
        ends = self._first_ends if partition.topic == self._predictions_topic else self._ends
        return self._read_to[partition] < ends.get(partition, -1) or self._ends[partition] < 0

    def wait(self, timeout_s: float) -> None:
        """Wait until more was read, at most `timeout_s`.

        Raises:
            Exception: what stopped the reading thread.
        """
        self._changed.wait(timeout_s)
        self._changed.clear()
        if self._error is not None:
            raise self._error

    def lag(self) -> Offsets:
        """Return the number of records of each partition that are in the log and not in a step yet."""
        return {
            tp: max(0, self._ends[tp] - (queue[0].position.offset if queue else self._read_to[tp]))
            for tp, queue in self.queues.items()
        }

    def waiting(self, topic: str) -> int:
        """Return the number of records of a topic that are in the queues."""
        return sum(len(queue) for tp, queue in self.queues.items() if tp.topic == topic)

    def close(self) -> None:
        """Stop reading, also where the schema registry is away."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(_JOIN_S)
        if self._thread.is_alive():  # a daemon thread ends with the process; waiting longer would end in SIGKILL
            _log.error("feed_thread_hangs", after_s=_JOIN_S)
        else:
            self._reader.close()

    def _work(self) -> None:
        retry_s = _RETRY_S[0]
        while not self._stopping.is_set():
            try:
                self._read_some()
                retry_s, self.available = _RETRY_S[0], True
            except LogUnavailableError as error:
                if self.available:
                    _log.warning("log_unavailable", error=str(error))
                self.available = False
                self._stopping.wait(retry_s)
                retry_s = min(2 * retry_s, _RETRY_S[1])
            except RegistryUnavailableError:
                return  # it is closed
            except Exception as error:  # bugs too: without its feed the learner would wait indefinitely
                self._error = error
                self._changed.set()
                return

    def _read_some(self) -> None:
        self._update_room()
        if not self._with_room:
            self._stopping.wait(0.002)
            return
        try:
            records = self._reader.poll(self._with_room, self._poll_records, _POLL_S)
        except OffsetOutOfRangeError as error:
            self._skip_gap(error)
            return
        # The ends come first, so that `lag` counts what waits as soon as there is a record; `_read_to` comes last, so
        # that the queue of a partition that is not behind is complete.
        self._ends = self._reader.end_offsets()
        self._first_ends = self._ends | self._first_ends
        for record in records:
            self.queues[record.position.topic_partition].append(self._decoded(record))
        self._read_to = self._reader.next_offsets()
        self._changed.set()

    def _update_room(self) -> None:
        """Hysteresis: a full queue has room again when it is half empty, since each change of the partitions costs."""
        for tp, queue in self.queues.items():
            if not queue:
                self._bad_bytes[tp] = 0
            if len(queue) >= self._max_records[tp] or self._bad_bytes[tp] >= self._max_bad_bytes:
                self._with_room.discard(tp)
            elif 2 * len(queue) <= self._max_records[tp]:
                self._with_room.add(tp)

    def _decoded(self, record: Record) -> Item:
        """Decode a record. While the schema registry is away this waits: all records stay in order, none is refused."""
        try:
            return self._decode(record)
        except RegistryUnavailableError:
            return until_available(lambda: self._decode(record), self._stopping)

    def _decode(self, record: Record) -> Item:
        try:
            if record.position.topic in self._sample_topics:
                return self.codec.decode_sample(record)
            if record.position.topic == self._predictions_topic:
                return decode_prediction(record, self.codec.schema.capacity, self._sample_topics)
            return self.codec.labels.decode(record)
        except RecordError as error:
            if isinstance(error, SkippedError) or record.position.topic == self._predictions_topic:
                return Skipped(record.position, record.timestamp_ms / 1000.0)
            self._bad_bytes[record.position.topic_partition] += record.size_bytes
            return BadRecord(record, error)

    def _skip_gap(self, error: OffsetOutOfRangeError) -> None:
        """Apply `log.on_trimmed`: stop, or continue at the oldest record and count what is missing.

        The predictions topic is always continued at its oldest record, even where it is another topic of that name.
        """
        skipped = stops = False
        for topic in {tp.topic for tp in self.queues}:
            optional, ends = topic == self._predictions_topic, self._log.end_offsets(topic)
            for tp, beginning in self._log.beginning_offsets(topic).items():
                position = self._reader.next_offsets().get(tp)
                if position is None or not (position < beginning or (optional and position > ends[tp])):
                    continue
                if self._on_trimmed == "stop" and not optional:
                    stops = True
                    continue
                event = "records_trimmed" if position < beginning else "topic_replaced"
                _log.error(event, topic=topic, partition=tp.partition, begin=position, end=beginning)
                if position < beginning:
                    self.queues[tp].append(Gap(Position(*tp, beginning - 1), missing=beginning - position))
                self._reader.seek(tp, beginning)
                skipped = True
        if skipped and not stops:
            return
        if self._on_trimmed == "skip":
            raise error
        way_out = 'raise retention, restore an older log, or accept the loss with log.on_trimmed = "skip"'
        raise OffsetOutOfRangeError(f"{error}; {way_out}") from error
