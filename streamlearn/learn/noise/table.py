"""Noise for tables, and for all other inputs but images: rows (B, ...) of features, or (B, W) with K columns."""

from __future__ import annotations

import torch
from torch import Generator, Tensor


def gaussian(x: Tensor, generator: Generator, *, std: float) -> Tensor:
    """Add N(0, std^2) to each value independently."""
    # In place on a tensor of the same layout; randn would be channels-first.
    return torch.empty_like(x).normal_(0.0, std, generator=generator).add_(x)


def feature_dropout(x: Tensor, generator: Generator, *, probability: float) -> Tensor:
    """Replace each feature, with that probability, by the same feature of a random row of the batch.

    This draws from the feature's own distribution (SCARF, Bahri et al., 2022), whatever its unit, and also if inputs
    are not standardised, where 0 is not the mean. A single row stays unchanged.
    """
    flat = x.flatten(1)
    replaced = torch.rand(flat.shape, generator=generator, device=x.device) < probability
    others = torch.randint(len(flat), flat.shape, generator=generator, device=x.device)
    return torch.where(replaced, flat.gather(0, others), flat).view(x.shape)


def column_gaussian(x: Tensor, generator: Generator, *, std: float, is_measured_W: Tensor, flag_W: Tensor) -> Tensor:
    """Add N(0, std^2) to each number, and each value of a vector, that is present."""
    is_noisy_BW = (x[:, flag_W] != 0.0) & is_measured_W
    return torch.empty_like(x).normal_(0.0, std, generator=generator).mul_(is_noisy_BW).add_(x)


def category_dropout(x: Tensor, generator: Generator, *, probability: float, is_code_W: Tensor) -> Tensor:
    """Make each category missing, with that probability."""
    is_dropped_BW = torch.rand(x.shape, generator=generator, device=x.device) < probability
    return torch.where(is_dropped_BW & is_code_W, 0.0, x)


def column_dropout(x: Tensor, generator: Generator, *, probability: float, column_W: Tensor, columns: int) -> Tensor:
    """As `feature_dropout`, for columns: all places of a column are those of one other row."""
    is_replaced_BK = torch.rand((len(x), columns), generator=generator, device=x.device) < probability
    others_BK = torch.randint(len(x), (len(x), columns), generator=generator, device=x.device)
    return torch.where(is_replaced_BK[:, column_W], x.gather(0, others_BK[:, column_W]), x)
