"""Answers on uneven streams: probabilities corrected for the class prior against those of the network alone.

`streamlearn evaluate` on streams in which 10 % of the samples get a label, 500 samples later on average. Samples are
drawn with replacement and get noise, so that no two are equal:

    digits          ten classes alike, as a table and as images
    digits-tail     ten classes, each .6 times as frequent as the one before
    digits-rare     is it an 8? 5 % are
    shuttle-rare    is it an anomaly? 5 % are
    shuttle-even    the same, half of them
    overlap-rare    two overlapping normal distributions of 10 features, as fraud may look; 5 % are of the second
    overlap-even    the same, half of them

Each stream runs with `learn.correct_prior` on and off, from the same seed; what is learned is the same. Scores are of
the last half of the samples, before they are learned.

Run: python benchmarks/imbalance.py [--quick] [--seeds N] [--jobs N] [--stream NAME ...]
The last line is JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import structlog
from offline import in_pool
from rich.console import Console
from rich.table import Table

from streamlearn.config import load_config
from streamlearn.lab.datasets import load
from streamlearn.lab.evaluate import EvaluationPlan, evaluate

SAMPLES = 12_000
STREAMS = (
    "digits",
    "digits-images",
    "digits-tail",
    "digits-rare",
    "shuttle-rare",
    "shuttle-even",
    "overlap-rare",
    "overlap-even",
)
SCORES = ("ece", "log_loss", "accuracy", "balanced_accuracy", "pr_auc", "pr_auc_rarest")


@dataclass(frozen=True)
class Case:
    """One run."""

    stream: str
    seed: int
    corrected: bool
    samples: int


@dataclass(frozen=True)
class Result:
    """Scores by name."""

    case: Case
    scores: Mapping[str, float]


def draw(stream: str, seed: int, count: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Samples and their classes."""
    rng = np.random.default_rng((seed, 13))
    name, _, kind = stream.partition("-")
    if name == "overlap":
        y = (rng.random(count) < (0.05 if kind == "rare" else 0.5)).astype(np.int64)
        return (rng.normal(size=(count, 10)) + 0.4 * y[:, None]).astype(np.float32), y
    loaded = load(name)
    x, y = np.asarray(loaded.x, np.float32), loaded.y
    if name == "digits":
        x = x.reshape(len(x), 1, 8, 8) if kind == "images" else x.reshape(len(x), -1)
        y = (y == 8).astype(np.int64) if kind == "rare" else y
    classes = int(y.max()) + 1
    shares = {"tail": 0.6 ** np.arange(classes), "rare": np.array([0.95, 0.05])}.get(kind, np.ones(classes))
    drawn_N = rng.choice(classes, count, p=shares / shares.sum())
    rows_N = np.zeros(count, np.int64)
    for c in range(classes):
        here_N = drawn_N == c
        rows_N[here_N] = rng.choice(np.flatnonzero(y == c), int(here_N.sum()))
    noise = 0.3 * x.std(axis=0, keepdims=True).astype(np.float32)
    return x[rows_N] + noise * rng.normal(size=(count, *x.shape[1:])).astype(np.float32), drawn_N


def play(case: Case) -> Result:
    """One evaluation."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    x, y = draw(case.stream, case.seed, case.samples)
    with tempfile.TemporaryDirectory(prefix="bench-imbalance-") as folder:
        path = Path(folder) / f"{case.stream}.npz"
        np.savez(path, x=x, y=y)
        config = load_config(environ={}, overrides={"learn.correct_prior": case.corrected, "learn.threads": 1})
        plan = EvaluationPlan(
            dataset=str(path),
            label_probability=0.1,
            delay="geometric:500",
            window=case.samples // 2,
            order="file",
            seed=case.seed,
        )
        oracle = evaluate(config, plan, threading.Event()).scores.oracle
    assert oracle is not None
    now = oracle.windowed
    rarest = min((found for found in now.by_class if found.count), key=lambda found: found.count)
    found = {name: getattr(now, name) for name in SCORES if name not in ("accuracy", "pr_auc_rarest")}
    found |= {"accuracy": now.accuracy["teacher"], "pr_auc_rarest": rarest.average_precision}
    return Result(case, {name: float(found[name]) for name in SCORES})


def main() -> None:
    """Print a table and a JSON line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one seed, two streams, a third of the samples")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=2, help="processes with one thread each")
    parser.add_argument("--stream", choices=STREAMS, action="append", help="default: all")
    options = parser.parse_args()
    streams = options.stream or (("digits", "overlap-rare") if options.quick else STREAMS)
    seeds, samples = (1, SAMPLES // 3) if options.quick else (options.seeds, SAMPLES)
    cases = [Case(*each, samples) for each in itertools.product(streams, range(seeds), (False, True))]
    grouped: dict[tuple[str, bool], list[Result]] = {}
    for result in in_pool(play, cases, options.jobs):
        grouped.setdefault((result.case.stream, result.case.corrected), []).append(result)

    shown = Table("stream", "score", "network alone", "corrected", "difference", "better, of seeds")
    figures: dict[str, float] = {}
    for stream, score in itertools.product(streams, SCORES):
        pair = [sorted(grouped[stream, on], key=lambda result: result.case.seed) for on in (False, True)]
        before, after = (np.array([result.scores[score] for result in side]) for side in pair)
        gain = (before - after) if score in ("ece", "log_loss") else (after - before)
        row = (f"{before.mean():.4f}", f"{after.mean():.4f}", f"{(after - before).mean():+.4f}")
        shown.add_row(stream, score, *row, f"{int((gain > 0).sum())} of {len(gain)}")
        figures[f"{stream}/{score}/before"] = round(float(before.mean()), 4)
        figures[f"{stream}/{score}/after"] = round(float(after.mean()), 4)
    Console(width=120).print(shown)
    print(json.dumps({"samples": samples, "seeds": seeds, **figures}))


if __name__ == "__main__":
    main()
