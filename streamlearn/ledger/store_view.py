"""Reads the store while another process writes it."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from streamlearn.ledger.store_file import (
    FILE,
    FORMAT,
    StoreErrors,
    connect_reader,
    format_of,
    refuse_lmdb,
    wrong_format,
)

Get: TypeAlias = Callable[[str, int | bytes], Any]
"""`get(table or ring, key)`: the value, or None if there is no such key."""


class _Reader(NamedTuple):
    """A connection. `inode` shows whether the file at the path was replaced since."""

    db: sqlite3.Connection
    inode: int


class StoreView:
    """Reads the store as of the writer's last flush. Any thread may use it.

    The store may be created, or replaced, after the view.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._errors = StoreErrors(path)
        self._idle: list[_Reader] = []

    @property
    def idle_connections(self) -> int:
        """Open connections that no thread uses. There are as many as threads have read at the same time."""
        return len(self._idle)

    @contextmanager
    def read(self) -> Iterator[Get | None]:
        """One snapshot of the store; None if there is no store yet.

        Raises:
            StoreError: the store is of another format, damaged, or cannot be read.
        """
        with self._errors:
            reader = self._reader()
        if reader is None:
            yield None
            return
        db = reader.db

        def get(name: str, key: int | bytes) -> Any:
            with self._errors:
                row = db.execute(f"SELECT value FROM {name} WHERE key = ?", (key,)).fetchone()
            return None if row is None else row[0]

        try:
            db.execute("BEGIN")
            yield get
            db.execute("ROLLBACK")
        except BaseException:
            db.close()
            raise
        self._idle.append(reader)

    def close(self) -> None:
        """Close the file. May be called twice; a later read opens it again."""
        while self._idle:
            self._idle.pop().db.close()

    def _reader(self) -> _Reader | None:
        """A connection that no other thread uses; None if there is no store yet."""
        file = self._path / FILE
        refuse_lmdb(self._path)
        if not file.exists():
            return None
        inode = file.stat().st_ino
        while self._idle:
            reader = self._idle.pop()
            if reader.inode == inode:
                return reader
            reader.db.close()
        db = connect_reader(file)
        try:
            ready = self._check_format(db)
        except BaseException:
            db.close()
            raise
        if not ready:
            db.close()
            return None
        return _Reader(db, inode)

    def _check_format(self, db: sqlite3.Connection) -> bool:
        """Raise StoreError for another format. False before the writer's first commit."""
        if db.execute("SELECT name FROM sqlite_schema LIMIT 1").fetchone() is None:
            return False
        row = db.execute("SELECT value FROM meta WHERE key = 'format'").fetchone()
        found = format_of(row and row[0])
        if found != FORMAT:
            raise wrong_format(self._path, found)
        return True
