"""`streamlearn evaluate --against refit`: the same stream through what a user would do instead.

Each rival predicts every sample before its label, in blocks of a micro-batch, and is fitted again, from scratch and to
convergence, on all labels so far: after each block in which they have grown by `GROWTH`. So a rival sees the same
samples, the same choice of labels and the same delays as the learner. Inputs are standardised by all samples so far.
Self-training and label spreading also get the newest unlabelled samples. The trees of river learn one label at a time.

scikit-learn and river are in the extra `lab`.
"""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from streamlearn.errors import ConfigError
from streamlearn.judge.scores import average_precision
from streamlearn.lab.datasets import Dataset
from streamlearn.lab.held_out import Progress, no_progress
from streamlearn.lab.stream import Stream, StreamPlan
from streamlearn.log.codec import Codec
from streamlearn.records import Array, NewRecord, Position, Record, Schema

GROWTH = 1.05
"""A rival is fitted again once its labels have grown by this factor."""
UNLABELLED_ROWS = 1000
"""Of the newest samples, for self-training and label spreading."""
_SMALLEST = 1e-7
"""Least probability in the log loss."""

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class RivalScores:
    """Scores of one way to answer the stream, over all samples and over its last quarter."""

    name: str
    accuracy: float
    last_accuracy: float
    pr_auc: float | None
    """Mean over classes, of the last quarter; of the learner, over its last window."""
    log_loss: float | None
    """Over all samples, in nats."""
    cpu_s: float
    fits: int


class _Rival(Protocol):
    """Answers rows, and learns labelled ones."""

    fits: int

    def answer(self, x_BD: Floats) -> Floats:
        """Probabilities (B, C)."""
        ...

    def learn(self, x_ND: Floats, y_N: Ints, new: int, unlabelled_UD: Floats) -> None:
        """All labelled rows so far, the last `new` of them for the first time."""
        ...


class _Refitted:
    """A classifier of scikit-learn, fitted again as labels come."""

    def __init__(self, make: Callable[[int], Any], classes: int, *, semi_supervised: bool = False) -> None:
        """`make` gets the number of labelled rows."""
        self._make, self._classes, self._semi = make, classes, semi_supervised
        self._model: Any = None
        self._fitted_on, self.fits = 0, 0
        self._only: int | None = None

    def answer(self, x_BD: Floats) -> Floats:
        probs_BC = np.full((len(x_BD), self._classes), 1.0 / self._classes)
        if self._model is not None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of label spreading, for rows far from all others
                found = self._model.predict_proba(x_BD)
            probs_BC = np.zeros_like(probs_BC)
            probs_BC[:, self._model.classes_] = np.nan_to_num(found)
        elif self._only is not None:
            probs_BC[:] = np.eye(self._classes)[self._only]
        return probs_BC

    def learn(self, x_ND: Floats, y_N: Ints, new: int, unlabelled_UD: Floats) -> None:  # noqa: ARG002
        if len(y_N) < max(self._fitted_on * GROWTH, self._fitted_on + 1):
            return
        if len(np.unique(y_N)) < 2:
            self._only = int(y_N[0])
            return
        self._fitted_on, self.fits = len(y_N), self.fits + 1
        model = self._make(len(y_N))
        if self._semi:
            x_ND = np.concatenate((x_ND, unlabelled_UD))
            y_N = np.concatenate((y_N, np.full(len(unlabelled_UD), -1)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of convergence, with few labels
            self._model = model.fit(x_ND, y_N)


class _Incremental:
    """A tree of river, one label at a time."""

    def __init__(self, model: Any, classes: int) -> None:
        self._model, self._classes, self.fits = model, classes, 0

    def answer(self, x_BD: Floats) -> Floats:
        probs_BC = np.full((len(x_BD), self._classes), 1.0 / self._classes)
        for n, row in enumerate(x_BD.tolist()):
            if found := self._model.predict_proba_one(dict(enumerate(row))):
                probs_BC[n] = [found.get(c, 0.0) for c in range(self._classes)]
        return probs_BC

    def learn(self, x_ND: Floats, y_N: Ints, new: int, unlabelled_UD: Floats) -> None:  # noqa: ARG002
        for row, label in zip(x_ND[len(x_ND) - new :].tolist(), y_N[len(y_N) - new :].tolist(), strict=True):
            self._model.learn_one(dict(enumerate(row)), label)
            self.fits += 1


def make_rivals(classes: int, seed: int) -> Mapping[str, _Rival]:
    """All rivals, by name.

    Raises:
        ConfigError: scikit-learn or river is missing.
    """
    try:
        from river import forest, tree  # noqa: PLC0415 - an extra, and slow to import
        from sklearn.ensemble import (  # noqa: PLC0415
            ExtraTreesClassifier,
            HistGradientBoostingClassifier,
            RandomForestClassifier,
        )
        from sklearn.linear_model import LogisticRegression  # noqa: PLC0415
        from sklearn.neighbors import KNeighborsClassifier  # noqa: PLC0415
        from sklearn.neural_network import MLPClassifier  # noqa: PLC0415
        from sklearn.semi_supervised import LabelSpreading, SelfTrainingClassifier  # noqa: PLC0415
        from sklearn.svm import SVC  # noqa: PLC0415
    except ImportError as error:
        raise ConfigError(f"--against refit needs the extra lab: pip install 'streamlearn[lab]' ({error})") from error

    def logistic() -> Any:
        return LogisticRegression(max_iter=1000)

    made: dict[str, Callable[[int], Any]] = {
        "gradient boosting": lambda _: HistGradientBoostingClassifier(min_samples_leaf=5, random_state=seed),
        "random forest": lambda _: RandomForestClassifier(200, random_state=seed),
        "extra trees": lambda _: ExtraTreesClassifier(200, random_state=seed),
        "SVM": lambda _: _WithShares(SVC(C=10.0, random_state=seed)),
        "logistic regression": lambda _: logistic(),
        "MLP": lambda _: MLPClassifier((100,), max_iter=500, random_state=seed),
        "nearest neighbours": lambda rows: KNeighborsClassifier(5 if rows >= 10 * classes else 1, weights="distance"),
    }
    semi: dict[str, Callable[[int], Any]] = {
        "self-training": lambda _: SelfTrainingClassifier(logistic(), threshold=0.9),
        "label spreading": lambda _: LabelSpreading(kernel="knn", n_neighbors=7, max_iter=50),
    }
    rivals: dict[str, _Rival] = {name: _Refitted(make, classes) for name, make in made.items()}
    rivals |= {name: _Refitted(make, classes, semi_supervised=True) for name, make in semi.items()}
    rivals["adaptive random forest"] = _Incremental(forest.ARFClassifier(n_models=10, seed=seed), classes)
    rivals["Hoeffding tree"] = _Incremental(tree.HoeffdingTreeClassifier(), classes)
    return rivals


class _WithShares:
    """An SVM whose decision values become shares by a softmax: its class is unchanged, and no folds are needed."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def fit(self, x_ND: Floats, y_N: Ints) -> _WithShares:
        self._model.fit(x_ND, y_N)
        self.classes_ = self._model.classes_
        return self

    def predict_proba(self, x_BD: Floats) -> Floats:
        values = self._model.decision_function(x_BD)
        values_BC = np.stack((-values, values), axis=1) if values.ndim == 1 else values
        shares_BC = np.exp(values_BC - values_BC.max(axis=1, keepdims=True))
        shares_BC /= shares_BC.sum(axis=1, keepdims=True)
        return np.asarray(shares_BC, np.float64)


def refit(
    dataset: Dataset,
    plan: StreamPlan,
    schema: Schema,
    stopping: threading.Event,
    *,
    rate: float,
    block: int,
    progress: Progress = no_progress,
    only: Sequence[str] = (),
) -> list[RivalScores]:
    """Scores of all rivals on the stream of `plan`, the best of the last quarter first; empty if it was stopped.

    `schema` is the learner's; `block` the number of samples of a block; `only` the names of the rivals to run.

    Raises:
        ConfigError: a library is missing, or the rows have categories, which the rivals would take as numbers.
    """
    if any(column.kind == "category" for column in schema.columns):
        raise ConfigError("--against refit takes arrays of numbers or images; these records have categories")
    rivals = {
        name: rival for name, rival in make_rivals(schema.capacity, plan.seed).items() if not only or name in only
    }
    told = {name: _Answers() for name in rivals}
    codec, events, total = Codec(schema), iter(Stream(plan, rate=rate)), len(dataset.y) * plan.passes
    waiting: dict[str, Array] = {}
    labelled_x: list[Floats] = []
    labelled_y: list[int] = []
    recent: list[Floats] = []
    moments = _Moments()
    done = 0
    while not stopping.is_set():
        samples, labels = _next_block(events, codec, block)
        if not samples:
            break
        x_BD = np.stack([np.asarray(sample.x, np.float64).ravel() for sample in samples])
        truth_B = np.array([-1 if sample.true_label is None else sample.true_label for sample in samples])
        moments.add(x_BD)
        waiting |= {sample.sample_id: sample.x for sample in samples}
        recent = [*recent, *x_BD][-UNLABELLED_ROWS:]
        for label in labels:
            labelled_x.append(np.asarray(waiting.pop(label.sample_id), np.float64).ravel())
            labelled_y.append(label.class_index)
        block_BD, unlabelled_UD = moments.standard(x_BD), moments.standard(np.stack(recent))
        known_ND = moments.standard(np.stack(labelled_x)) if labels else block_BD[:0]
        for name, rival in rivals.items():
            began_s = time.process_time()
            told[name].add(rival.answer(block_BD), truth_B)
            if labels:
                rival.learn(known_ND, np.array(labelled_y), len(labels), unlabelled_UD)
            told[name].cpu_s += time.process_time() - began_s
        done += len(samples)
        progress("refitting rivals", done, total)
    if stopping.is_set():
        return []  # a part of the stream compares with nothing
    found = [told[name].scores(name, rivals[name].fits) for name in rivals]
    return sorted(found, key=lambda scores: -scores.last_accuracy)


class _Moments:
    """Mean and deviation of each feature over all rows so far."""

    def __init__(self) -> None:
        self._count, self._sum, self._squares = 0, 0.0 * np.zeros(()), 0.0 * np.zeros(())

    def add(self, x_BD: Floats) -> None:
        self._count += len(x_BD)
        self._sum = self._sum + x_BD.sum(axis=0)
        self._squares = self._squares + np.square(x_BD).sum(axis=0)

    def standard(self, x_BD: Floats) -> Floats:
        mean = self._sum / self._count
        deviation = np.sqrt(np.maximum(self._squares / self._count - np.square(mean), 0.0))
        return (x_BD - mean) / np.where(deviation > 1e-9, deviation, 1.0)


class _Answers:
    """What a rival answered, and what was right."""

    def __init__(self) -> None:
        self._probs: list[npt.NDArray[np.float32]] = []
        self._truth: list[Ints] = []
        self.cpu_s = 0.0

    def add(self, probs_BC: Floats, truth_B: Ints) -> None:
        self._probs.append(probs_BC[truth_B >= 0].astype(np.float32))
        self._truth.append(truth_B[truth_B >= 0])

    def scores(self, name: str, fits: int) -> RivalScores:
        probs_NC, truth_N = np.concatenate(self._probs), np.concatenate(self._truth)
        right_N = probs_NC.argmax(axis=1) == truth_N
        last = slice(len(truth_N) * 3 // 4, None)
        found = (average_precision(truth_N[last] == c, probs_NC[last, c]) for c in range(probs_NC.shape[1]))
        areas = [area for area in found if area is not None]
        losses_N = -np.log(np.maximum(probs_NC[np.arange(len(truth_N)), truth_N], _SMALLEST))
        return RivalScores(
            name=name,
            accuracy=float(right_N.mean()),
            last_accuracy=float(right_N[last].mean()),
            pr_auc=float(np.mean(areas)) if areas else None,
            log_loss=float(losses_N.mean()),
            cpu_s=round(self.cpu_s, 2),
            fits=fits,
        )


def _next_block(events: Any, codec: Codec, block: int) -> tuple[list[Any], list[Any]]:
    """The next samples, and the labels that come among them and right after them."""
    samples: list[Any] = []
    labels: list[Any] = []
    for kind, new in events:
        if kind == "sample":
            samples.append(codec.decode_sample(_record("samples", len(samples), new)))
        else:
            labels.append(codec.labels.decode(_record("labels", len(labels), new)))
        if len(samples) == block:
            break
    return samples, labels


def _record(topic: str, offset: int, new: NewRecord) -> Record:
    return Record(Position(topic, 0, offset), new.timestamp_ms or 0, new.key, new.value, new.headers)
