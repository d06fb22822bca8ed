"""The SQLite file of the embedded log: its tables, how it is opened and read, and what its errors mean.

One row of `records` is one record. Its id combines partition and offset, so a partition is one range of keys:
`partitions.id << 48 | offset`. A row of `partitions` holds the oldest offset, the next one, the bytes kept and the
committed offset. It changes in the transaction that changes the records, so a reader sees both or neither.
"""

from __future__ import annotations

import math
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import orjson

from streamlearn.errors import LogError, LogUnavailableError, OffsetOutOfRangeError
from streamlearn.records import Headers, Position, Record, TopicPartition

SCHEMA_VERSION = 1
PAGE_BYTES = 8192
OFFSET_BITS = 48
MAX_PARTITIONS = 1 << (62 - OFFSET_BITS)
WAL_MAX_BYTES = 64 << 20
BUSY_TIMEOUT_S = 10.0
LOCK_POLL_S = 0.0005

_SCHEMA = (
    "CREATE TABLE topics (name TEXT PRIMARY KEY, partitions INTEGER NOT NULL) WITHOUT ROWID",
    """CREATE TABLE partitions (
        id INTEGER PRIMARY KEY, topic TEXT NOT NULL, partition INTEGER NOT NULL, beginning INTEGER NOT NULL DEFAULT 0,
        next INTEGER NOT NULL DEFAULT 0, bytes INTEGER NOT NULL DEFAULT 0, committed INTEGER, UNIQUE (topic, partition)
    )""",
    """CREATE TABLE records (
        id INTEGER PRIMARY KEY, timestamp_ms INTEGER NOT NULL, appended_ms INTEGER NOT NULL, weight INTEGER NOT NULL,
        key BLOB, value BLOB, headers BLOB
    )""",
    f"PRAGMA user_version = {SCHEMA_VERSION}",
)
_SELECT = "SELECT id, timestamp_ms, key, value, headers FROM records WHERE id >= ? AND id < ? ORDER BY id LIMIT ?"
_HELD = "another process holds the lock for too long; find it with lsof or fuser"
_ADVICE = {
    sqlite3.SQLITE_BUSY: _HELD,
    sqlite3.SQLITE_LOCKED: _HELD,
    sqlite3.SQLITE_FULL: "the disk is full; free some space or lower log.max_bytes",
    sqlite3.SQLITE_IOERR: "the disk failed or is full; free some space and check the kernel's messages",
    sqlite3.SQLITE_READONLY: "the file is read-only; check owner and mode of the file and its folder",
    sqlite3.SQLITE_CANTOPEN: "the file could not be opened; check owner and mode of its folder",
    sqlite3.SQLITE_PERM: "the file could not be opened; check owner and mode of its folder",
    sqlite3.SQLITE_NOMEM: "out of memory",
}


def encode_headers(headers: Headers) -> bytes | None:
    """Encode as a JSON list of pairs, bytes as Latin-1, so that any SQLite tool shows them; None if there are none."""
    return orjson.dumps([(name, value.decode("latin-1")) for name, value in headers]) if headers else None


def decode_headers(stored: bytes | None) -> Headers:
    """Invert `encode_headers`."""
    if stored is None:
        return ()
    return tuple((name, value.encode("latin-1")) for name, value in orjson.loads(stored))


@contextmanager
def translated(path: Path, doing: str) -> Iterator[None]:
    """Turn SQLite's errors into LogUnavailableError or LogError, with advice.

    LogUnavailableError if the cause may go away by itself or by the operator (a held lock, a full disk).
    """
    try:
        yield
    except sqlite3.ProgrammingError as error:
        if "closed" not in str(error):
            raise
        raise LogError(f"{path}: {doing}: the log is closed") from error
    except sqlite3.DatabaseError as error:
        advice = _ADVICE.get(error_code(error))
        if advice is None:
            way_out = "restore it; or move all of state.dir aside and start from scratch"
            raise LogError(f"{path}: {doing}: {error}; not a log, or damaged: {way_out}") from error
        raise LogUnavailableError(f"{path}: {doing}: {error}; {advice}") from error


def error_code(error: sqlite3.Error) -> int:
    """Return SQLite's primary result code."""
    return int(getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR)) & 0xFF


def wait_while_busy(db: sqlite3.Connection, statement: str, deadline: float) -> None:
    """Run a statement; retry until the deadline while another process holds the lock.

    SQLite's own busy handler sleeps up to 100 ms between tries, which starves a process next to a busy writer. Some
    statements, such as the switch to WAL, do not use it at all.
    """
    while True:
        try:
            db.execute(statement).fetchall()
        except sqlite3.OperationalError as error:
            if error_code(error) != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(LOCK_POLL_S)
        else:
            return


def connect(path: Path, busy_timeout_s: float, timeout_s: float) -> sqlite3.Connection:
    """Open a connection in WAL mode that syncs each commit; create the tables if the file is new.

    One thread at a time may use it. A statement waits up to `busy_timeout_s` for a lock; opening waits `timeout_s`.

    Raises:
        LogError: the file is not an embedded log, or has another version.
    """
    deadline = time.monotonic() + timeout_s
    db = sqlite3.connect(path, isolation_level=None, timeout=busy_timeout_s, check_same_thread=False)
    try:
        sizes = (f"page_size = {PAGE_BYTES}", f"journal_size_limit = {WAL_MAX_BYTES}")
        for pragma in (*sizes, "journal_mode = WAL", "synchronous = FULL"):
            wait_while_busy(db, f"PRAGMA {pragma}", deadline)
        _create_tables(db, path, deadline)
    except BaseException:
        db.close()
        raise
    return db


def _create_tables(db: sqlite3.Connection, path: Path, deadline: float) -> None:
    if _version(db) == SCHEMA_VERSION:
        return
    with transaction(db, deadline):
        version = _version(db)
        if version == SCHEMA_VERSION:
            return
        if version != 0 or db.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]:
            msg = f"{path}: expected an embedded log of version {SCHEMA_VERSION}, got version {version}; move it aside"
            raise LogError(msg)
        for statement in _SCHEMA:
            db.execute(statement)


def _version(db: sqlite3.Connection) -> int:
    return int(db.execute("PRAGMA user_version").fetchone()[0])


@contextmanager
def transaction(db: sqlite3.Connection, deadline: float) -> Iterator[None]:
    """Run a write transaction: committed and synced at the end, or rolled back."""
    wait_while_busy(db, "BEGIN IMMEDIATE", deadline)
    try:
        yield
        db.execute("COMMIT")
    finally:
        if db.in_transaction:
            db.execute("ROLLBACK")


def truncate_wal(db: sqlite3.Connection, path: Path, wait_s: float) -> None:
    """Truncate a WAL that is too long. SQLite restarts it by itself, but not while readers are always active.

    `db` must have a busy timeout of zero, and has it afterwards.
    """
    wal = path.with_name(path.name + "-wal")
    try:
        if wal.stat().st_size < WAL_MAX_BYTES:
            return
    except FileNotFoundError:
        return
    db.execute(f"PRAGMA busy_timeout = {int(wait_s * 1000)}")
    db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    db.execute("PRAGMA busy_timeout = 0")


def read_records(
    db: sqlite3.Connection,
    partition: TopicPartition,
    number: int,
    offset: int,
    max_records: int,
    *,
    max_bytes: float = math.inf,
) -> list[Record]:
    """Return records from `offset` on, up to the one that reaches `max_bytes`; `number` is the partition's id.

    Raises:
        OffsetOutOfRangeError: the offset was trimmed, or never written.
    """
    base = number << OFFSET_BITS
    topic, index = partition
    records: list[Record] = []
    with closing(db.execute(_SELECT, (base + offset, base + (1 << OFFSET_BITS), max_records))) as rows:
        for row_id, timestamp_ms, key, value, headers in rows:
            if not records and row_id != base + offset:
                break
            position = Position(topic, index, row_id - base)
            records.append(Record(position, timestamp_ms, key, value, decode_headers(headers)))
            max_bytes -= len(key or b"") + len(value or b"")
            if max_bytes <= 0:
                break
    if not records:
        _check_in_range(db, partition, number, offset)
    return records


def _check_in_range(db: sqlite3.Connection, partition: TopicPartition, number: int, offset: int) -> None:
    (beginning, end) = db.execute("SELECT beginning, next FROM partitions WHERE id = ?", (number,)).fetchone()
    if not beginning <= offset <= end:
        why = "was trimmed" if offset < beginning else "was never written"
        msg = f"{partition.topic}[{partition.partition}]@{offset} {why}: the log holds {beginning} to {end}"
        raise OffsetOutOfRangeError(msg)
