"""The seam to the disk: the few operations whose order makes a save safe, so that a test can fail each of them.

A whole file appears at once or not at all: written aside, synced, renamed over the old one, the folder synced.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from streamlearn.errors import StateError
from streamlearn.state.kill_points import reached

Chunk = bytes | bytearray | memoryview


class Files:
    """The disk as it is."""

    def write(self, path: Path, chunks: Iterable[Chunk]) -> None:
        """Write a new file, and sync its content."""
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o640)
        with os.fdopen(descriptor, "wb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            self.sync(file.fileno())

    def sync(self, descriptor: int) -> None:
        """Have the disk hold what was written."""
        os.fsync(descriptor)

    def append(self, descriptor: int, line: bytes) -> int:
        """Write at the end of a file, once; how many bytes it took."""
        return os.write(descriptor, line)

    def sync_data(self, descriptor: int) -> None:
        """Have the disk hold what was appended, if not its time."""
        os.fdatasync(descriptor)

    def replace(self, source: Path, target: Path) -> None:
        """Rename over the target: readers see the old file or the new one."""
        source.replace(target)

    def sync_folder(self, folder: Path) -> None:
        """Have the disk hold the folder's names; without it a crash can undo a rename."""
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            self.sync(descriptor)
        finally:
            os.close(descriptor)

    def remove(self, path: Path) -> None:
        """Remove a file that may be gone already."""
        path.unlink(missing_ok=True)


DISK = Files()


def write_whole(path: Path, chunks: Iterable[Chunk], files: Files = DISK, *, name: str = "") -> None:
    """Write a file so that a crash at any instant leaves the old one or the new one, whole.

    `name` is that of the operation in `points`.

    Raises:
        OSError: the old file still stands; what was written aside is removed.
        StateError: the same, where `files` are fenced.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        files.write(aside, chunks)
        reached(name, "written")
        files.replace(aside, path)
        reached(name, "renamed")
    except (OSError, StateError):
        aside.unlink(missing_ok=True)
        raise
    files.sync_folder(path.parent)


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed process had written aside."""
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)
