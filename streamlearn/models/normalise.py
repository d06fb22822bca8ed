"""Running statistics: of inputs, to standardise a drifting stream; and of batch normalisation, from its first step on.

Input statistics move only in `observe`, never in `forward`: predicting is pure, and a row is predicted before it is
observed. The merge of a batch into them is Chan, Golub and LeVeque (1979); the count is capped, so that old rows fade.

A value that is wildly far away counts as `FURTHEST` deviations, so that one reading of 1e15 is not the deviation for
the next ten thousand rows. A whole batch of them counts as one whose deviation is `WIDEST` of those before: a burst of
500 rows makes it 1.8 times as large, where without that bound it was 2,000 times, and took the horizon fifteen times to
be forgotten. A change of scale or place that lasts is followed all the same, each batch making the deviation larger by
a factor: a change of scale by a thousand within the horizon.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

HORIZON_ROWS = 10_000
"""Rows after which a batch is merged as if no more had been seen: the memory of the statistics."""
LIMIT = 10.0
"""Standardised values are cut here, in standard deviations: one wild reading must not be the whole gradient."""
FURTHEST = 30.0
"""Deviations from the mean at which a value's part in the statistics is cut."""
WIDEST = 5.0
"""Deviations, in the root mean square about the mean, at which a whole batch's part in them is cut."""
FIRST_ROWS = 100
"""Before so many there is no deviation to cut by."""
RELATIVE_FLOOR = 1e-6
"""A deviation below this share of the mean is float32 rounding: the feature is constant."""


class RunningNorm(nn.Module):
    """(x - mean) / deviation, for each feature of a table, for each channel of an image.

    A feature that never changed is only centred. Before the first `observe` it is the identity, but for the cut.
    """

    mean: Tensor
    var: Tensor
    count: Tensor

    def __init__(self, shape: tuple[int, ...], *, horizon_rows: int = HORIZON_ROWS) -> None:
        super().__init__()
        assert horizon_rows >= 1, horizon_rows
        self.horizon_rows = horizon_rows
        self._reduced = (0, *range(2, len(shape) + 1))
        of_one = (shape[0], *(1 for _ in shape[1:]))
        self.register_buffer("mean", torch.zeros(of_one))
        self.register_buffer("var", torch.ones(of_one))
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """Standardised (B, ...); changes nothing."""
        deviation, constant = self._deviation()
        return ((x - self.mean) / torch.where(constant, 1.0, deviation)).clamp(-LIMIT, LIMIT)

    @torch.no_grad()
    def observe(self, x: Tensor, n_valid: int) -> None:
        """Merge the first `n_valid` rows into the statistics, in place.

        Features whose statistics would not be finite (a value near the end of float32) keep the old ones.
        """
        if n_valid == 0:
            return
        assert n_valid <= len(x), (n_valid, len(x))
        # Two passes: as exact as torch.var_mean, and several times faster along the first dimension.
        valid = self._cut(x[:n_valid])
        mean_batch = valid.mean(dim=self._reduced).view_as(self.mean)
        var_batch = (valid - mean_batch).square().mean(dim=self._reduced).view_as(self.var)

        total = self.count + n_valid
        share = n_valid / total
        delta = mean_batch - self.mean
        less = self._less_of(var_batch + delta.square())
        delta, var_batch = less.sqrt() * delta, less * var_batch
        mean = self.mean + share * delta
        var = (1.0 - share) * (self.var + share * delta.square()) + share * var_batch

        finite = torch.isfinite(mean) & torch.isfinite(var)
        self.mean.copy_(torch.where(finite, mean, self.mean))
        self.var.copy_(torch.where(finite, var, self.var))
        self.count.copy_(total.clamp(max=self.horizon_rows))

    def _deviation(self) -> tuple[Tensor, Tensor]:
        """Of each feature, and whether it is nothing but rounding."""
        deviation = self.var.sqrt()
        return deviation, deviation <= self.mean.abs() * RELATIVE_FLOOR

    def _less_of(self, spread: Tensor) -> Tensor:
        """The share of a batch's mean square distance that may enter the statistics: at most 1."""
        _, constant = self._deviation()
        share = WIDEST**2 * self.var / spread.clamp_min(torch.finfo(spread.dtype).tiny)
        return torch.where(constant | (self.count < FIRST_ROWS), 1.0, share.clamp_max(1.0))

    def _cut(self, x: Tensor) -> Tensor:
        """As much of each value as may enter the statistics. Features that were constant so far have no bound."""
        deviation, constant = self._deviation()
        reach = torch.where(constant | (self.count < FIRST_ROWS), torch.inf, FURTHEST * deviation)
        return x.clamp(self.mean - reach, self.mean + reach)


class BatchNormWarmup:
    """Batch normalisation's momentum at step t: max(its own, 1/t), a plain mean of all batches at first.

    With its own momentum alone they start as mean 0 and variance 1 and keep a share of that for many steps. A teacher
    that averages them keeps it ten times longer, and answers no better than chance all the while.
    """

    def __init__(self, network: nn.Module) -> None:
        kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
        self._layers = [
            (layer, layer.momentum)
            for layer in network.modules()
            if isinstance(layer, kinds) and layer.momentum is not None
        ]

    def set(self, step: int) -> None:
        """For the forward pass of step t, counted from 1."""
        for layer, momentum in self._layers:
            layer.momentum = max(momentum, 1.0 / step)
