"""The costs of a step. Tarvainen and Valpola (2017), section 2; consistency also as KL (their appendix).

Rows that are padding never come here: the learner cuts them off first. Targets are probabilities, and gradient flows
into them where the method has left any.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from torch import Tensor, nn

Distance: TypeAlias = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""Of logits (B, C) from targets (B, C), each row with its weight (B,) or all with 1; a mean over all B rows."""


def classification_loss(logits_LC: Tensor, targets_LC: Tensor, rows: int) -> Tensor:
    """Cross-entropy summed over the labelled rows, divided by B, all rows of the step.

    Dividing by B and not by the labelled count keeps a batch without labels at exactly zero, where a plain mean would
    be 0/0.
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
        return costs_B.sum()  # a batch without rows to compare costs nothing
    return (costs_B if weights_B is None else costs_B * weights_B).mean()
