"""The fence: only the newest learner can write; late writes of an older one are skipped."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from streamlearn.errors import StateLockedError
from streamlearn.ledger.store import Store
from streamlearn.ledger.store_view import StoreView
from streamlearn.records import TopicPartition
from streamlearn.state.checkpoint import (
    Checkpoint,
    Saver,
    load_newest,
    path_of,
    save_checkpoint,
    steps_in,
)
from streamlearn.state.checkpoint import newest_epoch as newest_of_checkpoints
from streamlearn.state.fence import Fence
from streamlearn.state.files import DISK, write_whole
from streamlearn.state.journal import Journal, newest_epoch, read_journal
from streamlearn.state.publish import POINTER, PublishedDir, Publisher

A = TopicPartition("samples", 0)


def checkpoint(step: int, epoch: int = 0) -> Checkpoint:
    return Checkpoint(step, {A: step}, {"w": np.zeros(2, np.float32)}, {}, epoch)


def saver(folder: Path, fence: Fence, keep: int = 9) -> Saver:
    return Saver(folder, keep=keep, on_saved=lambda _: None, files=fence)


def two_learners(folder: Path) -> tuple[Fence, Fence]:
    """The fences of an older and a newer learner."""
    return Fence.take(folder / "epoch"), Fence.take(folder / "epoch")


def content(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


class TestEpoch:
    def test_each_learner_takes_the_next_one(self, tmp_path: Path) -> None:
        """Starting with 1."""
        assert [Fence.take(tmp_path / "epoch").epoch for _ in range(3)] == [1, 2, 3]

    @pytest.mark.parametrize("damage", [b"", b"\x00\x00", None])
    def test_grows_even_if_its_file_is_lost(self, tmp_path: Path, damage: bytes | None) -> None:
        """From the largest epoch that is known otherwise."""
        path = tmp_path / "epoch"
        Fence.take(path)
        path.unlink() if damage is None else path.write_bytes(damage)

        assert Fence.take(path, after=7).epoch == 8

    def test_the_newest_may_write(self, tmp_path: Path) -> None:
        """However many took an epoch before."""
        _, newer = two_learners(tmp_path)

        newer.check()

    def test_an_older_one_may_not(self, tmp_path: Path) -> None:
        """The error has both epochs, and exit code 3."""
        older, _ = two_learners(tmp_path)

        with pytest.raises(StateLockedError, match=r"epoch 2.*epoch 1") as caught:
            older.check()
        assert caught.value.exit_code == 3

    def test_without_a_fence_nothing_is_checked(self) -> None:
        """For tools that run without a learner."""
        DISK.check()


class TestAnOlderLearner:
    def test_replaces_nothing(self, tmp_path: Path) -> None:
        """The file is unchanged, and no temporary file is left."""
        older, _ = two_learners(tmp_path)
        path = tmp_path / "state.bin"
        path.write_bytes(b"old")
        before = content(tmp_path)

        with pytest.raises(StateLockedError):
            write_whole(path, [b"new"], older)

        assert content(tmp_path) == before

    def test_is_stopped_after_a_late_rename(self, tmp_path: Path) -> None:
        """If it was replaced between the check and the rename, the second check raises."""

        class Late(Fence):
            looks = 0

            def write(self, path: Path, chunks: object) -> None:
                path.write_bytes(b"new")

            def check(self) -> None:
                self.looks += 1
                if self.looks == 2:
                    Fence.take(tmp_path / "epoch")
                super().check()

        late = Late(tmp_path / "epoch", Fence.take(tmp_path / "epoch").epoch)

        with pytest.raises(StateLockedError):
            write_whole(tmp_path / "state.bin", [b"new"], late)

    def test_removes_nothing(self, tmp_path: Path) -> None:
        """Not even old files."""
        older, _ = two_learners(tmp_path)

        with pytest.raises(StateLockedError):
            older.remove(tmp_path / "epoch")
        assert (tmp_path / "epoch").exists()

    def test_saves_no_checkpoint(self, tmp_path: Path) -> None:
        """The error of the saver's thread is raised in the loop."""
        older, _ = two_learners(tmp_path)
        saving = saver(tmp_path / "checkpoints", older)
        before = content(tmp_path)

        saving.submit(checkpoint(5))
        with pytest.raises(StateLockedError):
            saving.wait(10.0)

        assert content(tmp_path) == before
        saving.close(10.0)

    def test_publishes_no_teacher(self, tmp_path: Path) -> None:
        """Neither file nor pointer."""
        older, newer = two_learners(tmp_path)
        folder = tmp_path / "published"
        Publisher(folder, keep=2, clock=lambda: 1.0, files=newer).publish(3, {"w": np.zeros(1)}, {})
        before = content(folder)

        with pytest.raises(StateLockedError):
            Publisher(folder, keep=2, clock=lambda: 2.0, files=older).publish(4, {"w": np.zeros(1)}, {})

        assert content(folder) == before

    @pytest.mark.parametrize("do", [lambda j: j.append(2, {A: 2}), Journal.sync, lambda j: j.cut_after(0)])
    def test_changes_no_journal(self, tmp_path: Path, do: Callable[[Journal], None]) -> None:
        """`sync` raises too, because the flush of the ledger comes after it."""
        older = Fence.take(tmp_path / "epoch")
        journal = Journal(tmp_path / "journal", max_bytes=1 << 20, files=older)
        journal.append(1, {A: 1})
        newer = Fence.take(tmp_path / "epoch")
        before = content(tmp_path)

        with pytest.raises(StateLockedError):
            do(journal)

        assert newer.epoch == 2
        assert content(tmp_path) == before
        journal.close()


class TestLateWrites:
    def test_a_late_journal_line_is_skipped(self, tmp_path: Path) -> None:
        """It was written between check and fencing; the next learner formed that step from other records."""
        older, newer = (Journal(tmp_path, max_bytes=1 << 20, files=Fence(epoch=epoch)) for epoch in (1, 2))
        older.append(1, {A: 8})
        newer.cut_after(1)
        newer.append(2, {A: 16})
        older.append(3, {A: 99})
        older.append(7, {A: 99})
        newer.append(3, {A: 24})

        assert list(read_journal(tmp_path, 0)) == [(1, {A: 8}), (2, {A: 16}), (3, {A: 24})]

    def test_cutting_keeps_the_lines_after_it(self, tmp_path: Path) -> None:
        """Its step number does not count."""
        older, newer = (Journal(tmp_path, max_bytes=1 << 20, files=Fence(epoch=epoch)) for epoch in (1, 2))
        newer.append(1, {A: 8})
        older.append(9, {A: 99})
        newer.append(2, {A: 16})

        Journal(tmp_path, max_bytes=1 << 20).cut_after(2)

        assert [step for step, _ in read_journal(tmp_path, 0)] == [1, 2]

    def test_a_late_checkpoint_is_not_the_newest(self, tmp_path: Path) -> None:
        """Even with a larger step."""
        for saved in (checkpoint(90, 2), checkpoint(100, 1)):
            save_checkpoint(tmp_path, saved)

        found = load_newest(tmp_path)

        assert found is not None
        assert (found.step, found.epoch) == (90, 2)

    def test_a_late_checkpoint_is_removed_first(self, tmp_path: Path) -> None:
        """A save removes the oldest by epoch."""
        for saved in (checkpoint(90, 2), checkpoint(100, 1)):
            save_checkpoint(tmp_path, saved)

        saving = saver(tmp_path, Fence(epoch=2), keep=2)
        saving.submit(checkpoint(95))
        saving.close(10.0)

        assert steps_in(tmp_path) == [90, 95]

    def test_a_checkpoint_without_a_header_is_reported_as_corrupt(self, tmp_path: Path) -> None:
        """It is not silently skipped."""
        for saved in (checkpoint(1, 1), checkpoint(2, 1)):
            save_checkpoint(tmp_path, saved)
        path_of(tmp_path, 2).write_bytes(b"short")

        found = load_newest(tmp_path)

        assert found is not None
        assert found.step == 1
        assert len(list(tmp_path.glob("*.corrupt"))) == 1


class TestEpochInFiles:
    def test_a_checkpoint_has_the_epoch(self, tmp_path: Path) -> None:
        """Set by the saver."""
        saving = saver(tmp_path, Fence(epoch=4))
        saving.submit(checkpoint(1))
        saving.close(10.0)

        assert newest_of_checkpoints(tmp_path) == 4

    def test_a_teacher_and_its_pointer_have_the_epoch(self, tmp_path: Path) -> None:
        """In the header."""
        Publisher(tmp_path, keep=2, clock=lambda: 1.0, files=Fence(epoch=4)).publish(1, {"w": np.zeros(1)}, {})

        newest = PublishedDir(tmp_path).newest()
        assert newest is not None
        assert newest.metadata["epoch"] == "4"
        assert b'"epoch": "4"' in (tmp_path / POINTER).read_bytes()

    def test_a_journal_has_the_epoch(self, tmp_path: Path) -> None:
        """In each line."""
        journal = Journal(tmp_path, max_bytes=1 << 20, files=Fence(epoch=4))
        journal.append(1, {A: 1})

        assert newest_epoch(tmp_path) == 4
        journal.close()


class TestStore:
    @pytest.mark.parametrize("ends", [Store.flush, Store.close])
    def test_writes_nothing_for_an_older_learner(self, tmp_path: Path, ends: Callable[[Store], None]) -> None:
        """What it had not flushed is discarded."""
        older = Fence.take(tmp_path / "epoch")
        store = Store(tmp_path / "store", tables=("t",), rings=(), may_write=older.check)
        store.begin(1)
        store.tables["t"].put(b"k", b"v")
        store.end()
        Fence.take(tmp_path / "epoch")

        with pytest.raises(StateLockedError, match="taken over this state folder"):
            ends(store)

        with contextlib.suppress(StateLockedError):
            store.close()
        with StoreView(tmp_path / "store").read() as get:
            assert get("t", b"k") is None
