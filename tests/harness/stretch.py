"""Compares a learner that is killed repeatedly with a reference learner that is never killed.

If retention trims records before they are learned, the reference cannot form those steps. So the run is split into
stretches. A stretch is compared right before its log is trimmed. The next one starts, for both learners, from a copy of
the state made once all checkpoints are past the gap. The learner must be dead during each call.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from harness.damage import LEAST_CHECKPOINTS, whole_checkpoints
from harness.retention import Trimmed, trim
from harness.verify import differences
from streamlearn.config import Config
from streamlearn.records import Offsets
from streamlearn.state.checkpoint import load_checkpoint, load_newest, path_of
from streamlearn.state.paths import StatePaths

Configure = Callable[[str], Config]
"""Returns the config of a learner with a state folder of this name."""


class Stretches:
    """What was trimmed, and the start of the current stretch."""

    def __init__(self, config: Config, configure: Configure, learn_to_end: Callable[[str], None]) -> None:
        """`config`: of the learner that is killed. `learn_to_end`: runs the learner of a name until the log ends."""
        self._config, self._configure, self._learn_to_end = config, configure, learn_to_end
        self._paths = StatePaths(config.state.dir)
        self._base: Path | None = None
        """State at the start of this stretch; None for the first one, which starts from scratch."""
        self._passing: Offsets | None = None
        """Beginnings of the log after a trim, while a checkpoint before them is left."""
        self.trimmed = Trimmed()

    @property
    def in_gap(self) -> bool:
        """Older checkpoints and the records of their steps may be missing."""
        return self._passing is not None

    def trim(self) -> bool:
        """Have retention trim the whole log; returns False and does nothing if that would leave no gap."""
        newest = load_newest(self._paths.checkpoints)
        if self.in_gap or newest is None or not trim(self._config, newest.next_offsets, self.trimmed):
            return False
        self._passing = dict(self.trimmed.beginnings)
        return True

    def maybe_start_next(self) -> None:
        """Start the next stretch if all checkpoints are past the gap."""
        steps = whole_checkpoints(self._paths.checkpoints)
        if self._passing is None or len(steps) < LEAST_CHECKPOINTS:
            return
        offsets = [load_checkpoint(path_of(self._paths.checkpoints, step)).next_offsets for step in steps]
        if any(each[partition] < begin for each in offsets for partition, begin in self._passing.items()):
            return
        if self._base is not None:
            shutil.rmtree(self._base)
        self._base = self._copy(f"base-{steps[-1]}", self._paths.root, "log").state.dir
        self._passing = None

    def compare_copies(self) -> list[str]:
        """Differences if the stream ended here, found on copies of the state."""
        killed = self._copy("stretch", self._paths.root)
        self._learn_to_end("stretch")
        different = self.compare(killed, "stretch-never-killed")
        shutil.rmtree(killed.state.dir)
        return different

    def compare(self, killed: Config, name: str = "never-killed") -> list[str]:
        """Differences between a learner that has read everything and the reference."""
        reference = self._configure(name) if self._base is None else self._copy(name, self._base)
        for part in ("log", "journal"):  # the same records, cut into the same steps
            if (killed.state.dir / part).exists():
                shutil.rmtree(reference.state.dir / part, ignore_errors=True)
                shutil.copytree(killed.state.dir / part, reference.state.dir / part)
        self._learn_to_end(name)
        different = differences(killed, reference, self.trimmed)
        if not different:
            shutil.rmtree(reference.state.dir)
        return different

    def _copy(self, name: str, state: Path, *without: str) -> Config:
        config = self._configure(name)
        ignored = shutil.ignore_patterns("*lock*", "*-shm", "processes", *without)
        shutil.copytree(state, config.state.dir, ignore=ignored)
        return config
