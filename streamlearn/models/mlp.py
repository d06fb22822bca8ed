"""Fully connected network, for tables and small images."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from streamlearn.models.norm import make_norm


class Mlp(nn.Module):
    """Linear layers with ReLU between them. Input of any shape is flattened."""

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
        for width in hidden:
            layers.append(nn.Linear(width_before, width))
            if norm != "none":
                layers.append(make_norm(norm, width))
            layers.append(nn.ReLU())
            if dropout > 0.0:
                layers.append(nn.Dropout(dropout))
            width_before = width
        layers.append(nn.Linear(width_before, classes))
        self.layers = nn.Sequential(*layers)

    def forward(self, x_BF: Tensor) -> Tensor:
        """Logits (B, C)."""
        logits_BC: Tensor = self.layers(x_BF)
        return logits_BC
