"""Dead letters, and retries while the log is unavailable."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import pytest
from harness.fakes import MemoryLog
from small_learner import S, empty_log

from streamlearn.errors import LogError, LogUnavailableError, RecordError
from streamlearn.log.codec import Codec
from streamlearn.log.dead_letters import read_dead_letter
from streamlearn.loop.log_access import LogAccess
from streamlearn.records import BadRecord, NewRecord, Position, Record, Schema

CODEC = Codec(Schema((4,), np.dtype(np.float32), ("a", "b")), payload="json", max_record_bytes=1 << 20)


def access(log: MemoryLog, *, retry_s: Sequence[float] = (0.0, 0.0), stopped: bool = False) -> LogAccess:
    stopping = threading.Event()
    if stopped:
        stopping.set()
    return LogAccess(log, CODEC, dead_letters="dead-letters", stopping=stopping, retry_s=retry_s)


def bad(offset: int, key: bytes, value: bytes) -> BadRecord:
    record = Record(Position("samples", 0, offset), 1_700_000_000_000, key, value, (("content-type", b"text/html"),))
    return BadRecord(record, RecordError("bad_content_type", "text/html is not accepted"))


class TestDeadLetter:
    def test_has_the_original_bytes_the_reason_and_the_position(self) -> None:
        """So an operator can repair the record and send it again."""
        log = empty_log()

        access(log).dead_letter([bad(8, b"k\xff", b"\x00junk")])

        (letter,) = map(read_dead_letter, log.records("dead-letters"))
        assert letter.reason == "bad_content_type"
        assert (letter.record.key, letter.record.value) == (b"k\xff", b"\x00junk")
        assert str(letter.record.position) == "samples[0]@8"

    def test_that_the_log_refuses_is_written_without_content(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Else every start would fail at it. The other letters of the step are complete."""
        log, append = empty_log(), MemoryLog.append

        def small(self: MemoryLog, topic: str, records: Sequence[NewRecord], timeout_s: float = 10.0) -> list[Position]:
            if any(len(record.value or b"") > 1000 for record in records):
                raise LogError("too large")
            return append(self, topic, records, timeout_s)

        monkeypatch.setattr(MemoryLog, "append", small)

        access(log).dead_letter([bad(8, b"k", b"junk"), bad(9, b"l", b"x" * 5000), bad(10, b"m", b"junk")])

        letters = [read_dead_letter(record).record for record in log.records("dead-letters")]
        assert [(letter.key, letter.value) for letter in letters] == [(b"k", b"junk"), (None, b""), (b"m", b"junk")]
        assert str(letters[1].position) == "samples[0]@9"


class TestRetry:
    def test_a_short_absence_is_waited_out(self) -> None:
        """The third attempt succeeds."""
        log = empty_log()
        log.fail("append", LogUnavailableError("away"), times=2)

        access(log).dead_letter([bad(8, b"k", b"junk")])

        assert len(log.records("dead-letters")) == 1

    def test_a_long_absence_raises(self) -> None:
        """The learner stops rather than lose the record."""
        log = empty_log()
        log.fail("append", LogUnavailableError("away"), times=3)

        with pytest.raises(LogError, match="1 dead letters cannot be written, and will not be dropped: away"):
            access(log).dead_letter([bad(8, b"k", b"junk")])

    def test_there_is_none_once_the_learner_stops(self) -> None:
        """A stop must not wait for a minute."""
        log = empty_log()
        log.fail("append", LogUnavailableError("away"), times=1)

        with pytest.raises(LogError):
            access(log, stopped=True).dead_letter([bad(8, b"k", b"junk")])


class TestReadBack:
    def test_finds_the_payload_by_its_position(self) -> None:
        """As long as the log has it."""
        log, x = empty_log(), np.arange(4, dtype=np.float32)
        (position,) = log.append("samples", [CODEC.encode_sample("a", x)])

        found = access(log).read_back(position, "a")

        assert found is not None
        assert found.tolist() == x.tolist()
        log.append("samples", [CODEC.encode_sample("b", x)])
        log.trim(S, 1)
        assert access(log).read_back(position, "a") is None

    def test_is_none_for_another_sample(self) -> None:
        """The topic may have been recreated: this payload does not belong to the label."""
        log = empty_log()
        (position,) = log.append("samples", [CODEC.encode_sample("a", np.zeros(4, np.float32))])

        assert access(log).read_back(position, "b") is None
