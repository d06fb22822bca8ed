"""Measures `Learner.learn` relative to the bare step: student forward and backward, teacher forward.

Also measured: the cost of the label-only twin, as predict and learn with it over the same without it; the cost of
contrast, in the method that the default recipe has for such rows; for images the
step in bfloat16 over that in float32, where the processor has instructions for it; and the step of the network `table`
over that of an mlp with the same hidden layers on the same rows. Ratios compare medians of alternating rounds on
tensors in memory.

Run: python benchmarks/step.py [--quick] [--model columns|convnet|mlp|table] [--threads N]. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from streamlearn.learn.learner import Learner
from streamlearn.learn.settings import LearnConfig
from streamlearn.models.build import ModelSpec, build
from streamlearn.records import Array, Column, MicroBatch

FRESH, LABELLED, CLASSES = 64, 32, 10
COLUMNS = (
    *(Column(f"number {n}", "number") for n in range(6)),
    *(Column(f"category {buckets}", "category", buckets, 8) for buckets in (8192, 256, 32)),
    *(Column(f"flag {n}", "boolean") for n in range(2)),
    Column("time", "timestamp", 2),
)
WIDTH = sum(column.width for column in COLUMNS)
SPECS = {
    "columns": ModelSpec("table", {}, (WIDTH,), CLASSES, normalise=True, scale=1.0, columns=COLUMNS),
    "mlp": ModelSpec("mlp", {"hidden": [256, 256]}, (784,), CLASSES, normalise=True, scale=1.0),
    "table": ModelSpec("mlp", {}, (16,), CLASSES, normalise=True, scale=1.0),
    "convnet": ModelSpec("convnet", {}, (1, 28, 28), CLASSES, normalise=False, scale=1.0),
}


def main() -> None:
    """Measure each model and print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few seconds; the figures are rough")
    parser.add_argument("--model", choices=sorted(SPECS), action="append", help="all, if left out")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    report: dict[str, object] = {"threads": options.threads, "torch": torch.__version__}
    rounds = 5 if options.quick else 30
    for name in options.model or sorted(SPECS):
        report[name] = measure(SPECS[name], rounds=rounds)
        if SPECS[name].columns:
            report["columns_over_mlp"] = over_mlp(SPECS[name], rounds=rounds)
    print(json.dumps(report))


def measure(spec: ModelSpec, *, rounds: int) -> dict[str, float]:
    """Median seconds a step of each side, `learn_over_bare`, and what a twin adds to a step of the loop."""
    sides = [bare_step(spec), learner_step(spec), loop_step(spec, twin=False), loop_step(spec, twin=True)]
    low, _ = made(spec, twin=False, precision="auto")
    has_low = low.describe()["precision"] == "bfloat16"
    sides += [contrast_step(spec, weight) for weight in (0.0, 0.3)]
    sides += [learner_step(spec, precision="bfloat16")] if has_low else []
    steps = 2 * max(1, round(0.15 / seconds(sides[0], steps=3)))
    for side in sides:
        seconds(side, steps=3)
    found = [[seconds(side, steps=steps) for side in sides] for _ in range(rounds)]
    bare_s, learn_s, without_s, twin_s, plain_s, contrast_s, *low_s = (
        statistics.median(side) for side in zip(*found, strict=True)
    )
    figures = {
        "bare_s": bare_s,
        "learn_s": learn_s,
        "learn_over_bare": learn_s / bare_s,
        "twin_share": twin_s / without_s - 1.0,
        "contrast_share": contrast_s / plain_s - 1.0,
    }
    return figures | ({"bfloat16_over_float32": low_s[0] / learn_s} if has_low else {})


def over_mlp(spec: ModelSpec, *, rounds: int) -> float:
    """`learn` with columns over `learn` of an mlp that takes all places of the same rows as numbers."""
    mlp = ModelSpec("mlp", {}, spec.shape, CLASSES, normalise=True, scale=1.0)
    sides = (learner_step(spec), learner_step(mlp))
    steps = 2 * max(1, round(0.15 / seconds(sides[1], steps=3)))
    found = [[seconds(side, steps=steps) for side in sides] for _ in range(rounds)]
    columns_s, mlp_s = (statistics.median(side) for side in zip(*found, strict=True))
    return columns_s / mlp_s


def seconds(step: Callable[[], None], *, steps: int) -> float:
    """Mean seconds over `steps` steps."""
    started_s = time.perf_counter()
    for _ in range(steps):
        step()
    return (time.perf_counter() - started_s) / steps


def bare_step(spec: ModelSpec) -> Callable[[], None]:
    """Only the three passes of Mean Teacher, on prepared rows."""
    student, teacher = build(spec, seed=0).net.train(), build(spec, seed=1).net.eval()
    x_B: Tensor = torch.randn((FRESH + LABELLED, *spec.shape))
    labels_B = torch.randint(CLASSES, (FRESH + LABELLED,))
    if x_B.dim() == 4:
        x_B = x_B.contiguous(memory_format=torch.channels_last)

    def step() -> None:
        for parameter in student.parameters():
            parameter.grad = None
        loss = nn.functional.cross_entropy(student(x_B), labels_B)
        with torch.no_grad():
            teacher(x_B)
        loss.backward()

    return step


def learner_step(spec: ModelSpec, precision: str = "float32") -> Callable[[], None]:
    """`learn` on one micro-batch in memory, noise and all, without a twin."""
    learner, batch = made(spec, twin=False, precision=precision)
    return lambda: learner.learn(batch)


def contrast_step(spec: ModelSpec, weight: float) -> Callable[[], None]:
    """`learn` with the method of the default recipe."""
    method = "ict" if len(spec.shape) == 3 else "mean_teacher"
    learner, batch = made(spec, twin=False, method=method, contrast_weight=weight)
    return lambda: learner.learn(batch)


def loop_step(spec: ModelSpec, *, twin: bool) -> Callable[[], None]:
    """What the loop does with both networks in each step: predict the fresh samples, then learn."""
    learner, batch = made(spec, twin=twin)

    def step() -> None:
        learner.predict(batch.fresh_x)
        learner.learn(batch)

    return step


def made(
    spec: ModelSpec,
    *,
    twin: bool,
    precision: str = "float32",
    device: str = "cpu",
    method: Literal["mean_teacher", "ict"] = "mean_teacher",
    contrast_weight: float = 0.0,
) -> tuple[Learner, MicroBatch]:
    """A learner, and a micro-batch for it."""
    images = len(spec.shape) == 3
    config = LearnConfig(
        recipe="none",
        method=method,
        options={"consistency_weight": 10.0, "contrast_weight": contrast_weight},
        noise="image" if images else "table",
        noise_options={"flip": True} if images else {},
        device=device,
        precision=precision,
        twin="measure" if twin else "off",
    )
    learner = Learner(spec, config)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((FRESH + LABELLED, *spec.shape), dtype=np.float32)
    if spec.shape == (WIDTH,):
        x = rows_of_columns(len(x), rng)
    batch = MicroBatch(
        fresh_x=x[:FRESH],
        fresh_count=FRESH,
        labelled_x=x[FRESH:],
        labelled_y=rng.integers(CLASSES, size=LABELLED),
        labelled_count=LABELLED,
    )
    return learner, batch


def rows_of_columns(count: int, rng: np.random.Generator) -> Array:
    """(count, W) with a tenth of the numbers and categories missing."""
    parts = []
    for column in COLUMNS:
        present = rng.random((count, 1)) >= 0.1
        if column.kind == "number":
            parts += [rng.normal(size=(count, 1)) * present, present]
        elif column.kind == "category":
            parts.append(rng.integers(1, column.size + 1, (count, 1)) * present)
        else:
            parts.append(rng.choice([-1.0, 1.0], (count, column.width)))
    return np.hstack(parts).astype(np.float32)


if __name__ == "__main__":
    main()
