"""Measures the latency of `/predict` for one 28 x 28 image relative to the server's no-op route, with 1 and 16 clients.

A server process serves a published convnet. The clients are threads with keep-alive connections in this process, on
the same cores. `/health/live` measures the cost of HTTP in the same run. Then the same in alternating rounds, while
another process saves checkpoints continuously and publishes a new teacher five times a second.

Run: python benchmarks/serve.py [--quick]. The last line is JSON.
"""

from __future__ import annotations

import contextlib
import http.client
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from common import arguments, figures, running, tell, wait_ready, write_config

from streamlearn.app.build import model_spec
from streamlearn.config import load_config
from streamlearn.lab.broker import free_port
from streamlearn.models.build import build
from streamlearn.records import Array
from streamlearn.state.checkpoint import Checkpoint, save_checkpoint
from streamlearn.state.paths import StatePaths
from streamlearn.state.publish import Publisher

IMAGE = np.random.default_rng(0).integers(0, 256, (1, 28, 28), dtype=np.uint8).tobytes()


def ask(port: int, count: int, route: str, took_s: list[float]) -> None:
    """Send `count` requests on one connection; append the duration of each."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    headers = {"content-type": "application/octet-stream"}
    for _ in range(count):
        started = time.perf_counter()
        if route == "/predict":
            connection.request("POST", route, body=IMAGE, headers=headers)
        else:
            connection.request("GET", route)
        with connection.getresponse() as reply:
            reply.read()
            assert reply.status == 200, reply.status
        took_s.append(time.perf_counter() - started)
    connection.close()


def latencies_ms(port: int, route: str, *, clients: int, requests: int) -> tuple[float, float, float]:
    """p50 and p99 in milliseconds, and requests per second."""
    took_s: list[float] = []
    threads = [threading.Thread(target=ask, args=(port, requests // clients, route, took_s)) for _ in range(clients)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rate = len(took_s) / (time.perf_counter() - started)
    p50, p99 = np.percentile(took_s, [50, 99]) * 1000
    return round(float(p50), 3), round(float(p99), 3), round(rate)


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


def while_saving(path: Path, port: int, requests: int) -> dict[str, float]:
    """p99 of /predict with one client, in alternating rounds with and without saves and publications."""
    rounds: dict[bool, list[float]] = {False: [], True: []}
    for saving in (False, True, False, True):
        with saving_and_publishing(path) if saving else contextlib.nullcontext():
            _, p99, rate = latencies_ms(port, "/predict", clients=1, requests=requests)
        rounds[saving].append(p99)
        tell(f"/predict, one client, {'saving and publishing' if saving else 'alone'}: p99 {p99} ms, {rate} a second")
    alone, beside = (float(np.mean(rounds[saving])) for saving in (False, True))
    return {"p99_alone_ms": alone, "p99_saving_ms": beside}


def main() -> None:
    """Print latencies, and their ratios to the no-op route and to the p99 without saves."""
    if "--save" in sys.argv:
        save_and_publish(Path(sys.argv[-1]))
    requests = 800 if arguments(__doc__ or "").quick else 6_400
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        port = free_port("127.0.0.1")
        path = write_config(Path(name) / "streamlearn.toml", kind="embedded", port=port)
        publisher, weights, header = make_publisher(path)
        publisher.publish(1, weights, header)
        with running("serve", "--config", path, output=Path(name) / "server.log"):
            wait_ready(f"http://127.0.0.1:{port}/health/ready?require_learner=false", 300.0)
            found = {}
            for clients in (1, 16):
                for route in ("/health/live", "/predict"):
                    latencies_ms(port, route, clients=clients, requests=160)
                    found[route, clients] = latencies_ms(port, route, clients=clients, requests=requests)
                    tell(f"{route} with {clients} clients: p50, p99 in ms and requests/s: {found[route, clients]}")
            beside = while_saving(path, port, requests)
    figures(
        predict_p50_ms=found["/predict", 1][0],
        predict_p99_ms=found["/predict", 1][1],
        predict_p50_ms_16=found["/predict", 16][0],
        predict_p99_ms_16=found["/predict", 16][1],
        predict_over_noop_p50=round(found["/predict", 1][0] / found["/health/live", 1][0], 2),
        predict_over_noop_rate_16=round(found["/predict", 16][2] / found["/health/live", 16][2], 2),
        predict_p99_ms_saving=round(beside["p99_saving_ms"], 3),
        predict_p99_saving_over_alone=round(beside["p99_saving_ms"] / beside["p99_alone_ms"], 2),
    )


if __name__ == "__main__":
    main()
