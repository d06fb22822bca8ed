"""What the last linear layer of a classifier sees: its embedding, for methods that need more than logits.

Found by shape and read by a hook, so that any network will do whose logits are made by a linear layer.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from streamlearn.errors import ConfigError


class Embedding:
    """Of one network; D wide.

    Raises:
        ConfigError: no linear layer of this network gives so many outputs.
    """

    def __init__(self, net: nn.Module, *, classes: int, method: str) -> None:
        linear = [m for m in net.modules() if isinstance(m, nn.Linear) and m.out_features == classes]
        if not linear:
            raise ConfigError(
                f"learn.method: {method} wants a network that ends with a linear layer of {classes} outputs, "
                f"and {type(net).__name__} has none"
            )
        self._last = linear[-1]

    def another_head(self) -> nn.Linear:
        """A new layer of the same shape as the last one, begun by chance of torch's global generator."""
        like = self._last.weight
        return nn.Linear(self._last.in_features, self._last.out_features, device=like.device, dtype=like.dtype)

    @torch.no_grad()
    def copy_head_to(self, head: nn.Linear) -> None:
        """Give `head`, which `another_head` made, the weights of the last layer."""
        head.weight.copy_(self._last.weight)
        if self._last.bias is None:
            head.bias.zero_()
        else:
            head.bias.copy_(self._last.bias)

    def read(self, forward: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        """What `forward` returns, and the embeddings (B, D) that went into the last layer meanwhile."""
        seen: list[Tensor] = []

        def keep(_layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen.append(inputs[0])

        handle = self._last.register_forward_pre_hook(keep)
        try:
            logits_BC = forward()
        finally:
            handle.remove()
        (embedded_BD,) = seen
        return logits_BC, torch.flatten(embedded_BD, start_dim=1)
