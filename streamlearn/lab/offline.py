"""`streamlearn evaluate --offline`: a method as its paper has it, to hold the code against published orders.

A data set of which n samples are labelled, as many of each class as can be; epochs over all of it; test accuracy. The
learner, its labelled memory and its steps are those of the stream. What a stream has not is an end: here the learning
rate falls over the last `rampdown` of all steps by exp(-12.5 x^2), x from 0 to 1 (Laine and Aila 2017, Tarvainen and
Valpola 2017).
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from streamlearn import __version__
from streamlearn.app.build import make_learner
from streamlearn.config import Config, load_config
from streamlearn.errors import ConfigError
from streamlearn.lab.datasets import Classes, Dataset, load
from streamlearn.lab.evaluate import fitting_tables, held_out
from streamlearn.learn.learner import Learner
from streamlearn.ledger.replay_buffer import ReplayBuffer
from streamlearn.records import UNLABELLED, Example, MicroBatch, sample_key

Progress = Callable[[str, int, int], None]
Accuracies = dict[str, float | int | None]

MAX_STEPS = 100_000_000
_CHOICE, _ORDER = 5, 6
"""Streams of chance, beside those of `simulate.stream`."""
_RAMPDOWN_POWER = 12.5
_TABLES = ("schema", "model", "learn", "batch")


@dataclass(frozen=True, kw_only=True)
class OfflinePlan:
    """What to learn, how often."""

    dataset: str
    """A name, or the path of a .npz file, with a held-out part."""
    labels: int = 1000
    """Labelled samples in all."""
    epochs: int = 30
    """Times through all samples, labelled or not."""
    limit: int | None = None
    points: int = 10
    """How often the held-out part is asked, at most, the end included."""
    rampdown: float = 0.25
    """Share of the steps over which the learning rate falls."""
    seed: int = 0
    """Of the choice of labels and of the order, and of the learner where its config does not say."""


@dataclass(frozen=True)
class OfflineEvaluation:
    """What came of it."""

    plan: OfflinePlan
    config: Config
    labels: int
    steps: int
    complete: bool
    """False: it was stopped, and the last point is of the steps until then."""
    curve: list[Accuracies]
    """`step`, and test accuracy of teacher, student and twin."""

    @property
    def test(self) -> Accuracies:
        """At the end."""
        return self.curve[-1]

    def as_json(self) -> dict[str, Any]:
        """Everything, without times or places of this run."""
        tables = self.config.model_dump(mode="json", by_alias=True, include={*_TABLES, "schema_"})
        return {
            "streamlearn": __version__,
            "protocol": asdict(self.plan),
            "settings": {name: tables[name] for name in _TABLES},
            "complete": self.complete,
            "labels": self.labels,
            "steps": self.steps,
            "curve": self.curve,
        }


def evaluate_offline(
    config: Config, plan: OfflinePlan, stopping: threading.Event, *, progress: Progress = lambda *_: None
) -> OfflineEvaluation:
    """Learn until the last epoch is over or the event is set.

    Raises:
        ConfigError: the plan or a setting is wrong, they do not fit the data set, or it has no held-out part.
    """
    loaded = load(plan.dataset, limit=plan.limit)
    _check(plan, loaded)
    tables = fitting_tables(config, loaded, plan.seed)
    # All labels are to be used again and again: none may leave the memory.
    rows = max(plan.labels, config.labels.memory_rows)
    tables["labels"] = tables.get("labels", {}) | {"memory_rows": rows}
    settings = load_config(None, overrides=tables, environ={})
    dataset = loaded.fit(settings.schema_.build())
    learner, memory = make_learner(settings), ReplayBuffer(rows, settings.schema_.build(), settings.learn.seed)
    chosen = choose_labelled(dataset.y, plan.labels, plan.seed)
    for row in chosen.tolist():
        memory.add(Example(str(row), dataset.x[row], int(dataset.y[row])))
    batches = _Batches(dataset, memory, plan, fresh=settings.batch.fresh, labelled=settings.batch.labelled)
    curve: list[Accuracies] = []
    asked_at = {round(batches.total * n / plan.points) for n in range(1, plan.points + 1)}
    for batch in batches.take(wants_keys=learner.wants_keys):
        factor = learning_rate_factor(learner.step, batches.total, share=plan.rampdown)
        learner.learn(batch, learning_rate_factor=factor)
        progress("learning", learner.step, batches.total)
        if learner.step in asked_at or stopping.is_set():
            curve.append(_asked(learner, dataset, plan.seed))
        if stopping.is_set():
            break
    return OfflineEvaluation(plan, settings, len(chosen), learner.step, learner.step == batches.total, curve)


def _check(plan: OfflinePlan, dataset: Dataset) -> None:
    if dataset.test_y is None or not len(dataset.test_y):
        raise ConfigError(
            f"data set {dataset.name!r} has no held-out part, and offline that is all there is to tell: an .npz holds"
            " one as test_x and test_y"
        )
    if not len(dataset.classes) <= plan.labels <= len(dataset.y):
        bounds = f"{len(dataset.classes)}, one of each class, to {len(dataset.y)}, all samples"
        raise ConfigError(f"labels: wanted {bounds}, got {plan.labels}")
    for name, low, high in (("epochs", 1, MAX_STEPS // len(dataset.y)), ("points", 1, 10_000), ("rampdown", 0.0, 1.0)):
        if not low <= (value := getattr(plan, name)) <= high:
            raise ConfigError(f"{name}: wanted {low} to {high}, got {value!r:.80}")


def choose_labelled(y: Classes, count: int, seed: int) -> npt.NDArray[np.int64]:
    """Rows that are labelled: as many of each class as can be, in a random order."""
    order = np.random.default_rng((seed, _CHOICE)).permutation(len(y))
    # The n-th of its class comes before every n+1-th.
    turn_N = np.empty(len(y), np.int64)
    for class_index in np.unique(y):
        of_class = np.flatnonzero(y[order] == class_index)
        turn_N[of_class] = np.arange(len(of_class))
    return order[np.argsort(turn_N, kind="stable")[:count]]


def learning_rate_factor(done: int, total: int, *, share: float) -> float:
    """1, then exp(-12.5 x^2) while x goes from 0 to 1 over the last `share` of all steps."""
    length = share * total
    x = (done - (total - length)) / length if length > 0 else 0.0
    return math.exp(-_RAMPDOWN_POWER * max(0.0, x) ** 2)


class _Batches:
    """Fresh rows are all samples, labelled ones too, in another order in each epoch."""

    def __init__(self, dataset: Dataset, memory: ReplayBuffer, plan: OfflinePlan, *, fresh: int, labelled: int) -> None:
        self._dataset, self._memory, self._plan = dataset, memory, plan
        self._fresh, self._labelled = fresh, labelled
        self.total = plan.epochs * math.ceil(len(dataset.y) / fresh)
        """Steps."""

    def take(self, *, wants_keys: bool) -> Iterator[MicroBatch]:
        step, count = 0, len(self._dataset.y)
        for epoch in range(self._plan.epochs):
            order = np.random.default_rng((self._plan.seed, _ORDER, epoch)).permutation(count)
            for first in range(0, count, self._fresh):
                step += 1
                rows = order[first : first + self._fresh]
                yield self._make(rows, step, wants_keys=wants_keys, seen_before=epoch > 0)

    def _make(self, rows: npt.NDArray[np.int64], step: int, *, wants_keys: bool, seen_before: bool) -> MicroBatch:
        dataset, memory = self._dataset, self._memory
        labelled_x = np.zeros((self._labelled, *dataset.x.shape[1:]), dataset.x.dtype)
        labelled_y = np.full(self._labelled, UNLABELLED, np.int64)
        new_ids = memory.draw_into(labelled_x, labelled_y, step)
        keys = None
        if wants_keys:
            ids = [*map(str, rows.tolist()), *memory.drawn_ids]
            keys = np.array([sample_key(sample_id) for sample_id in ids], np.int64)
        fresh_x = dataset.x[rows]
        return MicroBatch(
            fresh_x, len(rows), labelled_x, labelled_y, self._labelled, new_ids, keys, seen_before=seen_before
        )


def _asked(learner: Learner, dataset: Dataset, seed: int) -> Accuracies:
    found = held_out(learner, dataset, (), ended_at=0, seed=seed)
    assert found is not None
    return {"step": learner.step, **{name: value for name, value in found.items() if name != "count"}}
