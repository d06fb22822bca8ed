"""Holds a learner that is killed again and again against one without any fault, stretch by stretch.

Where retention takes records before they were learned, no other learner can form those steps again. So the stretch that
ends there is held together first; and the next one begins, for both, with a copy of the state that is made once all
its checkpoints are beyond the gap. Whatever is called here wants the learner to be dead.
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
"""The config of a learner in a state folder of that name."""


class Stretches:
    """What was trimmed, and where the stretch of now begins."""

    def __init__(self, config: Config, configure: Configure, learn_to_end: Callable[[str], None]) -> None:
        """`config` is that of the learner that is killed; `learn_to_end` runs the one of a name, to its end."""
        self._config, self._configure, self._learn_to_end = config, configure, learn_to_end
        self._paths = StatePaths(config.state.dir)
        self._base: Path | None = None
        """The state with which this stretch began; None of the first one, which began with nothing."""
        self._passing: Offsets | None = None
        """Where the log begins since a trim, while a checkpoint is left that is not beyond it."""
        self.trimmed = Trimmed()

    @property
    def in_gap(self) -> bool:
        """There may be no checkpoint to fall back to, nor records to form a step again."""
        return self._passing is not None

    def trim(self) -> bool:
        """Have retention take all that is in the log; False, and nothing happened, where that makes no gap."""
        newest = load_newest(self._paths.checkpoints)
        if self.in_gap or newest is None or not trim(self._config, newest.next_offsets, self.trimmed):
            return False
        self._passing = dict(self.trimmed.beginnings)
        return True

    def look(self) -> None:
        """Begin the next stretch, where all checkpoints are beyond the gap."""
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
        """In what a copy of what we have, and the one without faults, would end apart if the stream ended here."""
        killed = self._copy("stretch", self._paths.root)
        self._learn_to_end("stretch")
        different = self.compare(killed, "stretch-never-killed")
        shutil.rmtree(killed.state.dir)
        return different

    def compare(self, killed: Config, name: str = "never-killed") -> list[str]:
        """In what a learner that has read all, and the one without faults, ended apart."""
        reference = self._configure(name) if self._base is None else self._copy(name, self._base)
        for part in ("log", "journal"):  # what was sent, and how it was cut
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
