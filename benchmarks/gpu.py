"""Measures the learner on a GPU: `Learner.learn` over a captured graph of the bare step, and bfloat16 over float32.

Bare step: student forward and backward, teacher forward, on rows that are on the device. It is captured as a CUDA graph
once, so its replay is the least time that this network needs: no launch waits for Python. The learner's step does the
same work, and everything else: it copies the rows, adds noise, draws, checks, updates, averages.

    NAME.learn_over_graph           `learn` over the replay, both in bfloat16
    NAME.bfloat16_over_float32      `learn` in bfloat16 over float32
    NAME.twin_share                 what the twin adds to `learn`
    NAME.samples_per_s              fresh samples per second of `predict` and `learn` with the twin

Without a GPU nothing is measured, and the last line says so.

Run: python benchmarks/gpu.py [--quick]. The last line is JSON.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from common import arguments, figures, tell
from step import CLASSES, FRESH, LABELLED, SPECS, made
from torch import nn

from streamlearn.models.build import ModelSpec, build

WARM_UP = 120
"""More than the first steps, in which the learner may wait for the device."""
NETWORKS = {
    "convnet": SPECS["convnet"],
    "wide_resnet": ModelSpec("wide_resnet", {}, (3, 32, 32), CLASSES, normalise=False, scale=1.0),
    "conv13": ModelSpec("conv13", {}, (3, 32, 32), CLASSES, normalise=False, scale=1.0),
    "mlp": SPECS["mlp"],
    "columns": SPECS["columns"],
}


def seconds(step: Callable[[], object], *, steps: int, rounds: int) -> float:
    """Median over rounds of the mean seconds of a step. The device is waited for at the ends of a round only."""
    found = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        started_s = time.perf_counter()
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
        found.append((time.perf_counter() - started_s) / steps)
    return statistics.median(found)


def graph(spec: ModelSpec, precision: torch.dtype) -> Callable[[], object]:
    """The replay of the bare step."""
    student, teacher = build(spec, seed=0).cuda().train(), build(spec, seed=1).cuda().eval()
    student.precision = teacher.precision = precision
    x_B = torch.randn((FRESH + LABELLED, *spec.shape), device="cuda").abs()
    x_B = x_B.contiguous(memory_format=torch.channels_last) if x_B.dim() == 4 else x_B
    labels_B = torch.randint(CLASSES, (FRESH + LABELLED,), device="cuda")

    def step() -> None:
        for parameter in student.parameters():
            parameter.grad = None
        loss = nn.functional.cross_entropy(student.logits(x_B), labels_B)
        with torch.no_grad():
            teacher.logits(x_B)
        loss.backward()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(5):
            step()
    torch.cuda.current_stream().wait_stream(side)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        step()
    return captured.replay


def measure(spec: ModelSpec, *, steps: int, rounds: int) -> dict[str, float]:
    """All figures of a network."""
    learned_s = {}
    for name, precision, twin in (
        ("low", "bfloat16", False),
        ("exact", "float32", False),
        ("with_twin", "bfloat16", True),
    ):
        learner, batch = made(spec, twin=twin, precision=precision, device="cuda")
        for _ in range(WARM_UP):
            learner.learn(batch)
        learned_s[name] = seconds(lambda: learner.learn(batch), steps=steps, rounds=rounds)  # noqa: B023
    both_s = learned_s["with_twin"] + seconds(lambda: learner.predict(batch.fresh_x), steps=steps, rounds=rounds)
    graph_s = seconds(graph(spec, torch.bfloat16), steps=steps, rounds=rounds)
    return {
        "learn_s": learned_s["low"],
        "learn_over_graph": learned_s["low"] / graph_s,
        "bfloat16_over_float32": learned_s["low"] / learned_s["exact"],
        "twin_share": learned_s["with_twin"] / learned_s["low"] - 1.0,
        "samples_per_s": FRESH / both_s,
    }


def main() -> None:
    """Measure each network, or say that nothing was measured."""
    quick = arguments(__doc__ or "").quick
    if not torch.cuda.is_available():
        tell("NOT MEASURED: there is no GPU")
        figures(gpu="none", measured=False)
        return
    found = {}
    for name, spec in NETWORKS.items():
        found[name] = measure(spec, steps=20 if quick else 100, rounds=3 if quick else 10)
        tell(f"{name}: {found[name]}")
    figures(gpu=torch.cuda.get_device_name(), measured=True, torch=torch.__version__, **found)


if __name__ == "__main__":
    main()
