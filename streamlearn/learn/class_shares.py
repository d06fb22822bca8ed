"""Class shares of the stream, as estimated from labels that may be few, and may not be drawn as all samples are.

A witness, a network that has not learned these labels, predicts p for all samples and s for labelled ones before they
are learned; y are the labels. All are sums over classes. The ratio estimate (Cochran, Sampling Techniques, 1977,
chapter 6) of the class distribution is

    r ~ p (y + k) / (s + k)

It is not better than a reference distribution e while it differs from e by no more than chance would make it (positive
part of James and Stein, 1961). The share of the difference that is real is about

    w = max(0, 1 - max(1, R/2) V / D)

D = |r - e|^2, and V is what D would be by chance: the sum over classes of (p / (s + k))^2 (v + k), with v the squared
errors of s. R measures selection bias: the mean over classes of z^2, where z is the deviation of the mean log p of
labelled samples from that of fresh ones, in standard errors. It is about 1 if labelled samples are drawn as all are.

Letters: F fresh rows, N newly labelled rows, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from streamlearn.learn.rows import one_hot

PRIOR_LABELS = 1.0
"""k: a prior of this many labels per class, all predicted correctly by the witness."""
LEAST_SHARE = 1e-4
"""Lower bound of a class's share: a class that was never predicted would get a huge weight."""
USUAL_SELECTION = 2.0
"""R up to here is no sign of selection bias."""
_LEAST_PROBABILITY = 1e-6
"""Lower bound of probabilities in a logarithm: one prediction must not outweigh all others."""
_ENOUGH_ROWS = 16
"""With this many fresh rows, their mean log p needs no rows of earlier steps, which came from an older network."""


def no_labels(uniform_C: Tensor) -> dict[str, Tensor]:
    """The sums before the first label, by name."""
    names = ("label_counts_C", "said_counts_C", "squared_errors_C", "deviations_C", "labels_so_far_C")
    sums = {name: torch.zeros_like(uniform_C) for name in names}
    sums["squared_weights"] = uniform_C.new_zeros(())
    return sums | {"log_mean_C": uniform_C.log(), "log_variance_C": torch.ones_like(uniform_C)}


def with_fresh(sums: Mapping[str, Tensor], fresh_FC: Tensor, momentum: float) -> dict[str, Tensor]:
    """Mean and variance of log p of fresh rows, which labelled ones are compared with."""
    log_FC = fresh_FC.clamp_min(_LEAST_PROBABILITY).log()
    kept = max(0.0, 1.0 - len(log_FC) / _ENOUGH_ROWS)
    mean_C = torch.lerp(log_FC.mean(dim=0), sums["log_mean_C"], kept)
    variance_C = torch.lerp((log_FC - mean_C).square().mean(dim=0), sums["log_variance_C"], momentum)
    return {"log_mean_C": mean_C, "log_variance_C": variance_C}


def with_labels(sums: Mapping[str, Tensor], new_NC: Tensor, labels_N: Tensor, fading: float) -> dict[str, Tensor]:
    """The sums with what the witness says of newly labelled rows, and their labels. Older labels fade for each."""
    fade = fading ** len(labels_N)
    one_hot_NC = one_hot(labels_N, new_NC.shape[1]).to(new_NC.dtype)
    deviations_NC = new_NC.clamp_min(_LEAST_PROBABILITY).log() - sums["log_mean_C"]
    scale_C = sums["log_variance_C"].sqrt().clamp_min(_LEAST_PROBABILITY)
    added = (
        ("label_counts_C", one_hot_NC.sum(dim=0), fade),
        ("labels_so_far_C", one_hot_NC.sum(dim=0), 1.0),
        ("said_counts_C", new_NC.sum(dim=0), fade),
        ("deviations_C", deviations_NC.sum(dim=0) / scale_C, fade),
        ("squared_errors_C", (one_hot_NC - new_NC).square().sum(dim=0), fade**2),
        ("squared_weights", torch.full_like(sums["squared_weights"], len(labels_N)), fade**2),
    )
    return {name: sums[name] * faded + value for name, value, faded in added}


def estimate(
    sums: Mapping[str, Tensor], witness_C: Tensor, reference_C: Tensor, named_C: Tensor
) -> tuple[Tensor, Tensor]:
    """Estimates r (C,) and w, 0-d. `witness_C` is p, `reference_C` e; classes outside `named_C` have the share 0."""
    labels_C, said_C, errors_C = (sums[f"{of}_C"] for of in ("label_counts", "said_counts", "squared_errors"))
    share_C = witness_C.clamp_min(LEAST_SHARE) / (said_C + PRIOR_LABELS) * named_C
    ratio_C = share_C * (labels_C + PRIOR_LABELS)
    total = ratio_C.sum()
    spread = (ratio_C / total - reference_C).square().sum()
    by_chance = (share_C / total).square() @ (errors_C + PRIOR_LABELS)
    by_chance = by_chance * (selection_bias(sums, named_C) / USUAL_SELECTION).clamp_min(1.0)
    return ratio_C / total, (1.0 - by_chance / spread.clamp_min(1e-12)).clamp_min(0.0)


def selection_bias(sums: Mapping[str, Tensor], named_C: Tensor) -> Tensor:
    """R, a 0-d tensor; 0 before the first label."""
    weights = sums["squared_weights"].clamp_min(1.0)
    return (sums["deviations_C"].square() * named_C).sum() / named_C.sum() / weights
