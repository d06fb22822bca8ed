"""Outputs kept free for classes that come later, so that a head grows without any tensor changing its size.

A class that is not there has a logit so low that its probability is exactly 0 in float32: it takes no part in costs,
gradients or answers. Admitting it is one number. Its weights are as they were at the start.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

ABSENT_LOGIT = -1e4
"""Finite: minus infinity would make 0 * inf of a divergence, and such a buffer cannot be averaged."""


class SpareClasses(nn.Module):
    """A network whose last `spare` outputs answer nothing until they are admitted."""

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
        """From now on the first so many classes are answered and learned."""
        self.offset_C[:classes] = 0.0
