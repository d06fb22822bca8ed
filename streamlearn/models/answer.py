"""How the outputs of a network become an answer: corrected for the class prior, then a class is chosen.

Learner and servers use these functions, so that the answer that is given is the one that is scored.

Correction. A network that learned classes in the shares rho answers p(c | x) for a stream with these shares. Where the
stream has the shares pi, Bayes' rule gives

    p'_c ~ p_c pi_c / rho_c

(Saerens, Latinne, Decaestecker 2002, formula 2.4; Elkan 2001, theorem 2). `learn/prior.py` estimates ln(pi / rho).

Choice. A class with a threshold t_c is answered where p'_c >= t_c; of several, the one with the largest p'_c / t_c.
Where no threshold is reached, the answer is the most probable class of the others; if every class has a threshold, the
one with the largest p'_c / t_c.

Letters: B rows, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from streamlearn.records import Probabilities, Schema

Floats = TypeVar("Floats", npt.NDArray[np.float32], npt.NDArray[np.float64])


def corrected(probabilities_BC: Floats, log_offsets_C: Floats) -> Floats:
    """p'_c ~ p_c exp(offset_c). Without offsets the same array; a row that is not finite stays so."""
    if not log_offsets_C.any():
        return probabilities_BC
    # The largest factor is 1, so that nothing overflows.
    scaled_BC = probabilities_BC * np.exp(log_offsets_C - log_offsets_C.max())
    found: Floats = scaled_BC / np.maximum(scaled_BC.sum(axis=1, keepdims=True), np.finfo(np.float32).tiny)
    return found


class Thresholds:
    """The thresholds of a schema's classes."""

    def __init__(self, schema: Schema, by_name: Mapping[str, float]) -> None:
        """`by_name`: from 0 to 1, by names of the schema."""
        self.classes = tuple(schema.classes.index(name) for name in by_name)
        """Indices of the classes with a threshold."""
        self._t_C = np.full(schema.capacity, np.inf, np.float32)
        self._t_C[list(self.classes)] = list(by_name.values())

    def choose(self, probabilities_BC: Probabilities) -> npt.NDArray[np.int64]:
        """The class (B,) that is answered for each row; any class where a row is not finite."""
        if not self.classes:
            most_B: npt.NDArray[np.int64] = probabilities_BC.argmax(axis=1)
            return most_B
        # In falling order: thresholds that are reached, other classes, thresholds that are not, impossible classes.
        ratio_BC = probabilities_BC / self._t_C
        others_BC = np.where(probabilities_BC > 0.0, probabilities_BC, -2.0)
        below_BC = np.where(np.isinf(self._t_C), others_BC, ratio_BC - 1.0)
        ranks_BC = np.where(probabilities_BC >= self._t_C, ratio_BC + 1.0, below_BC)
        chosen_B: npt.NDArray[np.int64] = ranks_BC.argmax(axis=1)
        return chosen_B
