"""The processes of a soak on one state folder: learner, server, producer. Starts, watches and ends them.

They are forked (`fork_server`), except where `started` runs the real command line.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from harness.damage import last_step
from harness.fork_server import PRODUCER, ForkServer
from harness.plan import Fault
from harness.report import SoakReport
from streamlearn.app.log import make_topics, open_log
from streamlearn.config import Config, load_config
from streamlearn.lab.broker import Broker, free_port
from streamlearn.state.kill_points import VARIABLE
from streamlearn.state.paths import StatePaths

SETTINGS = """
[schema]
shape = [8]
classes = 4
[model]
factory = "mlp"
options = {{ hidden = [16] }}
[learn]
threads = 1
[batch]
fresh = 8
labelled = 8
steps = 2  # includes steps without records; more would only slow the reference learner down
max_age_s = 0.05
[labels]
payload_max_bytes = 65536  # late labels read their payload back from the log
[log]
kind = "{kind}"
partitions = 2
on_trimmed = "skip"
[log.kafka]
bootstrap_servers = "{bootstrap}"
group_id = "{name}"
[state]
dir = "{folder}/{name}"
checkpoint_every_s = 0.2
keep_checkpoints = 4
publish_every_s = 0.05
[serve]
processes = 1
port = {port}
[metrics]
port = 0
"""
EXIT_LOG_UNAVAILABLE, EXIT_STATE_BAD = 1, 3
"""Exit codes: the log was unavailable for too long; the state cannot be read or written."""
RECOVERY_S = 180.0
"""Timeout for the first step after a start, with records to read."""
STOP_S = 60.0
REPLAY_S = 900.0
POLL_S = 0.002


class SoakError(AssertionError):
    """A process exited on its own, or did not recover."""


@dataclass
class Forked:
    """A child of the fork server."""

    pid: int
    poll: Callable[[], int | None]

    def signal(self, number: int) -> None:
        """Send a signal unless the process has exited."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def wait(self, timeout_s: float) -> int:
        """Wait for the exit code.

        Raises:
            SoakError: the process did not exit in time.
        """
        deadline = time.monotonic() + timeout_s
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                msg = f"process {self.pid} did not exit within {timeout_s} s"
                raise SoakError(msg)
            time.sleep(POLL_S)
        return code

    def pause(self, for_s: float) -> None:
        """SIGSTOP, then SIGCONT."""
        self.signal(signal.SIGSTOP)
        time.sleep(for_s)
        self.signal(signal.SIGCONT)


def write_config(folder: Path, name: str, *, port: int = 0, bootstrap: str | None = None) -> Path:
    """The config of a small learner with state folder `name`, on an embedded log or on a broker."""
    path = folder / f"{name}.toml"
    kind, servers = ("kafka", bootstrap) if bootstrap else ("embedded", "127.0.0.1:1")
    path.write_text(SETTINGS.format(kind=kind, bootstrap=servers, name=name, folder=folder, port=port))
    return path


class Site:
    """A learner, a server and a producer on the state folder `killed`."""

    def __init__(
        self,
        folder: Path,
        forks: ForkServer,
        report: SoakReport,
        later: list[Fault],
        *,
        rate: float,
        broker: Broker | None,
    ) -> None:
        """Start all processes. `later`: the coming faults; a kill point is set when the learner starts."""
        self.folder, self.broker = folder, broker
        self._forks, self._report, self._rate = forks, report, rate
        self._port = free_port("127.0.0.1")
        self._generations = itertools.count()
        self.config = self.configure("killed")
        self.paths = StatePaths(self.config.state.dir)
        with contextlib.closing(open_log(self.config)) as log:
            make_topics(log, self.config)  # or the first request may find no topics
        self.start_server()
        self.start_producer()
        self.start_learner(later)

    @property
    def notes(self) -> list[Path]:
        """The notes of every producer."""
        return sorted(self.folder.glob("notes-*"))

    @property
    def learner_log(self) -> Path:
        """Output of all learners."""
        return self.folder / "learner.log"

    def configure(self, name: str) -> Config:
        """The config of a learner with a state folder of its own."""
        bootstrap = self.broker.bootstrap_servers if self.broker else None
        return load_config(write_config(self.folder, name, port=self._port, bootstrap=bootstrap), environ={})

    # -- start

    def start_learner(self, later: list[Fault], died_at_s: float | None = None) -> None:
        """Start a learner. `died_at_s`: when its predecessor died, to measure the recovery."""
        self._later = list(later)
        armed = next((each for each in later if each.victim == "learner" and each.how != "stop"), None)
        environ = {VARIABLE: f"{armed.point}:{armed.nth}"} if armed and armed.how == "point" else {}
        self._step_before, self.started_at_s = last_step(self.paths.journal), time.monotonic()
        self._died_at_s, self._stepped = died_at_s, False
        self.learner = self._fork(["learn", "--config", str(self.folder / "killed.toml")], "learner", environ)

    def start_server(self) -> None:
        """Start a server."""
        self.server = self._fork(["serve", "--config", str(self.folder / "killed.toml")], "server", {})

    def start_producer(self) -> None:
        """Start a producer with ids of its own."""
        generation = next(self._generations)
        notes = self.folder / f"notes-{generation:06d}"
        arguments = [self.folder / "killed.toml", self._port, notes, self._rate, self._report.seed, generation]
        self.producer = self._fork([PRODUCER, *map(str, arguments)], "producer", {})

    def _fork(self, arguments: list[str], name: str, environ: dict[str, str]) -> Forked:
        pid = self._forks.start(arguments, self.folder / f"{name}.log", environ)
        return Forked(pid, lambda: self._forks.poll(pid))

    @contextlib.contextmanager
    def started(self, name: str, *flags: str) -> Iterator[subprocess.Popen[bytes]]:
        """`streamlearn learn`, started with the real command line; killed on exit."""
        command = [sys.executable, "-m", "streamlearn", "learn", "--config", str(self.folder / f"{name}.toml"), *flags]
        with self.learner_log.open("ab") as output:
            process = subprocess.Popen(
                command, stdout=output, stderr=output, env={**os.environ, "OMP_NUM_THREADS": "1"}
            )
        try:
            yield process
        finally:
            process.kill()
            process.wait(STOP_S)

    def learn_to_end(self, name: str) -> None:
        """Run a learner from the real command line until the log ends."""
        with self.started(name, "--until-end") as process:
            self._expect_success(name, process.wait(REPLAY_S))

    def learn_to_end_forked(self, name: str) -> None:
        """Run a forked learner until the log ends."""
        arguments = ["learn", "--config", str(self.folder / f"{name}.toml"), "--until-end"]
        self._expect_success(name, self._fork(arguments, "learner", {}).wait(REPLAY_S))

    def _expect_success(self, name: str, code: int) -> None:
        if code != 0:
            msg = f"learn --until-end of {name} exited with {code}: {self.tail()}"
            raise SoakError(msg)

    # -- watch

    def has_stepped(self) -> bool:
        """Whether the learner has taken a step since its start. The first time, records the recovery time."""
        if not self._stepped and last_step(self.paths.journal) > self._step_before:
            self._stepped = True
            if self._died_at_s is not None:
                self._report.recovery_s.append(time.monotonic() - self._died_at_s)
        return self._stepped

    def learner_lives(self) -> bool:
        """Whether the learner runs. One that found no broker is restarted, as by a supervisor."""
        code = self.learner.poll()  # once: it may exit at any moment
        if code != EXIT_LOG_UNAVAILABLE or self.broker is None:
            return code is None
        self._report.by["learner-ended-without-log"] += 1
        self.start_learner(self._later)
        return True

    def recover(self) -> None:
        """Wait for the learner's next step.

        Raises:
            SoakError: it exited, or takes no step.
        """
        while not self.has_stepped():
            alive = self.learner_lives()
            if not alive or time.monotonic() - self.started_at_s > RECOVERY_S:
                msg = f"no step after a restart; the learner {'runs' if alive else 'exited'}: {self.tail()}"
                raise SoakError(msg)
            time.sleep(POLL_S)

    def tail(self) -> str:
        """The end of the learner's output."""
        return self.learner_log.read_text(errors="replace")[-2000:]

    # -- end

    def kill(self, process: Forked) -> None:
        """SIGKILL.

        Raises:
            SoakError: the process had exited on its own before.
        """
        process.signal(signal.SIGKILL)
        code = process.wait(STOP_S)
        if code == EXIT_LOG_UNAVAILABLE and self.broker is not None:
            return
        if code != -signal.SIGKILL:
            msg = f"a process exited on its own, with {code}: {self.tail()}"
            raise SoakError(msg)
        self._report.kills += 1

    def terminate(self, process: Forked, name: str) -> None:
        """SIGTERM; the exit code must be 0.

        Raises:
            SoakError: another exit code.
        """
        process.signal(signal.SIGTERM)
        if (code := process.wait(STOP_S)) == -signal.SIGTERM:  # no signal handler yet
            self._report.by[f"{name}-term-at-start"] += 1
        elif code == EXIT_LOG_UNAVAILABLE and self.broker is not None:  # it had a dead letter to write
            self._report.by[f"{name}-term-without-log"] += 1
        elif code != 0:
            msg = f"the {name} exited with {code} on SIGTERM: {self.tail()}"
            raise SoakError(msg)
