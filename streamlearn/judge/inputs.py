"""Distance of a step's inputs from those of the steps before: a drift signal that needs neither labels nor a network.

Two statistics of each feature are watched: the batch mean, and the mean absolute distance from the running mean (a
scale that one outlier does not dominate). The running mean and variance of each statistic say how far it deviates by
chance. The distance is the mean square over all statistics, in those deviations:

    D_t = mean_k B (s_tk - mean_k)^2 / variance_k

This is Hotelling's T^2 / K with a diagonal covariance, and 1 while nothing changes. Features that change their order,
their scale or their mix of classes change it within one batch, while a network may stay confident and wrong. It cannot
see a change of the labels alone, or one that leaves the distribution of each single feature as it was.

Rows with columns. A missing number or vector takes the running mean, so that a batch with more of them is no farther
away; its presence flag shows their share. A category is 1 or -1 by the parity of its bucket, and 0 if missing. Buckets
are hashes, so this is a random sign for each category, and the mean is a random projection of their distribution: it
moves if shares of categories change, unless those that gain and those that lose have the same sign.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from streamlearn.models.places import Places, places_of
from streamlearn.records import Array, Column

MOST_FEATURES = 256
"""Of a larger sample this many are watched, evenly spaced, so that an image costs less than its network."""
HORIZON_STEPS = 256
"""Memory of the running mean and variance; long against the time in which a change is detected."""
FIRST_STEPS = 16
"""Warm-up: no distance before."""
_OUTLIER = 1000.0
"""In deviations. An outlier during the warm-up restarts it; otherwise it would dominate the running variance until its
square has decayed. Not within the first `_TOO_FEW_STEPS`, whose deviation is no estimate yet."""
_TOO_FEW_STEPS = 4
_ROUNDING = 1e-9
"""As a share of the mean: a smaller deviation is the rounding error of a constant."""
_MAX_DEVIATIONS = 6.0
"""Larger values are clipped: an outlier is forgotten, and a lasting change is followed, since the deviation grows by an
eighth with each such step."""


class InputDistance:
    """Takes the batch of each step, in order. All state is saved, and is bounded."""

    def __init__(self, columns: Sequence[Column] = ()) -> None:
        """`columns` of the rows; none if samples are not rows of columns."""
        self._places = places_of(columns) if columns else None
        self.reset()

    def reset(self) -> None:
        """Discard all batches and start the warm-up again."""
        self._steps = 0
        self._restarted = False
        """After an outlier; at most once, since outliers that recur are part of the distribution."""
        self._mean: npt.NDArray[np.float64] = np.zeros(0)
        self._variance: npt.NDArray[np.float64] = np.zeros(0)

    def update(self, x: Array) -> float | None:
        """Return the distance of a batch x (B, *shape), B >= 1, finite, and add it to the running statistics.

        None during the warm-up, and while no feature has ever varied.
        """
        batch_BF = _features(x) if self._places is None else self._of_columns(x, self._places)
        usual_F = self._mean[: batch_BF.shape[1]] if self._steps else batch_BF.mean(axis=0)
        found_K = np.concatenate((batch_BF.mean(axis=0), np.abs(batch_BF - usual_F).mean(axis=0)))
        self._steps += 1
        if self._steps == 1:
            self._mean, self._variance = found_K, np.zeros_like(found_K)
            return None
        # A feature that never varied has no deviation; it counts from the step after its first change.
        rows = len(batch_BF)
        away_K, deviation_K = found_K - self._mean, np.sqrt(self._variance / rows)
        moving_K = deviation_K > 0.0
        ready = self._steps > FIRST_STEPS
        if ready:
            reach_K = np.where(moving_K, _MAX_DEVIATIONS * deviation_K, np.inf)
            away_K = np.clip(away_K, -reach_K, reach_K)
        elif self._steps > _TOO_FEW_STEPS and not self._restarted and self._has_outlier(away_K, deviation_K):
            self.reset()
            self._restarted = True
            return None
        distance_K = np.square(away_K[moving_K] / deviation_K[moving_K])
        rate = max(1 / self._steps, 1 / HORIZON_STEPS)
        self._mean = self._mean + rate * away_K
        self._variance = (1.0 - rate) * (self._variance + rate * rows * np.square(away_K))
        return float(distance_K.mean()) if ready and len(distance_K) else None

    def _of_columns(self, x: Array, places: Places) -> npt.NDArray[np.float64]:
        """Values (B, F) of rows (B, W), by the rules at the top of this file."""
        at_F = _watched(x.shape[1])
        values_BF = x[:, at_F].astype(np.float64)
        signs_BF = np.where(values_BF > 0.0, 2.0 * (values_BF % 2.0) - 1.0, 0.0)
        values_BF = np.where(places.is_code_W[at_F], signs_BF, values_BF)
        is_there_BF = ~places.is_measured_W[at_F] | (x[:, places.flag_W[at_F]] != 0.0)
        if self._steps:
            usual_F = self._mean[: len(at_F)]
        else:
            usual_F = np.where(is_there_BF, values_BF, 0.0).sum(axis=0) / np.maximum(is_there_BF.sum(axis=0), 1)
        return np.where(is_there_BF, values_BF, usual_F)

    def _has_outlier(self, away_K: npt.NDArray[np.float64], deviation_K: npt.NDArray[np.float64]) -> bool:
        """Constant features are left out: their deviation is rounding error."""
        moving_K = deviation_K > _ROUNDING * np.abs(self._mean)
        return bool((np.abs(away_K) > _OUTLIER * deviation_K)[moving_K].any())

    def state(self) -> dict[str, Array]:
        """Copies of all state."""
        return {
            "steps": np.array(self._steps),
            "begun_again": np.array(self._restarted),
            "mean": self._mean.copy(),
            "variance": self._variance.copy(),
        }

    def load(self, state: Mapping[str, Array]) -> None:
        """Restore what `state` saved. If columns were added since, the warm-up starts again."""
        if self._places is not None and len(state["mean"]) not in (0, 2 * len(_watched(len(self._places.column_W)))):
            self.reset()
            return
        self._steps, self._restarted = int(state["steps"]), bool(state["begun_again"])
        self._mean, self._variance = state["mean"].astype(np.float64), state["variance"].astype(np.float64)


def _features(x: Array) -> npt.NDArray[np.float64]:
    """(B, F) with F at most `MOST_FEATURES`."""
    flat = x.reshape(len(x), -1)
    if flat.shape[1] > MOST_FEATURES:
        flat = flat[:, _watched(flat.shape[1])]
    wide: npt.NDArray[np.float64] = flat.astype(np.float64)
    return wide


def _watched(count: int) -> npt.NDArray[np.int64]:
    """The places (F,) of the features that are watched, of a sample with `count` of them."""
    return np.linspace(0, count - 1, min(count, MOST_FEATURES)).astype(np.int64)
