"""Measures the throughput of the whole daemon relative to its own training step.

The bare step predicts the fresh samples (the prequential score), then learns, on arrays in memory, in a process of its
own with nothing next to it. The daemon reads the same samples from a full log, decodes, joins labels, maintains store,
ledger and journal, publishes every second, saves checkpoints and exports metrics, next to a server process. Both take
one step per micro-batch. Ratios are samples per second of the daemon over those of the bare step, in the same run.

Run: python benchmarks/pipeline.py [--quick]. The last line is JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from common import arguments, broker, command, figures, finish, heartbeat, running, tell, write_config

from streamlearn.app.build import model_spec
from streamlearn.config import Config, load_config
from streamlearn.lab.datasets import load
from streamlearn.learn.learner import Learner
from streamlearn.records import MicroBatch

WARM_UP = 20


def bare(config: Config, steps: int) -> dict[str, float]:
    """Samples per second of predict and learn, and of learn only, on arrays in memory."""
    data = load("fashion-mnist", limit=20_000)
    learner = Learner(model_spec(config), config.learn.model_copy(update={"twin": "off"}))
    rng = np.random.default_rng(0)
    fresh, labelled = config.batch.fresh, config.batch.labelled
    spent = {"predict": 0.0, "learn": 0.0}
    for step in range(WARM_UP + steps):
        rows, known = rng.integers(len(data.y), size=fresh), rng.integers(600, size=labelled)
        batch = MicroBatch(data.x[rows], fresh, data.x[known], data.y[known], labelled)
        started = time.perf_counter()
        learner.predict(batch.fresh_x)
        predicted = time.perf_counter()
        learner.learn(batch)
        if step >= WARM_UP:
            spent["predict"] += predicted - started
            spent["learn"] += time.perf_counter() - predicted
    samples = steps * fresh
    return {"step": samples / (spent["predict"] + spent["learn"]), "learn": samples / spent["learn"]}


def bare_in_its_own_process(config_path: Path, steps: int) -> dict[str, float]:
    """Run `bare` in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--bare", str(config_path), str(steps)], check=True, capture_output=True
    )
    rates: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return rates


def daemon(config_path: Path, folder: Path) -> float:
    """Samples per second of a learner on a full log, from its first to its last step."""
    output = folder / "server.log"
    with running("serve", "--config", config_path, output=output), (folder / "learner.log").open("ab") as file:
        subprocess.run(command("learn", "--until-end", "--config", config_path), check=True, stderr=file)
    status = heartbeat(folder / "state")
    seconds = status["last_step_at_s"] - status["first_step_at_s"]
    return float(status["accounts"]["samples_learned"] / seconds)


def main() -> None:
    """Print the ratios."""
    if "--bare" in sys.argv:
        config_path, steps = sys.argv[-2:]
        print(json.dumps(bare(load_config(Path(config_path)), int(steps))))
        return
    quick = arguments(__doc__ or "").quick
    samples = 6_400 if quick else 30_000
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        embedded = write_config(folder / "embedded" / "streamlearn.toml", kind="embedded", steps=1)
        plan = ("fashion-mnist", "--limit", samples, "--label-share", 0.01, "--label-delay", "geometric:2000")
        before = bare_in_its_own_process(embedded, samples // 128)
        tell(f"bare step: {before['step']:.0f} samples/s, learning alone {before['learn']:.0f}")
        finish("simulate", *plan, "--config", embedded)
        rate_embedded = daemon(embedded, folder / "embedded")
        tell(f"daemon on the embedded log: {rate_embedded:.0f} samples/s")
        with broker(folder / "kafka") as bootstrap:
            kafka = write_config(folder / "on-kafka" / "streamlearn.toml", bootstrap=bootstrap, steps=1)
            finish("simulate", *plan, "--config", kafka)
            rate_kafka = daemon(kafka, folder / "on-kafka")
        tell(f"daemon on Kafka: {rate_kafka:.0f} samples/s")
        after = bare_in_its_own_process(embedded, samples // 128)
        tell(f"bare step again: {after['step']:.0f} samples/s, learning alone {after['learn']:.0f}")
    step, learn = (np.mean([run[key] for run in (before, after)]) for key in ("step", "learn"))
    figures(
        daemon_over_bare_step=round(rate_kafka / step, 3),
        daemon_over_bare_step_embedded=round(rate_embedded / step, 3),
        daemon_over_bare_learn=round(rate_kafka / learn, 3),
        daemon_over_bare_learn_embedded=round(rate_embedded / learn, 3),
        bare_step_samples_per_s=round(step),
        samples=samples,
    )


if __name__ == "__main__":
    main()
