"""Noise for tables, and for all other inputs but images: rows (B, ...) of features, or (B, W) with K columns."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Generator, Tensor

from streamlearn.models.places import Places
from streamlearn.records import Array

if TYPE_CHECKING:
    from streamlearn.learn.noise.build import Noise


def gaussian(std: float) -> Noise:
    """Add N(0, std^2) to each value independently."""

    def add(x: Tensor, generator: Generator) -> Tensor:
        # In place on a tensor of the same layout; randn would be channels-first.
        return torch.empty_like(x).normal_(0.0, std, generator=generator).add_(x)

    return add


def feature_dropout(probability: float) -> Noise:
    """Replace each feature, with that probability, by the same feature of a random row of the batch.

    This draws from the feature's own distribution (SCARF, Bahri et al., 2022), whatever its unit, and also if inputs
    are not standardised, where 0 is not the mean. A single row stays unchanged.
    """

    def view(x: Tensor, generator: Generator) -> Tensor:
        flat = x.flatten(1)
        replaced = torch.rand(flat.shape, generator=generator, device=x.device) < probability
        others = torch.randint(len(flat), flat.shape, generator=generator, device=x.device)
        return torch.where(replaced, flat.gather(0, others), flat).view(x.shape)

    return view


def column_gaussian(std: float, places: Places, device: torch.device) -> Noise:
    """Add N(0, std^2) to each number, and each value of a vector, that is present."""
    is_measured_W, flag_W = _on(device, places.is_measured_W, places.flag_W)

    def add(x: Tensor, generator: Generator) -> Tensor:
        is_noisy_BW = (x[:, flag_W] != 0.0) & is_measured_W
        return torch.empty_like(x).normal_(0.0, std, generator=generator).mul_(is_noisy_BW).add_(x)

    return add


def category_dropout(probability: float, places: Places, device: torch.device) -> Noise:
    """Make each category missing, with that probability."""
    (is_code_W,) = _on(device, places.is_code_W)

    def view(x: Tensor, generator: Generator) -> Tensor:
        is_dropped_BW = torch.rand(x.shape, generator=generator, device=x.device) < probability
        return torch.where(is_dropped_BW & is_code_W, 0.0, x)

    return view


def column_dropout(probability: float, places: Places, device: torch.device) -> Noise:
    """As `feature_dropout`, for columns: all places of a column are those of one other row."""
    (column_W,) = _on(device, places.column_W)
    columns = int(places.column_W[-1]) + 1

    def view(x: Tensor, generator: Generator) -> Tensor:
        is_replaced_BK = torch.rand((len(x), columns), generator=generator, device=x.device) < probability
        others_BK = torch.randint(len(x), (len(x), columns), generator=generator, device=x.device)
        return torch.where(is_replaced_BK[:, column_W], x.gather(0, others_BK[:, column_W]), x)

    return view


def _on(device: torch.device, *arrays_W: Array) -> list[Tensor]:
    return [torch.from_numpy(array_W).to(device) for array_W in arrays_W]
