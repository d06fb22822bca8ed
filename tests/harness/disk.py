"""A small disk of its own for one folder, that can be filled and freed at once: a tmpfs, where we may mount one.

Its size is what is changed, so nothing need be written to fill it: each page more than there is now fails with ENOSPC,
and what a process removes it may use again, as on any full disk.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

PAGE_BYTES = 4096
ROOM_BYTES = 4 << 30
"""What a free disk takes. Memory is used only for what is written."""
TRIES = 50


class SmallDisk:
    """A tmpfs over a folder. A context manager: at its end what it holds lies in the folder itself."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder

    def __enter__(self) -> SmallDisk:
        """Mount.

        Raises:
            OSError: we may not; see `may_mount`.
        """
        _mount("-t", "tmpfs", "-o", f"size={ROOM_BYTES}", "tmpfs", str(self.folder))
        return self

    def __exit__(self, *_: object) -> None:
        kept = self.folder.with_name(f"{self.folder.name}.kept")
        shutil.copytree(self.folder, kept)
        _run("umount", "--lazy", str(self.folder))  # lazy: a process that was killed just now may still be let go of
        self.folder.rmdir()
        kept.rename(self.folder)

    @property
    def used_bytes(self) -> int:
        """What is written."""
        found = os.statvfs(self.folder)
        return (found.f_blocks - found.f_bfree) * found.f_frsize

    def fill(self, spare_pages: int = 0) -> None:
        """Let it take only so many pages more.

        Raises:
            OSError: others write faster than it can be filled.
        """
        for tries in range(TRIES):
            try:
                self._resize(self.used_bytes + spare_pages * PAGE_BYTES)
            except OSError:  # more was written meanwhile: a disk cannot be smaller than what it holds
                if tries == TRIES - 1:
                    raise
                time.sleep(0.01)
            else:
                return

    def free(self) -> None:
        """Give it room again."""
        self._resize(ROOM_BYTES)

    def _resize(self, size_bytes: int) -> None:
        _mount("-o", f"remount,size={max(size_bytes, PAGE_BYTES)}", str(self.folder))  # 0 would be without a bound


def may_mount(folder: Path) -> bool:
    """Whether this process may mount a disk: it is root, and in no container that forbids it."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return False
    try:
        with SmallDisk(folder / "may-mount"):
            pass
    except OSError:
        return False
    finally:
        (folder / "may-mount").rmdir()
    return True


def _mount(*arguments: str) -> None:
    _run("mount", *arguments)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=30.0, check=False)
    if done.returncode:
        msg = f"{' '.join(command)}: {done.stderr.strip()}"
        raise OSError(msg)
