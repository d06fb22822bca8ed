"""Which records formed which step: the little that makes a restart equal no restart (D4).

A micro-batch closed by age depends on the clock, and one over several partitions on arrival. So each step's end, its
`next_offset` of every partition, is written down before anything that came of it is shown. A restart forms the steps
that the journal knows exactly as they were, whatever the clock says now.

One line a step: CRC-32, then JSON. Appended with one write, so a kill leaves whole lines or one torn last line, which
is cut off. Synced before a publish and before a checkpoint. Kept in segments named by their first step.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path

from streamlearn.errors import StateError
from streamlearn.records import Offsets, TopicPartition

SEGMENT_BYTES = 8 << 20


def _line(step: int, next_offsets: Offsets) -> bytes:
    rows = [[tp.topic, tp.partition, next_offset] for tp, next_offset in sorted(next_offsets.items())]
    body = json.dumps([step, rows], separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(body), body)


def _parse(line: bytes) -> tuple[int, Offsets] | None:
    """Step and offsets of one line; None where it is torn."""
    if not line.endswith(b"\n") or line[8:9] != b" ":
        return None
    try:
        if int(line[:8], 16) != zlib.crc32(line[9:-1]):
            return None
        step, rows = json.loads(line[9:-1])
        return int(step), {TopicPartition(str(topic), int(partition)): int(n) for topic, partition, n in rows}
    except (ValueError, TypeError):
        return None


def _segments(folder: Path) -> list[Path]:
    return sorted(folder.glob("journal-*.log"))


def read_journal(folder: Path, after_step: int) -> Iterator[tuple[int, Offsets]]:
    """Steps after `after_step`, in order, without a gap, up to the first line that is not whole.

    Raises:
        StateError: the steps right after `after_step` were removed already, or a step is missing in the middle.
    """
    expected = after_step + 1
    segments = _segments(folder)
    for number, segment in enumerate(segments):
        if number + 1 < len(segments) and int(segments[number + 1].stem.removeprefix("journal-")) <= expected:
            continue
        with segment.open("rb") as file:
            for line in file:
                parsed = _parse(line)
                if parsed is None:
                    return
                step, next_offsets = parsed
                if step < expected:
                    continue
                if step > expected:
                    msg = f"{segment}: wanted step {expected}, found {step}: that part of the journal is gone"
                    raise StateError(msg)
                yield step, next_offsets
                expected += 1


class Journal:
    """Appends steps. Used by one thread."""

    def __init__(self, folder: Path, *, max_bytes: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._max_bytes = folder, max_bytes
        self._descriptor: int | None = None
        self._size_bytes = 0

    def cut_after(self, step: int) -> None:
        """Drop a torn last line and every line after `step`; appending goes on there."""
        for segment in reversed(_segments(self._folder)):
            keep = 0
            with segment.open("rb") as file:
                for line in file:
                    parsed = _parse(line)
                    if parsed is None or parsed[0] > step:
                        break
                    keep += len(line)
            if keep:
                if keep < segment.stat().st_size:
                    os.truncate(segment, keep)
                self._open(segment)
                return
            segment.unlink()

    def append(self, step: int, next_offsets: Offsets) -> None:
        """Write one step down. A kill right after keeps it; a power cut may not, before `sync`."""
        if self._descriptor is None or self._size_bytes >= SEGMENT_BYTES:
            self.sync()
            self._open(self._folder / f"journal-{step:012d}.log")
            self._trim()
        assert self._descriptor is not None
        line = _line(step, next_offsets)
        written = os.write(self._descriptor, line)
        if written != len(line):
            msg = f"{self._folder}: the journal took {written} of {len(line)} bytes: is the disk full?"
            raise StateError(msg)
        self._size_bytes += written

    def sync(self) -> None:
        """Have the disk hold every step appended so far."""
        if self._descriptor is not None:
            os.fdatasync(self._descriptor)

    def close(self) -> None:
        """Sync and let go of the file."""
        if self._descriptor is not None:
            self.sync()
            os.close(self._descriptor)
            self._descriptor = None

    def _open(self, segment: Path) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
        self._descriptor = os.open(segment, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o640)
        self._size_bytes = segment.stat().st_size

    def _trim(self) -> None:
        segments = _segments(self._folder)
        total = sum(segment.stat().st_size for segment in segments)
        for segment in segments[:-2]:
            if total <= self._max_bytes:
                break
            total -= segment.stat().st_size
            segment.unlink()
