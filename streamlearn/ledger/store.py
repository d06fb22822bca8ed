"""The learner's SQLite file, which can be rewound to an earlier step, exactly.

A file that changes in place is ahead of the checkpoint after a crash. So each step also stores what its keys held
before, and `rewind` puts that back:

    Table   a map from keys to values. Every change of a kept step can be undone
    Ring    rows that are appended under growing numbers and not changed: too large to be written twice. Its ends are
            numbers that the caller keeps in a table, undone with it. Rows are removed by `trim`, `move` and `cut`.
            `overwrite` is for what must be erased, once no rewind can need it
    undo    step, table and key → the value before that step, NULL where there was none

All steps since the last `flush` are one write transaction, which `flush` commits and syncs. So kill -9 leaves the state
of the last flush. The store belongs to the thread that opened it. Other processes read it through `StoreView`.
"""

from __future__ import annotations

import fcntl
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NamedTuple, TypeAlias, TypeVar

from streamlearn.errors import FROM_SCRATCH, StateLockedError, StoreError

Key = TypeVar("Key")
Get: TypeAlias = Callable[[str, bytes], bytes | None]
"""`get(table or ring, key)` of a view."""

FILE = "store.sqlite3"
FORMAT = 5
FORMER_FILE, FORMER_FORMAT = "data.mdb", 4
"""Of stores up to format 4, which were LMDB environments."""
MAX_CHECKED_BYTES = 1 << 30
"""A larger store is not checked at the start, since a learner should not wait for minutes."""
WAL_PAGES = 4096
"""A commit that leaves more pages than this in the write-ahead log copies them into the file."""
WAL_MAX_BYTES = 256 << 20
"""Above this size a flush waits for readers, up to `_WAIT_S`, so that the write-ahead log can be emptied."""
_CACHE_BYTES = 64 << 20
_WAIT_S = 2.0
"""For the locks of other connections. A reader holds its locks for less than a millisecond."""
_KEYS_PER_SELECT = 64
_DAMAGE = {sqlite3.SQLITE_ERROR, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_TOOBIG}
"""SQLite's codes for a damaged file, or a file that is no store."""
_PRAGMAS = (
    "page_size = 4096",
    "journal_mode = WAL",
    "synchronous = FULL",
    f"wal_autocheckpoint = {WAL_PAGES}",
    f"journal_size_limit = {4096 * WAL_PAGES}",
    f"cache_size = {-(_CACHE_BYTES >> 10)}",
    "secure_delete = OFF",
)
_SCHEMA = (
    "CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID",
    """CREATE TABLE IF NOT EXISTS undo (
        step INTEGER, name TEXT, key BLOB, value BLOB, PRIMARY KEY (step, name, key)
    ) WITHOUT ROWID""",
)


def number(value: int) -> bytes:
    """A row number or step as a key: big-endian, so that keys sort as numbers do."""
    return value.to_bytes(8, "big")


def check_whole(path: Path) -> bool:
    """Check the structure of the whole file; False if it is too large for that. A store that does not exist is whole.

    SQLite finds most damage when it reads a page, too; this finds it before anything was learned. A bit that flips
    inside a value is found by neither.

    Raises:
        StoreError: the file is damaged; the message names the way out.
    """
    file = path / FILE
    if not file.exists():
        return True
    if file.stat().st_size > MAX_CHECKED_BYTES:
        return False
    with _Errors(path), closing(_connect_reader(file)) as db:
        (found,) = db.execute("PRAGMA quick_check(1)").fetchone()
    if found != "ok":
        raise _damaged(path, found)
    return True


class _Errors:
    """A context that turns SQLite's errors into ours. A generator would cost a microsecond on the hot path."""

    __slots__ = ("_path", "failed")

    def __init__(self, path: Path) -> None:
        self._path = path
        self.failed = False
        """Whether there was any. SQLite may have rolled the transaction back then."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if isinstance(error, sqlite3.Error):
            self.failed = True
            if _code(error) in _DAMAGE:
                raise _damaged(self._path, str(error)) from error
            raise StoreError(
                f"{self._path}: the store cannot be read or written ({error}): free disk space or lower "
                "labels.payload_max_bytes and labels.max_ids, then start again; the state of the last flush is whole"
            ) from error


class _Rows:
    """The statements on one table of the file."""

    def __init__(self, name: str, key_type: str, db: sqlite3.Connection, errors: _Errors) -> None:
        rowid = "" if key_type == "INTEGER" else "WITHOUT ROWID"
        db.execute(f"CREATE TABLE IF NOT EXISTS {name} (key {key_type} PRIMARY KEY, value BLOB NOT NULL) {rowid}")
        self._name, self._db, self._errors = name, db, errors
        self._select = f"SELECT value FROM {name} WHERE key = ?"
        self._select_many = f"SELECT key, value FROM {name} WHERE key IN ({','.join('?' * _KEYS_PER_SELECT)})"

    def _one(self, key: bytes | int) -> bytes | None:
        with self._errors:
            row = self._db.execute(self._select, (key,)).fetchone()
        return None if row is None else row[0]

    def _many(self, keys: Sequence[Key]) -> Iterator[tuple[Key, bytes]]:
        """Key and value of those that exist, in any order."""
        with self._errors:
            for start in range(0, len(keys), _KEYS_PER_SELECT):
                some = list(keys[start : start + _KEYS_PER_SELECT])
                some += some[-1:] * (_KEYS_PER_SELECT - len(some))
                yield from self._db.execute(self._select_many, some)


class Table(_Rows):
    """A map whose changes are undone by `rewind`. It may only change while a step is open.

    A step reads a key once, and writes it once, at its end. What it touches is held in memory until then.
    """

    def __init__(self, name: str, db: sqlite3.Connection, errors: _Errors) -> None:
        super().__init__(name, "BLOB", db, errors)
        self._step: int | None = None
        """The open step."""
        self._now: dict[bytes, bytes | None] = {}
        """The value of each key that the open step has touched; None where there is no such key."""
        self._stored: dict[bytes, bytes | None] = {}
        """What the file holds instead, of those that are yet to be written."""

    def get(self, key: bytes) -> bytes | None:
        """The value of a key."""
        if key in self._now:
            return self._now[key]
        value = self._one(key)
        if self._step is not None:
            self._now[key] = value
        return value

    def fetch(self, keys: Sequence[bytes]) -> Mapping[bytes, bytes | None]:
        """The values of many keys, and of others that the open step has touched; puts that follow show in it."""
        assert self._step is not None, "no step is open"
        now = self._now
        missing = [key for key in keys if key not in now]
        now.update(dict.fromkeys(missing))
        now.update(self._many(missing))
        return now

    def put(self, key: bytes, value: bytes | None) -> None:
        """Set the value of a key; None removes it."""
        assert self._step is not None, "no step is open"
        now = self._now
        self._stored.setdefault(key, now[key] if key in now else self.get(key))
        now[key] = value

    def insert(self, key: bytes, value: bytes) -> None:
        """Set the value of a key that is new."""
        assert self.get(key) is None, "the key is there already"
        self.put(key, value)

    def delete(self, key: bytes) -> bool:
        """Remove a key; whether it was there."""
        there = self.get(key) is not None
        self.put(key, None)
        return there

    def first(self) -> tuple[bytes, bytes] | None:
        """The smallest key and its value."""
        self._write()
        with self._errors:
            found: tuple[bytes, bytes] | None
            found = self._db.execute(f"SELECT key, value FROM {self._name} ORDER BY key LIMIT 1").fetchone()
        return found

    def items(self) -> list[tuple[bytes, bytes]]:
        """All keys and values; for small tables."""
        self._write()
        with self._errors:
            return self._db.execute(f"SELECT key, value FROM {self._name} ORDER BY key").fetchall()

    def _begin(self, step: int) -> None:
        self._step = step

    def _end(self) -> None:
        self._write()
        self._now.clear()
        self._step = None

    def _write(self) -> None:
        """Write what has changed, and how to undo it: of several writes in one step, only the first one counts."""
        now, stored = self._now, self._stored
        changed = sorted(key for key, value in stored.items() if now[key] != value)
        if changed:
            undo = [(self._step, self._name, key, stored[key]) for key in changed]
            with self._errors:
                self._db.executemany("INSERT OR IGNORE INTO undo VALUES (?, ?, ?, ?)", undo)
            self._set([(key, now[key]) for key in changed])
        stored.clear()

    def _set(self, changes: Sequence[tuple[bytes, bytes | None]]) -> None:
        """Set or remove keys in the file."""
        puts = [change for change in changes if change[1] is not None]
        with self._errors:
            self._db.executemany(f"REPLACE INTO {self._name} VALUES (?, ?)", puts)
            if len(puts) < len(changes):
                gone = [(key,) for key, value in changes if value is None]
                self._db.executemany(f"DELETE FROM {self._name} WHERE key = ?", gone)


class Ring(_Rows):
    """Numbered rows, appended and not changed. Not undone: see `cut` and `trim`."""

    def __init__(self, name: str, db: sqlite3.Connection, errors: _Errors) -> None:
        super().__init__(name, "INTEGER", db, errors)
        self._insert = f"INSERT INTO {name} VALUES (?, ?)"

    def append(self, row: bytes, value: bytes | memoryview) -> None:
        """Add a row; its `number` is beyond every row there is."""
        with self._errors:
            self._db.execute(self._insert, (int.from_bytes(row, "big"), value))

    def overwrite(self, row: bytes, value: bytes) -> None:
        """Write other content into a row that is there. Not undone, as `trim`."""
        with self._errors:
            self._db.execute(f"UPDATE {self._name} SET value = ? WHERE key = ?", (value, int.from_bytes(row, "big")))

    def get(self, row: bytes) -> bytes | None:
        """A row by its `number`, if it is still on the disk."""
        return self._one(int.from_bytes(row, "big"))

    def fetch(self, rows: Sequence[bytes | None]) -> list[bytes | None]:
        """Many rows, and None for each None."""
        keys = [-1 if row is None else int.from_bytes(row, "big") for row in rows]
        found = dict(self._many(keys))
        return [found.get(key) for key in keys]

    def trim(self, low: int) -> int:
        """Remove rows below `low` from the disk; how many there were. Not undone: nobody may rewind to need them."""
        with self._errors:
            return self._db.execute(f"DELETE FROM {self._name} WHERE key < ?", (low,)).rowcount

    def move(self, low: int, to: Ring, rest: Callable[[bytes], bytes]) -> int:
        """Remove rows below `low`, and append to another ring what `rest` leaves of each. As `trim` in all else."""
        with self._errors:
            rows = self._db.execute(f"SELECT key, value FROM {self._name} WHERE key < ? ORDER BY key", (low,))
            self._db.executemany(to._insert, ((key, rest(value)) for key, value in rows))
        return self.trim(low)

    def cut(self, high: int) -> int:
        """Remove rows from `high` on, which a rewind has undone; how many there were."""
        with self._errors:
            return self._db.execute(f"DELETE FROM {self._name} WHERE key >= ?", (high,)).rowcount


class Store:
    """The one writer of the file. Used by one thread; a second store on the same path is refused.

    Raises:
        StateLockedError: another process (or this one) has the store open.
        StoreError: it is of another format, damaged, or cannot be opened.
    """

    def __init__(
        self,
        path: Path,
        *,
        tables: Sequence[str],
        rings: Sequence[str],
        may_write: Callable[[], None] = lambda: None,
    ) -> None:
        """`may_write` is asked right before each commit, and raises StateLockedError where another writes here now."""
        self._may_write = may_write
        self._path, self._errors = path, _Errors(path)
        _refuse_former_format(path)
        path.mkdir(parents=True, exist_ok=True)
        self._lock = (path / "writer.lock").open("wb")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise StateLockedError(f"{path}: another learner has this store open") from error
        self._wal = path / f"{FILE}-wal"
        try:
            with self._errors:
                self._db = sqlite3.connect(path / FILE, timeout=_WAIT_S, isolation_level=None, cached_statements=256)
        except StoreError:
            self._lock.close()
            raise
        try:
            self._open(tables, rings)
        except BaseException:
            self._db.close()
            self._lock.close()
            raise

    def _open(self, tables: Sequence[str], rings: Sequence[str]) -> None:
        path, db, errors = self._path, self._db, self._errors
        with errors:
            for pragma in _PRAGMAS:
                db.execute(f"PRAGMA {pragma}")
            try:
                db.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError as error:
                if _code(error) != sqlite3.SQLITE_BUSY:
                    raise
                raise StateLockedError(f"{path}: another learner has this store open, and does not let go") from error
            for statement in _SCHEMA:
                db.execute(statement)
            found = self.note("format") or self.note("format", number(FORMAT))
            if found != number(FORMAT):
                raise _wrong_format(path, found)
            self.tables = {name: Table(name, db, errors) for name in ("step", *tables)}
            self.rings = {name: Ring(name, db, errors) for name in rings}
        self.step_open = False
        self._read_step()
        self.flush()

    @property
    def step(self) -> int:
        """The last step begun; 0 before the first."""
        return self._step

    @property
    def pruned(self) -> int:
        """The earliest step that can be rewound to."""
        value = self.note("pruned")
        return 0 if value is None else int.from_bytes(value, "big")

    def begin(self, step: int) -> None:
        """Open a step; tables may change until `end`."""
        assert not self.step_open, "the last step was not ended"
        assert step > max(self.step, 0), f"step {step} does not follow {self.step}"
        self.step_open = True
        self._step = step
        for table in self.tables.values():
            table._begin(step)  # noqa: SLF001 - a table is a part of its store
        self.tables["step"].put(b"step", number(step))

    def end(self) -> None:
        """Close the step: write its changes, and how to undo them."""
        assert self.step_open, "no step is open"
        for table in self.tables.values():
            table._end()  # noqa: SLF001
        self.step_open = False

    def flush(self) -> None:
        """Make all ended steps durable, together.

        Raises:
            StoreError: the disk is full or failing; the file holds the state of the last flush, or of this one.
            StateLockedError: another learner has taken over; nothing was written.
        """
        assert not self.step_open, "a step is open"
        self._may_write()
        with self._errors:
            self._db.execute("COMMIT")
            if self._wal.stat().st_size > WAL_MAX_BYTES:
                self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            self._db.execute("BEGIN IMMEDIATE")

    def rewind(self, step: int) -> None:
        """Put every table back to how it was when `step` ended. The caller cuts its rings, then flushes.

        A step that is open is undone too. Until the flush, a crash leaves all as it was.

        Raises:
            StoreError: `step` is newer than the store, or too old to be undone; nothing has changed.
        """
        if self.step_open:
            self.end()
        if step > self.step:
            raise StoreError(
                f"the store ends at step {self.step}, the checkpoint is at {step}: it is of another run, or was lost; "
                f"put back the store that belongs to the checkpoint, or {FROM_SCRATCH}"
            )
        if step < self.pruned:
            raise StoreError(
                f"the store can go back to step {self.pruned}, not to {step}: older undo was pruned; put back a newer "
                f"checkpoint, or {FROM_SCRATCH}"
            )
        with self._errors:
            undo = "SELECT name, key, value FROM undo WHERE step > ? ORDER BY step DESC"
            for name, key, value in self._db.execute(undo, (step,)):
                if name not in self.tables:
                    raise _damaged(self._path, f"there is undo for a table {name!r}")
                self.tables[name]._set([(key, value)])  # noqa: SLF001
            self._db.execute("DELETE FROM undo WHERE step > ?", (step,))
        self._read_step()

    def value_at(self, step: int, table: str, key: bytes) -> bytes | None:
        """What a key held when `step` ended; `step` is none that was pruned."""
        assert not self.step_open, "a step is open"
        assert self.pruned <= step <= self.step, f"step {step} is not in {self.pruned}..{self.step}"
        undo = "SELECT value FROM undo WHERE step > ? AND name = ? AND key = ? ORDER BY step LIMIT 1"
        with self._errors:
            row = self._db.execute(undo, (step, table, key)).fetchone()
        return self.tables[table].get(key) if row is None else row[0]

    def prune(self, step: int) -> None:
        """Forget how to go back beyond `step`. Durable with the next flush."""
        assert not self.step_open, "a step is open"
        if step <= self.pruned:
            return
        assert step <= self.step, f"step {step} is not begun"
        with self._errors:
            self._db.execute("DELETE FROM undo WHERE step <= ?", (step,))
        self.note("pruned", number(step))

    def _read_step(self) -> None:
        value = self.tables["step"].get(b"step")
        self._step = 0 if value is None else int.from_bytes(value, "big")

    def note(self, key: str, value: bytes | None = None) -> bytes | None:
        """Read a note about the store as a whole; with a value, write it first. Notes are not undone."""
        with self._errors:
            if value is not None:
                self._db.execute("REPLACE INTO meta VALUES (?, ?)", (key, value))
            row = self._db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return None if row is None else row[0]

    def close(self) -> None:
        """Flush and close. An open step is lost; after an error all since the last flush is. May be called twice.

        Raises:
            StateLockedError: another learner has taken over; nothing was written, and the store is closed.
        """
        if self._lock.closed:
            return
        try:
            if not (self.step_open or self._errors.failed):
                self._may_write()
                with self._errors:
                    self._db.execute("COMMIT")
        finally:
            self._db.close()
            self._lock.close()


class _Reader(NamedTuple):
    """A connection of a view. `inode` tells whether the file at the path is still the same."""

    db: sqlite3.Connection
    rings: frozenset[str]
    inode: int


class StoreView:
    """Reads a store that another process writes, as of its last flush. Any thread may use it.

    The store may be created, or replaced, after the view.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._errors = _Errors(path)
        self._idle: list[_Reader] = []
        """One for each thread that has read at the same time as others."""

    @contextmanager
    def read(self) -> Iterator[Get | None]:
        """One moment of the store; None where there is no store yet.

        Raises:
            StoreError: the store is of another format, damaged, or cannot be read.
        """
        with self._errors:
            reader = self._reader()
        if reader is None:
            yield None
            return
        db, rings, _ = reader

        def get(name: str, key: bytes) -> bytes | None:
            with self._errors:
                at = int.from_bytes(key, "big") if name in rings else key
                row = db.execute(f"SELECT value FROM {name} WHERE key = ?", (at,)).fetchone()
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
        """A connection that no other thread uses; None where there is no store yet."""
        file = self._path / FILE
        _refuse_former_format(self._path)
        if not file.exists():
            return None
        inode = file.stat().st_ino
        while self._idle:
            reader = self._idle.pop()
            if reader.inode == inode:
                return reader
            reader.db.close()
        db = _connect_reader(file)
        try:
            rings = self._rings(db)
        except BaseException:
            db.close()
            raise
        if rings is None:
            db.close()
            return None
        return _Reader(db, rings, inode)

    def _rings(self, db: sqlite3.Connection) -> frozenset[str] | None:
        """Check the format. The names of the rings, or None before the first commit of a writer."""
        names = dict(db.execute("SELECT name, sql FROM sqlite_schema"))
        if not names:
            return None
        row = db.execute("SELECT value FROM meta WHERE key = 'format'").fetchone()
        if row is None or row[0] != number(FORMAT):
            raise _wrong_format(self._path, row and row[0])
        return frozenset(name for name, sql in names.items() if "key INTEGER" in sql)


def _connect_reader(file: Path) -> sqlite3.Connection:
    """A connection that cannot write."""
    uri = f"{file.absolute().as_uri()}?mode=ro"
    return sqlite3.connect(uri, uri=True, timeout=_WAIT_S, isolation_level=None, check_same_thread=False)


def _code(error: sqlite3.Error) -> int:
    """SQLite's primary result code."""
    return int(getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR)) & 0xFF


def _damaged(path: Path, why: str) -> StoreError:
    return StoreError(f"{path}: the store is damaged ({why}); restore {path.parent} from a backup, or {FROM_SCRATCH}")


def _refuse_former_format(path: Path) -> None:
    if (path / FORMER_FILE).exists() and not (path / FILE).exists():
        raise _wrong_format(path, number(FORMER_FORMAT))


def _wrong_format(path: Path, found: bytes | None) -> StoreError:
    number_found = "none" if found is None else int.from_bytes(found, "big")
    return StoreError(
        f"{path}: the store is of format {number_found}, this version reads {FORMAT}: "
        f"go on with the version that wrote it, or {FROM_SCRATCH}"
    )
