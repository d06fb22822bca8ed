"""Calibration with and without the correction of the class prior."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from streamlearn.judge.calibration import Calibration


def alike(count: int, first: float) -> npt.NDArray[np.float32]:
    """The same probabilities of two classes in each row."""
    return np.tile(np.array([first, 1.0 - first], np.float32), (count, 1))


class TestReport:
    def test_scores_both_on_the_same_labels(self) -> None:
        """ECE is |accuracy - confidence| where all are in one bin."""
        calibration = Calibration(10)
        calibration.update(np.array([0, 0, 0, 1]), alike(4, 0.5), alike(4, 0.75))

        report = calibration.report()
        assert report.count == 4
        assert report.network.ece == pytest.approx(0.25)
        assert report.corrected.ece == pytest.approx(0.0)
        assert report.network.log_loss == pytest.approx(np.log(2))
        assert report.corrected.accuracy == 0.75

    def test_is_undefined_before_the_first_label(self) -> None:
        """Answers that are not finite do not count."""
        calibration = Calibration(10)
        calibration.update(np.array([0]), alike(1, np.nan), alike(1, np.nan))
        assert calibration.report().count == 0
        assert calibration.report().network.ece is None

    def test_is_restored(self) -> None:
        """Of an earlier version there is nothing to restore."""
        calibration, other = Calibration(3), Calibration(3)
        calibration.update(np.array([0, 1, 1, 0, 1]), alike(5, 0.4), alike(5, 0.7))
        other.load(calibration.state())
        assert other.report() == calibration.report()
        other.load({})
        assert other.report().count == 0
