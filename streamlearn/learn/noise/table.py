"""Noise for tables, and for all other inputs but images: rows (B, ...) of features."""

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
