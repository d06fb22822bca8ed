"""Starts processes in milliseconds: one that has imported everything forks, and its children are real processes.

A learner spends seconds in importing torch, and nearly all of a soak would go there. So `serve_children` imports once,
and starts each command line in a fork: own process id, own files, killed by real signals. What it lacks of a start by
hand is the import; see `startups` for that. The parent must have no threads, so nothing here runs a
step.

Protocol: one JSON object a line, on stdin and stdout. {"start": arguments, "output": path, "environ": {…}} gives
{"pid": n}; {"poll": pid} gives {"code": null, or n as `subprocess` has it}. At the end of stdin all children die.
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
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from streamlearn.state import kill_points as points

WARM = (
    "streamlearn.cli",
    "streamlearn.app.learner",
    "streamlearn.app.server",
    "streamlearn.learn.methods.mean_teacher",
    "streamlearn.models.mlp",
    "harness.producer",
    "torch._dynamo",  # 1.5 s, imported when the first optimizer is made
    "uvicorn.loops.uvloop",
    "uvicorn.protocols.http.httptools_impl",
)
PRODUCER = "producer"


class ForkServer:
    """The harness's end: a process that forks others. A context manager."""

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

    def start(self, arguments: Sequence[str], output: Path, environ: Mapping[str, str] | None = None) -> int:
        """Start `streamlearn ARGUMENTS` (or the producer); its process id. Both outputs are appended to a file."""
        order = {"start": list(arguments), "output": str(output), "environ": dict(environ or {})}
        return int(self._ask(order)["pid"])

    def poll(self, pid: int) -> int | None:
        """The exit code, negative for a signal; None while it lives."""
        code: int | None = self._ask({"poll": pid})["code"]
        return code

    def _ask(self, order: Mapping[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            msg = f"the nursery ended with {self._process.wait(20.0)}"
            raise RuntimeError(msg)
        answer: dict[str, Any] = json.loads(line)
        return answer


def serve_children(orders: IO[str], answers: IO[str]) -> None:
    """Do as told until the orders end, then kill whoever is left."""
    for module in WARM:
        importlib.import_module(module)
    gc.freeze()  # a child that collects would copy every page it looks at
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
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        _become(order, parent)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # not through the parent's own exit handlers


def _become(order: Mapping[str, Any], parent: int) -> None:
    """Be the process that was asked for."""
    from streamlearn.app.signals import exit_with_parent  # noqa: PLC0415
    from streamlearn.cli import main  # noqa: PLC0415 - with torch; whoever only gives orders does without

    output = os.open(order["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o640)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for target, source in ((0, nothing), (1, output), (2, output)):
        os.dup2(source, target)
    os.setsid()
    exit_with_parent(parent)
    os.environ.update(order["environ"])
    points.arm_from(os.environ)
    if order["start"][0] == PRODUCER:
        from harness.producer import run  # noqa: PLC0415

        run(*order["start"][1:])
        return
    sys.argv = ["streamlearn", *order["start"]]
    main()


if __name__ == "__main__":
    serve_children(sys.stdin, sys.stdout)
    os._exit(0)  # what was imported has much to say about its own end
