"""Prequential scores: each prediction is made before its sample is learned, and scored when its label arrives.

Four predictors are compared on the same samples: teacher, student, and two baselines as they stood when the sample
arrived. `majority` is the class with most labels so far, `no_change` the class of the last label. A baseline without an
answer yet is not scored.

Each score has three forms: over the last `window` scored samples; faded, where each sample weighs `fading` times the
next one (Gama, Sebastião, Rodrigues 2013); and since the start.
Letters: W window, K networks, C classes, M bins of confidence.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np

from streamlearn.judge import scores
from streamlearn.judge.ranking import Ranking
from streamlearn.judge.scores import Counts
from streamlearn.judge.window import Window, group_of, joined
from streamlearn.records import Array, Probabilities

Network: TypeAlias = Literal["teacher", "student", "majority", "no_change"]
NETWORKS: tuple[Network, ...] = ("teacher", "student", "majority", "no_change")
FADING = 0.999
BINS = 15
"""Bins of confidence in the calibration error."""
TOP_K = 100
_NO_ANSWER = -1
_CLASS_COLUMNS: tuple[str, ...] = ("true", *NETWORKS)
_COST_COLUMNS: tuple[str, ...] = ("log_loss", "brier")
_BIN_SUMS: tuple[str, ...] = ("bin_counts", "bin_confidence", "bin_right")
"""By the teacher's confidence: its answers, the sum of their confidence, and the right ones."""
_LARGEST_WEIGHT = 2.0**300
"""Above it the faded sums are scaled down, by a power of two and so without rounding."""
_LEAST_FADING = 1e-100


@dataclass(frozen=True, slots=True)
class SpanScores:
    """Scores over one span of samples; those without a network's name are the teacher's. None where undefined."""

    count: float
    """Scored samples; in the faded form the sum of their weights."""
    accuracy: dict[Network, float | None]
    balanced_accuracy: float | None
    kappa: float | None
    kappa_m: float | None
    kappa_t: float | None
    log_loss: float | None
    brier: float | None
    ece: float | None


@dataclass(frozen=True, slots=True)
class ClassScores:
    """Scores of one class against all others, over the window; None where undefined."""

    class_index: int
    count: int
    """Samples of this class among those that `average_precision` is of."""
    average_precision: float | None
    """Area under the curve of precision and recall; by chance the share of the class."""
    precision: float | None
    """Of the answers of this class, the share that is right. Where the class has a threshold, at that threshold."""
    recall: float | None
    """Of the samples of this class, the share that was answered so."""
    precision_at_k: float | None
    """Of the k samples with the highest probability of this class, the share that is of this class."""
    recall_at_k: float | None
    """Of the samples of this class, the share that is among those k."""


@dataclass(frozen=True, slots=True)
class WindowScores(SpanScores):
    """Scores over the window, with what takes single samples."""

    interval: scores.Interval | None
    """95 % interval of the teacher's accuracy."""
    recall: list[float | None]
    """By class."""
    reliability: list[scores.ReliabilityBin]
    pr_auc: float | None
    """Mean of `average_precision` over the ranked classes that occurred."""
    top_k: int
    """k."""
    by_class: list[ClassScores]
    """Of the ranked classes."""


@dataclass(frozen=True, slots=True)
class PrequentialReport:
    """The three forms."""

    windowed: WindowScores
    faded: SpanScores
    cumulative: SpanScores


class _Tally:
    """Weighted sums over scored samples, from which every score follows.

    Lists of Python floats: to change one takes a third of the time of an array element.
    """

    def __init__(self, classes: int, bins: int) -> None:
        sizes = {
            **dict.fromkeys(("hits", "true", "predicted"), classes),
            **dict.fromkeys(_BIN_SUMS, bins),
            **dict.fromkeys(("right", "answered", "teacher_right_beside"), len(NETWORKS)),
            "costs": len(_COST_COLUMNS),
        }
        self.sums = {name: [0.0] * size for name, size in sizes.items()}

    def add(
        self, weight: float, true_class: int, answers_K: tuple[int, ...], bin_m: int, confidence: float, *costs: float
    ) -> None:
        """Add a sample. `teacher_right_beside` counts the teacher's right answers where each network had an answer."""
        sums = self.sums
        right, answered, beside = sums["right"], sums["answered"], sums["teacher_right_beside"]
        hit = weight if answers_K[0] == true_class else 0.0
        sums["hits"][true_class] += hit
        sums["true"][true_class] += weight
        sums["predicted"][answers_K[0]] += weight
        sums["bin_counts"][bin_m] += weight
        sums["bin_confidence"][bin_m] += weight * confidence
        sums["bin_right"][bin_m] += hit
        for k, answer in enumerate(answers_K):
            if answer != _NO_ANSWER:
                answered[k] += weight
                beside[k] += hit
                if answer == true_class:
                    right[k] += weight
        for n, cost in enumerate(costs):
            sums["costs"][n] += weight * cost

    def scale(self, factor: float) -> None:
        """Multiply every sum by a factor."""
        self.sums = {name: [value * factor for value in values] for name, values in self.sums.items()}

    def state(self) -> dict[str, Counts]:
        """Copies of the sums by name."""
        return {name: np.array(values, np.float64) for name, values in self.sums.items()}

    def load(self, state: Mapping[str, Array]) -> None:
        """Restore what `state` saved. New classes have no counts."""
        for name, values in self.sums.items():
            saved, size = state[name].tolist(), len(values)
            assert len(saved) <= size, (name, len(saved), size)
            self.sums[name] = saved + [0.0] * (size - len(saved))


class Prequential:
    """Scores of one stream of labelled predictions, in memory of the order of W K + C, for K ranked classes.

    Args:
        classes: C.
        window: W, scored samples in the windowed scores.
        fading: weight of a sample relative to the next one; 1 forgets nothing.
        bins: M.
        ranked: indices of the classes in `WindowScores.by_class`; default all.
        top_k: k of the precision and recall at the top k.
    """

    def __init__(
        self,
        classes: int,
        window: int,
        *,
        fading: float = FADING,
        bins: int = BINS,
        ranked: Sequence[int] | None = None,
        top_k: int = TOP_K,
    ) -> None:
        assert classes >= 1, classes
        assert _LEAST_FADING <= fading <= 1.0, fading
        assert bins >= 1, bins
        self._classes, self._fading, self._bins = classes, fading, bins
        types = {
            **dict.fromkeys(_CLASS_COLUMNS, np.int32),
            "confidence": np.float32,
            **dict.fromkeys(_COST_COLUMNS, np.float64),
        }
        self._window = Window(window, types)
        self._ranking = Ranking(range(classes) if ranked is None else ranked, window, top_k=top_k)
        self._top_k = top_k
        self._faded, self._all = _Tally(classes, bins), _Tally(classes, bins)
        self._weight = 1.0
        self.scored = 0
        """Samples scored since the start."""

    def update(
        self,
        *,
        true_class: int,
        teacher_class: int,
        student_class: int,
        teacher_probabilities_C: Probabilities,
        majority_class: int | None = None,
        no_change_class: int | None = None,
    ) -> None:
        """Score the predictions of one sample against its label."""
        assert 0 <= true_class < self._classes, true_class
        assert 0 <= teacher_class < self._classes, teacher_class
        assert len(teacher_probabilities_C) == self._classes, len(teacher_probabilities_C)
        probability_of_true = float(teacher_probabilities_C[true_class])
        confidence = float(teacher_probabilities_C[teacher_class])
        sum_of_squares = float(teacher_probabilities_C.dot(teacher_probabilities_C))
        majority = _NO_ANSWER if majority_class is None else majority_class
        no_change = _NO_ANSWER if no_change_class is None else no_change_class
        answers_K = (teacher_class, student_class, majority, no_change)
        costs = (scores.log_loss(probability_of_true), scores.brier(probability_of_true, sum_of_squares))
        self._window.append(true_class, *answers_K, confidence, *costs)
        self._ranking.update(true_class, teacher_probabilities_C)
        bin_m = scores.bin_of(confidence, self._bins)
        self._all.add(1.0, true_class, answers_K, bin_m, confidence, *costs)
        # Instead of fading all earlier samples, each sample weighs more than the one before it.
        self._weight /= self._fading
        if self._weight > _LARGEST_WEIGHT:
            self._weight, exponent = math.frexp(self._weight)
            self._faded.scale(2.0**-exponent)
        self._faded.add(self._weight, true_class, answers_K, bin_m, confidence, *costs)
        self.scored += 1

    def windowed(self, network: Network) -> float | None:
        """Accuracy over the window; None before the first answer. In time of the order of W."""
        answers_W = self._window.column(network)
        answered = float((answers_W != _NO_ANSWER).sum())
        return scores.share(float((answers_W == self._window.column("true")).sum()), answered)

    def report(self) -> PrequentialReport:
        """Every score, in time of the order of W K + C."""
        held, sums, faded = len(self._window), self._sums_of_window(), self._faded.state()
        by_class = self._by_class(sums)
        areas = [found.average_precision for found in by_class if found.average_precision is not None]
        return PrequentialReport(
            windowed=WindowScores(
                **_scores(sums, held),
                interval=scores.wilson(float(sums["right"][0]), held),
                recall=scores.recall_per_class(sums["hits"], sums["true"]),
                reliability=scores.reliability(*(sums[name] for name in _BIN_SUMS)),
                pr_auc=scores.share(sum(areas), len(areas)),
                top_k=self._top_k,
                by_class=by_class,
            ),
            faded=SpanScores(**_scores(faded, float(faded["answered"][0]) / self._weight)),
            cumulative=SpanScores(**_scores(self._all.state(), self.scored)),
        )

    def state(self) -> dict[str, Array]:
        """Copies of all state; the window oldest first."""
        return joined(
            {
                "window": self._window.state(),
                "ranking": self._ranking.state(),
                "faded": self._faded.state(),
                "cumulative": self._all.state(),
                "count": {"scored": np.array([self.scored], np.int64), "weight": np.array([self._weight], np.float64)},
            }
        )

    def load(self, state: Mapping[str, Array]) -> None:
        """Restore what `state` saved; of a longer window the newest rows."""
        self._window.load(group_of(state, "window"))
        self._ranking.load(group_of(state, "ranking"))
        self._faded.load(group_of(state, "faded"))
        self._all.load(group_of(state, "cumulative"))
        self.scored = int(state["count.scored"].item())
        self._weight = float(state["count.weight"].item())

    def _by_class(self, sums: Mapping[str, Counts]) -> list[ClassScores]:
        hits_C, true_C, predicted_C = (sums[name].tolist() for name in ("hits", "true", "predicted"))
        return [
            ClassScores(
                class_index=(c := found.class_index),
                count=found.count,
                average_precision=found.average_precision,
                precision=scores.share(hits_C[c], predicted_C[c]),
                recall=scores.share(hits_C[c], true_C[c]),
                precision_at_k=None if found.hits_at_k is None else found.hits_at_k / self._top_k,
                recall_at_k=None if found.hits_at_k is None else scores.share(found.hits_at_k, found.count),
            )
            for found in self._ranking.report()
        ]

    def _sums_of_window(self) -> dict[str, Counts]:
        """The sums of a tally over the samples in the window."""
        columns, classes, bins = self._window.state(), self._classes, self._bins
        true_W, answers_KW = columns["true"], np.stack([columns[network] for network in NETWORKS])
        right_KW, answered_KW = answers_KW == true_W, answers_KW != _NO_ANSWER
        confidence_W = columns["confidence"].astype(np.float64)
        bins_W = scores.bins_of(confidence_W, bins)
        sums = {
            "hits": np.bincount(true_W[right_KW[0]], minlength=classes),
            "true": np.bincount(true_W, minlength=classes),
            "predicted": np.bincount(answers_KW[0], minlength=classes),
            "bin_counts": np.bincount(bins_W, minlength=bins),
            "bin_confidence": np.bincount(bins_W, confidence_W, minlength=bins),
            "bin_right": np.bincount(bins_W[right_KW[0]], minlength=bins),
            "right": right_KW.sum(axis=1),
            "answered": answered_KW.sum(axis=1),
            "teacher_right_beside": (right_KW[0] & answered_KW).sum(axis=1),
            "costs": np.array([columns[name].sum() for name in _COST_COLUMNS]),
        }
        return {name: np.asarray(values, np.float64) for name, values in sums.items()}


def _scores(sums: Mapping[str, Counts], count: float) -> dict[str, Any]:
    """The fields of `SpanScores`, from the sums of a tally over samples of total weight `count`."""
    right_K, answered_K, beside_K = (sums[name].tolist() for name in ("right", "answered", "teacher_right_beside"))
    accuracy = {
        network: scores.share(right, answered)
        for network, right, answered in zip(NETWORKS, right_K, answered_K, strict=True)
    }
    # A baseline has no answer before the first label: the teacher is compared on the samples that it answered.
    skill = {
        network: scores.skill(scores.share(beside, answered), accuracy[network])
        for network, beside, answered in zip(NETWORKS, beside_K, answered_K, strict=True)
    }
    log_loss, brier = (scores.share(cost, answered_K[0]) for cost in sums["costs"].tolist())
    return {
        "count": count,
        "accuracy": accuracy,
        "balanced_accuracy": scores.balanced_accuracy(sums["hits"], sums["true"]),
        "kappa": scores.kappa(sums["hits"], sums["true"], sums["predicted"]),
        "kappa_m": skill["majority"],
        "kappa_t": skill["no_change"],
        "log_loss": log_loss,
        "brier": brier,
        "ece": scores.calibration_error(*(sums[name] for name in _BIN_SUMS)),
    }
