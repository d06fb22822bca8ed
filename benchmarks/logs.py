"""Compares SQLite (WAL, synchronous=FULL) with LMDB as the database of the embedded log.

Both sides do the same work: records of 3,000 random bytes, an offset assigned inside the transaction, one durable
commit per group of records, with one and with three writing processes; then sequential reads by offset, alone and next
to a thread that computes in Python, as the learner does. Ratios above 1 mean that SQLite is faster.

Run: python benchmarks/logs.py [--quick] [--dir FOLDER]. FOLDER should be on the disk of the log: on a memory file
system a sync costs nothing. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sqlite3
import statistics
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import lmdb

RECORD_BYTES = 3000
PARTITIONS = 4
WRITERS = 3
GROUPS = (1, 16, 64, 256)


class Store(Protocol):
    """The database operations of the embedded log."""

    def append(self, partition: int, values: list[bytes]) -> None:
        """Append to a partition in one durable transaction."""
        ...

    def read(self, partition: int, offset: int, count: int) -> list[bytes]:
        """Read forward from an offset."""
        ...

    def close(self) -> None:
        """Close the files."""
        ...


class SqliteStore:
    """One rowid table; the rowid packs partition and offset, so a partition is a contiguous key range."""

    def __init__(self, folder: Path) -> None:
        import fcntl  # noqa: PLC0415 - only this side of the comparison is POSIX

        self._flock = fcntl.flock
        self._exclusive, self._unlock = fcntl.LOCK_EX, fcntl.LOCK_UN
        self._lock_file = (folder / "writers.lock").open("a")
        self._db = sqlite3.connect(folder / "log.sqlite3", isolation_level=None, timeout=60.0)
        self._db.execute("PRAGMA page_size = 8192")
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = FULL")
        self._db.execute("CREATE TABLE IF NOT EXISTS ends (partition INTEGER PRIMARY KEY, next INTEGER) ")
        self._db.execute("CREATE TABLE IF NOT EXISTS records (id INTEGER PRIMARY KEY, ms INTEGER, value BLOB)")

    def append(self, partition: int, values: list[bytes]) -> None:
        """Queue on a file lock: the busy handler of SQLite sleeps and retries, which starves writers."""
        self._flock(self._lock_file, self._exclusive)
        try:
            self._db.execute("BEGIN IMMEDIATE")
            row = self._db.execute("SELECT next FROM ends WHERE partition = ?", (partition,)).fetchone()
            first = row[0] if row else 0
            base = (partition << 48) + first
            rows = [(base + i, 0, value) for i, value in enumerate(values)]
            self._db.executemany("INSERT INTO records VALUES (?, ?, ?)", rows)
            self._db.execute("INSERT OR REPLACE INTO ends VALUES (?, ?)", (partition, first + len(values)))
            self._db.execute("COMMIT")
        finally:
            self._flock(self._lock_file, self._unlock)

    def read(self, partition: int, offset: int, count: int) -> list[bytes]:
        """One range scan."""
        base = partition << 48
        query = "SELECT id, ms, value FROM records WHERE id >= ? AND id < ? ORDER BY id LIMIT ?"
        return [row[2] for row in self._db.execute(query, (base + offset, base + (1 << 48), count))]

    def close(self) -> None:
        """Close the connection and the lock file."""
        self._db.close()
        self._lock_file.close()


class LmdbStore:
    """One database; the key is partition and offset, big-endian, the value eight bytes of time and the record."""

    def __init__(self, folder: Path) -> None:
        self._env = lmdb.open(str(folder / "log.lmdb"), map_size=8 << 30, max_dbs=2, max_readers=64)
        self._ends = self._env.open_db(b"ends")
        self._records = self._env.open_db(b"records")

    def append(self, partition: int, values: list[bytes]) -> None:
        """LMDB has one writer at a time, queued by its own mutex."""
        with self._env.begin(write=True) as txn:
            key = struct.pack(">I", partition)
            first = int.from_bytes(txn.get(key, db=self._ends) or b"\0", "big")
            for i, value in enumerate(values):
                txn.put(struct.pack(">IQ", partition, first + i), bytes(8) + value, db=self._records)
            txn.put(key, (first + len(values)).to_bytes(8, "big"), db=self._ends)

    def read(self, partition: int, offset: int, count: int) -> list[bytes]:
        """One cursor walk; values are copied out, as a record that outlives its transaction must be."""
        values: list[bytes] = []
        with self._env.begin() as txn, txn.cursor(db=self._records) as cursor:
            if not cursor.set_range(struct.pack(">IQ", partition, offset)):
                return values
            for key, value in cursor:
                if key[:4] != struct.pack(">I", partition) or len(values) == count:
                    break
                values.append(value[8:])
        return values

    def close(self) -> None:
        """Close the environment."""
        self._env.close()


STORES: dict[str, Callable[[Path], Store]] = {"sqlite": SqliteStore, "lmdb": LmdbStore}


def write_alone(store: Store, seconds: float, group: int) -> tuple[int, float]:
    """Append groups for `seconds`, alternating partitions; returns records and seconds."""
    values = [os.urandom(RECORD_BYTES) for _ in range(group)]
    written, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        store.append((written // group) % PARTITIONS, values)
        written += group
    return written, time.perf_counter() - began


def _writer(
    kind: str, folder: Path, seconds: float, group: int, rates: multiprocessing.Queue[float]
) -> None:  # pragma: no cover - child process
    store = STORES[kind](folder)
    written, took = write_alone(store, seconds, group)
    store.close()
    rates.put(written / took)


def write_together(kind: str, folder: Path, seconds: float, group: int) -> float:
    """Total records per second of several writing processes."""
    context = multiprocessing.get_context("spawn")
    rates: multiprocessing.Queue[float] = context.Queue()
    workers = [context.Process(target=_writer, args=(kind, folder, seconds, group, rates)) for _ in range(WRITERS)]
    for worker in workers:
        worker.start()
    total = sum(rates.get(timeout=60.0 + seconds) for _ in workers)
    for worker in workers:
        worker.join(timeout=60.0)
    return total


def read_through(store: Store, seconds: float, count: int) -> float:
    """Records per second of forward reads of `count`, repeatedly."""
    read, offset, partition, began = 0, 0, 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        got = store.read(partition, offset, count)
        read += len(got)
        offset += len(got)
        if len(got) < count:
            partition, offset = (partition + 1) % PARTITIONS, 0
    return read / (time.perf_counter() - began)


def read_beside_a_busy_thread(store: Store, seconds: float) -> float:
    """The same next to a thread that computes in Python."""
    stopping = threading.Event()

    def spin() -> None:
        while not stopping.is_set():
            sum(range(1000))

    busy = threading.Thread(target=spin)
    busy.start()
    try:
        return read_through(store, seconds, 256)
    finally:
        stopping.set()
        busy.join(timeout=60.0)


def measure_round(folder: Path, seconds: float, group: int) -> dict[str, dict[str, float]]:
    """A short slice of each figure, alternating databases, so that a slow moment of the disk affects both."""
    figures: dict[str, dict[str, float]] = {kind: {} for kind in STORES}
    for kind, mine in figures.items():
        store = STORES[kind](folder / kind)
        written, took = write_alone(store, seconds, group)
        mine[f"append_{group}"] = written / took
        for count in (64, 500):
            mine[f"read_{count}"] = read_through(store, seconds / 2, count)
        mine["read_256_beside_a_busy_thread"] = read_beside_a_busy_thread(store, seconds)
        store.close()
    for kind, mine in figures.items():
        mine[f"append_{group}_by_{WRITERS}_processes"] = write_together(kind, folder / kind, seconds, group)
    return figures


def median(rounds: list[dict[str, dict[str, float]]], kind: str, name: str) -> float:
    """Median of the rounds that have this figure."""
    return statistics.median(figures[kind][name] for figures in rounds if name in figures[kind])


def main(arguments: list[str]) -> None:
    """Run both alternately and print the ratios of their medians."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one round of 0.2 s slices instead of five of 0.5 s")
    parser.add_argument("--dir", type=Path, default=Path.cwd(), help="a folder on the disk to measure")
    options = parser.parse_args(arguments)
    repeats, seconds = (1, 0.2) if options.quick else (5, 0.5)
    rounds: list[dict[str, dict[str, float]]] = []
    with tempfile.TemporaryDirectory(dir=options.dir, prefix="bench-logs-") as folder:
        for kind in STORES:
            (Path(folder) / kind).mkdir()
        for _ in range(repeats):
            rounds += [measure_round(Path(folder), seconds, group) for group in GROUPS]
    names = list(dict.fromkeys(name for figures in rounds for name in figures["sqlite"]))
    medians = {kind: {name: median(rounds, kind, name) for name in names} for kind in STORES}
    for name in names:
        print(f"{name:30} records/s   sqlite {medians['sqlite'][name]:12,.0f}   lmdb {medians['lmdb'][name]:12,.0f}")
    ratios = {f"sqlite_over_lmdb_{name}": round(v / medians["lmdb"][name], 3) for name, v in medians["sqlite"].items()}
    print(json.dumps(ratios))


if __name__ == "__main__":
    main(sys.argv[1:])
