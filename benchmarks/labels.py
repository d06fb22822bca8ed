"""Joins per second of the label ledger with ten million ids, relative to plain SQLite (limit) and plain LMDB (rival).

Run: python benchmarks/labels.py [--quick] [--dir FOLDER]. FOLDER needs 12 GB on the disk to measure; `--quick` takes a
tenth of the ids and of the space. Linux only: memory is read from /proc.

Each side runs in its own process, and keeps the same samples of 64 bytes under 128-bit keys. Then labels come:

    late        a million labels; the ages of their samples are geometric, with a mean of a tenth of the ids
    scattered   a million labels of samples drawn from all ids: the worst case for locality
    stream      late labels in turns with new samples: 256 labels after each 1,024 samples

`--quick` takes a quarter million labels each. The sides take turns, round by round. A join finds sample, prediction and
payload by the key, writes the label, and notes that it is learned. A step has 1,024 labels (`stream`: 256), and each
second is committed and synced.

    ledger   all of it, with states, counters, inputs of scores, and undo of each step; a checkpoint each 30 s
    sqlite   the limit: the same rows in three tables, one prepared SELECT per label, an executemany per step, and one
             row of undo; WAL, synchronous=FULL, 256 MB of cache, mapped. No states, counters or further labels
    lmdb     the rival: the three gets and one put of a join, without decoding and undo

Prints one line per round, then JSON. `joins_per_s`: of the ledger, over all rounds, commits included (`stream`: without
commits, since they hold the samples too). `joins_over_*`: median ratios over the rounds. `join_cpu_us`: processor time,
which does not depend on the load. `rss_growth_mb`: the peak of anonymous memory (RssAnon) over that before opening.
`flush_ms`, `flush_max_ms`: median and longest commit of the stream rounds. `restart_ms`: open, rewind and join one
label durably, with the file out of the system's cache (median of three), at a tenth of the ids and at all.

Results are in docs/research/label-store.md.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import os
import sqlite3
import statistics
import struct
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import lmdb
import numpy as np
import numpy.typing as npt
from common import figures, tell

from streamlearn.app.learner import gc_threshold
from streamlearn.ledger import Arrival, LabelState, Scored
from streamlearn.ledger.ledger import Ledger
from streamlearn.ledger.settings import LabelsConfig
from streamlearn.records import Example, Label, Position, Prediction, Sample, Schema

PAYLOAD_BYTES = 64
CLASSES = 10
SAMPLES_PER_STEP, LABELS_PER_STEP = 256, 1024
PUBLISH_EVERY_S, CHECKPOINT_EVERY_S, KEEP_CHECKPOINTS = 1.0, 30.0, 3
LABELS, ROUNDS, RESTARTS = 1_000_000, 5, 3
SAMPLES_PER_TURN, LABELS_PER_TURN = 1024, 256
TURNS = 40
"""Of a round of the stream."""
STREAMED = ROUNDS * TURNS * SAMPLES_PER_TURN
"""Samples of all stream rounds, in addition to the ids."""
MEGABYTE = 1 << 20
PREDICTED_C = np.full(CLASSES, 1 / CLASSES, np.float32)
ROW = struct.Struct("<16sqdqiiii")
"""The row of a sample without its probabilities, as large as the ledger's."""


class Side(Protocol):
    """A way to keep samples and join labels. Samples and labels are numbers."""

    def fill(self, numbers: range) -> None:
        """Keep these new samples; one step."""
        ...

    def prepare(self, numbers: list[int]) -> list[Any]:
        """Create label records of these samples, outside the measured time."""
        ...

    def join(self, labels: list[Any]) -> None:
        """Join these labels and note them as learned; one step."""
        ...

    def commit(self) -> None:
        """Make all ended steps durable."""
        ...

    def checkpoint(self) -> None:
        """Delete what only a rewind to a checkpoint that is not kept would need."""
        ...

    def close(self) -> None:
        """Close the files."""
        ...


def sample_id(number: int) -> str:
    """The id of sample `number`."""
    return f"sample-{number:09d}"


def key_of(name: str) -> bytes:
    """128 bits, as in the ledger."""
    return hashlib.blake2b(name.encode(), digest_size=16).digest()


def payload(number: int) -> bytes:
    """64 bytes, different for each sample."""
    return number.to_bytes(8, "little") * (PAYLOAD_BYTES // 8)


def class_of(number: int) -> int:
    """The true class of sample `number`."""
    return number % CLASSES


class LedgerSide:
    """`ledger/ledger.py`, driven as the loop drives it."""

    def __init__(self, folder: Path, ids: int) -> None:
        names = tuple(str(c) for c in range(CLASSES))
        self._ledger = Ledger(
            folder,
            Schema((PAYLOAD_BYTES,), np.dtype(np.uint8), names),
            LabelsConfig(payload_max_bytes=(ids + STREAMED) * PAYLOAD_BYTES, horizon_s=1e9, max_ids=ids + STREAMED),
            read_back=lambda *_: None,
        )
        self._ledger.rewind(self._ledger.step)
        self._labels = self._ledger.counts().read
        self._checkpoints: deque[int] = deque(maxlen=KEEP_CHECKPOINTS)

    def fill(self, numbers: range) -> None:
        """One step of samples without labels."""
        ledger = self._ledger
        ledger.begin(ledger.step + 1, numbers.start / 1000)
        for number in numbers:
            name, x = sample_id(number), np.frombuffer(payload(number), np.uint8)
            sample = Sample(Position("samples", number & 1, number >> 1), number / 1000, name, x)
            if not ledger.known([name]):
                ledger.sample_arrived(sample, Prediction(class_of(number), PREDICTED_C, ledger.step), 0)
        ledger.end()

    def prepare(self, numbers: list[int]) -> list[Label]:
        """One record each, as the codec returns them."""
        first, self._labels = self._labels, self._labels + len(numbers)
        places = (Position("labels", place & 1, place >> 1) for place in range(first, self._labels))
        return [Label(place, 1e6, sample_id(n), class_of(n)) for place, n in zip(places, numbers, strict=True)]

    def join(self, labels: list[Label]) -> None:
        """One step of labels, learned in the same step."""
        ledger = self._ledger
        ledger.begin(ledger.step + 1, 1e6)
        arrivals = ledger.labels_arrived(labels)
        ledger.trained([arrival.sample_id for arrival in arrivals])
        ledger.end()
        example = arrivals[-1].example
        assert example is not None
        assert example.x.tobytes() == payload(int(example.sample_id[-9:])), "another sample's payload"

    def commit(self) -> None:
        """As a publication does."""
        self._ledger.flush()

    def checkpoint(self) -> None:
        """As a checkpoint does."""
        self._checkpoints.append(self._ledger.step)
        self._ledger.prune(self._checkpoints[0])
        self._ledger.flush()

    def close(self) -> None:
        """Check the counters, and close."""
        counts = self._ledger.counts()
        assert counts.read == counts.joined == counts.scored == counts.trained == self._labels, counts
        self._ledger.close()


class LmdbSide:
    """Three gets and a put: id, label and sample are looked up, the label is written once."""

    def __init__(self, folder: Path, ids: int) -> None:
        del ids
        self._env = lmdb.open(str(folder), map_size=64 << 30, max_dbs=3, readahead=False)
        self._ids, self._samples, self._labels = (self._env.open_db(name) for name in (b"ids", b"samples", b"labels"))
        self._txn: Any = self._env.begin(write=True)

    def fill(self, numbers: range) -> None:
        """Two puts each."""
        put = self._txn.put
        for number in numbers:
            key, row = key_of(sample_id(number)), number.to_bytes(8, "big")
            sample = ROW.pack(key, number, number / 1000, 0, class_of(number), 0, -1, -1) + payload(number)
            put(key, row, overwrite=False, db=self._ids)
            put(row, sample + PREDICTED_C.tobytes(), append=True, db=self._samples)

    def prepare(self, numbers: list[int]) -> list[tuple[str, bytes]]:
        """The label's row is ready to be written."""
        return [(sample_id(n), bytes(22) + n.to_bytes(14, "big")) for n in numbers]

    def join(self, labels: list[tuple[str, bytes]]) -> None:
        """The minimum of a join."""
        get, put = self._txn.get, self._txn.put
        ids, samples, mine = self._ids, self._samples, self._labels
        for name, label in labels:
            row = get(key_of(name), None, ids)
            assert get(row, None, mine) is None
            assert get(row, None, samples) is not None
            put(row, label, db=mine)

    def commit(self) -> None:
        """One sync."""
        self._txn.commit()
        self._txn = self._env.begin(write=True)

    def checkpoint(self) -> None:
        """There is no undo."""

    def close(self) -> None:
        """Close the environment."""
        self._txn.commit()
        self._env.close()


class SqliteSide:
    """Three tables: rows by number are in rowid tables, rows by hash in the index of the hash."""

    def __init__(self, folder: Path, ids: int) -> None:
        del ids
        self._db = sqlite3.connect(folder / "labels.sqlite3", isolation_level=None)
        for pragma in ("page_size = 4096", "journal_mode = WAL", "synchronous = FULL"):
            self._db.execute(f"PRAGMA {pragma}")
        self._db.execute(f"PRAGMA mmap_size = {16 << 30}")
        self._db.execute(f"PRAGMA cache_size = {-(256 << 10)}")
        columns = "row INTEGER PRIMARY KEY, sample BLOB, payload BLOB"
        self._db.execute("CREATE TABLE IF NOT EXISTS ids (key BLOB PRIMARY KEY, row INTEGER) WITHOUT ROWID")
        self._db.execute(f"CREATE TABLE IF NOT EXISTS samples ({columns})")
        labels = "row INTEGER PRIMARY KEY, label BLOB, trained_step INTEGER"
        self._db.execute(f"CREATE TABLE IF NOT EXISTS labels ({labels})")
        self._db.execute("CREATE TABLE IF NOT EXISTS undo (step INTEGER PRIMARY KEY, keys BLOB)")
        self._db.execute("BEGIN")

    def fill(self, numbers: range) -> None:
        """Two statements for a whole step."""
        keys = [key_of(sample_id(number)) for number in numbers]
        tail = PREDICTED_C.tobytes()
        samples = [
            (number, ROW.pack(key, number, number / 1000, 0, class_of(number), 0, -1, -1) + tail, payload(number))
            for key, number in zip(keys, numbers, strict=True)
        ]
        self._db.executemany("INSERT INTO ids VALUES (?, ?)", zip(keys, numbers, strict=True))
        self._db.executemany("INSERT INTO samples VALUES (?, ?, ?)", samples)

    def prepare(self, numbers: list[int]) -> list[tuple[str, int, bytes]]:
        """The label's row is ready to be written."""
        return [(sample_id(n), class_of(n), bytes(22) + n.to_bytes(14, "big")) for n in numbers]

    def join(self, labels: list[tuple[str, int, bytes]]) -> None:
        """One SELECT per label, two statements for all labels of the step, and one row of undo."""
        query = (
            "SELECT ids.row, samples.sample, samples.payload, labels.label FROM ids JOIN samples ON samples.row = "
            "ids.row LEFT JOIN labels ON labels.row = ids.row WHERE ids.key = ?"
        )
        rows, arrivals = [], []
        for name, class_index, label in labels:
            number, sample, found, before = self._db.execute(query, (key_of(name),)).fetchone()
            assert before is None
            _, _, arrived_s, version, predicted, student, majority, last = ROW.unpack_from(sample)
            prediction = Prediction(predicted, np.frombuffer(sample, np.float32, offset=ROW.size), version)
            scored = Scored(prediction, student, class_index, 1e6 - arrived_s, majority, last, prediction)
            example = Example(name, np.frombuffer(found, np.uint8), class_index)
            arrivals.append(Arrival(LabelState.JOINED, name, class_index, example, scored))
            rows.append((number, label))
        self._db.executemany("INSERT INTO labels VALUES (?, ?, NULL)", rows)
        self._db.executemany("UPDATE labels SET trained_step = 1 WHERE row = ?", [row[:1] for row in rows])
        self._db.execute("INSERT INTO undo VALUES (NULL, ?)", (b"".join(row.to_bytes(8, "big") for row, _ in rows),))

    def commit(self) -> None:
        """One sync."""
        self._db.execute("COMMIT")
        self._db.execute("BEGIN")

    def checkpoint(self) -> None:
        """SQLite checkpoints its write-ahead log by itself."""

    def close(self) -> None:
        """Close the connection."""
        self._db.execute("COMMIT")
        self._db.close()


SIDES: dict[str, Callable[[Path, int], Side]] = {"ledger": LedgerSide, "sqlite": SqliteSide, "lmdb": LmdbSide}
Result: TypeAlias = dict[str, float]


class Worker:
    """One side in its own process. Each method returns its costs."""

    def __init__(self, kind: str, folder: Path, ids: int) -> None:
        self._kind, self._folder, self._ids = kind, folder, ids
        folder.mkdir()
        self._anonymous_before = resident("RssAnon")
        self._anonymous_peak = 0.0
        self._flushes_s: list[float] = []
        self._side = SIDES[kind](folder, ids)
        self._committed_at_s = self._saved_at_s = time.perf_counter()

    def fill(self, first: int, beyond: int) -> Result:
        """Keep samples [first, beyond)."""
        began = time.perf_counter()
        for start in range(first, beyond, SAMPLES_PER_STEP):
            self._side.fill(range(start, min(start + SAMPLES_PER_STEP, beyond)))
            self._keep()
        self._commit()
        return {"per_s": (beyond - first) / (time.perf_counter() - began), **self._costs()}

    def join(self, numbers: list[int]) -> Result:
        """Join one label for each of these samples; durable at the end."""
        spent = np.zeros(2)
        for start in range(0, len(numbers), LABELS_PER_STEP):
            labels = self._side.prepare(numbers[start : start + LABELS_PER_STEP])
            began = clocks()
            self._side.join(labels)
            self._keep()
            spent += clocks() - began
        began = clocks()
        self._commit()
        wall_s, cpu_s = (spent + clocks() - began).tolist()
        return {"per_s": len(numbers) / wall_s, "cpu_us": cpu_s / len(numbers) * 1e6, **self._costs()}

    def stream(self, first: int, turns: list[list[int]]) -> Result:
        """Samples and labels in turns. Only the joins are timed."""
        spent, labels = np.zeros(2), 0
        for turn, numbers in enumerate(turns):
            start = first + turn * SAMPLES_PER_TURN
            for number in range(start, start + SAMPLES_PER_TURN, SAMPLES_PER_STEP):
                self._side.fill(range(number, number + SAMPLES_PER_STEP))
                self._keep()
            prepared = self._side.prepare(numbers)
            began = clocks()
            self._side.join(prepared)
            spent += clocks() - began
            labels += len(numbers)
            self._keep()
        self._commit()
        wall_s, cpu_s = spent.tolist()
        return {"per_s": labels / wall_s, "cpu_us": cpu_s / labels * 1e6, **self._costs()}

    def restart(self, numbers: list[int]) -> Result:
        """Close, drop the file from the system's cache, open, join one label; the median over these samples."""
        spent_s = []
        for number in numbers:
            self._side.close()
            for path in self._folder.iterdir():
                with path.open("rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            began = time.perf_counter()
            self._side = SIDES[self._kind](self._folder, self._ids)
            self._side.join(self._side.prepare([number]))
            self._side.commit()
            spent_s.append(time.perf_counter() - began)
        return {"ms": statistics.median(spent_s) * 1e3}

    def close(self) -> Result:
        """Close; the disk space that was used."""
        self._side.close()
        return {"disk_mb": sum(path.stat().st_blocks * 512 for path in self._folder.iterdir()) / MEGABYTE}

    def _keep(self) -> None:
        now = time.perf_counter()
        if now - self._saved_at_s >= CHECKPOINT_EVERY_S:
            self._side.checkpoint()
            self._saved_at_s = now
        if now - self._committed_at_s >= PUBLISH_EVERY_S:
            self._commit()

    def _commit(self) -> None:
        # Before the commit: until then, the pages that the transaction has changed are anonymous memory.
        self._anonymous_peak = max(self._anonymous_peak, resident("RssAnon"))
        began = time.perf_counter()
        self._side.commit()
        self._committed_at_s = time.perf_counter()
        self._flushes_s.append(self._committed_at_s - began)

    def _costs(self) -> Result:
        """Peak memory so far, and the commits since the last call."""
        flushes_ms = np.array(self._flushes_s) * 1e3
        self._flushes_s.clear()
        return {
            "anonymous_mb": self._anonymous_peak - self._anonymous_before,
            "flush_ms": float(np.median(flushes_ms)),
            "flush_max_ms": float(flushes_ms.max()),
        }


def clocks() -> npt.NDArray[np.float64]:
    """Seconds of wall time, and of this process's processor time."""
    return np.array([time.perf_counter(), time.process_time()])


def resident(kind: str) -> float:
    """Megabytes of resident memory of this process, by its name in /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(kind + ":"):
            return int(line.split()[1]) / 1024
    raise ValueError(kind)


def _serve(kind: str, folder: Path, ids: int, pipe: Connection) -> None:  # pragma: no cover - child process
    worker = Worker(kind, folder, ids)
    with gc_threshold():  # as the learner does
        while True:
            name, arguments = pipe.recv()
            pipe.send(getattr(worker, name)(*arguments))
            if name == "close":
                return


class Remote:
    """The parent's side of a worker."""

    def __init__(self, kind: str, folder: Path, ids: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(kind, folder / kind, ids, theirs), daemon=True)
        self._process.start()
        theirs.close()  # so that `ask` raises EOFError if the worker dies

    def ask(self, name: str, *arguments: object) -> Result:
        """Call a method of the worker and wait for its result."""
        self._pipe.send((name, arguments))
        result: Result = self._pipe.recv()
        if name == "close":
            self._process.join(timeout=60.0)
        return result


def rounds_of(ids: int, count: int) -> dict[str, list[list[int]]]:
    """The samples of the labels, by round. None comes twice, and none is used by restarts.

    `late`: ages are geometric with a mean of a tenth of the ids. `scattered`: drawn from all.
    """
    rng = np.random.default_rng(0)
    ages = np.unique(rng.geometric(10 / ids, 4 * count))
    late = ids - rng.permutation(ages[ages <= ids - 2 * RESTARTS])[:count]
    left = np.ones(ids, bool)
    left[late] = left[: 2 * RESTARTS] = False
    scattered = rng.choice(np.flatnonzero(left), count, replace=False)
    return {
        how: [part.tolist() for part in np.array_split(numbers, ROUNDS)]
        for how, numbers in (("late", late), ("scattered", scattered))
    }


def turns_of(ids: int, taken: set[int]) -> list[list[list[int]]]:
    """The samples of the stream's labels, by round and turn. Ages are as in `late`."""
    rng, rounds, first = np.random.default_rng(1), [], ids
    for _ in range(ROUNDS):
        turns = []
        for _ in range(TURNS):
            first += SAMPLES_PER_TURN
            drawn = (first - rng.geometric(10 / ids, 4 * LABELS_PER_TURN)).tolist()
            fresh = [number for number in dict.fromkeys(drawn) if number >= 2 * RESTARTS and number not in taken]
            turns.append(fresh[:LABELS_PER_TURN])
            taken.update(turns[-1])
        rounds.append(turns)
    return rounds


class Rounds:
    """The sides join the same labels, one side after the other."""

    def __init__(self, sides: dict[str, Remote]) -> None:
        self._sides = sides
        self._rates: dict[str, list[float]] = {kind: [] for kind in sides}
        self._cpu_us: list[float] = []

    def play(self, how: str, method: str, *arguments: object) -> dict[str, Result]:
        """One round."""
        found = {}
        for kind, side in self._sides.items():
            os.sync()  # so that pages of one side are not written in the time of the next
            found[kind] = side.ask(method, *arguments)
            self._rates[kind].append(found[kind]["per_s"])
        self._cpu_us.append(found["ledger"]["cpu_us"])
        rates = ", ".join(f"{kind} {result['per_s']:,.0f}" for kind, result in found.items())
        flushes = ", ".join(f"{result['flush_ms']:.0f} to {result['flush_max_ms']:.0f}" for result in found.values())
        tell(f"load {os.getloadavg()[0]:.1f}; joins a second, {how}: {rates}; commits, median to longest ms: {flushes}")
        return found

    def figures(self) -> dict[str, float]:
        """The ledger's rate over all rounds, and its ratio to the others."""
        mine = self._rates["ledger"]
        ratios = {kind: float(np.median(np.divide(mine, rates))) for kind, rates in self._rates.items()}
        return {
            "joins_per_s": round(statistics.harmonic_mean(mine)),
            "joins_over_sqlite": round(ratios["sqlite"], 3),
            "joins_over_lmdb": round(ratios["lmdb"], 3),
            "join_cpu_us": round(statistics.mean(self._cpu_us), 1),
        }


def measure(folder: Path, ids: int) -> dict[str, Any]:
    """All figures. Prints a line per round."""
    sides = {kind: Remote(kind, folder, ids) for kind in SIDES}
    tenth, restarts = ids // 10, {kind: {"tenth": 0.0, "all": 0.0} for kind in SIDES}
    fills: dict[str, Result] = {}
    for kind, side in sides.items():
        first = side.ask("fill", 0, tenth)
        restarts[kind]["tenth"] = side.ask("restart", list(range(RESTARTS)))["ms"]
        fills[kind] = side.ask("fill", tenth, ids)
        rest = f"then {fills[kind]['per_s']:,.0f}; anonymous {fills[kind]['anonymous_mb']:.0f} MB"
        tell(f"{kind:6} kept {ids:,} samples: a tenth at {first['per_s']:,.0f} a second, {rest}")
    joins = {}
    bulk = rounds_of(ids, min(ids // 4, LABELS))
    for how, parts in bulk.items():
        joins[how] = Rounds(sides)
        for numbers in parts:
            joins[how].play(how, "join", numbers)
    joins["stream"], first = Rounds(sides), ids
    for turns in turns_of(ids, {number for parts in bulk.values() for part in parts for number in part}):
        last = joins["stream"].play("as a stream", "stream", first, turns)
        first += TURNS * SAMPLES_PER_TURN
    for kind, side in sides.items():
        restarts[kind]["all"] = side.ask("restart", list(range(RESTARTS, 2 * RESTARTS)))["ms"]
        last[kind] |= side.ask("close")
        shown = ", ".join(f"{name} {value:,.0f}" for name, value in {**last[kind], **restarts[kind]}.items())
        tell(f"{kind:6} {shown} (restart in ms with a tenth, with all)")
    return {
        "ids": ids,
        **joins["late"].figures(),
        **{f"{name}_{how}": value for how in ("scattered", "stream") for name, value in joins[how].figures().items()},
        "rss_growth_mb": round(last["ledger"]["anonymous_mb"], 1),
        "flush_ms": round(last["ledger"]["flush_ms"]),
        "flush_max_ms": round(last["ledger"]["flush_max_ms"]),
        "disk_mb": round(last["ledger"]["disk_mb"]),
        "restart_ms_tenth": round(restarts["ledger"]["tenth"], 1),
        "restart_ms": round(restarts["ledger"]["all"], 1),
        "samples_per_s": round(fills["ledger"]["per_s"]),
    }


def main(arguments: list[str]) -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one million ids instead of ten")
    parser.add_argument("--dir", type=Path, default=Path.cwd(), help="a folder on the disk to measure")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=options.dir, prefix="bench-labels-") as name:
        figures(**measure(Path(name), 1_000_000 if options.quick else 10_000_000))


if __name__ == "__main__":
    main(sys.argv[1:])
