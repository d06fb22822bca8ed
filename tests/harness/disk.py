"""A small disk for one folder, filled and freed at once: a tmpfs. Needs the right to mount (`may_mount`).

It is filled by shrinking its size limit, so nothing is written: each further page fails with ENOSPC. As on any full
disk, a process may reuse the space of files that it removes.
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
"""Size when free. Memory is used only for what is written."""
TRIES = 50


class SmallDisk:
    """A tmpfs mounted over a folder. A context manager: on exit its files are moved into the folder itself."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder

    def __enter__(self) -> SmallDisk:
        """Mount.

        Raises:
            OSError: mounting is not permitted; see `may_mount`.
        """
        _mount("-t", "tmpfs", "-o", f"size={ROOM_BYTES}", "tmpfs", str(self.folder))
        return self

    def __exit__(self, *_: object) -> None:
        kept = self.folder.with_name(f"{self.folder.name}.kept")
        shutil.copytree(self.folder, kept)
        _run("umount", "--lazy", str(self.folder))  # lazy: a process that was just killed may still hold files
        self.folder.rmdir()
        kept.rename(self.folder)

    @property
    def used_bytes(self) -> int:
        """Bytes in use."""
        found = os.statvfs(self.folder)
        return (found.f_blocks - found.f_bfree) * found.f_frsize

    def fill(self, spare_pages: int = 0) -> None:
        """Leave room for at most `spare_pages` further pages.

        Raises:
            OSError: other processes write faster than the limit can be set.
        """
        for tries in range(TRIES):
            try:
                self._resize(self.used_bytes + spare_pages * PAGE_BYTES)
            except OSError:  # more was written meanwhile: the limit cannot be below the use
                if tries == TRIES - 1:
                    raise
                time.sleep(0.01)
            else:
                return

    def free(self) -> None:
        """Remove the limit."""
        self._resize(ROOM_BYTES)

    def _resize(self, size_bytes: int) -> None:
        _mount("-o", f"remount,size={max(size_bytes, PAGE_BYTES)}", str(self.folder))  # 0 means no limit


def may_mount(folder: Path) -> bool:
    """Whether this process may mount: it runs as root, and no container forbids it."""
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
