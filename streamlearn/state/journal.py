"""The records of each step, written down so that a restart equals an uninterrupted run (D4).

A micro-batch that is closed by age depends on the clock, and one of several partitions on the order of arrival. So the
`next_offset` of every partition after each step is journaled before the step has any visible effect. A restart repeats
journaled steps with the same records.

One line per step: CRC-32, then JSON of step, offsets and the learner's epoch. A line is appended with one write, so a
kill leaves complete lines and at most one torn last line, which is cut off. The journal is synced before a publish and
before a checkpoint.

Lines are kept in segments. Each is written by one learner, and named by its first step and the learner's epoch. A
fenced learner (`fence`) may still append a line to its own segment. Such a line is stale and skipped: from the first
step of a later learner's first segment on, only that learner's lines count.

Above `max_bytes` the oldest segments are removed, except those that the oldest kept checkpoint needs (`keep_after`).
`load` is the share of the bound that these take, so that the loop can save sooner, or wait for a save.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import structlog

from streamlearn.errors import FROM_SCRATCH, StateError
from streamlearn.records import Offsets, TopicPartition
from streamlearn.state.files import DISK, Files
from streamlearn.state.kill_points import reached

SEGMENT_BYTES = 8 << 20
MAX_BYTES = 1 << 30
"""Bound of all segments. Beyond it the oldest are removed, except those that the oldest kept checkpoint needs."""
_SEGMENTS = "journal-*-*.log"
_REARM = 0.5
"""Hysteresis: `journal_full` is logged again only after the load fell below this."""
_log = structlog.get_logger(__name__)


class _Line(NamedTuple):
    """One journaled step."""

    step: int
    next_offsets: Offsets
    epoch: int
    size_bytes: int


class _Segment(NamedTuple):
    """One file, and which of its lines count."""

    epoch: int
    """Of the learner that wrote it; 0 without a fence."""
    first_step: int
    path: Path
    until: float = math.inf
    """The first step of the next segment. Lines from there on are stale: a fenced learner wrote them."""


def _line(step: int, next_offsets: Offsets, epoch: int) -> bytes:
    rows = [[tp.topic, tp.partition, next_offset] for tp, next_offset in sorted(next_offsets.items())]
    body = json.dumps([step, rows, epoch], separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(body), body)


def parse_line(line: bytes) -> _Line | None:
    """Parse one line; None if it is torn."""
    if not line.endswith(b"\n") or line[8:9] != b" ":
        return None
    try:
        if int(line[:8], 16) != zlib.crc32(line[9:-1]):
            return None
        step, rows, epoch = json.loads(line[9:-1])
        next_offsets = {TopicPartition(str(topic), int(partition)): int(n) for topic, partition, n in rows}
        return _Line(int(step), next_offsets, int(epoch), len(line))
    except (ValueError, TypeError):
        return None


def _segments(folder: Path) -> list[_Segment]:
    """Segments that count, in the order of their steps.

    Newer learners come first: a segment that starts at or after the first step of a later learner is stale.
    """
    found = []
    for path in folder.glob(_SEGMENTS):
        _, step, epoch = path.stem.split("-")
        found.append(_Segment(int(epoch), int(step), path))
    live: list[_Segment] = []
    until: float = math.inf
    for segment in sorted(found, reverse=True):
        if segment.first_step < until:
            live.append(segment._replace(until=until))
            until = segment.first_step
    return live[::-1]


def _lines(segment: _Segment) -> Iterator[_Line | None]:
    """Lines of one segment that count, in order; ends with None at a torn line."""
    with segment.path.open("rb") as file:
        for line in file:
            parsed = parse_line(line)
            if parsed is not None and parsed.step >= segment.until:
                return
            yield parsed
            if parsed is None:
                return


def newest_epoch(folder: Path) -> int:
    """The epoch of the last learner that wrote here; 0 if it is not known."""
    return max((segment.epoch for segment in _segments(folder)), default=0)


def read_journal(folder: Path, after_step: int) -> Iterator[tuple[int, Offsets]]:
    """Steps after `after_step`, in order and without a gap, up to the first torn line.

    Lines after a torn line count only if a later learner cut the journal there and continued in its own segment.

    Raises:
        StateError: a step is missing: it was removed, or the journal has a gap.
    """
    expected = after_step + 1
    for segment in _segments(folder):
        if segment.until <= expected:
            continue
        for line in _lines(segment):
            if line is None:
                break
            if line.step < expected:
                continue
            if line.step > expected:
                msg = f"{segment.path}: expected step {expected}, found {line.step}: steps are missing"
                raise StateError(f"{msg}; restore the files of the journal, or {FROM_SCRATCH}")
            yield line.step, line.next_offsets
            expected += 1
        else:
            continue
        if segment.until != expected:
            return


class Journal:
    """Appends steps. Used by one thread only."""

    def __init__(self, folder: Path, *, max_bytes: int = MAX_BYTES, files: Files = DISK) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._max_bytes, self._files = folder, max_bytes, files
        self._descriptor: int | None = None
        self._size_bytes = 0
        """Of the open segment."""
        self._keep_after = 0
        self._needed_bytes = 0
        self._reported_full = False

    @property
    def load(self) -> float:
        """Bytes of the steps since the oldest kept checkpoint, as a share of the bound.

        From 1 on the bound is exceeded: checkpoints must be saved until the oldest one is removed.
        """
        return self._needed_bytes / self._max_bytes

    def keep_after(self, step: int) -> None:
        """Set the step of the oldest kept checkpoint: earlier steps may be removed.

        Raises:
            StateLockedError: another learner has taken over.
        """
        self._files.check()
        self._keep_after = step
        self._trim()

    def cut_after(self, step: int) -> None:
        """Remove a torn last line and all lines after `step`. The next append starts a new segment.

        Raises:
            StateLockedError: another learner has taken over.
        """
        self._files.check()
        reached("journal-cut", "begin")
        self._close_segment()
        for segment in reversed(_segments(self._folder)):
            keep = 0
            for line in _lines(segment):
                if line is None or line.step > step:
                    break
                keep += line.size_bytes
            if keep:
                if keep < segment.path.stat().st_size:
                    os.truncate(segment.path, keep)
                break
            segment.path.unlink()
        self._trim()
        reached("journal-cut", "end")

    def append(self, step: int, next_offsets: Offsets) -> None:
        """Append one step. It survives a kill; after `sync` it survives a power failure.

        Raises:
            StateLockedError: another learner has taken over; nothing was written.
            StateError: the disk accepted only a part of the line.
        """
        self._files.check()
        if self._descriptor is None or self._size_bytes >= SEGMENT_BYTES:
            self.sync()
            self._open(self._folder / f"journal-{step:012d}-{self._files.epoch:06d}.log")
            self._trim()
        assert self._descriptor is not None
        line = _line(step, next_offsets, self._files.epoch)
        reached("journal-append", "begin")
        written = self._files.append(self._descriptor, line)
        reached("journal-append", "end")
        if written != len(line):
            msg = f"{self._folder}: the disk took {written} of {len(line)} bytes of a journal line: is it full?"
            raise StateError(msg)
        self._size_bytes += written
        self._needed_bytes += written
        if self.load >= 1.0 and not self._reported_full:
            self._reported_full = True
            _log.warning("journal_full", step=step, needed_bytes=self._needed_bytes, max_bytes=self._max_bytes)

    def sync(self) -> None:
        """Make all appended steps durable. The fence is checked for the ledger's flush too, which comes next.

        Raises:
            StateLockedError: another learner has taken over; nothing may be published or saved.
        """
        self._files.check()
        reached("journal-sync", "begin")
        self._sync()
        reached("journal-sync", "end")

    def close(self) -> None:
        """Sync and close the open segment."""
        self._sync()
        self._close_segment()

    def _sync(self) -> None:
        if self._descriptor is not None:
            self._files.sync_data(self._descriptor)

    def _close_segment(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _open(self, segment: Path) -> None:
        self._close_segment()
        is_new = not segment.exists()
        self._descriptor = os.open(segment, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o640)
        if is_new:
            self._files.sync_folder(self._folder)  # else a power failure may remove the segment, synced lines included
        self._size_bytes = segment.stat().st_size

    def _trim(self) -> None:
        """Remove stale segments, then the oldest unneeded ones until the rest fits. Updates the load."""
        live = _segments(self._folder)
        sizes = {segment.path: segment.path.stat().st_size for segment in live}
        for path in set(self._folder.glob(_SEGMENTS)) - sizes.keys():
            path.unlink()
        past = [segment for segment in live if segment.until <= self._keep_after + 1]
        total = sum(sizes.values())
        self._needed_bytes = total - sum(sizes[segment.path] for segment in past)
        if self.load < _REARM:
            self._reported_full = False
        for segment in past:
            if total <= self._max_bytes:
                break
            total -= sizes[segment.path]
            segment.path.unlink()
