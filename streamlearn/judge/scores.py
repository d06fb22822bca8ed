"""What each score is, as functions of counts: no state, no window, no order.

Accuracy, recall, balanced accuracy and kappa need of a confusion matrix n_ij (true class i, answered class j, as counts
or as weights) only its diagonal and its margins, so that ten thousand classes take three vectors and not 800 MB:

    hits_C       n_ii            rightly answered
    true_C       sum_j n_ij      were of this class
    predicted_C  sum_i n_ij      were said to be of this class

Where a score is not defined it is None: never NaN, never infinite, never a number that was made up.
Letters: N samples, C classes, M bins of confidence.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Counts = npt.NDArray[np.float64]
Interval = list[float]
"""[low, high], a list as JSON has it."""

Z_95 = 1.959963984540054
"""The 97.5 % point of the normal distribution: two-sided intervals of 95 %."""
LEAST_PROBABILITY = 1e-7
"""A probability of zero for what was true costs -ln of this, and not infinity."""


def share(part: float, whole: float) -> float | None:
    """One count over another: accuracy, where they are right answers and answers; None of nothing."""
    return part / whole if whole > 0.0 else None


def recall_per_class(hits_C: Counts, true_C: Counts) -> list[float | None]:
    """n_ii / sum_j n_ij for each class: how much of what was there was found; None where a class did not occur."""
    return [share(hits, true) for hits, true in zip(hits_C.tolist(), true_C.tolist(), strict=True)]


def balanced_accuracy(hits_C: Counts, true_C: Counts) -> float | None:
    """Mean recall of the classes that occurred (Brodersen, Ong, Stephan, Buhmann 2010)."""
    occurred = true_C > 0.0
    return float((hits_C[occurred] / true_C[occurred]).mean()) if occurred.any() else None


def kappa(hits_C: Counts, true_C: Counts, predicted_C: Counts) -> float | None:
    """(p0 - pc) / (1 - pc), where pc = sum_i true_i predicted_i / n^2 is the agreement by chance (Cohen 1960)."""
    count = float(true_C.sum())
    if count <= 0.0:
        return None
    return skill(float(hits_C.sum()) / count, float((true_C / count) @ (predicted_C / count)))


def skill(accuracy: float | None, reference: float | None) -> float | None:
    """(p0 - p) / (1 - p): the share of the reference's errors that are avoided; None where it makes none.

    With the accuracy of the majority class it is kappa-M (Bifet, De Francisci Morales, Read, Holmes, Pfahringer 2015),
    with that of the class before it is kappa-T (Žliobaitė, Bifet, Read, Pfahringer, Holmes 2015). Both accuracies are
    to be of the same samples.
    """
    if accuracy is None or reference is None or reference >= 1.0:
        return None
    return (accuracy - reference) / (1.0 - reference)


def log_loss(probability_of_true: float) -> float:
    """-ln p(true), in nats (Good 1952), of one sample, p no less than `LEAST_PROBABILITY`."""
    return -math.log(max(probability_of_true, LEAST_PROBABILITY))


def brier(probability_of_true: float, sum_of_squares: float) -> float:
    """sum_c (p_c - [c is true])^2 = sum_c p_c^2 - 2 p(true) + 1 (Brier 1950), of one sample: from 0 to 2."""
    # Sums of float32 may be a rounding below 0.
    return max(sum_of_squares - 2.0 * probability_of_true + 1.0, 0.0)


def bin_of(confidence: float, bins: int) -> int:
    """Which of M bins ((m-1)/M, m/M], m from 1, has this confidence (Guo et al. 2017), counted from 0."""
    return min(max(math.ceil(confidence * bins) - 1, 0), bins - 1)


def bins_of(confidences_N: npt.NDArray[np.float64], bins: int) -> npt.NDArray[np.int64]:
    """The same of many."""
    return np.clip(np.ceil(confidences_N * bins).astype(np.int64) - 1, 0, bins - 1)


class Reliability(NamedTuple):
    """What was answered with a confidence in each bin: its sum, how often it was right, how often it was at all."""

    counts_M: Counts
    confidence_M: Counts
    right_M: Counts

    def diagram(self) -> list[dict[str, float | None]]:
        """The reliability diagram (DeGroot and Fienberg 1983): stated confidence beside accuracy, for each bin."""
        bins = len(self.counts_M)
        return [
            {
                "low": m / bins,
                "high": (m + 1) / bins,
                "count": float(count),
                "confidence": share(float(confidence), float(count)),
                "accuracy": share(float(right), float(count)),
            }
            for m, (count, confidence, right) in enumerate(zip(*self, strict=True))
        ]

    def calibration_error(self) -> float | None:
        """ECE = sum_m n_m / n |accuracy_m - confidence_m| (Naeini, Cooper, Hauskrecht 2015; Guo et al. 2017)."""
        count = float(self.counts_M.sum())
        return share(float(np.abs(self.right_M - self.confidence_M).sum()), count)


def wilson(right: float, count: float, z: float = Z_95) -> Interval | None:
    """Interval of a share of independent samples (Wilson 1927); sound where few are right, or all of them are."""
    if count <= 0.0:
        return None
    p, z2_n = right / count, z * z / count
    centre = (p + z2_n / 2.0) / (1.0 + z2_n)
    half = z * math.sqrt(p * (1.0 - p) / count + z2_n / (4.0 * count)) / (1.0 + z2_n)
    return [max(centre - half, 0.0), min(centre + half, 1.0)]


def paired_difference(first_only: int, second_only: int, count: int, z: float = Z_95) -> Interval | None:
    """Interval of the difference of two accuracies on the same samples.

    b samples were right by the first alone, c by the second alone (the pairs of McNemar 1947), n at all:
    d = (b - c) / n, its variance ((b + c) / n - d^2) / n, and half a sample is added to each of the four cells (Agresti
    and Min 2005), since with no pair that differs the plain variance is 0 and one sample would be proof.
    """
    if count <= 0:
        return None
    b, c, n = first_only + 0.5, second_only + 0.5, count + 2.0
    centre = (b - c) / n
    half = z * math.sqrt(((b + c) / n - centre * centre) / n)
    return [max(centre - half, -1.0), min(centre + half, 1.0)]


def normalised_entropy(counts_C: Counts, classes: int | None = None) -> float | None:
    """-sum_c q_c ln q_c / ln C (Shannon 1948, Pielou 1966): 0 is one class alone, 1 is all alike.

    `classes` where fewer than there are counts can be meant.
    """
    count, classes = float(counts_C.sum()), len(counts_C) if classes is None else classes
    if count <= 0.0 or classes < 2:
        return None
    q = counts_C[counts_C > 0.0] / count
    return min(abs(float((q * np.log(q)).sum())) / math.log(classes), 1.0)


def total_variation(counts_C: Counts, other_C: Counts) -> float | None:
    """1/2 sum_c |q_c - r_c| of two class mixes: the share of samples that would have to be of another class."""
    count, other = float(counts_C.sum()), float(other_C.sum())
    if count <= 0.0 or other <= 0.0:
        return None
    return float(np.abs(counts_C / count - other_C / other).sum()) / 2.0


def total_variation_by_chance(mix_C: Counts, drawn: float) -> float | None:
    """About what `total_variation` is when `drawn` samples are a fair draw from a mix.

    The mean of |q - r| is close to sqrt(2 r (1 - r) / (pi n)), that of a normal distribution; at most 1.
    """
    count = float(mix_C.sum())
    if count <= 0.0 or drawn <= 0.0:
        return None
    r = mix_C / count
    return min(float(np.sqrt(2.0 * r * (1.0 - r) / (math.pi * drawn)).sum()) / 2.0, 1.0)
