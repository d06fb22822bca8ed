"""Measures whether the daemon stays as fast and as small as its stream grows: CPU per sample, memory, disk.

Samples of four numbers, 1,000 per second of event time, 1 % labels that come 20 s later on average, learned in process
from an embedded log by a small MLP, so that everything but the network shows. `labels.horizon_s` is short: a tenth of
the stream, so nine tenths run past it, where old samples are removed as new ones come. What a restart needs is kept
until no checkpoint does, so there is one every 2 s: the stream runs at about six times its event time.

    cost_last_over_first     CPU per sample in the last tenth over that of the second tenth, the first past the horizon
    rss_last_over_first      memory at these two places
    store_last_over_first    size of the sample store at these two places
    cost_64_over_1           CPU per sample with 64 partitions per topic over that with one

Run: python benchmarks/growth.py [--quick] [--samples N]. The default is 1,000,000. The last line is JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import resource
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import common  # noqa: F401 - sets OMP_WAIT_POLICY before torch is imported
import numpy as np
import structlog
from common import figures, tell

from streamlearn.app.learner import learn
from streamlearn.app.log import make_codec, make_topics, open_log
from streamlearn.config import Config, load_config
from streamlearn.loop.loop import TrainingLoop
from streamlearn.loop.report import StepReport
from streamlearn.state.paths import StatePaths

RATE, LABEL_SHARE, LABEL_DELAY = 1000, 0.01, 20_000
PARTS = 10
PARTITIONS = (1, 64)
START_MS = 1_700_000_000_000


def config_of(folder: Path, samples: int, partitions: int) -> Config:
    """A small network, an old log, a short horizon."""
    overrides: dict[str, Any] = {
        "schema.shape": [4],
        "schema.classes": 2,
        "model.options": {"hidden": [8]},
        "learn.device": "cpu",
        "batch.steps": 1,
        "batch.max_age_s": 3600.0,
        "labels.horizon_s": max(1.0, samples / RATE / PARTS),
        "labels.requests_per_hour": 0,
        "log.kind": "embedded",
        "log.partitions": partitions,
        "log.max_bytes": 4 << 30,
        "state.dir": folder,
        "state.checkpoint_every_s": 2.0,
        "metrics.port": 0,
    }
    return load_config(None, overrides=overrides, environ={})


def fill(config: Config, samples: int) -> None:
    """Write the stream, samples and labels in the order of their times."""
    rng, codec = np.random.default_rng(0), make_codec(config)
    x_NF = rng.normal(size=(samples, 4)).astype(np.float32)
    y_N = (x_NF.sum(axis=1) > 0).astype(np.int64)
    labelled_N = np.flatnonzero(rng.random(samples) < LABEL_SHARE)
    due_N = labelled_N + rng.geometric(1 / LABEL_DELAY, len(labelled_N))
    order_N = np.argsort(due_N)
    labelled_N, due_N, told = labelled_N[order_N], due_N[order_N], 0
    with contextlib.closing(open_log(config)) as log:
        make_topics(log, config)
        for first in range(0, samples, 1000):
            last = min(first + 1000, samples)
            new = [codec.encode_sample(f"s{n}", x_NF[n], timestamp_ms=START_MS + n) for n in range(first, last)]
            log.append(config.source.samples.topics[0], new)
            labels = []
            while told < len(due_N) and due_N[told] < last:
                n = int(labelled_N[told])
                labels.append(codec.labels.encode(f"s{n}", int(y_N[n]), timestamp_ms=START_MS + int(due_N[told])))
                told += 1
            log.append(config.source.labels.topic, labels)


class Meter:
    """Called after each step: notes time, memory and disk at each tenth of the stream."""

    def __init__(self, samples: int, store: Path) -> None:
        self._every, self._store = samples // PARTS, store
        self.marks: list[tuple[float, int, int]] = [self._now()]

    def __call__(self, loop: TrainingLoop, _: StepReport) -> None:
        """Note a tenth that is complete."""
        while len(self.marks) <= PARTS and loop.accounts.samples_learned >= self._every * len(self.marks):
            self.marks.append(self._now())
            done = self.marks[-1][0] - self.marks[-2][0]
            tell(f"{len(self.marks) - 1} of {PARTS}: {1e6 * done / self._every:.0f} us of CPU per sample")

    def _now(self) -> tuple[float, int, int]:
        disk = sum(path.stat().st_size for path in self._store.glob("*") if path.is_file())
        with open("/proc/self/statm", encoding="utf-8") as file:
            rss = int(file.read().split()[1]) * resource.getpagesize()
        return time.process_time(), rss, disk

    def cost(self, part: int, parts: int = 1) -> float:
        """Microseconds of CPU per sample in a tenth, from 1; of several, the last one."""
        return 1e6 * (self.marks[part][0] - self.marks[part - parts][0]) / (parts * self._every)


def measure(samples: int, partitions: int) -> Meter:
    """Learn the whole stream."""
    with tempfile.TemporaryDirectory() as folder:
        config = config_of(Path(folder), samples, partitions)
        tell(f"writing {samples} samples into {partitions} partitions")
        fill(config, samples)
        meter = Meter(samples, StatePaths(config.state.dir).store)
        learn(config, threading.Event(), until_end=True, on_step=meter)
        return meter


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="20,000 samples; the figures are rough")
    parser.add_argument("--samples", type=int, default=1_000_000)
    options = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    samples = 20_000 if options.quick else options.samples
    long = measure(samples, 1)
    costs = {count: measure(max(10_000, samples // PARTS), count).cost(PARTS, PARTS - 1) for count in PARTITIONS}
    second, last = long.marks[2], long.marks[PARTS]
    figures(
        samples=samples,
        us_per_sample=[round(long.cost(part), 1) for part in range(1, PARTS + 1)],
        cost_last_over_first=round(long.cost(PARTS) / long.cost(2), 3),
        rss_last_over_first=round(last[1] / second[1], 3),
        rss_mib=round(last[1] / 2**20),
        store_last_over_first=round(last[2] / second[2], 3),
        store_mib=round(last[2] / 2**20, 1),
        cost_64_over_1=round(costs[64] / costs[1], 3),
    )


if __name__ == "__main__":
    main()
