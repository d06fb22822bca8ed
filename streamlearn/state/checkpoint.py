"""Save and load the whole learner as one file, so that weights and offsets cannot disagree (I1).

Layout of every format: 7 bytes of magic, 1 byte of format, 32 bytes of SHA-256 over the payload, then the payload. The
payload is one safetensors blob whose header has a JSON part: step, next_offsets, counters. The JSON part repeats the
format, so that a flipped format byte is recognised. A corrupt file is set aside; another format is refused.

A file is written under a temporary name, synced and renamed, and the folder is synced. So a crash at any instant leaves
the old checkpoint or the new one. If the newest is corrupt, the one before it is loaded.
"""

from __future__ import annotations

import errno
import hashlib
import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import structlog
from safetensors import SafetensorError
from safetensors.numpy import load, save

from streamlearn.errors import FROM_SCRATCH, CheckpointError, CheckpointFormatError, StateError
from streamlearn.records import Array, Offsets, TopicPartition
from streamlearn.state.files import DISK, Files, remove_leftovers, write_whole
from streamlearn.state.kill_points import reached

MAGIC = b"SLCKPT\x00\x01"
_PAYLOAD_AT = len(MAGIC) + 32
_LAST = 1 << 63
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """All state of a learner at the end of one step."""

    step: int
    next_offsets: Offsets
    arrays: Mapping[str, Array]
    extra: Mapping[str, Any]
    """JSON: counters, watermark, identity of the model."""
    epoch: int = 0
    """Of the learner that saved it (`state.fence`); 0 in files of the first version."""


@dataclass(frozen=True, slots=True)
class Saved:
    """One durable save."""

    step: int
    size_bytes: int
    duration_s: float
    saved_at_s: float
    next_offsets: Offsets


def path_of(folder: Path, step: int) -> Path:
    """The file of a step's checkpoint."""
    return folder / f"checkpoint-{step:012d}.ckpt"


def steps_in(folder: Path) -> list[int]:
    """Steps with a checkpoint, oldest first."""
    return sorted(int(path.stem.removeprefix("checkpoint-")) for path in folder.glob("checkpoint-*.ckpt"))


def save_checkpoint(folder: Path, checkpoint: Checkpoint, files: Files = DISK) -> int:
    """Write one checkpoint; returns its size in bytes."""
    meta = {
        "step": checkpoint.step,
        "next_offsets": [[tp.topic, tp.partition, offset] for tp, offset in sorted(checkpoint.next_offsets.items())],
        "extra": checkpoint.extra,
        "epoch": checkpoint.epoch,
        "format": MAGIC[-1],
    }
    arrays = {name: np.asarray(array, order="C") for name, array in checkpoint.arrays.items()}
    payload = save(arrays, metadata={"streamlearn": json.dumps(meta)})
    digest = hashlib.sha256(payload).digest()
    reached("checkpoint", "begin")
    write_whole(path_of(folder, checkpoint.step), [MAGIC, digest, payload], files, name="checkpoint")
    reached("checkpoint", "end")
    return _PAYLOAD_AT + len(payload)


def load_checkpoint(path: Path) -> Checkpoint:
    """Read and verify one checkpoint.

    Raises:
        CheckpointError: it is torn or corrupt, or the disk cannot read it.
        CheckpointFormatError: it is valid, but of another format.
    """
    try:
        blob = path.read_bytes()
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    magic, digest, payload = blob[: len(MAGIC)], blob[len(MAGIC) : _PAYLOAD_AT], blob[_PAYLOAD_AT:]
    if magic[:-1] != MAGIC[:-1]:
        raise CheckpointError(f"{path}: not a checkpoint: it begins with {magic!r}")
    if hashlib.sha256(payload).digest() != digest:
        raise CheckpointError(f"{path}: torn or corrupt: the digest does not match the payload of {len(payload)} bytes")
    if magic != MAGIC:
        if _format_in(payload) == MAGIC[-1]:
            msg = f"{path}: corrupt: the first bytes have format {magic[-1]}, the payload {MAGIC[-1]}"
            raise CheckpointError(msg)
        msg = (
            f"{path} is a checkpoint of format {magic[-1]}, and this version of streamlearn reads format "
            f"{MAGIC[-1]}: use the version that saved it, or {FROM_SCRATCH}"
        )
        raise CheckpointFormatError(msg)
    try:
        arrays = load(payload)
        meta = _meta(payload)
        next_offsets = {TopicPartition(str(t), int(p)): int(offset) for t, p, offset in meta["next_offsets"]}
        return Checkpoint(int(meta["step"]), next_offsets, arrays, meta["extra"], int(meta.get("epoch", 0)))
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: the digest matches, but the content cannot be decoded: {error!r}") from error


def _meta(payload: bytes) -> dict[str, Any]:
    """The JSON part. The payload may be cut after its header."""
    header_bytes = int.from_bytes(payload[:8], "little")
    meta: dict[str, Any] = json.loads(json.loads(payload[8 : 8 + header_bytes])["__metadata__"]["streamlearn"])
    return meta


def _format_in(payload: bytes) -> int | None:
    """The format in the JSON part; None if that cannot be decoded."""
    try:
        return int(_meta(payload).get("format", 0))
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _epoch_of(path: Path, *, unreadable: int) -> int:
    """The epoch in the header, without reading the rest; `unreadable` if it cannot be decoded."""
    try:
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(_PAYLOAD_AT + 8)[_PAYLOAD_AT:], "little")
            if header_bytes > path.stat().st_size:
                return unreadable
            file.seek(_PAYLOAD_AT)
            return int(_meta(file.read(8 + header_bytes)).get("epoch", 0))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return unreadable


def newest_epoch(folder: Path) -> int:
    """The largest epoch of a checkpoint in the folder; 0 if there is none."""
    return max((_epoch_of(path_of(folder, step), unreadable=0) for step in steps_in(folder)), default=0)


def _by_age(folder: Path, *, unreadable: int) -> list[int]:
    """Steps with a checkpoint by epoch, then by step. `unreadable` is the epoch of files without one.

    A fenced learner may have finished a save late, with a larger step than those of the next learner.
    """
    return sorted(steps_in(folder), key=lambda step: (_epoch_of(path_of(folder, step), unreadable=unreadable), step))


def load_newest(folder: Path) -> Checkpoint | None:
    """The newest valid checkpoint; None if there never was one.

    A corrupt checkpoint is logged and renamed to `.corrupt`, and the one before it is tried.

    Raises:
        CheckpointError: there are checkpoints, or corrupt ones were set aside, and none is valid.
        CheckpointFormatError: the newest valid one is of another format. It is left in place.
    """
    steps = _by_age(folder, unreadable=_LAST)  # so that an unreadable one is reported
    for step in reversed(steps):
        path = path_of(folder, step)
        try:
            return load_checkpoint(path)
        except CheckpointError as error:
            _log.error("checkpoint_corrupt", step=step, error=str(error))
            corrupt = path.with_suffix(".corrupt")
            for earlier in folder.glob("*.corrupt"):
                if earlier.name < corrupt.name:  # from an earlier incident; those of this one are kept
                    earlier.unlink()
            path.replace(corrupt)
    # Also at later starts, which find only set-aside files: they must not silently start from step 0.
    if steps or any(folder.glob("*.corrupt")):
        raise CheckpointError(f"{folder}: no checkpoint is valid; restore a backup, or {FROM_SCRATCH}")
    return None


class Saver:
    """Saves in a background thread, one save at a time. A second one is refused, not queued."""

    def __init__(
        self,
        folder: Path,
        *,
        keep: int,
        on_saved: Callable[[Saved], None],
        files: Files = DISK,
    ) -> None:
        """Keep the newest `keep` checkpoints."""
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
        self._folder, self._keep, self._on_saved, self._files = folder, keep, on_saved, files
        self._error: OSError | StateError | None = None
        self._thread = threading.Thread()

    @property
    def busy(self) -> bool:
        """Whether a save is in progress."""
        return self._thread.is_alive()

    def oldest_step(self) -> int:
        """Step of the oldest checkpoint that a restart may fall back to; 0 if there is none."""
        return min(steps_in(self._folder), default=0)

    def submit(self, checkpoint: Checkpoint) -> bool:
        """Start a save; False if one is in progress. The arrays must not change any more.

        Raises:
            OSError: the last save failed; the checkpoint before it stands.
            StateLockedError: another learner has taken over; none of its files was overwritten.
        """
        if self.busy:
            return False
        self._raise_pending()
        self._thread = threading.Thread(target=self._save, args=(checkpoint,), name="checkpoint", daemon=True)
        self._thread.start()
        return True

    def wait(self, timeout_s: float) -> bool:
        """Wait for the save in progress; False if it did not end in time.

        Raises:
            OSError: the save failed.
        """
        if self.busy:
            self._thread.join(timeout_s)
        if self.busy:
            return False
        self._raise_pending()
        return True

    def close(self, timeout_s: float) -> None:
        """Wait for the save in progress.

        Raises:
            OSError: the save failed.
            CheckpointError: the save did not end in time.
        """
        if not self.wait(timeout_s):
            msg = f"{self._folder}: a save took longer than {timeout_s:.1f} s; the checkpoint before it stands"
            raise CheckpointError(msg)

    def _raise_pending(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _save(self, checkpoint: Checkpoint) -> None:
        started = time.monotonic()
        try:
            size = save_checkpoint(self._folder, replace(checkpoint, epoch=self._files.epoch), self._files)
            reached("checkpoint-prune", "begin")
            for step in _by_age(self._folder, unreadable=-1)[: -self._keep]:
                self._files.remove(path_of(self._folder, step))
            reached("checkpoint-prune", "end")
            duration_s = time.monotonic() - started
            self._on_saved(Saved(checkpoint.step, size, duration_s, time.time(), checkpoint.next_offsets))
        except (OSError, StateError) as error:
            self._error = error
