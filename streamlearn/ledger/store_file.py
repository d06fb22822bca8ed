"""The SQLite file of the ledger: its format, its errors, its check, and how it is opened for reading."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

from streamlearn.errors import FROM_SCRATCH, StoreError

FILE = "store.sqlite3"
FORMAT = 6
LMDB_FILE, LMDB_FORMAT = "data.mdb", 4
"""Stores up to format 4 are LMDB environments."""
MAX_CHECKED_BYTES = 1 << 30
"""A larger store is not checked at the start: the check would take minutes."""
LOCK_WAIT_S = 2.0
"""How long a connection waits for the locks of others. A reader holds its locks for less than a millisecond."""
_DAMAGE = {sqlite3.SQLITE_ERROR, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_TOOBIG}
"""SQLite's codes for a damaged file, or a file that is not a store."""


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
    with StoreErrors(path), closing(connect_reader(file)) as db:
        (found,) = db.execute("PRAGMA quick_check(1)").fetchone()
    if found != "ok":
        raise damaged(path, found)
    return True


def connect_reader(file: Path) -> sqlite3.Connection:
    """A connection that cannot write."""
    uri = f"{file.absolute().as_uri()}?mode=ro"
    return sqlite3.connect(uri, uri=True, timeout=LOCK_WAIT_S, isolation_level=None, check_same_thread=False)


class StoreErrors:
    """A context that turns SQLite's errors into StoreError. A generator would cost a microsecond per use."""

    __slots__ = ("_path", "failed")

    def __init__(self, path: Path) -> None:
        self._path = path
        self.failed = False
        """An error occurred. SQLite may have rolled the transaction back."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if isinstance(error, sqlite3.Error):
            self.failed = True
            if code_of(error) in _DAMAGE:
                raise damaged(self._path, str(error)) from error
            raise StoreError(
                f"{self._path}: the store cannot be read or written ({error}): free disk space or lower "
                "labels.payload_max_bytes and labels.max_ids, then start again; the state of the last flush is whole"
            ) from error


def code_of(error: sqlite3.Error) -> int:
    """SQLite's primary result code."""
    return int(getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR)) & 0xFF


def damaged(path: Path, why: str) -> StoreError:
    """The error for a damaged store."""
    return StoreError(f"{path}: the store is damaged ({why}); restore {path.parent} from a backup, or {FROM_SCRATCH}")


def refuse_lmdb(path: Path) -> None:
    """Raise StoreError if the folder holds a store of format 4 or earlier."""
    if (path / LMDB_FILE).exists() and not (path / FILE).exists():
        raise wrong_format(path, LMDB_FORMAT)


def wrong_format(path: Path, found: int | None) -> StoreError:
    """The error for a store that another version wrote."""
    return StoreError(
        f"{path}: the store is of format {found}, this version reads {FORMAT}: "
        f"go back to the version that wrote it, or {FROM_SCRATCH}"
    )


def format_of(note: bytes | None) -> int | None:
    """The format in the note of that name. Every version writes it as 8 bytes, big-endian."""
    return None if note is None else int.from_bytes(note, "big")
