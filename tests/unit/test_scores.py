"""Each score against its definition, computed from samples, and where it is undefined."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamlearn.judge import scores

TRUE = np.array([0, 0, 0, 0, 1, 1, 2, 2, 2, 2])
ANSWERS = np.array([0, 0, 1, 2, 1, 0, 2, 2, 2, 1])
NOTHING = np.zeros(3)


def counts(classes_N: npt.NDArray[np.int64]) -> scores.Counts:
    return np.bincount(classes_N, minlength=3).astype(np.float64)


HITS, OCCURRED, PREDICTED = counts(TRUE[TRUE == ANSWERS]), counts(TRUE), counts(ANSWERS)


class TestAnswers:
    def test_recall_is_the_share_found_of_each_class(self) -> None:
        """2 of 4, 1 of 2, 3 of 4."""
        assert scores.recall_per_class(HITS, OCCURRED) == [0.5, 0.5, 0.75]

    def test_recall_of_a_class_that_did_not_occur_is_none(self) -> None:
        """Neither good nor bad."""
        assert scores.recall_per_class(np.array([1.0, 0.0]), np.array([2.0, 0.0])) == [0.5, None]

    def test_balanced_accuracy_is_the_mean_recall_of_classes_that_occurred(self) -> None:
        """A class that was only predicted does not count."""
        assert scores.balanced_accuracy(HITS, OCCURRED) == pytest.approx(1.75 / 3)
        assert scores.balanced_accuracy(np.array([1.0, 0.0]), np.array([2.0, 0.0])) == 0.5

    def test_kappa_corrects_for_agreement_by_chance(self) -> None:
        """Chance: all pairs of a true and a predicted class."""
        by_chance = np.mean([true == answer for true in TRUE for answer in ANSWERS])

        assert scores.kappa(HITS, OCCURRED, PREDICTED) == pytest.approx((0.6 - by_chance) / (1 - by_chance))

    def test_kappa_of_one_class_alone_is_none(self) -> None:
        """Chance is always right."""
        assert scores.kappa(np.array([5.0]), np.array([5.0]), np.array([5.0])) is None

    @pytest.mark.parametrize(
        ("accuracy", "reference", "skill"),
        [(0.9, 0.8, 0.5), (0.8, 0.8, 0.0), (0.7, 0.8, -0.5), (1.0, 0.0, 1.0), (1.0, 1.0, None), (None, 0.5, None)],
    )
    def test_skill_is_the_share_of_the_references_errors_avoided(
        self, accuracy: float | None, reference: float, skill: float | None
    ) -> None:
        """Below 0: worse than the reference. Undefined for a faultless reference."""
        found = scores.skill(accuracy, reference)

        assert found == (skill if skill is None else pytest.approx(skill))

    def test_scores_of_no_samples_are_none(self) -> None:
        """Without a warning of a division by zero."""
        found = [scores.balanced_accuracy(NOTHING, NOTHING), scores.kappa(NOTHING, NOTHING, NOTHING)]
        found += scores.recall_per_class(NOTHING, NOTHING)
        found += [scores.share(0, 0), scores.skill(0.5, None), scores.calibration_error(*[NOTHING] * 3)]
        found += [scores.normalised_entropy(NOTHING), scores.total_variation(NOTHING, OCCURRED)]
        found += [scores.total_variation_by_chance(NOTHING, 5), scores.total_variation_by_chance(OCCURRED, 0)]

        assert set(found) == {None}
        assert scores.wilson(0, 0) is scores.paired_difference(0, 0, 0) is None


class TestProbabilities:
    def test_log_loss_is_finite_for_a_probability_of_zero(self) -> None:
        """One confident error must not spoil a mean."""
        assert scores.log_loss(0.0) == pytest.approx(7 * math.log(10))

    @given(st.lists(st.floats(0.01, 1.0), min_size=2, max_size=5), st.data())
    def test_brier_is_the_squared_distance_to_the_truth(self, weights: list[float], data: st.DataObject) -> None:
        """Summed over all classes."""
        p = np.array(weights) / sum(weights)
        true = data.draw(st.integers(0, len(p) - 1))

        found = scores.brier(float(p[true]), float(p @ p))

        assert found == pytest.approx(sum((p[c] - (c == true)) ** 2 for c in range(len(p))))

    @pytest.mark.parametrize(
        ("confidence", "expected"), [(0.0, 0), (0.1, 0), (0.25, 0), (0.26, 1), (0.5, 1), (0.99, 3), (1.0, 3)]
    )
    def test_a_bin_holds_its_upper_end(self, confidence: float, expected: int) -> None:
        """As in the paper; the lowest bin also contains 0."""
        assert scores.bin_of(confidence, 4) == expected
        assert scores.bins_of(np.array([confidence]), 4).tolist() == [expected]

    def test_calibration_error_is_the_weighted_gap_of_the_bins(self) -> None:
        """3/4 of the samples are right half as often as their confidence, 1/4 twice as often."""
        error = scores.calibration_error(np.array([1.0, 3.0]), np.array([0.5, 2.4]), np.array([1.0, 1.2]))

        assert error == pytest.approx(0.25 * (1.0 - 0.5) + 0.75 * (0.8 - 0.4))

    def test_the_reliability_diagram_has_none_in_empty_bins(self) -> None:
        """They have no mean."""
        empty, full = scores.reliability(np.array([0.0, 4.0]), np.array([0.0, 3.0]), np.array([0.0, 2.0]))

        assert empty == scores.ReliabilityBin(low=0.0, high=0.5, count=0.0, confidence=None, accuracy=None)
        assert full == scores.ReliabilityBin(low=0.5, high=1.0, count=4.0, confidence=0.75, accuracy=0.5)


class TestIntervals:
    @pytest.mark.parametrize(
        ("right", "count", "low", "high"),
        [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
    )
    def test_wilson_gives_the_published_numbers(self, right: int, count: int, low: float, high: float) -> None:
        """Newcombe 1998, Statistics in Medicine 17:857-872, table I, method 3."""
        assert scores.wilson(right, count) == pytest.approx([low, high], abs=5e-5)

    def test_a_paired_difference_has_the_width_of_its_variance(self) -> None:
        """40 pairs for the first, none for the second, 10 ties, and half a sample more in each of four cells."""
        half_samples = np.repeat([1.0, -1.0, 0.0], [81, 1, 22])
        half_width = 1.96 * math.sqrt(half_samples.var() / 52)

        low, high = scores.paired_difference(40, 0, 50) or (0.0, 0.0)

        assert low == pytest.approx(half_samples.mean() - half_width, abs=1e-4)
        assert high == pytest.approx(half_samples.mean() + half_width, abs=1e-4)

    def test_a_paired_difference_covers_the_true_value(self) -> None:
        """In 95 % of draws of 60 samples, 20 % right by the first only and 10 % by the second only."""
        rng = np.random.default_rng(7)
        draws = rng.multinomial(60, [0.2, 0.1, 0.7], size=4000)

        intervals = np.array([scores.paired_difference(int(b), int(c), 60) for b, c, _ in draws])

        assert np.mean((intervals[:, 0] <= 0.1) & (intervals[:, 1] >= 0.1)) == pytest.approx(0.95, abs=0.015)

    @given(st.integers(0, 300), st.integers(0, 300), st.integers(0, 300))
    def test_a_paired_difference_is_never_certain(self, first_only: int, second_only: int, alike: int) -> None:
        """It has a width and contains the difference, also without discordant pairs."""
        count = first_only + second_only + alike
        if count == 0:
            return

        interval = scores.paired_difference(first_only, second_only, count)

        assert interval is not None
        assert -1.0 <= interval[0] < interval[1] <= 1.0
        assert interval[0] <= (first_only - second_only) / count <= interval[1]


class TestClassMixes:
    @pytest.mark.parametrize(
        ("mix", "entropy"), [([5, 5], 1.0), ([9, 0, 0], 0.0), ([1, 1, 1, 1], 1.0), ([3, 1], 0.8112781), ([4], None)]
    )
    def test_entropy_is_relative_to_its_maximum(self, mix: list[int], entropy: float | None) -> None:
        """Undefined for one class."""
        found = scores.normalised_entropy(np.array(mix, np.float64))

        assert found == (entropy if entropy is None else pytest.approx(entropy))

    @pytest.mark.parametrize(("mix", "distance"), [([4, 4], 0.0), ([8, 0], 0.5), ([6, 2], 0.25)])
    def test_total_variation_is_the_share_to_be_moved(self, mix: list[int], distance: float) -> None:
        """Of shares, whatever the sizes of the mixes."""
        assert scores.total_variation(np.array(mix, np.float64), np.array([1.0, 1.0])) == distance

    @pytest.mark.parametrize(("mix", "drawn"), [([10, 10, 10], 50), ([70, 20, 10], 200), ([1] * 20, 400)])
    def test_total_variation_by_chance_is_that_of_random_draws(self, mix: list[int], drawn: int) -> None:
        """Within a tenth of the mean of 2,000 draws."""
        rng = np.random.default_rng(5)
        counts_C = np.array(mix, np.float64)
        draws = rng.multinomial(drawn, counts_C / counts_C.sum(), size=2000)

        mean = np.mean([scores.total_variation(draw.astype(np.float64), counts_C) for draw in draws])

        assert scores.total_variation_by_chance(counts_C, drawn) == pytest.approx(mean, rel=0.1)
