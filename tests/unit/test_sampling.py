"""Some records of a topic: oldest and newest, every partition, within bounds."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from harness.fakes import MemoryLog
from hypothesis import given
from hypothesis import strategies as st

from streamlearn.app import sampling
from streamlearn.app.sampling import read_some
from streamlearn.errors import ConfigError, LogUnavailableError, OffsetOutOfRangeError
from streamlearn.log.embedded import EmbeddedLog
from streamlearn.records import NewRecord, Position, Record, TopicPartition


def filled(*sizes: int, size_bytes: int = 1) -> MemoryLog:
    """A topic with partitions of these sizes; one record per second."""
    log = MemoryLog()
    log.create_topics({"t": len(sizes)})
    for partition, size in enumerate(sizes):
        for offset in range(size):
            log.put(Record(Position("t", partition, offset), offset * 1000, b"k", b"x" * size_bytes))
    return log


@given(st.lists(st.integers(0, 60), min_size=1, max_size=6), st.integers(1, 100))
def test_it_reads_as_many_as_there_are_up_to_the_count(sizes: list[int], count: int) -> None:
    """Each record at most once, whatever the partitions hold."""
    found = read_some(filled(*sizes), ["t"], count)

    positions = [record.position for record in found.records]
    assert len(positions) == len(set(positions)) == min(count, sum(sizes))
    assert (found.held, found.partitions) == (sum(sizes), len(sizes))
    assert found.is_whole == (count >= sum(sizes))


def test_half_are_the_oldest_and_half_the_newest_of_each_partition() -> None:
    """The oldest come first."""
    found = read_some(filled(100, 100), ["t"], 8)

    assert [(record.position.partition, record.position.offset) for record in found.records] == [
        (0, 0), (0, 1), (1, 0), (1, 1), (0, 98), (0, 99), (1, 98), (1, 99),
    ]  # fmt: skip
    assert found.span_s == (0.0, 99.0)
    assert found.rate == pytest.approx(200 / 99)


def test_what_a_small_partition_does_not_have_goes_to_the_others() -> None:
    """Of a topic with a hot key."""
    found = read_some(filled(2, 500, 0), ["t"], 100)

    assert Counter(record.position.partition for record in found.records) == {0: 2, 1: 98}


def test_the_bytes_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of both ends something is read."""
    monkeypatch.setattr(sampling, "MAX_BYTES", 1000)
    monkeypatch.setattr(sampling, "_READ_RECORDS", 2)

    found = read_some(filled(100, size_bytes=200), ["t"], 100)
    assert [record.position.offset for record in found.records] == [0, 1, 2, 3, 4, 5]

    found = read_some(filled(100, size_bytes=200), ["t"], 50)
    assert [record.position.offset for record in found.records] == [0, 1, 2, 3, 75, 76, 77, 78]


def test_the_time_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was read until then is returned."""
    monkeypatch.setattr(sampling, "MAX_S", -1.0)

    assert read_some(filled(10), ["t"], 10).records == ()


def test_several_topics_are_one_sample() -> None:
    """Each partition has its share."""
    log = filled(3)
    log.create_topics({"u": 1})
    log.append("u", [NewRecord(None, b"x")])

    found = read_some(log, ["t", "u"], 10)

    assert Counter(record.position.topic for record in found.records) == {"t": 3, "u": 1}


@pytest.mark.parametrize(
    ("topics", "given", "expected"),
    [
        (["payments", "labels"], "payment", "did you mean 'payments'?"),
        (["orders.eu", "orders.us", "x"], "orders.uk", "did you mean 'orders.us' or 'orders.eu'?"),
        (["b", "a"], "nowhere", "it has 'a', 'b'"),
        ([f"t{n}" for n in range(7)], "nowhere", "it has 't0', 't1', 't2', 't3', 't4' and 2 more"),
        ([], "nowhere", "it has none yet"),
    ],
)
def test_a_topic_that_is_not_there_is_named(topics: list[str], given: str, expected: str) -> None:
    """It is the user's argument: most often a name that is nearly right."""
    log = MemoryLog()
    log.create_topics(dict.fromkeys(topics, 1))

    with pytest.raises(ConfigError) as raised:
        read_some(log, [given], 10)

    assert str(raised.value) == f"there is no topic '{given}' in this log: {expected}"


def test_an_empty_topic_has_no_records_and_no_rate() -> None:
    """That is no error here."""
    found = read_some(filled(0), ["t"], 10)

    assert (found.records, found.span_s, found.rate, found.is_whole) == ((), None, None, True)


def test_records_that_were_just_trimmed_are_left_out() -> None:
    """Retention may run meanwhile."""
    log = filled(10, 10)
    log.fail("read", OffsetOutOfRangeError("trimmed"))

    assert {record.position.partition for record in read_some(log, ["t"], 20).records} == {1}


def test_a_log_that_is_away_is_an_error() -> None:
    """The command ends."""
    log = filled(10)
    log.fail("read", LogUnavailableError("away"))

    with pytest.raises(LogUnavailableError):
        read_some(log, ["t"], 20)


def test_of_an_embedded_log(tmp_path: Path) -> None:
    """The same interface."""
    log = EmbeddedLog(tmp_path / "log.sqlite3", max_bytes=1 << 20)
    log.create_topics({"t": 2})
    log.append("t", [NewRecord(b"%d" % n, b"x") for n in range(40)])

    found = read_some(log, ["t"], 10)
    log.close()

    assert len(found.records) == 10
    assert {record.position.topic_partition for record in found.records} == {TopicPartition("t", n) for n in range(2)}
