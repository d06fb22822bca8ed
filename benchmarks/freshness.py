"""Measures how soon a label is in the teacher that answers, and a sample in the weights, with the default settings.

A learner and a server on the embedded log, the shipped convnet on Fashion-MNIST. Samples come at a fixed rate by
`POST /sample`, and labels of earlier ones by `POST /label`.

    label   from the 2xx of POST /label until GET /label/{id} says in_served_model
    sample  from the 2xx of POST /sample until the learner's counter has as many learned samples
    stalls  mean time that the loop spends on a publication, and on a checkpoint, in ms

The limit in the same run: a teacher is published once per `state.publish_every_s` (1 s), after a quarter of it if it
has learned new labels; and a micro-batch that is not full is closed after `batch.max_age_s` (.5 s).

Run: python benchmarks/freshness.py [--quick]. The last line is JSON.
"""

from __future__ import annotations

import http.client
import json
import re
import tempfile
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
from common import arguments, figures, running, tell, wait_learner, wait_ready, write_config

from streamlearn.config import load_config
from streamlearn.lab.broker import free_port
from streamlearn.lab.datasets import load
from streamlearn.learn.settings import LearnConfig
from streamlearn.loop.settings import BatchConfig

SAMPLES_PER_S, LABEL_EVERY = 50.0, 10
"""One label per ten samples: more than a stream has, in order to measure many."""
CHECKPOINT_EVERY_S = 5.0
POLL_S = 0.02


class Client:
    """One keep-alive connection."""

    def __init__(self, port: int) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)

    def send(self, method: str, route: str, body: bytes | None = None, kind: str = "application/json") -> Any:
        """Parsed JSON of a 2xx reply; the text of any other type."""
        self._connection.request(method, route, body=body, headers={"content-type": kind} if body else {})
        with self._connection.getresponse() as reply:
            content = reply.read()
            assert reply.status < 300, (route, reply.status, content[:200])
            return json.loads(content) if "json" in (reply.headers["content-type"] or "") else content.decode()


def metric(text: str, name: str) -> float:
    """The value of one series."""
    found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
    return float(found[1]) if found else 0.0


class Watcher(threading.Thread):
    """Polls until labels are served and samples are learned; notes how long each took."""

    def __init__(self, port: int, metrics_port: int) -> None:
        super().__init__(daemon=True)
        self._client, self._metrics = Client(port), Client(metrics_port)
        self.labels: deque[tuple[str, float]] = deque()
        self.samples: deque[tuple[int, float]] = deque()
        """How many samples were sent up to it, and when it was acknowledged."""
        self.label_s: list[float] = []
        self.sample_s: list[float] = []
        self.text = ""
        self.stopping = False

    def run(self) -> None:
        """Until `stopping` is set."""
        while not self.stopping:
            time.sleep(POLL_S)
            while self.labels:  # in order: a later label is not served before an earlier one
                sample_id, sent_s = self.labels[0]
                if not self._client.send("GET", f"/label/{sample_id}")["in_served_model"]:
                    break
                self.label_s.append(time.perf_counter() - sent_s)
                self.labels.popleft()
            self.text = self._metrics.send("GET", "/metrics")
            learned = metric(self.text, 'streamlearn_records_total{outcome="learned",topic="samples"}')
            while self.samples and self.samples[0][0] <= learned:
                self.sample_s.append(time.perf_counter() - self.samples.popleft()[1])


def stream(port: int, watcher: Watcher, seconds: float, warm_up_s: float) -> None:
    """Send samples and labels at their rates; after the warm-up each is watched."""
    data, client = load("fashion-mnist", limit=20_000), Client(port)
    began_s = time.perf_counter()
    for n in range(int((seconds + warm_up_s) * SAMPLES_PER_S)):
        time.sleep(max(0.0, began_s + n / SAMPLES_PER_S - time.perf_counter()))
        client.send("POST", f"/sample?id=f{n}", data.x[n % len(data.x)].tobytes(), "application/octet-stream")
        is_warm = n >= warm_up_s * SAMPLES_PER_S
        if is_warm:
            watcher.samples.append((n + 1, time.perf_counter()))
        if n >= 100 and n % LABEL_EVERY == 0:
            told = n - 100
            client.send(
                "POST", "/label", json.dumps({"id": f"f{told}", "label": int(data.y[told % len(data.y)])}).encode()
            )
            if is_warm:
                watcher.labels.append((f"f{told}", time.perf_counter()))


def main() -> None:
    """Print the times."""
    seconds = 15.0 if arguments(__doc__ or "").quick else 90.0
    batch, learn = BatchConfig(), LearnConfig()
    with tempfile.TemporaryDirectory() as name:
        folder, port = Path(name), free_port("127.0.0.1")
        path = write_config(folder / "streamlearn.toml", kind="embedded", port=port, processes=1, steps=batch.steps)
        path.write_text(
            path.read_text()
            .replace("max_age_s = 1.0", f"max_age_s = {batch.max_age_s}")
            .replace("[state]\n", f"[state]\ncheckpoint_every_s = {CHECKPOINT_EVERY_S}\n")
        )
        config = load_config(path)
        with (
            running("serve", "--config", path, output=folder / "server.log"),
            running("learn", "--config", path, output=folder / "learner.log"),
        ):
            wait_ready(f"http://127.0.0.1:{port}/health/live", 300.0)
            watcher = Watcher(port, wait_learner(folder / "state")["metrics_port"])
            watcher.start()
            stream(port, watcher, seconds, 10.0)
            deadline = time.monotonic() + 60.0
            while (watcher.labels or watcher.samples) and time.monotonic() < deadline:
                time.sleep(0.1)
            watcher.stopping = True
            watcher.join(10.0)
        text = watcher.text
        publications = (seconds + 10.0) / config.state.publish_every_s
        spent = {
            phase: metric(text, f'streamlearn_step_phase_seconds_total{{phase="{phase}"}}')
            for phase in ("publish", "save")
        }
        saves = metric(text, "streamlearn_checkpoint_duration_seconds_count")
    label_p50, label_p99 = np.percentile(watcher.label_s, [50, 99])
    sample_p50, sample_p99 = np.percentile(watcher.sample_s, [50, 99])
    tell(f"{len(watcher.label_s)} labels, {len(watcher.sample_s)} samples, not seen: {len(watcher.labels)}")
    figures(
        label_to_served_p50_s=round(float(label_p50), 3),
        label_to_served_p99_s=round(float(label_p99), 3),
        label_p99_over_publish_every=round(float(label_p99) / config.state.publish_every_s, 2),
        sample_to_weights_p50_s=round(float(sample_p50), 3),
        sample_to_weights_p99_s=round(float(sample_p99), 3),
        publication_stall_ms=round(1000 * spent["publish"] / publications, 2),
        checkpoint_stall_ms=round(1000 * spent["save"] / max(saves, 1), 2),
        steps_per_batch=batch.steps,
        cpu_share=learn.cpu_share,
        samples_per_s=SAMPLES_PER_S,
    )


if __name__ == "__main__":
    main()
