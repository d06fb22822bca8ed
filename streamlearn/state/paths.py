"""The layout of the state folder, and the lock that keeps it to one owner."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from streamlearn.errors import ConfigError, StateLockedError


class StatePaths:
    """Files and folders under `state.dir`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.log = root / "log" / "log.sqlite3"
        """The embedded log's database."""
        self.checkpoints = root / "checkpoints"
        self.journal = root / "journal"
        self.store = root / "store"
        """Sample store and label ledger."""
        self.label_requests = root / "label-requests.sqlite"
        """The active-learning queue."""
        self.published = root / "published"
        """Published teachers, and the pointer to the served one."""
        self.heartbeat = root / "learner.json"
        """The learner's status, about once a second."""
        self.scores = root / "scores.json"
        """The learner's scores, about once a second."""
        self.epoch = root / "epoch"
        """The epoch (fencing token) of the learner that may write here."""
        self.processes = root / "processes"
        """One file per server process, with the port of its metrics."""


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
