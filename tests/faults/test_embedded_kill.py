"""Kill processes that append to the embedded log at random: no acknowledged record is lost, no offset skipped."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from streamlearn.log.embedded import EmbeddedLog
from streamlearn.records import NewRecord, TopicPartition

WRITERS = 3
PARTITIONS = 2
ROUNDS = 3

WRITER = """
import os, sys, threading
from pathlib import Path
from streamlearn.log.embedded import EmbeddedLog
from streamlearn.records import NewRecord

log = EmbeddedLog(Path(sys.argv[1]), max_bytes=1 << 30)
log.create_topics({"t": 2})
acknowledged = os.open(sys.argv[2], os.O_WRONLY | os.O_APPEND | os.O_CREAT)

def work(thread):
    number = 0
    while True:
        values = [f"{sys.argv[3]}/{thread}/{number + i}".encode() for i in range(3)]
        number += 3
        positions = log.append("t", [NewRecord(value, value + b" " + bytes(3000)) for value in values])
        lines = "".join(f"{p.partition} {p.offset} {v.decode()}\\n" for p, v in zip(positions, values))
        os.write(acknowledged, lines.encode())

threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(2)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""


def run_and_kill(log_path: Path, notes: list[Path], name: str, source: random.Random) -> None:
    """Let every writer append for a moment, then kill them one after the other while they append."""
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(log_path), str(note), f"{name}{number}"])
        for number, note in enumerate(notes)
    ]
    try:
        deadline = time.monotonic() + 30.0
        while not all(note.exists() and note.stat().st_size for note in notes):
            assert time.monotonic() < deadline, "a writer acknowledged nothing"
            assert all(writer.poll() is None for writer in writers), "a writer ended by itself"
            time.sleep(0.01)
        for writer in writers:
            time.sleep(source.uniform(0.0, 0.15))  # a random moment
            writer.send_signal(signal.SIGKILL)
    finally:
        for writer in writers:
            writer.kill()
            writer.wait(10.0)


def acknowledged(notes: list[Path]) -> dict[tuple[int, int], bytes]:
    """Partition and offset of every complete line that a writer noted, with the start of the value.

    Each process has a note of its own: a kill can cut its last line short.
    """
    found: dict[tuple[int, int], bytes] = {}
    for note in notes:
        text = note.read_text()
        for line in text[: text.rfind("\n") + 1].splitlines():
            partition, offset, value = line.split(" ")
            place = int(partition), int(offset)
            assert place not in found, f"{place} was given twice"
            found[place] = value.encode()
    return found


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.skipif(os.name != "posix", reason="kills by SIGKILL")
def test_no_acknowledged_record_is_lost_to_a_kill(log_path: Path, tmp_path: Path, seed: int) -> None:
    """Each noted position holds its record, offsets have no gap, and the next process continues after them."""
    source = random.Random(seed)
    notes = []

    for number in range(ROUNDS):
        new = [tmp_path / f"notes-{number}-{writer}" for writer in range(WRITERS)]
        run_and_kill(log_path, new, f"seed{seed}-round{number}-writer", source)
        notes += new

    with closing(EmbeddedLog(log_path, max_bytes=1 << 30)) as log:
        stored: dict[tuple[int, int], bytes] = {}
        for index in range(PARTITIONS):
            partition = TopicPartition("t", index)
            records = log.read(partition, 0, 1_000_000)
            assert [record.position.offset for record in records] == list(range(log.end_offsets("t")[partition]))
            stored |= {(index, r.position.offset): (r.value or b"").partition(b" ")[0] for r in records}
        (position,) = log.append("t", [NewRecord(b"after", b"after")])
    noted = acknowledged(notes)
    assert len(noted) >= WRITERS * ROUNDS
    assert {place: stored.get(place) for place in noted} == noted
    assert (position.partition, position.offset) not in stored
    unasked = set(stored) - set(noted)
    assert len(unasked) <= WRITERS * ROUNDS * 2 * 3, "only appends in flight at a kill may be unacknowledged"
