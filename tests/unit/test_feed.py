"""Prefetch: bounded queues, bad records kept whole, and a log that is away or was trimmed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Literal

import numpy as np
import pytest
from harness.fakes import MemoryLog, MemoryReader
from structlog.testing import capture_logs

from streamlearn.errors import LogUnavailableError, OffsetOutOfRangeError
from streamlearn.log.codec import Codec
from streamlearn.log.feed import Feed
from streamlearn.records import (
    BadRecord,
    Gap,
    Label,
    NewRecord,
    Offsets,
    Position,
    Record,
    Sample,
    Schema,
    TopicPartition,
)

SCHEMA = Schema((2,), np.dtype(np.float32), ("a", "b"))
CODEC = Codec(SCHEMA)
S, L = TopicPartition("samples", 0), TopicPartition("labels", 0)


def filled(samples: int, labels: int = 0) -> MemoryLog:
    log = MemoryLog()
    log.create_topics({"samples": 1, "labels": 1})
    log.append("samples", [CODEC.encode_sample(f"s{n}", np.zeros(2, np.float32)) for n in range(samples)])
    log.append("labels", [CODEC.encode_label(f"s{n}", 1) for n in range(labels)])
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
    return Feed(log, offsets, codec, sample_topic="samples", max_records=max_records, on_trimmed=on_trimmed)


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
