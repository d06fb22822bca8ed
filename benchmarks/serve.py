"""`/predict` of one raw 28x28 image against the server's own no-op route, one client and sixteen.

A server process follows a published conv net; the clients are threads with kept-alive connections in this process, on
the same cores. The limit measured in the same run is `/health/live`: what HTTP itself costs here.
"""

from __future__ import annotations

import http.client
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch
from harness import arguments, figures, running, tell, wait_ready, write_config

from streamlearn.broker import free_port
from streamlearn.config import load_config
from streamlearn.daemon.wiring import StatePaths, model_spec
from streamlearn.models.build import build
from streamlearn.state.publish import Publisher

IMAGE = np.random.default_rng(0).integers(0, 256, (1, 28, 28), dtype=np.uint8).tobytes()


def ask(port: int, count: int, route: str, took_s: list[float]) -> None:
    """So many requests on one connection; how long each took."""
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
    """p50 and p99 in milliseconds, and requests a second."""
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


def main() -> None:
    """Print latencies and the ratio to the no-op."""
    requests = 800 if arguments(__doc__ or "").quick else 6_400
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        port = free_port("127.0.0.1")
        path = write_config(Path(name) / "streamlearn.toml", kind="embedded", port=port)
        config = load_config(path)
        spec = model_spec(config)
        weights = {key: value.numpy() for key, value in build(spec).state_dict().items()}
        publisher = Publisher(StatePaths(config.state.dir).published, keep=2, clock=time.time)
        publisher.publish(1, weights, {"model_spec": spec.to_json()})
        with running("serve", "--config", path, output=Path(name) / "server.log"):
            wait_ready(f"http://127.0.0.1:{port}/health/ready?require_learner=false")
            found = {}
            for clients in (1, 16):
                for route in ("/health/live", "/predict"):
                    latencies_ms(port, route, clients=clients, requests=160)
                    found[route, clients] = latencies_ms(port, route, clients=clients, requests=requests)
                    tell(f"{route} with {clients} clients: p50, p99 in ms and requests/s: {found[route, clients]}")
    figures(
        predict_p50_ms=found["/predict", 1][0],
        predict_p99_ms=found["/predict", 1][1],
        predict_p50_ms_16=found["/predict", 16][0],
        predict_p99_ms_16=found["/predict", 16][1],
        predict_over_noop_p50=round(found["/predict", 1][0] / found["/health/live", 1][0], 2),
        predict_over_noop_rate_16=round(found["/predict", 16][2] / found["/health/live", 16][2], 2),
    )


if __name__ == "__main__":
    main()
