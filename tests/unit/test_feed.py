"""Reading ahead: bounded queues, bad records kept whole, and what happens when the log is away or was trimmed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
from structlog.testing import capture_logs

from streamlearn.errors import LogUnavailableError, OffsetOutOfRangeError
from streamlearn.log.codec import Codec
from streamlearn.log.feed import Feed
from streamlearn.records import BadRecord, Gap, Label, NewRecord, Position, Record, Sample, Schema, TopicPartition
from streamlearn.testing import MemoryLog

SCHEMA = Schema((2,), np.dtype(np.float32), ("a", "b"))
CODEC = Codec(SCHEMA)
S, L = TopicPartition("samples", 0), TopicPartition("labels", 0)


def filled(samples: int, labels: int = 0) -> MemoryLog:
    log = MemoryLog()
    log.create_topics({"samples": 1, "labels": 1})
    log.append("samples", [CODEC.encode_sample(f"s{n}", np.zeros(2, np.float32)) for n in range(samples)])
    log.append("labels", [CODEC.encode_label(f"s{n}", 1) for n in range(labels)])
    return log


def feed_of(log: MemoryLog, **settings: object) -> Feed:
    decoders = {"decode_sample": CODEC.decode_sample, "decode_label": CODEC.decode_label}
    chosen = {"max_records": 1000, "on_trimmed": "stop", **decoders} | settings
    return Feed(
        log,
        {S: 0, L: 0},
        sample_topic="samples",
        schema=SCHEMA,
        **chosen,  # type: ignore[arg-type]
    )


def wait(feed: Feed, done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 8
    while not done():
        assert time.monotonic() < deadline
        feed.wait(0.05)


def test_reads_and_decodes_every_partition() -> None:
    """Samples and labels stand in their own queues, in offset order, and nothing is behind in the end."""
    feed = feed_of(filled(5, 3))
    feed.start()

    wait(feed, lambda: not feed.behind(S) and not feed.behind(L))

    assert [item.sample_id for item in feed.queues[S] if isinstance(item, Sample)] == ["s0", "s1", "s2", "s3", "s4"]
    assert [item.position.offset for item in feed.queues[L] if isinstance(item, Label)] == [0, 1, 2]
    assert feed.lag() == {S: 5, L: 3}
    feed.close()


def test_a_bad_record_stays_whole_with_its_reason() -> None:
    """What cannot be decoded is handed on, not dropped."""
    log = filled(0)
    log.append("samples", [NewRecord(b"k", b"not json")])
    feed = feed_of(log)
    feed.start()

    wait(feed, lambda: len(feed.queues[S]) == 1)
    bad = feed.queues[S][0]
    feed.close()

    assert isinstance(bad, BadRecord)
    assert (bad.error.reason, bad.record.value) == ("not_json", b"not json")


def test_a_full_queue_is_not_read_on() -> None:
    """The bound of each partition holds, up to one poll (I6), and the others go on."""
    feed = feed_of(filled(3000, 10), max_records=100)
    feed.start()

    wait(feed, lambda: len(feed.queues[S]) >= 100 and len(feed.queues[L]) == 10)

    assert len(feed.queues[S]) < 100 + 512
    assert feed.behind(S)
    feed.queues[S].clear()
    wait(feed, lambda: len(feed.queues[S]) >= 100)
    feed.close()


def test_large_bad_records_are_bounded_by_their_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are kept as they came, so their number alone bounds nothing; taken, they make room again."""
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
    """All queues together have room for so many; each partition holds one at least, so that all are read."""
    schema = Schema((3, 224, 224), np.dtype(np.float32), ("a", "b"))
    monkeypatch.setattr("streamlearn.log.feed.PREFETCH_BYTES", int(room * schema.nbytes))
    monkeypatch.setattr("streamlearn.log.feed.POLL_BYTES", 2 * schema.nbytes)
    codec, log = Codec(schema), MemoryLog()
    log.create_topics({"samples": 2, "labels": 1})
    log.append("samples", [codec.encode_sample(f"s{n}", np.zeros(schema.shape, np.float32)) for n in range(60)])
    partitions = [TopicPartition("samples", number) for number in (0, 1)]
    feed = Feed(
        log,
        dict.fromkeys(partitions, 0),
        schema=schema,
        sample_topic="samples",
        decode_sample=codec.decode_sample,
        decode_label=codec.decode_label,
        max_records=2048,
        on_trimmed="stop",
    )
    feed.start()

    taken = 0
    while taken < 60:
        wait(feed, lambda: any(feed.queues.values()))
        time.sleep(0.02)
        for partition in partitions:
            queue = feed.queues[partition]
            assert len(queue) <= held + 1, "one poll of two more than the last look allowed"
            taken += len(queue) > 0 and bool(queue.popleft())

    feed.close()


def test_small_samples_are_bounded_by_their_number() -> None:
    """As the setting has it, and so is a poll."""
    feed = feed_of(filled(0), max_records=70)

    assert (feed._max_records, feed._poll_records) == ({S: 70, L: 70}, 512)
    feed.close()


def test_a_client_that_never_answers_does_not_keep_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """What stops a learner waits for the thread so long and no longer; the thread ends with the process."""
    monkeypatch.setattr("streamlearn.log.feed._JOIN_S", 0.1)
    feed, hangs, released = feed_of(filled(0)), threading.Event(), threading.Event()

    def poll(*_: object) -> list[Record]:
        hangs.set()
        released.wait(30)
        return []

    monkeypatch.setattr(feed._reader, "poll", poll)
    feed.start()
    assert hangs.wait(8)
    began = time.monotonic()

    with capture_logs() as lines:
        feed.close()

    assert time.monotonic() - began < 5.0
    assert [line["event"] for line in lines] == ["feed_does_not_end"]
    released.set()


def test_a_log_that_is_away_is_waited_for() -> None:
    """Reading goes on by itself once the log is back, and nobody is told of an error."""
    log = filled(4)
    log.fail("poll", LogUnavailableError("away"), times=2)
    feed = feed_of(log)
    feed.start()

    wait(feed, lambda: len(feed.queues[S]) == 4)

    assert feed.available
    feed.close()


class TestTrimmed:
    def test_stops_by_default_and_says_what_to_do(self) -> None:
        """Records that left before they were read are never skipped in silence."""
        log = filled(6)
        log.trim(S, 4)
        feed = feed_of(log)
        feed.start()

        with pytest.raises(OffsetOutOfRangeError, match=r"log\.on_trimmed"):
            wait(feed, lambda: False)

        feed.close()

    def test_skips_where_that_is_set_and_counts_the_gap(self) -> None:
        """Reading goes on at the oldest record there is; the gap stands in the queue where its records stood."""
        log = filled(6)
        log.trim(S, 4)
        feed = feed_of(log, on_trimmed="skip")
        feed.start()

        wait(feed, lambda: len(feed.queues[S]) == 3)
        feed.close()

        assert feed.queues[S][0] == Gap(Position("samples", 0, 3), missing=4)
        assert [item.position.offset for item in feed.queues[S]] == [3, 4, 5]

    def test_an_offset_past_the_end_is_never_skipped(self) -> None:
        """That is another log, not a trimmed one."""
        feed = Feed(
            filled(2),
            {S: 9, L: 0},
            sample_topic="samples",
            schema=SCHEMA,
            decode_sample=CODEC.decode_sample,
            decode_label=CODEC.decode_label,
            max_records=10,
            on_trimmed="skip",
        )
        feed.start()

        with pytest.raises(OffsetOutOfRangeError):
            wait(feed, lambda: False)

        feed.close()


def test_a_bug_in_reading_ends_the_learner_too() -> None:
    """What kills the thread is raised in the learner's, whatever it is; it would wait for ever otherwise."""

    def decode(_record: object) -> Sample:
        raise ZeroDivisionError("a bug")

    feed = feed_of(filled(1), decode_sample=decode)
    feed.start()
    try:
        with pytest.raises(ZeroDivisionError, match="a bug"):
            until_raised(feed)
    finally:
        feed.close()


def until_raised(feed: Feed) -> None:
    for _ in range(100):
        feed.wait(0.1)
