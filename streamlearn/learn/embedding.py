"""The embedding of a classifier: the input of its last linear layer, for methods that need more than logits.

The layer is found by shape and read by a hook, so this works for any network whose logits come from a linear layer.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from streamlearn.errors import ConfigError


class Embedding:
    """Of one network, D wide.

    Raises:
        ConfigError: no linear layer of this network has that many outputs.
    """

    def __init__(self, net: nn.Module, *, classes: int, method: str) -> None:
        linear = [m for m in net.modules() if isinstance(m, nn.Linear) and m.out_features == classes]
        if not linear:
            raise ConfigError(
                f"learn.method: {method} needs a network that ends with a linear layer of {classes} outputs, "
                f"and {type(net).__name__} has none"
            )
        self._last = linear[-1]

    def another_head(self) -> nn.Linear:
        """A new layer of the same shape as the last one, initialised by torch's CPU generator on every device."""
        like = self._last.weight
        head = nn.Linear(self._last.in_features, self._last.out_features, dtype=like.dtype)
        return head.to(like.device)

    @torch.no_grad()
    def copy_head_to(self, head: nn.Linear) -> None:
        """Copy the weights of the last layer to `head`, which `another_head` made."""
        head.weight.copy_(self._last.weight)
        if self._last.bias is None:
            head.bias.zero_()
        else:
            head.bias.copy_(self._last.bias)

    def read(self, forward: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        """The logits that `forward` returns, and the embeddings (B, D) that entered the last layer, in float32."""
        seen: list[Tensor] = []

        def keep(_layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen.append(inputs[0])

        handle = self._last.register_forward_pre_hook(keep)
        try:
            logits_BC = forward()
        finally:
            handle.remove()
        (embedded_BD,) = seen
        return logits_BC, torch.flatten(embedded_BD.float(), start_dim=1)
