"""What the embedded log does beyond the contract: retention, several processes, damage, a full disk."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from harness.fakes import ManualClock
from structlog.testing import capture_logs

from streamlearn.errors import LogError, LogUnavailableError, OffsetOutOfRangeError
from streamlearn.log import embedded, retention, sqlite
from streamlearn.log.embedded import TRANSACTION_MAX_BYTES, EmbeddedLog
from streamlearn.log.partitioner import partition_of
from streamlearn.records import NewRecord, Position, TopicPartition

PARTITION = TopicPartition("t", 0)
RECORD_BYTES = 1000
MAX_AGE_S = 100.0


@pytest.fixture
def open_log(log_path: Path, clock: ManualClock) -> Iterator[Callable[..., EmbeddedLog]]:
    """Open the log at one path, any number of times; close all after the test."""
    logs: list[EmbeddedLog] = []

    def open_one(*, max_bytes: int = 1 << 30, max_age_s: float = MAX_AGE_S) -> EmbeddedLog:
        logs.append(EmbeddedLog(log_path, max_age_s=max_age_s, max_bytes=max_bytes, clock=clock))
        logs[-1].create_topics({"t": 1})
        return logs[-1]

    yield open_one
    for log in logs:
        log.close()


@pytest.fixture
def connections(monkeypatch: pytest.MonkeyPatch) -> list[sqlite3.Connection]:
    """All connections that logs open, in order."""
    opened: list[sqlite3.Connection] = []
    connect = embedded.connect

    def remember(path: Path, busy_timeout_s: float, timeout_s: float) -> sqlite3.Connection:
        opened.append(connect(path, busy_timeout_s, timeout_s))
        return opened[-1]

    monkeypatch.setattr(embedded, "connect", remember)
    return opened


def weighing(size_bytes: int, count: int = 1) -> list[NewRecord]:
    """Records that count this much each against the bounds."""
    return [NewRecord(b"k", bytes(size_bytes - 1 - retention.ROW_OVERHEAD_BYTES))] * count


def bounds(log: EmbeddedLog, topic: str = "t") -> list[tuple[int, int]]:
    """Beginning and end of each partition."""
    beginnings, ends = log.beginning_offsets(topic), log.end_offsets(topic)
    return [(beginnings[partition], ends[partition]) for partition in sorted(ends)]


def held_bytes(log: EmbeddedLog, topic: str = "t") -> int:
    """The size of a topic, as its bound counts it."""
    return sum(
        retention.weight_bytes(NewRecord(record.key, record.value, record.headers))
        for partition, beginning in log.beginning_offsets(topic).items()
        for record in log.read(partition, beginning, 1 << 20)
    )


class TestRetention:
    """By bytes and by age."""

    def test_the_oldest_records_above_the_bytes_are_removed(self, open_log: Callable[..., EmbeddedLog]) -> None:
        """As few as possible; a removed offset is out of range."""
        log = open_log(max_bytes=10 * RECORD_BYTES)
        log.append("t", weighing(RECORD_BYTES, 10))
        assert bounds(log) == [(0, 10)]

        log.append("t", weighing(RECORD_BYTES, 3))

        assert bounds(log) == [(3, 13)]
        assert len(log.read(PARTITION, 3, 100)) == 10
        with pytest.raises(OffsetOutOfRangeError, match=r"t\[0\]@2 was trimmed: the log holds 3 to 13"):
            log.read(PARTITION, 2, 1)

    def test_every_part_of_a_record_counts(self, open_log: Callable[..., EmbeddedLog]) -> None:
        """Keys and headers too, so a topic of tiny values is bounded."""
        log = open_log(max_bytes=10 * RECORD_BYTES)
        record = NewRecord(bytes(RECORD_BYTES // 2), None, (("h", bytes(RECORD_BYTES // 2)),))

        for _ in range(30):
            log.append("t", [record])

        assert bounds(log) == [(21, 30)]

    def test_the_bound_is_per_topic_and_removes_from_the_largest_partition(
        self, open_log: Callable[..., EmbeddedLog]
    ) -> None:
        """Other topics and small partitions keep their records."""
        log = open_log(max_bytes=10 * RECORD_BYTES)
        log.create_topics({"two": 2})
        log.append("t", weighing(RECORD_BYTES, 10))
        elsewhere = next(key for key in (b"a", b"b", b"c", b"d") if partition_of(key, 2) != partition_of(b"k", 2))
        log.append("two", [NewRecord(elsewhere, weighing(RECORD_BYTES)[0].value)])

        log.append("two", weighing(RECORD_BYTES, 9))
        log.append("two", weighing(RECORD_BYTES, 3))

        assert bounds(log) == [(0, 10)]
        assert sorted(end - beginning for beginning, end in bounds(log, "two")) == [1, 9]

    def test_a_lower_bound_is_reached_in_bounded_steps(
        self, open_log: Callable[..., EmbeddedLog], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """One transaction removes a bounded number of records; the next continues."""
        monkeypatch.setattr(retention, "TRIM_CHUNK_RECORDS", 10)
        open_log().append("t", weighing(RECORD_BYTES, 100))
        log = open_log(max_bytes=5 * RECORD_BYTES)

        log.append("t", weighing(RECORD_BYTES))
        after_one = bounds(log)
        log.append("t", weighing(RECORD_BYTES))
        log.append("t", weighing(RECORD_BYTES))

        assert after_one == [(40, 101)]
        assert bounds(log) == [(98, 103)]

    def test_records_that_are_too_old_are_removed(
        self, open_log: Callable[..., EmbeddedLog], clock: ManualClock
    ) -> None:
        """By the second append after that; newer ones stay."""
        log = open_log()
        log.append("t", weighing(RECORD_BYTES, 2))
        clock.advance(MAX_AGE_S * 0.6)
        log.append("t", weighing(RECORD_BYTES, 3))

        clock.advance(MAX_AGE_S * 0.6)
        log.append("t", weighing(RECORD_BYTES))
        clock.advance(MAX_AGE_S * 0.1)
        log.append("t", weighing(RECORD_BYTES))

        assert bounds(log) == [(2, 7)]

    def test_one_append_by_a_clock_far_ahead_removes_nothing(
        self, open_log: Callable[..., EmbeddedLog], log_path: Path, clock: ManualClock
    ) -> None:
        """Nor does the next one, by a correct clock."""
        log = open_log()
        log.append("t", weighing(RECORD_BYTES, 5))
        ahead = ManualClock(clock() + 1e6)
        with closing(EmbeddedLog(log_path, max_age_s=MAX_AGE_S, max_bytes=1 << 30, clock=ahead)) as other:
            other.append("t", weighing(RECORD_BYTES))
        clock.advance(MAX_AGE_S / 2)

        log.append("t", weighing(RECORD_BYTES))

        assert bounds(log) == [(0, 7)]

    def test_age_removes_no_unread_records(self, open_log: Callable[..., EmbeddedLog], clock: ManualClock) -> None:
        """A learner that is down for longer than the age loses nothing."""
        log = open_log()
        log.append("t", weighing(RECORD_BYTES, 5))
        log.commit({PARTITION: 3})
        clock.advance(MAX_AGE_S * 2)

        for _ in range(2):
            log.append("t", weighing(RECORD_BYTES))
            clock.advance(MAX_AGE_S)

        assert bounds(log) == [(3, 7)]

    def test_an_append_never_removes_its_own_records(self, open_log: Callable[..., EmbeddedLog]) -> None:
        """Even if every partition is larger than the excess and the new record is the smallest of its own."""
        log = open_log()
        log.create_topics({"eight": 8})
        log.append("eight", [NewRecord(b"k%d" % n, bytes(400)) for n in range(6000)], timeout_s=60.0)
        log.close()
        log = open_log(max_bytes=1 << 20)
        keys = {partition_of(b"n%d" % n, 8): b"n%d" % n for n in range(200)}
        largest = max(log.end_offsets("eight").items(), key=lambda item: item[1])[0].partition

        for partition in (largest, *range(8)):
            (position,) = log.append("eight", [NewRecord(keys[partition], b"precious")])
            found = log.read(position.topic_partition, position.offset, 1)
            assert [record.value for record in found] == [b"precious"]

        assert held_bytes(log, "eight") <= 1 << 20

    def test_an_append_larger_than_the_bound_is_kept_until_the_next(self, open_log: Callable[..., EmbeddedLog]) -> None:
        """Its records are acknowledged together, so none may be missing by then."""
        log = open_log(max_bytes=10 * RECORD_BYTES)

        log.append("t", weighing(RECORD_BYTES, 25))
        assert bounds(log) == [(0, 25)]
        log.append("t", weighing(RECORD_BYTES))

        assert bounds(log) == [(16, 26)]

    def test_no_more_is_removed_than_exceeds_the_bound(self, open_log: Callable[..., EmbeddedLog]) -> None:
        """With records of different sizes: the oldest are large, most are small."""
        log = open_log(max_bytes=4 << 20)
        log.append("t", weighing(1 << 20, 3))
        log.append("t", weighing(100, 9000))
        held = held_bytes(log)
        assert held < 4 << 20

        log.append("t", weighing(600 << 10))

        assert bounds(log) == [(1, 9004)]
        assert held_bytes(log) == held - (1 << 20) + (600 << 10)

    def test_read_records_are_removed_before_unread_ones(self, open_log: Callable[..., EmbeddedLog]) -> None:
        """In any partition; nothing is reported then."""
        log = open_log(max_bytes=10 * RECORD_BYTES)
        log.create_topics({"two": 2})
        keys = {partition_of(key, 2): key for key in (b"a", b"b", b"c", b"d")}
        value = weighing(RECORD_BYTES)[0].value
        log.append("two", [NewRecord(keys[0], value)] * 7)
        log.append("two", [NewRecord(keys[1], value)] * 3)
        log.commit({TopicPartition("two", 0): 0, TopicPartition("two", 1): 2})

        with capture_logs() as lines:
            log.append("two", [NewRecord(keys[0], value)] * 2)

        assert bounds(log, "two") == [(0, 9), (2, 3)]
        assert lines == []

    def test_removing_unread_records_is_reported_as_an_error(self, open_log: Callable[..., EmbeddedLog]) -> None:
        """At once, then at most every few seconds, and the rest when the log is closed."""
        log = open_log(max_bytes=10 * RECORD_BYTES)
        log.append("t", weighing(RECORD_BYTES, 10))
        log.commit({PARTITION: 2})

        with capture_logs() as lines:
            for _ in range(5):
                log.append("t", weighing(RECORD_BYTES))
            log.close()

        assert [(line["event"], line["log_level"], line["topic"], line["records"]) for line in lines] == [
            ("unread_records_trimmed", "error", "t", 1),
            ("unread_records_trimmed", "error", "t", 2),
        ]
        assert bounds(open_log()) == [(5, 15)]

    def test_age_counts_from_the_append_not_from_the_timestamp(self, open_log: Callable[..., EmbeddedLog]) -> None:
        """History that is replayed into the log is not removed at once."""
        log = open_log()

        for _ in range(3):
            log.append("t", [NewRecord(b"k", b"v", timestamp_ms=0)])

        assert bounds(log) == [(0, 3)]

    def test_offsets_continue_after_everything_was_removed(
        self, open_log: Callable[..., EmbeddedLog], clock: ManualClock
    ) -> None:
        """An offset is never used twice, also across a restart."""
        log = open_log()
        log.append("t", weighing(RECORD_BYTES, 5))
        clock.advance(MAX_AGE_S * 2)
        log.append("t", weighing(RECORD_BYTES))
        clock.advance(MAX_AGE_S * 2)
        log.close()

        assert open_log().append("t", weighing(RECORD_BYTES)) == [Position("t", 0, 6)]

    def test_the_file_stays_within_its_bound(self, open_log: Callable[..., EmbeddedLog], log_path: Path) -> None:
        """Pages of removed records are reused, no matter how much is appended."""
        max_bytes = 200 * RECORD_BYTES
        log = open_log(max_bytes=max_bytes)

        for _ in range(40):
            log.append("t", weighing(RECORD_BYTES, 100))
        log.close()

        assert log_path.stat().st_size < 2 * max_bytes + 100 * RECORD_BYTES

    def test_the_wal_is_truncated_although_a_reader_is_active(
        self, open_log: Callable[..., EmbeddedLog], log_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It must not grow for as long as a process reads."""
        monkeypatch.setattr(sqlite, "WAL_MAX_BYTES", 200 * RECORD_BYTES)
        log = open_log()
        reader = log.reader({PARTITION: 0})

        for _ in range(20):
            log.append("t", weighing(RECORD_BYTES, 50))
            reader.poll([PARTITION], 10, 0.0)

        assert log_path.with_name(log_path.name + "-wal").stat().st_size < 400 * RECORD_BYTES
        reader.close()

    def test_a_record_larger_than_half_the_bound_is_refused(self, open_log: Callable[..., EmbeddedLog]) -> None:
        """It would displace all others."""
        log = open_log(max_bytes=10 * RECORD_BYTES)

        with pytest.raises(LogError, match="6000 bytes exceeds the limit of 5000"):
            log.append("t", weighing(6 * RECORD_BYTES))


class TestSharing:
    """Several logs on one file, as several processes open them."""

    def test_two_writers_leave_no_hole(self, open_log: Callable[..., EmbeddedLog]) -> None:
        """They share one sequence of offsets."""
        one, other = open_log(), open_log()

        offsets = [log.append("t", weighing(100))[0].offset for log in (one, other, one, other)]

        assert offsets == [0, 1, 2, 3]

    def test_a_topic_created_by_another_is_found(self, open_log: Callable[..., EmbeddedLog]) -> None:
        """Without opening the log again."""
        one, other = open_log(), open_log()
        assert one.partition_count("late") == 0

        other.create_topics({"late": 2})

        assert one.partition_count("late") == 2

    def test_a_waiting_reader_is_woken_by_another_process(
        self, open_log: Callable[..., EmbeddedLog], log_path: Path
    ) -> None:
        """During its poll, not at the end of it."""
        log = open_log()
        reader = log.reader({PARTITION: 0})
        writer = (
            "import sys; from pathlib import Path\n"
            "from streamlearn.log.embedded import EmbeddedLog; from streamlearn.records import NewRecord\n"
            "log = EmbeddedLog(Path(sys.argv[1]), max_bytes=1 << 30)\n"
            "log.append('t', [NewRecord(b'k', b'from afar')]); log.close()\n"
        )
        with subprocess.Popen([sys.executable, "-c", writer, str(log_path)]) as process:
            (record,) = reader.poll([PARTITION], 10, 30.0)
            assert process.wait(30.0) == 0

        assert record.value == b"from afar"
        reader.close()

    def test_a_poll_returns_a_record_larger_than_its_bound(
        self, open_log: Callable[..., EmbeddedLog], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Alone; the next poll returns the next one."""
        monkeypatch.setattr(embedded, "POLL_BYTES", 500)
        log = open_log()
        log.create_topics({"two": 2})
        keys = {partition_of(key, 2): key for key in (b"a", b"b", b"c", b"d")}
        for partition in (0, 1):
            log.append("two", [NewRecord(keys[partition], bytes(1000)), NewRecord(keys[partition], bytes(200))])
        reader = log.reader({TopicPartition("two", partition): 0 for partition in (0, 1)})

        polls = [reader.poll(reader.next_offsets(), 10, 1.0) for _ in range(3)]

        assert [[len(record.value or b"") for record in poll] for poll in polls] == [[1000], [1000], [200, 200]]
        reader.close()

    def test_a_poll_ends_in_time_while_others_write_continuously(self, open_log: Callable[..., EmbeddedLog]) -> None:
        """It does not wait for a quiet moment."""
        log = open_log()
        log.create_topics({"other": 1})
        reader = log.reader({PARTITION: 0})
        stopping = threading.Event()

        def write() -> None:
            while not stopping.is_set():
                log.append("other", weighing(100))

        writer = threading.Thread(target=write)
        writer.start()
        began = time.monotonic()

        records = reader.poll([PARTITION], 10, 0.3)

        took_s = time.monotonic() - began
        stopping.set()
        writer.join(10.0)
        assert (records, took_s < 3.0) == ([], True)
        reader.close()

    def test_waiting_is_cheap_while_others_write_elsewhere(self, open_log: Callable[..., EmbeddedLog]) -> None:
        """A commit to another topic costs one query, not a busy loop."""
        log = open_log()
        log.create_topics({"other": 1})
        reader = log.reader({PARTITION: 0})
        later = threading.Timer(0.05, lambda: log.append("other", weighing(100)))
        later.start()
        began_s = time.process_time()

        assert reader.poll([PARTITION], 10, 0.6) == []

        assert time.process_time() - began_s < 0.25
        later.join(10.0)
        reader.close()

    def test_many_threads_can_open_a_new_file_at_once(self, log_path: Path) -> None:
        """As the processes of the first `run` do."""
        errors: list[BaseException] = []
        barrier = threading.Barrier(8)

        def work() -> None:
            barrier.wait(10.0)
            try:
                log = EmbeddedLog(log_path, max_bytes=1 << 30)
                log.create_topics({"t": 1})
                log.append("t", weighing(100))
                log.close()
            except LogError as error:
                errors.append(error)

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20.0)

        assert errors == []
        with closing(EmbeddedLog(log_path, max_bytes=1 << 30)) as log:
            assert bounds(log) == [(0, 8)]


class TestFailures:
    """A held lock, a full disk, a file that is something else."""

    def test_a_held_lock_ends_the_append_in_time(self, open_log: Callable[..., EmbeddedLog], log_path: Path) -> None:
        """Nothing is acknowledged, the message gives advice, and a later append succeeds."""
        log = open_log()
        with closing(sqlite3.connect(log_path, isolation_level=None)) as holder:
            holder.execute("BEGIN IMMEDIATE")
            with pytest.raises(LogUnavailableError, match=r"locked.*lsof"):
                log.append("t", weighing(100), timeout_s=0.1)
            holder.execute("ROLLBACK")

        assert log.append("t", weighing(100)) == [Position("t", 0, 0)]

    def test_a_full_disk_acknowledges_nothing_and_loses_nothing(
        self, open_log: Callable[..., EmbeddedLog], connections: list[sqlite3.Connection]
    ) -> None:
        """SQLite's own page limit simulates the disk. With space again, appends continue without a gap."""
        log = open_log()
        log.append("t", weighing(100))
        for connection in connections:
            (pages,) = connection.execute("PRAGMA page_count").fetchone()
            connection.execute(f"PRAGMA max_page_count = {pages}")

        with pytest.raises(LogUnavailableError, match="the disk is full; free some space"):
            log.append("t", weighing(RECORD_BYTES, 100))
        assert bounds(log) == [(0, 1)]
        for connection in connections:
            connection.execute("PRAGMA max_page_count = 1000000")

        assert log.append("t", weighing(100)) == [Position("t", 0, 1)]

    @pytest.mark.skipif(os.name != "posix", reason="file size limits are POSIX")
    def test_a_write_that_the_system_refuses_is_not_acknowledged(self, log_path: Path) -> None:
        """A process whose files may not grow gets an error, never a position that is not in the log."""
        program = (
            "import resource, signal, sys; from pathlib import Path\n"
            "from streamlearn.errors import LogUnavailableError\n"
            "from streamlearn.log.embedded import EmbeddedLog; from streamlearn.records import NewRecord\n"
            "log = EmbeddedLog(Path(sys.argv[1]), max_bytes=1 << 30)\n"
            "log.create_topics({'t': 1})\n"
            "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))\n"
            "acknowledged = 0\n"
            "try:\n"
            "    while acknowledged < 10_000:\n"
            "        acknowledged += len(log.append('t', [NewRecord(b'k', bytes(1000))]))\n"
            "except LogUnavailableError as error:\n"
            "    print(acknowledged, error)\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", program, str(log_path)], capture_output=True, text=True, timeout=30, check=True
        )

        acknowledged, _, message = done.stdout.partition(" ")
        assert "the disk" in message
        with closing(EmbeddedLog(log_path, max_bytes=1 << 30)) as log:
            assert bounds(log) == [(0, int(acknowledged))]
            assert len(log.read(PARTITION, 0, 10_000)) == int(acknowledged) > 0

    def test_a_commit_that_fails_is_logged_not_raised(
        self, open_log: Callable[..., EmbeddedLog], log_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Only lag dashboards miss it, so the learner need not stop."""
        monkeypatch.setattr(embedded, "BUSY_TIMEOUT_S", 0.05)
        log = open_log()

        with closing(sqlite3.connect(log_path, isolation_level=None)) as holder, capture_logs() as lines:
            holder.execute("BEGIN IMMEDIATE")
            log.commit({PARTITION: 1})

        assert [line["event"] for line in lines] == ["offsets_not_committed"]

    def test_another_database_is_not_touched(self, log_path: Path) -> None:
        """A mistyped path must not destroy data."""
        log_path.parent.mkdir()
        with closing(sqlite3.connect(log_path)) as other:
            other.execute("CREATE TABLE precious (x)")

        with pytest.raises(LogError, match="expected an embedded log"):
            EmbeddedLog(log_path, max_bytes=1 << 20).create_topics({"t": 1})

        with closing(sqlite3.connect(log_path)) as other:
            assert [row[0] for row in other.execute("SELECT name FROM sqlite_schema")] == ["precious"]

    def test_a_log_of_a_later_version_is_refused(self, open_log: Callable[..., EmbeddedLog], log_path: Path) -> None:
        """A downgrade must not damage it."""
        open_log().close()
        with closing(sqlite3.connect(log_path)) as other:
            other.execute(f"PRAGMA user_version = {sqlite.SCHEMA_VERSION + 1}")

        with pytest.raises(LogError, match=f"got version {sqlite.SCHEMA_VERSION + 1}"):
            EmbeddedLog(log_path, max_bytes=1 << 20).create_topics({"t": 1})

    def test_a_file_that_is_not_a_database_is_refused(self, log_path: Path) -> None:
        """It is not changed, and the message gives advice."""
        log_path.parent.mkdir()
        log_path.write_bytes(b"not a database, but somebody's notes" * 100)

        with pytest.raises(LogError, match="not a log, or damaged: restore it"):
            EmbeddedLog(log_path, max_bytes=1 << 20).create_topics({"t": 1})

        assert log_path.read_bytes().startswith(b"not a database")

    def test_a_folder_that_cannot_be_created_is_unavailable(self, tmp_path: Path) -> None:
        """Here because a file has its name; the next call tries again."""
        (tmp_path / "file").write_text("")

        with closing(EmbeddedLog(tmp_path / "file" / "log", max_bytes=1 << 20)) as log:
            with pytest.raises(LogUnavailableError, match="cannot be created"):
                log.create_topics({"t": 1})
            (tmp_path / "file").unlink()
            log.create_topics({"t": 1})

    def test_nothing_is_created_before_the_first_use(self, log_path: Path) -> None:
        """A process may start while the disk is full."""
        EmbeddedLog(log_path, max_bytes=1 << 20).close()

        assert not log_path.exists()

    def test_a_closed_reader_raises(self, open_log: Callable[..., EmbeddedLog]) -> None:
        """Closing it twice is allowed."""
        reader = open_log().reader({PARTITION: 0})
        reader.close()
        reader.close()

        with pytest.raises(LogError, match="closed"):
            reader.poll([PARTITION], 1, 0.0)


class TestFile:
    """What is on disk."""

    def test_every_commit_is_synced(
        self, open_log: Callable[..., EmbeddedLog], connections: list[sqlite3.Connection]
    ) -> None:
        """WAL with synchronous=FULL (2) is what makes an acknowledgement survive a power cut."""
        open_log().append("t", weighing(100))

        assert len(connections) == 2
        for connection in connections:
            assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
            assert connection.execute("PRAGMA synchronous").fetchone() == (2,)

    def test_any_sqlite_tool_reads_it(self, open_log: Callable[..., EmbeddedLog], log_path: Path) -> None:
        """Headers are JSON, with bytes as Latin-1."""
        open_log().append("t", [NewRecord(b"k", b"v", (("content-type", b"text/plain"), ("bytes", b"\xff")))])

        with closing(sqlite3.connect(log_path)) as other:
            (row,) = other.execute("SELECT key, value, headers FROM records").fetchall()

        assert row == (b"k", b"v", '[["content-type","text/plain"],["bytes","ÿ"]]'.encode())

    def test_a_record_larger_than_a_transaction_is_written_alone(self, open_log: Callable[..., EmbeddedLog]) -> None:
        """The bound of a transaction is not a bound of a record."""
        log = open_log()

        positions = log.append("t", [*weighing(100), *weighing(TRANSACTION_MAX_BYTES + 1), *weighing(100)])

        assert [position.offset for position in positions] == [0, 1, 2]

    def test_a_long_append_takes_several_transactions(self, open_log: Callable[..., EmbeddedLog]) -> None:
        """So that each is bounded; positions stay in order."""
        log = open_log()

        positions = log.append("t", weighing(100, 10_000))

        assert [position.offset for position in positions] == list(range(10_000))


def test_a_poll_shares_its_records_among_partitions(log_path: Path) -> None:
    """A partition with a long backlog does not delay the others."""
    with closing(EmbeddedLog(log_path, max_bytes=1 << 30)) as log:
        log.create_topics({"t": 2})
        log.append("t", [NewRecord(str(i).encode(), b"v") for i in range(400)])
        both = [TopicPartition("t", 0), TopicPartition("t", 1)]
        reader = log.reader(dict.fromkeys(both, 0))

        records = reader.poll(both, 100, 1.0)
        reader.close()

    counts = [sum(record.position.partition == partition for record in records) for partition in (0, 1)]
    assert counts == [50, 50]


@pytest.mark.parametrize("skipping", [True, False])
def test_a_partition_that_cannot_be_read_loses_no_records_of_the_others(
    log_path: Path, monkeypatch: pytest.MonkeyPatch, *, skipping: bool
) -> None:
    """Trimmed under the reader, or a disk error: the next poll returns what the failed one had taken."""
    both = [TopicPartition("t", 0), TopicPartition("t", 1)]
    with closing(EmbeddedLog(log_path, max_bytes=1 << 30)) as log:
        log.create_topics({"t": 2})
        log.append("t", [NewRecord(str(i).encode(), b"v") for i in range(200)])
        reader = log.reader(dict.fromkeys(both, 0))
        if skipping:
            reader.seek(both[0], 10_000)  # out of range, like a trimmed offset
            with pytest.raises(OffsetOutOfRangeError):
                reader.poll(both, 1000, 1.0)
            with pytest.raises(OffsetOutOfRangeError):
                reader.poll(both, 1000, 1.0)
            reader.seek(both[0], 0)
        else:
            read, calls = embedded.read_records, []

            def fails_once(*asked: object, max_bytes: float) -> object:
                calls.append(asked)
                if len(calls) == 2:
                    raise sqlite3.OperationalError("disk I/O error")
                return read(*asked, max_bytes=max_bytes)  # type: ignore[arg-type]

            monkeypatch.setattr(embedded, "read_records", fails_once)
            with pytest.raises(LogError):
                reader.poll(both, 1000, 1.0)

        records = reader.poll(both, 1000, 1.0)
        reader.close()

    assert sorted(record.key or b"" for record in records) == sorted(str(i).encode() for i in range(200))
