"""Measures the answers of a server: rate and latency of `/predict` for one 28 x 28 image, against rivals.

One server process serves a published convnet, with one thread of torch. The client is wrk, on the same cores. Rivals
answer with the same network in the same run, each in a process of its own with one thread of torch:

    no-op       the server's own /health/live: what HTTP costs
    bare ASGI   uvicorn and thirty lines: bytes to a tensor, the network, probabilities as JSON
    LitServe    `LitServer` with its default of one worker, JSON in and out

Then `/predict` with one connection while another process saves checkpoints continuously and publishes a new teacher
five times a second, in alternating rounds; and at half of the highest rate.

Run: python benchmarks/serve.py [--quick]. It needs wrk (Debian: apt-get install wrk). The last line is JSON.
"""

from __future__ import annotations

import contextlib
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
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from common import arguments, figures, running, tell, wait_ready, write_config

from streamlearn.app.build import model_spec
from streamlearn.config import load_config
from streamlearn.lab.broker import free_port
from streamlearn.models.build import build
from streamlearn.records import Array
from streamlearn.state.checkpoint import Checkpoint, save_checkpoint
from streamlearn.state.paths import StatePaths
from streamlearn.state.publish import Publisher

PIXELS = np.random.default_rng(0).integers(0, 256, (1, 28, 28), dtype=np.uint8)
RAW, JSON = "application/octet-stream", "application/json"
SCRIPT = """
wrk.method = "{method}"
wrk.headers["content-type"] = "{content_type}"
local file = io.open("{body}", "rb")
wrk.body = file and file:read("*all") or nil
done = function(summary, latency, requests)
  local errors = summary.errors
  io.write(string.format('{{"p50": %d, "p99": %d, "max": %d, "requests": %d, "us": %d, "errors": %d}}\\n',
    latency:percentile(50), latency:percentile(99), latency.max, summary.requests, summary.duration,
    errors.connect + errors.read + errors.write + errors.status + errors.timeout))
end
"""
"""Of wrk; its times are in microseconds."""


class Answers(NamedTuple):
    """What wrk measured."""

    p50_ms: float
    p99_ms: float
    max_ms: float
    per_s: float


def load(port: int, route: str, *, connections: int, seconds: float, body: bytes = b"", kind: str = RAW) -> Answers:
    """Send requests without pause on that many connections."""
    with tempfile.TemporaryDirectory() as folder:
        path, script = Path(folder) / "body", Path(folder) / "script.lua"
        path.write_bytes(body)
        script.write_text(SCRIPT.format(method="POST" if body else "GET", content_type=kind, body=path))
        url = f"http://127.0.0.1:{port}{route}"
        given = ["wrk", "-t1", f"-c{connections}", f"-d{seconds:.0f}s", "-s", str(script), url]
        done = subprocess.run(given, check=True, capture_output=True, text=True)
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    assert found["errors"] == 0, found
    return Answers(
        found["p50"] / 1000, found["p99"] / 1000, found["max"] / 1000, round(found["requests"] / found["us"] * 1e6, 1)
    )


def paced(port: int, per_s: float, seconds: float) -> float:
    """p99 in ms at a fixed rate on 8 connections, from the time at which a request was due."""
    took_s: list[float] = []
    began_s = time.perf_counter() + 0.1

    def ask(first: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        for n in range(first, int(per_s * seconds), 8):
            due_s = began_s + n / per_s
            time.sleep(max(0.0, due_s - time.perf_counter()))
            connection.request("POST", "/predict", body=PIXELS.tobytes(), headers={"content-type": RAW})
            with connection.getresponse() as reply:
                reply.read()
            took_s.append(time.perf_counter() - due_s)
        connection.close()

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return float(np.percentile(took_s, 99)) * 1000


PUBLISHED_EVERY_S = 0.2
COPIES, MEMORY_ROWS = 8, 5_000
"""In a checkpoint: networks and moments of the optimizer; images of the replay buffer."""


def make_publisher(path: Path) -> tuple[Publisher, dict[str, Array], dict[str, str]]:
    """A publisher for the config, with weights and header."""
    config = load_config(path)
    spec = model_spec(config)
    weights: dict[str, Array] = {key: value.numpy() for key, value in build(spec).state_dict().items()}
    publisher = Publisher(StatePaths(config.state.dir).published, keep=2, clock=time.time)
    return publisher, weights, {"model_spec": spec.to_json()}


def save_and_publish(path: Path) -> None:
    """Save and publish continuously."""
    publisher, weights, header = make_publisher(path)
    folder = StatePaths(load_config(path).state.dir).checkpoints
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {f"{n}.{name}": array for n in range(COPIES) for name, array in weights.items()}
    arrays["memory.x"] = np.zeros((MEMORY_ROWS, 1, 28, 28), np.uint8)
    step, published_at_s, saves = int(time.time() * 10), 0.0, 0
    while True:
        save_checkpoint(folder, Checkpoint(saves % 2, {}, arrays, {}))
        saves += 1
        if time.monotonic() - published_at_s >= PUBLISHED_EVERY_S:
            step, published_at_s = step + 1, time.monotonic()
            publisher.publish(step, weights, header)


@contextlib.contextmanager
def saving_and_publishing(path: Path) -> Iterator[None]:
    """Run `save_and_publish` in another process."""
    with subprocess.Popen([sys.executable, __file__, "--save", str(path)]) as process:
        try:
            deadline = time.monotonic() + 120.0
            folder = StatePaths(load_config(path).state.dir).checkpoints
            began_s = time.time()
            while not any(file.stat().st_mtime > began_s for file in folder.glob("*.ckpt")):
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.1)
            yield
        finally:
            process.kill()


@contextlib.contextmanager
def serving(kind: str, path: Path, live: str) -> Iterator[int]:
    """Run a rival in its own process; its port, once the route `live` answers."""
    port = free_port("127.0.0.1")
    with subprocess.Popen(
        [sys.executable, str(Path(__file__).parent / "rivals" / f"{kind}_app.py"), str(path), str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as process:
        try:
            wait_ready(f"http://127.0.0.1:{port}{live}", 120.0)
            yield port
        finally:
            os.killpg(process.pid, signal.SIGKILL)


def while_saving(port: int, path: Path, seconds: float) -> tuple[float, float]:
    """p99 in ms of /predict with one connection, in alternating rounds without and with saves and publications."""
    rounds: dict[bool, list[float]] = {False: [], True: []}
    for saving in (False, True, False, True):
        with saving_and_publishing(path) if saving else contextlib.nullcontext():
            found = load(port, "/predict", connections=1, seconds=seconds, body=PIXELS.tobytes())
        rounds[saving].append(found.p99_ms)
    return float(np.mean(rounds[False])), float(np.mean(rounds[True]))


def main() -> int:
    """Print rates and latencies, and their ratios."""
    if "--save" in sys.argv:
        save_and_publish(Path(sys.argv[-1]))
    seconds = 2.0 if arguments(__doc__ or "").quick else 15.0
    if shutil.which("wrk") is None:
        tell("this benchmark needs wrk: apt-get install wrk")
        return 2
    raw, json_body = PIXELS.tobytes(), json.dumps({"x": PIXELS.tolist()}).encode()
    sides: dict[str, Answers] = {}

    def measure(name: str, port: int, route: str, *, connections: int = 16, body: bytes = b"", kind: str = RAW) -> None:
        load(port, route, connections=connections, seconds=1, body=body, kind=kind)
        sides[name] = load(port, route, connections=connections, seconds=seconds, body=body, kind=kind)
        tell(f"{name}: {sides[name]}")

    with tempfile.TemporaryDirectory() as folder:
        port = free_port("127.0.0.1")
        path = write_config(Path(folder) / "streamlearn.toml", kind="embedded", port=port, processes=1)
        publisher, weights, header = make_publisher(path)
        publisher.publish(1, weights, header)
        with running("serve", "--config", path, output=Path(folder) / "server.log"):
            wait_ready(f"http://127.0.0.1:{port}/health/ready?require_learner=false", 300.0)
            measure("no-op, 1", port, "/health/live", connections=1)
            measure("raw, 1", port, "/predict", connections=1, body=raw)
            measure("no-op, 16", port, "/health/live")
            measure("raw, 16", port, "/predict", body=raw)
            measure("json, 16", port, "/predict", body=json_body, kind=JSON)
            half_p99_ms = paced(port, sides["raw, 16"].per_s / 2, seconds)
            alone_ms, saving_ms = while_saving(port, path, seconds)
        with serving("asgi", path, "/") as other:
            measure("bare ASGI, raw, 16", other, "/predict", body=raw)
        with serving("litserve", path, "/health") as other:
            measure("LitServe, json, 16", other, "/predict", body=json_body, kind=JSON)
    of_16 = sides["raw, 16"]
    figures(
        p99_over_p50_16=round(of_16.p99_ms / of_16.p50_ms, 2),
        max_over_p50_16=round(of_16.max_ms / of_16.p50_ms, 2),
        json_over_litserve=round(sides["json, 16"].per_s / sides["LitServe, json, 16"].per_s, 2),
        raw_over_bare_asgi=round(of_16.per_s / sides["bare ASGI, raw, 16"].per_s, 2),
        p99_ms_at_half_rate=round(half_p99_ms, 2),
        predict_over_noop_p50=round(sides["raw, 1"].p50_ms / sides["no-op, 1"].p50_ms, 2),
        p99_saving_over_alone=round(saving_ms / alone_ms, 2),
        p50_ms_1=sides["raw, 1"].p50_ms,
        p99_ms_1=sides["raw, 1"].p99_ms,
        p50_ms_16=of_16.p50_ms,
        p99_ms_16=of_16.p99_ms,
        per_s_16=of_16.per_s,
        json_per_s_16=sides["json, 16"].per_s,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
