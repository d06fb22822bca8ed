"""Measures lag and memory of a learner under a stream at ten times its own speed, for each policy of `log.overload`.

Fashion-MNIST, a convnet, an embedded log, 1 % labelled. First the learner's own speed is measured on a full log. Then
ten times as many samples are sent to a learner of each policy: `keep` must lag without growing memory; `thin` must keep
its lag near `log.shed_above_records` (twenty seconds of its own speed) and skip no label. Growth of memory is the slope
after the first third, times the remaining time; stores and buffers are small enough to be full by then.

Run: python benchmarks/overload.py [--quick] [--seconds S] [--policy NAME ...]. The last line is JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from common import figures, heartbeat, running, tell, write_config
from harness.hour import memory_mb

from streamlearn.app.log import make_codec, make_topics, open_log
from streamlearn.config import Config, load_config
from streamlearn.lab.datasets import load
from streamlearn.log.base import Log
from streamlearn.records import NewRecord

TIMES = 10.0
THIN_ABOVE_S = 20.0
LABEL_EVERY = 100
APPENDS_PER_S = 10
SMALL = {
    "labels.payload_max_bytes": 16 << 20,
    "labels.max_ids": 20_000,
    "labels.requests_per_hour": 0,
    "log.max_bytes": 8 << 30,
    "state.checkpoint_every_s": 5.0,
}
WIDTHS = "model.options={ widths = [48, 96, 192] }"
"""Slow enough that Python can send, read and join ten times as many samples on the same cores."""


class Look(NamedTuple):
    """One measurement of the learner."""

    at_s: float
    lag: int
    rss_mb: float
    anonymous_mb: float


class Run(NamedTuple):
    """The result of one policy."""

    looks: list[Look]
    sent: int
    labels_sent: int
    seconds: float
    status: dict[str, Any]


class Sender:
    """Appends samples and labels to the log."""

    def __init__(self, config: Config, log: Log) -> None:
        self._log, self._codec = log, make_codec(config)
        self._data = load("fashion-mnist", limit=2_000)
        self.samples = self.labels = 0

    def send(self, count: int) -> None:
        """Append the next `count` samples and their labels."""
        data, samples, labels = self._data, list[NewRecord](), list[NewRecord]()
        for number in range(self.samples, self.samples + count):
            row = number % len(data.y)
            samples.append(self._codec.encode_sample(f"s{number}", data.x[row]))
            if number % LABEL_EVERY == 0:
                labels.append(self._codec.labels.encode(f"s{number}", int(data.y[row])))
        self._log.append("samples", samples)
        if labels:
            self._log.append("labels", labels)
        self.samples, self.labels = self.samples + count, self.labels + len(labels)


@contextlib.contextmanager
def learner(folder: Path, **overrides: Any) -> Iterator[tuple[Config, Sender, int]]:
    """A learner on its own log: config, sender and process id."""
    settings = {**SMALL, **{key.replace("__", "."): value for key, value in overrides.items()}}
    path = write_config(folder / "streamlearn.toml", kind="embedded", partitions=1)
    config = load_config(path, overrides=settings, environ={})
    flags = itertools.chain.from_iterable(("--set", f"{key}={value}") for key, value in settings.items())
    with contextlib.closing(open_log(config)) as log:
        make_topics(log, config)
        sender = Sender(config, log)
        sender.send(1_000)
        with running("learn", "--config", path, "--set", WIDTHS, *flags, output=folder / "learner.log") as process:
            deadline = time.monotonic() + 400.0
            while heartbeat(config.state.dir).get("step", 0) < 1:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError((folder / "learner.log").read_text()[-2000:])
                time.sleep(0.1)
            yield config, sender, process.pid


def speed(folder: Path, seconds: float) -> float:
    """Samples per second learned from a full log."""
    with learner(folder) as (config, sender, _):
        began, learned = time.monotonic(), 0
        while (spent := time.monotonic() - began) < seconds:
            status = heartbeat(config.state.dir)
            if status["lag_records"] < 5_000:
                sender.send(1_000)
            if not learned:
                began, learned = (
                    status["time_s"] - time.time() + time.monotonic(),
                    status["accounts"]["samples_learned"],
                )
            time.sleep(0.05)
        status = heartbeat(config.state.dir)
        spent = status["time_s"] - time.time() + time.monotonic() - began
        return float((status["accounts"]["samples_learned"] - learned) / spent)


def overload(folder: Path, policy: str, bound: int, rate: float, seconds: float) -> Run:
    """Send at `rate` for `seconds` and measure; with `thin`, wait for the last label at the end."""
    looks: list[Look] = []
    settings = {"log__shed_above_records": bound} if policy == "thin" else {}
    with learner(folder, **settings) as (config, sender, pid):
        began, first, told = time.monotonic(), sender.samples, 0.0
        while (spent := time.monotonic() - began) < seconds:
            sender.send(int(rate / APPENDS_PER_S))
            looks.append(Look(spent, heartbeat(config.state.dir)["lag_records"], *memory_mb(pid)))
            if spent - told >= seconds / 6:
                told = spent
                tell(f"{policy}, {spent:.0f} s: {looks[-1].lag} samples wait, RSS {looks[-1].rss_mb:.0f} MB")
            time.sleep(max(0.0, began + (sender.samples - first) / rate - time.monotonic()))
        deadline = time.monotonic() + 60.0
        while policy == "thin" and time.monotonic() < deadline:
            if heartbeat(config.state.dir)["ledger"]["trained"] >= sender.labels:
                break
            time.sleep(0.2)
    return Run(looks, sender.samples - first, sender.labels, spent, heartbeat(config.state.dir))


def growth(looks: list[Look], kind: str) -> float:
    """Slope after the first third, times the remaining time."""
    after = looks[len(looks) // 3 :]
    at_s, values = [look.at_s for look in after], [getattr(look, kind) for look in after]
    return float(np.polyfit(at_s, values, 1)[0] * (at_s[-1] - at_s[0]))


def main() -> None:
    """Print lag and memory of each policy."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="twenty seconds per policy")
    parser.add_argument("--seconds", type=float, default=180.0, help="length of the stream per policy")
    parser.add_argument("--policy", choices=("keep", "thin"), action="append", help="default: both")
    options = parser.parse_args()
    quick, seconds = options.quick, 20.0 if options.quick else options.seconds
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        own = speed(Path(name) / "speed", 10.0 if quick else 30.0)
        tell(f"the learner's own speed: {own:.0f} samples/s")
        bound = round(THIN_ABOVE_S * own)
        for policy in options.policy or ("keep", "thin"):
            run = overload(Path(name) / policy, policy, bound, TIMES * own, seconds)
            accounts, after = run.status["accounts"], run.looks[len(run.looks) // 3 :]
            found |= {
                f"{policy}_stream_over_learner": round(run.sent / run.seconds / own, 2),
                f"{policy}_lag_end": run.looks[-1].lag,
                f"{policy}_lag_max_over_bound": round(max(look.lag for look in after) / bound, 2),
                f"{policy}_rss_growth_mb": round(growth(run.looks, "rss_mb"), 1),
                f"{policy}_anonymous_growth_mb": round(growth(run.looks, "anonymous_mb"), 1),
                f"{policy}_thinned_share": round(accounts["samples_thinned"] / max(1, accounts["samples_read"]), 4),
                f"{policy}_learned_over_own_speed": round(accounts["samples_learned"] / run.seconds / own, 2),
            }
            if policy == "thin":
                found["thin_labels_not_learned"] = run.labels_sent - run.status["ledger"]["trained"]
    figures(seconds=seconds, learner_samples_per_s=round(own), shed_above_records=bound, **found)


if __name__ == "__main__":
    main()
