"""Measures `Learner.learn` relative to the bare step: student forward and backward, teacher forward.

Also measured: the cost of the label-only twin, as predict and learn with it over the same without it. Ratios compare
medians of alternating rounds on tensors in memory.

Run: python benchmarks/step.py [--quick] [--model mlp|convnet|table] [--threads N]. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from streamlearn.learn.build import LearnSettings
from streamlearn.learn.learner import Learner
from streamlearn.models.build import ModelSpec, build
from streamlearn.records import MicroBatch

FRESH, LABELLED, CLASSES = 64, 32, 10
SPECS = {
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
    for name in options.model or sorted(SPECS):
        report[name] = measure(SPECS[name], rounds=5 if options.quick else 30)
    print(json.dumps(report))


def measure(spec: ModelSpec, *, rounds: int) -> dict[str, float]:
    """Median seconds per step of each side, `learn_over_bare`, and the cost of a twin at each or each second step."""
    twins = (loop_step(spec, twin_every=every) for every in (0, 1, 2))
    sides = (bare_step(spec), learner_step(spec), *twins)
    steps = 2 * max(1, round(0.15 / seconds(sides[0], steps=3)))
    for side in sides:
        seconds(side, steps=3)
    found = [[seconds(side, steps=steps) for side in sides] for _ in range(rounds)]
    bare_s, learn_s, without_s, each_s, every_second_s = (statistics.median(side) for side in zip(*found, strict=True))
    return {
        "bare_s": bare_s,
        "learn_s": learn_s,
        "learn_over_bare": learn_s / bare_s,
        "twin_share": each_s / without_s - 1.0,
        "twin_share_every_second": every_second_s / without_s - 1.0,
    }


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


def learner_step(spec: ModelSpec) -> Callable[[], None]:
    """`learn` on one micro-batch in memory, with noise, without a twin."""
    learner, batch = made(spec, twin_every=0)
    return lambda: learner.learn(batch)


def loop_step(spec: ModelSpec, *, twin_every: int) -> Callable[[], None]:
    """As the loop: predict the fresh samples, then learn."""
    learner, batch = made(spec, twin_every=twin_every)

    def step() -> None:
        learner.predict(batch.fresh_x)
        learner.learn(batch)

    return step


def made(spec: ModelSpec, *, twin_every: int) -> tuple[Learner, MicroBatch]:
    """A learner and a micro-batch."""
    settings = LearnSettings(
        method="mean_teacher", consistency="mse", consistency_weight=10.0, rampup_steps=500, ema_decay=0.995,
        optimizer="adamw", learning_rate=3e-3, warmup_steps=0, momentum=0.9, nesterov=True, weight_decay=1e-4,
        noise="auto", noise_std=0.15, pixel_noise_std=0.0, shift_pixels=2, flip=True, seed=0, device="cpu", threads=0,
        twin_every=twin_every,
    )  # fmt: skip
    learner = Learner(spec, settings)
    rng = np.random.default_rng(0)
    batch = MicroBatch(
        fresh_x=rng.standard_normal((FRESH, *spec.shape), dtype=np.float32),
        fresh_count=FRESH,
        labelled_x=rng.standard_normal((LABELLED, *spec.shape), dtype=np.float32),
        labelled_y=rng.integers(CLASSES, size=LABELLED),
        labelled_count=LABELLED,
    )
    return learner, batch


if __name__ == "__main__":
    main()
