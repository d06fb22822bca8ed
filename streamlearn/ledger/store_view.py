"""Reads the store while another process writes it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any, TypeAlias

from streamlearn.ledger.store_file import FILE, StoreFile, check_format

Get: TypeAlias = Callable[[str, int | bytes | str], Any]
"""`get(table or ring, key)`: the value, or None if there is no such key, or the store is older than the table."""


class StoreView:
    """Reads the store as of the writer's last flush.

    Threads may share it. One reads at a time, since a read takes microseconds. The store
    may be created, or replaced, after the view.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = Lock()
        self._file: StoreFile | None = None
        self._inode = 0
        """Of the open file. It shows whether the file at the path was replaced since."""

    @contextmanager
    def read(self) -> Iterator[Get]:
        """One snapshot of the store; empty if there is no store yet.

        Raises:
            StoreError: the store is of another format, damaged, or cannot be read.
        """
        with self._lock:
            file = self._open()
            try:
                tables = set() if file is None else {name for (name,) in file.rows("SELECT name FROM sqlite_schema")}
                if file is None or not tables:
                    yield lambda _name, _key: None
                    return
                file.rows("BEGIN")
                check_format(self._path, file.value("SELECT value FROM meta WHERE key = ?", "format"))
                yield (
                    lambda name, key: (
                        file.value(f"SELECT value FROM {name} WHERE key = ?", key) if name in tables else None
                    )
                )
                file.rows("ROLLBACK")
            except BaseException:
                self._close()
                raise

    def step(self) -> int:
        """The last step in the store; 0 if there is none. Raises StoreError, as `read`."""
        with self.read() as get:
            return get("step", "step") or 0

    def close(self) -> None:
        """Close the file. May be called twice; a later read opens it again."""
        with self._lock:
            self._close()

    def _open(self) -> StoreFile | None:
        """The file that is at the path now; None if there is none."""
        path = self._path / FILE
        inode = path.stat().st_ino if path.exists() else 0
        if inode != self._inode:
            self._close()
            self._inode = inode
        if self._file is None and inode:
            self._file = StoreFile(self._path, read_only=True)
        return self._file

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
