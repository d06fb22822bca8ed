"""The parent process: starts learner, servers and scorers, restarts those that exit, stops all within one deadline.

Servers keep running without a learner; each answer has its age. If a process exits with 2 (a setting is wrong) at its
first start, all are stopped and 2 is returned: a restart would change nothing. Exit code 2 of a process that has run
before has an outside cause, such as a port taken since, and is followed by a restart.
"""

from __future__ import annotations

import contextlib
import os
import signal
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
from streamlearn.errors import ConfigError
from streamlearn.state.paths import StatePaths, state_lock

_log = structlog.get_logger(__name__)
_RESTART_S = (0.5, 60.0)
"""First and longest delay of a restart."""
_STEADY_S = 60.0
"""After running this long, the next restart has the first delay again."""
NICENESS = 5
"""Of the learner above that of servers and scorers: it uses idle time, and answers come first. They get three times its
share of a processor that both want."""
PORT_WAIT_S = 5.0
"""For the port, while the servers of a supervisor that was killed are stopping."""
_POLL_S = 0.1


@dataclass
class Child:
    """One process to keep running."""

    name: str
    command: Sequence[str]
    pass_fds: tuple[int, ...] = ()
    yields: bool = False
    """Whether it leaves the processor to the others where that is scarce."""
    output: Path | None = None
    """File for stdout and stderr; None inherits them."""
    process: subprocess.Popen[bytes] | None = None
    """None while it waits to be started."""
    started_at_s: float = 0.0
    start_at_s: float = 0.0
    delay_s: float = _RESTART_S[0]
    """Of the next restart."""
    has_run: bool = False
    """It has accepted its settings once."""

    def start(self, now_s: float) -> None:
        """Start it, in its own session: Ctrl-C reaches only the supervisor, which stops its children itself."""
        with contextlib.ExitStack() as files:
            output = files.enter_context(self.output.open("ab")) if self.output else None
            self.process = subprocess.Popen(  # noqa: S603 - our own commands, no shell
                self.command, pass_fds=self.pass_fds, start_new_session=True, stdout=output, stderr=output
            )
        if self.yields:
            with contextlib.suppress(OSError):  # it has exited
                os.setpriority(os.PRIO_PROCESS, self.process.pid, os.getpriority(os.PRIO_PROCESS, 0) + NICENESS)
        self.started_at_s = now_s

    def exited(self, now_s: float) -> int | None:
        """The exit code, once, if it has exited; schedules the restart."""
        if self.process is None or (code := self.process.poll()) is None:
            return None
        self.process = None
        if now_s - self.started_at_s >= _STEADY_S:
            self.delay_s = _RESTART_S[0]
            self.has_run = True
        self.has_run |= code != ConfigError.exit_code
        self.delay(now_s)
        return code

    def delay(self, now_s: float) -> None:
        """Schedule the restart, and double the delay of the one after it."""
        self.start_at_s = now_s + self.delay_s
        self.delay_s = min(2 * self.delay_s, _RESTART_S[1])


class Supervisor:
    """Keeps a learner, `serve.processes` servers behind one socket, and the scorers running."""

    def __init__(
        self, config: Config, arguments: Sequence[str], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`arguments` make a child load the same config: `--config FILE --set key=value …`.

        Raises:
            ConfigError: the port is taken, or the state folder cannot be written.
            StateLockedError: another daemon uses the state folder.
        """
        self._config, self._clock, paths = config, clock, StatePaths(config.state.dir)
        with contextlib.ExitStack() as owned:
            self.listener = owned.enter_context(listen(config, wait_s=PORT_WAIT_S))
            owned.enter_context(state_lock(paths, "daemon"))
            self._owned = owned.pop_all()
        # The folder is locked, so these cards are of killed processes. Their ids may belong to others now.
        for card in paths.processes.glob("*.json"):
            card.unlink()
        program = [sys.executable, "-m", "streamlearn"]
        arguments = [*arguments, "--parent", str(os.getpid())]
        fd = self.listener.fileno()
        self.children = [Child("learner", [*program, "learn", *arguments], yields=True)]
        for n in range(config.serve.processes):
            name = f"server-{n}"
            command = [*program, "serve", *arguments, "--name", name, "--fd", str(fd)]
            self.children.append(Child(name, command, pass_fds=(fd,)))
        predictions = config.source.predictions
        for n in range(predictions.scorers if predictions.topic else 0):
            command = [*program, "score", *arguments, "--instance", str(n), "--of", str(predictions.scorers)]
            self.children.append(Child(f"scorer-{n}", command))

    @property
    def address(self) -> str:
        """Address of the servers, as host:port."""
        host, port = self.listener.getsockname()[:2]
        return f"{host}:{port}"

    def run(self, stopping: threading.Event) -> None:
        """Keep all running until `stopping` is set.

        Raises:
            ConfigError: a child refused its settings; the reason is on its stderr.
        """
        try:
            while not stopping.is_set():
                self.look()
                stopping.wait(_POLL_S)
        finally:
            self.stop()

    def look(self) -> None:
        """Report children that have exited, and start those that are due."""
        now_s = self._clock()
        for child in self.children:
            code = child.exited(now_s)
            if code == ConfigError.exit_code and not child.has_run:
                msg = f"{child.name} refused its settings; see above"
                raise ConfigError(msg)
            if code is not None:
                restart_s = round(child.start_at_s - now_s, 3)
                _log.error("process_died", name=child.name, exit_code=code, restart_s=restart_s)
            if child.process is None and now_s >= child.start_at_s:
                try:
                    child.start(now_s)
                except OSError as error:  # out of processes or memory: the other children continue
                    child.delay(now_s)
                    restart_s = round(child.start_at_s - now_s, 3)
                    _log.error("process_not_started", name=child.name, error=str(error), restart_s=restart_s)

    def stop(self) -> None:
        """SIGTERM to all, then SIGKILL to those that run at the deadline."""
        self.listener.close()  # it would accept connections without an answer while children stop
        running = [(child.name, child.process) for child in self.children if child.process is not None]
        for _, process in running:
            process.send_signal(signal.SIGTERM)
        deadline_s = time.monotonic() + self._config.run.shutdown_s + 5.0
        for name, process in running:
            try:
                process.wait(max(0.1, deadline_s - time.monotonic()))
            except subprocess.TimeoutExpired:
                _log.error("process_killed", name=name, after_s=self._config.run.shutdown_s)
                process.kill()
                process.wait()
        self._owned.close()
