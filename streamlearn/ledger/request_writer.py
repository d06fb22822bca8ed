"""The learner's side of the active-learning queue: rates samples, and writes the best to the file of `request_queue`.

Nothing here changes weights, so nothing is in a checkpoint. A damaged or missing file is replaced, and never stops
the learner.

The utility u of a sample is the entropy of the mean of teacher and student (query by committee: McCallum and Nigam
1998; Settles 2009). Utility alone has four faults. It asks for outliers and for many similar samples. It prefers
samples that were rated before the network knew anything. It never finds a class that the network confidently takes
for another. So

    chance   = EXPLORED + (1 - EXPLORED) u^SHARPNESS / (recent mean of u^SHARPNESS)
    priority = log(chance) + Gumbel noise + age_of(labels known then)

and a hand-out lowers the priority of its predicted class (`request_queue`). The noise makes the order a draw without
replacement, in proportion to the chances (Kirsch et al. 2023): samples of a common kind come before outliers. A share
of the draws is random, which finds what the network is wrongly sure of (Zliobaite et al. 2014). The last term makes
ratings of different times comparable, so no sample is rated twice.

Letters: B rows, C classes.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter, itemgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import structlog

from streamlearn.ledger.request_queue import LabelRequest, connect
from streamlearn.ledger.store_file import is_damage
from streamlearn.records import Position, Probabilities

_log = structlog.get_logger(__name__)

POOL_ROWS = 1000
"""Label requests that are kept, for servers to choose from."""
SHARPNESS = 4.0
"""0 draws at random, infinity takes the largest utility."""
EXPLORED = 0.1
"""Share of random draws."""
TYPICAL_ROWS = 200
"""Horizon of the mean of u^SHARPNESS."""
FADING_LABELS = 1000
"""See `age_of`."""
HANDED_PER_ROW = 10
"""Handed-out samples that are remembered, per row of the pool."""
WAIT_S = 0.25
"""How long the learner waits for the file. After that it continues, and tries again at the next flush."""

_SALT = b"wanted"
"""Of the Gumbel noise. Another salt draws other samples, so published benchmark figures would change."""
_INSERT = "INSERT OR REPLACE INTO samples VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, NULL, NULL)"
_HANDED = "SELECT id FROM samples WHERE turn IS NOT NULL"
_FORGET = """
    DELETE FROM samples WHERE offered_at_s < ? OR turn <= (
        SELECT turn FROM samples WHERE turn IS NOT NULL ORDER BY turn DESC LIMIT 1 OFFSET ?
    ) RETURNING id
"""


class Ratings(NamedTuple):
    """What a label of each row is worth, all from 0 to 1."""

    utility_B: npt.NDArray[np.float64]
    entropy_B: npt.NDArray[np.float64]
    disagreement_B: npt.NDArray[np.float64]


def rate(teacher_probs_BC: Probabilities, student_probs_BC: Probabilities) -> Ratings:
    """Utility H(m) / log C, entropy H(teacher) / log C, and disagreement JS / log 2; m is the mean of the two.

    JS = H(m) - (H(teacher) + H(student)) / 2, so the utility holds both uncertainty and disagreement. Disagreement
    alone was no better than chance: the teacher is an average of the student, and they differ by noise.
    """
    teacher_BC, student_BC = np.asarray(teacher_probs_BC, np.float64), np.asarray(student_probs_BC, np.float64)
    mixed_B = _entropy((teacher_BC + student_BC) / 2)
    teacher_B, student_B = _entropy(teacher_BC), _entropy(student_BC)
    most = math.log(max(2, teacher_BC.shape[1]))
    disagreement_B = (mixed_B - (teacher_B + student_B) / 2) / math.log(2)
    rounded = (mixed_B / most, teacher_B / most, disagreement_B)
    return Ratings(*np.clip(rounded, 0.0, 1.0))  # rounding may leave [0, 1]


def _entropy(probs_BC: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """In nats; 0 log 0 is 0."""
    summed_B: npt.NDArray[np.float64] = -(probs_BC * np.log(np.maximum(probs_BC, 1e-30))).sum(axis=1)
    return summed_B


def gumbel_of(sample_id: str) -> float:
    """Standard Gumbel noise, a function of the id."""
    digest = hashlib.blake2b(sample_id.encode(), digest_size=8, person=_SALT).digest()
    uniform = ((int.from_bytes(digest, "little") >> 12) + 0.5) / 2.0**52  # never 0 or 1, even when rounded
    return -math.log(-math.log(uniform))


def age_of(labels: int) -> float:
    """How much a rating gains over older ones when n labels are known: log n, and past N = `FADING_LABELS` also n/N.

    A sample that was rated with half of the labels weighs half, so ratings of an untrained network fade. Under drift,
    old ratings fade as labels come.
    """
    ripe = min(max(1, labels), FADING_LABELS)
    return math.log(ripe) + max(0, labels - FADING_LABELS) / FADING_LABELS


class RequestWriter:
    """Keeps the best label requests, for the learner's thread: fewer than 2 `rows` in memory, `rows` in the file.

    With `rows = 0` active learning is off: nothing is rated, and the file is not touched.

    No method raises because of the file. Its first failure is logged, and each flush tries again.
    """

    def __init__(self, path: Path, rows: int = POOL_ROWS, *, keep_s: float = math.inf) -> None:
        """Requests more than `keep_s` older than the newest are dropped, since their payload may be evicted."""
        self._path, self._rows, self._keep_s = path, rows, keep_s
        self._db: sqlite3.Connection | None = None
        self._inode = 0
        self._failing = False
        self._labels = 0
        """Labels ever seen. Ratings age by it."""
        self._rated, self._typical = 0, 0.0
        """Samples ever rated, and the recent mean of u^SHARPNESS."""
        self._newest_s = -math.inf
        self._pool: dict[str, LabelRequest] = {}
        self._filed: set[str] = set()
        """Ids that the file holds, handed out or not, as of the last flush."""
        self._handed: set[str] = set()
        """Ids that were handed out, as of the last flush."""
        self._labelled: set[str] = set()
        """Ids that the next flush deletes from the file."""
        self._guarded(self._resume)

    def __len__(self) -> int:
        """Label requests in memory."""
        return len(self._pool)

    def offer(
        self,
        ids: Sequence[str],
        positions: Sequence[Position],
        teacher_probs_BC: Probabilities,
        student_probs_BC: Probabilities,
        now_s: float,
    ) -> None:
        """Rate fresh samples, and keep the best. An id that is in the pool is rated again.

        `now_s` is event time. Rows with non-finite probabilities are skipped.
        """
        if not self._rows or not len(ids):
            return
        self._newest_s = max(self._newest_s, now_s)
        ratings = rate(teacher_probs_BC, student_probs_BC)
        classes = teacher_probs_BC.argmax(axis=1).tolist()
        weights = (np.log(self._chances(ratings.utility_B)) + age_of(self._labels)).tolist()
        rated = zip(*(rated_B.tolist() for rated_B in ratings), strict=True)
        for sample_id, position, class_index, weight, (utility, entropy, disagreement) in zip(
            ids, positions, classes, weights, rated, strict=True
        ):
            if sample_id in self._handed or not math.isfinite(utility):
                continue
            priority = weight + gumbel_of(sample_id)
            self._pool[sample_id] = LabelRequest(
                sample_id, position, class_index, priority, utility, entropy, disagreement, now_s
            )
        if len(self._pool) >= 2 * self._rows:
            self._shrink()

    def labelled(self, ids: Iterable[str]) -> None:
        """Remove the requests for these samples: they have a label."""
        for sample_id in ids:
            self._labels += 1
            self._pool.pop(sample_id, None)
            if sample_id in self._filed:
                self._labelled.add(sample_id)

    def flush(self) -> None:
        """Write the changes in one transaction, and read what was handed out since the last flush."""
        oldest_s = self._newest_s - self._keep_s
        self._pool = {name: request for name, request in self._pool.items() if request.offered_at_s >= oldest_s}
        self._shrink()
        self._guarded(self._write)

    def close(self) -> None:
        """Close the file. May be called twice; a flush opens it again."""
        if self._db is not None:
            self._db.close()
            self._db = None

    def _chances(self, utility_B: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """The chance of each row, relative to recent rows: 1 on average. NaN stays NaN.

        The mean is a plain mean until its horizon is full. It includes this batch.
        """
        sharpened_B = utility_B**SHARPNESS
        finite_B = sharpened_B[np.isfinite(sharpened_B)]
        if len(finite_B):
            self._rated += len(finite_B)
            share = max(len(finite_B) / self._rated, 1.0 - (1.0 - 1.0 / TYPICAL_ROWS) ** len(finite_B))
            self._typical += share * (float(finite_B.mean()) - self._typical)
        chances_B: npt.NDArray[np.float64] = EXPLORED + (1.0 - EXPLORED) * sharpened_B / max(self._typical, 1e-30)
        return chances_B

    def _shrink(self) -> None:
        """Keep `rows`: the best of every predicted class, then the second best of each, and so on."""
        if len(self._pool) <= self._rows:
            return
        seen: Counter[int] = Counter()
        ranked = []
        for request in sorted(self._pool.values(), key=attrgetter("priority"), reverse=True):
            ranked.append((seen[request.predicted_class], request))
            seen[request.predicted_class] += 1
        ranked.sort(key=itemgetter(0))
        self._pool = {request.sample_id: request for _, request in ranked[: self._rows]}

    # -- the file

    def _guarded(self, use: Callable[[sqlite3.Connection], None]) -> None:
        """Use the file. An error is logged, and a damaged file is deleted."""
        if not self._rows:
            return
        try:
            use(self._connection())
        except (sqlite3.Error, OSError) as error:
            self.close()
            damaged = is_damage(error)
            if not self._failing:
                _log.warning("label_requests_failed", path=str(self._path), error=str(error), replaced=damaged)
            self._failing = True
            if damaged:
                # The pool is in memory: the next flush writes it to a new file.
                with contextlib.suppress(OSError):
                    for suffix in ("", "-wal", "-shm"):
                        self._path.with_name(self._path.name + suffix).unlink(missing_ok=True)
        else:
            if self._failing:
                _log.info("label_requests_recovered", path=str(self._path))
            self._failing = False

    def _connection(self) -> sqlite3.Connection:
        """A connection to the file that is at the path now. An operator may have deleted the one of the last flush."""
        if self._db is not None and not (self._path.exists() and self._path.stat().st_ino == self._inode):
            self.close()
        if self._db is None:
            self._db = connect(self._path, wait_s=WAIT_S)
            self._inode = self._path.stat().st_ino
        return self._db

    def _resume(self, db: sqlite3.Connection) -> None:
        """Load pool and ratings from the file."""
        with db:
            db.execute("BEGIN")
            self._labels, self._rated, self._typical = db.execute("SELECT * FROM writer").fetchone()
            rows = db.execute("SELECT * FROM samples WHERE turn IS NULL").fetchall()
            self._handed = {sample_id for (sample_id,) in db.execute(_HANDED)}
        self._pool = {request.sample_id: request for request in map(LabelRequest.of_row, rows)}
        self._filed = self._pool.keys() | self._handed

    def _write(self, db: sqlite3.Connection) -> None:
        """Bring the file up to date. What it holds is read from it: it may be new, and servers write it too."""
        with db:
            db.execute("BEGIN IMMEDIATE")
            filed: dict[str, float] = dict(db.execute("SELECT id, priority FROM samples WHERE turn IS NULL").fetchall())
            handed = {sample_id for (sample_id,) in db.execute(_HANDED)}
            pool = {name: request for name, request in self._pool.items() if name not in handed}
            gone = (filed.keys() - pool.keys()) | self._labelled
            db.executemany("DELETE FROM samples WHERE id = ?", ((sample_id,) for sample_id in gone))
            rated = [request for name, request in pool.items() if name in gone or filed.get(name) != request.priority]
            db.executemany(_INSERT, (request.row() for request in rated))
            forgotten = db.execute(_FORGET, (self._newest_s - self._keep_s, HANDED_PER_ROW * self._rows)).fetchall()
            db.execute(
                "UPDATE writer SET labels = ?, rated = ?, typical = ?", (self._labels, self._rated, self._typical)
            )
        # After the commit: until here the file may still be as it was at the last flush.
        self._pool = pool
        self._handed = handed - gone - {sample_id for (sample_id,) in forgotten}
        self._filed = pool.keys() | self._handed
        self._labelled = set()
