"""Measures the accuracy of the served teacher after Fashion-MNIST went once through a real Kafka, with 1 % late labels.

`streamlearn simulate` sends 60,000 records, kcat sends 100 more (90 valid, 10 invalid) to a learner and two servers.
Then the 10,000 test images are sent to `/predict`. The same stream is also learned from labels only, with an averaged
network. Every record must be accounted for (I7).

Run: python benchmarks/fashion.py [--quick]. The last line is JSON. Needs kcat.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path

import numpy as np
from common import SHIPPED, arguments, broker, figures, finish, heartbeat, running, tell, wait_ready, write_config

from streamlearn.lab.broker import free_port
from streamlearn.lab.datasets import Dataset, load
from streamlearn.records import Array

FOREIGN = 100


def produce_with_kcat(bootstrap: str, data: Dataset) -> None:
    """Send 90 valid JSON samples and 10 invalid ones with kcat."""
    assert data.test_x is not None
    lines = []
    for n in range(FOREIGN):
        x = data.test_x[n].ravel().tolist() if n % 10 else data.test_x[n].ravel().tolist()[:-1]
        lines.append(f"kcat-{n}\t" + json.dumps({"x": x}))
    flags = ["-P", "-b", bootstrap, "-t", "samples", "-K", "\t", "-H", "content-type=application/json"]
    partitioner = ["-X", "topic.partitioner=murmur2_random"]
    subprocess.run(["kcat", *flags, *partitioner], input="\n".join(lines).encode(), check=True)


def learn_all(config: Path, folder: Path, samples: int) -> dict[str, object]:
    """Run learner and servers until all samples are learned; then score the served teacher on the test images."""
    data = load("fashion-mnist")
    assert data.test_x is not None
    assert data.test_y is not None
    port = json.loads((folder / "port.json").read_text())
    with running("run", "--config", config, output=folder / "run.log") as process:
        wait_ready(f"http://127.0.0.1:{port}/health/ready", 120.0)
        while True:
            status = heartbeat(folder / "state")
            if process.poll() is not None:
                raise RuntimeError((folder / "run.log").read_text()[-2000:])
            learned = status.get("accounts", {}).get("samples_read", 0)
            if learned >= samples and status.get("lag_records") == 0 and status["published_step"] == status["step"]:
                break
            tell(f"{learned} of {samples} samples")
            time.sleep(2.0)
        time.sleep(1.0)
        accuracy, version = ask(port, data.test_x, data.test_y)
    status = heartbeat(folder / "state")
    return {"test_accuracy": accuracy, "model_version": version, "status": status}


def ask(port: int, x: Array, y: Array) -> tuple[float, int]:
    """Accuracy of the served teacher on the test images, and its version."""
    right, version = 0, -1
    for begin in range(0, len(y), 500):
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/predict",
            data=x[begin : begin + 500].tobytes(),
            headers={"content-type": "application/octet-stream"},
        )
        with urllib.request.urlopen(request, timeout=60) as reply:
            answer = json.loads(reply.read())
        classes = np.array([prediction["class_index"] for prediction in answer["predictions"]])
        right += int((classes == y[begin : begin + 500]).sum())
        version = answer["model_version"]
    return right / len(y), version


def main() -> None:
    """Print accuracies and accounts."""
    quick = arguments(__doc__ or "").quick
    samples = 6_000 if quick else 60_000
    plan = ("fashion-mnist", "--limit", samples, "--label-share", 0.01, "--label-delay", "geometric:5000")
    with tempfile.TemporaryDirectory() as name, broker(Path(name) / "kafka") as bootstrap:
        results = {}
        for method in (SHIPPED, "supervised"):
            folder = Path(name) / method
            port = free_port("127.0.0.1")
            settings = {"bootstrap": bootstrap, "method": method, "port": port}
            config = write_config(folder / "streamlearn.toml", **settings)
            (folder / "port.json").write_text(str(port))
            if method == SHIPPED:
                finish("simulate", *plan, "--config", config)
                produce_with_kcat(bootstrap, load("fashion-mnist"))
            tell(f"learning: {method}")
            results[method] = learn_all(config, folder, samples + FOREIGN)
    status = results[SHIPPED]["status"]
    assert isinstance(status, dict)
    accounts, ledger = status["accounts"], status["ledger"]
    read = accounts["samples_read"]
    accounted = accounts["samples_learned"] + accounts["samples_duplicate_id"] + accounts["samples_dead_lettered"]
    label_ends = sum(
        ledger[state] for state in ("joined", "waiting", "duplicate", "corrected", "retracted", "expired", "orphan")
    )
    figures(
        test_accuracy=results[SHIPPED]["test_accuracy"],
        test_accuracy_label_only=results["supervised"]["test_accuracy"],
        prequential=status["accuracy"]["prequential"]["teacher"],
        oracle=status["accuracy"]["oracle"]["teacher"],
        model_version=results[SHIPPED]["model_version"],
        records_unaccounted=(samples + FOREIGN - read) + (read - accounted) + (accounts["labels_read"] - label_ends),
        accounts=accounts,
        labels=ledger,
    )


if __name__ == "__main__":
    main()
