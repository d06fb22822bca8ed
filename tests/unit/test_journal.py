"""The journal: the records of each step, through kills and torn lines (D4)."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from harness.fakes import FaultyFiles
from structlog.testing import capture_logs

from streamlearn.errors import StateError
from streamlearn.records import Offsets, TopicPartition
from streamlearn.state import journal as module
from streamlearn.state.fence import Fence
from streamlearn.state.journal import Journal, newest_epoch, read_journal

A, B = TopicPartition("samples", 0), TopicPartition("labels", 1)


def cut(step: int) -> Offsets:
    return {A: 64 * step, B: step}


def write(folder: Path, steps: range, max_bytes: int = 1 << 20) -> None:
    journal = Journal(folder, max_bytes=max_bytes)
    for step in steps:
        journal.append(step, cut(step))
    journal.close()


def _size_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


class TestReading:
    def test_gives_the_steps_after_one(self, tmp_path: Path) -> None:
        """In order, with the offsets of every partition."""
        write(tmp_path, range(1, 6))

        assert list(read_journal(tmp_path, 3)) == [(4, cut(4)), (5, cut(5))]

    def test_an_empty_folder_has_none(self, tmp_path: Path) -> None:
        """At the first start."""
        assert list(read_journal(tmp_path, 0)) == []

    @pytest.mark.parametrize("torn_bytes", [1, 5, 30])
    def test_ends_before_a_torn_line(self, tmp_path: Path, torn_bytes: int) -> None:
        """A kill during a write costs only that line."""
        write(tmp_path, range(1, 4))
        segment = next(tmp_path.iterdir())
        segment.write_bytes(segment.read_bytes()[:-torn_bytes])

        assert [step for step, _ in read_journal(tmp_path, 0)] == [1, 2]

    def test_a_flipped_bit_ends_it(self, tmp_path: Path) -> None:
        """Offsets that fail the CRC are not used."""
        write(tmp_path, range(1, 4))
        segment = next(tmp_path.iterdir())
        segment.write_bytes(segment.read_bytes().replace(b"128", b"129"))

        assert [step for step, _ in read_journal(tmp_path, 0)] == [1]

    def test_a_missing_beginning_is_an_error(self, tmp_path: Path) -> None:
        """Removed steps cannot be repeated."""
        write(tmp_path, range(5, 8))

        with pytest.raises(StateError, match=r"expected step 3, found 5: .*; restore the files .* start from scratch"):
            list(read_journal(tmp_path, 2))


class TestAppending:
    def test_continues_after_a_torn_line(self, tmp_path: Path) -> None:
        """`cut_after` removes the torn line and the lines after the step."""
        write(tmp_path, range(1, 6))
        segment = next(tmp_path.iterdir())
        segment.write_bytes(segment.read_bytes() + b"0000")

        journal = Journal(tmp_path, max_bytes=1 << 20)
        journal.cut_after(3)
        journal.append(4, {A: 999})
        journal.close()

        assert list(read_journal(tmp_path, 2)) == [(3, cut(3)), (4, {A: 999})]

    def test_a_new_segment_is_in_its_folder_before_a_line_is_in_it(self, tmp_path: Path) -> None:
        """Else a power failure could remove the file with its synced lines."""
        journal = Journal(tmp_path, max_bytes=1 << 20, files=FaultyFiles(fail_at=1))

        with pytest.raises(OSError, match="sync_folder"):
            journal.append(1, cut(1))

        assert list(read_journal(tmp_path, 0)) == []

    @pytest.mark.parametrize("lasting", [False, True])
    def test_any_fault_keeps_the_appended_lines(self, tmp_path: Path, *, lasting: bool) -> None:
        """Fail each operation in turn. The learner stops, and the next one continues after the last complete line."""
        for fail_at in itertools.count(1):
            folder, taken = tmp_path / str(fail_at), 0
            journal = Journal(folder, max_bytes=1 << 20, files=FaultyFiles(fail_at=fail_at, lasting=lasting))
            failed = False
            try:
                for step in range(1, 6):
                    journal.append(step, cut(step))
                    taken = step
                    journal.sync()
                journal.close()
            except OSError:
                failed = True
            found = [step for step, _ in read_journal(folder, 0)]
            assert found == list(range(1, taken + 1))
            again = Journal(folder, max_bytes=1 << 20)
            again.cut_after(taken)
            again.append(taken + 1, cut(taken + 1))
            again.close()
            assert list(read_journal(folder, 0)) == [(step, cut(step)) for step in range(1, taken + 2)]
            if not failed:
                break

        assert fail_at == 14, "a new segment in its folder (2), five lines and their syncs, one at the end; a clean run"

    def test_is_bounded_and_keeps_what_the_oldest_checkpoint_needs(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Above `max_bytes` the oldest segments are removed (I6), but no step after the oldest kept checkpoint."""
        monkeypatch.setattr(module, "SEGMENT_BYTES", 500)
        journal, oldest = Journal(tmp_path, max_bytes=4_000), 0

        for step in range(1, 401):
            journal.append(step, cut(step))
            if step % 20 == 0:
                oldest = step - 15
                journal.keep_after(oldest)
            assert [found for found, _ in read_journal(tmp_path, oldest)] == list(range(oldest + 1, step + 1))
            assert _size_bytes(tmp_path) < 4_000 + 600
            assert journal.load < 1.0

        journal.close()
        with pytest.raises(StateError, match="steps are missing"):
            list(read_journal(tmp_path, 100))

    def test_needed_segments_may_exceed_the_bound(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """It is logged once, and again after the load fell below half of the bound."""
        monkeypatch.setattr(module, "SEGMENT_BYTES", 500)
        journal = Journal(tmp_path, max_bytes=2_000)

        with capture_logs() as lines:
            for step in range(1, 101):
                journal.append(step, cut(step))
            assert journal.load == pytest.approx(_size_bytes(tmp_path) / 2_000)
            journal.keep_after(100)
            assert journal.load < 0.5
            for step in range(101, 201):
                journal.append(step, cut(step))
        journal.close()

        assert [step for step, _ in read_journal(tmp_path, 100)] == list(range(101, 201))
        assert [(line["event"], line["log_level"]) for line in lines] == [("journal_full", "warning")] * 2

    def test_segments_of_earlier_starts_count(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The bound also holds for many restarts between two checkpoints."""
        monkeypatch.setattr(module, "SEGMENT_BYTES", 500)
        for step in range(1, 101):
            journal = Journal(tmp_path, max_bytes=2_000, files=Fence(epoch=step))
            journal.keep_after(10)
            journal.cut_after(step - 1)
            journal.append(step, cut(step))
            journal.close()

        assert journal.load == pytest.approx(_size_bytes(tmp_path) / 2_000, abs=0.4)
        assert journal.load > 1.0
        assert [step for step, _ in read_journal(tmp_path, 10)] == list(range(11, 101))

    def test_cut_after_removes_whole_segments(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Those after the step."""
        monkeypatch.setattr(module, "SEGMENT_BYTES", 200)
        write(tmp_path, range(1, 30))

        Journal(tmp_path, max_bytes=1 << 20).cut_after(4)

        assert [step for step, _ in read_journal(tmp_path, 0)] == [1, 2, 3, 4]


class TestAFencedLearner:
    """Its late writes are in a segment of its own, at any step relative to those of the next learner."""

    @pytest.mark.parametrize("after", [0, 5, 9, 10, 11, 15, 19, 20])
    @pytest.mark.parametrize("late", [6, 11, 14, 21])
    @pytest.mark.parametrize("segment_bytes", [100, 400, 8 << 20])
    def test_a_late_line_in_a_new_segment_is_skipped(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int, late: int, segment_bytes: int
    ) -> None:
        """Its segment starts before, at or right after a step of the next learner."""
        monkeypatch.setattr(module, "SEGMENT_BYTES", segment_bytes)
        older, newer = (Journal(tmp_path, max_bytes=1 << 20, files=Fence(epoch=epoch)) for epoch in (1, 2))
        taken_over_at = 6 if late == 6 else 5
        for step in range(1, taken_over_at):
            older.append(step, cut(step))
        newer.cut_after(taken_over_at - 1)
        for step in range(taken_over_at, 21):
            newer.append(step, cut(step))
        older.close()  # as if it were full: the late line starts the next one

        older.append(late, {A: 9999})

        assert list(read_journal(tmp_path, after)) == [(step, cut(step)) for step in range(after + 1, 21)]
        assert newest_epoch(tmp_path) == 2
        third = Journal(tmp_path, max_bytes=1 << 20, files=Fence(epoch=3))
        third.cut_after(20)
        third.append(21, cut(21))
        assert list(read_journal(tmp_path, after)) == [(step, cut(step)) for step in range(after + 1, 22)]
        for journal in (older, newer, third):
            journal.close()

    def test_a_torn_late_line_is_skipped(self, tmp_path: Path) -> None:
        """It was killed during the write."""
        older, newer = (Journal(tmp_path, max_bytes=1 << 20, files=Fence(epoch=epoch)) for epoch in (1, 2))
        older.append(1, cut(1))
        (segment,) = tmp_path.iterdir()
        newer.cut_after(1)
        newer.append(2, cut(2))

        segment.write_bytes(segment.read_bytes() + b"0123")

        assert list(read_journal(tmp_path, 0)) == [(1, cut(1)), (2, cut(2))]
        for journal in (older, newer):
            journal.close()

    def test_a_cut_before_the_next_learner_removes_a_late_line(self, tmp_path: Path) -> None:
        """A third learner restarts from before the second one: no line of the first may count again."""
        older, newer, third = (Journal(tmp_path, max_bytes=1 << 20, files=Fence(epoch=epoch)) for epoch in (1, 2, 3))
        for step in (1, 2):
            older.append(step, cut(step))
        newer.append(3, cut(3))
        older.append(4, {A: 9999})

        third.cut_after(2)

        assert list(read_journal(tmp_path, 0)) == [(1, cut(1)), (2, cut(2))]
        for journal in (older, newer):
            journal.close()

    def test_a_damaged_line_is_not_skipped(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The steps after it are not used, although their lines are complete."""
        monkeypatch.setattr(module, "SEGMENT_BYTES", 100)
        write(tmp_path, range(1, 11))
        segment = min(tmp_path.iterdir())
        segment.write_bytes(segment.read_bytes()[:-1] + b"x")

        assert [step for step, _ in read_journal(tmp_path, 0)] == [1, 2]
