"""Selection bias: do the labelled samples look like all samples?

A score is that of the labelled samples. It holds for the others only if there are many labels, they arrive soon, and
they fall on samples like the rest. So this module reports the labelled share, the delay, and how the first predictions
of labelled samples differ from those of all.

A more confident model does not make labelled samples easier. So each labelled sample is compared with arrivals of about
the same time that were predicted by the same model, where versions in one block of `SAME_MODEL_STEPS` steps count as
one model. This also compares like with like where a pinned version answers clients, and after the model has changed.
Labels whose block has left the window of arrivals are not compared.

Letters: B samples of a micro-batch, C classes, A arrivals, L labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from streamlearn.judge import scores
from streamlearn.judge.scores import Counts
from streamlearn.judge.window import Window, group_of, joined
from streamlearn.records import UNLABELLED, Array, Prediction

ARRIVALS_PER_LABEL = 10
"""Remembered arrivals for each remembered label: labels are few, and the arrivals must cover their time."""
SAME_MODEL_STEPS = 16
"""Few enough that the model hardly changes, many enough that there are arrivals to compare a label with."""


@dataclass(frozen=True, slots=True)
class LabelledShare:
    """Scored labels as a share of arrivals; None before the first arrival."""

    windowed: float | None
    """Labels scored while the remembered arrivals came, as a share of these. Above 1 after a backlog of labels."""
    cumulative: float | None
    """Since the start."""


@dataclass(frozen=True, slots=True)
class Quantiles:
    """Of the values in a window; None while it is empty."""

    p50: float | None = None
    p90: float | None = None
    p99: float | None = None
    max: float | None = None


@dataclass(frozen=True, slots=True)
class SelectionReport:
    """Labelled samples against all; None where there is nothing to compare yet."""

    arrived: int
    labelled: int
    labelled_share: LabelledShare
    delay_s: Quantiles
    """From sample to label, over the window of labels. Labels that are still to come are not included."""
    confidence: float | None
    """Mean over the arrivals."""
    compared: int
    """Labels whose prediction is by a model that also predicted remembered arrivals; of these the next three."""
    confidence_gap: float | None
    """Mean confidence of the labelled samples minus that of the arrivals of the same models."""
    class_mix_distance: float | None
    """Total variation between the predicted classes of both, from 0 to 1."""
    class_mix_by_chance: float | None
    """Its approximate value if labels fall on samples at random."""
    class_entropy: float | None
    """How even the predicted classes of the arrivals are: 0 for one class, 1 for all classes alike."""


class SelectionBias:
    """The last `window` scored labels, and the last `ARRIVALS_PER_LABEL` times as many arrivals.

    `classes` is C. Memory is of the order of the window; nothing is kept per class.
    """

    def __init__(self, classes: int, window: int) -> None:
        assert classes >= 1, classes
        self._classes = classes
        self._arrivals = Window(
            ARRIVALS_PER_LABEL * window,
            {"class": np.int32, "confidence": np.float32, "version": np.int64, "labels_before": np.int64},
        )
        self._labels = Window(
            window, {"class": np.int32, "confidence": np.float32, "version": np.int64, "delay_s": np.float64}
        )
        self._arrived = self._labelled = 0

    def arrived(self, answers_B: Sequence[Prediction]) -> None:
        """Add samples that arrived, by their first predictions: those that labels will score."""
        classes_B = np.array([answer.class_index for answer in answers_B], np.int32)
        confidences_B = np.array([answer.probabilities_C.max() for answer in answers_B], np.float32)
        versions_B = np.array([answer.model_version for answer in answers_B], np.int64)
        assert UNLABELLED not in classes_B, "a sample without an answer"
        self._arrivals.extend(classes_B, confidences_B, versions_B, self._labelled)
        self._arrived += len(answers_B)

    def labelled(self, answer: Prediction, delay_s: float) -> None:
        """Add a label that scored a sample, by the first prediction, and the seconds from sample to label."""
        assert 0 <= answer.class_index < self._classes, answer.class_index
        confidence = float(answer.probabilities_C.max())
        self._labels.append(answer.class_index, confidence, answer.model_version, delay_s)
        self._labelled += 1

    def report(self, named: int | None = None) -> SelectionReport:
        """The comparison now. `named`: number of classes that have a name; default all."""
        arrivals, labels = self._arrivals.state(), self._labels.state()
        labels_before = arrivals["labels_before"]
        recent = self._labelled - int(labels_before[0]) if len(labels_before) else 0
        compared_L, weights_A = _compared(arrivals, labels)
        compared, mix_C = int(compared_L.sum()), self._mix(arrivals["class"], weights_A)
        return SelectionReport(
            arrived=self._arrived,
            labelled=self._labelled,
            labelled_share=LabelledShare(
                windowed=scores.share(recent, len(labels_before)),
                cumulative=scores.share(self._labelled, self._arrived),
            ),
            delay_s=_quantiles(labels["delay_s"]),
            confidence=_mean(arrivals["confidence"]),
            compared=compared,
            confidence_gap=_gap(arrivals["confidence"], weights_A, labels["confidence"][compared_L]),
            class_mix_distance=scores.total_variation(self._mix(labels["class"][compared_L]), mix_C),
            class_mix_by_chance=scores.total_variation_by_chance(mix_C, compared),
            class_entropy=scores.normalised_entropy(self._mix(arrivals["class"]), named),
        )

    def state(self) -> dict[str, Array]:
        """Copies of all state; the windows oldest first."""
        totals = {"arrived": np.array([self._arrived], np.int64), "labelled": np.array([self._labelled], np.int64)}
        return joined({"arrivals": self._arrivals.state(), "labels": self._labels.state(), "totals": totals})

    def load(self, state: Mapping[str, Array]) -> None:
        """Restore what `state` saved; of longer windows the newest rows."""
        self._arrivals.load(group_of(state, "arrivals"))
        self._labels.load(group_of(state, "labels"))
        self._arrived = int(state["totals.arrived"].item())
        self._labelled = int(state["totals.labelled"].item())

    def _mix(self, classes_N: Array, weights_N: Array | None = None) -> Counts:
        """Weight of each predicted class."""
        return np.bincount(classes_N, weights_N, minlength=self._classes).astype(np.float64)


def _compared(
    arrivals: Mapping[str, Array], labels: Mapping[str, Array]
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.float64]]:
    """Which labels are compared with arrivals, and the weights of these.

    Each model has the same weight among the arrivals as among the compared labels.
    """
    models_A, models_L = arrivals["version"] // SAME_MODEL_STEPS, labels["version"] // SAME_MODEL_STEPS
    models_M, model_A, count_M = np.unique(models_A, return_inverse=True, return_counts=True)
    labels_L = np.isin(models_L, models_M)
    labels_M = np.bincount(np.searchsorted(models_M, models_L[labels_L]), minlength=len(models_M))
    return labels_L, (labels_M / count_M)[model_A]


def _gap(confidences_A: Array, weights_A: npt.NDArray[np.float64], confidences_L: Array) -> float | None:
    """Mean confidence of the compared labels minus that of arrivals."""
    labelled = _mean(confidences_L)
    if labelled is None:
        return None
    return labelled - float(confidences_A.astype(np.float64) @ weights_A) / float(weights_A.sum())


def _mean(values_N: Array) -> float | None:
    return float(values_N.astype(np.float64).mean()) if len(values_N) else None


def _quantiles(values_N: Array) -> Quantiles:
    if not len(values_N):
        return Quantiles()
    return Quantiles(*np.quantile(values_N.astype(np.float64), [0.5, 0.9, 0.99, 1.0]).tolist())
