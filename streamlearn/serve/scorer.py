"""Predictions as a stream: read samples, answer with the published teacher, write the answers; each exactly once.

Answers and the offsets of their samples are one transaction of the log. After any failure of it the scorer opens
another writer, which undoes what was left open, and continues at the committed offsets.

Each instance has its share of the partitions, by a hash of topic and partition. A record that cannot be decoded is
skipped and counted: the learner writes its dead letter. While the schema registry is away, or no teacher is published
yet, samples wait in the log.
"""

from __future__ import annotations

import contextlib
import threading
import time
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import structlog

from streamlearn.errors import LogUnavailableError, RegistryUnavailableError
from streamlearn.log.base import Log, Writer
from streamlearn.log.codec import Codec
from streamlearn.log.feed import Feed
from streamlearn.log.predictions import encode_prediction
from streamlearn.metrics import ScorerMetrics
from streamlearn.models.answer import Thresholds
from streamlearn.records import Gap, Item, NewRecord, Offsets, Prediction, Sample, Skipped, TopicPartition
from streamlearn.schema.registry import until_available
from streamlearn.serve.predictor import LoadedModel, Predictor

GROUP = "score"
"""Of the offsets: on Kafka the group is log.kafka.group_id, "-" and this name."""
EVERY_S = 0.05
"""Shortest time between two writes. A transaction costs several round trips, so records gather meanwhile."""
_ROWS = 512
"""Records of one write."""
WRITE_BYTES = 16 << 20
"""Bound of the inputs of one write, and of its probabilities."""
_PROBABILITY_BYTES = 16
"""Of one as JSON, at most."""
FORWARD_ROWS = 256
_WAIT_S = 0.02
_RETRY_S = (0.2, 5.0)
"""First and longest wait before another writer is opened."""
_log = structlog.get_logger(__name__)


def share_of(partitions: Sequence[TopicPartition], instance: int, of: int) -> list[TopicPartition]:
    """The partitions of one instance. A partition keeps its instance when others are added."""
    return [tp for tp in partitions if (zlib.crc32(tp.topic.encode()) + tp.partition) % of == instance]


class Scorer:
    """One instance. `run` belongs to one thread; `status` may be called by another."""

    def __init__(
        self,
        log: Log,
        codec: Codec,
        predictor: Predictor,
        metrics: ScorerMetrics,
        *,
        topic: str,
        thresholds: Thresholds,
        instance: int = 0,
        of: int = 1,
        start: Literal["earliest", "latest"] = "earliest",
        on_trimmed: Literal["stop", "skip"] = "stop",
        prepare: Callable[[], None] = lambda: None,
        register: Callable[[], int] | None = None,
        every_s: float = EVERY_S,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`prepare` creates the topics; it is called when the log is opened, and again after each failure.

        `register` returns the id of the Avro schema of answers; None: they are JSON. `start` is where partitions begin
        that no scorer has read before.
        """
        assert 0 <= instance < of, (instance, of)
        self._opened, self._codec, self._predictor, self._metrics = log, codec, predictor, metrics
        self._topic, self._sample_topics, self._thresholds = topic, codec.source.samples.topics, thresholds
        self._instance, self._of, self._start, self._on_trimmed = instance, of, start, on_trimmed
        self._prepare, self._register, self._every_s, self._clock = prepare, register, every_s, clock
        self._schema_id: int | None = None
        of_answers = max(1, WRITE_BYTES // (_PROBABILITY_BYTES * codec.schema.capacity))
        self._rows = min(codec.schema.rows_within(_ROWS, WRITE_BYTES), of_answers)
        self._turn = 0
        self._retry_s = _RETRY_S[0]
        self._state = "starting"
        self._feed: Feed | None = None
        self._counts: Counter[str] = Counter()
        self._lag_records = 0
        self._written_at_s: float | None = None
        self._age_s: float | None = None

    def status(self) -> dict[str, Any]:
        """What the heartbeat shows. Counts are since the process started."""
        feed, registry = self._feed, self._codec.registry
        away = self._state == "scoring" and feed is not None and not feed.available
        return {
            "state": "log unavailable" if away else self._state,
            "instance": self._instance,
            "of": self._of,
            "model_version": self._predictor.version,
            "lag_records": self._lag_records,
            "written_at_s": self._written_at_s,
            "age_s": self._age_s,
            "records": dict(self._counts),
            "registry_down_since_s": None if registry is None else registry.down_since_s,
        }

    def ended(self, state: str) -> None:
        """Show how it ended."""
        self._state = state

    def run(self, stopping: threading.Event) -> None:
        """Score until `stopping` is set.

        Raises:
            WriterFencedError: another process scores as this instance.
            OffsetOutOfRangeError: records were trimmed unread, and `on_trimmed` is stop.
            LogError: the log refuses an answer permanently.
            ConfigError: the registry refuses the schema of answers.
        """
        while not stopping.is_set():
            try:
                self._prepare()
                if self._register is not None and self._schema_id is None:
                    self._state = "registry unavailable"
                    self._schema_id = until_available(self._register, stopping)
                with self._session() as (writer, feed):
                    self._score(writer, feed, stopping)
            except RegistryUnavailableError:
                assert stopping.is_set(), "it waits for the registry until then"
            except LogUnavailableError as error:
                self._state = "log unavailable"
                _log.warning("log_unavailable", during="score", retry_s=self._retry_s, error=str(error))
                stopping.wait(self._retry_s)
                self._retry_s = min(2 * self._retry_s, _RETRY_S[1])

    @contextlib.contextmanager
    def _session(self) -> Iterator[tuple[Writer, Feed]]:
        """A writer, and a feed from the committed offsets."""
        partitions = [tp for topic in self._sample_topics for tp in sorted(self._opened.beginning_offsets(topic))]
        mine = share_of(partitions, self._instance, self._of)
        if not mine:
            _log.warning("scorer_idle", instance=self._instance, of=self._of, partitions=len(partitions))
        with contextlib.closing(self._opened.writer(GROUP, self._instance)) as writer:
            next_offsets = self._next_offsets(writer, mine)
            feed = Feed(
                self._opened,
                next_offsets,
                self._codec,
                sample_topics=self._sample_topics,
                on_trimmed=self._on_trimmed,
            )
            with contextlib.closing(feed):
                feed.start()
                self._feed = feed
                yield writer, feed

    def _next_offsets(self, writer: Writer, mine: Sequence[TopicPartition]) -> Offsets:
        """Where to continue. The start of a new partition is committed at once, so that a restart skips nothing."""
        found = writer.next_offsets(mine)
        if unread := [tp for tp in mine if tp not in found]:
            ask = self._opened.beginning_offsets if self._start == "earliest" else self._opened.end_offsets
            offsets = {tp: offset for topic in {tp.topic for tp in unread} for tp, offset in ask(topic).items()}
            first = {tp: offsets[tp] for tp in unread}
            writer.write(self._topic, [], first)
            found |= first
        return found

    def _score(self, writer: Writer, feed: Feed, stopping: threading.Event) -> None:
        next_s = 0.0
        while not stopping.is_set():
            feed.wait(_WAIT_S)
            self._export_lag(feed)
            model = self._predictor.model
            if model is None:
                if self._state != "waiting for a teacher":
                    _log.info("scorer_waits", reason="no teacher is published yet")
                self._state = "waiting for a teacher"
                stopping.wait(_WAIT_S)
                continue
            self._state = "scoring"
            if not any(feed.queues.values()):
                continue
            if (wait_s := next_s - time.monotonic()) > 0:
                stopping.wait(wait_s)
            next_s = time.monotonic() + self._every_s
            self._write(writer, self._take(feed.queues), model)

    def _take(self, queues: Mapping[TopicPartition, deque[Item]]) -> list[Item]:
        """The next records of all partitions, within the bound; another partition is first each time."""
        order = deque(queues)
        order.rotate(self._turn)
        self._turn += 1
        taken: list[Item] = []
        for partition in order:
            queue = queues[partition]
            while queue and len(taken) < self._rows:
                taken.append(queue.popleft())
        return taken

    def _write(self, writer: Writer, items: Sequence[Item], model: LoadedModel) -> None:
        """Answer records by one teacher, and write the answers with the offsets after the records."""
        samples = [item for item in items if isinstance(item, Sample)]
        records = self._answered(samples, model)
        next_offsets = {item.position.topic_partition: item.position.offset + 1 for item in items}
        writer.write(self._topic, records, next_offsets)
        now_s = self._clock()
        self._retry_s = _RETRY_S[0]
        self._written_at_s = now_s
        counts = Counter(_outcome(item) for item in items if not isinstance(item, Sample | Gap))
        counts["trimmed"] = sum(item.missing for item in items if isinstance(item, Gap))
        counts["scored"], counts["not_finite"] = len(records), len(samples) - len(records)
        self._counts.update(counts)
        for outcome, count in counts.items():
            self._metrics.count("scored_records_total", count, outcome)
        if samples:
            self._age_s = round(max(0.0, now_s - min(sample.timestamp_s for sample in samples)), 3)
            self._metrics.observe("score_age_seconds", self._age_s)

    def _answered(self, samples: Sequence[Sample], model: LoadedModel) -> list[NewRecord]:
        """The records of all answers that are finite."""
        records: list[NewRecord] = []
        for at in range(0, len(samples), FORWARD_ROWS):
            part = samples[at : at + FORWARD_ROWS]
            probs_BC = model.probabilities(np.stack([sample.x for sample in part]))
            now_s = self._clock()
            finite_B = np.isfinite(probs_BC.sum(axis=1)).tolist()
            winner_B = self._thresholds.choose(probs_BC).tolist()
            for sample, probs_C, winner, finite in zip(part, probs_BC, winner_B, finite_B, strict=True):
                if finite:
                    prediction = Prediction(winner, probs_C, model.step)
                    records.append(
                        encode_prediction(sample, prediction, model.classes, now_s, schema_id=self._schema_id)
                    )
        return records

    def _export_lag(self, feed: Feed) -> None:
        lag = feed.lag()
        self._lag_records = sum(lag.values())
        for partition, records in lag.items():
            self._metrics.set("scorer_lag_records", records, partition.topic, str(partition.partition))


def _outcome(item: Item) -> str:
    return "tombstone" if isinstance(item, Skipped) else "undecodable"
