"""The correction of the class prior: what it finds, when it stays away, and that it is saved."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from streamlearn.learn.prior import PriorCorrection
from streamlearn.models.answer import corrected

SHARES_2 = np.array([0.95, 0.05])


def stream(count: int, seed: int = 0) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """What a perfect network that learned both classes alike says of a stream of 5 %, with x ~ N(+-1, 1)."""
    rng = np.random.default_rng(seed)
    y_N = (rng.random(count) < SHARES_2[1]).astype(np.int64)
    log_odds_N = 2.0 * rng.normal(2.0 * y_N - 1.0)
    p_N = 1.0 / (1.0 + np.exp(-log_odds_N))
    return np.stack([1.0 - p_N, p_N], axis=1).astype(np.float32), y_N


def fed(
    p_NC: npt.NDArray[np.float32], y_N: npt.NDArray[np.int64], labelled_N: npt.NDArray[np.bool_]
) -> PriorCorrection:
    """In micro-batches of 32, each followed by its labels."""
    prior = PriorCorrection(p_NC.shape[1], p_NC.shape[1])
    for first in range(0, len(y_N), 32):
        part = slice(first, first + 32)
        prior.arrived(p_NC[part])
        prior.labelled(p_NC[part][labelled_N[part]], y_N[part][labelled_N[part]])
    return prior


class TestRandomLabels:
    def test_finds_the_ratio_of_the_stream_to_what_was_learned(self) -> None:
        """ln(.05 / .5) - ln(.95 / .5), within the noise of a horizon of 1000 labels."""
        p_NC, y_N = stream(6000)
        prior = fed(p_NC, y_N, np.ones(6000, np.bool_))

        offsets_C = prior.log_offsets
        assert offsets_C[1] - offsets_C[0] == pytest.approx(np.log(0.05 / 0.95), abs=0.5)
        assert prior.weight > 0.9

    def test_answers_are_calibrated(self) -> None:
        """The mean of what is answered is the share of the class."""
        p_NC, y_N = stream(8000)
        prior = fed(p_NC[:6000], y_N[:6000], np.ones(6000, np.bool_))

        assert p_NC[6000:, 1].mean() > 0.15
        assert corrected(p_NC[6000:], prior.log_offsets)[:, 1].mean() == pytest.approx(0.05, abs=0.02)

    def test_does_nothing_where_the_network_is_right(self) -> None:
        """An even stream: the offsets are noise, and labels show that they do not help."""
        rng = np.random.default_rng(1)
        y_N = rng.integers(0, 2, 4000)
        p_N = 1.0 / (1.0 + np.exp(-2.0 * rng.normal(2.0 * y_N - 1.0)))
        prior = fed(np.stack([1.0 - p_N, p_N], axis=1).astype(np.float32), y_N, rng.random(4000) < 0.3)

        assert np.abs(prior.log_offsets).max() < 0.1

    def test_is_zero_before_the_first_label(self) -> None:
        """Whatever arrives."""
        prior = PriorCorrection(3, 3)
        prior.arrived(np.full((4, 3), 1 / 3, np.float32))
        assert not prior.log_offsets.any()


class TestSelection:
    def test_labels_of_one_class_are_not_taken_for_the_stream(self) -> None:
        """Nine of ten negatives get no label: their mean would ask for the opposite correction."""
        p_NC, y_N = stream(6000)
        labelled_N = (y_N == 1) | (np.random.default_rng(2).random(6000) < 0.02)
        prior = fed(p_NC, y_N, labelled_N)

        assert prior.weight < 0.3
        assert abs(prior.log_offsets[1]) < 0.5

    def test_requested_labels_change_little(self) -> None:
        """Only doubtful samples are labelled."""
        p_NC, y_N = stream(6000)
        assert fed(p_NC, y_N, p_NC.max(axis=1) < 0.8).weight < 0.3


class TestInput:
    def test_rows_that_are_not_finite_are_left_out(self) -> None:
        """As if they had not come."""
        p_NC, y_N = stream(64)
        prior, other = PriorCorrection(2, 2), PriorCorrection(2, 2)
        broken_NC, labels_N = np.concatenate([p_NC, [[np.nan, 0.5]]]).astype(np.float32), np.append(y_N, 1)
        prior.arrived(broken_NC)
        prior.labelled(broken_NC, labels_N)
        other.arrived(p_NC)
        other.labelled(p_NC, y_N)

        assert all(np.array_equal(array, other.state()[name]) for name, array in prior.state().items())

    def test_certain_and_wrong_answers_stay_finite(self) -> None:
        """A network may be sure and wrong many times."""
        prior = PriorCorrection(2, 2)
        for _ in range(2000):
            prior.labelled(np.array([[1.0, 0.0]], np.float32), np.array([1]))
        assert np.isfinite(prior.log_offsets).all()

    def test_classes_without_a_name_are_not_corrected(self) -> None:
        """Until they have one."""
        prior = PriorCorrection(3, 2)
        p_NC, y_N = stream(2000)
        prior.labelled(np.concatenate([p_NC, np.zeros((2000, 1))], axis=1).astype(np.float32), y_N)
        assert prior.log_offsets[2] == 0.0


class TestSaving:
    def test_continues_bit_by_bit(self) -> None:
        """As a restart must."""
        p_NC, y_N = stream(600)
        whole, other = PriorCorrection(2, 2), PriorCorrection(2, 2)
        for prior in (whole, other):
            prior.arrived(p_NC[:300])
            prior.labelled(p_NC[:300], y_N[:300])
        resumed = PriorCorrection(2, 2)
        resumed.load(other.state())
        for prior in (whole, resumed):
            prior.arrived(p_NC[300:])
            prior.labelled(p_NC[300:], y_N[300:])

        assert all(np.array_equal(array, resumed.state()[name]) for name, array in whole.state().items())
        assert np.array_equal(whole.log_offsets, resumed.log_offsets)

    def test_a_class_that_was_named_later_keeps_its_offset(self) -> None:
        """A restart knows the schema's names first, and the others with the next labels."""
        p_NC, y_N = stream(400)
        prior, resumed = PriorCorrection(2, 1), PriorCorrection(2, 1)
        prior.name(2)
        prior.labelled(p_NC, y_N)
        resumed.load(prior.state())
        assert prior.log_offsets[1] != 0.0
        assert np.array_equal(resumed.log_offsets, prior.log_offsets)

    def test_a_checkpoint_of_an_earlier_version_has_none(self) -> None:
        """Then nothing is corrected before new labels."""
        prior = PriorCorrection(2, 2)
        prior.load({})
        assert not prior.log_offsets.any()
