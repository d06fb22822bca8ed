"""Prequential scores: each prediction was made before its sample was learned, and is scored when the label comes.

Four answers are compared on the same samples: the teacher's and the student's, and two that no model should lose to,
as they stood when the sample came: `majority`, the class with most labels received, and `no_change`, the class of the
last label received. A baseline without an answer yet is not scored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from streamlearn.records import Array, Probabilities

Network: TypeAlias = Literal["teacher", "student", "majority", "no_change"]
NETWORKS: tuple[Network, ...] = ("teacher", "student", "majority", "no_change")
_NO_ANSWER = -1
_LEAST_PROBABILITY = 1e-7
"""A probability of zero for what was true costs -ln of this, and not infinity."""


class Prequential:
    """Accuracy over the last `window` scored samples and over all, and the teacher's log loss over the window.

    Letters: W window, K networks, C classes.
    """

    def __init__(self, classes: int, window: int) -> None:
        assert classes >= 1, classes
        assert window >= 1, window
        self._classes = classes
        self._window = window
        self._clear()

    def _clear(self) -> None:
        self._hits_WK = np.full((self._window, len(NETWORKS)), _NO_ANSWER, np.int8)
        self._costs_W = np.zeros(self._window, np.float64)
        self._right_K = [0] * len(NETWORKS)
        self._answered_K = [0] * len(NETWORKS)
        self._scored = 0
        self._held = 0
        self._next = 0

    @property
    def scored(self) -> int:
        """Samples scored since the beginning."""
        return self._scored

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
        """Score the stored answers for one sample, now that its label is here."""
        assert 0 <= true_class < self._classes, true_class
        assert len(teacher_probabilities_C) == self._classes, len(teacher_probabilities_C)
        at = self._next
        answers_K = (teacher_class, student_class, majority_class, no_change_class)
        for network, answer in enumerate(answers_K):
            hit = _NO_ANSWER if answer is None else int(answer == true_class)
            self._hits_WK[at, network] = hit
            if hit != _NO_ANSWER:
                self._answered_K[network] += 1
                self._right_K[network] += hit
        self._costs_W[at] = -np.log(max(float(teacher_probabilities_C[true_class]), _LEAST_PROBABILITY))
        self._scored += 1
        self._held = min(self._held + 1, self._window)
        self._next = (at + 1) % self._window

    def windowed(self, network: Network) -> float | None:
        """Accuracy over the window; None before the first."""
        hits_W = self._hits_WK[: self._held, NETWORKS.index(network)]
        answered_W = hits_W[hits_W != _NO_ANSWER]
        return float(answered_W.mean(dtype=np.float64)) if len(answered_W) else None

    def cumulative(self, network: Network) -> float | None:
        """Accuracy since the beginning; None before the first."""
        k = NETWORKS.index(network)
        return self._right_K[k] / self._answered_K[k] if self._answered_K[k] else None

    def log_loss(self) -> float | None:
        """The teacher's mean -ln p(true class) over the window, in nats; None before the first."""
        return float(self._costs_W[self._order()].mean()) if self._held else None

    def state(self) -> dict[str, Array]:
        """All of it, as copies; the window oldest first."""
        order_W = self._order()
        return {
            "hits": self._hits_WK[order_W],
            "costs": self._costs_W[order_W],
            "right": np.array(self._right_K, np.int64),
            "answered": np.array(self._answered_K, np.int64),
            "scored": np.array([self._scored], np.int64),
        }

    def load(self, state: Mapping[str, Array]) -> None:
        """Become what `state` saved. Of a longer window the newest stay; a shorter one fills up anew from there."""
        self._clear()
        kept = min(len(state["costs"]), self._window)
        self._hits_WK[:kept] = state["hits"][len(state["hits"]) - kept :]
        self._costs_W[:kept] = state["costs"][len(state["costs"]) - kept :]
        self._held, self._next = kept, kept % self._window
        self._right_K = state["right"].tolist()
        self._answered_K = state["answered"].tolist()
        self._scored = int(state["scored"][0])

    def _order(self) -> npt.NDArray[np.int64]:
        """Places of the window, oldest first."""
        return np.arange(self._next - self._held, self._next) % self._window
