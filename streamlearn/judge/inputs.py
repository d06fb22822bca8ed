"""How far a step's inputs are from those of the steps before: the label-free signal that no network stands between.

Of each feature two statistics of a batch are watched, its mean and its mean distance from the usual mean (a scale that
one wild value does not rule). A running mean and variance of each over the steps before says how far they may be off by
chance; the distance is the mean square of all of them, in those deviations:

    D_t = mean_k B (s_tk - mean_k)^2 / variance_k

which is Hotelling's T^2 / K with a diagonal covariance, and 1 while nothing changes. Features that change their place,
their scale or their mix of classes change it within one batch, while a network may stay sure of what it no longer
knows. What it cannot see is a change of the labels alone, or one that leaves each feature by itself as it was.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from streamlearn.records import Array

MOST_FEATURES = 256
"""Of a larger sample so many are watched, evenly spaced: a photograph must not cost more than its network."""
HORIZON_STEPS = 256
"""Memory of the running mean and variance: long beside the time in which a change is seen."""
FIRST_STEPS = 16
"""Before these there is no distance."""
_WILD = 1000.0
"""In deviations: where one is met before the first distance, what was seen with it is forgotten, or it would be usual
for as long as its square takes to fade. Not within `_TOO_FEW_STEPS`, whose deviation says nothing yet."""
_TOO_FEW_STEPS = 4
_ROUNDING = 1e-9
"""Of the mean: a smaller deviation is that of a constant, summed in another order."""
_FURTHEST = 6.0
"""In deviations. What is further away counts as this far: a wild value is forgotten, and a lasting one is followed
all the same, since the deviation grows by an eighth with each such step."""


class InputDistance:
    """Fed the batch of each step, in order. All of its state is saved, and is bounded."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """As if no batch had been seen: the next ones are what is usual."""
        self._steps = 0
        self._begun_again = False
        """After a wild value; once, since where these are common they are what is usual."""
        self._mean: npt.NDArray[np.float64] = np.zeros(0)
        self._variance: npt.NDArray[np.float64] = np.zeros(0)

    def update(self, x: Array) -> float | None:
        """The distance of a batch x (B, *shape), B >= 1, of finite numbers; then it becomes part of what is usual.

        None where too few steps were seen, or no feature has ever moved.
        """
        batch_BF = _features(x)
        usual_F = self._mean[: batch_BF.shape[1]] if self._steps else batch_BF.mean(axis=0)
        found_K = np.concatenate((batch_BF.mean(axis=0), np.abs(batch_BF - usual_F).mean(axis=0)))
        self._steps += 1
        if self._steps == 1:
            self._mean, self._variance = found_K, np.zeros_like(found_K)
            return None
        # A feature that never moved has no deviation: it is left out now, and has one from its first move on.
        rows = len(batch_BF)
        away_K, deviation_K = found_K - self._mean, np.sqrt(self._variance / rows)
        moving_K = deviation_K > 0.0
        ready = self._steps > FIRST_STEPS
        if ready:
            reach_K = np.where(moving_K, _FURTHEST * deviation_K, np.inf)
            away_K = np.clip(away_K, -reach_K, reach_K)
        elif self._steps > _TOO_FEW_STEPS and not self._begun_again and self._is_wild(away_K, deviation_K):
            self.begin()
            self._begun_again = True
            return None
        distance_K = np.square(away_K[moving_K] / deviation_K[moving_K])
        rate = max(1 / self._steps, 1 / HORIZON_STEPS)
        self._mean = self._mean + rate * away_K
        self._variance = (1.0 - rate) * (self._variance + rate * rows * np.square(away_K))
        return float(distance_K.mean()) if ready and len(distance_K) else None

    def _is_wild(self, away_K: npt.NDArray[np.float64], deviation_K: npt.NDArray[np.float64]) -> bool:
        """The deviation of a constant is rounding; nothing is far from that."""
        moving_K = deviation_K > _ROUNDING * np.abs(self._mean)
        return bool((np.abs(away_K) > _WILD * deviation_K)[moving_K].any())

    def state(self) -> dict[str, Array]:
        """Copies."""
        return {
            "steps": np.array(self._steps),
            "begun_again": np.array(self._begun_again),
            "mean": self._mean.copy(),
            "variance": self._variance.copy(),
        }

    def load(self, state: Mapping[str, Array]) -> None:
        """Become what `state` saved."""
        self._steps, self._begun_again = int(state["steps"]), bool(state["begun_again"])
        self._mean, self._variance = state["mean"].astype(np.float64), state["variance"].astype(np.float64)


def _features(x: Array) -> npt.NDArray[np.float64]:
    """(B, F) of at most `MOST_FEATURES`."""
    flat = x.reshape(len(x), -1)
    count = flat.shape[1]
    if count > MOST_FEATURES:
        flat = flat[:, np.linspace(0, count - 1, MOST_FEATURES).astype(np.int64)]
    wide: npt.NDArray[np.float64] = flat.astype(np.float64)
    return wide
