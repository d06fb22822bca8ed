"""The costs of a step. Tarvainen and Valpola (2017), section 2; consistency also as KL (their appendix).

Targets are probabilities. Gradient flows into them unless the method detached them. There are no padded rows here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

from torch import Tensor, nn

Distance: TypeAlias = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""Distance of logits (B, C) from targets (B, C), with row weights (B,) or None for 1. A mean over all B rows."""


def classification_loss(logits_LC: Tensor, targets_LC: Tensor, rows: int) -> Tensor:
    """Cross-entropy summed over the labelled rows, divided by B, all rows of the step.

    With a division by the labelled count, a batch without labels would be 0/0; here it is exactly zero.
    """
    return nn.functional.cross_entropy(logits_LC, targets_LC, reduction="sum") / rows


def mse_consistency(student_logits_BC: Tensor, targets_BC: Tensor, weights_B: Tensor | None = None) -> Tensor:
    """J(theta) = E w || q - softmax(student) ||^2 / C: the mean over B and C of squared differences."""
    squared_BC = nn.functional.mse_loss(student_logits_BC.softmax(dim=1), targets_BC, reduction="none")
    return _weighted_mean(squared_BC.mean(dim=1), weights_B)


def kl_consistency(student_logits_BC: Tensor, targets_BC: Tensor, weights_B: Tensor | None = None) -> Tensor:
    """E w KL(q || softmax(student)), summed over C, mean over B. Its gradient is that of the cross-entropy."""
    log_probs_BC = student_logits_BC.log_softmax(dim=1)
    divergence_B = nn.functional.kl_div(log_probs_BC, targets_BC, reduction="none").sum(dim=1)
    return _weighted_mean(divergence_B, weights_B)


def _weighted_mean(costs_B: Tensor, weights_B: Tensor | None) -> Tensor:
    if not len(costs_B):
        return costs_B.sum()
    return (costs_B if weights_B is None else costs_B * weights_B).mean()


DISTANCES: Mapping[str, Distance] = {"mse": mse_consistency, "kl": kl_consistency}
"""By the option `consistency`."""
