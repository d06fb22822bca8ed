"""`streamlearn evaluate --offline`: the protocol of the papers, to compare the code with published results.

n labelled samples, balanced over classes; epochs over the whole data set; test accuracy. The learner, its replay buffer
and its steps are those of the daemon. In addition, the learning rate falls over the last `rampdown` of all steps by
exp(-12.5 x^2), x from 0 to 1 (Laine and Aila 2017, Tarvainen and Valpola 2017).
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from streamlearn import __version__
from streamlearn.app.build import make_learner
from streamlearn.config import Config, load_config
from streamlearn.errors import ConfigError
from streamlearn.lab.datasets import Classes, Dataset, load
from streamlearn.lab.held_out import Progress, fitting_tables, no_progress, score_held_out, settings_as_json
from streamlearn.learn.learner import Learner
from streamlearn.ledger.replay_buffer import ReplayBuffer
from streamlearn.records import UNLABELLED, Example, MicroBatch, sample_key

MAX_STEPS = 100_000_000
_CHOICE, _ORDER = 5, 6
"""Random streams, distinct from those of `lab.stream`."""
_RAMPDOWN_POWER = 12.5
_TABLES = ("schema", "model", "learn", "batch")


@dataclass(frozen=True, kw_only=True)
class OfflinePlan:
    """What to run."""

    dataset: str
    """A name, or the path of a .npz file. Must have a held-out part."""
    labels: int = 1000
    """Number of labelled samples."""
    epochs: int = 30
    """Passes over all samples."""
    limit: int | None = None
    points: int = 10
    """Most points of the curve, including the end."""
    rampdown: float = 0.25
    """Share of the steps over which the learning rate falls."""
    seed: int = 0
    """Of the choice of labels and the order, and of the learner unless its config has a seed."""


@dataclass(frozen=True)
class OfflinePoint:
    """Test accuracies after `step`."""

    step: int
    teacher: float | None
    student: float | None
    twin: float | None


@dataclass(frozen=True)
class OfflineEvaluation:
    """The result of an offline evaluation."""

    plan: OfflinePlan
    config: Config
    labels: int
    steps: int
    complete: bool
    """False if it was stopped: the last point is of the steps until then."""
    curve: list[OfflinePoint]

    @property
    def test(self) -> OfflinePoint:
        """The last point."""
        return self.curve[-1]

    def as_json(self) -> dict[str, Any]:
        """Everything except times and paths."""
        return {
            "streamlearn": __version__,
            "protocol": asdict(self.plan),
            "settings": settings_as_json(self.config, _TABLES),
            "complete": self.complete,
            "labels": self.labels,
            "steps": self.steps,
            "curve": [asdict(point) for point in self.curve],
        }


def evaluate_offline(
    config: Config, plan: OfflinePlan, stopping: threading.Event, *, progress: Progress = no_progress
) -> OfflineEvaluation:
    """Learn until the last epoch ends or `stopping` is set.

    Raises:
        ConfigError: the plan or a setting is invalid or does not fit the data set, or it has no held-out part.
    """
    loaded = load(plan.dataset, limit=plan.limit)
    _check(plan, loaded)
    tables = fitting_tables(config, loaded, plan.seed)
    # The buffer must hold every label.
    rows = max(plan.labels, config.labels.replay_rows)
    tables["labels"] = tables.get("labels", {}) | {"replay_rows": rows}
    settings = load_config(None, overrides=tables, environ={})
    dataset = loaded.fit(settings.schema_.build())
    learner, buffer = make_learner(settings), ReplayBuffer(rows, settings.schema_.build(), settings.learn.seed)
    chosen = choose_labelled(dataset.y, plan.labels, plan.seed)
    for row in chosen.tolist():
        buffer.add(Example(str(row), dataset.x[row], int(dataset.y[row])))
    batches = _Batches(dataset, buffer, plan, fresh=settings.batch.fresh, labelled=settings.batch.labelled)
    curve: list[OfflinePoint] = []
    point_steps = {round(batches.total * n / plan.points) for n in range(1, plan.points + 1)}
    for batch in batches.take(wants_keys=learner.wants_keys):
        factor = learning_rate_factor(learner.step, batches.total, share=plan.rampdown)
        learner.learn(batch, learning_rate_factor=factor)
        progress("learning", learner.step, batches.total)
        if learner.step in point_steps or stopping.is_set():
            curve.append(_point(learner, dataset, plan.seed))
        if stopping.is_set():
            break
    return OfflineEvaluation(plan, settings, len(chosen), learner.step, learner.step == batches.total, curve)


def _check(plan: OfflinePlan, dataset: Dataset) -> None:
    if dataset.test_y is None or not len(dataset.test_y):
        raise ConfigError(
            f"data set {dataset.name!r} has no held-out part, which --offline needs: a .npz file has one as test_x"
            " and test_y"
        )
    if not len(dataset.classes) <= plan.labels <= len(dataset.y):
        bounds = f"{len(dataset.classes)}, one of each class, to {len(dataset.y)}, all samples"
        raise ConfigError(f"labels: wanted {bounds}, got {plan.labels}")
    for name, low, high in (("epochs", 1, MAX_STEPS // len(dataset.y)), ("points", 1, 10_000), ("rampdown", 0.0, 1.0)):
        if not low <= (value := getattr(plan, name)) <= high:
            raise ConfigError(f"{name}: wanted {low} to {high}, got {value!r:.80}")


def choose_labelled(y: Classes, count: int, seed: int) -> npt.NDArray[np.int64]:
    """Rows to label: balanced over classes, in random order."""
    order = np.random.default_rng((seed, _CHOICE)).permutation(len(y))
    # Sort by the rank within the class: first ones first.
    turn_N = np.empty(len(y), np.int64)
    for class_index in np.unique(y):
        of_class = np.flatnonzero(y[order] == class_index)
        turn_N[of_class] = np.arange(len(of_class))
    return order[np.argsort(turn_N, kind="stable")[:count]]


def learning_rate_factor(done: int, total: int, *, share: float) -> float:
    """1, then exp(-12.5 x^2) with x from 0 to 1 over the last `share` of all steps."""
    length = share * total
    x = (done - (total - length)) / length if length > 0 else 0.0
    return math.exp(-_RAMPDOWN_POWER * max(0.0, x) ** 2)


class _Batches:
    """Micro-batches; the fresh rows are all samples, including labelled ones, shuffled in each epoch."""

    def __init__(self, dataset: Dataset, buffer: ReplayBuffer, plan: OfflinePlan, *, fresh: int, labelled: int) -> None:
        self._dataset, self._buffer, self._plan = dataset, buffer, plan
        self._fresh, self._labelled = fresh, labelled
        self.total = plan.epochs * math.ceil(len(dataset.y) / fresh)
        """Number of steps."""

    def take(self, *, wants_keys: bool) -> Iterator[MicroBatch]:
        step, count = 0, len(self._dataset.y)
        for epoch in range(self._plan.epochs):
            order = np.random.default_rng((self._plan.seed, _ORDER, epoch)).permutation(count)
            for first in range(0, count, self._fresh):
                step += 1
                rows = order[first : first + self._fresh]
                yield self._make(rows, step, wants_keys=wants_keys, seen_before=epoch > 0)

    def _make(self, rows: npt.NDArray[np.int64], step: int, *, wants_keys: bool, seen_before: bool) -> MicroBatch:
        dataset, buffer = self._dataset, self._buffer
        labelled_x = np.zeros((self._labelled, *dataset.x.shape[1:]), dataset.x.dtype)
        labelled_y = np.full(self._labelled, UNLABELLED, np.int64)
        new_ids = buffer.draw_into(labelled_x, labelled_y, step)
        keys = None
        if wants_keys:
            ids = [*map(str, rows.tolist()), *buffer.drawn_ids]
            keys = np.array([sample_key(sample_id) for sample_id in ids], np.int64)
        fresh_x = dataset.x[rows]
        return MicroBatch(
            fresh_x, len(rows), labelled_x, labelled_y, self._labelled, new_ids, keys, seen_before=seen_before
        )


def _point(learner: Learner, dataset: Dataset, seed: int) -> OfflinePoint:
    found = score_held_out(learner, dataset, (), ended_at=0, seed=seed)
    assert found is not None
    return OfflinePoint(learner.step, found.teacher, found.student, found.twin)
