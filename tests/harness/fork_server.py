"""Starts processes in milliseconds: a server imports everything once and forks for each command line.

A learner imports torch for seconds, which would take nearly all of a soak. A forked child is a real process, with its
own id and files, killed by real signals; only the import is skipped (`startups` covers it). The server must have no
threads, so it never runs a step itself.

A supervisor (`streamlearn run`) forks its own children too, unless it is asked not to. Then they are started with the
command line, as a user's are.

Protocol: one JSON object per line on stdin and stdout. {"start": arguments, "output": path, "environ": {…}} returns
{"pid": n}; {"poll": pid} returns {"code": exit code as in `subprocess`, or null}. At the end of stdin all children are
killed.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from streamlearn.state import kill_points as points

WARM = (
    "streamlearn.cli",
    "streamlearn.app.learner",
    "streamlearn.app.server",
    "streamlearn.learn.methods.mean_teacher",
    "streamlearn.models.mlp",
    "streamlearn.log.kafka",
    "harness.producer",
    "uvicorn.loops.uvloop",
    "uvicorn.protocols.http.httptools_impl",
)
PRODUCER = "producer"


class ForkServer:
    """Client of the server process. A context manager."""

    def __init__(self) -> None:
        path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
        environ = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "harness.fork_server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environ,
            text=True,
        )

    def __enter__(self) -> ForkServer:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(20.0)
        finally:
            self._process.kill()
            self._process.stdout.close()

    def start(
        self,
        arguments: Sequence[str],
        output: Path,
        environ: Mapping[str, str] | None = None,
        *,
        errors: Path | None = None,
        fork_children: bool = True,
    ) -> int:
        """Start `streamlearn ARGUMENTS`, or the producer; return its pid.

        `output` receives stdout, and stderr too where no file is given for `errors`. `fork_children`: those of a
        supervisor are forks as well.
        """
        order = {
            "start": list(arguments),
            "output": str(output),
            "errors": str(errors or output),
            "environ": dict(environ or {}),
            "folder": str(Path.cwd()),
            "fork_children": fork_children,
        }
        return int(self._ask(order)["pid"])

    def poll(self, pid: int) -> int | None:
        """The exit code, negative for a signal; None while the process lives."""
        code: int | None = self._ask({"poll": pid})["code"]
        return code

    def _ask(self, order: Mapping[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            msg = f"the fork server exited with {self._process.wait(20.0)}"
            raise RuntimeError(msg)
        answer: dict[str, Any] = json.loads(line)
        return answer


def serve_children(orders: IO[str], answers: IO[str]) -> None:
    """Serve requests until stdin ends, then kill all children."""
    for module in WARM:
        importlib.import_module(module)
    gc.freeze()  # or a collection in a child would copy every page it visits
    codes: dict[int, int | None] = {}
    try:
        for line in orders:
            order = json.loads(line)
            if "start" in order:
                pid = _fork(order)
                codes[pid] = None
                answer: dict[str, Any] = {"pid": pid}
            else:
                answer = {"code": _poll(codes, order["poll"])}
            answers.write(json.dumps(answer) + "\n")
            answers.flush()
    finally:
        for pid in [pid for pid in codes if _poll(codes, pid) is None]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def _poll(codes: dict[int, int | None], pid: int) -> int | None:
    if codes[pid] is None:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            codes[pid] = os.waitstatus_to_exitcode(status)
    return codes[pid]


def _fork(order: Mapping[str, Any]) -> int:
    parent = os.getpid()
    return _fork_into(lambda: _become(order, parent))


def _fork_into(become: Callable[[], None]) -> int:
    """Fork; the child runs `become` and exits. Returns the pid of the child."""
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        become()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # skips the exit handlers of the parent


def _become(order: Mapping[str, Any], parent: int) -> None:
    """Turn this fork into the requested process."""
    from streamlearn.app.signals import exit_with_parent  # noqa: PLC0415
    from streamlearn.cli import main  # noqa: PLC0415 - imports torch, which the client does not need

    output, errors = (
        os.open(order[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o640) for name in ("output", "errors")
    )
    nothing = os.open(os.devnull, os.O_RDONLY)
    for target, source in ((0, nothing), (1, output), (2, errors)):
        os.dup2(source, target)
    os.chdir(order["folder"])
    os.setsid()
    exit_with_parent(parent)
    os.environ.update(order["environ"])
    points.arm_from(os.environ)
    if order["start"][0] == PRODUCER:
        from harness.producer import run  # noqa: PLC0415

        run(*order["start"][1:])
        return
    if order["fork_children"]:
        _fork_the_children_of_a_supervisor()
    sys.argv = ["streamlearn", *order["start"]]
    main()


class _ForkedChild:
    """A fork with those methods of `Popen` that a supervisor uses."""

    def __init__(self, command: Sequence[str], *, pass_fds: Sequence[int], output: Path | None) -> None:
        self._code: int | None = None
        self.pid = _fork_into(lambda: _become_child(command, pass_fds, output))

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while the process lives."""
        if self._code is None:
            found, status = os.waitpid(self.pid, os.WNOHANG)
            if found:
                self._code = os.waitstatus_to_exitcode(status)
        return self._code

    def wait(self, timeout: float | None = None) -> int:
        """The exit code."""
        deadline = time.monotonic() + (60.0 if timeout is None else timeout)
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(str(self.pid), timeout or 60.0)
            time.sleep(0.02)
        return code

    def send_signal(self, number: int) -> None:
        """Send a signal; nothing if the process has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)


def _fork_the_children_of_a_supervisor() -> None:
    from streamlearn.app import supervisor  # noqa: PLC0415

    def start(self: supervisor.Child, now_s: float) -> None:
        forked: Any = _ForkedChild(self.command, pass_fds=self.pass_fds, output=self.output)
        self.process = forked
        self.started_at_s = now_s

    supervisor.Child.start = start  # type: ignore[method-assign]


def _become_child(command: Sequence[str], pass_fds: Sequence[int], output: Path | None) -> None:
    """Turn this fork of a supervisor into its child. As after `Popen`, it has no file and no handler of the parent."""
    from streamlearn.cli import main  # noqa: PLC0415

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    if output is not None:
        target = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o640)
        os.dup2(target, 1)
        os.dup2(target, 2)
    first = 3
    for fd in [*sorted(pass_fds), os.sysconf("SC_OPEN_MAX")]:
        os.closerange(first, fd)
        first = fd + 1
    os.setsid()
    sys.argv = ["streamlearn", *command[command.index("streamlearn") + 1 :]]
    main()


if __name__ == "__main__":
    serve_children(sys.stdin, sys.stdout)
    os._exit(0)  # skips the slow exit handlers of the imported libraries
