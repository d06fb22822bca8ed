"""Published teachers: one immutable safetensors file each, and a pointer to the one that is served.

`teacher-000000001200.safetensors` holds weights, and in its header what is needed to rebuild and name the network.
`current.json` names the served file. Both are replaced whole, so a server in another process reads one or the other.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from streamlearn.errors import StateError
from streamlearn.records import Array
from streamlearn.state.files import DISK, Files, remove_leftovers, write_whole

POINTER = "current.json"


@dataclass(frozen=True, slots=True)
class PublishedModel:
    """One published teacher: the step it was taken after, when, where, and what its header says."""

    step: int
    published_at_s: float
    path: Path
    metadata: dict[str, str]


class Publisher:
    """Writes teachers into a folder, and keeps the newest few. Used by the learner alone."""

    def __init__(self, folder: Path, *, keep: int, clock: Callable[[], float], files: Files = DISK) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
        self._folder, self._keep, self._clock, self._files = folder, keep, clock, files

    def publish(self, step: int, arrays: Mapping[str, Array], metadata: Mapping[str, str]) -> PublishedModel:
        """Write the teacher of a step, point servers to it, and remove the oldest beyond `keep`.

        Raises:
            OSError: the pointer still names the teacher before.
        """
        path = self._folder / f"teacher-{step:012d}.safetensors"
        published_at_s = self._clock()
        header = {**metadata, "step": str(step), "published_at_s": repr(published_at_s)}
        whole = {name: np.asarray(array, order="C") for name, array in arrays.items()}
        write_whole(path, [save(whole, metadata=header)], self._files)
        pointer = {"file": path.name, "step": step, "published_at_s": published_at_s, "metadata": header}
        write_whole(self._folder / POINTER, [json.dumps(pointer).encode()], self._files)
        for old in sorted(self._folder.glob("teacher-*.safetensors"))[: -self._keep]:
            if old != path:
                self._files.remove(old)
        return PublishedModel(step, published_at_s, path, header)


class PublishedDir:
    """What servers see of the folder. Cheap to ask often: one stat while nothing has changed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._seen: tuple[int, int, int] | None = None
        self._model: PublishedModel | None = None

    def newest(self) -> PublishedModel | None:
        """The teacher to serve; None before the first.

        Raises:
            StateError: the pointer is there and cannot be read.
        """
        pointer = self.folder / POINTER
        try:
            stat = pointer.stat()
        except FileNotFoundError:
            return None
        seen = (stat.st_ino, stat.st_mtime_ns, stat.st_size)
        if seen != self._seen:
            try:
                told = json.loads(pointer.read_bytes())
                self._model = PublishedModel(
                    int(told["step"]),
                    float(told["published_at_s"]),
                    self.folder / Path(str(told["file"])).name,
                    {str(key): str(value) for key, value in told["metadata"].items()},
                )
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                msg = f"{pointer}: wanted the pointer to a published teacher, got {error!r}"
                raise StateError(msg) from error
            self._seen = seen
        return self._model


def load_arrays(model: PublishedModel) -> dict[str, Array]:
    """The weights of a published teacher.

    Raises:
        StateError: the file is gone (a newer one was published) or is not whole.
    """
    try:
        arrays: dict[str, Array] = load_file(model.path)
    except (OSError, SafetensorError) as error:
        msg = f"{model.path}: not readable as a published teacher: {error}"
        raise StateError(msg) from error
    return arrays
