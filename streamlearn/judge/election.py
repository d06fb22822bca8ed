"""Which of several models is served: the one in office, until another was better on the labels that came.

All candidates answer when a label comes and before it is learned. A challenger takes over where its lead over the last
`window` labels is more than `z` standard errors of the paired difference,

    lead = (b - c) / n        error = sqrt(b + c - (b - c)^2 / n) / n

with b labels that only the challenger had right and c that only the one in office had (as in McNemar's test). So a
few labels of luck do not make what is served jump about, and equals never change places.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from streamlearn.judge.window import Window
from streamlearn.records import Array


class Election:
    """Counts votes; the caller has them sworn in."""

    def __init__(self, candidates: Sequence[str], *, window: int, z: float, least: int) -> None:
        assert len(set(candidates)) == len(candidates), candidates
        self.candidates = tuple(candidates)
        self._z, self._least = z, least
        self._window = Window(window, dict.fromkeys(self.candidates, np.int8))

    def update(self, right_K: npt.NDArray[np.bool_]) -> None:
        """One label came: which candidates had it right."""
        self._window.append(*right_K.astype(np.int8).tolist())

    def winner(self, incumbent: int) -> int:
        """Who is to be served now, by index: the one in office, or the challenger with the clearest lead."""
        if len(self._window) < self._least:
            return incumbent
        right = self._window.state()
        right_KN = np.stack([right[name] for name in self.candidates]).astype(np.int64)
        best, best_lead = incumbent, self._z
        for challenger in range(len(self.candidates)):
            only = int((right_KN[challenger] & ~right_KN[incumbent] & 1).sum())
            missed = int((right_KN[incumbent] & ~right_KN[challenger] & 1).sum())
            lead = _standard_errors(only, missed, right_KN.shape[1])
            if lead > best_lead:
                best, best_lead = challenger, lead
        return best

    def accuracies(self) -> dict[str, float | None]:
        """Of each candidate over the window; None before the first label."""
        right = self._window.state()
        return {name: float(right[name].mean()) if len(right[name]) else None for name in self.candidates}

    def restart(self) -> None:
        """Forget the window: the candidates have changed."""
        self._window.clear()

    def state(self) -> dict[str, Array]:
        """The window, oldest first, as copies."""
        return self._window.state()

    def load(self, state: Mapping[str, Array]) -> None:
        """Become what `state` saved; with other candidates begin anew."""
        if state.keys() == dict.fromkeys(self.candidates).keys():
            self._window.load(state)


def _standard_errors(only: int, missed: int, count: int) -> float:
    """The lead in units of its error; infinite where every difference is a lead."""
    difference = only - missed
    variance = only + missed - difference**2 / count
    if difference <= 0:
        return 0.0
    return difference / math.sqrt(variance) if variance > 0.0 else math.inf
