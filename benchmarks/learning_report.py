"""Summarises the results of `learning.py`: means over seeds, gains, the table and pictures of docs/learning.md.

A gain is the teacher minus its rival on the same seed, in percentage points of accuracy.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from rich.table import Table

Line: TypeAlias = dict[str, Any]
DOCS = Path(__file__).parent.parent / "docs"
BEGIN, END = "<!-- table: begin, by `python benchmarks/learning.py --report` -->", "<!-- table: end -->"
FEW_LABELS = 0.01
"""Cells with at most this share of labels have few labels."""
LAST_SAMPLES = 5000
NETWORKS = ("teacher", "student", "twin", "plain", "four", "majority", "no_change", "full")
_SPANS = ("prequential", "last", "test")


def mean(values: Sequence[float]) -> float | None:
    """Mean; None if empty."""
    return sum(values) / len(values) if values else None


def summary(lines: Sequence[Line], chances: Mapping[str, float]) -> dict[str, Any]:
    """All figures of docs/learning.json. `chances`: share of the largest class by data set."""
    table = {cell: _cell(cell, lines) for cell in _cells(lines)}
    found: dict[str, Any] = {
        "cells": len(table),
        "cells_of_5_seeds": sum(cell["seeds"] >= 5 for cell in table.values()),
        "runs_at_chance": sum(at_chance(line, chances) for line in lines if line["run"] == "default"),
    }
    for span in ("prequential", "last"):
        suffix = "" if span == "prequential" else f"_{span}"
        over_twin = {cell: found_of["gain_over_twin"][span]["mean"] for cell, found_of in table.items()}
        points = {cell: value for cell, value in over_twin.items() if value is not None}
        found[f"worst_cell_points{suffix}"] = min(points.values(), default=None)
        found[f"worst_cell{suffix}"] = min(points, key=points.__getitem__, default=None)
        for rival in ("twin", "plain"):
            gains = [
                gain
                for cell, found_of in table.items()
                if _labels(cell) <= FEW_LABELS and (gain := found_of[f"gain_over_{rival}"][span]["mean"]) is not None
            ]
            gain = mean(gains)
            found[f"gain_over_{rival}_le_1pct{suffix}"] = None if gain is None else round(gain, 3)
        of_time = [gain for row in table.values() if (gain := row["gain_of_time"][span]["mean"]) is not None]
        found[f"gain_of_time_points{suffix}"] = round(sum(of_time) / len(of_time), 3) if of_time else None
    return {**found, "table": table}


def at_chance(line: Line, chances: Mapping[str, float]) -> bool:
    """Whether the teacher ends within three standard errors of the majority class."""
    largest = chances[line["cell"].partition("/")[0]]
    count = min(LAST_SAMPLES, line["samples"])
    bound = largest + 3.0 * math.sqrt(largest * (1.0 - largest) / count)
    return bool(line["last"]["teacher"] <= bound)


def _labels(cell: str) -> float:
    return float(cell.split("/")[1])


def _cells(lines: Sequence[Line]) -> list[str]:
    """Cells with a default run, in file order."""
    return list(dict.fromkeys(line["cell"] for line in lines if line["run"] == "default"))


def _cell(cell: str, lines: Sequence[Line]) -> dict[str, Any]:
    """Means, deviations, gains and wins of one cell."""
    by_seed = {line["seed"]: line for line in lines if (line["cell"], line["run"]) == (cell, "default")}
    plain = {line["seed"]: line for line in lines if (line["cell"], line["run"]) == (cell, "plain")}
    four = {line["seed"]: line for line in lines if (line["cell"], line["run"]) == (cell, "four")}
    full_cell = f"{cell.partition('/')[0]}/1/0"
    full = {line["seed"]: line for line in lines if (line["cell"], line["run"]) == (full_cell, "full")}
    found: dict[str, Any] = {"seeds": len(by_seed)}
    for span in _SPANS:
        accuracies: dict[str, dict[int, float]] = {
            name: _of(by_seed, span, name) for name in ("teacher", "student", "twin", "majority", "no_change")
        }
        accuracies["plain"], accuracies["full"] = _of(plain, span, "student"), _of(full, span, "teacher")
        accuracies["four"] = _of(four, span, "teacher")
        found[span] = {name: _spread(list(accuracies[name].values()), digits=4) for name in NETWORKS}
        for rival, name in (("twin", "gain_over_twin"), ("plain", "gain_over_plain"), ("four", "gain_of_time")):
            gains = [
                100.0 * (accuracies["teacher"][seed] - accuracies[rival][seed])
                for seed in sorted(accuracies["teacher"].keys() & accuracies[rival].keys())
            ]
            by_span = found.setdefault(name, {})
            by_span[span] = {**_spread(gains, digits=3), "wins": sum(gain > 0 for gain in gains), "of": len(gains)}
            by_span[span]["by_seed"] = [round(gain, 3) for gain in gains]
    return found


def _of(lines: Mapping[int, Line], span: str, network: str) -> dict[int, float]:
    """Accuracy by seed, where it exists."""
    return {
        seed: value for seed, line in lines.items() if line[span] and (value := line[span].get(network)) is not None
    }


def _spread(values: Sequence[float], *, digits: int) -> dict[str, float | None]:
    """Mean and sample standard deviation; None if there are too few values."""
    middle = mean(values)
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {
        "mean": None if middle is None else round(middle, digits),
        "std": None if spread is None else round(spread, digits),
    }


def write_report(lines: Sequence[Line], chances: Mapping[str, float], folder: Path) -> None:
    """Write docs/learning.json, two pictures, and the part of docs/learning.md between the markers.

    Raises:
        ValueError: the page has no markers.
    """
    found = summary(lines, chances)
    (folder / "learning.json").write_text(json.dumps(found, indent=1) + "\n")
    page = folder / "learning.md"
    before, begin, rest = page.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        msg = f"{page}: wanted the lines {BEGIN} and {END} around the table"
        raise ValueError(msg)
    page.write_text(f"{before}{BEGIN}\n{markdown(found)}\n{END}{after}")
    _draw_gains(found["table"], folder / "learning-gain.svg")
    _draw_curves(lines, folder / "learning-curves.svg")


def markdown(found: Mapping[str, Any]) -> str:
    """The summary and the table of all cells. learning.json has standard deviations and held-out scores as well."""
    worst = (f"{_points(found[f'worst_cell_points{s}'])} ({found[f'worst_cell{s}']})" for s in ("", "_last"))
    of_time = (_points(found[f"gain_of_time_points{s}"]) for s in ("", "_last"))
    rows = [
        "",
        f"{found['cells']} of 42 cells have a run, {found['cells_of_5_seeds']} of them 5 seeds.",
        "",
        "| points | all samples | last 5,000 |",
        "|---|---|---|",
        f"| worst cell, teacher minus twin | {' | '.join(worst)} |",
        *(
            f"| at most 1 % labels, mean gain over {rival}"
            f" | {_points(found[f'gain_over_{rival}_le_1pct'])} | {_points(found[f'gain_over_{rival}_le_1pct_last'])} |"
            for rival in ("twin", "plain")
        ),
        f"| all cells, mean gain over 4 steps | {' | '.join(of_time)} |",
        f"| runs at chance | | {found['runs_at_chance']} |",
        "",
        "| cell | all: teacher | twin | full | gain | wins | 4 steps | last: teacher | twin | plain | full | gain |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for cell, row in found["table"].items():
        every, last = row["gain_over_twin"]["prequential"], row["gain_over_twin"]["last"]
        columns = [_percent(row["prequential"][name]) for name in ("teacher", "twin", "full")]
        columns += [_points(every["mean"]), f"{every['wins']}/{every['of']}", _percent(row["prequential"]["four"])]
        columns += [_percent(row["last"][name]) for name in ("teacher", "twin", "plain", "full")]
        rows.append(f"| {cell} | {' | '.join(columns)} | {_points(last['mean'])} |")
    return "\n".join([*rows, ""])


def _percent(spread: Mapping[str, float | None]) -> str:
    return "–" if spread["mean"] is None else f"{100 * spread['mean']:.1f}"


def _points(value: float | None) -> str:
    return "–" if value is None else f"{value:+.2f}"


def new_figure(rows: int, columns: int, width: float, height: float) -> Any:
    """A reproducible figure: the same bytes for the same lines."""
    import matplotlib as mpl  # noqa: PLC0415

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "learning"
    import matplotlib.pyplot as plt  # noqa: PLC0415

    return plt.subplots(rows, columns, figsize=(width, height), layout="constrained", squeeze=False)


def save_figure(figure: Any, path: Path) -> None:
    """Write it as SVG without a date."""
    figure.savefig(path, metadata={"Date": None, "Creator": None})
    path.write_text(re.sub(r"[ \t]+$", "", path.read_text(), flags=re.MULTILINE))


def _draw_gains(table: Mapping[str, Any], path: Path) -> None:
    """Teacher minus twin: a dot per seed, a bar at the mean."""
    figure, axes = new_figure(1, 1, 8.0, 0.6 + 0.2 * max(len(table), 1))
    axis = axes[0, 0]
    for y, row in enumerate(reversed(table.values())):
        gain = row["gain_over_twin"]["prequential"]
        colour = "tab:green" if (gain["mean"] or 0.0) >= 0 else "tab:red"
        axis.plot(gain["by_seed"], [y] * len(gain["by_seed"]), "o", ms=3, color="grey", alpha=0.6)
        if gain["mean"] is not None:
            axis.plot([gain["mean"]], [y], "|", ms=12, mew=2.5, color=colour)
    axis.axvline(0.0, color="black", lw=0.7)
    axis.axvline(-0.5, color="tab:red", lw=0.7, ls=":")
    axis.set_yticks(range(len(table)), labels=reversed(table), fontsize=7)
    axis.set_xlabel("teacher minus label-only twin, points; dots are seeds, the dotted line is the bound of the goal")
    save_figure(figure, path)


def _draw_curves(lines: Sequence[Line], path: Path) -> None:
    """Windowed accuracy along the stream at 1 % of labels without delay, mean over seeds."""
    drawn = [line for line in lines if line["run"] == "default" and line["cell"].endswith("/0.01/0")]
    names = list(dict.fromkeys(line["cell"].partition("/")[0] for line in drawn)) or ["none"]
    columns = min(4, len(names))
    figure, axes = new_figure(-(-len(names) // columns), columns, 2.6 * columns, 2.2 * -(-len(names) // columns))
    for axis in axes.ravel()[len(names) :]:
        axis.axis("off")
    for axis, name in zip(axes.ravel(), names, strict=False):
        for network, style in (("teacher", "-"), ("twin", "--")):
            curves = [line["curve"][network] for line in drawn if line["cell"].startswith(f"{name}/")]
            if curves and all(None not in curve for curve in curves):
                middle = np.mean([curve[: min(map(len, curves))] for curve in curves], axis=0)
                axis.plot(np.arange(1, len(middle) + 1), middle, style, label=network, lw=1.2)
        axis.set_title(name, fontsize=8)
        axis.tick_params(labelsize=6)
        axis.set_xlabel("1,000 samples", fontsize=6)
    if drawn:
        axes[0, 0].legend(fontsize=6)
    save_figure(figure, path)


@dataclass(frozen=True)
class Recipes:
    """The result of a search."""

    shown: Table
    figures: list[dict[str, Any]]


def recipes_table(lines: Sequence[Line]) -> Recipes:
    """Mean teacher, twin and gain per recipe, overall and by data set; best teacher first."""
    groups: dict[str, list[Line]] = {}
    for line in lines:
        groups.setdefault(json.dumps(line.get("overrides", {}), sort_keys=True), []).append(line)
    data = list(dict.fromkeys(line["cell"].partition("/")[0] for line in lines))
    figures = []
    for recipe, of in groups.items():
        found: dict[str, Any] = {"recipe": json.loads(recipe), "runs": len(of)}
        for span in ("prequential", "last"):
            means = [_mean_by_data(of, data, span, network) for network in ("teacher", "twin")]
            found[span] = {
                "teacher": means[0],
                "twin": means[1],
                "gain": {name: round(100 * (means[0][name] - means[1][name]), 2) for name in means[0]},
            }
        figures.append(found)
    figures.sort(key=lambda found: -np.mean(list(found["last"]["teacher"].values())))
    shown = Table("recipe", "runs")
    for name in data:
        shown.add_column(f"{name}: teacher\nall / last", justify="right")
        shown.add_column("gain\nall / last", justify="right")
    for found in figures:
        row = [json.dumps(found["recipe"]) if found["recipe"] else "as shipped", str(found["runs"])]
        for name in data:
            if name not in found["last"]["teacher"]:
                row += ["–", "–"]
                continue
            row.append(" / ".join(f"{100 * found[span]['teacher'][name]:.1f}" for span in ("prequential", "last")))
            row.append(" / ".join(f"{found[span]['gain'][name]:+.2f}" for span in ("prequential", "last")))
        shown.add_row(*row)
    return Recipes(shown, figures)


def _mean_by_data(lines: Sequence[Line], data: Sequence[str], span: str, network: str) -> dict[str, float]:
    found = {}
    for name in data:
        values = [line[span][network] for line in lines if line["cell"].startswith(f"{name}/")]
        if (middle := mean(values)) is not None:
            found[name] = round(middle, 5)
    return found
