"""Norm layers of the built-in networks, by the option `norm`, for tables (B, width) and images (B, width, H, W).

Batch and robust batch normalisation have the same buffers, which the teacher averages (EMAN, Cai et al., 2021). Group
and layer normalisation use one row at a time and have no buffers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

GROUPS = 8
"""Groups of group normalisation if they divide the width, else one group."""
MAX_SCALE, MAX_SHIFT = 3.0, 5.0
"""r_max and d_max of batch renormalisation, at the end of the paper's schedule: bounds of a batch's correction."""


class RobustBatchNorm(nn.modules.batchnorm._BatchNorm):  # noqa: SLF001 - the base that torch's own variants share
    """Batch normalisation by running statistics, in training as in evaluation.

    With the batch's mean mu_B and deviation sigma_B, and the running mu and sigma after the batch was merged into them
    (RobustBN of RoTTA, Yuan, Xie and Li, 2023):

        y = gamma ((x - mu_B) / sigma_B * r + d) + beta,    r = sigma_B / sigma,    d = (mu_B - mu) / sigma

    which is gamma (x - mu) / sigma + beta. r and d are constants to the gradient, so it passes through mu_B and
    sigma_B as in batch normalisation; otherwise nothing would limit growing weights. They are clipped to [1/3, 3] and
    [-5, 5]. Both are from batch renormalisation (Ioffe, 2017), which uses mu and sigma before the merge.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalised x. In training, updates the running statistics."""
        if not self.training:
            return super().forward(x)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        with torch.no_grad():
            # One pass for both: 15 times as fast as torch.var_mean on a CPU in channels-last order.
            mean, var = torch.batch_norm_update_stats(x, self.running_mean, self.running_var, self.momentum)
            self.num_batches_tracked += 1
            deviation = (self.running_var + self.eps).sqrt()
            scale = ((var + self.eps).sqrt() / deviation).clamp(1.0 / MAX_SCALE, MAX_SCALE)
            shift = ((mean - self.running_mean) / deviation).clamp(-MAX_SHIFT, MAX_SHIFT)
        weight = self.weight * scale
        bias = torch.addcmul(self.bias, self.weight, shift)
        return functional.batch_norm(x, None, None, weight, bias, training=True, eps=self.eps)

    def _check_input_dim(self, input: Tensor) -> None:  # noqa: A002
        """Tables and images alike."""


def _group(width: int) -> nn.Module:
    return nn.GroupNorm(GROUPS if width % GROUPS == 0 else 1, width)


_KINDS: Mapping[str, tuple[Callable[[int], nn.Module], Callable[[int], nn.Module]]] = {
    "batch": (nn.BatchNorm1d, nn.BatchNorm2d),
    "robust_batch": (RobustBatchNorm, RobustBatchNorm),
    "group": (_group, _group),
    "layer": (nn.LayerNorm, lambda width: nn.GroupNorm(1, width)),
    "none": (lambda _: nn.Identity(), lambda _: nn.Identity()),
}
"""For tables, and for images."""


def make_norm(kind: str, width: int, *, images: bool = False) -> nn.Module:
    """The layer of that kind for `width` features or channels.

    Raises:
        ValueError: there is no such kind.
    """
    if kind not in _KINDS:
        raise ValueError(f"norm: expected one of {', '.join(_KINDS)}, got {kind!r}")
    return _KINDS[kind][images](width)
