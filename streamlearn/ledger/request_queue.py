"""The active-learning queue: samples whose label would help most, and how servers hand them out.

One SQLite database in WAL mode. The learner writes the label requests (`request_writer.RequestWriter`), any number of
servers hand them out. Each hand-out is one write transaction, so a sample is handed out once.

    samples  the label requests; `turn` is NULL until the sample is handed out
    turns    the last turn: hand-outs are numbered, so that the learner reads only new ones
    spent    hand-outs by second, for the hourly budget
    taken    recent hand-outs by predicted class
    writer   state of the learner's ratings
"""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

from streamlearn.errors import StoreError
from streamlearn.records import Position

HOUR_S = 3600
AGAIN_AFTER_S = 86_400.0
"""A sample that was handed out and got no label is handed out again after this time."""
TURNS_REMEMBERED = 16
"""Hand-outs remembered per class. It bounds how far a class that is new comes before the others."""
WAIT_S = 5.0
"""How long a server waits for the write lock of another."""

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
# The best of each class, at most as many as can be handed out.
_CANDIDATES = """
    SELECT * FROM (
        SELECT *, row_number() OVER (PARTITION BY class ORDER BY priority DESC, id) AS place FROM samples
        WHERE turn IS NULL OR handed_at_s <= ?
    ) WHERE place <= ?
"""


class LabelRequest(NamedTuple):
    """A sample whose label would help. Utility, entropy and disagreement are from 0 to 1."""

    sample_id: str
    position: Position
    predicted_class: int
    """By the teacher, when the sample arrived."""
    priority: float
    """Larger is handed out first. Comparable within one file only."""
    utility: float
    """Entropy of the mean of the teacher's and the student's probabilities, divided by log C."""
    entropy: float
    """Of the teacher's probabilities, divided by log C."""
    disagreement: float
    """Jensen-Shannon divergence of teacher and student, divided by log 2."""
    offered_at_s: float
    """Event time."""

    def row(self) -> tuple[object, ...]:
        """The columns of `samples` up to `offered_at_s`."""
        return (self.sample_id, *self.position, *self[2:])

    @classmethod
    def of_row(cls, row: Sequence[Any]) -> LabelRequest:
        """The inverse of `row`. Further columns are ignored."""
        return cls(row[0], Position(*row[1:4]), *row[4:10])


@dataclass(frozen=True, slots=True)
class HandedOut:
    """The samples handed out, best first, and what is left of the hourly budget."""

    items: list[LabelRequest]
    budget_left: int


class RequestQueue:
    """Hands out label requests: none twice, within the budget, of all classes. Any thread of any process may use it."""

    def __init__(self, path: Path, *, per_hour: int, again_after_s: float = AGAIN_AFTER_S) -> None:
        assert per_hour >= 1, per_hour
        self._path, self._per_hour, self._again_after_s = path, per_hour, again_after_s

    def take(self, n: int, now_s: float, *, peek: bool = False) -> HandedOut:
        """Hand out at most `n` samples: fewer when the budget or the queue is exhausted.

        With `peek` nothing is marked as handed out, and the budget does not apply. `now_s` is wall time.

        Raises:
            StoreError: the file is damaged, or locked for too long. Nothing was handed out.
        """
        assert n >= 1, n
        if not self._path.exists():  # no learner has run yet
            return HandedOut([], self._per_hour)
        try:
            with closing(connect(self._path, wait_s=WAIT_S)) as db, db:
                # A transaction that writes is immediate: else it fails if another process writes before its lock.
                db.execute("BEGIN DEFERRED" if peek else "BEGIN IMMEDIATE")
                left = max(0, self._per_hour - _spent(db, now_s))
                if peek:
                    return HandedOut(_choose(db, n, now_s - self._again_after_s), left)
                chosen = _choose(db, min(n, left), now_s - self._again_after_s)
                _mark(db, chosen, now_s)
                return HandedOut(chosen, left - len(chosen))
        except sqlite3.Error as error:
            raise StoreError(f"{self._path}: {error}; if it is damaged, the learner replaces it") from error


def _spent(db: sqlite3.Connection, now_s: float) -> int:
    """Hand-outs of the last hour. Hand-outs far in the future come from a wrong clock and do not count."""
    second = math.floor(now_s)
    query = "SELECT coalesce(sum(samples), 0) FROM spent WHERE second BETWEEN ? AND ?"
    return int(db.execute(query, (second - HOUR_S, second + HOUR_S)).fetchone()[0])


def _choose(db: sqlite3.Connection, n: int, handed_before_s: float) -> list[LabelRequest]:
    """The n best. A class with k recent hand-outs, those chosen here included, has its priority lowered by log(1 + k).

    This divides the chances of a class by 1 + k. A rare class gets more than its share, an easy class still gets less.
    Strict turns would spend as much on an easy class as on the others.
    """
    taken = dict(db.execute("SELECT class, samples FROM taken").fetchall())
    ranked = []
    for *row, place in db.execute(_CANDIDATES, (handed_before_s, n)):
        request = LabelRequest.of_row(row)
        lowered = math.log1p(taken.get(request.predicted_class, 0.0) + place - 1)
        ranked.append((lowered - request.priority, request.predicted_class, place, request))
    ranked.sort(key=itemgetter(0, 1, 2))
    return [request for *_, request in ranked[:n]]


def _mark(db: sqlite3.Connection, chosen: list[LabelRequest], now_s: float) -> None:
    """Record that these were handed out."""
    if not chosen:
        return
    second = math.floor(now_s)
    db.execute("DELETE FROM spent WHERE second NOT BETWEEN ? AND ?", (second - HOUR_S, second + HOUR_S))
    add = "INSERT INTO {0} VALUES (?, ?) ON CONFLICT DO UPDATE SET samples = samples + excluded.samples"
    db.execute(add.format("spent"), (second, len(chosen)))
    db.executemany(add.format("taken"), [(request.predicted_class, 1.0) for request in chosen])
    # Old hand-outs fade. Otherwise a new class would be handed out alone until it has caught up.
    total, classes = db.execute("SELECT sum(samples), count(*) FROM taken").fetchone()
    if total > (most := TURNS_REMEMBERED * classes):
        db.execute("UPDATE taken SET samples = samples * ?", (most / total,))
    (last,) = db.execute("SELECT last FROM turns").fetchone()
    db.execute("UPDATE turns SET last = ?", (last + len(chosen),))
    marks = [(now_s, last + place, request.sample_id) for place, request in enumerate(chosen, start=1)]
    db.executemany("UPDATE samples SET handed_at_s = ?, turn = ? WHERE id = ?", marks)


# -- the file


def connect(path: Path, *, wait_s: float) -> sqlite3.Connection:
    """A connection that threads may use one at a time. A new file gets its tables.

    Raises:
        sqlite3.Error: the file cannot be opened, is damaged, or is of another format.
    """
    db = sqlite3.connect(path, isolation_level=None, timeout=wait_s, check_same_thread=False)
    try:
        # A power cut may lose the last hand-outs; a crash of a process does not.
        db.execute("PRAGMA synchronous = NORMAL")
        db.execute("PRAGMA journal_mode = WAL").fetchall()
        if _version(db) != _VERSION:
            _prepare(db)
    except BaseException:
        db.close()
        raise
    return db


def _prepare(db: sqlite3.Connection) -> None:
    with db:
        db.execute("BEGIN IMMEDIATE")
        if (version := _version(db)) == _VERSION:
            return  # another process was faster
        if version or db.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]:
            msg = f"unknown format: expected version {_VERSION}, found {version}"
            raise sqlite3.DatabaseError(msg)
        for statement in _SCHEMA:
            db.execute(statement)


def _version(db: sqlite3.Connection) -> int:
    return int(db.execute("PRAGMA user_version").fetchone()[0])
