"""Damages files of a state folder as a bad disk does, while no learner runs: flipped bits, missing ends.

RECOVERABLE damage must not break the promise: the newest of at least three whole checkpoints, and journal lines that no
checkpoint needs. Those steps are formed again, perhaps with other batches.
REFUSED damage: there is only one store, so a learner that finds a damaged page must exit and say what to do.
"""

from __future__ import annotations

import os
from pathlib import Path
from random import Random

from streamlearn.errors import CheckpointError
from streamlearn.ledger.store_file import FILE
from streamlearn.state.checkpoint import load_checkpoint, path_of, steps_in
from streamlearn.state.journal import parse_line
from streamlearn.state.paths import StatePaths

RECOVERABLE = ("checkpoint-bit", "checkpoint-end", "journal-bit", "journal-end", "journal-torn-line", "epoch-empty")
REFUSED = ("store-end", "store-garbage")
KINDS = RECOVERABLE + REFUSED
LEAST_CHECKPOINTS = 3
_PAGE_BYTES = 4096
_TAIL_BYTES = 8192


def damage(paths: StatePaths, kind: str, draw: Random) -> bool:
    """Damage the state folder; False if it holds nothing that may be damaged in this way."""
    assert kind in KINDS, kind
    file, _, how = kind.partition("-")
    if file == "epoch":
        paths.epoch.write_bytes(b"")
        return True
    if file == "store":
        return _damage_store(paths.store / FILE, how, draw)
    return _damage_recoverable(paths, file, how, draw)


def _damage_recoverable(paths: StatePaths, file: str, how: str, draw: Random) -> bool:
    if file == "checkpoint":
        steps = whole_checkpoints(paths.checkpoints)
        if len(steps) < LEAST_CHECKPOINTS:
            return False
        path, spared_bytes = path_of(paths.checkpoints, steps[-1]), 0
    else:
        segments = sorted(paths.journal.glob("journal-*.log"))
        if not segments:
            return False
        path, spared_bytes = segments[-1], _needed_bytes(segments[-1], whole_checkpoints(paths.checkpoints))
    if how == "torn-line":
        with path.open("ab") as torn:
            torn.write(b"0" * draw.randint(1, 40))
        return True
    size_bytes = path.stat().st_size
    if size_bytes <= spared_bytes:
        return False
    at = draw.randrange(spared_bytes, size_bytes)
    if how == "end":
        os.truncate(path, at)
    else:
        _flip(path, at, draw)
    return True


def last_step(journal: Path) -> int:
    """The last whole step of a journal that may be written to meanwhile; 0 if there is none.

    Cheap: reads only the end of a segment.
    """
    for segment in sorted(journal.glob("journal-*.log"), reverse=True):
        try:
            with segment.open("rb") as file:
                file.seek(max(0, segment.stat().st_size - _TAIL_BYTES))
                lines = map(parse_line, file.read().splitlines(keepends=True))
        except FileNotFoundError:
            return last_step(journal)  # the learner removed it after the listing: list again
        if found := [line.step for line in lines if line is not None]:
            return found[-1]
    return 0


def whole_checkpoints(folder: Path) -> list[int]:
    """Steps of the checkpoints that can be loaded, oldest first."""
    found = []
    for step in steps_in(folder):
        try:
            load_checkpoint(path_of(folder, step))
        except CheckpointError:
            continue
        found.append(step)
    return found


def _damage_store(data: Path, how: str, draw: Random) -> bool:
    """Cut the file off at a random byte, or overwrite a random page, which may be a free one."""
    size_bytes = data.stat().st_size if data.exists() else 0
    if size_bytes < _PAGE_BYTES:  # all pages are in the write-ahead log
        return False
    if how == "end":
        os.truncate(data, draw.randrange(size_bytes))
        return True
    with data.open("r+b") as file:
        file.seek(draw.randrange(size_bytes // _PAGE_BYTES) * _PAGE_BYTES)
        file.write(draw.randbytes(_PAGE_BYTES))
    return True


def _needed_bytes(segment: Path, steps: list[int]) -> int:
    """Bytes up to and including the last line that a checkpoint covers."""
    newest = steps[-1] if steps else 0
    return sum(size for step, size in _lines(segment) if step <= newest)


def _lines(segment: Path) -> list[tuple[int, int]]:
    """Step and size in bytes of each line, up to the first that is not whole."""
    found: list[tuple[int, int]] = []
    for line in segment.read_bytes().splitlines(keepends=True):
        step = line[10:].partition(b",")[0]
        if not line.endswith(b"\n") or not step.isdigit():
            break
        found.append((int(step), len(line)))
    return found


def _flip(path: Path, at: int, draw: Random) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 1 << draw.randrange(8)]))
