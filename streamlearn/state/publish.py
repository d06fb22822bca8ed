"""Published teachers: one immutable safetensors file each, a pointer to the newest, and at most one pinned teacher.

`teacher-000000001200.safetensors` holds weights. Its header holds what is needed to rebuild the network, and a SHA-256
digest of the whole file, which is checked on load. Any safetensors library can read it. `current.json` names the
newest. `pinned.safetensors` is the version that an operator rolled back to, served until it is removed. It is a copy,
so that neither clean-up nor a later teacher of the same step can remove it.

Each file is replaced as a whole, so a server in another process reads the old one or the new one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load, save

from streamlearn.errors import StateError
from streamlearn.records import Array
from streamlearn.state.files import DISK, Chunk, Files, remove_leftovers, write_whole
from streamlearn.state.kill_points import reached

POINTER = "current.json"
PIN = "pinned.safetensors"
DIGEST = "sha256"
"""Key of the digest in a teacher's header. Teachers of early versions have none, and are not checked."""
KEEP = 5
"""Newest teachers kept on disk."""
KEEP_HISTORY = 10
"""Older teachers kept, further and further apart, to roll back to."""
_TEACHERS = "teacher-*.safetensors"
_ZEROS = "0" * 64


@dataclass(frozen=True, slots=True)
class PublishedModel:
    """One published teacher: its step, time of publication, file and header."""

    step: int
    published_at_s: float
    path: Path
    metadata: dict[str, str]

    @property
    def identity(self) -> tuple[int, float]:
        """Unique. The step is not: after a restore it may come again, with other weights."""
        return self.step, self.published_at_s


def teacher_path(folder: Path, step: int) -> Path:
    """The file of a step's teacher."""
    return folder / f"teacher-{step:012d}.safetensors"


class Publisher:
    """Writes teachers into a folder, and removes old ones. Used by the learner only."""

    def __init__(
        self,
        folder: Path,
        *,
        keep: int = KEEP,
        keep_history: int = KEEP_HISTORY,
        metadata: Mapping[str, str] | None = None,
        clock: Callable[[], float] = time.time,
        files: Files = DISK,
    ) -> None:
        """Keep the newest `keep`, and `keep_history` older ones as `spread` chooses them.

        Together with a pinned one, at most `keep + keep_history + 1` teachers are on disk between two publications.
        `metadata` goes into every header. `clock` gives seconds since 1970.
        """
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
        self._folder, self._keep, self._keep_history, self._metadata = folder, keep, keep_history, metadata or {}
        self._clock, self._files = clock, files

    def publish(self, step: int, arrays: Mapping[str, Array], metadata: Mapping[str, str]) -> PublishedModel:
        """Write the teacher of a step, point servers to it, and remove old ones.

        `metadata` goes into the header. Two keys of it are read in this module: `scores`, a JSON object of scores at
        that step, and `learned_offsets`, a JSON object of `next_offset` by "topic:partition": all labels below are
        learned or settled.

        Raises:
            OSError: the pointer still names the teacher before.
            StateLockedError: another learner has taken over; none of its files was overwritten.
        """
        path = teacher_path(self._folder, step)
        published_at_s = self._clock()
        header = {
            **self._metadata,
            **metadata,
            "step": str(step),
            "published_at_s": repr(published_at_s),
            "epoch": str(self._files.epoch),
        }
        ordered = {name: np.asarray(array, order="C") for name, array in arrays.items()}
        content = memoryview(save(ordered, metadata={**header, DIGEST: _ZEROS}))
        at, header[DIGEST] = _digest(content)
        sealed: list[Chunk] = [content[:at], header[DIGEST].encode(), content[at + len(_ZEROS) :]]
        reached("teacher", "begin")
        write_whole(path, sealed, self._files, name="teacher")
        reached("teacher", "end")
        pointer = {"file": path.name, "step": step, "published_at_s": published_at_s, "metadata": header}
        reached("pointer", "begin")
        write_whole(self._folder / POINTER, [json.dumps(pointer).encode()], self._files, name="pointer")
        reached("pointer", "end")
        reached("teacher-prune", "begin")
        self._remove_old(path)
        reached("teacher-prune", "end")
        return PublishedModel(step, published_at_s, path, header)

    def _remove_old(self, newest: Path) -> None:
        """By time of publication, not by step: after a restore, teachers of larger steps are older.

        Files that cannot be read as a teacher are removed too.
        """
        others = [model for model in reversed(_models(self._folder)) if model.path != newest]
        recent, old = others[: self._keep - 1], others[self._keep - 1 :]
        now_s = self._clock()
        ages_s = [now_s - model.published_at_s for model in old]
        chosen = spread(ages_s, keep=self._keep_history, after_s=now_s - recent[-1].published_at_s if recent else 0.0)
        kept = {newest, *(model.path for model in recent), *(old[index].path for index in chosen)}
        for path in sorted(self._folder.glob(_TEACHERS)):
            if path not in kept:
                self._files.remove(path)


def spread(ages_s: Sequence[float], *, keep: int, after_s: float = 0.0) -> list[int]:
    """Indices of the `keep` ages (ascending) to keep, so that a rollback finds a version at every distance in time.

    While there are too many, the age whose two neighbours have the smallest ratio is dropped; the oldest is kept. So
    the kept ages grow about geometrically, from `after_s`, the age of the oldest version kept anyway. The shape is
    stable when this is applied at each publication: in simulations of 100,000 publications, one per second, with 10
    kept, no two neighbours were further apart than 2.1 times the even ratio.
    """
    if keep == 0:
        return []
    least_s = 1e-3  # equal times, or a clock that was set back
    left = list(range(len(ages_s)))
    while len(left) > keep:
        bounds_s = [max(least_s, age_s) for age_s in (after_s, *(ages_s[index] for index in left))]
        gaps = [bounds_s[at + 2] / bounds_s[at] for at in range(len(left) - 1)]
        del left[gaps.index(min(gaps)) if gaps else 0]
    return left


class PublishedDir:
    """The folder as servers see it. A call costs one stat if nothing has changed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._newest = _Watched(folder / POINTER, _read_pointer)
        self._pinned = _Watched(folder / PIN, _read_teacher)

    def newest(self) -> PublishedModel | None:
        """The last published teacher; None before the first.

        Raises:
            StateError: the pointer cannot be read.
        """
        return self._newest.get()

    def pinned(self) -> PublishedModel | None:
        """The teacher to serve instead of the newest; None if none is pinned.

        Raises:
            StateError: it cannot be read.
        """
        return self._pinned.get()

    def versions(self) -> list[PublishedModel]:
        """All versions that can be served, in the order of publication. Reads headers only; skips other files."""
        found = {model.identity: model for model in _models(self.folder)}
        pinned = _read_or_none(self.folder / PIN)
        if pinned is not None:
            found.setdefault(pinned.identity, pinned)
        return sorted(found.values(), key=_by_publication)


def pin(folder: Path, step: int, files: Files = DISK) -> PublishedModel:
    """Make servers answer with the version of a step until `unpin`, whatever is published.

    Raises:
        StateError: that version does not exist or is corrupt; the message lists the others. Nothing was changed.
        OSError: nothing was changed.
    """
    path = teacher_path(folder, step)
    try:
        model = _read_teacher(path)
        content = path.read_bytes()
        _check_digest(model, content)
    except (FileNotFoundError, StateError) as error:
        pinned = _read_or_none(folder / PIN)
        if pinned is not None and pinned.step == step:
            return pinned
        existing = ", ".join(str(model.step) for model in PublishedDir(folder).versions()) or "none"
        why = f": {error}" if isinstance(error, StateError) else ""
        raise StateError(f"{folder}: no version {step} to roll back to{why}; there are: {existing}") from error
    write_whole(folder / PIN, [content], files)
    return _read_teacher(folder / PIN)


def unpin(folder: Path, files: Files = DISK) -> bool:
    """Make servers follow the newest teacher again; False if none was pinned.

    Raises:
        OSError: the version may still be pinned.
    """
    path = folder / PIN
    if not path.exists():
        return False
    files.remove(path)
    files.sync_folder(folder)
    return True


def listing(published: PublishedDir, now_s: float) -> list[dict[str, Any]]:
    """All versions as plain values, newest first; `served` marks the one that servers answer with."""
    newest, pinned = None, _read_or_none(published.folder / PIN)
    with contextlib.suppress(StateError):  # a broken pointer must not hide the versions
        newest = published.newest()
    served = pinned or newest
    return [
        {
            "version": model.step,
            "published_at_s": model.published_at_s,
            "age_s": round(max(0.0, now_s - model.published_at_s), 3),
            "size_bytes": _size_bytes(model.path),
            "scores": _json_object(model.metadata, "scores"),
            "newest": newest is not None and model.identity == newest.identity,
            "pinned": pinned is not None and model.identity == pinned.identity,
            "served": served is not None and model.identity == served.identity,
        }
        for model in reversed(published.versions())
    ]


def learned_offsets_of(metadata: Mapping[str, str]) -> dict[str, int] | None:
    """`next_offset` by "topic:partition" below which a teacher has learned every label; None if it is not known."""
    offsets = _json_object(metadata, "learned_offsets")
    if offsets is None or not all(type(offset) is int for offset in offsets.values()):
        return None
    return offsets


def load_arrays(model: PublishedModel) -> dict[str, Array]:
    """The weights of a published teacher. Its digest is checked.

    Raises:
        StateError: the file was removed, is torn or corrupt, or holds another teacher.
    """
    try:
        content = model.path.read_bytes()
        _check_digest(model, content)
        arrays: dict[str, Array] = load(content)
    except (OSError, SafetensorError) as error:
        raise StateError(f"{model.path}: cannot be read as a published teacher: {error}") from error
    return arrays


def _digest(content: memoryview) -> tuple[int, str]:
    """Where the digest is in a teacher's file, and what it must be. It is a part of the header: zeros take its place.

    The key cannot match inside a value of the header, where its quotes are escaped.
    """
    key = f'"{DIGEST}":"'.encode()
    at = bytes(_header(content)).find(key) + 8 + len(key)
    digest = hashlib.sha256(content[:at])
    digest.update(_ZEROS.encode())
    digest.update(content[at + len(_ZEROS) :])
    return at, digest.hexdigest()


def _header(content: memoryview) -> memoryview:
    return content[8 : 8 + int.from_bytes(content[:8], "little")]


def _check_digest(model: PublishedModel, content: bytes) -> None:
    """Check the digest of a file, and that its header equals the model's, which may come from the pointer.

    Raises:
        StateError: one of them differs.
    """
    digest, view = model.metadata.get(DIGEST), memoryview(content)
    if digest is None:
        return
    if _digest(view)[1] != digest:
        msg = f"{model.path}: torn, corrupt or another teacher: the digest does not match its {len(content)} bytes"
        raise StateError(msg)
    if json.loads(bytes(_header(view)))["__metadata__"] != model.metadata:
        raise StateError(f"{model.path}: the pointer to it is corrupt: it has another header than the file")


class _Watched:
    """A file that is replaced as a whole. It is read again only after it was replaced."""

    def __init__(self, path: Path, read: Callable[[Path], PublishedModel]) -> None:
        self._path, self._read = path, read
        self._seen: tuple[int, int, int] | None = None
        self._model: PublishedModel | None = None

    def get(self) -> PublishedModel | None:
        """The model that it names; None if there is no file.

        Raises:
            StateError: it cannot be read, or is no published file.
        """
        try:
            stat = self._path.stat()
            seen = (stat.st_ino, stat.st_mtime_ns, stat.st_size)
            if seen != self._seen:
                self._model = self._read(self._path)
                self._seen = seen
        except FileNotFoundError:
            self._seen = self._model = None
        except OSError as error:  # a stale handle or no free descriptor, which may be temporary
            raise StateError(f"{self._path}: cannot read: {error}") from error
        return self._model


def _read_pointer(path: Path) -> PublishedModel:
    try:
        pointer = json.loads(path.read_bytes())
        metadata = {str(key): str(value) for key, value in pointer["metadata"].items()}
        return _model(path.parent / Path(str(pointer["file"])).name, metadata)
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise StateError(f"{path}: not a pointer to a published teacher: {error!r}") from error


def _read_teacher(path: Path) -> PublishedModel:
    """A teacher by its header. The length of the file is checked; the weights are mapped and not read.

    Raises:
        FileNotFoundError: there is no file.
        StateError: it is no published teacher.
    """
    try:
        with safe_open(path, framework="np") as opened:
            metadata: dict[str, str] = opened.metadata() or {}
        return _model(path, metadata)
    except FileNotFoundError:
        raise
    except (OSError, SafetensorError, KeyError, ValueError, RecursionError) as error:
        raise StateError(f"{path}: not a published teacher: {error!r}") from error


def _model(path: Path, metadata: dict[str, str]) -> PublishedModel:
    return PublishedModel(int(metadata["step"]), float(metadata["published_at_s"]), path, metadata)


def _models(folder: Path) -> list[PublishedModel]:
    """Readable teachers of the folder, in the order of publication."""
    found = (_read_or_none(path) for path in folder.glob(_TEACHERS))
    return sorted((model for model in found if model is not None), key=_by_publication)


def _by_publication(model: PublishedModel) -> tuple[float, int]:
    return model.published_at_s, model.step


def _read_or_none(path: Path) -> PublishedModel | None:
    """None if it was just removed, or is torn."""
    try:
        return _read_teacher(path)
    except (FileNotFoundError, StateError):
        return None


def _size_bytes(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None


def _json_object(metadata: Mapping[str, str], key: str) -> dict[str, Any] | None:
    try:
        value = json.loads(metadata.get(key, "null"))
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
