"""Can the scores be trusted? What was labelled, beside all that came.

A score is that of the labelled samples. It speaks for the others as far as labels are many, come soon, and fall on
samples like the rest: hence the share, the delay, and what the teacher said on arrival of both kinds.
Letters: B samples of a micro-batch, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from streamlearn.judge import scores
from streamlearn.judge.scores import Counts
from streamlearn.judge.window import Window, group_of, joined
from streamlearn.records import Array, Probabilities

ARRIVALS_PER_LABEL = 10
"""Arrivals that are remembered for each label that is: labels are few, and the arrivals are to cover their time."""
_QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}


class Traffic:
    """The last `window` scored labels, and the last `ARRIVALS_PER_LABEL` times as many arrivals.

    `classes` is C. Memory is of the order of the window; nothing is kept for each class.
    """

    def __init__(self, classes: int, window: int) -> None:
        assert classes >= 1, classes
        self._classes = classes
        self._arrivals = Window(
            ARRIVALS_PER_LABEL * window, {"class": np.int32, "confidence": np.float32, "labels_before": np.int64}
        )
        self._labels = Window(window, {"class": np.int32, "confidence": np.float32, "delay_s": np.float64})
        self._arrived = self._labelled = 0

    def arrived(self, probabilities_BC: Probabilities) -> None:
        """Samples that came, with the answers that they got on arrival."""
        assert probabilities_BC.ndim == 2, probabilities_BC.shape
        assert probabilities_BC.shape[1] == self._classes, probabilities_BC.shape
        self._arrivals.extend(probabilities_BC.argmax(axis=1), probabilities_BC.max(axis=1), self._labelled)
        self._arrived += len(probabilities_BC)

    def labelled(self, predicted_class: int, confidence: float, delay_s: float) -> None:
        """A label that scored a sample: what was answered on its arrival, and how long after it the label came."""
        assert 0 <= predicted_class < self._classes, predicted_class
        self._labels.append(predicted_class, confidence, delay_s)
        self._labelled += 1

    def report(self, named: int | None = None) -> dict[str, Any]:
        """Ready for JSON; None where nothing came yet. `named`: so many classes have a name, and can be answered.

        Returns:
            labelled_share: labels scored while the remembered arrivals came, to these arrivals, and the same of all
                since the beginning. A backlog of labels may bring the first above 1.
            delay_s: quantiles over the window of labels. Labels that are still to come are not in them.
            confidence_gap: mean confidence of the labelled samples minus that of all.
            class_mix_distance: total variation between the answers to labelled samples and to all, from 0 to 1;
                class_mix_by_chance: about what it is if labels fall on samples at random.
            class_entropy: of the answers to all, 0 (one class alone) to 1 (all classes alike).
        """
        arrivals, labels = self._arrivals.state(), self._labels.state()
        mix_C, labelled_mix_C = self._mix(arrivals["class"]), self._mix(labels["class"])
        labels_before = arrivals["labels_before"]
        recent = self._labelled - int(labels_before[0]) if len(labels_before) else 0
        confidence, labelled_confidence = _mean(arrivals["confidence"]), _mean(labels["confidence"])
        gap = None if confidence is None or labelled_confidence is None else labelled_confidence - confidence
        return {
            "arrived": self._arrived,
            "labelled": self._labelled,
            "labelled_share": {
                "windowed": scores.share(recent, len(labels_before)),
                "cumulative": scores.share(self._labelled, self._arrived),
            },
            "delay_s": _quantiles(labels["delay_s"]),
            "confidence": confidence,
            "confidence_gap": gap,
            "class_mix_distance": scores.total_variation(labelled_mix_C, mix_C),
            "class_mix_by_chance": scores.total_variation_by_chance(mix_C, len(labels["class"])),
            "class_entropy": scores.normalised_entropy(mix_C, named),
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

    def _mix(self, classes_N: Array) -> Counts:
        """How often each class was answered."""
        return np.bincount(classes_N, minlength=self._classes).astype(np.float64)


def _mean(values_N: Array) -> float | None:
    return float(values_N.astype(np.float64).mean()) if len(values_N) else None


def _quantiles(values_N: Array) -> dict[str, float | None]:
    if not len(values_N):
        return dict.fromkeys(_QUANTILES)
    found = np.quantile(values_N.astype(np.float64), list(_QUANTILES.values()))
    return dict(zip(_QUANTILES, found.tolist(), strict=True))
