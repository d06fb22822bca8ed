"""The operations on the disk whose order makes a save safe. Tests replace them, to make each of them fail.

A file is replaced as a whole: written under a temporary name, synced, renamed over the old one, the folder synced.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from streamlearn.errors import StateError
from streamlearn.state.kill_points import reached

Chunk = bytes | bytearray | memoryview


class Files:
    """The real disk."""

    epoch = 0
    """Of the learner that writes (`fence`); 0 for processes that are not learners."""

    def check(self) -> None:
        """Check that this process may write; only `fence.Fence` ever refuses."""

    def write(self, path: Path, chunks: Iterable[Chunk]) -> None:
        """Write a new file and sync its content."""
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o640)
        with os.fdopen(descriptor, "wb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            self.sync(file.fileno())

    def sync(self, descriptor: int) -> None:
        """Make what was written durable."""
        os.fsync(descriptor)

    def append(self, descriptor: int, line: bytes) -> int:
        """Append in one call; the number of bytes written."""
        return os.write(descriptor, line)

    def sync_data(self, descriptor: int) -> None:
        """Make what was appended durable, without the file's times."""
        os.fdatasync(descriptor)

    def replace(self, source: Path, target: Path) -> None:
        """Rename over the target. Readers see the old file or the new one."""
        source.replace(target)

    def sync_folder(self, folder: Path) -> None:
        """Make the folder's entries durable. Without it a crash can undo a rename."""
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            self.sync(descriptor)
        finally:
            os.close(descriptor)

    def remove(self, path: Path) -> None:
        """Remove a file, if it is there."""
        path.unlink(missing_ok=True)


DISK = Files()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name next to a file. What is there is removed if the block fails."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
    except (OSError, StateError):
        temporary.unlink(missing_ok=True)
        raise


def write_whole(path: Path, chunks: Iterable[Chunk], files: Files = DISK, *, name: str = "") -> None:
    """Replace a file so that a crash at any instant leaves the old one or the new one.

    `name` is the operation in `kill_points`.

    Raises:
        OSError: the old file is unchanged; the temporary file is removed.
        StateError: the same, if `files` are fenced.
    """
    with replacing(path) as temporary:
        files.write(temporary, chunks)
        reached(name, "written")
        files.replace(temporary, path)
        reached(name, "renamed")
    files.sync_folder(path.parent)


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files of killed processes."""
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)
