"""Compares the norm layers of the small convnet on images in random order and sorted by class.

30,000 images of Fashion-MNIST, pooled to 14 x 14, or as many draws of the digits; 1 % get a label, 500 samples later.
`shuffled` is a random order; `rounds` is sorted by class six times, so that nearly every micro-batch is of one class.
The guard is off. Scores are accuracies on held-out images: of the teacher that a server loads at the end, and of the
twin, which learned the same labelled rows only. Also measured: the time of `Learner.learn` on 28 x 28 images, relative
to batch normalisation, as medians of alternating rounds.

Run: python benchmarks/norms.py [--quick] [--seeds N] [--jobs N] [--norm NAME ...] [--stream NAME ...] [--data NAME]
The last line is JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from offline import Data, Event, Floats, Learning, accuracy, in_pool, published, read, run
from rich.console import Console
from rich.table import Table
from step import CLASSES, learner_step, seconds

from streamlearn.lab.datasets import load
from streamlearn.loop.loop import TrainingLoop
from streamlearn.loop.report import StepReport
from streamlearn.models.build import ModelSpec
from streamlearn.records import Array

LABEL_SHARE, DELAY = 0.01, 500
SAMPLES, TEST = 30_000, 2_000
ROUNDS = {"shuffled": 0, "rounds": 6}
NORMS = ("batch", "robust_batch", "group", "layer")


@dataclass(frozen=True)
class Case:
    """One run."""

    data: str
    norm: str
    stream: str
    seed: int
    samples: int


@dataclass(frozen=True)
class Result:
    """Accuracies on held-out images."""

    case: Case
    served: float
    twin: float


def images(case: Case) -> Data:
    """Samples in learning order, drawn by the seed, with pixels from 0 to 1."""
    rng = np.random.default_rng((case.seed, 7))
    if case.data == "digits":
        table = read("digits", case.seed)
        rows = rng.choice(len(table.y), case.samples)
        x, test_x = (part.reshape(-1, 1, 8, 8) for part in (table.x[rows], table.test_x))
        data = replace(table, x=x, y=table.y[rows], test_x=test_x)
    else:
        loaded = load("fashion-mnist")
        assert loaded.test_x is not None
        assert loaded.test_y is not None
        rows = rng.choice(len(loaded.x), case.samples, replace=False)
        test = rng.choice(len(loaded.test_x), TEST, replace=False)
        x, test_x = pooled(loaded.x[rows]), pooled(loaded.test_x[test])
        data = Data("fashion-mnist", x, loaded.y[rows], test_x, loaded.test_y[test], 10, 1 / 255, normalise=False)
    if not ROUNDS[case.stream]:
        return data
    turn = np.arange(case.samples) * ROUNDS[case.stream] // case.samples
    order = np.lexsort((data.y, turn))
    return replace(data, x=data.x[order], y=data.y[order])


def pooled(pixels: Array) -> Floats:
    """(n, 1, 14, 14) means of 2 x 2 of (n, 28, 28) or (n, 1, 28, 28)."""
    means: Floats = pixels.reshape(-1, 1, 14, 2, 14, 2).mean(axis=(3, 5), dtype=np.float32)
    return means


def events(data: Data, case: Case) -> Iterator[Event]:
    """All samples, some with a label."""
    rng = np.random.default_rng((case.seed, 11))
    for x, true in zip(data.x, data.y.tolist(), strict=True):
        yield Event(x, true, true if rng.random() < LABEL_SHARE else None, DELAY)


def play(case: Case) -> Result:
    """One learner on one stream."""
    data = images(case)
    settings: dict[str, dict[str, Any]] = {
        "model": {"factory": "convnet", "options": {"norm": case.norm}, "normalise": False},
        "guard": {"on": False},
        "learn": {"noise_options": {"flip": case.data != "digits"}},
    }

    def nothing(_loop: TrainingLoop, _report: StepReport, _folder: Path) -> None:
        """Measure nothing during the run."""

    with run(Learning(data, case.seed, settings=settings), events(data, case), nothing) as (loop, folder):
        served, twin_B = published(folder, data.schema), loop.learner.classify(data.test_x).twin_B
        assert served is not None
        assert twin_B is not None
        answered = served.probabilities(data.test_x).argmax(axis=1)
        return Result(case, accuracy(answered, data.test_y), accuracy(twin_B, data.test_y))


def step_over_batch(rounds: int) -> dict[str, float]:
    """Time of a step with each norm relative to batch normalisation."""
    specs = [ModelSpec("convnet", {"norm": norm}, (1, 28, 28), CLASSES, normalise=False, scale=1.0) for norm in NORMS]
    sides = [learner_step(spec) for spec in specs]
    for side in sides:
        seconds(side, steps=2)
    found = np.array([[seconds(side, steps=3) for side in sides] for _ in range(rounds)])
    medians = np.median(found / found[:, :1], axis=0)
    return {norm: round(float(median), 3) for norm, median in zip(NORMS, medians, strict=True)}


def main() -> None:
    """Print a table and a JSON line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one seed, a third of the samples")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="processes with one thread each")
    parser.add_argument("--data", choices=("fashion-mnist", "digits"), default="fashion-mnist")
    parser.add_argument("--norm", choices=NORMS, action="append", help="default: all")
    parser.add_argument("--stream", choices=sorted(ROUNDS), action="append", help="default: all")
    options = parser.parse_args()
    seeds, samples = (1, SAMPLES // 3) if options.quick else (options.seeds, SAMPLES)
    kinds, streams = options.norm or NORMS, options.stream or list(ROUNDS)
    chosen = [
        Case(options.data, norm, stream, seed, samples)
        for seed, stream, norm in itertools.product(range(seeds), streams, kinds)
    ]

    grouped: dict[tuple[str, str], list[Result]] = {}
    for result in in_pool(play, chosen, options.jobs):
        grouped.setdefault((result.case.stream, result.case.norm), []).append(result)
    shown, figures = Table("stream", "norm", "served", "twin", "seeds"), {}
    for (stream, norm), results in sorted(grouped.items()):
        served = [result.served for result in results]
        twin = float(np.mean([result.twin for result in results]))
        figures[f"{stream}/{norm}"] = round(float(np.mean(served)), 4)
        shown.add_row(stream, norm, f"{np.mean(served):.3f}", f"{twin:.3f}", " ".join(f"{one:.3f}" for one in served))
    Console(width=120).print(shown)
    ratios = step_over_batch(rounds=5 if options.quick else 30)
    print(json.dumps({"data": options.data, "samples": samples, "seeds": seeds, **figures, "step_over_batch": ratios}))


if __name__ == "__main__":
    main()
