"""Shared by `evaluate` and `evaluate --offline`: settings that fit the data set, accuracy on the held-out part."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from streamlearn.config import Config
from streamlearn.lab.datasets import Classes, Dataset
from streamlearn.lab.drift import Drift, Drifts
from streamlearn.learn.learner import Learner
from streamlearn.models.answer import corrected
from streamlearn.records import Array

Progress = Callable[[str, int, int | None], None]
"""Called with the current task, the samples or steps done, and their total; None if it is not known."""

_ROWS = 128
_REQUIRES = {"scale": "shape", "normalise": "factory"}
"""A suggested setting, and the setting whose presence in the config overrides it."""


@dataclass(frozen=True)
class Accuracy:
    """Accuracies on `count` samples; None for a network that does not exist."""

    count: int
    teacher: float | None
    student: float | None
    twin: float | None


def no_progress(_what: str, _done: int, _total: int | None) -> None:
    """Report no progress."""


def fitting_tables(config: Config, dataset: Dataset, seed: int) -> dict[str, Any]:
    """The settings of `config`, completed with those that the data set suggests, and `seed` as `learn.seed`."""
    tables = config.model_dump(by_alias=True, exclude_unset=True)
    for table, suggested in dataset.suggested.items():
        given = tables.setdefault(table, {})
        fitting = {key: value for key, value in suggested.items() if _REQUIRES.get(key) not in given}
        tables[table] = fitting | given
    tables["learn"] = {"seed": seed} | tables.get("learn", {})
    return tables


def settings_as_json(config: Config, names: Sequence[str]) -> dict[str, Any]:
    """Tables of the config for a report."""
    tables = config.model_dump(mode="json", by_alias=True, include={*names, "schema_"})
    return {name: tables[name] for name in names}


def score_held_out(
    learner: Learner, dataset: Dataset, drifts: Sequence[Drift], *, ended_at: int, seed: int
) -> Accuracy | None:
    """Accuracy on the held-out part, under the drifts that hold at sample `ended_at`; None if there is no such part."""
    if dataset.test_x is None or dataset.test_y is None or not len(dataset.test_y):
        return None
    lasting = [replace(drift, start=0, end=None) for drift in drifts if drift.holds_at(ended_at)]
    drifted = Drifts(dataset, lasting, seed=seed)
    count = len(dataset.test_y)
    held_out_N = drifted.rows(np.arange(count), dataset.test_y, first=0)
    right: dict[str, int | None] = {"teacher": 0, "student": 0, "twin": 0}
    for first in range(0, count, _ROWS):
        rows = held_out_N[first : first + _ROWS].tolist()
        shown = [drifted.show(row, dataset.test_x[row], int(dataset.test_y[row])) for row in rows]
        x, y_B = np.stack([x for x, _ in shown]), np.array([y for _, y in shown])
        for network, answers_B in _answers(learner, x).items():
            so_far = right[network]
            right[network] = None if so_far is None or answers_B is None else so_far + int((answers_B == y_B).sum())
    return Accuracy(count, **{network: None if hits is None else hits / count for network, hits in right.items()})


def _answers(learner: Learner, x: Array) -> dict[str, Classes | None]:
    """The classes that each network predicts; the teacher is the one that is served, corrected as its answers are."""
    probabilities, classes = learner.predict(x), learner.classify(x)
    return {
        "teacher": corrected(probabilities.teacher_probs_BC, learner.log_offsets).argmax(axis=1),
        "student": probabilities.student_probs_BC.argmax(axis=1),
        "twin": classes.twin_B,
    }
