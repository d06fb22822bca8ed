"""Fencing token against zombie writers: a learner that was replaced must not write to the state folder any more.

The lock of the folder keeps a second learner out while the first one lives. The lock can be lost: its file removed, the
folder moved, a network disk without locks. So each learner takes the next epoch at its start. It checks that no newer
epoch was taken before each step in the journal, before a flush of the ledger, and before and after each rename. If one
was, it raises and writes nothing more.

A process can be suspended between the check and the write. What it writes late is skipped by its epoch where it is
read, in a journal line or a checkpoint. docs/reliability.md lists what remains.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from streamlearn.errors import StateLockedError
from streamlearn.state.files import Chunk, Files, write_whole
from streamlearn.state.kill_points import reached


class Fence(Files):
    """The disk, for the learner with the newest epoch only. Without a path nothing is checked."""

    def __init__(self, path: Path | None = None, epoch: int = 0) -> None:
        """`epoch` is larger than those of all earlier learners."""
        self._path, self.epoch = path, epoch

    @classmethod
    def take(cls, path: Path, *, after: int = 0) -> Fence:
        """Take the next epoch, durably. The caller holds the folder's lock, so that epochs are unique.

        `after` is the largest epoch in journal and checkpoints: the file at `path` may be lost.

        Raises:
            OSError: the file cannot be written; no epoch was taken.
        """
        fence = cls(path, max(_read(path), after) + 1)
        reached("epoch", "begin")
        write_whole(path, [b"%d\n" % fence.epoch], name="epoch")
        reached("epoch", "end")
        return fence

    def check(self) -> None:
        """Check that this learner may write.

        Raises:
            StateLockedError: another learner has taken over.
        """
        if self._path is not None and (newest := _read(self._path)) != self.epoch:
            msg = (
                f"{self._path.parent}: another learner (epoch {newest}) has taken over this state folder; this one "
                f"(epoch {self.epoch}) writes nothing more; make sure that only one is started"
            )
            raise StateLockedError(msg)

    def write(self, path: Path, chunks: Iterable[Chunk]) -> None:
        """See `Files.write`."""
        self.check()
        super().write(path, chunks)

    def replace(self, source: Path, target: Path) -> None:
        """See `Files.replace`. Checks again afterwards, so that a late writer is stopped here."""
        self.check()
        super().replace(source, target)
        self.check()

    def remove(self, path: Path) -> None:
        """See `Files.remove`."""
        self.check()
        super().remove(path)


def _read(path: Path) -> int:
    """0 if the file is missing or unreadable: the next epoch is then counted from `after`."""
    try:
        return int(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return 0
