"""Prefetch: bounded queues, bad records kept whole, and a log that is away or was trimmed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
import pytest
from fake_registry import FakeRegistry
from harness.fakes import MemoryLog, MemoryReader
from structlog.testing import capture_logs

from streamlearn.errors import LogUnavailableError, OffsetOutOfRangeError
from streamlearn.log.codec import Codec
from streamlearn.log.feed import Feed
from streamlearn.log.predictions import encode_prediction
from streamlearn.records import (
    BadRecord,
    Gap,
    Label,
    NewRecord,
    Offsets,
    Position,
    Prediction,
    PublishedAnswer,
    Record,
    Sample,
    Schema,
    Skipped,
    TopicPartition,
)
from streamlearn.schema.settings import SourceConfig

SCHEMA = Schema((2,), np.dtype(np.float32), ("a", "b"))
CODEC = Codec(SCHEMA)
S, L = TopicPartition("samples", 0), TopicPartition("labels", 0)
X = {"name": "x", "type": {"type": "array", "items": "float"}}
AVRO = b"\0\0\0\0\1" + b"\x02a" + b"\x04" + bytes(8) + b"\0"
"""A sample `a` of two zeros, under schema 1."""


def filled(samples: int, labels: int = 0) -> MemoryLog:
    log = MemoryLog()
    log.create_topics({"samples": 1, "labels": 1})
    log.append("samples", [CODEC.encode_sample(f"s{n}", np.zeros(2, np.float32)) for n in range(samples)])
    log.append("labels", [CODEC.labels.encode(f"s{n}", 1) for n in range(labels)])
    return log


def feed_of(
    log: MemoryLog,
    next_offsets: Offsets | None = None,
    codec: Codec = CODEC,
    *,
    max_records: int = 1000,
    on_trimmed: Literal["stop", "skip"] = "stop",
) -> Feed:
    offsets = next_offsets or {S: 0, L: 0}
    return Feed(log, offsets, codec, sample_topics=("samples",), max_records=max_records, on_trimmed=on_trimmed)


def wait(feed: Feed, done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 8
    while not done():
        assert time.monotonic() < deadline
        feed.wait(0.05)


def test_reads_and_decodes_every_partition() -> None:
    """Samples and labels are in their own queues, in offset order; in the end no partition is behind."""
    feed = feed_of(filled(5, 3))
    feed.start()

    wait(feed, lambda: not feed.behind(S) and not feed.behind(L))

    assert [item.sample_id for item in feed.queues[S] if isinstance(item, Sample)] == ["s0", "s1", "s2", "s3", "s4"]
    assert [item.position.offset for item in feed.queues[L] if isinstance(item, Label)] == [0, 1, 2]
    assert feed.lag() == {S: 5, L: 3}
    feed.close()


def test_what_waits_is_counted_from_the_first_record_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop may look while a poll is still being decoded: a far-off end must not look near."""
    feed = feed_of(filled(5, 3))
    decode, seen = feed.codec.decode_sample, list[tuple[int, bool]]()

    def looked_at(record: Record) -> Sample:
        seen.append((feed.lag()[S], feed.behind(S)))
        return decode(record)

    monkeypatch.setattr(feed.codec, "decode_sample", looked_at)
    feed.start()
    wait(feed, lambda: not feed.behind(S) and not feed.behind(L))
    feed.close()

    assert seen == [(5, True)] * 5


def test_a_bad_record_is_kept_whole_with_its_reason() -> None:
    """It is passed on, not dropped."""
    log = filled(0)
    log.append("samples", [NewRecord(b"k", b"not json")])
    feed = feed_of(log)
    feed.start()

    wait(feed, lambda: len(feed.queues[S]) == 1)
    bad = feed.queues[S][0]
    feed.close()

    assert isinstance(bad, BadRecord)
    assert (bad.error.reason, bad.record.value) == ("not_json", b"not json")


def test_a_partition_with_a_full_queue_is_not_polled() -> None:
    """The bound of each queue holds, up to one poll (I6); other partitions continue."""
    feed = feed_of(filled(3000, 10), max_records=100)
    feed.start()

    wait(feed, lambda: len(feed.queues[S]) >= 100 and len(feed.queues[L]) == 10)
    time.sleep(0.1)

    assert len(feed.queues[S]) < 100 + 512
    assert feed.behind(S)
    feed.queues[S].clear()
    wait(feed, lambda: len(feed.queues[S]) >= 100)
    feed.close()


def test_large_bad_records_are_bounded_by_their_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """They keep their original bytes, so a bound on their number is not enough."""
    monkeypatch.setattr("streamlearn.log.feed._BAD_BYTES", 2 * 50_000)  # of two partitions
    monkeypatch.setattr("streamlearn.log.feed._POLL_RECORDS", 16)
    log = filled(0, 10)
    log.append("samples", [NewRecord(b"k", b"x" * 1000) for _ in range(300)])
    feed = feed_of(log)
    feed.start()

    wait(feed, lambda: len(feed.queues[S]) >= 50 and len(feed.queues[L]) == 10)
    time.sleep(0.1)

    assert len(feed.queues[S]) <= 50 + 16
    assert feed.behind(S)
    taken = 0
    while taken < 300:
        wait(feed, lambda: len(feed.queues[S]) > 0)
        taken += len(feed.queues[S]) and bool(feed.queues[S].popleft())
    feed.close()


@pytest.mark.parametrize(("room", "held"), [(24, 12), (0.5, 1)])
def test_large_samples_are_bounded_by_their_bytes(monkeypatch: pytest.MonkeyPatch, room: float, held: int) -> None:
    """Over all queues; but each partition may hold one sample, so that all are read."""
    schema = Schema((3, 224, 224), np.dtype(np.float32), ("a", "b"))
    monkeypatch.setattr("streamlearn.log.feed.PREFETCH_BYTES", int(room * schema.nbytes))
    monkeypatch.setattr("streamlearn.log.feed.POLL_BYTES", 2 * schema.nbytes)
    codec, log = Codec(schema), MemoryLog()
    log.create_topics({"samples": 2, "labels": 1})
    log.append("samples", [codec.encode_sample(f"s{n}", np.zeros(schema.shape, np.float32)) for n in range(60)])
    partitions = [TopicPartition("samples", number) for number in (0, 1)]
    feed = feed_of(log, dict.fromkeys(partitions, 0), codec, max_records=2048)
    feed.start()

    taken = 0
    while taken < 60:
        wait(feed, lambda: any(feed.queues.values()))
        time.sleep(0.02)
        for partition in partitions:
            queue = feed.queues[partition]
            assert len(queue) <= held + 1, "a poll of two adds one to the bound"
            taken += len(queue) > 0 and bool(queue.popleft())

    feed.close()


def test_a_client_that_never_answers_does_not_block_the_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    """`close` waits for the thread a bounded time; the thread ends with the process."""
    monkeypatch.setattr("streamlearn.log.feed._JOIN_S", 0.1)
    hangs, released = threading.Event(), threading.Event()

    def poll(*_: object) -> list[Record]:
        hangs.set()
        released.wait(30)
        return []

    monkeypatch.setattr(MemoryReader, "poll", poll)
    feed = feed_of(filled(0))
    feed.start()
    assert hangs.wait(8)
    began = time.monotonic()

    with capture_logs() as lines:
        feed.close()

    assert time.monotonic() - began < 5.0
    assert [line["event"] for line in lines] == ["feed_thread_hangs"]
    released.set()


def test_a_log_that_is_away_is_retried() -> None:
    """Reading continues once the log is back; the learner gets no error."""
    log = filled(4)
    log.fail("poll", LogUnavailableError("away"), times=2)
    feed = feed_of(log)
    feed.start()

    wait(feed, lambda: len(feed.queues[S]) == 4)

    assert feed.available
    feed.close()


class TestTrimmed:
    def test_stops_by_default_and_names_the_setting(self) -> None:
        """Records that were trimmed unread are never skipped silently."""
        log = filled(6)
        log.trim(S, 4)
        feed = feed_of(log)
        feed.start()

        with pytest.raises(OffsetOutOfRangeError, match=r"log\.on_trimmed"):
            wait(feed, lambda: False)

        feed.close()

    def test_skips_if_set_and_counts_the_gap(self) -> None:
        """Reading continues at the oldest record; the gap takes the place of its records in the queue."""
        log = filled(6)
        log.trim(S, 4)
        feed = feed_of(log, on_trimmed="skip")
        feed.start()

        wait(feed, lambda: len(feed.queues[S]) == 3)
        feed.close()

        assert feed.queues[S][0] == Gap(Position("samples", 0, 3), missing=4)
        assert [item.position.offset for item in feed.queues[S]] == [3, 4, 5]

    def test_an_offset_past_the_end_is_never_skipped(self) -> None:
        """It is a sign of another log, not of retention."""
        feed = feed_of(filled(2), {S: 9, L: 0}, on_trimmed="skip")
        feed.start()

        with pytest.raises(OffsetOutOfRangeError):
            wait(feed, lambda: False)

        feed.close()


class TestPredictions:
    """The predictions topic, where the source names one."""

    P = TopicPartition("predictions", 0)

    def filled(self, answers: int, *others: NewRecord) -> MemoryLog:
        log = filled(answers)
        log.create_topics({"predictions": 1})
        log.append("predictions", [*others, *map(self.answer, range(answers))])
        return log

    def answer(self, n: int) -> NewRecord:
        sample = CODEC.decode_sample(Record(Position("samples", 0, n), 0, f"s{n}".encode(), b'{"x": [0, 0]}'))
        return encode_prediction(sample, Prediction(1, np.array([0.25, 0.75], np.float32), 4), SCHEMA.classes, 0.0)

    def feed_of(self, log: MemoryLog, next_offset: int = 0, **options: Any) -> Feed:
        codec = Codec(SCHEMA, SourceConfig.model_validate({"predictions": {"topic": "predictions"}}))
        return feed_of(log, {S: 0, L: 0, self.P: next_offset}, codec, **options)

    def test_is_decoded(self) -> None:
        """With the place of the sample."""
        feed = self.feed_of(self.filled(3))
        feed.start()

        wait(feed, lambda: not feed.behind(self.P))
        feed.close()

        answers = [item for item in feed.queues[self.P] if isinstance(item, PublishedAnswer)]
        assert [answer.sample for answer in answers] == [Position("samples", 0, n) for n in range(3)]

    def test_what_is_no_answer_is_skipped(self) -> None:
        """It is no dead letter, since no user sent it."""
        feed = self.feed_of(self.filled(1, NewRecord(b"a", b"{"), NewRecord(b"a", None), NewRecord(b"a", b"{}")))
        feed.start()

        wait(feed, lambda: len(feed.queues[self.P]) == 4)
        feed.close()

        assert [type(item) for item in feed.queues[self.P]] == [Skipped, Skipped, Skipped, PublishedAnswer]

    def test_only_what_was_there_at_the_start_is_waited_for(self) -> None:
        """A scorer that writes all the time, or hangs within a transaction, is waited for by nobody."""
        log = self.filled(3)
        feed = self.feed_of(log, max_records=4)
        assert feed.behind(self.P), "its end is not known yet"
        feed.start()
        wait(feed, lambda: not feed.behind(self.P))

        log.append("predictions", [self.answer(n) for n in range(2000)])
        wait(feed, lambda: feed.lag()[self.P] == 2003)

        assert len(feed.queues[self.P]) < 2003
        assert not feed.behind(self.P)
        feed.close()

    def test_what_retention_removed_is_skipped_although_samples_would_stop(self) -> None:
        """The gap is counted."""
        log = self.filled(6)
        log.trim(self.P, 4)
        feed = self.feed_of(log)
        feed.start()

        wait(feed, lambda: len(feed.queues[self.P]) == 3)
        feed.close()

        assert feed.queues[self.P][0] == Gap(Position("predictions", 0, 3), missing=4)

    def test_another_topic_of_the_same_name_is_read_from_its_beginning(self) -> None:
        """Answers can be removed: the topic may be made again."""
        feed = self.feed_of(self.filled(2), next_offset=50)
        with capture_logs() as lines:
            feed.start()
            wait(feed, lambda: len(feed.queues[self.P]) == 2)
        feed.close()

        assert [line["event"] for line in lines] == ["topic_replaced"]

    def test_trimmed_samples_stop_as_without_it(self) -> None:
        """Also if answers were removed at the same time."""
        log = self.filled(6)
        log.trim(self.P, 4)
        log.trim(S, 4)
        feed = self.feed_of(log)
        feed.start()

        with pytest.raises(OffsetOutOfRangeError, match=r"log\.on_trimmed"):
            wait(feed, lambda: False)
        feed.close()


def test_a_bug_in_reading_is_raised_in_the_learner() -> None:
    """Without its feed the learner would wait indefinitely."""

    class Broken(Codec):
        def decode_sample(self, record: Record) -> Sample:
            raise ZeroDivisionError("a bug")

    feed = feed_of(filled(1), codec=Broken(SCHEMA))
    feed.start()
    try:
        with pytest.raises(ZeroDivisionError, match="a bug"):
            until_raised(feed)
    finally:
        feed.close()


def until_raised(feed: Feed) -> None:
    for _ in range(100):
        feed.wait(0.1)


class TestSchemaRegistry:
    """A registry that is away: reading stalls, loudly, and no record is refused."""

    @pytest.fixture
    def registry(self) -> Iterator[FakeRegistry]:
        with FakeRegistry() as started:
            started.add(1, {"type": "record", "name": "R", "fields": [{"name": "id", "type": "string"}, X]})
            yield started

    def codec(self, registry: FakeRegistry) -> Codec:
        tables = {"samples": {"format": "avro"}, "registry": {"url": registry.url, "timeout_s": 1.0}}
        return Codec(SCHEMA, SourceConfig.model_validate(tables))

    def filled(self, codec: Codec) -> MemoryLog:
        """A sample that streamlearn appended, one in Avro, a tombstone, and one in Avro."""
        own = codec.encode_sample("s0", np.zeros(2, np.float32))
        log = filled(0, labels=3)
        log.append("samples", [own, NewRecord(b"a", AVRO), NewRecord(b"a", None), NewRecord(b"a", AVRO)])
        return log

    def test_reading_stalls_and_then_goes_on_where_it_was(self, registry: FakeRegistry) -> None:
        """Nothing is skipped, nothing is decoded twice. What was decoded before can be learned."""
        registry.broken = (503, b"down")
        codec = self.codec(registry)
        feed = feed_of(self.filled(codec), codec=codec)
        feed.start()
        try:
            wait(feed, lambda: len(registry.requests) >= 2)
            before = [type(item) for item in feed.queues[S]]
            is_behind = feed.behind(S)
            registry.broken = None
            wait(feed, lambda: len(feed.queues[S]) == 4 and len(feed.queues[L]) == 3)
        finally:
            feed.close()

        assert (before, is_behind) == ([Sample], True)
        assert [type(item) for item in feed.queues[S]] == [Sample, Sample, Skipped, Sample]
        assert [item.position.offset for item in feed.queues[S]] == [0, 1, 2, 3]
        assert feed.codec.registry is not None
        assert feed.codec.registry.failures >= 2

    def test_a_feed_that_waits_can_be_closed(self, registry: FakeRegistry) -> None:
        """The process stops at a signal, also during an outage."""
        registry.broken = (503, b"down")
        codec = self.codec(registry)
        feed = feed_of(self.filled(codec), codec=codec)
        feed.start()
        wait(feed, lambda: len(registry.requests) >= 2)
        began_s = time.monotonic()

        feed.close()

        assert time.monotonic() - began_s < 2.0
        assert len(feed.queues[S]) == 1

    def test_an_unknown_schema_is_a_bad_record(self, registry: FakeRegistry) -> None:
        """The registry answers, and the records after it are read."""
        log = filled(0)
        log.append("samples", [NewRecord(b"a", b"\0\0\0\0\x09x"), NewRecord(b"a", AVRO)])
        feed = feed_of(log, codec=self.codec(registry))
        feed.start()
        try:
            wait(feed, lambda: len(feed.queues[S]) == 2)
        finally:
            feed.close()

        bad, good = feed.queues[S]
        assert isinstance(bad, BadRecord)
        assert bad.error.reason == "unknown_schema"
        assert isinstance(good, Sample)


def test_several_topics_of_samples_are_decoded_as_samples() -> None:
    """Each by its name."""
    log = filled(1)
    log.create_topics({"more": 1})
    log.append("more", [CODEC.encode_sample("m0", np.zeros(2, np.float32))])
    more = TopicPartition("more", 0)
    feed = Feed(log, {S: 0, more: 0, L: 0}, CODEC, sample_topics=("samples", "more"), on_trimmed="stop")
    feed.start()
    try:
        wait(feed, lambda: bool(feed.queues[S] and feed.queues[more]))
    finally:
        feed.close()

    assert isinstance(feed.queues[more][0], Sample)
