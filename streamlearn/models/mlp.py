"""Fully connected network, for tables and small images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from streamlearn.models.norm import make_norm
from streamlearn.records import Array

SQUARES = "squares.weight"
"""In the name of the weight of squares. A model of an earlier version has none: they are zero then."""
_FURTHEST = 3.0
"""Inputs are clipped here before they are squared."""
_PART = 0.5
"""Squares are multiplied by this: with 1, tables without such classes lose."""


def completed(arrays: Mapping[str, Array], tensors: Mapping[str, Tensor]) -> dict[str, Array]:
    """Arrays of a model with these tensors; of an earlier version, with weights of zero for squares."""
    missing = {name: tensor for name, tensor in tensors.items() if SQUARES in name and name not in arrays}
    return {**arrays, **{name: torch.zeros_like(tensor).cpu().numpy() for name, tensor in missing.items()}}


class Mlp(nn.Module):
    """Linear layers with ReLU between them. Input of any shape is flattened.

    The first layer also takes the squares of its inputs. Without them a class that is a distance from the middle, as
    an anomaly often is, takes many labels: each direction is learned by itself.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        classes: int,
        *,
        hidden: Sequence[int] = (256, 256),
        dropout: float = 0.0,
        norm: str = "none",
    ) -> None:
        super().__init__()
        if any(width < 1 for width in hidden):
            raise ValueError(f"hidden: expected widths of at least 1, got {list(hidden)}")
        layers: list[nn.Module] = [nn.Flatten()]
        width_before = math.prod(shape)
        squares = nn.Linear(width_before, [*hidden, classes][0], bias=False)
        for width in hidden:
            layers.append(nn.Linear(width_before, width))
            if norm != "none":
                layers.append(make_norm(norm, width))
            layers.append(nn.ReLU())
            if dropout > 0.0:
                layers.append(nn.Dropout(dropout))
            width_before = width
        layers.append(nn.Linear(width_before, classes))
        self.squares = squares
        self.layers = nn.Sequential(*layers)

    def forward(self, x_BF: Tensor) -> Tensor:
        """Logits (B, C)."""
        flatten, first, *others = self.layers
        x_BF = flatten(x_BF)
        squares_BF = _PART * (x_BF.clamp(-_FURTHEST, _FURTHEST).square() - 1.0)
        h_BF: Tensor = first(x_BF) + self.squares(squares_BF)
        for layer in others:
            h_BF = layer(h_BF)
        return h_BF
