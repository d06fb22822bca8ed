"""The journal: which records formed which step, through kills and torn lines (D4)."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from streamlearn.errors import StateError
from streamlearn.records import Offsets, TopicPartition
from streamlearn.state import journal as module
from streamlearn.state.journal import Journal, read_journal
from streamlearn.testing import FaultyFiles

A, B = TopicPartition("samples", 0), TopicPartition("labels", 1)


def cut(step: int) -> Offsets:
    return {A: 64 * step, B: step}


def write(folder: Path, steps: range, max_bytes: int = 1 << 20) -> None:
    journal = Journal(folder, max_bytes=max_bytes)
    for step in steps:
        journal.append(step, cut(step))
    journal.close()


class TestReading:
    def test_gives_the_steps_after_one(self, tmp_path: Path) -> None:
        """In order, with the offsets of every partition."""
        write(tmp_path, range(1, 6))

        assert list(read_journal(tmp_path, 3)) == [(4, cut(4)), (5, cut(5))]

    def test_an_empty_folder_has_none(self, tmp_path: Path) -> None:
        """The first start finds nothing."""
        assert list(read_journal(tmp_path, 0)) == []

    @pytest.mark.parametrize("torn_bytes", [1, 5, 30])
    def test_ends_before_a_torn_line(self, tmp_path: Path, torn_bytes: int) -> None:
        """A kill in the middle of a write costs that line and no other."""
        write(tmp_path, range(1, 4))
        segment = next(tmp_path.iterdir())
        segment.write_bytes(segment.read_bytes()[:-torn_bytes])

        assert [step for step, _ in read_journal(tmp_path, 0)] == [1, 2]

    def test_a_flipped_bit_ends_it(self, tmp_path: Path) -> None:
        """Offsets that cannot be trusted are not followed."""
        write(tmp_path, range(1, 4))
        segment = next(tmp_path.iterdir())
        segment.write_bytes(segment.read_bytes().replace(b"128", b"129"))

        assert [step for step, _ in read_journal(tmp_path, 0)] == [1]

    def test_a_missing_beginning_is_an_error(self, tmp_path: Path) -> None:
        """Steps that were removed cannot be formed again as they were, and nobody pretends."""
        write(tmp_path, range(5, 8))

        with pytest.raises(StateError, match="wanted step 3, found 5"):
            list(read_journal(tmp_path, 2))


class TestAppending:
    def test_goes_on_after_a_torn_line(self, tmp_path: Path) -> None:
        """`cut_after` removes the torn end and what came after the step."""
        write(tmp_path, range(1, 6))
        segment = next(tmp_path.iterdir())
        segment.write_bytes(segment.read_bytes() + b"0000")

        journal = Journal(tmp_path, max_bytes=1 << 20)
        journal.cut_after(3)
        journal.append(4, {A: 999})
        journal.close()

        assert list(read_journal(tmp_path, 2)) == [(3, cut(3)), (4, {A: 999})]

    def test_a_new_segment_is_in_its_folder_before_a_line_is_in_it(self, tmp_path: Path) -> None:
        """Else a power cut takes the file, and with it lines that were synced."""
        journal = Journal(tmp_path, max_bytes=1 << 20, files=FaultyFiles(fail_at=1))

        with pytest.raises(OSError, match="sync_folder"):
            journal.append(1, cut(1))

        assert list(read_journal(tmp_path, 0)) == []

    @pytest.mark.parametrize("lasting", [False, True])
    def test_any_fault_keeps_the_lines_that_were_taken(self, tmp_path: Path, *, lasting: bool) -> None:
        """Fail each operation in turn; the learner ends then, and the next one goes on after the last whole line."""
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

    def test_is_bounded_and_keeps_the_newest(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Past `max_bytes` the oldest segments go (I6)."""
        monkeypatch.setattr(module, "SEGMENT_BYTES", 500)

        write(tmp_path, range(1, 400), max_bytes=2_000)

        assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 2_000 + 3 * 600
        assert [step for step, _ in read_journal(tmp_path, 390)] == list(range(391, 400))

    def test_cut_after_reaches_over_segments(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Whole segments after the step are removed."""
        monkeypatch.setattr(module, "SEGMENT_BYTES", 200)
        write(tmp_path, range(1, 30))

        Journal(tmp_path, max_bytes=1 << 20).cut_after(4)

        assert [step for step, _ in read_journal(tmp_path, 0)] == [1, 2, 3, 4]
