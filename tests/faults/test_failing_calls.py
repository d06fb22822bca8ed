"""The n-th write or sync of the embedded log or the store fails with EIO, once or from then on.

SQLite writes its files itself, so strace injects the error into the n-th system call of a kind. The next process must
find everything that was acknowledged; what failed must have been reported. STREAMLEARN_LONG_FAULTS=1 (`make soak`)
tests every n; else the last one and one in the middle.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from streamlearn.errors import LogUnavailableError, StoreError
from streamlearn.ledger.store import Store
from streamlearn.ledger.store_file import check_whole
from streamlearn.log.embedded import EmbeddedLog
from streamlearn.records import NewRecord, TopicPartition

LONG = os.environ.get("STREAMLEARN_LONG_FAULTS") == "1"
CALLS = ("pwrite64", "pwritev", "fdatasync", "fsync", "ftruncate", "fallocate")
ROUNDS, BYTES = 4, 3000
ROW = b"%d " + bytes(BYTES)


def open_log(folder: Path) -> EmbeddedLog:
    return EmbeddedLog(folder / "log.sqlite3", max_age_s=1e9, max_bytes=1 << 30)


def open_store(folder: Path) -> Store:
    return Store(folder / "store", numbered=("labels",), rings=("payloads",))


def append_some(folder: Path) -> Iterator[str]:
    """What the traced process does with a log: append, and continue after a failure."""
    try:
        with closing(open_log(folder)) as log:
            log.create_topics({"t": 1})
            for row in range(ROUNDS):
                try:
                    (position,) = log.append("t", [NewRecord(b"k", ROW % row)], timeout_s=1.0)
                    yield f"kept {position.offset} {row}"
                except LogUnavailableError as error:
                    yield f"refused {error}"
    except LogUnavailableError as error:
        yield f"refused {error}"


def flush_some(folder: Path) -> Iterator[str]:
    """What it does with a store: take steps, and end at the first failure, as a learner does."""
    try:
        with closing(open_store(folder)) as store:
            for step in range(1, ROUNDS + 1):
                take_step(store, step)
                yield f"kept {step} {step}"
    except StoreError as error:
        yield f"refused {error}"


def take_step(store: Store, step: int) -> None:
    store.begin(step)
    store.tables["labels"].put(step, b"%d" % step)
    store.rings["payloads"].append(step, ROW % step)
    store.end()
    store.flush()


def check_log(folder: Path, kept: dict[int, int], refused: int) -> None:
    """Acknowledged records are there, at their offsets; refused ones complete or not at all. No gaps. It continues."""
    with closing(open_log(folder)) as log:
        log.create_topics({"t": 1})
        records = log.read(TopicPartition("t", 0), 0, 100)
        assert [record.position.offset for record in records] == list(range(len(records)))
        assert {offset: records[offset].value for offset in kept} == {at: ROW % row for at, row in kept.items()}
        assert len(records) <= len(kept) + refused
        (after,) = log.append("t", [NewRecord(b"k", b"after")])
        assert after.offset == len(records)


def check_store(folder: Path, kept: dict[int, int], refused: int) -> None:
    """All flushed steps are there, and at most the failed one. No page is damaged. It continues."""
    assert check_whole(folder / "store")
    with closing(open_store(folder)) as store:
        flushed = max(kept, default=0)
        assert flushed <= store.step <= flushed + refused
        for step in range(1, store.step + 1):
            assert store.tables["labels"].get(step) == b"%d" % step
            assert store.rings["payloads"].get(step) == ROW % step
        take_step(store, store.step + 1)


PARTS = {"log": (append_some, check_log), "store": (flush_some, check_store)}


def traced(part: str, folder: Path, *options: str) -> list[str]:
    """Run one part under strace, and return what it printed. It exits by itself, whatever fails."""
    folder.mkdir(parents=True)
    command = ["strace", "-f", "-qq", "-o", str(folder / "trace"), *options, sys.executable, __file__, part]
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]))
    environ = {**os.environ, "PYTHONPATH": path}
    command = [*command, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120.0, check=False, env=environ)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


def calls_of(part: str, folder: Path) -> Counter[str]:
    """How often each of the calls is made when none fails."""
    printed = traced(part, folder, "-e", f"trace={','.join(CALLS)}")
    assert len(printed) == ROUNDS
    lines = (folder / "trace").read_text().splitlines()
    return Counter(
        line.split(maxsplit=1)[1].partition("(")[0] for line in lines if "(" in line and "resumed" not in line
    )


@pytest.mark.slow
@pytest.mark.timeout(1800 if LONG else 300)
@pytest.mark.parametrize("part", PARTS)
def test_nothing_acknowledged_is_lost_whichever_call_fails(tmp_path: Path, part: str) -> None:
    """Each kind of call, each n (or some), once and from then on."""
    if shutil.which("strace") is None:
        pytest.skip("NOT TESTED: writes and syncs of SQLite that fail with EIO. Install strace")
    counted = calls_of(part, tmp_path / "counted")
    assert counted["fdatasync"] > 0
    failed = 0
    for call, count in counted.items():
        for n in range(1, count + 1) if LONG else sorted({count // 2, count} - {0}):
            for when in (f"{n}", f"{n}+"):
                folder = tmp_path / f"{call}-{when}"
                inject = f"inject={call}:error=EIO:when={when}"
                printed = traced(part, folder, "-e", f"trace={call}", "-e", inject)
                kept = {int(line.split()[1]): int(line.split()[2]) for line in printed if line.startswith("kept ")}
                refused = sum(line.startswith("refused ") for line in printed)
                assert len(kept) + refused == len(printed), printed
                PARTS[part][1](folder, kept, refused)
                failed += refused > 0
                shutil.rmtree(folder)
    sys.stdout.write(f"{part}: {dict(counted)}, {failed} runs in which something was refused\n")
    assert failed >= len(counted)


if __name__ == "__main__":
    for each in PARTS[sys.argv[1]][0](Path(sys.argv[2])):
        sys.stdout.write(f"{each}\n")
