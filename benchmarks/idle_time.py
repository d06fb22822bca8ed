"""Measures what idle time is worth: the default number of steps against 4 per micro-batch, on a slow live stream.

`streamlearn run` on the embedded log learns Fashion-MNIST at 50 samples per second with the shipped convnet, 1 % labels
that come 20 s later on average. One run with the defaults, then one with `batch.steps = 4`, each with a client that
asks `/predict` ten times a second. Accuracy is that of first predictions on all samples, by their true classes.

The learner of the first run is killed with SIGKILL after half of the stream, and must reach the same weights as a
learner that replays the journal. After the stream it must rest: less than 5 % of a core a minute after the last record.

Run: python benchmarks/idle_time.py [--quick] [--minutes N]. The last line is JSON.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import command, figures, heartbeat, running, tell, wait_learner, wait_ready, write_config
from harness.verify import differences

from streamlearn.config import load_config
from streamlearn.lab.broker import free_port
from streamlearn.loop.settings import BatchConfig

SAMPLES_PER_S, ASKED_PER_S = 50, 10
REST_AFTER_S, REST_MEASURED_S = 45.0, 15.0
_TICK_S = 1.0 / os.sysconf("SC_CLK_TCK")


def cpu_s(pid: int) -> float:
    """CPU time of a process so far, all threads."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) * _TICK_S


class Asker(threading.Thread):
    """Asks `/predict` at a fixed rate."""

    def __init__(self, port: int) -> None:
        super().__init__(daemon=True)
        self._port, self.took_s, self.stopping = port, list[float](), False

    def run(self) -> None:
        """Until `stopping` is set."""
        body = np.zeros((1, 28, 28), np.uint8).tobytes()
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=30)
        began_s, n = time.perf_counter(), 0
        while not self.stopping:
            n += 1
            time.sleep(max(0.0, began_s + n / ASKED_PER_S - time.perf_counter()))
            asked_s = time.perf_counter()
            connection.request("POST", "/predict", body=body, headers={"content-type": "application/octet-stream"})
            with connection.getresponse() as reply:
                reply.read()
            self.took_s.append(time.perf_counter() - asked_s)


def wait_for(what: str, reached: Any, timeout_s: float = 120.0) -> None:
    """Wait until `reached()`."""
    deadline = time.monotonic() + timeout_s
    while not reached():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


def measure(folder: Path, minutes: float, steps: int, *, kill: bool) -> dict[str, Any]:
    """One run. With `kill` the learner is killed after half of the stream; the CPU share is that of the first half."""
    port = free_port("127.0.0.1")
    path = write_config(folder / "streamlearn.toml", kind="embedded", port=port, processes=1, steps=steps)
    state, samples = folder / "state", int(minutes * 60 * SAMPLES_PER_S)
    plan = ("--limit", samples, "--label-share", 0.01, "--label-delay", "exponential:20s", "--rate", SAMPLES_PER_S)
    found: dict[str, Any] = {}
    with running("run", "--config", path, output=folder / "run.log"):
        wait_ready(f"http://127.0.0.1:{port}/health/live", 300.0)
        pid, asker = int(wait_learner(state)["pid"]), Asker(port)
        began_s, began_cpu_s = time.monotonic(), cpu_s(pid)
        with subprocess.Popen(command("simulate", "fashion-mnist", "--config", path, *plan), stderr=subprocess.DEVNULL):
            wait_ready(f"http://127.0.0.1:{port}/health/ready", 300.0)
            asker.start()
            time.sleep(max(0.0, minutes * 30 - (time.monotonic() - began_s)))
            found["cpu_share"] = (cpu_s(pid) - began_cpu_s) / (time.monotonic() - began_s)
            if kill:
                os.kill(pid, signal.SIGKILL)
        asker.stopping = True
        asker.join(10.0)
        wait_for("all samples to be learned", lambda: learned(state) >= samples, 600.0)
        found |= {"p99_ms": 1000 * float(np.percentile(asker.took_s, 99)), "steps": heartbeat(state)["step"]}
        if kill:
            time.sleep(REST_AFTER_S)
            last = int(heartbeat(state)["pid"])
            began_cpu_s = cpu_s(last)
            time.sleep(REST_MEASURED_S)
            found["resting_cpu_share"] = (cpu_s(last) - began_cpu_s) / REST_MEASURED_S
            found["killed"] = last != pid
        found["accuracy"] = oracle(state)
    return found


def learned(state: Path) -> int:
    """Samples learned so far."""
    return int(heartbeat(state).get("accounts", {}).get("samples_learned", 0))


def oracle(state: Path) -> float:
    """Accuracy of first predictions on all samples."""
    scores = json.loads((state / "scores.json").read_bytes())
    return float(scores["oracle"]["cumulative"]["accuracy"]["teacher"])


def is_bit_equal(path: Path) -> bool:
    """Whether a learner that replays the journal ends with the same weights, replay buffer, scores and labels."""
    config = load_config(path)
    folder, state = path.parent, config.state.dir
    other = folder / "reference.toml"
    reference = folder / "reference"
    shutil.copytree(state / "journal", reference / "journal")
    shutil.copytree(state / "log", reference / "log")
    text = path.read_text(encoding="utf-8").replace(str(state), str(reference))
    # After the replay it waits long before a step of its own.
    other.write_text(text.replace("[learn]\n", "[learn]\ncpu_share = 0.01\n"), encoding="utf-8")
    step = heartbeat(state)["step"]
    with running("learn", "--config", other, output=folder / "reference.log"):
        wait_for("the replay", lambda: heartbeat(reference).get("step", 0) >= step, 1200.0)
    found = [each for each in differences(config, load_config(other)) if not each.startswith("extra")]
    tell(f"differences to the replay: {found}")
    return not found


def main() -> int:
    """Print the figures; 1 if the learner did not rest, or ended with other weights."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one minute of each; the figures are rough")
    parser.add_argument("--minutes", type=float, default=10.0, help="of each run")
    options = parser.parse_args()
    minutes = 1.0 if options.quick else options.minutes
    with tempfile.TemporaryDirectory() as name:
        default = measure(Path(name) / "default", minutes, BatchConfig().steps, kill=True)
        tell(f"default: {default}")
        equal = is_bit_equal(Path(name) / "default" / "streamlearn.toml")
        four = measure(Path(name) / "four", minutes, 4, kill=False)
        tell(f"4 steps: {four}")
    figures(
        accuracy=round(default["accuracy"], 4),
        accuracy_4_steps=round(four["accuracy"], 4),
        cpu_share=round(default["cpu_share"], 3),
        cpu_share_4_steps=round(four["cpu_share"], 3),
        predict_p99_over_4_steps=round(default["p99_ms"] / four["p99_ms"], 2),
        predict_p99_ms=round(default["p99_ms"], 2),
        steps=default["steps"],
        steps_4_steps=four["steps"],
        resting_cpu_share=round(default["resting_cpu_share"], 4),
        bit_equal=equal,
        minutes=minutes,
    )
    return int(not equal or default["resting_cpu_share"] >= 0.05)


if __name__ == "__main__":
    sys.exit(main())
