"""The SQLite file of the ledger: its format, its errors, its check, and how it is opened for reading."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from streamlearn.errors import FROM_SCRATCH, StoreError

FILE = "store.sqlite3"
FORMAT = 7
_OLDEST = 6
"""The oldest format that this version reads: what was added since is missing, or 0. The learner writes `FORMAT`."""
MAX_CHECKED_BYTES = 1 << 30
"""A larger store is not checked at the start: the check would take minutes."""
LOCK_WAIT_S = 2.0
"""How long a connection waits for the locks of others. A reader holds its locks for less than a millisecond."""
_DAMAGE = {sqlite3.SQLITE_ERROR, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_TOOBIG}
"""SQLite's codes for a damaged file, or a file that is not ours. Others (busy, full) may be transient."""


def check_whole(path: Path) -> bool:
    """Check the structure of the whole file; False if it is too large for that. A store that does not exist is whole.

    SQLite also detects most damage when it reads a page; this finds it before anything is learned. Neither finds a
    flipped bit inside a value.

    Raises:
        StoreError: the file is damaged.
    """
    file = path / FILE
    if not file.exists():
        return True
    if file.stat().st_size > MAX_CHECKED_BYTES:
        return False
    with closing(StoreFile(path, read_only=True)) as opened:
        ((found,),) = opened.rows("PRAGMA quick_check(1)")
    if found != "ok":
        raise damaged(path, found)
    return True


class StoreFile:
    """A connection to the file in a folder. Errors of SQLite are raised as StoreError."""

    def __init__(self, folder: Path, *, read_only: bool) -> None:
        """Threads may share a read-only connection, one at a time."""
        self._folder = folder
        self.failed = False
        """An error occurred. SQLite may have rolled the transaction back."""
        uri = f"{(folder / FILE).absolute().as_uri()}?mode={'ro' if read_only else 'rwc'}"
        try:
            self.db = sqlite3.connect(
                uri,
                uri=True,
                timeout=LOCK_WAIT_S,
                isolation_level=None,
                check_same_thread=not read_only,
                cached_statements=256,
            )
        except sqlite3.Error as error:
            raise self._failure(error) from error

    def rows(self, statement: str, values: Sequence[object] = ()) -> list[tuple[Any, ...]]:
        """Execute a statement, and return its rows."""
        try:
            return self.db.execute(statement, values).fetchall()
        except sqlite3.Error as error:
            raise self._failure(error) from error

    def each(self, statement: str, values: Sequence[object]) -> Iterator[tuple[Any, ...]]:
        """Execute a statement whose rows may be too large to be held together."""
        try:
            yield from self.db.execute(statement, values)
        except sqlite3.Error as error:
            raise self._failure(error) from error

    def value(self, statement: str, key: object) -> Any:
        """The first column of the first row; None if there is no row."""
        found = self.rows(statement, (key,))
        return found[0][0] if found else None

    def execute_each(self, statement: str, rows: Iterable[Sequence[object]]) -> None:
        """Execute a statement with each of these rows of values."""
        try:
            self.db.executemany(statement, rows)
        except sqlite3.Error as error:
            raise self._failure(error) from error

    def close(self) -> None:
        """Close the connection. What is not committed is lost."""
        self.db.close()

    def _failure(self, error: sqlite3.Error) -> StoreError:
        self.failed = True
        if is_damage(error):
            return damaged(self._folder, str(error))
        return StoreError(
            f"{self._folder}: the store cannot be read or written ({error}): free disk space or lower "
            "labels.payload_max_bytes and labels.max_ids, then start again; the state of the last flush is whole"
        )


def code_of(error: BaseException | None) -> int:
    """SQLite's primary result code. Errors of the sqlite3 module itself have none."""
    return int(getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR)) & 0xFF


def is_damage(error: BaseException) -> bool:
    """Whether an error means that the file itself is unusable."""
    return isinstance(error, sqlite3.Error) and code_of(error) in _DAMAGE


def damaged(path: Path, why: str) -> StoreError:
    """The error for a damaged store."""
    return StoreError(f"{path}: the store is damaged ({why}); restore {path.parent} from a backup, or {FROM_SCRATCH}")


def check_step(found: int, wanted: int) -> None:
    """Refuse a store that ends before the checkpoint's step. Raises StoreError."""
    if found < wanted:
        raise StoreError(
            f"the store ends at step {found}, the checkpoint is at {wanted}: it is of another run, or was lost; "
            f"restore the store that belongs to the checkpoint, or {FROM_SCRATCH}"
        )


def check_format(path: Path, note: bytes | None) -> None:
    """Raise StoreError if another version wrote the store. `note`: its format, in every version 8 bytes, big-endian."""
    found = None if note is None else int.from_bytes(note, "big")
    if found is None or not _OLDEST <= found <= FORMAT:
        raise StoreError(
            f"{path}: the store is of format {found}, this version reads {FORMAT}: "
            f"go back to the version that wrote it, or {FROM_SCRATCH}"
        )
