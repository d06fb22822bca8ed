"""Calibration of the served network with and without the correction of the class prior, on the same labels.

Both are of the moment when the label arrives, before it is learned: the network is asked once, and its probabilities
are scored as they are and as they would be answered. `at_arrival.ece` is that of the answers that were given.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from streamlearn.judge import scores
from streamlearn.judge.prequential import BINS
from streamlearn.judge.window import Window, group_of, joined
from streamlearn.records import Array, Probabilities


@dataclass(frozen=True, slots=True)
class Calibrated:
    """Scores of one kind of probabilities over the window; None while it is empty."""

    accuracy: float | None
    """Of the most probable class, without thresholds."""
    log_loss: float | None
    ece: float | None


@dataclass(frozen=True, slots=True)
class CalibrationReport:
    """The comparison."""

    count: int
    network: Calibrated
    """Probabilities as the network gives them: for the class shares that it learned."""
    corrected: Calibrated
    """Probabilities for the class shares of the stream."""


class Calibration:
    """The last `window` labels whose samples were asked about again."""

    def __init__(self, window: int) -> None:
        types = {"right": np.bool_, "confidence": np.float32, "log_loss": np.float64}
        self._network, self._corrected = Window(window, types), Window(window, types)

    def update(self, true_N: Array, network_NC: Probabilities, corrected_NC: Probabilities) -> None:
        """Add labels and both kinds of probabilities. Rows that are not finite are left out."""
        finite_N = np.isfinite(network_NC).all(axis=1)
        true_N, rows_N = true_N[finite_N], np.arange(int(finite_N.sum()))
        for window, all_NC in ((self._network, network_NC), (self._corrected, corrected_NC)):
            p_NC = all_NC[finite_N].astype(np.float64)
            costs_N = -np.log(np.maximum(p_NC[rows_N, true_N], scores.LEAST_PROBABILITY))
            window.extend(p_NC.argmax(axis=1) == true_N, p_NC.max(axis=1), costs_N)

    def report(self) -> CalibrationReport:
        """The comparison over the window."""
        return CalibrationReport(len(self._network), _scores(self._network), _scores(self._corrected))

    def state(self) -> dict[str, Array]:
        """Copies of all state, oldest first."""
        return joined({"network": self._network.state(), "corrected": self._corrected.state()})

    def load(self, state: Mapping[str, Array]) -> None:
        """Restore what `state` saved. Earlier versions saved nothing: the windows are empty then."""
        for window, name in ((self._network, "network"), (self._corrected, "corrected")):
            window.clear()
            if saved := group_of(state, name):
                window.load(saved)


def _scores(window: Window) -> Calibrated:
    columns = window.state()
    right_W, confidence_W = columns["right"].astype(np.float64), columns["confidence"].astype(np.float64)
    bins_W, count = scores.bins_of(confidence_W, BINS), len(right_W)
    sums = [
        np.bincount(bins_W, values_W, minlength=BINS).astype(np.float64)
        for values_W in (np.ones(count), confidence_W, right_W)
    ]
    return Calibrated(
        accuracy=scores.share(float(right_W.sum()), count),
        log_loss=scores.share(float(columns["log_loss"].sum()), count),
        ece=scores.calibration_error(*sums),
    )
