"""The fakes: injected faults, manual clock. The contract suite covers `MemoryLog` as a log."""

from __future__ import annotations

import contextlib

import pytest
from harness.fakes import InjectedCrash, ManualClock, MemoryLog, lost_acknowledgement

from streamlearn.errors import LogUnavailableError
from streamlearn.records import NewRecord, TopicPartition

PARTITION = TopicPartition("t", 0)


@pytest.fixture
def log() -> MemoryLog:
    """A log with one topic of one partition."""
    log = MemoryLog()
    log.create_topics({"t": 1})
    return log


def append(log: MemoryLog) -> None:
    log.append("t", [NewRecord(b"k", b"v")])


class TestFaults:
    """Injected failures."""

    def test_the_nth_call_fails_and_the_next_succeeds(self, log: MemoryLog) -> None:
        """The failed append has no effect."""
        log.fail("append", LogUnavailableError("away"), after=1)

        append(log)
        with pytest.raises(LogUnavailableError, match="away"):
            append(log)
        append(log)

        assert [record.position.offset for record in log.records("t")] == [0, 1]

    def test_a_fault_may_last(self, log: MemoryLog) -> None:
        """`times` calls fail, the next one succeeds."""
        log.fail("end_offsets", LogUnavailableError("away"), times=2)

        for _ in range(2):
            with pytest.raises(LogUnavailableError):
                log.end_offsets("t")

        assert log.end_offsets("t") == {PARTITION: 0}

    def test_an_acknowledgement_may_be_lost(self, log: MemoryLog) -> None:
        """The record is in the log although the append raises."""
        log.fail("append", lost_acknowledgement(), applied=True)

        with pytest.raises(LogUnavailableError):
            append(log)

        assert len(log.records("t")) == 1

    def test_a_reader_fails_too(self, log: MemoryLog) -> None:
        """It keeps its offset."""
        append(log)
        reader = log.reader({PARTITION: 0})
        log.fail("poll", LogUnavailableError("away"))

        with pytest.raises(LogUnavailableError):
            reader.poll([PARTITION], 1, 0.0)

        assert len(reader.poll([PARTITION], 1, 0.0)) == 1

    def test_no_error_handler_catches_an_injected_crash(self, log: MemoryLog) -> None:
        """It is a BaseException."""
        log.fail("read", InjectedCrash())

        def swallow() -> None:
            with contextlib.suppress(Exception):
                log.read(PARTITION, 0, 1)

        with pytest.raises(InjectedCrash):
            swallow()


def test_committed_offsets_are_visible(log: MemoryLog) -> None:
    """The newest per partition."""
    log.commit({PARTITION: 1})
    log.commit({PARTITION: 5})

    assert log.committed == {PARTITION: 5}


def test_the_clock_moves_only_by_advance(log: MemoryLog) -> None:
    """It can set the timestamps of a log."""
    clock = ManualClock(10.0)
    log = MemoryLog(clock=clock)
    log.create_topics({"t": 1})

    append(log)
    clock.advance(2.5)
    append(log)

    assert [record.timestamp_ms for record in log.records("t")] == [10_000, 12_500]
