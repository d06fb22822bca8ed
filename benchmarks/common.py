"""Shared by the benchmarks: a Kafka broker, config files, processes, one JSON line at the end."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from streamlearn.lab.broker import Broker
from streamlearn.learn.recipes import RECIPES

SHIPPED = RECIPES["image"].method
FASHION = """
[schema]
shape = [1, 28, 28]
dtype = "uint8"
classes = 10
scale = 0.00392156862745098

[model]
factory = "convnet"
normalise = false

[learn]
method = "{method}"
threads = {threads}

[learn.noise_options]
flip = true

[batch]
max_age_s = 1.0
steps = {steps}

[log]
kind = "{kind}"
partitions = {partitions}

[log.kafka]
bootstrap_servers = "{bootstrap}"

[state]
dir = "{state}"

[serve]
port = {port}
processes = {processes}

[metrics]
port = 0
"""


os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the daemon sets it, see streamlearn.cli.main
sys.path.append(str(Path(__file__).parents[1] / "tests"))  # the package `harness`


def arguments(description: str) -> argparse.Namespace:
    """Flags of every benchmark."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="a short run; the figures are rough")
    return parser.parse_args()


def write_config(path: Path, **settings: Any) -> Path:
    """A config for Fashion-MNIST."""
    defaults = {
        "method": SHIPPED,
        "steps": 4,
        "threads": 0,
        "kind": "kafka",
        "partitions": 2,
        "bootstrap": "127.0.0.1:1",
        "port": 0,
        "processes": 2,
        "state": path.parent / "state",
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(FASHION.format(**{**defaults, **settings}))
    return path


@contextmanager
def broker(folder: Path) -> Iterator[str]:
    """A real Apache Kafka: that of STREAMLEARN_TEST_KAFKA, else a new one."""
    if named := os.environ.get("STREAMLEARN_TEST_KAFKA"):
        yield named
        return
    with Broker(folder, port=0, say=tell) as started:
        yield started.bootstrap_servers


def tell(line: str) -> None:
    """Print progress to stderr; stdout is for figures."""
    print(line, file=sys.stderr, flush=True)


def command(*args: object) -> list[str]:
    """The command line of a streamlearn command."""
    return [sys.executable, "-m", "streamlearn", *map(str, args)]


def finish(*args: object) -> None:
    """Run a command until it exits."""
    subprocess.run(command(*args), check=True)


@contextmanager
def running(*args: object, output: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command; SIGTERM on exit."""
    with output.open("ab") as file:
        process = subprocess.Popen(command(*args), stdout=file, stderr=file)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def heartbeat(state: Path) -> dict[str, Any]:
    """The learner's last heartbeat; empty if there is none."""
    try:
        found: dict[str, Any] = json.loads((state / "learner.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return found


def wait_ready(url: str, timeout_s: float = 60.0) -> None:
    """Wait until a server serves a teacher."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(url, timeout=5) as reply:
                if reply.status == 200:
                    return
        except OSError:
            time.sleep(0.1)
    raise TimeoutError(url)


def wait_learner(state: Path, timeout_s: float = 120.0) -> dict[str, Any]:
    """Wait until a learner is ready for the first record; its heartbeat."""
    deadline = time.monotonic() + timeout_s
    while (found := heartbeat(state)).get("state") != "learning":
        if time.monotonic() > deadline:
            raise TimeoutError(state)
        time.sleep(0.1)
    return found


def figures(**values: Any) -> None:
    """Print the last line: one JSON object."""
    print(json.dumps(values), flush=True)
