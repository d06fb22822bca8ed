"""Correction of answered probabilities for the class prior, as offsets of their logarithms, estimated from labels.

Replay is class-balanced, so a network may learn another class prior than the stream's. With the prior rho that it has
learned, and pi of the stream, Bayes' rule gives p'_c ~ p_c pi_c / rho_c (`models/answer.py`). Only the answer is
corrected: costs, targets and consistency stay as they are.

rho is not the mix of the replayed rows. A network that fits its few labelled rows exactly depends little on their mix
(Byrd and Lipton 2019), and unlabelled samples teach another mix. With the replayed shares as rho, answers on uneven
streams became worse. So the ratio is estimated as a whole: as the offset o_c = ln(pi_c / rho_c) for which corrected
probabilities have the mean of the labels, the maximum-likelihood intercept (King and Zeng 2001), followed over time by
forgetting (McCormick, Raftery, Madigan, Burd 2012). For each first label, with p' by the offsets
before it (16 labels of a step are taken together),

    H <- f H + p' (1 - p')        o <- o + (y - p') / (H + k)

The offsets that are answered are w o, where w is the product of

    1 / (1 + exp(-d))   d is the faded sum of ln p'_y - ln p_y, so this is the posterior probability of corrected
                        against uncorrected (dynamic model averaging, same paper): labels must show that it helps
    min(1, 2 / R)       R is the selection bias of `class_shares`: labelled samples must look like all samples. Where
                        one class gets most of the labels, their mean is not the stream's

Letters: F fresh rows, N newly labelled rows, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch

from streamlearn.learn import class_shares
from streamlearn.models.answer import corrected
from streamlearn.records import Array, Probabilities

FADING = 0.999
"""f, per label: a horizon of 1000 labels."""
_PRIOR_WEIGHT = 5.0
"""k: so much information is assumed for o = 0."""
_SELECTION_FADING = 0.99
"""Per label, of the labels that are compared with all samples: so bias shows within 100 labels."""
_SPREAD_MOMENTUM = 0.99
"""Per step, of the spread of log p that they are compared by."""
_TOGETHER = 16
"""Labels of one update: so few that a step of o stays small whatever they are."""
_LEAST_PROBABILITY = 1e-7


class PriorCorrection:
    """The offsets of one stream. Used by one thread, on the CPU; its state is part of the checkpoint.

    `classes` is C, `named` of them have a name.
    """

    def __init__(self, classes: int, named: int) -> None:
        self._seen = class_shares.no_labels(torch.full((classes,), 1.0 / classes, dtype=torch.float64))
        self._o_C, self._information_C = np.zeros(classes), np.zeros(classes)
        self._log_odds = 0.0
        self._named_C = np.zeros(classes, np.bool_)
        self.log_offsets: Probabilities = np.zeros(classes, np.float32)
        """Offsets w o (C,); 0 before the first label, and for classes without a name."""
        self.name(named)

    def name(self, classes: int) -> None:
        """The first `classes` outputs have names."""
        self._named_C[:classes] = True

    def forget(self) -> None:
        """Start from no correction: another network is served."""
        self._o_C, self._information_C = np.zeros_like(self._o_C), np.zeros_like(self._o_C)
        self._log_odds = 0.0
        self._settle()

    @property
    def weight(self) -> float:
        """From 0 to 1: w."""
        selection = float(class_shares.selection_bias(self._seen, torch.from_numpy(self._named_C)))
        helps = 1.0 / (1.0 + math.exp(-min(max(self._log_odds, -100.0), 100.0)))
        return helps * min(1.0, class_shares.USUAL_SELECTION / max(selection, 1e-300))

    def arrived(self, probabilities_FC: Probabilities) -> None:
        """Add what the served network says of fresh samples. Rows that are not finite are left out."""
        fresh_FC = torch.from_numpy(probabilities_FC[np.isfinite(probabilities_FC).all(axis=1)].astype(np.float64))
        if len(fresh_FC):
            self._seen |= class_shares.with_fresh(self._seen, fresh_FC, _SPREAD_MOMENTUM)

    def labelled(self, probabilities_NC: Probabilities, labels_N: Array) -> None:
        """Add first labels in order, and what the served network says of their samples before it learns them."""
        finite_N = np.isfinite(probabilities_NC).all(axis=1)
        p_NC, y_N = probabilities_NC[finite_N].astype(np.float64), labels_N[finite_N].astype(np.int64)
        if len(y_N):
            new = torch.from_numpy(p_NC), torch.from_numpy(y_N)
            self._seen |= class_shares.with_labels(self._seen, *new, _SELECTION_FADING)
        for first in range(0, len(y_N), _TOGETHER):
            self._follow(p_NC[first : first + _TOGETHER], y_N[first : first + _TOGETHER])
        self._settle()

    def _follow(self, p_NC: npt.NDArray[np.float64], y_N: npt.NDArray[np.int64]) -> None:
        """Update the offsets and the evidence for them by a few labels."""
        given_NC, fade, rows_N = corrected(p_NC, self._o_C), FADING ** len(y_N), np.arange(len(y_N))
        with_it_N, without_N = (np.maximum(of_NC[rows_N, y_N], _LEAST_PROBABILITY) for of_NC in (given_NC, p_NC))
        self._log_odds = fade * self._log_odds + float(np.log(with_it_N / without_N).sum())
        self._information_C = fade * self._information_C + (given_NC * (1.0 - given_NC)).sum(axis=0)
        errors_C = np.bincount(y_N, minlength=len(self._o_C)) - given_NC.sum(axis=0)
        self._o_C = self._o_C + errors_C / (self._information_C + _PRIOR_WEIGHT)
        # A constant changes no probability.
        self._o_C -= self._o_C[self._named_C].mean()

    def _settle(self) -> None:
        """Compute what is answered until the next labels."""
        self.log_offsets = (self.weight * self._o_C * self._named_C).astype(np.float32)

    def state(self) -> dict[str, Array]:
        """Copies of all state, by name."""
        seen: dict[str, Array] = {name: tensor.numpy().copy() for name, tensor in self._seen.items()}
        return seen | {
            "o_C": self._o_C.copy(),
            "information_C": self._information_C.copy(),
            "log_odds": np.array(self._log_odds),
            "named_C": self._named_C.copy(),
        }

    def load(self, state: Mapping[str, Array]) -> None:
        """Restore what `state` saved. Earlier versions saved nothing: then nothing is corrected before new labels."""
        if not state:
            return
        self._seen = {name: torch.from_numpy(np.array(state[name])) for name in self._seen}
        self._o_C, self._information_C = np.array(state["o_C"]), np.array(state["information_C"])
        self._log_odds = float(state["log_odds"])
        # What is answered is of the classes that had a name then; `name` adds to them.
        self._named_C = np.array(state["named_C"])
        self._settle()
