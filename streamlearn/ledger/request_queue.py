"""The file between learner and servers that holds the samples whose label would help, and the servers' side of it.

One SQLite database in WAL mode. The learner writes what waits (`wanted.RequestWriter`), any number of servers hand out,
and each hand-out is one write transaction, so no two get the same sample. A row of `samples` without a `turn` waits;
`turn` counts hand-outs, and `turns` holds the last: the learner reads on from there, and rows of labelled samples go.
`spent` is the budget, by the second; `taken` is how often each predicted class was handed out lately; `writer` is the
learner's own.
"""

from __future__ import annotations

import heapq
import math
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from streamlearn.errors import StoreError
from streamlearn.records import Position

HOUR_S = 3600
TURNS_REMEMBERED = 16
"""Hand-outs remembered, for each class that had any: so much may a class that is new come before the others."""
WAIT_S = 5.0
"""A server waits so long for another that hands out."""

_VERSION = 2
_SCHEMA = (
    """CREATE TABLE samples (
        id TEXT PRIMARY KEY, topic TEXT NOT NULL, partition INTEGER NOT NULL, record_offset INTEGER NOT NULL,
        class INTEGER NOT NULL, priority REAL NOT NULL, utility REAL NOT NULL, entropy REAL NOT NULL,
        disagreement REAL NOT NULL, offered_at_s REAL NOT NULL, handed_at_s REAL, turn INTEGER
    ) WITHOUT ROWID""",
    "CREATE INDEX samples_by_turn ON samples (turn)",
    "CREATE TABLE turns (last INTEGER NOT NULL)",
    "INSERT INTO turns VALUES (0)",
    "CREATE TABLE spent (second INTEGER PRIMARY KEY, samples INTEGER NOT NULL)",
    "CREATE TABLE taken (class INTEGER PRIMARY KEY, samples REAL NOT NULL)",
    "CREATE TABLE writer (labels INTEGER NOT NULL, rated INTEGER NOT NULL, typical REAL NOT NULL)",
    "INSERT INTO writer VALUES (0, 0, 0.0)",
    f"PRAGMA user_version = {_VERSION}",
)
# Not more of any class than could be handed out, best first.
_CANDIDATES = """
    SELECT * FROM (
        SELECT *, row_number() OVER (PARTITION BY class ORDER BY priority DESC, id) AS place FROM samples
        WHERE turn IS NULL OR handed_at_s <= ?
    ) WHERE place <= ? ORDER BY class, place
"""
_DAMAGE = {sqlite3.SQLITE_ERROR, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}
"""What a damaged file, or one of another format, answers. Anything else (busy, full, denied) may pass by itself."""


class LabelRequest(NamedTuple):
    """A sample whose label would help. Utility, entropy and disagreement are from 0 to 1."""

    sample_id: str
    position: Position
    predicted_class: int
    """By the teacher, when the sample came."""
    priority: float
    """Larger is asked for first; has a meaning within one file only."""
    utility: float
    """Entropy of the mean of teacher's and student's probabilities, as a share of log C."""
    entropy: float
    """Of the teacher's probabilities, as a share of log C."""
    disagreement: float
    """Jensen-Shannon divergence of teacher and student, as a share of log 2."""
    offered_at_s: float
    """By the stream's time."""

    def row(self) -> tuple[object, ...]:
        """As `samples` holds it, without what is known of hand-outs."""
        return (self.sample_id, *self.position, *self[2:])

    @classmethod
    def of_row(cls, row: tuple[Any, ...]) -> LabelRequest:
        """The inverse of `row`; columns that follow are left out."""
        return cls(row[0], Position(*row[1:4]), *row[4:10])


@dataclass(frozen=True, slots=True)
class HandedOut:
    """What was handed out, best first, and how many more may be within the hour."""

    items: list[LabelRequest]
    budget_left: int


class RequestQueue:
    """Hands out, for any thread of any process: no sample twice, no more than the budget, and not one class alone."""

    def __init__(self, path: Path, *, per_hour: int, again_after_s: float) -> None:
        assert per_hour >= 1, per_hour
        self._path, self._per_hour, self._again_after_s = path, per_hour, again_after_s

    def take(self, n: int, now_s: float, *, peek: bool = False) -> HandedOut:
        """Hand out at most `n`: fewer where the hour's budget, or what waits, has no more.

        With `peek` nothing is marked, and the budget bounds nothing. `now_s` is wall time, the same for all processes.

        Raises:
            StoreError: the file is damaged or busy for too long; nothing was handed out.
        """
        assert n >= 1, n
        try:
            return self._take(n, now_s, peek=peek)
        except sqlite3.Error as error:
            msg = f"{self._path}: {error}; the learner makes it anew where it is damaged"
            raise StoreError(msg) from error

    def _take(self, n: int, now_s: float, *, peek: bool) -> HandedOut:
        if not self._path.exists():  # no learner has run yet
            return HandedOut([], self._per_hour)
        with closing(connect(self._path, wait_s=WAIT_S, create=False)) as db:
            if _version(db) == 0:  # it is being made
                return HandedOut([], self._per_hour)
            with transaction(db, "DEFERRED" if peek else "IMMEDIATE"):
                left = max(0, self._per_hour - _spent(db, now_s))
                if peek:
                    return HandedOut(_choose(db, n, now_s - self._again_after_s), left)
                chosen = _choose(db, min(n, left), now_s - self._again_after_s)
                _mark(db, chosen, now_s)
                return HandedOut(chosen, left - len(chosen))


def _spent(db: sqlite3.Connection, now_s: float) -> int:
    """Hand-outs of the last hour. Those far in the future are of a clock that was wrong."""
    second = math.floor(now_s)
    query = "SELECT coalesce(sum(samples), 0) FROM spent WHERE second BETWEEN ? AND ?"
    return int(db.execute(query, (second - HOUR_S, second + HOUR_S)).fetchone()[0])


def _choose(db: sqlite3.Connection, n: int, handed_before_s: float) -> list[LabelRequest]:
    """Again and again the best, where a class that was handed out k times lately has log(1 + k) less priority.

    That divides its chances by 1 + k: a class that is predicted rarely has more than its share, and one that is easy is
    still asked for less. Classes in strict turn would spend as much on it as on the others.
    """
    if n == 0:
        return []
    taken = dict(db.execute("SELECT class, samples FROM taken").fetchall())
    waiting: dict[int, list[LabelRequest]] = {}
    for row in db.execute(_CANDIDATES, (handed_before_s, n)):
        wanted = LabelRequest.of_row(row)
        waiting.setdefault(wanted.predicted_class, []).append(wanted)

    def entry(class_index: int, place: int) -> tuple[float, int, int]:
        lowered = math.log1p(taken.get(class_index, 0.0) + place)
        return lowered - waiting[class_index][place].priority, class_index, place

    heads = [entry(class_index, 0) for class_index in waiting]
    heapq.heapify(heads)
    chosen: list[LabelRequest] = []
    while heads and len(chosen) < n:
        _, class_index, place = heapq.heappop(heads)
        chosen.append(waiting[class_index][place])
        if place + 1 < len(waiting[class_index]):
            heapq.heappush(heads, entry(class_index, place + 1))
    return chosen


def _mark(db: sqlite3.Connection, chosen: list[LabelRequest], now_s: float) -> None:
    """Remember that these were handed out, to whom does not matter."""
    if not chosen:
        return
    second = math.floor(now_s)
    db.execute("DELETE FROM spent WHERE second NOT BETWEEN ? AND ?", (second - HOUR_S, second + HOUR_S))
    add = "INSERT INTO {0} VALUES (?, ?) ON CONFLICT DO UPDATE SET samples = samples + excluded.samples"
    db.execute(add.format("spent"), (second, len(chosen)))
    db.executemany(add.format("taken"), [(wanted.predicted_class, 1.0) for wanted in chosen])
    # Old turns fade, or a class that is new would have all to itself until it has caught up with years.
    total, classes = db.execute("SELECT sum(samples), count(*) FROM taken").fetchone()
    if total > (most := TURNS_REMEMBERED * classes):
        db.execute("UPDATE taken SET samples = samples * ?", (most / total,))
    (last,) = db.execute("SELECT last FROM turns").fetchone()
    db.execute("UPDATE turns SET last = ?", (last + len(chosen),))
    marks = [(now_s, last + place, wanted.sample_id) for place, wanted in enumerate(chosen, start=1)]
    db.executemany("UPDATE samples SET handed_at_s = ?, turn = ? WHERE id = ?", marks)


# -- the file


def connect(path: Path, *, wait_s: float, create: bool) -> sqlite3.Connection:
    """A connection for any one thread at a time; with `create`, to a file that has its tables.

    Raises:
        sqlite3.Error: it cannot be opened, is damaged, or is of another format.
    """
    uri = f"{path.absolute().as_uri()}?mode={'rwc' if create else 'rw'}"
    db = sqlite3.connect(uri, uri=True, isolation_level=None, timeout=wait_s, check_same_thread=False)
    try:
        # A power cut may take the last hand-outs with it; a crash of a process does not.
        db.execute("PRAGMA synchronous = NORMAL")
        if create:
            db.execute("PRAGMA journal_mode = WAL").fetchall()
            _prepare(db)
    except BaseException:
        db.close()
        raise
    return db


def _prepare(db: sqlite3.Connection) -> None:
    if _version(db) == _VERSION:
        return
    with transaction(db, "IMMEDIATE"):
        if _version(db) or db.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]:
            msg = f"no such format: wanted version {_VERSION}, found {_version(db)}"
            raise sqlite3.DatabaseError(msg)
        for statement in _SCHEMA:
            db.execute(statement)


def _version(db: sqlite3.Connection) -> int:
    return int(db.execute("PRAGMA user_version").fetchone()[0])


@contextmanager
def transaction(db: sqlite3.Connection, kind: Literal["DEFERRED", "IMMEDIATE"]) -> Iterator[None]:
    """Committed at the end, or gone whole. One that writes must be immediate: a deferred one may be too late to."""
    db.execute(f"BEGIN {kind}")
    try:
        yield
        db.execute("COMMIT")
    finally:
        if db.in_transaction:
            db.execute("ROLLBACK")


def is_damage(error: Exception) -> bool:
    """Whether an error means that the file itself is of no use."""
    return isinstance(error, sqlite3.Error) and _code(error) in _DAMAGE


def _code(error: sqlite3.Error) -> int:
    """SQLite's primary result code; an error of our own has none."""
    return int(getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR)) & 0xFF


def remove(path: Path) -> None:
    """Delete the file and what stands beside it."""
    for suffix in ("", "-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)
