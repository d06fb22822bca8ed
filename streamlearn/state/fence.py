"""A fence against a learner that was given up for dead and wakes up: it must not write over its successor's state.

The lock of the state folder keeps a second learner out while the first lives. It can be lost: its file removed, the
folder moved, a network disk that keeps no locks. So each learner takes the next number, its epoch, when it starts, and
looks whether it is still the newest right before it writes: before each step in the journal, before the ledger is
flushed, before and after each rename. An older one raises, and writes nothing more.

Between such a look and the write that follows lies a moment in which a process can be stopped for long. What it then
writes late is passed by where its epoch is read: a journal's line, a checkpoint. docs/reliability.md has what is left.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from streamlearn.errors import StateLockedError
from streamlearn.state.files import DISK, Chunk, Files, write_whole
from streamlearn.state.kill_points import reached


class Fence:
    """One learner's right to write into a state folder. Without a path nobody contests it, and nothing is looked at."""

    def __init__(self, path: Path | None = None, epoch: int = 0) -> None:
        self._path = path
        self.epoch = epoch
        """Larger than that of every learner that wrote here before; 0 of who is no learner."""

    @classmethod
    def take(cls, path: Path, *, after: int = 0, files: Files = DISK) -> Fence:
        """Take the next epoch, durably. Under the folder's lock, so that no two learners take the same.

        `after` is the largest that is known otherwise: the file may be lost.

        Raises:
            OSError: it cannot be written; nothing was taken.
        """
        fence = cls(path, max(_read(path), after) + 1)
        reached("epoch", "begin")
        write_whole(path, [b"%d\n" % fence.epoch], files, name="epoch")
        reached("epoch", "end")
        return fence

    def check(self) -> None:
        """Say whether we may write.

        Raises:
            StateLockedError: another learner has taken over.
        """
        if self._path is not None and (newest := _read(self._path)) != self.epoch:
            msg = (
                f"{self._path.parent}: another learner (epoch {newest}) has taken this state folder over from this one "
                f"(epoch {self.epoch}), which writes nothing more; see that only one is started"
            )
            raise StateLockedError(msg)


NO_FENCE = Fence()


def _read(path: Path) -> int:
    """0 where there is none that can be read: then nobody holds it, and the next one counts from what else is known."""
    try:
        return int(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return 0


class FencedFiles(Files):
    """A disk that takes changes from the newest learner only."""

    def __init__(self, fence: Fence) -> None:
        self._fence = fence

    def write(self, path: Path, chunks: Iterable[Chunk]) -> None:
        """See `Files.write`."""
        self._fence.check()
        super().write(path, chunks)

    def replace(self, source: Path, target: Path) -> None:
        """See `Files.replace`. Looks once more when it is done, so that who was late learns of it here."""
        self._fence.check()
        super().replace(source, target)
        self._fence.check()

    def remove(self, path: Path) -> None:
        """See `Files.remove`."""
        self._fence.check()
        super().remove(path)
