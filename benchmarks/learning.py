"""Measures teacher, label-only twin and plain network on {data} x {label rate} x {label delay} x {seed}.

    data    fashion      Fashion-MNIST, 20,000 images in random order
            rotated      the same, rotated by 90 degrees from the middle of the stream on
            prior        the same; from the middle on the most frequent class is 20 times the rarest
            digits       1,297 images, then 19 more passes with Gaussian noise
            moons        two moons, 20,000 samples
            shuttle      Statlog shuttle, normal against anomalous, all 49,097
            rbf-drift    continuously moving clusters in 20 features, 30,000 samples in the order of time
    labels  10 %, 1 %, 0.2 % of the samples
    delay   none, or geometric with a mean of 5,000 samples
    seeds   5: of order, choice of labels, initial weights and noise

Three runs of `streamlearn evaluate` per cell and seed, and one `full` run per data set and seed:

    default the shipped settings: teacher, student and twin. The twin is the fair baseline: the same network, average,
            noise on labelled rows and replay, without the unlabelled rows
    plain   labels only, without average or mixup: the student of `learn.method = "supervised"`
    four    the shipped settings, but 4 steps per micro-batch: what time is worth
    full    every label, at once, labels only, averaged: an upper bound

Steps per micro-batch are about those that fit at 50 samples per second on two cores with AMX: 32, the most, or 12 for
images of 28 x 28. They are fixed here, so that runs on other machines compare; `streamlearn evaluate --rate` measures.

Scores are prequential by true class: `prequential` over the whole stream, `last` over its last 5,000 samples; `test` is
on held-out samples at the end. Each run is one line of JSON in benchmarks/results/learning.jsonl, with a hash of its
settings (`recipe`). Existing runs are not repeated; after a change of a default the affected runs are.

Run: python benchmarks/learning.py [--jobs N] [--nice N] [--only TEXT ...] [--seeds N] [--quick]
     python benchmarks/learning.py --report            writes docs/learning.md, .json and pictures from the newest line
                                                       of each run; reports how many are of earlier settings
     python benchmarks/learning.py --search "KEY=V1|V2 KEY=VALUE ..." [--search ...]
                                                       each recipe on digits, moons, shuttle and two seeds of fashion;
                                                       "" is the shipped recipe; with --report no runs are made
The last line is JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import logging
import os
import tempfile
import threading
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import structlog
from learning_report import DOCS, Line, mean, recipes_table, summary, write_report
from offline import in_pool
from rich.console import Console

from streamlearn.config import Config, load_config, settings
from streamlearn.lab.curves import CurvePoint
from streamlearn.lab.drift import prior_of
from streamlearn.lab.evaluate import Evaluation, EvaluationPlan, evaluate
from streamlearn.learn.methods.settings import OPTIONS
from streamlearn.learn.noise.settings import NOISES
from streamlearn.learn.recent import RECENT_ROWS
from streamlearn.learn.recipes import RECIPES
from streamlearn.learn.settings import LearnConfig
from streamlearn.section import Section
from streamlearn.sources import REMOVED

RESULTS = Path(__file__).parent / "results"
LABELS = (0.1, 0.01, 0.002)
DELAYS = ("0", "geometric:5000")
SEEDS = 5
WINDOW, LAST_WINDOWS = 1000, 5
"""Samples per point of the curves, and number of points in `last`."""
DIGITS, FASHION = 1297, 20_000
_NEVER_S = 3600.0
STEPS, STEPS_OF_LARGE_IMAGES = 32, 12
"""Per micro-batch."""
_PRIOR = float(prior_of(10, 20.0, seed=0).max())

IMAGES = {
    "learn.recipe": "image",
    "learn.noise": "image",
    "model.factory": "convnet",
    "model.normalise": False,
    "model.options": {"widths": [16, 32, 64]},
    "batch.steps": STEPS,
}
TABLES = {
    "learn.recipe": "table",
    "learn.noise": "table",
    "model.factory": "mlp",
    "model.normalise": True,
    "model.options": {"hidden": [64, 64]},
    "batch.steps": STEPS,
}
FLIPPED = {**IMAGES, "learn.noise_options.flip": True, "batch.steps": STEPS_OF_LARGE_IMAGES}
"""The recipe that `auto` selects, and networks small enough for a table in hours."""
HARNESS = {
    "learn.threads": 1,
    "learn.device": "cpu",
    "state.checkpoint_every_s": _NEVER_S,
    "state.publish_every_s": _NEVER_S,
}
"""Settings that do not affect learning."""
RUNS: Mapping[str, Mapping[str, Any]] = {
    "default": {},
    "plain": {"learn.method": "supervised", "learn.options.mixup_beta": 0.0},
    "four": {"batch.steps": 4},
    "full": {"learn.method": "supervised", "batch.labelled": 96, "batch.steps": 4},
}
"""Settings by run; unknown keys are dropped. `full` has room for all new labels and for replay."""
_NOT_RECIPE = {
    "batch": {"backlog", "max_age_s", "merge_wait_s", "prefetch_records", "max_labels"},
}
_LEARN_BEFORE = {
    "trust_labels": 10,
    "label_smoothing": 0.0,
    "warmup_steps": 0,
    "momentum": 0.9,
    "nesterov": True,
    "logit_distance": None,
}
"""Settings of [learn] that are constants or gone by now, and part of every recipe that was hashed."""
_NOT_HASHED = {"options", "noise_options", "twin", "seed", "threads", "device", "cpu_share"}
_RECIPE_TABLES = ("model", "batch", "guard", "drift")


@dataclass(frozen=True)
class Source:
    """A stream of a data set."""

    dataset: str
    samples: int
    """Samples per pass."""
    chance: float
    """Share of the largest class at the end of the stream."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    passes: int = 1
    order: str = "shuffle"
    drift: str = "none"


SOURCES: Mapping[str, Source] = {
    "fashion": Source("fashion-mnist", FASHION, 0.1, FLIPPED),
    "rotated": Source("fashion-mnist", FASHION, 0.1, FLIPPED, drift=f"rotate:90@{FASHION // 2}"),
    "prior": Source("fashion-mnist", FASHION, _PRIOR, FLIPPED, drift=f"prior:20@{FASHION // 2}"),
    "digits": Source("digits", DIGITS, 0.1016, IMAGES, passes=20, drift=f"noise:0.2@{DIGITS}"),
    "moons": Source("moons", 20_000, 0.5, TABLES),
    "shuttle": Source("shuttle", 49_097, 0.9285, TABLES),
    "rbf-drift": Source("rbf-drift", 30_000, 0.3181, TABLES, order="file"),
}
SEARCHED = {"moons": 3, "shuttle": 3, "digits": 3, "fashion": 2}
"""Seeds by data set; settings are chosen on these only."""


@dataclass(frozen=True)
class Case:
    """One run."""

    source: str
    labels: float
    delay: str
    run: str
    seed: int
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """Settings of a search, which override those of the run."""
    quick: bool = False

    @property
    def cell(self) -> str:
        """Data, label rate and delay."""
        return f"{self.source}/{self.labels:g}/{self.delay}"

    @property
    def plan(self) -> EvaluationPlan:
        """The plan of its stream."""
        source = SOURCES[self.source]
        return EvaluationPlan(
            dataset=source.dataset,
            label_probability=self.labels,
            delay=self.delay,
            window=WINDOW,
            order=source.order,
            drift=source.drift,
            limit=min(source.samples, 3000) if self.quick else source.samples,
            passes=min(source.passes, 3) if self.quick else source.passes,
            seed=self.seed,
        )

    @property
    def config(self) -> Config:
        """The shipped settings with the changes of the run."""
        known = settings()
        changed = {key: value for key, value in RUNS[self.run].items() if key in known}
        own = SOURCES[self.source].settings
        return load_config(None, overrides={**own, **HARNESS, **changed, **self.overrides}, environ={})

    @property
    def recipe(self) -> dict[str, Any]:
        """Everything that affects a run except cell and seed."""
        config = self.config
        tables: dict[str, Any] = {
            name: config.model_dump(mode="json", include={name: True}, exclude={name: _NOT_RECIPE.get(name, set())})[
                name
            ]
            for name in _RECIPE_TABLES
        }
        tables["model"], tables["learn"] = _model_as_hashed(tables["model"]), _learn_as_hashed(config.learn)
        tables["twin"] = {"every": int(config.learn.twin != "off")}
        tables["labels"] = {"memory_rows": config.labels.replay_rows}
        tables["batch"]["recent_rows"] = RECENT_ROWS  # a setting when the first lines were written
        plan = self.plan
        stream = {"limit": plan.limit, "passes": plan.passes, "order": plan.order, "drift": plan.drift}
        return {"stream": {"dataset": plan.dataset, **stream}, "settings": tables}

    @property
    def recipe_hash(self) -> str:
        """A short hash of the recipe."""
        return hashlib.sha256(json.dumps(self.recipe, sort_keys=True).encode()).hexdigest()[:12]


def _model_as_hashed(model: Mapping[str, Any]) -> dict[str, Any]:
    """[model] under the names of the first lines, so that those stay valid."""
    options = dict(model["options"])
    return {**model, "norm": options.pop("norm", "auto"), "options": options}


def _learn_as_hashed(learn: LearnConfig) -> dict[str, Any]:
    """The same of [learn]: one flat table with the options of every method and noise."""
    kinds: list[type[Section]] = [*OPTIONS.values(), *NOISES.values()]
    defaults = {name: field.default for kind in kinds for name, field in kind.model_fields.items()}
    own = learn.model_dump(mode="json", exclude=_NOT_HASHED)
    flat = _LEARN_BEFORE | defaults | learn.options.model_dump() | learn.noise_options.model_dump() | own
    flat |= {"ema_share": learn.ema_share, "noise_std": flat.pop("std")}
    flat["noise"] = "auto" if learn.noise in ("image", "table") else learn.noise
    for name, off in (("teacher_mode", "eval"), ("contrast_weight", 0.0)):  # they came later than the first lines
        if flat[name] == off:
            del flat[name]
    return flat


def _renamed(overrides: Mapping[str, Any]) -> dict[str, Any] | None:
    """Overrides of an earlier search under the names of now; None where a setting is gone."""
    found: dict[str, Any] = {}
    for key, value in overrides.items():
        if key == "learn.ema_share" and value == RECIPES["image"].ema_share:
            continue
        instead = REMOVED.get(key, f"use {key}")
        if not instead.startswith("use "):
            return None
        found[instead.removeprefix("use ")] = value
    return found


def all_cases(seeds: int, only: Sequence[str], *, quick: bool = False) -> list[Case]:
    """All runs, seed by seed, so that a partial table covers all cells."""
    cells = list(itertools.product(SOURCES, LABELS, DELAYS))
    cases = []
    for seed in range(seeds):
        cases += [Case(*cell, run, seed, quick=quick) for cell in cells for run in ("default", "plain", "four")]
        cases += [Case(source, 1.0, "0", "full", seed, quick=quick) for source in SOURCES]
    chosen = [case for case in cases if not only or any(text in f"{case.cell}/{case.run}" for text in only)]
    assert chosen, f"no run matches {only}"
    return chosen


def searched_cases(recipes: Iterable[Mapping[str, Any]], only: Sequence[str]) -> list[Case]:
    """Each recipe on the data sets for choosing settings, at 1 % and 0.2 % of labels."""
    recipes = list(recipes)
    cells = [
        (seed, source, labels, delay)
        for seed in range(max(SEARCHED.values()))
        for source, seeds in SEARCHED.items()
        if seed < seeds
        for labels, delay in itertools.product(LABELS[1:], DELAYS)
    ]
    cases = [
        Case(source, labels, delay, "default", seed, recipe)
        for seed, source, labels, delay in cells
        for recipe in recipes
    ]
    return [case for case in cases if not only or any(text in case.cell for text in only)]


def play(case: Case) -> tuple[Case, Line | None, str]:
    """Learn one stream; returns its line, or a traceback."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    wall_s, cpu_s = time.monotonic(), time.process_time()
    try:
        found = evaluate(case.config, case.plan, threading.Event())
    except Exception:  # reported at the end; other runs continue
        return case, None, traceback.format_exc()
    line: Line = {
        "cell": case.cell,
        "run": case.run,
        "seed": case.seed,
        "recipe": case.recipe_hash,
        **({"overrides": dict(case.overrides)} if case.overrides else {}),
        **_figures(found),
        "seconds": round(time.monotonic() - wall_s, 1),
        "cpu_s": round(time.process_time() - cpu_s, 1),
    }
    return case, line, ""


def _figures(found: Evaluation) -> dict[str, Any]:
    """Accuracies by network and span, rounded to 0.01 points."""
    assert found.complete
    oracle, last = found.scores.oracle, found.curves[-LAST_WINDOWS:]
    assert oracle is not None
    prequential: dict[str, float | None] = {**oracle.cumulative.accuracy}
    recent = {"teacher": _mean_of(last, "oracle"), "student": _mean_of(last, "oracle_student")}
    if oracle.twin is not None:
        prequential["twin"] = oracle.twin.cumulative.twin
        recent["twin"] = _mean_of(last, "oracle_twin")
    curve = {name: [getattr(point, key) for point in found.curves] for name, key in _CURVES.items()}
    return {
        "samples": found.samples,
        "labels": found.labels,
        "steps": found.steps,
        "prequential": _rounded(prequential),
        "last": _rounded(recent),
        "test": None if found.test is None else _rounded(asdict(found.test)),
        "guard": {name: count for name, count in found.guarding.guard.actions.items() if count},
        "curve": {name: [_round(value) for value in values] for name, values in curve.items()},
    }


_CURVES = {"teacher": "oracle", "twin": "oracle_twin"}


def _mean_of(points: Sequence[CurvePoint], name: str) -> float | None:
    return mean([value for point in points if (value := getattr(point, name)) is not None])


def _rounded(values: Mapping[str, float | int | None]) -> dict[str, float | int | None]:
    return {name: _round(value) for name, value in values.items()}


def _round(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


class Results:
    """A file with one line per run and one line per recipe, which resolves its hash."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: list[Line] = []
        self._recipes: set[str] = set()
        for text in path.read_text().splitlines() if path.exists() else ():
            line = json.loads(text)
            if "run" in line:
                self.lines.append(line)
            else:
                self._recipes.add(line["recipe"])

    def has(self, case: Case) -> bool:
        """Whether the file has this run."""
        key = (case.cell, case.run, case.seed, case.recipe_hash)
        return any((line["cell"], line["run"], line["seed"], line["recipe"]) == key for line in self.lines)

    def of(self, cases: Iterable[Case]) -> list[Line]:
        """The lines of these runs with their current settings."""
        keys = {(case.cell, case.run, case.seed, case.recipe_hash) for case in cases}
        return [line for line in self.lines if (line["cell"], line["run"], line["seed"], line["recipe"]) in keys]

    def newest(self, cases: Iterable[Case]) -> list[Line]:
        """The last line of each of these runs, with whatever settings it was made."""
        newest = {_key(line["cell"], line["run"], line["seed"], line.get("overrides", {})): line for line in self.lines}
        keys = {_key(case.cell, case.run, case.seed, case.overrides) for case in cases}
        return [line for key, line in newest.items() if key in keys]

    def append(self, case: Case, line: Line) -> None:
        """Append one run."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            if line["recipe"] not in self._recipes:
                self._recipes.add(line["recipe"])
                file.write(json.dumps({"recipe": line["recipe"], **case.recipe}) + "\n")
            file.write(json.dumps(line) + "\n")
        self.lines.append(line)


def _key(cell: str, run: str, seed: int, overrides: Mapping[str, Any]) -> tuple[str, str, int, str]:
    return cell, run, seed, json.dumps(dict(overrides), sort_keys=True)


def make(cases: Sequence[Case], results: Results, jobs: int) -> list[str]:
    """Make the missing runs; returns the failures."""
    missing, failures = [case for case in cases if not results.has(case)], []
    for case, line, failure in in_pool(play, missing, jobs) if missing else ():
        if line is None:
            failures.append(f"{case.cell} {case.run} seed {case.seed}: {failure}")
        else:
            results.append(case, line)
    return failures


def grid(text: str) -> Iterator[dict[str, Any]]:
    """All combinations of a text such as `learn.method=ict batch.steps=1|4`; values are JSON or plain strings."""
    named = [part.partition("=") for part in text.split()]
    for values in itertools.product(*(choices.split("|") for _, _, choices in named)):
        yield {key: _value(value) for (key, _, _), value in zip(named, values, strict=True)}


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def main() -> None:
    """Make the missing runs, or the report; print a JSON line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one seed, two cells, short streams, a temporary file")
    parser.add_argument("--jobs", type=int, default=2, help="processes with one thread each")
    parser.add_argument("--nice", type=int, default=0, help="niceness of all processes")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--only", action="append", default=[], metavar="TEXT", help="cells with TEXT in cell/run")
    parser.add_argument("--report", action="store_true", help="write docs/learning.*; no runs")
    parser.add_argument("--search", action="append", default=[], metavar="'KEY=V1|V2 ...'", help="recipes to compare")
    options = parser.parse_args()
    os.nice(options.nice)
    if options.search:
        _search(options)
        return
    if options.quick:
        cases = all_cases(1, options.only or ["digits/0.01/0/", "moons/0.01/0/", "s/1/0/full"], quick=True)
        with tempfile.TemporaryDirectory(prefix="bench-learning-") as folder:
            _finish(cases, Results(Path(folder) / "learning.jsonl"), options)
        return
    _finish(all_cases(options.seeds, options.only), Results(RESULTS / "learning.jsonl"), options)


def _finish(cases: Sequence[Case], results: Results, options: argparse.Namespace) -> None:
    failures = [] if options.report else make(cases, results, options.jobs)
    chances = {name: source.chance for name, source in SOURCES.items()}
    current = results.of(cases)
    lines = results.newest(cases) if options.report else current
    if options.report:
        write_report(lines, chances, DOCS)
    for failure in failures:
        Console(stderr=True).print(failure, markup=False)
    figures = {name: value for name, value in summary(lines, chances).items() if name != "table"}
    print(
        json.dumps(
            {
                **figures,
                "runs": len(lines),
                "runs_planned": len(cases),
                "of_earlier_settings": len(lines) - len(current),
                "failed": len(failures),
            }
        )
    )
    if failures:
        raise SystemExit(1)


def _search(options: argparse.Namespace) -> None:
    """Compare the recipes of all searches, by the newest line of each run."""
    results = Results(RESULTS / "search.jsonl")
    recipes = [recipe for text in options.search for recipe in grid(text)]
    failures = [] if options.report else make(searched_cases(recipes, options.only), results, options.jobs)
    made = {json.dumps(line.get("overrides", {})): line.get("overrides", {}) for line in results.lines}
    renamed = [overrides for old in made.values() if (overrides := _renamed(old)) is not None]
    found = recipes_table(results.newest(searched_cases(renamed, options.only)))
    Console(width=200).print(found.shown)
    for failure in failures:
        Console(stderr=True).print(failure, markup=False)
    print(json.dumps({"recipes": found.figures, "failed": len(failures)}))
    if failures:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
