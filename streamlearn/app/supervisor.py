"""The parent of everything: starts a learner and some servers, starts again what dies, stops all within one deadline.

A dead learner leaves the servers up, each answer with its honest age. A process that exits with 2 (a setting is wrong)
at its first start is not started again: nothing would change, so all is stopped and 2 is returned. One that has run
before found something that others have changed since (a port that is taken, a topic): that is a death as any other.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog

from streamlearn.app.ports import listen
from streamlearn.config import Config
from streamlearn.errors import ConfigError, StreamlearnError
from streamlearn.state.paths import StatePaths, state_lock

_log = structlog.get_logger(__name__)
_RESTART_S = (0.5, 60.0)
"""First and longest wait before a process is started again."""
_STEADY_S = 60.0
"""After so long a life, the next death waits for the first wait again."""
_POLL_S = 0.1


@dataclass
class Child:
    """One process to keep alive."""

    name: str
    command: Sequence[str]
    pass_fds: tuple[int, ...] = ()
    output: Path | None = None
    """File for its stdout and stderr; None inherits ours."""
    process: subprocess.Popen[bytes] | None = None
    started_at_s: float = 0.0
    start_at_s: float = 0.0
    wait_s: float = _RESTART_S[0]
    has_run: bool = False
    """Its settings were taken once."""

    def start(self, now_s: float) -> None:
        """Start it. In a session of its own, so that a Ctrl-C reaches the supervisor alone, which asks in order."""
        with contextlib.ExitStack() as files:
            output = files.enter_context(self.output.open("ab")) if self.output else None
            self.process = subprocess.Popen(  # noqa: S603 - our own commands, no shell
                self.command, pass_fds=self.pass_fds, start_new_session=True, stdout=output, stderr=output
            )
        self.started_at_s = now_s

    def died(self, now_s: float) -> int | None:
        """The exit code, once; plans the next start."""
        if self.process is None or (code := self.process.poll()) is None:
            return None
        self.process = None
        if now_s - self.started_at_s >= _STEADY_S:
            self.wait_s = _RESTART_S[0]
            self.has_run = True
        self.has_run |= code != ConfigError.exit_code
        self.wait(now_s)
        return code

    def wait(self, now_s: float) -> None:
        """Have the next start wait, twice as long as the last."""
        self.start_at_s = now_s + self.wait_s
        self.wait_s = min(2 * self.wait_s, _RESTART_S[1])


class Supervisor:
    """Keeps a learner and `serve.processes` servers alive behind one socket."""

    def __init__(
        self, config: Config, arguments: Sequence[str], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`arguments` are what makes a child read the same config: `--config FILE --set key=value …`.

        Raises:
            ConfigError: the port is taken, or the state folder cannot be written.
            StateLockedError: another daemon works on the state folder.
        """
        self._config, self._clock = config, clock
        self.listener: socket.socket = listen(config)
        paths = StatePaths(config.state.dir)
        self._owned = contextlib.ExitStack()
        try:
            self._owned.enter_context(state_lock(paths, "daemon"))
        except StreamlearnError:
            self.listener.close()
            raise
        # The folder is ours, so no other daemon runs whose cards these would be.
        for card in paths.processes.glob("*.json"):
            card.unlink()  # of processes that were killed; their ids may be others' now
        program = [sys.executable, "-m", "streamlearn"]
        arguments = [*arguments, "--parent", str(os.getpid())]
        fd = self.listener.fileno()
        self.children = [Child("learner", [*program, "learn", *arguments])]
        for n in range(config.serve.processes):
            name = f"server-{n}"
            command = [*program, "serve", *arguments, "--name", name, "--fd", str(fd)]
            self.children.append(Child(name, command, pass_fds=(fd,)))

    @property
    def address(self) -> str:
        """Where the servers answer, as host:port."""
        host, port = self.listener.getsockname()[:2]
        return f"{host}:{port}"

    def run(self, stopping: threading.Event) -> None:
        """Keep all alive until told to stop.

        Raises:
            ConfigError: a child refused its settings (it has said why on stderr).
        """
        try:
            while not stopping.is_set():
                self.look()
                stopping.wait(_POLL_S)
        finally:
            self.stop()

    def look(self) -> None:
        """Start what is due, note what died."""
        now_s = self._clock()
        for child in self.children:
            code = child.died(now_s)
            if code == ConfigError.exit_code and not child.has_run:
                msg = f"{child.name} refused its settings; see above"
                raise ConfigError(msg)
            if code is not None:
                _log.error(
                    "process_died", name=child.name, exit_code=code, restart_s=round(child.start_at_s - now_s, 3)
                )
            if child.process is None and now_s >= child.start_at_s:
                try:
                    child.start(now_s)
                except OSError as error:  # no process or memory left for now: the others must not stop for that
                    child.wait(now_s)
                    restart_s = round(child.start_at_s - now_s, 3)
                    _log.error("process_not_started", name=child.name, error=str(error), restart_s=restart_s)

    def stop(self) -> None:
        """SIGTERM to all, then SIGKILL to what is left at the deadline."""
        self.listener.close()  # else connections are taken, and answered by nobody, while the slowest child ends
        running = [child for child in self.children if child.process is not None]
        for child in running:
            assert child.process is not None
            child.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + self._config.run.shutdown_s + 5.0
        for child in running:
            assert child.process is not None
            try:
                child.process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                _log.error("process_killed", name=child.name, after_s=self._config.run.shutdown_s)
                child.process.kill()
                child.process.wait()
        self._owned.close()
