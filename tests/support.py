"""What end-to-end tests share: config files, real processes, and waiting for what they do, always with a bound."""

from __future__ import annotations

import atexit
import functools
import json
import os
import signal
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.fork_server import ForkServer

from streamlearn.learn.methods.settings import OPTIONS
from streamlearn.learn.noise.settings import NOISES, NoiseOptions
from streamlearn.learn.settings import LearnConfig
from streamlearn.schema.settings import SourceConfig
from streamlearn.state.checkpoint import Checkpoint, load_newest


def learn_config(defaults: Mapping[str, Any], **changed: Any) -> LearnConfig:
    """[learn] with the options of method and noise given flat. If not given: no recipe, no twin, float32.

    `defaults` that do not apply to the method or the noise are left out.
    """
    flat = {"recipe": "none", "twin": "off", "precision": "float32", **defaults, **changed}
    kinds = {
        "options": OPTIONS[flat["method"]].model_fields,
        "noise_options": NOISES.get(flat["noise"], NoiseOptions).model_fields,
    }
    known = {*LearnConfig.model_fields, *(name for fields in kinds.values() for name in fields)}
    nested = {of: {name: flat[name] for name in fields if name in flat} for of, fields in kinds.items()}
    own = {name: value for name, value in flat.items() if name in LearnConfig.model_fields}
    assert changed.keys() <= known, changed.keys() - known
    return LearnConfig(**own, **nested)


DIGITS = """
[schema]
shape = [1, 8, 8]
dtype = "uint8"
classes = 10
scale = 0.0625

[model]
factory = "{factory}"
normalise = {normalise}

[learn]
threads = 1
ema_decay = 0.98

[learn.options]
rampup_steps = 100

[learn.noise_options]
shift_pixels = 1

[batch]
fresh = 32
labelled = 16
steps = 1
max_age_s = {max_age_s}

[source]
samples.topic = "{prefix}samples"
labels.topic = "{prefix}labels"

[log]
kind = "{kind}"
partitions = {partitions}
dead_letters = "{prefix}dead-letters"

[log.kafka]
bootstrap_servers = "{bootstrap}"

[state]
dir = "{folder}/state"
checkpoint_every_s = {checkpoint_every_s}
publish_every_s = 0.2

[serve]
port = {port}
processes = 1

[metrics]
port = 0
"""
_DEFAULTS: Mapping[str, Any] = {
    "factory": "convnet",
    "normalise": "false",
    "max_age_s": 0.2,
    "kind": "embedded",
    "partitions": 1,
    "bootstrap": "127.0.0.1:1",
    "prefix": "",
    "checkpoint_every_s": 5.0,
    "port": 0,
}


def write_config(folder: Path, **settings: Any) -> Path:
    """A config file for the digits, in a folder of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "streamlearn.toml"
    path.write_text(DIGITS.format(**{**_DEFAULTS, "folder": folder, **settings}))
    return path


def in_format(chosen: str) -> SourceConfig:
    """[source] with samples in this format."""
    return SourceConfig.model_validate({"samples": {"format": chosen}})


def command(*arguments: object) -> list[str]:
    """The command line of one streamlearn command."""
    return [sys.executable, "-m", "streamlearn", *map(str, arguments)]


class Forked:
    """A streamlearn process of the fork server, with those methods of `Popen` that tests use."""

    def __init__(
        self, arguments: Sequence[object], output: Path, errors: Path | None = None, *, fork_children: bool = True
    ) -> None:
        output.touch()
        self.pid = forks().start([*map(str, arguments)], output, os.environ, errors=errors, fork_children=fork_children)

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while the process lives."""
        return forks().poll(self.pid)

    def wait(self, timeout_s: float) -> int:
        """The exit code."""
        until(lambda: self.poll() is not None, "the end of a process", timeout_s)
        code = self.poll()
        assert code is not None
        return code

    def send_signal(self, number: int) -> None:
        """Send a signal; nothing if the process has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)


@functools.cache
def forks() -> ForkServer:
    """Starts processes of streamlearn in a third of a second; imports alone would take seconds."""
    server = ForkServer()
    atexit.register(server.__exit__)
    return server


def start(*arguments: object, output: Path, fork_children: bool = True) -> Forked:
    """A streamlearn process whose output goes to a file. `fork_children`: see `ForkServer.start`."""
    return Forked(arguments, output, fork_children=fork_children)


def finish(*arguments: object, timeout_s: float = 90.0) -> str:
    """Run a streamlearn command to its end; its stdout. Fails with its stderr."""
    with tempfile.TemporaryDirectory() as folder:
        output, errors = Path(folder, "stdout"), Path(folder, "stderr")
        process = Forked(arguments, output, errors)
        try:
            code = process.wait(timeout_s)
        finally:
            process.kill()
        assert code == 0, errors.read_text()[-3000:]
        return output.read_text()


def stop(process: Forked, timeout_s: float = 40.0) -> int:
    """SIGTERM, and the exit code."""
    process.send_signal(signal.SIGTERM)
    return process.wait(timeout_s)


def until(done: Callable[[], Any], what: str, timeout_s: float = 40.0) -> Any:
    """Wait until `done` gives something true; that."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if found := done():
            return found
        time.sleep(0.02)
    raise AssertionError(f"not within {timeout_s} s: {what}")


def heartbeat(folder: Path) -> dict[str, Any]:
    """What the learner last said of itself."""
    try:
        found = json.loads((folder / "state" / "learner.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def journaled_steps(folder: Path) -> int:
    """Steps written down so far."""
    return sum(path.read_bytes().count(b"\n") for path in (folder / "state" / "journal").glob("journal-*.log"))


def newest_checkpoint(folder: Path) -> Checkpoint:
    """The newest whole checkpoint."""
    found = load_newest(folder / "state" / "checkpoints")
    assert found is not None
    return found


def ask(url: str, body: Any = None, headers: Mapping[str, str] | None = None) -> tuple[int, Any]:
    """One HTTP request: status and JSON (or text)."""
    data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, headers={"content-type": "application/json", **(headers or {})})
    try:
        with urllib.request.urlopen(request, timeout=20) as reply:
            status, content = reply.status, reply.read()
    except urllib.error.HTTPError as error:
        with error:
            status, content = error.code, error.read()
    try:
        return status, json.loads(content)
    except ValueError:
        return status, content.decode()
