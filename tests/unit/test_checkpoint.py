"""Checkpoints: weights and offsets in one file (I1), replaced as a whole and verified on load."""

from __future__ import annotations

import errno
import itertools
import threading
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import structlog
from harness.fakes import FaultyFiles

from streamlearn.errors import CheckpointError
from streamlearn.records import TopicPartition
from streamlearn.state.checkpoint import (
    Checkpoint,
    Saved,
    Saver,
    load_checkpoint,
    load_newest,
    path_of,
    save_checkpoint,
    steps_in,
)
from streamlearn.state.files import Chunk, Files


def checkpoint(step: int) -> Checkpoint:
    arrays = {
        "student.w": np.full((3, 2), float(step), np.float32),
        "none": np.zeros((0, 4), np.uint8),
        "scalar": np.array(step),
    }
    return Checkpoint(step, {TopicPartition("samples", 0): 10 * step}, arrays, {"accounts": {"read": step}, "t": 0.1})


def same(found: Checkpoint | None, expected: Checkpoint) -> bool:
    return (
        found is not None
        and (found.step, found.next_offsets, found.extra) == (expected.step, expected.next_offsets, expected.extra)
        and found.arrays.keys() == expected.arrays.keys()
        and all(np.array_equal(found.arrays[name], array) for name, array in expected.arrays.items())
        and all(found.arrays[name].shape == array.shape for name, array in expected.arrays.items())
    )


class TestRoundTrip:
    def test_loads_what_was_saved(self, tmp_path: Path) -> None:
        """Arrays, empty ones too, offsets and the JSON part (I1)."""
        save_checkpoint(tmp_path, checkpoint(7))

        assert same(load_newest(tmp_path), checkpoint(7))

    def test_an_empty_folder_has_none(self, tmp_path: Path) -> None:
        """At the first start this is no error."""
        assert load_newest(tmp_path) is None


class TestCorruption:
    @pytest.mark.parametrize("at", [0, 7, 9, 60, -1])
    def test_one_flipped_bit_is_found(self, tmp_path: Path, at: int) -> None:
        """In the magic, the format, the digest, the header or the last weight. It is not taken for another format."""
        save_checkpoint(tmp_path, checkpoint(1))
        blob = bytearray(path_of(tmp_path, 1).read_bytes())
        blob[at] ^= 1
        path_of(tmp_path, 1).write_bytes(blob)

        with pytest.raises(CheckpointError) as caught:
            load_checkpoint(path_of(tmp_path, 1))
        assert caught.type is CheckpointError

    def test_the_one_before_is_loaded_and_the_corruption_is_logged(self, tmp_path: Path) -> None:
        """The torn file is set aside."""
        save_checkpoint(tmp_path, checkpoint(1))
        save_checkpoint(tmp_path, checkpoint(2))
        path_of(tmp_path, 2).write_bytes(path_of(tmp_path, 2).read_bytes()[:-5])

        with structlog.testing.capture_logs() as lines:
            found = load_newest(tmp_path)

        assert same(found, checkpoint(1))
        assert [(line["event"], line["step"]) for line in lines] == [("checkpoint_corrupt", 2)]
        assert steps_in(tmp_path) == [1]

    def test_the_one_before_is_loaded_if_the_disk_cannot_read_it(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A bad sector is a read error."""
        save_checkpoint(tmp_path, checkpoint(1))
        save_checkpoint(tmp_path, checkpoint(2))
        read = Path.read_bytes

        def bad_sector(path: Path) -> bytes:
            if path == path_of(tmp_path, 2):
                raise OSError(errno.EIO, "Input/output error")
            return read(path)

        monkeypatch.setattr(Path, "read_bytes", bad_sector)

        assert same(load_newest(tmp_path), checkpoint(1))
        assert steps_in(tmp_path) == [1]

    def test_all_files_set_aside_now_are_kept(self, tmp_path: Path) -> None:
        """Those of an earlier incident are removed, so that their number is bounded (I6)."""
        for step in (1, 2, 3):
            save_checkpoint(tmp_path, checkpoint(step))
        (tmp_path / "checkpoint-000000000000.corrupt").write_bytes(b"long ago")
        for step in (2, 3):
            path_of(tmp_path, step).write_bytes(b"torn")

        found = load_newest(tmp_path)

        assert same(found, checkpoint(1))
        assert [path.stem[-1] for path in sorted(tmp_path.glob("*.corrupt"))] == ["2", "3"]

    def test_no_valid_checkpoint_is_an_error(self, tmp_path: Path) -> None:
        """To start from scratch silently would discard what was learned."""
        save_checkpoint(tmp_path, checkpoint(1))
        path_of(tmp_path, 1).write_bytes(b"")

        with pytest.raises(CheckpointError, match="no checkpoint is valid"):
            load_newest(tmp_path)


@pytest.mark.parametrize("lasting", [False, True])
def test_any_single_fault_leaves_the_old_or_the_new_checkpoint(tmp_path: Path, *, lasting: bool) -> None:
    """Fail the first operation of a save, then the second, and so on until a save has no fault.

    After each, one of the two is loaded, and no temporary file is left.
    """
    for fail_at in itertools.count(1):
        save_checkpoint(tmp_path, checkpoint(1))
        try:
            save_checkpoint(tmp_path, checkpoint(2), FaultyFiles(fail_at=fail_at, lasting=lasting))
        except OSError:
            found = load_newest(tmp_path)
            assert same(found, checkpoint(1)) or same(found, checkpoint(2))
            path_of(tmp_path, 2).unlink(missing_ok=True)
        else:
            break

    assert fail_at == 6, "write, sync, replace, sync_folder, sync: five faults, then a clean run"
    assert not list(tmp_path.glob(".*.tmp"))


class SlowFiles(Files):
    """A disk on which writes wait for `go`."""

    def __init__(self) -> None:
        self.go = threading.Event()

    def write(self, path: Path, chunks: Iterable[Chunk]) -> None:
        assert self.go.wait(10)
        super().write(path, chunks)


class TestSaver:
    def test_refuses_a_second_save_while_one_is_in_progress(self, tmp_path: Path) -> None:
        """It is not queued: newer state is saved later."""
        disk = SlowFiles()
        saver = Saver(tmp_path, keep=2, on_saved=lambda _: None, files=disk)

        first, second = saver.submit(checkpoint(1)), saver.submit(checkpoint(2))
        disk.go.set()
        saver.close(10)

        assert (first, second) == (True, False)
        assert steps_in(tmp_path) == [1]

    def test_keeps_the_newest_and_reports_each(self, tmp_path: Path) -> None:
        """Old ones are removed once there are more than `keep`."""
        saves: list[Saved] = []
        saver = Saver(tmp_path, keep=2, on_saved=saves.append)

        for step in (1, 2, 3):
            assert saver.submit(checkpoint(step))
            assert saver.wait(10)
        saver.close(10)

        assert steps_in(tmp_path) == [2, 3]
        assert [saved.step for saved in saves] == [1, 2, 3]
        assert saves[0].size_bytes == path_of(tmp_path, 3).stat().st_size

    def test_a_failed_save_is_raised_in_the_learners_thread(self, tmp_path: Path) -> None:
        """A full disk stops the learner; it is not only logged."""
        saver = Saver(tmp_path, keep=2, on_saved=lambda _: None, files=FaultyFiles(fail_at=1))
        saver.submit(checkpoint(1))

        with pytest.raises(OSError, match="fault"):
            saver.wait(10)

        saver.close(10)

    def test_removes_what_a_killed_save_left(self, tmp_path: Path) -> None:
        """Temporary files."""
        (tmp_path / ".checkpoint-000000000001.ckpt.99.tmp").write_bytes(b"half")

        Saver(tmp_path, keep=2, on_saved=lambda _: None).close(1)

        assert not list(tmp_path.iterdir())
