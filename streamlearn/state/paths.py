"""The layout of the state folder, and the lock that keeps it to one owner."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from streamlearn.errors import ConfigError, StateLockedError


@dataclass(frozen=True)
class StatePaths:
    """Files and folders under `state.dir`."""

    root: Path

    @property
    def log(self) -> Path:
        """The embedded log's database."""
        return self.root / "log" / "log.sqlite3"

    @property
    def checkpoints(self) -> Path:
        """One file per checkpoint."""
        return self.root / "checkpoints"

    @property
    def journal(self) -> Path:
        """The records of each step."""
        return self.root / "journal"

    @property
    def store(self) -> Path:
        """Sample store and label ledger."""
        return self.root / "store"

    @property
    def scores(self) -> Path:
        """The learner's scores, about once a second."""
        return self.root / "scores.json"

    @property
    def label_requests(self) -> Path:
        """The active-learning queue: samples whose labels would help most."""
        return self.root / "wanted.sqlite"

    @property
    def published(self) -> Path:
        """Published teachers, and the pointer to the served one."""
        return self.root / "published"

    @property
    def heartbeat(self) -> Path:
        """The learner's status, about once a second."""
        return self.root / "learner.json"

    @property
    def epoch(self) -> Path:
        """The epoch (fencing token) of the learner that may write here."""
        return self.root / "epoch"

    @property
    def processes(self) -> Path:
        """One file per server process, with the port of its metrics."""
        return self.root / "processes"


@contextmanager
def state_lock(paths: StatePaths, owner: Literal["learner", "daemon"] = "learner") -> Iterator[None]:
    """Hold the state folder as its only learner, or as the only daemon whose processes use it.

    Raises:
        ConfigError: the folder cannot be created or written.
        StateLockedError: another process holds it.
    """
    try:
        paths.root.mkdir(parents=True, exist_ok=True)
        opened = (paths.root / ("lock" if owner == "learner" else f"{owner}.lock")).open("a+")
    except OSError as error:
        msg = f"state.dir = {str(paths.root)!r}: {error.strerror or error}; name a folder that can be written"
        raise ConfigError(msg) from error
    with opened as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            pid = file.read().strip() or "?"
            msg = f"{paths.root}: the {owner} with pid {pid} owns this state folder; stop it first"
            raise StateLockedError(msg) from error
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
