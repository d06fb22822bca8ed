"""Running statistics: of inputs, to standardise a drifting stream; and the warm-up of batch normalisation.

Input statistics change only in `observe`, never in `forward`: a prediction changes nothing, and a row is predicted
before it is observed. Batches are merged by the formulas of Chan, Golub and LeVeque (1979). The count is capped, so old
rows fade.

Outliers are bounded by `_Sample`: 64 rows, spread over as many rows as the statistics remember. Their median and a high
quantile of their distances from it give each feature a centre and a scale that up to an eighth of outliers do not
move, whatever the batch size. A value counts as at most `FURTHEST` scales from the centre, and no deviation stays
larger than `WIDEST` times that of the sample. So a sentinel such as -999999 does not become the deviation, neither
in the first row nor in a feature that was constant until then.

A whole batch counts as at most `WIDEST` deviations: a burst of 500 outliers makes the deviation 1.8 times as large. A
lasting change of scale or location is followed within the horizon, since each batch may increase the deviation by a
factor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

HORIZON_ROWS = 10_000
"""Cap of the row count: the memory of the statistics."""
LIMIT = 10.0
"""Standardised values are clipped to this many standard deviations, so that one outlier is not the whole gradient."""
FURTHEST = 30.0
"""Deviations from the mean at which a value's part in the statistics is clipped."""
WIDEST = 5.0
"""Deviations, in the root mean square about the mean, at which a whole batch's part in them is clipped. Also the
largest ratio of the deviation to that of the sample."""
FIRST_ROWS = 100
"""With fewer rows a batch's part is not clipped."""
RELATIVE_FLOOR = 1e-6
"""A deviation below this share of the mean is float32 rounding: the feature is constant."""
SAMPLE_ROWS = 64
LEAST_ROWS = 8
"""With fewer rows the sample bounds nothing."""
_PLACES = 16
"""Pixels per channel of an image that the sample keeps."""
_QUANTILE, _NORMAL_QUANTILE = 7 / 8, 1.534
"""Quantile of distances from the median, and its value for a standard normal distribution."""
_COMPLETE_RATIO = 2.0
"""As `WIDEST`, while the sample holds every row that was observed."""
LARGEST_INPUT = 1e6
"""Without input statistics, values (after `schema.scale`) are clipped here."""


class RunningNorm(nn.Module):
    """(x - mean) / deviation, per feature of a table, per channel of an image.

    A feature that never changed is only centred. Before the first `observe` it is the identity, except for `LIMIT`.
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
        self.sample = _Sample(shape, horizon_rows)
        """Part of a checkpoint, but not of the `state_dict`: a server does not need it."""

    def forward(self, x: Tensor) -> Tensor:
        """Standardised (B, ...); changes nothing."""
        deviation, constant = self._deviation()
        return ((x - self.mean) / torch.where(constant, 1.0, deviation)).clamp(-LIMIT, LIMIT)

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Merge rows (B, *shape), B >= 1, into the statistics, in place.

        Features whose statistics would not be finite (a value near the end of float32) keep the old ones.
        """
        self.sample.add(x)
        deviation, constant = self._deviation()
        unbounded = constant | (self.count < FIRST_ROWS)
        # Each value is clipped by the sample, or else by the statistics themselves.
        reach = torch.where(unbounded, torch.inf, FURTHEST * deviation)
        centre = torch.where(self.sample.known, self.sample.centre, self.mean)
        reach = torch.where(self.sample.known, FURTHEST * self.sample.scale, reach)
        clipped = x.clamp(centre - reach, centre + reach)
        # Two passes: as exact as torch.var_mean, and several times faster along the first dimension.
        mean_batch = clipped.mean(dim=self._reduced).view_as(self.mean)
        var_batch = (clipped - mean_batch).square().mean(dim=self._reduced).view_as(self.var)

        total = self.count + len(x)
        share = len(x) / total
        delta = mean_batch - self.mean
        # The share of the batch's mean square distance that may enter the statistics.
        spread = var_batch + delta.square()
        less = (WIDEST**2 * self.var / spread.clamp_min(torch.finfo(spread.dtype).tiny)).clamp_max(1.0)
        less = torch.where(unbounded, 1.0, less)
        delta, var_batch = less.sqrt() * delta, less * var_batch
        mean = self.mean + share * delta
        var = (1.0 - share) * (self.var + share * delta.square()) + share * var_batch
        mean, var = self.sample.bound(mean, var)

        finite = torch.isfinite(mean) & torch.isfinite(var)
        self.mean.copy_(torch.where(finite, mean, self.mean))
        self.var.copy_(torch.where(finite, var, self.var))
        self.count.copy_(total.clamp(max=self.horizon_rows))

    def _deviation(self) -> tuple[Tensor, Tensor]:
        """Per feature, and whether it is only rounding."""
        deviation = self.var.sqrt()
        return deviation, deviation <= self.mean.abs() * RELATIVE_FLOOR


class InputBound(nn.Module):
    """Replaces `RunningNorm` if inputs are not normalised: clips what would overflow float32 in a network.

    One value of 1e19 makes the variance of batch normalisation infinite, while the loss stays finite.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Clipped; NaN stays NaN."""
        return x.clamp(-LARGEST_INPUT, LARGEST_INPUT)


class _Sample:
    """Rows spread over the horizon, and the centre, scale and mean square distance of each feature in them.

    It describes the stream: it also takes the rows of a step that is skipped, whose part in the statistics is undone.

    The first `SAMPLE_ROWS` rows are all kept. After those one of every horizon_rows / SAMPLE_ROWS replaces the oldest:
    the place of that row among them is pseudo-random and depends on the number of the row alone, so a restart
    keeps the same rows, and how rows are divided into batches does not matter. The host knows which row is kept without
    asking the device.
    """

    def __init__(self, shape: tuple[int, ...], horizon_rows: int) -> None:
        self._stride = max(1, horizon_rows // SAMPLE_ROWS)
        places = math.prod(shape[1:])
        self._step = max(1, -(-places // _PLACES))
        self._kept_NCP = torch.zeros((SAMPLE_ROWS, shape[0], -(-places // self._step)))
        # Rows observed, and rows kept. The host's own; `tensors` shares their memory.
        self._rows, self._kept = np.zeros((), np.int64), np.zeros((), np.int64)
        self._of_one = (shape[0], *(1 for _ in shape[1:]))
        self.begin(0)

    def begin(self, rows: int) -> None:
        """Become empty, after `rows` observed rows."""
        self._rows[...], self._kept[...] = rows, 0
        self.refresh()

    def add(self, x: Tensor) -> None:
        """Observe rows (B, *shape), and keep some of them."""
        if self._kept_NCP.device != x.device:
            self._kept_NCP = self._kept_NCP.to(x.device)
            self.refresh()
        first, kept = int(self._rows), int(self._kept)
        self._rows[...] = first + len(x)
        for row in self._turns(first, len(x)):
            pixels_CP = x[row].reshape(self._of_one[0], -1)[:, :: self._step]
            self._kept_NCP[kept % SAMPLE_ROWS] = pixels_CP.nan_to_num(nan=torch.finfo(pixels_CP.dtype).max)
            kept += 1
        if kept > int(self._kept):
            self._kept[...] = kept
            self.refresh()

    def bound(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance, limited by those of the sample."""
        ratio = _COMPLETE_RATIO if int(self._rows) <= SAMPLE_ROWS else WIDEST
        largest = ratio**2 * self._spread
        beyond = self.known & (var > largest)
        deviation = largest.sqrt()
        bounded = mean.clamp(self.centre - deviation, self.centre + deviation)
        return torch.where(beyond, bounded, mean), torch.where(beyond, largest, var)

    def tensors(self) -> dict[str, Tensor]:
        """Live, by name: part of the checkpoint. Call `refresh` after writing to them."""
        return {
            "sample": self._kept_NCP,
            "rows": torch.from_numpy(self._rows),
            "kept": torch.from_numpy(self._kept),
        }

    @torch.no_grad()
    def refresh(self) -> None:
        """Set `centre`, `scale` and `known` from the rows that are kept."""
        count = min(int(self._kept), SAMPLE_ROWS)
        device = self._kept_NCP.device
        if count < LEAST_ROWS:
            self.centre = self.scale = self._spread = torch.zeros(self._of_one, device=device)
            self.known = torch.zeros(self._of_one, dtype=torch.bool, device=device)
            return
        # Along the last dimension, which is faster.
        values_CN = self._kept_NCP[:count].transpose(0, 1).reshape(self._of_one[0], -1)
        last = values_CN.shape[1] - 1
        centre_C1 = values_CN.kthvalue(last // 2 + 1, dim=1, keepdim=True).values
        distance_CN = (values_CN - centre_C1).abs()
        distance_CN = torch.where(distance_CN <= centre_C1.abs() * RELATIVE_FLOOR, 0.0, distance_CN)
        quantile_C1 = distance_CN.kthvalue(int(_QUANTILE * last) + 1, dim=1, keepdim=True).values
        # Most rows are the same in a sparse feature: its scale is that of the others, whatever their share.
        others_C1 = torch.where(distance_CN > 0.0, distance_CN, torch.nan).nanmedian(dim=1, keepdim=True).values
        scale_C1 = torch.where(quantile_C1 > 0.0, quantile_C1 / _NORMAL_QUANTILE, others_C1)
        spread_C1 = distance_CN.minimum(FURTHEST * scale_C1).square().mean(dim=1, keepdim=True)
        self.centre, self.scale, self._spread, self.known = (
            values_C1.view(self._of_one)
            for values_C1 in (centre_C1, scale_C1, spread_C1, torch.isfinite(centre_C1) & torch.isfinite(scale_C1))
        )

    def _turns(self, first: int, count: int) -> Iterator[int]:
        """Which of `count` rows are kept, after `first` rows were observed."""
        yield from range(min(count, max(0, SAMPLE_ROWS - first)))
        for block in range(first // self._stride, (first + count - 1) // self._stride + 1):
            number = block * self._stride + _scattered(block) % self._stride
            if max(first, SAMPLE_ROWS) <= number < first + count:
                yield number - first


def _scattered(number: int) -> int:
    """A pseudo-random function of a whole number, 32 bits (the finaliser of MurmurHash3)."""
    number = (number ^ number >> 16) * 0x85EBCA6B & 0xFFFFFFFF
    number = (number ^ number >> 13) * 0xC2B2AE35 & 0xFFFFFFFF
    return number ^ number >> 16


class BatchNormWarmup:
    """Sets batch normalisation's momentum for its n-th batch: max(its own, 1/n), at first the mean of all.

    n is the layer's own count: batches of skipped steps were undone, and a step of one row has no batch statistics.

    With its own momentum alone, running statistics keep a share of their initial mean 0 and variance 1 for many steps.
    A teacher that averages them keeps it ten times longer, and answers no better than chance meanwhile.
    """

    def __init__(self, network: nn.Module) -> None:
        self._layers = [
            (layer, layer.momentum, layer.num_batches_tracked)
            for layer in network.modules()
            if isinstance(layer, nn.modules.batchnorm._BatchNorm)  # noqa: SLF001 - the base of all kinds
            and layer.momentum is not None
            and layer.num_batches_tracked is not None
        ]

    def set(self, *, ask: bool) -> None:
        """For the next forward pass. Without `ask`, as after many batches, the host does not read the count."""
        for layer, momentum, seen in self._layers:
            batch = 1.0 + seen.item() if ask else math.inf
            layer.momentum = max(momentum, 1.0 / batch)
