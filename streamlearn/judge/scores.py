"""The scores as pure functions of counts.

Accuracy, recall, balanced accuracy and kappa need only the diagonal and the margins of a confusion matrix n_ij (true
class i, predicted class j, as counts or weights), so 10,000 classes take three vectors and not 800 MB:

    hits_C       n_ii            predicted correctly
    true_C       sum_j n_ij      of this class
    predicted_C  sum_i n_ij      predicted as this class

An undefined score is None: never NaN, never infinite, never a placeholder.
Letters: N samples, C classes, M bins of confidence.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Counts = npt.NDArray[np.float64]
Interval = list[float]
"""[low, high], a list as in JSON."""

Z_95 = 1.959963984540054
"""The 97.5 % point of the normal distribution: two-sided intervals of 95 %."""
LEAST_PROBABILITY = 1e-7
"""Smaller probabilities of the true class count as this one, so that the log loss is finite."""


def share(part: float, whole: float) -> float | None:
    """A ratio of counts, such as accuracy: right answers over answers. None if `whole` is 0."""
    return part / whole if whole > 0.0 else None


def recall_per_class(hits_C: Counts, true_C: Counts) -> list[float | None]:
    """n_ii / sum_j n_ij for each class; None where a class did not occur."""
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
    """(p0 - p) / (1 - p): the share of the reference's errors that is avoided; None where the reference makes none.

    With the accuracy of the majority class it is kappa-M (Bifet, De Francisci Morales, Read, Holmes, Pfahringer 2015),
    with that of the previous class kappa-T (Žliobaitė, Bifet, Read, Pfahringer, Holmes 2015). Both accuracies must be
    of the same samples.
    """
    if accuracy is None or reference is None or reference >= 1.0:
        return None
    return (accuracy - reference) / (1.0 - reference)


def log_loss(probability_of_true: float) -> float:
    """-ln p(true class), in nats (Good 1952), of one sample; p at least `LEAST_PROBABILITY`."""
    return -math.log(max(probability_of_true, LEAST_PROBABILITY))


def brier(probability_of_true: float, sum_of_squares: float) -> float:
    """sum_c (p_c - [c is true])^2 = sum_c p_c^2 - 2 p(true) + 1 (Brier 1950), of one sample: from 0 to 2."""
    # Float32 sums may be below 0 by rounding.
    return max(sum_of_squares - 2.0 * probability_of_true + 1.0, 0.0)


def bin_of(confidence: float, bins: int) -> int:
    """Index, from 0, of the bin ((m-1)/M, m/M] that holds this confidence (Guo et al. 2017)."""
    return min(max(math.ceil(confidence * bins) - 1, 0), bins - 1)


def bins_of(confidences_N: npt.NDArray[np.float64], bins: int) -> npt.NDArray[np.int64]:
    """`bin_of` for an array."""
    return np.clip(np.ceil(confidences_N * bins).astype(np.int64) - 1, 0, bins - 1)


@dataclass(frozen=True, slots=True)
class ReliabilityBin:
    """Predictions with a confidence in (low, high]; the means are None where there are none."""

    low: float
    high: float
    count: float
    confidence: float | None
    accuracy: float | None


def reliability(counts_M: Counts, confidence_M: Counts, right_M: Counts) -> list[ReliabilityBin]:
    """The reliability diagram (DeGroot and Fienberg 1983): mean confidence and accuracy of each bin.

    From the number of predictions in each bin, the sum of their confidence, and the number of right ones.
    """
    bins = len(counts_M)
    return [
        ReliabilityBin(m / bins, (m + 1) / bins, count, share(confidence, count), share(right, count))
        for m, (count, confidence, right) in enumerate(
            zip(counts_M.tolist(), confidence_M.tolist(), right_M.tolist(), strict=True)
        )
    ]


def calibration_error(counts_M: Counts, confidence_M: Counts, right_M: Counts) -> float | None:
    """ECE = sum_m n_m / n |accuracy_m - confidence_m| (Naeini, Cooper, Hauskrecht 2015; Guo et al. 2017)."""
    return share(float(np.abs(right_M - confidence_M).sum()), float(counts_M.sum()))


def average_precision(positive_N: npt.NDArray[np.bool_], scores_N: npt.NDArray[np.float32]) -> float | None:
    """sum_n (R_n - R_{n-1}) P_n over distinct scores, highest first: the area under precision and recall as steps.

    R_n and P_n are recall and precision of the samples with at least the n-th score (Boyd, Eng, Page 2013). Chance is
    the share of positives, not 1/2. None without positives.
    """
    order_N = np.argsort(-scores_N, kind="stable")
    hits_N = np.cumsum(positive_N[order_N])
    if not len(hits_N) or not hits_N[-1]:
        return None
    # Samples of equal score are one point of the curve: their order means nothing.
    last_T = np.append(np.flatnonzero(np.diff(scores_N[order_N])), len(order_N) - 1)
    found_T = hits_N[last_T]
    return float((np.diff(found_T, prepend=0) * (found_T / (last_T + 1.0))).sum()) / float(hits_N[-1])


def hits_at_top(positive_N: npt.NDArray[np.bool_], scores_N: npt.NDArray[np.float32], k: int) -> int:
    """Positives among the k samples of highest score; of equal scores the first ones."""
    return int(positive_N[np.argsort(-scores_N, kind="stable")[:k]].sum())


def wilson(right: float, count: float) -> Interval | None:
    """95 % interval of a share of independent samples (Wilson 1927); valid also where few or all are right."""
    if count <= 0.0:
        return None
    z = Z_95
    p, z2_n = right / count, z * z / count
    centre = (p + z2_n / 2.0) / (1.0 + z2_n)
    half = z * math.sqrt(p * (1.0 - p) / count + z2_n / (4.0 * count)) / (1.0 + z2_n)
    return [max(centre - half, 0.0), min(centre + half, 1.0)]


def paired_difference(first_only: int, second_only: int, count: int) -> Interval | None:
    """95 % interval of the difference of two accuracies on the same samples.

    Of n samples only the first is right on b, only the second on c (the pairs of McNemar 1947): d = (b - c) / n with
    variance ((b + c) / n - d^2) / n. Half a sample is added to each of the four cells (Agresti and Min 2005), since
    without discordant pairs the plain variance is 0 and one sample would be proof.
    """
    if count <= 0:
        return None
    b, c, n = first_only + 0.5, second_only + 0.5, count + 2.0
    centre = (b - c) / n
    half = Z_95 * math.sqrt(((b + c) / n - centre * centre) / n)
    return [max(centre - half, -1.0), min(centre + half, 1.0)]


def normalised_entropy(counts_C: Counts, classes: int | None = None) -> float | None:
    """-sum_c q_c ln q_c / ln C (Shannon 1948, Pielou 1966): 0 for one class alone, 1 for all classes alike.

    `classes` is C where it is less than the number of counts.
    """
    count, classes = float(counts_C.sum()), len(counts_C) if classes is None else classes
    if count <= 0.0 or classes < 2:
        return None
    q = counts_C[counts_C > 0.0] / count
    return min(abs(float((q * np.log(q)).sum())) / math.log(classes), 1.0)


def total_variation(counts_C: Counts, other_C: Counts) -> float | None:
    """1/2 sum_c |q_c - r_c| of two class mixes, from 0 to 1."""
    count, other = float(counts_C.sum()), float(other_C.sum())
    if count <= 0.0 or other <= 0.0:
        return None
    return float(np.abs(counts_C / count - other_C / other).sum()) / 2.0


def total_variation_by_chance(mix_C: Counts, drawn: float) -> float | None:
    """Approximate `total_variation` between a mix and `drawn` samples drawn from it at random; at most 1.

    The mean of |q - r| is close to sqrt(2 r (1 - r) / (pi n)), as for a normal distribution.
    """
    count = float(mix_C.sum())
    if count <= 0.0 or drawn <= 0.0:
        return None
    r = mix_C / count
    return min(float(np.sqrt(2.0 * r * (1.0 - r) / (math.pi * drawn)).sum()) / 2.0, 1.0)
