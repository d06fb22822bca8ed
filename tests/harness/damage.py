"""What a bad disk does to files of a state folder, while no learner runs: bits that flip, ends that are missing.

MENDED: only where the promise holds all the same: a checkpoint while two older ones are whole, and lines of the journal
that no checkpoint needs. Their steps are cut anew, and nobody who kept a copy of such a teacher will see it again.
REFUSED: there is one store, so a learner that finds a page of it damaged must refuse to start, and say what to do.
"""

from __future__ import annotations

import os
from pathlib import Path
from random import Random

from streamlearn.app.wiring import StatePaths
from streamlearn.errors import CheckpointError
from streamlearn.ledger.store_file import FILE
from streamlearn.state.checkpoint import load_checkpoint, path_of, steps_in
from streamlearn.state.journal import parse_line

MENDED = ("checkpoint-bit", "checkpoint-end", "journal-bit", "journal-end", "journal-torn-line", "epoch-empty")
REFUSED = ("store-end", "store-garbage")
KINDS = MENDED + REFUSED
LEAST_CHECKPOINTS = 3
_PAGE_BYTES = 4096
_TAIL_BYTES = 8192


def damage(paths: StatePaths, kind: str, draw: Random) -> bool:
    """Do it; False where there is nothing that may be damaged so."""
    assert kind in KINDS, kind
    file, _, how = kind.partition("-")
    if file == "epoch":
        paths.epoch.write_bytes(b"")
        return True
    if file == "store":
        return _damage_store(paths.store / FILE, how, draw)
    return _damage_what_can_be_mended(paths, file, how, draw)


def _damage_what_can_be_mended(paths: StatePaths, file: str, how: str, draw: Random) -> bool:
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
    """The last whole step of a journal that somebody may be writing to; 0 where there is none.

    Cheap to ask often: it reads the end of a segment alone.
    """
    for segment in sorted(journal.glob("journal-*.log"), reverse=True):
        with segment.open("rb") as file:
            file.seek(max(0, segment.stat().st_size - _TAIL_BYTES))
            lines = map(parse_line, file.read().splitlines(keepends=True))
        if found := [line.step for line in lines if line is not None]:
            return found[-1]
    return 0


def whole_checkpoints(folder: Path) -> list[int]:
    """Steps of those that can be loaded, oldest first."""
    found = []
    for step in steps_in(folder):
        try:
            load_checkpoint(path_of(folder, step))
        except CheckpointError:
            continue
        found.append(step)
    return found


def _damage_store(data: Path, how: str, draw: Random) -> bool:
    """Somewhere in the file an end is missing, or a page is none any more; it may be one that nobody uses."""
    size_bytes = data.stat().st_size if data.exists() else 0
    if size_bytes == 0:
        return False
    if how == "end":
        os.truncate(data, draw.randrange(size_bytes))
        return True
    with data.open("r+b") as file:
        file.seek(draw.randrange(size_bytes // _PAGE_BYTES) * _PAGE_BYTES)
        file.write(draw.randbytes(_PAGE_BYTES))
    return True


def _needed_bytes(segment: Path, steps: list[int]) -> int:
    """Up to the last line that a checkpoint covers."""
    newest = steps[-1] if steps else 0
    return sum(size for step, size in _lines(segment) if step <= newest)


def _lines(segment: Path) -> list[tuple[int, int]]:
    """Step and bytes of each line, up to one that is not whole."""
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
