"""The learner's SQLite file, which can be rewound to an earlier step, exactly.

After a crash the file is ahead of the checkpoint. So each step also stores what its keys held before, and `rewind`
restores that:

    Table   a map from keys to values. `rewind` undoes every change
    Ring    rows that are appended under increasing numbers and not changed, since they are too large to be written
            twice. The caller keeps the numbers of both ends in a table, so `rewind` restores them. `trim`, `move` and
            `cut` remove rows. `overwrite` is for erased content, and only when no rewind can need it
    undo    step, table and key → the value before that step, NULL if there was none

All steps since the last `flush` are one write transaction, which `flush` commits and syncs. So after kill -9 the file
holds the state of the last flush. The store belongs to the thread that opened it. Other processes use `StoreView`.
"""

from __future__ import annotations

import fcntl
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, Generic, TypeVar

from streamlearn.errors import FROM_SCRATCH, StateLockedError, StoreError
from streamlearn.ledger.store_file import FILE, FORMAT, StoreFile, check_format, check_step, code_of, damaged

Key = TypeVar("Key")
"""int for row numbers, else bytes or str."""
Value = TypeVar("Value")
"""bytes, int or str."""

WAL_PAGES = 4096
"""A commit that leaves more pages than this in the write-ahead log copies them into the file."""
WAL_MAX_BYTES = 256 << 20
"""Above this size a flush waits for readers, up to `LOCK_WAIT_S`, so that the write-ahead log can be emptied."""
_CACHE_BYTES = 64 << 20
_KEYS_PER_SELECT = 64
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


class _Rows(Generic[Key, Value]):
    """One table of the file. Columns of type BLOB keep int and str as they are."""

    def __init__(self, name: str, file: StoreFile, *, numbered: bool) -> None:
        key, ending = ("INTEGER", "") if numbered else ("BLOB", "WITHOUT ROWID")
        file.rows(f"CREATE TABLE IF NOT EXISTS {name} (key {key} PRIMARY KEY, value BLOB NOT NULL) {ending}")
        self._name, self._file = name, file
        self._select = f"SELECT value FROM {name} WHERE key = ?"
        self._select_many = f"SELECT key, value FROM {name} WHERE key IN ({','.join('?' * _KEYS_PER_SELECT)})"

    def get(self, key: Key) -> Value | None:
        """The value of a key."""
        value: Value | None = self._file.value(self._select, key)
        return value

    def fetch(self, keys: Sequence[Key]) -> Mapping[Key, Value | None]:
        """The values of many keys. A key that does not exist may be absent or None; there may be other keys."""
        found: dict[Key, Value | None] = {}
        for start in range(0, len(keys), _KEYS_PER_SELECT):
            some = list(keys[start : start + _KEYS_PER_SELECT])
            some += some[-1:] * (_KEYS_PER_SELECT - len(some))
            found.update(self._file.rows(self._select_many, some))
        return found


class Table(_Rows[Key, Value]):
    """A map whose changes are undone by `rewind`. It may only change while a step is open.

    A step reads a key once, and writes it once, when it ends. Until then, what it touches is held in memory.
    """

    def __init__(self, name: str, store: Store, *, numbered: bool) -> None:
        super().__init__(name, store.file, numbered=numbered)
        self._store = store
        self._now: dict[Key, Value | None] = {}
        """The value of each key that the open step has touched; None if there is no such key."""
        self._stored: dict[Key, Value | None] = {}
        """What the file holds for the keys that have changed since they were last written."""

    def get(self, key: Key) -> Value | None:
        """The value of a key."""
        if key in self._now:
            return self._now[key]
        value = super().get(key)
        if self._store.step_open:
            self._now[key] = value
        return value

    def fetch(self, keys: Sequence[Key]) -> Mapping[Key, Value | None]:
        """The values of many keys. While a step is open, its later changes show in the map."""
        if not self._store.step_open:
            return super().fetch(keys)
        now = self._now
        missing = [key for key in keys if key not in now]
        now.update(dict.fromkeys(missing))
        now.update(super().fetch(missing))
        return now

    def put(self, key: Key, value: Value | None) -> None:
        """Set the value of a key; None removes it."""
        assert self._store.step_open, "no step is open"
        now = self._now
        self._stored.setdefault(key, now[key] if key in now else self.get(key))
        now[key] = value

    def insert(self, key: Key, value: Value) -> None:
        """Set the value of a new key."""
        assert self.get(key) is None, "the key is there already"
        self.put(key, value)

    def delete(self, key: Key) -> None:
        """Remove a key, if it is there."""
        self.put(key, None)

    def first(self) -> tuple[Key, Value] | None:
        """The smallest key and its value."""
        self._write()
        found = self._file.rows(f"SELECT key, value FROM {self._name} ORDER BY key LIMIT 1")
        return found[0] if found else None

    def items(self) -> list[tuple[Key, Value]]:
        """All keys and values; for small tables."""
        self._write()
        return self._file.rows(f"SELECT key, value FROM {self._name} ORDER BY key")

    def _end(self) -> None:
        self._write()
        self._now.clear()

    def _write(self) -> None:
        """Write the changes, and their undo. Of several writes in one step, undo keeps the value before the first."""
        now, stored = self._now, self._stored
        changed = sorted(key for key, value in stored.items() if now[key] != value)  # type: ignore[type-var]
        if changed:
            undo = [(self._store.step, self._name, key, stored[key]) for key in changed]
            self._file.execute_each("INSERT OR IGNORE INTO undo VALUES (?, ?, ?, ?)", undo)
            self._set([(key, now[key]) for key in changed])
        stored.clear()

    def _set(self, changes: Sequence[tuple[Key, Value | None]]) -> None:
        """Set or remove keys in the file."""
        puts = [change for change in changes if change[1] is not None]
        self._file.execute_each(f"REPLACE INTO {self._name} VALUES (?, ?)", puts)
        if len(puts) < len(changes):
            gone = [(key,) for key, value in changes if value is None]
            self._file.execute_each(f"DELETE FROM {self._name} WHERE key = ?", gone)


class Ring(_Rows[int, bytes]):
    """Numbered rows, appended and not changed. `rewind` does not undo them: see `cut` and `trim`.

    Rows that are appended are held in memory until the step ends, or until rows are removed, and written together.
    """

    def __init__(self, name: str, file: StoreFile) -> None:
        super().__init__(name, file, numbered=True)
        self._insert = f"INSERT INTO {name} VALUES (?, ?)"
        self._new: dict[int, bytes] = {}

    def append(self, row: int, value: bytes) -> None:
        """Add a row under a new number, larger than all others."""
        self._new[row] = value

    def get(self, key: int) -> bytes | None:
        """The content of a row."""
        return self._new.get(key) or super().get(key)

    def fetch(self, keys: Sequence[int]) -> Mapping[int, bytes | None]:
        """The content of many rows."""
        new = self._new
        if not new:
            return super().fetch(keys)
        held = {key: new[key] for key in keys if key in new}
        return {**super().fetch([key for key in keys if key not in held]), **held}

    def write(self) -> None:
        """Write the new rows."""
        if self._new:
            self._file.execute_each(self._insert, self._new.items())
            self._new.clear()

    def overwrite(self, row: int, value: bytes) -> None:
        """Replace the content of a row. Not undone, as `trim`."""
        self.write()
        self._file.rows(f"UPDATE {self._name} SET value = ? WHERE key = ?", (value, row))

    def trim(self, low: int) -> None:
        """Remove rows below `low`. Not undone: no rewind may need them."""
        self.write()
        self._file.rows(f"DELETE FROM {self._name} WHERE key < ?", (low,))

    def move(self, low: int, to: Ring, rest: Callable[[bytes], bytes]) -> None:
        """Remove rows below `low`, and append `rest(row)` of each to another ring. Else as `trim`."""
        self.write()
        rows = self._file.each(f"SELECT key, value FROM {self._name} WHERE key < ? ORDER BY key", (low,))
        self._file.execute_each(to._insert, ((key, rest(value)) for key, value in rows))
        self.trim(low)

    def cut(self, high: int) -> None:
        """Remove rows from `high` on, which a rewind has undone."""
        self.write()
        self._file.rows(f"DELETE FROM {self._name} WHERE key >= ?", (high,))


class Store:
    """The only writer of the file. Used by one thread; a second store on the same path is refused.

    Raises:
        StateLockedError: another process (or this one) has the store open.
        StoreError: it is of another format, damaged, or cannot be opened.
    """

    def __init__(
        self,
        path: Path,
        *,
        tables: Sequence[str] = (),
        numbered: Sequence[str] = (),
        rings: Sequence[str] = (),
        may_write: Callable[[], None] = lambda: None,
    ) -> None:
        """The keys of `tables` are bytes or str, those of `numbered` are row numbers.

        `may_write` is called right before each commit. It raises StateLockedError if another learner has taken over.
        """
        self._path, self._may_write = path, may_write
        path.mkdir(parents=True, exist_ok=True)
        with ExitStack() as opened:
            self._lock = opened.enter_context((path / "writer.lock").open("wb"))
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise StateLockedError(f"{path}: another learner has this store open") from error
            self.file = opened.enter_context(closing(StoreFile(path, read_only=False)))
            """The connection that writes."""
            self._open(tables, numbered, rings)
            self._opened = opened.pop_all()

    def _open(self, tables: Sequence[str], numbered: Sequence[str], rings: Sequence[str]) -> None:
        file = self.file
        self.step_open = False
        self.step = 0
        """The last step begun; 0 before the first."""
        for pragma in _PRAGMAS:
            file.rows(f"PRAGMA {pragma}")
        try:
            file.rows("BEGIN IMMEDIATE")
        except StoreError as error:
            if code_of(error.__cause__) != sqlite3.SQLITE_BUSY:
                raise
            raise StateLockedError(f"{self._path}: another learner holds the write lock of this store") from error
        for statement in _SCHEMA:
            file.rows(statement)
        written = FORMAT.to_bytes(8, "big")
        check_format(self._path, self.note("format") or written)
        self.note("format", written)
        self.tables: dict[str, Table[Any, Any]] = {
            name: Table(name, self, numbered=name in numbered) for name in ("step", *tables, *numbered)
        }
        self.rings = {name: Ring(name, file) for name in rings}
        self._read_step()
        self.flush()

    @property
    def pruned(self) -> int:
        """The earliest step that `rewind` can go back to."""
        return self.note("pruned") or 0

    def begin(self, step: int) -> None:
        """Open a step; tables may change until `end`."""
        assert not self.step_open, "the last step was not ended"
        assert step > max(self.step, 0), f"step {step} does not follow {self.step}"
        self.step_open = True
        self.step = step
        self.tables["step"].put("step", step)

    def end(self) -> None:
        """Close the step: write its changes and their undo."""
        assert self.step_open, "no step is open"
        for table in self.tables.values():
            table._end()  # noqa: SLF001 - a table is a part of its store
        for ring in self.rings.values():
            ring.write()
        self.step_open = False

    def flush(self) -> None:
        """Make all ended steps durable.

        Raises:
            StoreError: the disk is full or failing; the file holds the state of the last flush, or of this one.
            StateLockedError: another learner has taken over; nothing was written.
        """
        assert not self.step_open, "a step is open"
        self._commit()
        if (self._path / f"{FILE}-wal").stat().st_size > WAL_MAX_BYTES:
            self.file.rows("PRAGMA wal_checkpoint(TRUNCATE)")
        self.file.rows("BEGIN IMMEDIATE")

    def rewind(self, step: int) -> None:
        """Restore every table to the end of `step`. The caller cuts its rings, then flushes.

        An open step is undone too. Until the flush, a crash leaves the file as it was.

        Raises:
            StoreError: `step` is newer than the store, or too old to be undone; nothing has changed.
        """
        if self.step_open:
            self.end()
        check_step(self.step, step)
        if step < self.pruned:
            raise StoreError(
                f"the store can go back to step {self.pruned}, not to {step}: older undo was pruned; restore a newer "
                f"checkpoint, or {FROM_SCRATCH}"
            )
        undo = "SELECT name, key, value FROM undo WHERE step > ? ORDER BY step DESC"
        for name, key, value in self.file.each(undo, (step,)):
            if name not in self.tables:
                raise damaged(self._path, f"undo names an unknown table {name!r}")
            self.tables[name]._set([(key, value)])  # noqa: SLF001
        self.file.rows("DELETE FROM undo WHERE step > ?", (step,))
        self._read_step()

    def value_at(self, step: int, table: str, key: int | bytes | str) -> Any:
        """The value of a key when `step` ended; None if there was none. `step` must not be pruned."""
        assert not self.step_open, "a step is open"
        assert self.pruned <= step <= self.step, f"step {step} is not in {self.pruned}..{self.step}"
        undo = "SELECT value FROM undo WHERE step > ? AND name = ? AND key = ? ORDER BY step LIMIT 1"
        found = self.file.rows(undo, (step, table, key))
        return found[0][0] if found else self.tables[table].get(key)

    def prune(self, step: int) -> None:
        """Delete the undo of steps up to `step`. Durable with the next flush."""
        assert not self.step_open, "a step is open"
        if step <= self.pruned:
            return
        assert step <= self.step, f"step {step} is not begun"
        self.file.rows("DELETE FROM undo WHERE step <= ?", (step,))
        self.note("pruned", step)

    def _read_step(self) -> None:
        self.step = self.tables["step"].get("step") or 0

    def note(self, key: str, value: bytes | int | str | None = None) -> Any:
        """Read a note about the store as a whole; with a value, write it first. Notes are not undone."""
        if value is not None:
            self.file.rows("REPLACE INTO meta VALUES (?, ?)", (key, value))
        return self.file.value("SELECT value FROM meta WHERE key = ?", key)

    def close(self, *, flush: bool = True) -> None:
        """Flush and close. May be called twice. An open step is lost; after an error, so is all since the last flush.

        Without `flush`, all since the last flush is lost, as by kill -9.

        Raises:
            StateLockedError: another learner has taken over; nothing was written, and the store is closed.
        """
        if self._lock.closed:
            return
        with self._opened:
            if flush and not (self.step_open or self.file.failed):
                self._commit()

    def _commit(self) -> None:
        self._may_write()
        self.file.rows("COMMIT")
