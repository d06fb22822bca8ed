"""Spare outputs for classes that are named later, so that a head grows without a change of tensor sizes.

The logit of a spare class is so low that its probability is exactly 0 in float32: it takes no part in costs, gradients
or answers. Admitting it changes one number. Its weights are then still the initial ones.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

ABSENT_LOGIT = -1e4
"""Finite: with minus infinity a divergence would be 0 * inf, and the buffer could not be averaged."""


class SpareClasses(nn.Module):
    """A network whose last `spare` outputs are off until they are admitted."""

    offset_C: Tensor

    def __init__(self, net: nn.Module, *, classes: int, spare: int) -> None:
        super().__init__()
        assert 0 <= spare < classes, (spare, classes)
        self.net = net
        offset_C = torch.zeros(classes)
        offset_C[classes - spare :] = ABSENT_LOGIT
        self.register_buffer("offset_C", offset_C)

    def forward(self, x_B: Tensor) -> Tensor:
        """Logits (B, C)."""
        logits_BC: Tensor = self.net(x_B) + self.offset_C
        return logits_BC

    def admit(self, classes: int) -> None:
        """Turn on the first `classes` outputs."""
        self.offset_C[:classes] = 0.0
