"""Which samples would help most if somebody labelled them: rated by the learner, handed out by the servers.

`RequestWriter` belongs to the learner: it rates each fresh sample, keeps the best in memory, and writes the changes to
the file of `request_queue` when the learner publishes. `RequestQueue` belongs to a server. Nothing here changes
weights, so nothing is in a checkpoint. A damaged or missing file is replaced, and never stops the learner.

What is asked for first. The utility u of a sample is the entropy of what teacher and student say together (query by
committee: McCallum and Nigam 1998; Settles 2009). By itself it asks for outliers, for many samples that are alike, for
what a network was unsure of before it knew anything, and never for a class that it takes for another with certainty. So

    chance   = EXPLORED + (1 - EXPLORED) u^SHARPNESS / (what was typical of that then)
    priority = log(chance) + Gumbel noise + age_of(labels known then)

and, as they are handed out, less for a predicted class that had its share (`wanted_file`). The noise makes the order a
draw without replacement in proportion to the chances (Kirsch et al. 2023), so what is unsure and common comes before
what is unsure and rare. A share of the draws is at random, which alone finds what the network is wrongly sure of
(Zliobaite et al. 2014). The rest makes ratings of different times comparable, so that nothing has to be rated again.

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

from streamlearn.ledger.request_queue import LabelRequest, connect, is_damage, remove, transaction
from streamlearn.records import Position, Probabilities

_log = structlog.get_logger(__name__)

SHARPNESS = 4.0
"""0 draws at random, infinity takes the largest utility."""
EXPLORED = 0.1
"""Share of the draws that are at random, whatever the network says."""
TYPICAL_ROWS = 200
"""Horizon of the mean of u^SHARPNESS."""
FADING_LABELS = 1000
"""See `age_of`."""
HANDED_PER_ROW = 10
"""Samples remembered as handed out, for each row of the pool."""
WAIT_S = 0.25
"""The learner waits so long for the file, and then goes on without it until the next flush."""

_INSERT = "INSERT OR REPLACE INTO samples VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, NULL, NULL)"
_HANDED = "SELECT id, turn FROM samples WHERE turn > ? ORDER BY turn"
_FORGET = """
    DELETE FROM samples WHERE offered_at_s < ? OR turn <= (
        SELECT turn FROM samples WHERE turn IS NOT NULL ORDER BY turn DESC LIMIT 1 OFFSET ?
    ) RETURNING id
"""


class Ratings(NamedTuple):
    """What teacher and student say of the worth of each label, all from 0 to 1."""

    utility_B: npt.NDArray[np.float64]
    entropy_B: npt.NDArray[np.float64]
    disagreement_B: npt.NDArray[np.float64]


def rate(teacher_probs_BC: Probabilities, student_probs_BC: Probabilities) -> Ratings:
    """Consensus entropy H(m) / log C, H(teacher) / log C, and JS / log 2, where m is the mean of the two.

    JS = H(m) - (H(teacher) + H(student)) / 2, so the utility holds both what the two are unsure of and what they
    disagree on. Disagreement alone, tried when this was built, was no better than chance: two networks of which one is
    the average of the other are mostly unsure of the same samples, and differ by noise.
    """
    teacher_BC, student_BC = np.asarray(teacher_probs_BC, np.float64), np.asarray(student_probs_BC, np.float64)
    mixed_B = _entropy((teacher_BC + student_BC) / 2)
    teacher_B, student_B = _entropy(teacher_BC), _entropy(student_BC)
    most = math.log(max(2, teacher_BC.shape[1]))
    disagreement_B = (mixed_B - (teacher_B + student_B) / 2) / math.log(2)
    return Ratings(_bounded(mixed_B / most), _bounded(teacher_B / most), _bounded(disagreement_B))


def _bounded(rated_B: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Rounding may leave the range from 0 to 1 by a hair."""
    clipped_B: npt.NDArray[np.float64] = np.clip(rated_B, 0.0, 1.0)
    return clipped_B


def _entropy(probs_BC: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """In nats; 0 log 0 is 0."""
    summed_B: npt.NDArray[np.float64] = -(probs_BC * np.log(np.maximum(probs_BC, 1e-30))).sum(axis=1)
    return summed_B


def gumbel_of(sample_id: str) -> float:
    """Standard Gumbel noise, the same for an id wherever and whenever it is asked."""
    digest = hashlib.blake2b(sample_id.encode(), digest_size=8, person=b"wanted").digest()
    uniform = ((int.from_bytes(digest, "little") >> 12) + 0.5) / 2.0**52  # never 0 or 1, even when rounded
    return -math.log(-math.log(uniform))


def age_of(labels: int) -> float:
    """What a rating has over older ones when so many labels are known: log n, from N = `FADING_LABELS` on n/N more.

    A sample rated when half of the labels were known weighs half: an ignorant network's ratings do not outlive it. Of a
    world that drifts the old ones go too, as labels come.
    """
    ripe = min(max(1, labels), FADING_LABELS)
    return math.log(ripe) + max(0, labels - FADING_LABELS) / FADING_LABELS


class RequestWriter:
    """The learner's side, for its one thread. Holds less than twice `rows` samples; the file, `rows` that wait.

    No method raises because of the file. Its first failure is logged, and the next flush tries again.
    """

    def __init__(self, path: Path, rows: int, *, keep_s: float = math.inf) -> None:
        """Keep `rows` samples, none that came more than `keep_s` before the newest: payloads do not stay for ever."""
        assert rows >= 1, rows
        self._path, self._rows, self._keep_s = path, rows, keep_s
        self._db: sqlite3.Connection | None = None
        self._inode = 0
        self._failing = False
        self._labels = 0
        """Labels ever seen: the clock by which ratings age."""
        self._rated, self._typical = 0, 0.0
        """Samples ever rated, and the mean of u^SHARPNESS of the last ones."""
        self._newest_s = -math.inf
        self._pool: dict[str, LabelRequest] = {}
        self._new: set[str] = set()
        """Ids in the pool that are not in the file, or not as they are."""
        self._forget_file()
        self._guarded(self._resume)

    def __len__(self) -> int:
        """Samples that wait, as far as the learner knows."""
        return len(self._pool)

    def offer(
        self,
        ids: Sequence[str],
        positions: Sequence[Position],
        teacher_probs_BC: Probabilities,
        student_probs_BC: Probabilities,
        now_s: float,
    ) -> None:
        """Rate fresh samples, and keep those that are worth it. An id that waits already is rated anew.

        `now_s` is the stream's time. Rows that are not finite are passed by.
        """
        if not len(ids):
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
            self._new.add(sample_id)
        if len(self._pool) >= 2 * self._rows:
            self._shrink()

    def labelled(self, ids: Iterable[str]) -> None:
        """Nobody needs to label these any more."""
        for sample_id in ids:
            self._labels += 1
            self._drop(sample_id)
            if sample_id in self._filed or sample_id in self._handed:
                self._labelled.add(sample_id)

    def flush(self) -> None:
        """Write the difference in one transaction, and read what was handed out since the last time."""
        before_s = self._newest_s - self._keep_s
        for sample_id in [wanted.sample_id for wanted in self._pool.values() if wanted.offered_at_s < before_s]:
            self._drop(sample_id)
        self._shrink()
        self._guarded(self._write)

    def close(self) -> None:
        """Let go of the file. May be called twice; a flush opens it again."""
        if self._db is not None:
            self._db.close()
            self._db = None

    def _chances(self, utility_B: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Of each row against others of its time: 1 in the mean. NaN stays NaN.

        What is typical is a plain mean until its horizon is full; this batch is in it.
        """
        sharpened_B = utility_B**SHARPNESS
        finite_B = sharpened_B[np.isfinite(sharpened_B)]
        if len(finite_B):
            self._rated += len(finite_B)
            share = max(len(finite_B) / self._rated, 1.0 - (1.0 - 1.0 / TYPICAL_ROWS) ** len(finite_B))
            self._typical += share * (float(finite_B.mean()) - self._typical)
        chances_B: npt.NDArray[np.float64] = EXPLORED + (1.0 - EXPLORED) * sharpened_B / max(self._typical, 1e-30)
        return chances_B

    def _drop(self, sample_id: str) -> None:
        self._pool.pop(sample_id, None)
        self._new.discard(sample_id)

    def _shrink(self) -> None:
        """Keep `rows`: the best of every predicted class, then the second of each, and so on."""
        if len(self._pool) <= self._rows:
            return
        seen: Counter[int] = Counter()
        ranked = []
        for wanted in sorted(self._pool.values(), key=attrgetter("priority"), reverse=True):
            ranked.append((seen[wanted.predicted_class], wanted))
            seen[wanted.predicted_class] += 1
        ranked.sort(key=itemgetter(0))
        self._pool = {wanted.sample_id: wanted for _, wanted in ranked[: self._rows]}
        self._new &= self._pool.keys()

    # -- the file

    def _forget_file(self) -> None:
        """Nothing that is remembered of the file holds: all of the pool must be written."""
        self._filed: set[str] = set()
        """Ids that wait in the file, as of the last flush."""
        self._handed: dict[str, None] = {}
        """Ids that were handed out, as of the last flush."""
        self._labelled: set[str] = set()
        """Ids that the file must forget."""
        self._turn = 0
        """The last hand-out that was read."""
        self._new = set(self._pool)

    def _guarded(self, use: Callable[[sqlite3.Connection], None]) -> None:
        """Use the file; whatever is wrong with it is this file's own affair."""
        try:
            use(self._connection())
        except (sqlite3.Error, OSError) as error:
            self.close()
            damaged = is_damage(error)
            if not self._failing:
                _log.warning("wanted_file_failed", path=str(self._path), error=str(error), made_anew=damaged)
            self._failing = True
            if damaged:
                # Nothing in it is worth a repair: a new one holds as much at the next flush.
                self._inode = 0
                with contextlib.suppress(OSError):
                    remove(self._path)
        else:
            if self._failing:
                _log.info("wanted_file_recovered", path=str(self._path))
            self._failing = False

    def _connection(self) -> sqlite3.Connection:
        """The file, opened or made; what was remembered of another one is forgotten."""
        if self._db is not None and self._inode_now() != self._inode:
            self.close()
            self._inode = 0  # a new file may get the number of the old one
        if self._db is None:
            self._db = connect(self._path, wait_s=WAIT_S, create=True)
            if self._inode_now() != self._inode:
                self._inode = self._inode_now()
                self._forget_file()
        return self._db

    def _inode_now(self) -> int:
        """0 where there is no file."""
        try:
            return self._path.stat().st_ino
        except FileNotFoundError:
            return 0

    def _resume(self, db: sqlite3.Connection) -> None:
        """Go on with what the file holds."""
        with transaction(db, "DEFERRED"):
            self._labels, self._rated, self._typical = db.execute("SELECT * FROM writer").fetchone()
            rows = db.execute("SELECT * FROM samples WHERE turn IS NULL").fetchall()
            handed = db.execute(_HANDED, (0,)).fetchall()
        self._pool = {wanted.sample_id: wanted for wanted in map(LabelRequest.of_row, rows)}
        self._new = set()
        self._filed = set(self._pool)
        self._handed = dict.fromkeys(sample_id for sample_id, _ in handed)
        self._turn = max((turn for _, turn in handed), default=0)

    def _write(self, db: sqlite3.Connection) -> None:
        with transaction(db, "IMMEDIATE"):
            if self._failing:  # a commit that failed may have happened all the same
                self._filed = {sample_id for (sample_id,) in db.execute("SELECT id FROM samples WHERE turn IS NULL")}
                self._new = set(self._pool)
            handed = db.execute(_HANDED, (self._turn,)).fetchall()
            taken = {sample_id for sample_id, _ in handed}
            waiting = self._pool.keys() - taken
            gone = (self._filed - waiting - taken) | self._labelled
            db.executemany("DELETE FROM samples WHERE id = ?", ((sample_id,) for sample_id in gone))
            db.executemany(_INSERT, (self._pool[sample_id].row() for sample_id in self._new & waiting))
            forgotten = db.execute(_FORGET, (self._newest_s - self._keep_s, HANDED_PER_ROW * self._rows)).fetchall()
            db.execute(
                "UPDATE writer SET labels = ?, rated = ?, typical = ?", (self._labels, self._rated, self._typical)
            )
        # Only what is in the file is remembered as being there.
        for sample_id in taken:
            self._drop(sample_id)
            self._handed[sample_id] = None
        for sample_id in self._labelled.union(sample_id for (sample_id,) in forgotten):
            self._handed.pop(sample_id, None)
        self._turn = max((turn for _, turn in handed), default=self._turn)
        self._filed = set(self._pool)
        self._new = set()
        self._labelled = set()
