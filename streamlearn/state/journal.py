"""Which records formed which step: the little that makes a restart equal no restart (D4).

A micro-batch closed by age depends on the clock, and one over several partitions on arrival. So each step's end, its
`next_offset` of every partition, is written down before anything that came of it is shown. A restart forms the steps
that the journal knows exactly as they were, whatever the clock says now.

One line a step: CRC-32, then JSON of step, offsets and the learner's epoch. Appended with one write, so a kill leaves
whole lines or one torn last line, which is cut off. Synced before a publish and before a checkpoint. Kept in segments
named by their first step. A line of an older epoch than a line before it came late from a learner that was fenced off
(`fence`), and is passed by.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from streamlearn.errors import StateError
from streamlearn.records import Offsets, TopicPartition
from streamlearn.state.fence import NO_FENCE, Fence
from streamlearn.state.files import DISK, Files
from streamlearn.state.points import reached

SEGMENT_BYTES = 8 << 20


class _Line(NamedTuple):
    """One step, as it is written down."""

    step: int
    next_offsets: Offsets
    epoch: int
    size_bytes: int
    stale: bool = False
    """Of an older learner than a line before it: it is not so."""


def _line(step: int, next_offsets: Offsets, epoch: int) -> bytes:
    rows = [[tp.topic, tp.partition, next_offset] for tp, next_offset in sorted(next_offsets.items())]
    body = json.dumps([step, rows, epoch], separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(body), body)


def parse_line(line: bytes) -> _Line | None:
    """One line; None where it is torn."""
    if not line.endswith(b"\n") or line[8:9] != b" ":
        return None
    try:
        if int(line[:8], 16) != zlib.crc32(line[9:-1]):
            return None
        step, rows, *more = json.loads(line[9:-1])  # no epoch in a line of a version that knew none
        next_offsets = {TopicPartition(str(topic), int(partition)): int(n) for topic, partition, n in rows}
        return _Line(int(step), next_offsets, int(more[0]) if more else 0, len(line))
    except (ValueError, TypeError):
        return None


def _segments(folder: Path) -> list[Path]:
    return sorted(folder.glob("journal-*.log"))


def _lines(segment: Path) -> Iterator[_Line | None]:
    """Lines of one segment in order; None, once, where one is not whole."""
    newest_epoch = 0
    with segment.open("rb") as file:
        for line in file:
            parsed = parse_line(line)
            if parsed is None:
                yield None
                return
            newest_epoch = max(newest_epoch, parsed.epoch)
            yield parsed._replace(stale=parsed.epoch < newest_epoch)


def newest_epoch(folder: Path) -> int:
    """The epoch of the learner that wrote here last; 0 where that is not known."""
    return max((line.epoch for segment in _segments(folder)[-1:] for line in _lines(segment) if line), default=0)


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
        for line in _lines(segment):
            if line is None:
                return
            if line.stale or line.step < expected:
                continue
            if line.step > expected:
                msg = f"{segment}: wanted step {expected}, found {line.step}: that part of the journal is gone"
                raise StateError(msg)
            yield line.step, line.next_offsets
            expected += 1


class Journal:
    """Appends steps. Used by one thread."""

    def __init__(self, folder: Path, *, max_bytes: int, fence: Fence = NO_FENCE, files: Files = DISK) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._max_bytes, self._fence, self._files = folder, max_bytes, fence, files
        self._descriptor: int | None = None
        self._size_bytes = 0

    def cut_after(self, step: int) -> None:
        """Drop a torn last line and every line after `step`; appending goes on there.

        Raises:
            StateLockedError: another learner has taken over.
        """
        self._fence.check()
        reached("journal-cut", "begin")
        for segment in reversed(_segments(self._folder)):
            keep = 0
            for line in _lines(segment):
                if line is None or (line.step > step and not line.stale):
                    break
                keep += line.size_bytes
            if keep:
                if keep < segment.stat().st_size:
                    os.truncate(segment, keep)
                self._open(segment)
                break
            segment.unlink()
        reached("journal-cut", "end")

    def append(self, step: int, next_offsets: Offsets) -> None:
        """Write one step down. A kill right after keeps it; a power cut may not, before `sync`.

        Raises:
            StateLockedError: another learner has taken over; nothing was written.
            StateError: the disk did not take all of it.
        """
        self._fence.check()
        if self._descriptor is None or self._size_bytes >= SEGMENT_BYTES:
            self.sync()
            self._open(self._folder / f"journal-{step:012d}.log")
            self._trim()
        assert self._descriptor is not None
        line = _line(step, next_offsets, self._fence.epoch)
        reached("journal-append", "begin")
        written = self._files.append(self._descriptor, line)
        reached("journal-append", "end")
        if written != len(line):
            msg = f"{self._folder}: the journal took {written} of {len(line)} bytes: is the disk full?"
            raise StateError(msg)
        self._size_bytes += written

    def sync(self) -> None:
        """Have the disk hold every step appended so far. The ledger is flushed after it, so it asks for both.

        Raises:
            StateLockedError: another learner has taken over; nothing may be shown or saved.
        """
        self._fence.check()
        reached("journal-sync", "begin")
        self._sync()
        reached("journal-sync", "end")

    def close(self) -> None:
        """Sync and let go of the file."""
        if self._descriptor is not None:
            self._sync()
            os.close(self._descriptor)
            self._descriptor = None

    def _sync(self) -> None:
        if self._descriptor is not None:
            self._files.sync_data(self._descriptor)

    def _open(self, segment: Path) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
        is_new = not segment.exists()
        self._descriptor = os.open(segment, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o640)
        if is_new:
            self._files.sync_folder(self._folder)  # else a power cut may take the whole segment, synced lines and all
        self._size_bytes = segment.stat().st_size

    def _trim(self) -> None:
        segments = _segments(self._folder)
        total = sum(segment.stat().st_size for segment in segments)
        for segment in segments[:-2]:
            if total <= self._max_bytes:
                break
            total -= segment.stat().st_size
            segment.unlink()
