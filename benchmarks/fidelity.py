"""Compares the methods with their papers: few labels, epochs over a fixed set, test accuracy (`evaluate --offline`).

Fashion-MNIST, a 13-layer network scaled down, Adam, input noise, translation and flips, dropout, ramp-up over the first
27 % of the steps, ramp-down over the last quarter, and consistency against the mean cross-entropy of labelled rows as
100 to 1 (30 to 1 for Temporal Ensembling): the settings of the papers, in far fewer steps. The teacher answers in train
mode, as in the papers; `--methods mean_teacher_eval` is the default of this project. `--weight .1` scales the weights.

Order in the papers: supervised < Pi, Temporal Ensembling < Mean Teacher. `supervised` is scored without an average, as
in Laine and Aila; its average is reported next to it.

Run: python benchmarks/fidelity.py [--quick] [--labels N ...] [--seeds N] [--limit N] [--epochs N] [--width X]
       [--weight X] [--methods NAME ...]
Each run is one line of benchmarks/results/fidelity.jsonl; existing runs are not repeated. The last line is JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import os
import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import structlog
from learning_report import mean
from offline import in_pool
from rich.console import Console
from rich.table import Table

from streamlearn.config import load_config
from streamlearn.lab.offline import OfflinePlan, evaluate_offline

RESULTS = Path(__file__).parent / "results" / "fidelity.jsonl"
METHODS: dict[str, tuple[float, dict[str, Any]]] = {
    "supervised": (0.0, {"learn.method": "supervised"}),
    "pi": (100.0, {"learn.method": "pi"}),
    "temporal_ensembling": (30.0, {"learn.method": "temporal_ensembling"}),
    "mean_teacher": (100.0, {"learn.method": "mean_teacher", "learn.options.teacher_mode": "train"}),
    "mean_teacher_eval": (100.0, {"learn.method": "mean_teacher"}),
}
"""By method: weight of consistency against the mean cross-entropy in the paper, and settings."""
PAPERS = [name for name in METHODS if name != "mean_teacher_eval"]
FRESH, LABELLED = 64, 32
RAMPUP, RAMPDOWN = 0.27, 0.25


@dataclass(frozen=True)
class Case:
    """One run."""

    method: str
    labels: int
    seed: int
    limit: int
    epochs: int
    width: float
    weight: float = 1.0
    """Consistency weight as a share of the paper's."""


def play(case: Case) -> dict[str, Any]:
    """Learn and score the test images."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    steps = case.epochs * -(-case.limit // FRESH)
    weight, settings = METHODS[case.method]
    overrides = {
        **settings,
        "model.factory": "conv13",
        "model.normalise": False,
        "model.options": {"width": case.width},
        "learn.recipe": "none",
        "learn.ema_decay": 0.99,
        "learn.weight_decay": 0.0,
        # The papers scale inputs to unit variance; pixels here have a standard deviation of .35.
        "learn.noise": "image",
        "learn.noise_options": {"pixel_noise_std": 0.05, "flip": True},
        "learn.threads": 1,
        "learn.device": "cpu",
        "batch.fresh": FRESH,
        "batch.labelled": LABELLED,
        "learn.twin": "off",
    }
    if weight:
        # Classification is summed over labelled rows and divided by all rows.
        overrides["learn.options.consistency_weight"] = case.weight * weight * LABELLED / (FRESH + LABELLED)
        overrides["learn.options.rampup_steps"] = round(RAMPUP * steps)
    plan = OfflinePlan(
        dataset="fashion-mnist",
        labels=case.labels,
        epochs=case.epochs,
        limit=case.limit,
        points=1,
        rampdown=RAMPDOWN,
        seed=case.seed,
    )
    began_s = time.process_time()
    found = evaluate_offline(load_config(None, overrides=overrides, environ={}), plan, threading.Event())
    return {**asdict(case), **asdict(found.test), "cpu_s": round(time.process_time() - began_s, 1)}


def make(cases: Sequence[Case], path: Path | None, jobs: int) -> list[dict[str, Any]]:
    """Results of all cases; existing ones are read from the file."""
    there = [json.loads(text) for text in path.read_text().splitlines()] if path and path.exists() else []
    keys = {json.dumps(asdict(case), sort_keys=True): case for case in cases}
    own = set(Case.__dataclass_fields__)
    by_key = {json.dumps({k: line[k] for k in own}, sort_keys=True): line for line in there}
    lines = [by_key[key] for key in keys if key in by_key]
    missing = [case for key, case in keys.items() if key not in by_key]
    for line in in_pool(play, missing, jobs) if missing else ():
        lines.append(line)
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a") as file:
                file.write(json.dumps(line) + "\n")
    return lines


def figures(lines: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Means over seeds by labels and method: of the served network; of the student for `supervised`."""
    found: dict[str, dict[str, float]] = {}
    for labels, method in itertools.product(sorted({line["labels"] for line in lines}), METHODS):
        of = [line for line in lines if (line["labels"], line["method"]) == (labels, method)]
        row = found.setdefault(str(labels), {})
        for name, network in ((method, "teacher"), (f"{method}, unaveraged", "student")):
            if (accuracy := mean([line[network] for line in of])) is not None:
                row[name] = round(accuracy, 4)
    return found


def main() -> None:
    """Print a table and a JSON line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one seed, few steps, nothing saved")
    parser.add_argument("--labels", type=int, nargs="+", default=[250, 500, 1000])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--limit", type=int, default=12_000, help="training images")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--width", type=float, default=0.125, help="width of the network; 1 is the paper's")
    parser.add_argument("--weight", type=float, default=1.0, help="weight of consistency; 1 is the papers'")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=PAPERS)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--nice", type=int, default=0)
    options = parser.parse_args()
    os.nice(options.nice)
    if options.quick:
        options.labels, options.seeds, options.limit, options.epochs, options.width = [250], 1, 640, 2, 0.0625
    cases = [
        # Without consistency there is nothing to weight: one line for all weights.
        Case(method, labels, seed, options.limit, options.epochs, options.width, weight)
        for seed, labels, method in itertools.product(range(options.seeds), options.labels, options.methods)
        for weight in [options.weight if METHODS[method][0] else 1.0]
    ]
    lines = make(cases, None if options.quick else RESULTS, options.jobs)
    found = figures(lines)
    shown = Table("labels", "network", "test accuracy", "seeds")
    for labels, row in found.items():
        for name, accuracy in row.items():
            method = name.partition(",")[0]
            network = "student" if name.endswith("unaveraged") else "teacher"
            of = [line[network] for line in lines if (line["labels"], line["method"]) == (int(labels), method)]
            spread = f" ± {statistics.stdev(of):.3f}" if len(of) > 1 else ""
            shown.add_row(labels, name, f"{accuracy:.4f}{spread}", str(len(of)))
    Console(width=100).print(shown)
    print(json.dumps({"fidelity": found, "runs": len(lines), "cpu_s": round(sum(line["cpu_s"] for line in lines), 1)}))


if __name__ == "__main__":
    main()
