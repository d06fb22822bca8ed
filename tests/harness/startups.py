"""Kills processes during their start, in bursts. Each is started with the real command line: `learn`, `serve` or `run`.

Each burst has its own state folder and embedded log, with default settings: checkpoints 30 s apart, or 20 steps apart
in every other burst. Records are added before each start. So processes die while they import, restore, rewind, replay
and take their first steps, mostly with a large flushed transaction and no checkpoint. None may refuse to start. At the
end a learner reads the rest of the log, and is audited and compared as in `soak`.
"""

from __future__ import annotations

import http.client
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np

from harness.damage import last_step
from harness.plan import Burst, Start
from harness.report import SoakReport
from harness.stretch import Stretches
from harness.verify import verify
from streamlearn.app.log import make_codec, make_topics, open_log
from streamlearn.config import Config, load_config
from streamlearn.lab.broker import free_port
from streamlearn.state.kill_points import VARIABLE
from streamlearn.state.paths import StatePaths

SETTINGS = """
[schema]
shape = [16]
classes = 10
[learn]
threads = 1
[state]
dir = "{folder}/{name}"
checkpoint_every_s = {checkpoint_every_s}
[serve]
processes = 1
port = {port}
[metrics]
port = 0
"""
LABEL_SHARE = 0.2
FIRST_RECORDS, MORE_RECORDS = 3000, 1000
WAIT_S = 180.0
"""Timeout for a start, and for orphans to exit."""
_POLL_S = 0.01


class _Refused(Exception):  # noqa: N818 - an outcome, which is counted
    """A process exited on its own, or a server could not read a healthy store."""


class Startups:
    """One burst of starts on one state folder."""

    def __init__(self, folder: Path, number: int, burst: Burst, report: SoakReport) -> None:
        self._folder, self._name, self._burst, self._report = folder, f"startups-{number}", burst, report
        self._port = free_port("127.0.0.1")
        self._output = folder / f"{self._name}.log"
        self._notes = folder / f"startup-notes-{number}"
        self._draw = np.random.default_rng(number)
        self._sent = 0
        self._config = self._configure(self._name)
        self._paths = StatePaths(self._config.state.dir)

    def run(self) -> None:
        """Start and kill each process of the burst; then check that nothing was lost and no bit differs."""
        with closing(open_log(self._config)) as log:
            make_topics(log, self._config)
        self._send(FIRST_RECORDS)
        try:
            for start in self._burst.starts:
                self._start_and_kill(start)
                self._send(MORE_RECORDS)
            self._learn_to_end(self._name)
            self._report.audit.include(verify(self._config, [self._notes]))
            stretches = Stretches(self._config, self._configure, self._learn_to_end)
            self._report.different += stretches.compare(self._config, f"{self._name}-never-killed")
        except _Refused as refused:
            self._report.refusals.append(f"{self._name}: {refused}")

    def _configure(self, name: str) -> Config:
        path = self._folder / f"{name}.toml"
        every_s = self._burst.checkpoint_every_s
        path.write_text(SETTINGS.format(folder=self._folder, name=name, port=self._port, checkpoint_every_s=every_s))
        return load_config(path, environ={})

    def _send(self, count: int) -> None:
        """Append samples and some labels, and note their positions."""
        source, codec, draw, sent = self._config.source, make_codec(self._config), self._draw, self._sent
        self._sent += count
        names = [f"s{number}" for number in range(sent, self._sent)]
        classes = draw.integers(0, 10, count)
        rows = (draw.standard_normal((count, 16)) + 2 * np.eye(16)[classes]).astype(np.float32)
        known = np.flatnonzero(draw.random(count) < LABEL_SHARE)
        samples = [codec.encode_sample(name, row) for name, row in zip(names, rows, strict=True)]
        labels = [codec.labels.encode(names[i], int(classes[i])) for i in known]
        with closing(open_log(self._config)) as log, self._notes.open("a") as notes:
            for topic, records, about in (
                (source.samples.topics[0], samples, [(name, -1) for name in names]),
                (source.labels.topic, labels, [(names[i], classes[i]) for i in known]),
            ):
                for position, (name, class_index) in zip(log.append(topic, records), about, strict=True):
                    notes.write(f"{position.topic} {position.partition} {position.offset} {name} {class_index}\n")

    def _start_and_kill(self, start: Start) -> None:
        environ = {VARIABLE: start.point} if start.point else {}
        step = last_step(self._paths.journal)
        with self._started(start.command, self._name, environ=environ) as process:
            if start.phase == "steps":
                if start.command == "serve":
                    self._await(process, self._answers, "answers")
                else:
                    self._await(process, lambda: last_step(self._paths.journal) > step, "takes a step")
            if start.phase == "point":
                deadline = time.monotonic() + start.after_s
                while process.poll() is None and time.monotonic() < deadline:
                    time.sleep(_POLL_S)
            else:
                self._let_run(process, start)
            process.send_signal(signal.SIGSTOP)  # so that it starts no further child
            for pid in _children_of(process.pid) if start.with_children else ():
                os.kill(pid, signal.SIGKILL)
                self._report.kills += 1
            process.kill()
            code = process.wait()
        if code != -signal.SIGKILL:
            raise _Refused(self._ended(start.command, code))
        self._report.kills += 1
        self._report.startup_kills += 1
        self._report.by[f"startup-{start.command}-{start.phase}"] += 1
        self._await_orphans(process.pid)

    def _let_run(self, process: subprocess.Popen[bytes], start: Start) -> None:
        """Wait for `start.after_s`; check the answers of a server meanwhile."""
        deadline = time.monotonic() + start.after_s
        while process.poll() is None and time.monotonic() < deadline:
            if start.command != "learn" and start.phase == "steps":
                self._answers()
            time.sleep(_POLL_S)

    def _answers(self) -> bool:
        """Whether a server answers; it must be able to read the store."""
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=10.0)
        try:
            connection.request("GET", "/label/s0")
            reply = connection.getresponse()
            body = reply.read().decode(errors="replace")
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()
        is_damaged = reply.status == http.client.SERVICE_UNAVAILABLE and "damaged" in body
        if reply.status == http.client.INTERNAL_SERVER_ERROR or is_damaged:
            raise _Refused(f"GET /label answers {reply.status}: {body}")
        return True

    def _await(self, process: subprocess.Popen[bytes], done: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + WAIT_S
        while not done():
            if (code := process.poll()) is not None:
                raise _Refused(self._ended(what, code))
            if time.monotonic() > deadline:
                raise _Refused(f"no process {what} within {WAIT_S:g} s: {self._tail()}")
            time.sleep(_POLL_S)

    def _await_orphans(self, parent: int) -> None:
        """The children of a killed supervisor exit, and release the port and the state folder."""
        deadline = time.monotonic() + WAIT_S
        while left := _children_of(parent):
            if time.monotonic() > deadline:
                for pid in left:
                    os.kill(pid, signal.SIGKILL)
                raise _Refused(f"children of a killed supervisor still run after {WAIT_S:g} s: {self._tail()}")
            time.sleep(_POLL_S)

    def _learn_to_end(self, name: str) -> None:
        with self._started("learn", name, "--until-end") as process:
            if code := process.wait(WAIT_S):
                raise _Refused(self._ended("learn --until-end", code))

    @contextmanager
    def _started(
        self, command: str, name: str, *flags: str, environ: dict[str, str] | None = None
    ) -> Iterator[subprocess.Popen[bytes]]:
        arguments = [sys.executable, "-m", "streamlearn", command, "--config", f"{self._folder / name}.toml", *flags]
        with self._output.open("ab") as output:
            process = subprocess.Popen(
                arguments, stdout=output, stderr=output, env={**os.environ, "OMP_NUM_THREADS": "1", **(environ or {})}
            )
        try:
            yield process
        finally:
            process.kill()
            process.wait()

    def _ended(self, what: str, code: int) -> str:
        return f"{what}: exited with {code}: {self._tail()}"

    def _tail(self) -> str:
        return self._output.read_text(errors="replace")[-1000:]


def _children_of(supervisor: int) -> list[int]:
    """Processes whose command line contains `--parent SUPERVISOR`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            arguments = path.read_bytes().split(b"\0")
        except OSError:  # it has just exited
            continue
        if [b"--parent", b"%d" % supervisor] in (arguments[at : at + 2] for at in range(len(arguments))):
            found.append(int(path.parent.name))
    return found
