"""Active learning against as many random labels: accuracy of the teacher at the end of a stream.

A simulated stream in micro-batches, one pass. After a few random labels, each side asks for some samples every few
steps, and their labels come some steps later. One side asks `RequestQueue` for what `RequestWriter` offered. The other
draws at random from all samples without a label. Everything else is equal: samples and their order, initial weights,
noise, number of labels, and their delay. Scores are of held-out samples.

Run: python benchmarks/label_requests.py [--quick] [--seeds N] [--first-seed N] [--stream NAME ...]. The last line is
JSON. The first seed is 200, since the constants of `streamlearn/ledger/request_writer.py` were chosen on seeds 100 to
109, and the share of random draws after a look at seeds 0 to 9.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from common import tell

from streamlearn.errors import ConfigError
from streamlearn.lab.datasets import Classes, load
from streamlearn.learn.learner import Learner
from streamlearn.learn.settings import LearnConfig
from streamlearn.ledger.replay_buffer import ReplayBuffer
from streamlearn.ledger.request_queue import RequestQueue
from streamlearn.ledger.request_writer import RequestWriter
from streamlearn.models.build import ModelSpec
from streamlearn.records import UNLABELLED, Example, MicroBatch, Position, Schema

LABELLED, DELAY_STEPS, ASK_EVERY_STEPS, POOL_ROWS, MOST_TEST = 32, 5, 10, 1000, 5000

Floats = np.ndarray[tuple[int, int], np.dtype[np.float32]]


@dataclass(frozen=True)
class Plan:
    """How one data set is streamed, and how many labels each side gets."""

    samples: int
    fresh: int
    warm: int
    """Random labels before the first request, the same for both sides."""
    ask: int
    """Labels requested at once."""
    scale: float = 1.0


PLANS = {
    "digits": Plan(samples=1200, fresh=4, warm=20, ask=4, scale=1 / 16),
    "segments": Plan(samples=1500, fresh=4, warm=15, ask=4),
    "moons": Plan(samples=6000, fresh=16, warm=4, ask=1),
    "shuttle": Plan(samples=6000, fresh=16, warm=4, ask=1),
    "fashion-mnist": Plan(samples=6000, fresh=16, warm=20, ask=6, scale=1 / 255),
}
NEEDS_RIVER = {"segments", "shuttle"}


@dataclass(frozen=True)
class Stream:
    """Samples in stream order, and a held-out part."""

    x: Floats
    y: Classes
    test_x: Floats
    test_y: Classes
    classes: int


def read(name: str) -> tuple[Floats, Classes]:
    """All samples of a data set, flat.

    Raises:
        ConfigError: it is not installed.
    """
    if name in NEEDS_RIVER and find_spec("river") is None:
        raise ConfigError(f"{name} is in river's wheel: install river")
    if name == "segments":
        from river.datasets import ImageSegments  # noqa: PLC0415

        rows = list(ImageSegments())
        names = sorted({label for _, label in rows})
        x, y = np.array([list(x.values()) for x, _ in rows]), np.array([names.index(label) for _, label in rows])
    else:
        data = load(name)
        x, y = data.x, data.y
        if data.test_x is not None and data.test_y is not None:
            x, y = np.concatenate([x, data.test_x]), np.concatenate([y, data.test_y])
    return x.reshape(len(x), -1).astype(np.float32) * np.float32(PLANS[name].scale), y.astype(np.int64)


def stream(x: Floats, y: Classes, samples: int, seed: int) -> Stream:
    """A random order and a random held-out part, at most a third; both by the seed."""
    order = np.random.default_rng(1000 + seed).permutation(len(x))
    test_count = min(MOST_TEST, len(x) // 3)
    test, train = order[:test_count], order[test_count:][:samples]
    return Stream(x[train], y[train], x[test], y[test], int(y.max()) + 1)


def learner_of(data: Stream, seed: int) -> Learner:
    """A small network with the daemon's method. Ramp-up and EMA horizon are shorter, since the stream is short."""
    spec = ModelSpec("mlp", {"hidden": [64, 64]}, data.x.shape[1:], data.classes, normalise=True, scale=1.0)
    config = LearnConfig(
        recipe="none",
        method="mean_teacher",
        options={"rampup_steps": 100},
        ema_decay=0.99,
        noise="table",
        twin="off",
        seed=seed,
        device="cpu",
        threads=1,
    )
    return Learner(spec, config)


class AtRandom:
    """Draws from all samples that have no label and were not requested."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._waiting: dict[int, None] = {}

    def offer(self, rows: Sequence[int], _learner: Learner, _data: Stream, _now_s: float) -> None:
        """Take fresh samples, before they are learned."""
        self._waiting |= dict.fromkeys(rows)

    def labelled(self, rows: Sequence[int]) -> None:
        """Note that their labels have come."""
        for row in rows:
            self._waiting.pop(row, None)

    def take(self, n: int, _now_s: float) -> list[int]:
        """Choose samples to label."""
        taken = [int(row) for row in self._rng.choice(list(self._waiting), n, replace=False)]
        self.labelled(taken)
        return taken


class Active:
    """The product's writer and queue, with a real file between them."""

    def __init__(self, folder: Path, seed: int) -> None:
        path = folder / "label-requests.sqlite"
        self._prefix = f"{seed}-"  # the noise is a function of the id, and must differ between runs
        self._writer = RequestWriter(path, POOL_ROWS)
        self._queue = RequestQueue(path, per_hour=1_000_000, again_after_s=1e9)

    def offer(self, rows: Sequence[int], learner: Learner, data: Stream, now_s: float) -> None:
        """See `AtRandom.offer`."""
        answers = learner.predict(data.x[rows])
        positions = [Position("samples", 0, row) for row in rows]
        ids = [f"{self._prefix}{row}" for row in rows]
        self._writer.offer(ids, positions, answers.teacher_probs_BC, answers.student_probs_BC, now_s)

    def labelled(self, rows: Sequence[int]) -> None:
        """See `AtRandom.labelled`."""
        self._writer.labelled(f"{self._prefix}{row}" for row in rows)

    def take(self, n: int, now_s: float) -> list[int]:
        """See `AtRandom.take`."""
        self._writer.flush()
        return [int(request.sample_id.removeprefix(self._prefix)) for request in self._queue.take(n, now_s).items]


Asker = AtRandom | Active


class Result(NamedTuple):
    """Accuracy of the teacher on the held-out samples, at the end of one run."""

    accuracy: float
    balanced_accuracy: float
    """Mean recall of the classes."""
    labels: int


def run(data: Stream, plan: Plan, asker: Asker, seed: int) -> Result:
    """One pass over one stream."""
    learner = learner_of(data, seed)
    schema = Schema(data.x.shape[1:], np.dtype(np.float32), tuple(map(str, range(data.classes))))
    buffer = ReplayBuffer(POOL_ROWS, schema, seed)
    due: dict[int, list[int]] = defaultdict(list)
    due[0] = np.random.default_rng(seed).permutation(min(400, len(data.x)))[: plan.warm].tolist()
    warm = set(due[0])
    for step in range(len(data.x) // plan.fresh):
        rows = range(step * plan.fresh, (step + 1) * plan.fresh)
        asker.offer([row for row in rows if row not in warm], learner, data, float(step))
        come = due.pop(step, [])
        asker.labelled(come)
        for row in come:
            buffer.add(Example(str(row), data.x[row], int(data.y[row])))
        learner.learn(micro_batch(data.x[rows.start : rows.stop], buffer, schema, step))
        if step > 0 and step % ASK_EVERY_STEPS == 0:
            due[step + DELAY_STEPS] += asker.take(plan.ask, float(step))
    right = learner.predict(data.test_x).teacher_probs_BC.argmax(axis=1) == data.test_y
    recalls = [right[data.test_y == class_index].mean() for class_index in np.unique(data.test_y)]
    return Result(float(right.mean()), float(np.mean(recalls)), len(buffer))


def micro_batch(fresh_x: Floats, buffer: ReplayBuffer, schema: Schema, step: int) -> MicroBatch:
    """A micro-batch as the loop forms it."""
    labelled_x, labelled_y = np.zeros((LABELLED, *schema.shape), np.float32), np.full(LABELLED, UNLABELLED, np.int64)
    trained_ids = buffer.draw_into(labelled_x, labelled_y, step)
    return MicroBatch(fresh_x, len(fresh_x), labelled_x, labelled_y, LABELLED, trained_ids)


def compare(name: str, seeds: Sequence[int]) -> Iterator[tuple[Result, Result]]:
    """Active and random, for each seed."""
    x, y = read(name)
    for seed in seeds:
        data = stream(x, y, PLANS[name].samples, seed)
        with tempfile.TemporaryDirectory() as folder:
            active = run(data, PLANS[name], Active(Path(folder), seed), seed)
        random = run(data, PLANS[name], AtRandom(seed), seed)
        assert active.labels == random.labels, (active, random)
        yield active, random


def summary(results: Sequence[tuple[Result, Result]]) -> dict[str, float]:
    """Means over the seeds. Gains are active minus random, in points."""
    active, random = (np.array(side) for side in zip(*results, strict=True))
    gains, balanced_gains, _ = 100.0 * (active - random).T
    return {
        "labels": results[0][0].labels,
        "active": round(float(active[:, 0].mean()), 4),
        "random": round(float(random[:, 0].mean()), 4),
        "gain_points": round(float(gains.mean()), 2),
        "error_points": round(float(gains.std(ddof=1) / len(gains) ** 0.5), 2) if len(gains) > 1 else 0.0,
        "balanced_gain_points": round(float(balanced_gains.mean()), 2),
        "wins": int((gains > 0).sum()),
        "runs": len(gains),
    }


def main() -> None:
    """Print a line for each stream, and one JSON line for all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two seeds of digits and moons")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--first-seed", type=int, default=200)
    parser.add_argument("--stream", choices=sorted(PLANS), action="append", help="all that are installed, if left out")
    options = parser.parse_args()
    torch.set_num_threads(1)
    names = options.stream or (["digits", "moons"] if options.quick else list(PLANS))
    seeds = range(options.first_seed, options.first_seed + (2 if options.quick else options.seeds))

    everything: list[tuple[Result, Result]] = []
    streams: dict[str, dict[str, float]] = {}
    for name in names:
        try:
            results = list(compare(name, seeds))
        except ConfigError as error:
            tell(f"left out: {error}")
            continue
        everything += results
        streams[name] = summary(results)
        print(name, " ".join(f"{key}={value}" for key, value in streams[name].items()), flush=True)
    total = summary(everything)
    total.pop("labels")
    print(json.dumps(total | {"streams": streams}))


if __name__ == "__main__":
    main()
