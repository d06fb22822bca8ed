"""Can the scores be trusted? What was labelled, beside all that came.

A score is that of the labelled samples. It speaks for the others as far as labels are many, come soon, and fall on
samples like the rest: hence the share, the delay, and what was answered on arrival of both kinds.

A more confident model does not make labelled samples easier, so each labelled sample is compared with those that came
at about the same time and got their answer from the same model: versions in one block of `SAME_MODEL_STEPS` steps count
as one. Where clients are answered by a pinned version and other samples by the learner, or where the model has changed
since, each label is held against its own kind. Labels whose block has left the window of arrivals are not compared.

Letters: B samples of a micro-batch, C classes, A arrivals, L labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from streamlearn.judge import scores
from streamlearn.judge.scores import Counts
from streamlearn.judge.window import Window, group_of, joined
from streamlearn.records import UNLABELLED, Array, Prediction

ARRIVALS_PER_LABEL = 10
"""Arrivals that are remembered for each label that is: labels are few, and the arrivals are to cover their time."""
SAME_MODEL_STEPS = 16
"""Within so few steps a model hardly changes, and enough samples arrive to compare a label with."""
_QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}


class SelectionBias:
    """The last `window` scored labels, and the last `ARRIVALS_PER_LABEL` times as many arrivals.

    `classes` is C. Memory is of the order of the window; nothing is kept for each class.
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
        """Samples that came, with the answers that they got: those by which labels will score them."""
        classes_B = np.array([answer.class_index for answer in answers_B], np.int32)
        confidences_B = np.array([answer.probabilities_C.max() for answer in answers_B], np.float32)
        versions_B = np.array([answer.model_version for answer in answers_B], np.int64)
        assert UNLABELLED not in classes_B, "a sample without an answer"
        self._arrivals.extend(classes_B, confidences_B, versions_B, self._labelled)
        self._arrived += len(answers_B)

    def labelled(self, answer: Prediction, delay_s: float) -> None:
        """A label that scored a sample: what was answered on its arrival, and how long after it the label came."""
        assert 0 <= answer.class_index < self._classes, answer.class_index
        confidence = float(answer.probabilities_C.max())
        self._labels.append(answer.class_index, confidence, answer.model_version, delay_s)
        self._labelled += 1

    def report(self, named: int | None = None) -> dict[str, Any]:
        """Ready for JSON; None where nothing came yet. `named`: so many classes have a name, and can be answered.

        Returns:
            labelled_share: labels scored while the remembered arrivals came, to these arrivals, and the same of all
                since the beginning. A backlog of labels may bring the first above 1.
            delay_s: quantiles over the window of labels. Labels that are still to come are not in them.
            confidence, class_entropy: mean confidence of the answers to all; how even their classes are, 0 (one class
                alone) to 1 (all classes alike).
            compared: labels whose answer has a model that answered remembered arrivals too. Of them alone are
            confidence_gap: their mean confidence, minus that of arrivals with the same models;
            class_mix_distance: total variation between the answers to both, from 0 to 1;
            class_mix_by_chance: about what it is if labels fall on samples at random.
        """
        arrivals, labels = self._arrivals.state(), self._labels.state()
        labels_before = arrivals["labels_before"]
        recent = self._labelled - int(labels_before[0]) if len(labels_before) else 0
        compared = _compared(arrivals, labels)
        mix_C = self._mix(arrivals["class"], compared.weights_A)
        return {
            "arrived": self._arrived,
            "labelled": self._labelled,
            "labelled_share": {
                "windowed": scores.share(recent, len(labels_before)),
                "cumulative": scores.share(self._labelled, self._arrived),
            },
            "delay_s": _quantiles(labels["delay_s"]),
            "confidence": _mean(arrivals["confidence"]),
            "compared": int(compared.labels_L.sum()),
            "confidence_gap": _gap(arrivals["confidence"], labels["confidence"], compared),
            "class_mix_distance": scores.total_variation(self._mix(labels["class"][compared.labels_L]), mix_C),
            "class_mix_by_chance": scores.total_variation_by_chance(mix_C, int(compared.labels_L.sum())),
            "class_entropy": scores.normalised_entropy(self._mix(arrivals["class"]), named),
        }

    def state(self) -> dict[str, Array]:
        """All of it, as copies; the windows oldest first."""
        totals = {"arrived": np.array([self._arrived], np.int64), "labelled": np.array([self._labelled], np.int64)}
        return joined({"arrivals": self._arrivals.state(), "labels": self._labels.state(), "totals": totals})

    def load(self, state: Mapping[str, Array]) -> None:
        """Become what `state` saved; of longer windows the newest stay."""
        self._arrivals.load(group_of(state, "arrivals"))
        self._labels.load(group_of(state, "labels"))
        self._arrived = int(state["totals.arrived"].item())
        self._labelled = int(state["totals.labelled"].item())

    def _mix(self, classes_N: Array, weights_N: Array | None = None) -> Counts:
        """How often each class was answered."""
        return np.bincount(classes_N, weights_N, minlength=self._classes).astype(np.float64)


class _Compared(NamedTuple):
    """Which labels are compared with which arrivals."""

    labels_L: npt.NDArray[np.bool_]
    weights_A: npt.NDArray[np.float64]
    """Of the arrivals, so that each model has as much weight among them as among the compared labels."""


def _compared(arrivals: Mapping[str, Array], labels: Mapping[str, Array]) -> _Compared:
    models_A, models_L = arrivals["version"] // SAME_MODEL_STEPS, labels["version"] // SAME_MODEL_STEPS
    models_M, model_A, count_M = np.unique(models_A, return_inverse=True, return_counts=True)
    labels_L = np.isin(models_L, models_M)
    labels_M = np.bincount(np.searchsorted(models_M, models_L[labels_L]), minlength=len(models_M))
    return _Compared(labels_L, (labels_M / count_M)[model_A])


def _gap(confidences_A: Array, confidences_L: Array, compared: _Compared) -> float | None:
    """Mean confidence of labels minus that of arrivals."""
    labelled, total = _mean(confidences_L[compared.labels_L]), float(compared.weights_A.sum())
    if labelled is None:
        return None
    return labelled - float(confidences_A.astype(np.float64) @ compared.weights_A) / total


def _mean(values_N: Array) -> float | None:
    return float(values_N.astype(np.float64).mean()) if len(values_N) else None


def _quantiles(values_N: Array) -> dict[str, float | None]:
    if not len(values_N):
        return dict.fromkeys(_QUANTILES)
    found = np.quantile(values_N.astype(np.float64), list(_QUANTILES.values()))
    return dict(zip(_QUANTILES, found.tolist(), strict=True))
