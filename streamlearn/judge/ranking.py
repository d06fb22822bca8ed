"""Ranking scores of single classes, each against all others, over the last scored samples.

Accuracy hardly sees a class of one sample in a hundred, and a threshold decides where its errors fall. So these scores
look at the order of the probabilities: PR-AUC over all thresholds, and what a review of the k most suspicious samples
would find. They are exact, which takes one number per sample and class: where that is too much, only named classes are
ranked. Letters: W window, C classes, K ranked classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from streamlearn.judge import scores
from streamlearn.judge.window import Window
from streamlearn.records import Array, Probabilities

ALL_CLASSES = 100
"""Up to here every class is ranked."""
ALL_CELLS = 4_000_000
"""The same for W * C: 16 MB in memory and in each checkpoint."""
_CHEAP_CELLS = 200_000
"""W * K up to which each report sorts all, in about 20 ms. Above it a report may lack the newest 1 %."""


@dataclass(frozen=True, slots=True)
class Ranked:
    """Scores of one class, from its probabilities; None without a sample of the class."""

    class_index: int
    count: int
    """Samples of this class in the window."""
    average_precision: float | None
    hits_at_k: int | None
    """Samples of this class among the k with the highest probability; None while the window has fewer than k."""


def ranked_classes(classes: int, window: int, named: Sequence[int]) -> tuple[int, ...]:
    """The classes to rank: all if there is room, else the named ones."""
    if classes <= ALL_CLASSES and classes * window <= ALL_CELLS:
        return tuple(range(classes))
    return tuple(sorted(set(named)))


class Ranking:
    """The probabilities of the ranked classes for the last `window` scored samples."""

    def __init__(self, classes: Sequence[int], window: int, *, top_k: int) -> None:
        """`classes` are the indices of the ranked ones."""
        assert top_k >= 1, top_k
        self._classes, self._top_k = np.array(classes, np.int32), top_k
        self._window = Window(window, {"true": np.int32, "probabilities": np.dtype((np.float32, (len(classes),)))})
        self._report: list[Ranked] = []
        self._unseen = 0

    def update(self, true_class: int, probabilities_C: Probabilities) -> None:
        """Add a scored sample."""
        if len(self._classes):
            self._window.append(true_class, probabilities_C[self._classes])
            self._unseen += 1

    def report(self) -> list[Ranked]:
        """In the order of the classes."""
        held = len(self._window)
        may_lack = held // 100 if held * len(self._classes) > _CHEAP_CELLS else 0
        if self._unseen > may_lack or not self._report:
            self._report, self._unseen = self._ranked(), 0
        return self._report

    def state(self) -> dict[str, Array]:
        """Copies of all state, oldest first."""
        return {**self._window.state(), "classes": self._classes.copy()}

    def load(self, state: Mapping[str, Array]) -> None:
        """Restore what `state` saved. Without it, or with other ranked classes, the window starts empty."""
        self._window.clear()
        if np.array_equal(state.get("classes", np.array(())), self._classes):
            self._window.load(state)
        self._report, self._unseen = [], 0

    def _ranked(self) -> list[Ranked]:
        true_W, k = self._window.column("true"), self._top_k
        probabilities_WK: Probabilities = self._window.column("probabilities")
        found = []
        for column, class_index in enumerate(self._classes.tolist()):
            positive_W, scores_W = true_W == class_index, probabilities_WK[:, column]
            count = int(positive_W.sum())
            area = scores.average_precision(positive_W, scores_W) if count else None
            hits = scores.hits_at_top(positive_W, scores_W, k) if count and len(true_W) >= k else None
            found.append(Ranked(class_index, count, area, hits))
        return found
