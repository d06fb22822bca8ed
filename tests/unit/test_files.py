"""The seam to the disk: whole files, whatever operation fails."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from streamlearn.state.files import DISK, remove_leftovers, write_whole
from streamlearn.testing import FaultyFiles


def test_a_file_appears_whole_from_its_chunks(tmp_path: Path) -> None:
    """Chunks of any bytes-like kind, in order; nothing else stays in the folder; others may not read it."""
    path = tmp_path / "state.bin"

    write_whole(path, [b"one ", bytearray(b"two "), memoryview(b"three")])

    assert path.read_bytes() == b"one two three"
    assert list(tmp_path.iterdir()) == [path]
    assert path.stat().st_mode & 0o007 == 0


def test_any_single_fault_leaves_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    """Fail each operation in turn: what is read after it is one of the two, whole, and nothing is left aside."""
    path = tmp_path / "state.bin"
    seen = set()

    for fail_at in itertools.count(1):
        path.write_bytes(b"old")
        try:
            write_whole(path, [b"new ", b"state"], FaultyFiles(fail_at=fail_at))
        except OSError:
            seen.add(path.read_bytes())
            assert list(tmp_path.iterdir()) == [path]
        else:
            break

    assert path.read_bytes() == b"new state"
    assert seen == {b"old", b"new state"}
    assert fail_at == 6, "write and its sync, replace, sync_folder and its sync: five faults, then a clean run"


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    """Nothing is made up."""
    with pytest.raises(FileNotFoundError):
        write_whole(tmp_path / "nowhere" / "state.bin", [b"x"])


def test_leftovers_of_a_killed_process_are_removed_and_nothing_else(tmp_path: Path) -> None:
    """What was written aside begins with a dot and ends in .tmp."""
    (tmp_path / ".state.bin.4711.tmp").write_bytes(b"half")
    kept = [tmp_path / name for name in ("state.bin", "mine.tmp", ".hidden")]
    for path in kept:
        path.write_bytes(b"whole")

    remove_leftovers(tmp_path)

    assert sorted(tmp_path.iterdir()) == sorted(kept)


def test_removing_what_is_gone_is_no_error(tmp_path: Path) -> None:
    """Two processes may clean up."""
    path = tmp_path / "state.bin"
    path.write_bytes(b"x")

    DISK.remove(path)
    DISK.remove(path)

    assert not path.exists()
