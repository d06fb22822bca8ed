"""Published teachers: one immutable safetensors file each, a pointer to the newest, and at most one that is pinned.

`teacher-000000001200.safetensors` holds weights, and in its header what is needed to rebuild and name the network, and
a SHA-256 digest of the whole file, which is checked on load. It remains a file that any safetensors library reads.
`current.json` names the newest. `pinned.safetensors`, where it is there, is what an operator rolled back to: a copy of
its own, so that no clean-up and no later teacher of the same step can take it away, and served until it is removed.
Each of these is replaced whole, so a server in another process reads the old or the new one.
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
from streamlearn.state.fence import NO_FENCE, Fence, FencedFiles
from streamlearn.state.files import DISK, Chunk, Files, remove_leftovers, write_whole
from streamlearn.state.kill_points import reached

POINTER = "current.json"
PIN = "pinned.safetensors"
DIGEST = "sha256"
"""Key of the digest in a teacher's header. Teachers that earlier versions published have none, and are not checked."""
KEEP = 5
"""Newest teachers kept on disk."""
KEEP_HISTORY = 10
"""Older teachers kept, further and further apart, to roll back to."""
_TEACHERS = "teacher-*.safetensors"
_ZEROS = "0" * 64


@dataclass(frozen=True, slots=True)
class PublishedModel:
    """One published teacher: the step it was taken after, when, where, and what its header says."""

    step: int
    published_at_s: float
    path: Path
    metadata: dict[str, str]

    @property
    def identity(self) -> tuple[int, float]:
        """Tells it from every other: a step alone may come twice, after a restore, with other weights."""
        return self.step, self.published_at_s


def teacher_path(folder: Path, step: int) -> Path:
    """Where the teacher of a step lies."""
    return folder / f"teacher-{step:012d}.safetensors"


class Publisher:
    """Writes teachers into a folder, and keeps some. Used by the learner alone."""

    def __init__(
        self,
        folder: Path,
        *,
        keep: int = KEEP,
        keep_history: int = KEEP_HISTORY,
        metadata: Mapping[str, str] | None = None,
        clock: Callable[[], float] = time.time,
        files: Files | None = None,
        fence: Fence = NO_FENCE,
    ) -> None:
        """Keep the newest `keep`, and besides `keep_history` older ones, as `thinned` chooses them.

        With the one that may be pinned, no more than `keep + keep_history + 1` teachers lie on disk between two
        publications. `clock` gives seconds since the epoch. `fence` says whether we may still write, and is asked by
        default `files`.
        """
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
        self._folder, self._keep, self._keep_history, self._metadata = folder, keep, keep_history, metadata or {}
        self._clock, self._files, self._epoch = clock, files or FencedFiles(fence), fence.epoch

    def publish(self, step: int, arrays: Mapping[str, Array], metadata: Mapping[str, str]) -> PublishedModel:
        """Write the teacher of a step, point servers to it, and remove those that need not be kept.

        `metadata` goes into the header. What is read from it here: `scores`, a JSON object of scores at that step, and
        `learned_offsets`, a JSON object of `next_offset` by "topic:partition", below which all labels are learned or
        have ended otherwise.

        Raises:
            OSError: the pointer still names the teacher before.
            StateLockedError: another learner has taken over; nothing was written over what is its.
        """
        path = teacher_path(self._folder, step)
        published_at_s = self._clock()
        header = {
            **self._metadata,
            **metadata,
            "step": str(step),
            "published_at_s": repr(published_at_s),
            "epoch": str(self._epoch),
        }
        content, header = _sealed({name: np.asarray(array, order="C") for name, array in arrays.items()}, header)
        reached("teacher", "begin")
        write_whole(path, content, self._files, name="teacher")
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
        """By time of publication, not by step: after a restore, larger steps are the older teachers.

        A file that cannot be read as a teacher could never be served, and goes too.
        """
        others = [model for model in _models(self._folder) if model.path != newest]
        split = max(0, len(others) - (self._keep - 1))
        old, recent = others[:split], others[split:]
        now_s = self._clock()
        ages_s = [now_s - model.published_at_s for model in reversed(old)]
        youngest_s = now_s - recent[0].published_at_s if recent else 0.0
        chosen = thinned(ages_s, keep=self._keep_history, after_s=youngest_s)
        history = [old[len(old) - 1 - index] for index in chosen]
        wanted = {newest, *(model.path for model in (*recent, *history))}
        for path in sorted(self._folder.glob(_TEACHERS)):
            if path not in wanted:
                self._files.remove(path)


def thinned(ages_s: Sequence[float], *, keep: int, after_s: float = 0.0) -> list[int]:
    """Which `keep` of these ages (ascending) to keep, by index, so that a rollback finds something at every distance.

    While there are too many, that one goes whose two neighbours are closest to each other by the ratio of their ages;
    the oldest stays. So their distances grow about geometrically from `after_s`, the age of what is kept anyway, to the
    first publication, however long ago that was. Applied at each publication it keeps that shape: in simulations of
    100,000 of them, one a second, with 10 kept, no two neighbours were further apart than by 2.1 times the even ratio.
    """
    if keep == 0:
        return []
    least_s = 1e-3  # two of one moment, or a clock that was set back
    left = list(range(len(ages_s)))
    while len(left) > keep:
        bounds_s = [max(least_s, age_s) for age_s in (after_s, *(ages_s[index] for index in left))]
        gaps = [bounds_s[at + 2] / bounds_s[at] for at in range(len(left) - 1)]
        del left[gaps.index(min(gaps)) if gaps else 0]
    return left


class PublishedDir:
    """What servers see of the folder. Cheap to ask often: one stat while nothing has changed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._newest = _Watched(folder / POINTER, _read_pointer)
        self._pinned = _Watched(folder / PIN, _read_teacher)

    def newest(self) -> PublishedModel | None:
        """The teacher that was published last; None before the first.

        Raises:
            StateError: the pointer is there and cannot be read.
        """
        return self._newest.get()

    def pinned(self) -> PublishedModel | None:
        """The teacher to serve instead of the newest; None where none is pinned.

        Raises:
            StateError: it is there and cannot be read.
        """
        return self._pinned.get()

    def versions(self) -> list[PublishedModel]:
        """All that can be served, in the order of publication. Reads headers only, and passes by what is none."""
        found = {model.identity: model for model in _models(self.folder)}
        pinned = _pinned_or_none(self.folder)
        if pinned is not None:
            found.setdefault(pinned.identity, pinned)
        return sorted(found.values(), key=_by_publication)


def pin(folder: Path, step: int, files: Files = DISK) -> PublishedModel:
    """Have servers answer with the version of a step, until `unpin`, whatever is published meanwhile.

    Raises:
        StateError: that version is not there, or is corrupt; the message lists those that are there. Nothing was
            changed.
        OSError: nothing was changed.
    """
    path = teacher_path(folder, step)
    try:
        model = _read_teacher(path)
        content = path.read_bytes()
        _check_digest(model, content)
    except (FileNotFoundError, StateError) as error:
        pinned = _pinned_or_none(folder)
        if pinned is not None and pinned.step == step:
            return pinned
        there = ", ".join(str(model.step) for model in PublishedDir(folder).versions()) or "none"
        why = f": {error}" if isinstance(error, StateError) else ""
        msg = f"{folder}: version {step} is not there to roll back to{why}; there are: {there}"
        raise StateError(msg) from error
    write_whole(folder / PIN, [content], files)
    return _read_teacher(folder / PIN)


def unpin(folder: Path, files: Files = DISK) -> bool:
    """Have servers follow the newest teacher again; False where none was pinned.

    Raises:
        OSError: it may still be pinned.
    """
    path = folder / PIN
    if not path.exists():
        return False
    files.remove(path)
    files.sync_folder(folder)
    return True


def listing(published: PublishedDir, now_s: float) -> list[dict[str, Any]]:
    """All versions as plain values, newest first; `served` marks what a server answers with if it could load it."""
    newest, pinned = None, _pinned_or_none(published.folder)
    with contextlib.suppress(StateError):  # a broken pointer hides no version from who is here to mend it
        newest = published.newest()
    served = pinned or newest
    return [
        {
            "version": model.step,
            "published_at_s": model.published_at_s,
            "age_s": round(max(0.0, now_s - model.published_at_s), 3),
            "size_bytes": _size_bytes(model.path),
            "scores": scores_of(model.metadata),
            "newest": newest is not None and model.identity == newest.identity,
            "pinned": pinned is not None and model.identity == pinned.identity,
            "served": served is not None and model.identity == served.identity,
        }
        for model in reversed(published.versions())
    ]


def scores_of(metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """The scores in a teacher's header; None where it has none that can be read."""
    return _json_object(metadata, "scores")


def learned_offsets_of(metadata: Mapping[str, str]) -> dict[str, int] | None:
    """`next_offset` by "topic:partition" below which a teacher has learned every label; None where it does not say."""
    told = _json_object(metadata, "learned_offsets")
    if told is None or not all(type(offset) is int for offset in told.values()):
        return None
    return told


def load_arrays(model: PublishedModel) -> dict[str, Array]:
    """The weights of a published teacher, once its digest is verified.

    Raises:
        StateError: the file is gone (a newer one was published), torn or corrupt, or is another teacher by now.
    """
    try:
        content = model.path.read_bytes()
        _check_digest(model, content)
        arrays: dict[str, Array] = load(content)
    except (OSError, SafetensorError) as error:
        msg = f"{model.path}: not readable as a published teacher: {error}"
        raise StateError(msg) from error
    return arrays


def _sealed(arrays: Mapping[str, Array], header: Mapping[str, str]) -> tuple[list[Chunk], dict[str, str]]:
    """The content of a teacher's file, and its header with the digest.

    The digest is in the header, so it covers the file with zeros in its own place.
    """
    content = memoryview(save(dict(arrays), metadata={**header, DIGEST: _ZEROS}))
    before, after = _around_digest(content)
    digest = _digest(before, after)
    return [before, digest.encode(), after], {**header, DIGEST: digest}


def _digest(before: memoryview, after: memoryview) -> str:
    digest = hashlib.sha256(before)
    digest.update(_ZEROS.encode())
    digest.update(after)
    return digest.hexdigest()


def _around_digest(content: memoryview) -> tuple[memoryview, memoryview]:
    """What stands before the digest and after it.

    The key cannot be found inside a value of the header, where its quotes would be escaped.
    """
    key = f'"{DIGEST}":"'.encode()
    at = bytes(_header(content)).find(key) + 8 + len(key)
    return content[:at], content[at + len(_ZEROS) :]


def _header(content: memoryview) -> memoryview:
    return content[8 : 8 + int.from_bytes(content[:8], "little")]


def _check_digest(model: PublishedModel, content: bytes) -> None:
    """Verify a file, and that its header is what the model has, which may come from the pointer.

    Raises:
        StateError: one of them is not so.
    """
    told, view = model.metadata.get(DIGEST), memoryview(content)
    if told is None:
        return
    if _digest(*_around_digest(view)) != told:
        msg = f"{model.path}: torn or corrupt, or another teacher: its digest does not fit its {len(content)} bytes"
        raise StateError(msg)
    if json.loads(bytes(_header(view)))["__metadata__"] != model.metadata:
        msg = f"{model.path}: the pointer to it is corrupt: it gives another header than the file has"
        raise StateError(msg)


class _Watched:
    """A file that is replaced whole, read again only when it is another one."""

    def __init__(self, path: Path, read: Callable[[Path], PublishedModel]) -> None:
        self._path, self._read = path, read
        self._seen: tuple[int, int, int] | None = None
        self._model: PublishedModel | None = None

    def get(self) -> PublishedModel | None:
        """What it says; None where it is not there.

        Raises:
            StateError: it cannot be read, or is nothing that was published.
        """
        try:
            stat = self._path.stat()
            seen = (stat.st_ino, stat.st_mtime_ns, stat.st_size)
            if seen != self._seen:
                self._model = self._read(self._path)
                self._seen = seen
        except FileNotFoundError:
            self._seen = self._model = None
        except OSError as error:  # a stale handle, no descriptor left: it may pass
            msg = f"{self._path}: cannot read: {error}"
            raise StateError(msg) from error
        return self._model


def _read_pointer(path: Path) -> PublishedModel:
    try:
        told = json.loads(path.read_bytes())
        metadata = {str(key): str(value) for key, value in told["metadata"].items()}
        return _model(path.parent / Path(str(told["file"])).name, metadata)
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        msg = f"{path}: wanted the pointer to a published teacher, got {error!r}"
        raise StateError(msg) from error


def _read_teacher(path: Path) -> PublishedModel:
    """A teacher by its header: its weights are mapped, not read; that the file is as long as it says is checked.

    Raises:
        FileNotFoundError: it is not there.
        StateError: it is no published teacher.
    """
    try:
        with safe_open(path, framework="np") as opened:
            metadata: dict[str, str] = opened.metadata() or {}
        return _model(path, metadata)
    except FileNotFoundError:
        raise
    except (OSError, SafetensorError, KeyError, ValueError, RecursionError) as error:
        msg = f"{path}: wanted a published teacher, got {error!r}"
        raise StateError(msg) from error


def _model(path: Path, metadata: dict[str, str]) -> PublishedModel:
    return PublishedModel(int(metadata["step"]), float(metadata["published_at_s"]), path, metadata)


def _models(folder: Path) -> list[PublishedModel]:
    """Teachers of the folder in the order of publication, without those that cannot be read."""
    found = []
    for path in folder.glob(_TEACHERS):
        try:
            found.append(_read_teacher(path))
        except (FileNotFoundError, StateError):
            continue  # removed by the learner just now, or torn
    return sorted(found, key=_by_publication)


def _by_publication(model: PublishedModel) -> tuple[float, int]:
    return model.published_at_s, model.step


def _pinned_or_none(folder: Path) -> PublishedModel | None:
    try:
        return _read_teacher(folder / PIN)
    except (FileNotFoundError, StateError):
        return None


def _size_bytes(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None


def _json_object(metadata: Mapping[str, str], key: str) -> dict[str, Any] | None:
    try:
        told = json.loads(metadata.get(key, "null"))
    except (ValueError, RecursionError):
        return None
    return told if isinstance(told, dict) else None
