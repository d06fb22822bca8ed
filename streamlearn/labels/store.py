"""An LMDB environment that can be rewound to an earlier step, exactly.

Files that change in place are ahead of the checkpoint after a crash. So each step also writes down what its keys held
before (`undo`, one row a step), and `rewind` puts it back:

    Table   a map that steps change; every change of a kept step can be undone
    Ring    rows that are appended under growing numbers and never changed; too large to be written twice. Its ends
            are numbers that the caller keeps in a table, undone with it; rows leave it in `trim`, `move` and `cut`

Steps gather in one write transaction that `flush` commits and syncs, so kill -9 leaves the whole state of an earlier
step. That transaction belongs to the thread that made the store: no other may touch the store. Other processes read
what was flushed through `StoreView`.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeAlias

import lmdb

from streamlearn.errors import ANEW, StateError, StateLockedError, StoreError
from streamlearn.labels.whole import TIMEOUT_S, Check, damaged, missing_bytes, remove_stump

Get: TypeAlias = Callable[[str, bytes], bytes | None]
"""`get(database, key)` of a view."""
Transaction: TypeAlias = "lmdb.Transaction[bytes]"

FORMAT = 4
MAX_READERS = 512
LOCK_BYTES = 64 * MAX_READERS + 128
"""Of LMDB's lock file: a line of the cache for each reader, and what the writers share."""
_META, _UNDO = b"meta", b"undo"
_FORMAT_KEY, _PRUNED_KEY = b"format", bytes(8)
_DATABASES = 16
_CHANGE = struct.Struct(">BHi")
"""Of one undone change: table, key bytes, value bytes (ABSENT: there was no such key). Key and value follow."""
_ABSENT = -1


def number(value: int) -> bytes:
    """A row number or step as a key: big-endian, so that keys sort as numbers do."""
    return value.to_bytes(8, "big")


class _Writing:
    """Turns LMDB's errors into ours. One object, since contextlib's generator costs a microsecond on the hot path."""

    __slots__ = ()

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if isinstance(error, lmdb.Error):
            raise StoreError(
                f"the store cannot be written ({error}): free disk space or lower labels.payload_max_bytes and "
                "labels.max_ids, then start again; the state of the last flush is whole"
            ) from error


_WRITING = _Writing()


class _Database:
    """A named database, seen through the open transaction."""

    def __init__(self, handle: lmdb._Database, txn: Transaction) -> None:
        self._handle = handle
        self._txn = txn

    def _opened(self, txn: Transaction) -> None:
        self._txn = txn


class Table(_Database):
    """A map whose changes are undone by `rewind`. It may only change while a step is open.

    Within a step a key is looked up once, and written once, at the end: each walk from the root to a random key waits
    several times for memory, and a join and its first learning ask for the same keys. What a step touches is held in
    memory until it ends.
    """

    def __init__(self, index: int, handle: lmdb._Database, txn: Transaction) -> None:
        super().__init__(handle, txn)
        self._index = index
        self._step_open = False
        self._now: dict[bytes, bytes | None] = {}
        """The value of each key that the open step has touched; None where there is no such key."""
        self._stored: dict[bytes, bytes | None] = {}
        """What the transaction holds instead, of those that are yet to be written."""
        self._before: dict[bytes, bytes | None] = {}
        """What the key held when the step began, of those that were written."""

    def get(self, key: bytes) -> bytes | None:
        """The value of a key."""
        if key in self._now:
            return self._now[key]
        value = self._txn.get(key, None, self._handle)
        if self._step_open:
            self._now[key] = value
        return value

    def fetch(self, keys: Sequence[bytes]) -> Mapping[bytes, bytes | None]:
        """The values of many keys, and of others that the open step has touched; puts that follow show in it."""
        assert self._step_open, "no step is open"
        now, get, handle = self._now, self._txn.get, self._handle
        for key in keys:
            if key not in now:
                now[key] = get(key, None, handle)
        return now

    def put(self, key: bytes, value: bytes | None) -> None:
        """Set the value of a key; None removes it."""
        assert self._step_open, "no step is open"
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
        with self._txn.cursor(self._handle) as cursor:
            return cursor.item() if cursor.first() else None

    def items(self) -> list[tuple[bytes, bytes]]:
        """All keys and values; for small tables."""
        self._write()
        with self._txn.cursor(self._handle) as cursor:
            return list(cursor)

    def _begin(self) -> None:
        self._step_open = True

    def _end(self) -> list[bytes]:
        """The changes of the step, to be undone."""
        self._write()
        index, pack = self._index, _CHANGE.pack
        changes = [
            pack(index, len(key), _ABSENT if value is None else len(value)) + key + (value or b"")
            for key, value in self._before.items()
        ]
        self._before.clear()
        self._now.clear()
        self._step_open = False
        return changes

    def _write(self) -> None:
        """Bring the transaction up to date."""
        now, stored = self._now, self._stored
        changed = [key for key in stored if now[key] != stored[key]]
        puts = [(key, value) for key in changed if (value := now[key]) is not None]
        with _WRITING, self._txn.cursor(self._handle) as cursor:
            cursor.putmulti(puts)
            if len(puts) < len(changed):
                for key in changed:
                    if now[key] is None:
                        self._txn.delete(key, db=self._handle)
        self._before = {key: stored[key] for key in changed} | self._before
        stored.clear()

    def _set(self, key: bytes, value: bytes | None) -> None:
        """Set or remove a key in the transaction itself."""
        if value is None:
            self._txn.delete(key, db=self._handle)
        else:
            self._txn.put(key, value, db=self._handle)


class Ring(_Database):
    """Numbered rows, appended and never changed. Not undone: see `cut` and `trim`."""

    def append(self, row: bytes, value: bytes | memoryview) -> None:
        """Add a row; its `number` is beyond every row there is."""
        with _WRITING:
            self._txn.put(row, value, append=True, db=self._handle)

    def get(self, row: bytes) -> bytes | None:
        """A row by its `number`, if it is still on the disk."""
        return self._txn.get(row, None, self._handle)

    def fetch(self, rows: Sequence[bytes]) -> list[bytes | None]:
        """Many rows."""
        get, handle = self._txn.get, self._handle
        return [get(row, None, handle) for row in rows]

    def trim(self, low: int) -> int:
        """Remove rows below `low` from the disk; how many there were. Not undone: nobody may rewind to need them."""
        removed, end = 0, number(low)
        with _WRITING, self._txn.cursor(self._handle) as cursor:
            more = cursor.first()
            while more and cursor.key() < end:
                more = cursor.delete() and bool(cursor.key())
                removed += 1
        return removed

    def move(self, low: int, to: Ring, rest: Callable[[bytes], bytes]) -> int:
        """Remove rows below `low`, and append to another ring what `rest` leaves of each. As `trim` in all else."""
        moved, end = 0, number(low)
        with _WRITING, self._txn.cursor(self._handle) as cursor:
            more = cursor.first()
            while more and (row := cursor.key()) < end:
                to.append(row, rest(cursor.value()))
                more = cursor.delete() and bool(cursor.key())
                moved += 1
        return moved

    def cut(self, high: int) -> int:
        """Remove rows from `high` on, which a rewind has unmade; how many there were."""
        removed = 0
        with _WRITING, self._txn.cursor(self._handle) as cursor:
            more = cursor.set_range(number(high))
            while more:
                more = cursor.delete() and bool(cursor.key())
                removed += 1
        return removed


class Store:
    """The one writer of an environment. Used by one thread; a second store on the same path is refused.

    Raises:
        StateLockedError: another process (or this one) has the store open.
        StoreError: it is of another format, or cannot be opened.
    """

    def __init__(
        self,
        path: Path,
        *,
        tables: Sequence[str],
        rings: Sequence[str],
        map_size: int,
        may_write: Callable[[], None] = lambda: None,
    ) -> None:
        """`may_write` is asked right before each commit, and raises StateLockedError where another writes here now."""
        self._may_write = may_write
        path.mkdir(parents=True, exist_ok=True)
        self._lock = (path / "writer.lock").open("wb")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise StateLockedError(f"{path}: another learner has this store open") from error
        try:
            remove_stump(path)
            _allocate_lock(path / "lock.mdb")
            self._open(path, tables, rings, map_size)
        except (lmdb.DiskError, OSError) as error:
            self._lock.close()
            raise StoreError(f"{path}: cannot open the store ({error}): free disk space, then start again") from error
        except lmdb.Error as error:
            self._lock.close()
            raise damaged(path, f"cannot open the store: {error}") from error
        except StateError:
            self._env.close()
            self._lock.close()
            raise

    def _open(self, path: Path, tables: Sequence[str], rings: Sequence[str], map_size: int) -> None:
        # readahead off: keys are hashes, so the neighbours of a page are of no use.
        self._env = lmdb.open(
            str(path), map_size=map_size, max_dbs=_DATABASES, max_readers=MAX_READERS, readahead=False, metasync=True
        )
        self._env.reader_check()
        self._txn: Transaction = self._env.begin(write=True)
        self._meta = self._env.open_db(_META, txn=self._txn)
        self._undo = self._env.open_db(_UNDO, txn=self._txn)
        if self._txn.get(_FORMAT_KEY, None, self._meta) is None:
            self._txn.put(_FORMAT_KEY, number(FORMAT), db=self._meta)
        found = self._txn.get(_FORMAT_KEY, None, self._meta)
        if found != number(FORMAT):
            raise _wrong_format(path, found)
        self.tables = {
            name: Table(index, self._env.open_db(name.encode(), txn=self._txn), self._txn)
            for index, name in enumerate(["step", *tables])
        }
        self.rings = {name: Ring(self._env.open_db(name.encode(), txn=self._txn), self._txn) for name in rings}
        self._by_index = list(self.tables.values())
        self.step_open = False
        self._read_step()
        self._lost = False  # a flush failed, and has said so
        self.flush()

    @property
    def step(self) -> int:
        """The last step begun; 0 before the first."""
        return self._step

    @property
    def pruned(self) -> int:
        """The earliest step that can be rewound to."""
        value = self._txn.get(_PRUNED_KEY, None, self._undo)
        return 0 if value is None else int.from_bytes(value, "big")

    def begin(self, step: int) -> None:
        """Open a step; tables may change until `end`."""
        assert not self.step_open, "the last step was not ended"
        assert step > max(self.step, 0), f"step {step} does not follow {self.step}"
        self.step_open = True
        self._step = step
        for table in self._by_index:
            table._begin()  # noqa: SLF001 - a table is a part of its store
        self.tables["step"].put(b"step", number(step))

    def end(self) -> None:
        """Close the step and write down how to undo it."""
        assert self.step_open, "no step is open"
        parts = [part for table in self._by_index for part in table._end()]  # noqa: SLF001
        with _WRITING:
            self._txn.put(number(self.step), b"".join(parts), append=True, db=self._undo)
        self.step_open = False

    def flush(self) -> None:
        """Make all ended steps durable, together.

        Raises:
            StoreError: the disk is full or failing; on disk stands the state of the last flush, whole.
            StateLockedError: another learner has taken over; nothing was written.
        """
        assert not self.step_open, "a step is open"
        self._may_write()
        self._lost = True
        with _WRITING:
            self._txn.commit()
            self._txn = self._env.begin(write=True)
        self._lost = False
        databases: list[_Database] = [*self.tables.values(), *self.rings.values()]
        for database in databases:
            database._opened(self._txn)  # noqa: SLF001

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
                f"put back the store that belongs to the checkpoint, or {ANEW}"
            )
        if step < self.pruned:
            raise StoreError(
                f"the store can go back to step {self.pruned}, not to {step}: older undo was pruned; put back a newer "
                f"checkpoint, or {ANEW}"
            )
        with _WRITING, self._txn.cursor(self._undo) as cursor:
            while cursor.last() and int.from_bytes(cursor.key(), "big") > step:
                for index, key, value in _changes(cursor.value()):
                    self._by_index[index]._set(key, value)  # noqa: SLF001
                cursor.delete()
        self._read_step()

    def value_at(self, step: int, table: str, key: bytes) -> bytes | None:
        """What a key held when `step` ended; `step` is none that was pruned."""
        assert not self.step_open, "a step is open"
        assert self.pruned <= step <= self.step, f"step {step} is not in {self.pruned}..{self.step}"
        wanted = self._by_index.index(self.tables[table])
        with self._txn.cursor(self._undo) as cursor:
            more = cursor.set_range(number(step + 1))
            while more:
                for index, changed, value in _changes(cursor.value()):
                    if index == wanted and changed == key:
                        return value
                more = cursor.next()
        return self.tables[table].get(key)

    def prune(self, step: int) -> None:
        """Forget how to go back beyond `step`. Durable with the next flush."""
        assert not self.step_open, "a step is open"
        if step <= self.pruned:
            return
        assert step <= self.step, f"step {step} is not begun"
        with _WRITING:
            with self._txn.cursor(self._undo) as cursor:
                while cursor.first() and int.from_bytes(cursor.key(), "big") <= step:
                    cursor.delete()
            self._txn.put(_PRUNED_KEY, number(step), db=self._undo)
        self._env.reader_check()

    def _read_step(self) -> None:
        value = self.tables["step"].get(b"step")
        self._step = 0 if value is None else int.from_bytes(value, "big")

    def note(self, key: str, value: bytes | None = None) -> bytes | None:
        """Read a note about the store as a whole; with a value, write it first. Notes are not undone."""
        if value is not None:
            with _WRITING:
                self._txn.put(key.encode(), value, db=self._meta)
        return self._txn.get(key.encode(), None, self._meta)

    def close(self) -> None:
        """Flush and let go. A step that is open is lost, with all since the last flush. May be called twice.

        Raises:
            StateLockedError: another learner has taken over; nothing was written, and the store was let go of.
        """
        if self._lock.closed:
            return
        try:
            if self.step_open or self._lost:
                self._txn.abort()
            else:
                self._may_write()
                with _WRITING:
                    self._txn.commit()
        finally:
            self._env.close()
            self._lock.close()


class _Opened(NamedTuple):
    """An environment as a reader holds it; `inode` tells whether the file at the path is still the same."""

    env: lmdb.Environment
    handles: dict[str, lmdb._Database]
    inode: int


class StoreView:
    """Reads a store that another process writes, as of its last flush. Any thread may use it.

    The store may be made, or made anew, after the view: it is opened when it is there. A file that is too short for all
    its pages is checked first, since reading a page that is missing would end this process.
    """

    def __init__(self, path: Path, *, wait_s: float = TIMEOUT_S) -> None:
        """`wait_s`: how long a read may wait for that check, counted from its start."""
        self._path, self._wait_s = path, wait_s
        self._opening = threading.Lock()
        self._opened: _Opened | None = None
        self._check: Check | None = None
        self._checked = 0, 0
        """Inode and size of the file that is checked."""

    @contextlib.contextmanager
    def read(self) -> Iterator[Get | None]:
        """One moment of the store; None where there is no store yet.

        Raises:
            StoreError: the store is of another format, damaged, still being checked, or cannot be read.
        """
        try:
            opened = self._ready()
            if opened is None:
                yield None
                return
            with self._begin(opened.env) as txn:
                yield lambda database, key: txn.get(key, None, opened.handles[database])
        except (lmdb.Error, OSError) as error:
            raise StoreError(f"{self._path}: cannot read the store: {error}") from error

    def close(self) -> None:
        """Let go. May be called twice; a later read opens anew."""
        with self._opening:
            if self._opened is not None:
                self._opened.env.close()
                self._opened = None
            self._forget_check()

    def _begin(self, env: lmdb.Environment) -> Transaction:
        try:
            return env.begin()
        except lmdb.MapResizedError:
            env.set_mapsize(0)  # the writer came back with a larger map: take its size
            return env.begin()

    def _ready(self) -> _Opened | None:
        try:
            data = (self._path / "data.mdb").stat()
        except FileNotFoundError:
            return None
        if not data.st_size:
            return None
        opened = self._opened
        if opened is None or opened.inode != data.st_ino:
            with self._opening:
                if self._opened is None or self._opened.inode != data.st_ino:
                    # The old one is not closed here: another thread may be reading it, and the last reader lets it go.
                    self._opened = self._open(data.st_ino, data.st_size)
                opened = self._opened
        return opened

    def _open(self, inode: int, size_bytes: int) -> _Opened | None:
        env = lmdb.open(
            str(self._path), map_size=0, readonly=True, create=False, max_dbs=_DATABASES, max_readers=MAX_READERS
        )
        with contextlib.ExitStack() as unless_opened:
            unless_opened.callback(env.close)
            if missing_bytes(self._path, env):
                self._refuse_damaged(inode, size_bytes)
            with env.begin() as txn, txn.cursor() as cursor:
                # An environment's unnamed database lists the named ones. The writer makes all in its first commit.
                names = list(cursor.iternext(values=False))
            # Not inside that transaction: LMDB keeps a handle only from one that is committed, and readers never are.
            handles = {name.decode(): env.open_db(name, create=False) for name in names}
            if not handles:
                return None
            with env.begin() as txn:
                found = txn.get(_FORMAT_KEY, None, handles["meta"])
            if found != number(FORMAT):
                raise _wrong_format(self._path, found)
            env.reader_check()  # slots of servers that were killed would keep old pages from being used again
            unless_opened.pop_all()
        return _Opened(env, handles, inode)

    def _refuse_damaged(self, inode: int, size_bytes: int) -> None:
        """Return only where the store is good. Damage that was found is believed until the file changes its size."""
        is_same = self._checked == (inode, size_bytes)
        if self._check is None or not (is_same or (self._checked[0] == inode and self._check.is_running)):
            self._forget_check()
            self._check, self._checked = Check(self._path, live=True), (inode, size_bytes)
        is_good = self._check.result(self._wait_s)
        if is_good is None and self._check.age_s < TIMEOUT_S:
            raise StoreError(f"{self._path}: the store is being checked for damage, which may take a minute")
        self._forget_check()
        if not is_good:
            raise StoreError(f"{self._path}: the store could not be checked for damage")

    def _forget_check(self) -> None:
        if self._check is not None:
            self._check.close()
            self._check = None


def _allocate_lock(path: Path) -> None:
    """Have the disk hold all of LMDB's lock file: a page of it that finds no room later is a SIGBUS, and no error.

    Raises:
        OSError: there is no room.
    """
    size_bytes = path.stat().st_size if path.exists() else 0
    if size_bytes < LOCK_BYTES and hasattr(os, "posix_fallocate"):
        with path.open("ab") as file:
            os.posix_fallocate(file.fileno(), 0, LOCK_BYTES)


def _wrong_format(path: Path, found: bytes | None) -> StoreError:
    number_found = "none" if found is None else int.from_bytes(found, "big")
    return StoreError(
        f"{path}: the store is of format {number_found}, this version reads {FORMAT}: "
        f"go on with the version that wrote it, or {ANEW}"
    )


def _changes(undo: bytes) -> Iterator[tuple[int, bytes, bytes | None]]:
    """Table, key and former value of each change of one step."""
    at = 0
    while at < len(undo):
        index, key_size, value_size = _CHANGE.unpack_from(undo, at)
        at += _CHANGE.size
        key = undo[at : at + key_size]
        at += key_size
        value = None if value_size == _ABSENT else undo[at : at + value_size]
        at += max(value_size, 0)
        yield index, key, value
