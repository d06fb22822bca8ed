"""torch's SGD and AdamW, without `torch._dynamo`, which takes as long to import as torch itself.

torch wraps two methods of an optimizer for `torch.compile`, and the first call of a wrapper imports the compiler.
Nothing is compiled here, so the methods are called without their wrappers. `hooked` tells torch not to wrap `step` for
hooks and its profiler either: there are none here, and the wrapper costs a quarter of a small network's step.
"""

from __future__ import annotations

import inspect

import torch

_add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
_no_grad = torch.no_grad()


class SGD(torch.optim.SGD):
    """As torch's; `step` takes no closure."""

    add_param_group = _add_param_group
    step = _no_grad(inspect.unwrap(torch.optim.SGD.step))


class AdamW(torch.optim.AdamW):
    """As torch's; `step` takes no closure."""

    add_param_group = _add_param_group
    step = _no_grad(inspect.unwrap(torch.optim.AdamW.step))


for _step in (SGD.step, AdamW.step):
    _step.hooked = True
