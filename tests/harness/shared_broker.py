"""One Kafka for all processes of a test session. A start costs 4 s of CPU time.

The first process that asks for it starts it, and none of them stops it: another may still use it. The process that
began the session does, when the others have ended.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
from pathlib import Path

from streamlearn.lab.broker import SHORT_LIVED, Broker

_STARTED: list[Broker] = []
"""Keeps the object until the interpreter exits, because `Popen` warns when it is collected before its process ends."""


class SharedBroker:
    """The broker of a session, by its folder."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._card = folder, folder / "shared-kafka.txt"

    def address(self) -> str:
        """`host:port`; starts the broker unless another process has.

        Raises:
            ConfigError: see `Broker.start`.
            LogUnavailableError: see `Broker.start`.
        """
        with (self._folder / "shared-kafka.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not self._card.exists():
                broker = Broker(self._folder / "shared-kafka", java_options=SHORT_LIVED)
                broker.start()
                _STARTED.append(broker)
                self._card.write_text(f"{broker.pid} {broker.bootstrap_servers}")
            return self._card.read_text().split()[1]

    def end(self) -> None:
        """SIGKILL, if it was started: its data are not needed any more. May be called twice."""
        if self._card.exists():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(int(self._card.read_text().split()[0]), signal.SIGKILL)
            self._card.unlink()
