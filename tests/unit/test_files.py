"""Files are replaced as a whole, whichever operation fails."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from harness.fakes import FaultyFiles

from streamlearn.state.files import DISK, remove_leftovers, write_whole


def test_a_file_is_written_from_its_chunks(tmp_path: Path) -> None:
    """Bytes-like chunks, in order. No temporary file stays, and other users cannot read it."""
    path = tmp_path / "state.bin"

    write_whole(path, [b"one ", bytearray(b"two "), memoryview(b"three")])

    assert path.read_bytes() == b"one two three"
    assert list(tmp_path.iterdir()) == [path]
    assert path.stat().st_mode & 0o007 == 0


def test_any_single_fault_leaves_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    """Fail each operation in turn: one of the two is read afterwards, and no temporary file is left."""
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


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    """It is not created."""
    with pytest.raises(FileNotFoundError):
        write_whole(tmp_path / "nowhere" / "state.bin", [b"x"])


def test_only_temporary_files_are_leftovers(tmp_path: Path) -> None:
    """Their names start with a dot and end in .tmp."""
    (tmp_path / ".state.bin.4711.tmp").write_bytes(b"half")
    kept = [tmp_path / name for name in ("state.bin", "mine.tmp", ".hidden")]
    for path in kept:
        path.write_bytes(b"whole")

    remove_leftovers(tmp_path)

    assert sorted(tmp_path.iterdir()) == sorted(kept)


def test_removing_a_missing_file_is_no_error(tmp_path: Path) -> None:
    """Two processes may clean up at once."""
    path = tmp_path / "state.bin"
    path.write_bytes(b"x")

    DISK.remove(path)
    DISK.remove(path)

    assert not path.exists()
