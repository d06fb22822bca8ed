"""torch's SGD and AdamW, without `torch._dynamo`, which takes as long to import as torch itself.

torch wraps two methods of an optimizer for `torch.compile`, and the first call of a wrapper imports the compiler.
Nothing is compiled here, so the methods are called without their wrappers.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch

_add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
_sgd_step = inspect.unwrap(torch.optim.SGD.step)
_adamw_step = inspect.unwrap(torch.optim.AdamW.step)


class SGD(torch.optim.SGD):
    """As torch's; `step` takes no closure."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """See `torch.optim.Optimizer.add_param_group`."""
        _add_param_group(self, param_group)

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """See `torch.optim.SGD.step`."""
        _sgd_step(self)


class AdamW(torch.optim.AdamW):
    """As torch's; `step` takes no closure."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """See `torch.optim.Optimizer.add_param_group`."""
        _add_param_group(self, param_group)

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """See `torch.optim.AdamW.step`."""
        _adamw_step(self)
