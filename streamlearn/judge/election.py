"""Champion and challengers: which candidate network is served, decided by a sequential test on labels.

All candidates predict when a label arrives, before it is learned. A label counts for or against a challenger where
exactly one of the two is right (a discordant pair, as in McNemar's test). x is +1 where only the challenger is right,
-1 where only the champion is, and 0 otherwise. The null hypothesis is that the challenger is not better: at each label,
given all before it, x = +1 is at most as likely as x = -1.

The test is betting (Waudby-Smith & Ramdas 2024, "Estimating means of bounded random variables by betting"). For each
stake s of `STAKES` a bettor starts with wealth 1, receives 1 / `LABELS` at each label, and stakes the share s of it:

    M_s <- (M_s + 1 / LABELS) (1 + s x)        promote where the mean of M_s over s >= 2 (K - 1) / alpha

Under the null hypothesis the mean of M_s minus (1 + n / LABELS) is a supermartingale in the number n of labels. By
optional stopping (Ville's inequality) the probability that any of the K - 1 challengers is promoted by chance within n
labels is at most alpha / 2 (1 + n / LABELS), although the test looks after every label: at most alpha in `LABELS`
labels. A promotion starts the test again.

The test needs no window to forget. Money received at each label is a test that starts at this label (a Shiryaev-Roberts
sum; Shin, Ramdas & Rinaldo 2024, "E-detectors"). So a challenger that was worse for a long time is promoted soon after
it has become better: past losses cannot go below 0.

`python benchmarks/election.py` measures false promotions, and the labels until a better challenger is promoted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from streamlearn.judge.window import Window, group_of, joined
from streamlearn.records import Array

LABELS: Final = 10_000
ALPHA: Final = 0.05
"""Bound on the probability of a false promotion within `LABELS` labels."""
WINDOW: Final = 500
"""Labels in the reported accuracies. They do not affect the test."""
STAKES: Final = (1.0, 0.5, 0.25, 0.125, 0.0625)
"""Shares of the wealth that are bet. s is best where the challenger is the right one in (1 + s) / 2 of the pairs."""


class Election:
    """Tests each challenger against the champion, and keeps the accuracy of all candidates over a window of labels.

    Letters: K candidates, S stakes. The caller serves the champion, and calls `restart` where it serves another one
    for any other reason than the result of `update`.
    """

    def __init__(self, candidates: Sequence[str], *, window: int = WINDOW) -> None:
        assert len(set(candidates)) == len(candidates) >= 1, candidates
        self.candidates = tuple(candidates)
        self._threshold = 2 * (len(candidates) - 1) / ALPHA
        self._window = Window(window, dict.fromkeys(self.candidates, np.int8))
        self._stakes_S = np.array(STAKES)
        self._start_test()

    def update(self, champion: int, right_K: npt.NDArray[np.bool_]) -> int:
        """Add a label: which candidates were right. Returns the index of the champion from here on."""
        right = right_K.astype(np.int8)
        self._window.append(*right.tolist())
        self._wealth_KS += 1 / LABELS
        x_K = right - right[champion]
        if not x_K.any():
            return champion  # no evidence
        self._wealth_KS *= 1.0 + x_K[:, None] * self._stakes_S
        wealth_K = self._wealth_KS.mean(axis=1)
        wealth_K[champion] = 0.0  # it does not bet against itself
        best = int(wealth_K.argmax())
        if wealth_K[best] < self._threshold:
            return champion
        self._start_test()
        return best

    def accuracies(self) -> dict[str, float | None]:
        """Accuracy of each candidate over the window; None before the first label."""
        right = self._window.state()
        return {name: float(right[name].mean()) if len(right[name]) else None for name in self.candidates}

    def restart(self) -> None:
        """Forget all labels: the candidates have other weights than before."""
        self._window.clear()
        self._start_test()

    def state(self) -> dict[str, Array]:
        """Copies of all state, by candidate; the window oldest first."""
        if len(self.candidates) == 1:
            return {}  # there is no test
        wealth = dict(zip(self.candidates, self._wealth_KS.copy(), strict=True))
        return joined({"window": self._window.state(), "wealth": wealth})

    def load(self, state: Mapping[str, Array]) -> None:
        """Restore what `state` saved. State of other candidates is ignored."""
        window, wealth = group_of(state, "window"), group_of(state, "wealth")
        if window.keys() == wealth.keys() == dict.fromkeys(self.candidates).keys():
            self._window.load(window)
            self._wealth_KS = np.stack([wealth[name] for name in self.candidates]).astype(np.float64)

    def _start_test(self) -> None:
        self._wealth_KS = np.ones((len(self.candidates), len(STAKES)))
