"""Running statistics: of inputs, to standardise a drifting stream; and the warm-up of batch normalisation.

Each feature of a table, each channel of an image becomes arsinh((x - centre) / scale): linear within a scale, beyond it
logarithmic. Centre is the median, scale a high quantile of the distances from it, of `InputSample`: rows spread over
the horizon. So up to an eighth of outliers, such as a sentinel -999999, changes nothing, whatever the batch size, and
values of a feature with a heavy tail, such as an amount, stay apart from each other at both ends. For the robust scale
and a soft clip see RealMLP (Holzmüller, Grinsztajn and Steinwart, 2024); docs/research/inputs.md compares.

Statistics change only in `observe`, never in `forward`: a prediction changes nothing, and a row is predicted before it
is observed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from streamlearn.records import Array

HORIZON_ROWS = 10_000
"""The sample is spread over about as many of the newest rows."""
SAMPLE_ROWS = 256
"""Rows that the sample keeps."""
REFRESH_ROWS = 16
"""Once the sample is full, the statistics are computed again after this number of new rows in it."""
_FIRST_ROWS = 16
"""Of a sample that begins with a centre and scale."""
LIMIT = 10.0
"""Standardised values are clipped here: some 10,000 scales from the centre."""
RELATIVE_FLOOR = 1e-6
"""A distance below this share of the centre is float32 rounding."""
_PLACES = 16
"""Pixels per channel of an image that the sample keeps."""
_QUANTILE, _NORMAL_QUANTILE = 7 / 8, 1.534
"""Quantile of distances from the median, and its value for a standard normal distribution."""
LARGEST_INPUT = 1e6
"""Without input statistics, values (after `schema.scale`) are clipped here."""


class RunningNorm(nn.Module):
    """arsinh((x - centre) / scale), per feature of a table, per channel of an image.

    A feature that never changed is only centred. Before the first `observe` centre and scale are 0 and 1.
    """

    centre: Tensor
    scale: Tensor

    def __init__(self, shape: tuple[int, ...], *, horizon_rows: int = HORIZON_ROWS) -> None:
        super().__init__()
        assert horizon_rows >= 1, horizon_rows
        of_one = (shape[0], *(1 for _ in shape[1:]))
        self.register_buffer("centre", torch.zeros(of_one))
        self.register_buffer("scale", torch.ones(of_one))
        self.sample = InputSample(shape, horizon_rows)
        """Part of a checkpoint, but not of the `state_dict`: a server does not need it."""

    def forward(self, x: Tensor) -> Tensor:
        """Standardised (B, ...); changes nothing."""
        return ((x - self.centre) / self.scale).asinh().clamp(-LIMIT, LIMIT)

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Take rows (B, *shape), B >= 1, into the statistics, in place.

        Features whose statistics would not be finite (values near the end of float32) keep the old ones.
        """
        if not self.sample.add(x):
            return
        centre, scale, is_known = self.sample.statistics()
        self.centre.copy_(torch.where(is_known, centre, self.centre))
        self.scale.copy_(torch.where(is_known, scale, self.scale))


def as_centre_and_scale(arrays: Mapping[str, Array]) -> dict[str, Array]:
    """Arrays of a model; of an earlier version, with its mean and deviation as centre and scale."""
    renamed = dict(arrays)
    for owner in ("", "student.", "teacher."):
        if (mean := renamed.pop(f"{owner}normalise.mean", None)) is not None:
            variance = renamed.pop(f"{owner}normalise.var").astype(np.float32)
            renamed.pop(f"{owner}normalise.count")
            renamed[f"{owner}normalise.centre"] = mean
            renamed[f"{owner}normalise.scale"] = np.sqrt(np.where(variance > 0.0, variance, np.float32(1.0)))
    return renamed


class InputBound(nn.Module):
    """Replaces `RunningNorm` if inputs are not normalised: clips what would overflow float32 in a network.

    One value of 1e19 makes the variance of batch normalisation infinite, while the loss stays finite.
    """

    def __init__(self, largest: float = LARGEST_INPUT) -> None:
        """`largest`: the bound, if codes of categories may be larger."""
        super().__init__()
        self.largest = largest

    def forward(self, x: Tensor) -> Tensor:
        """Clipped; NaN stays NaN."""
        return x.clamp(-self.largest, self.largest)


class InputSample:
    """Rows spread over the horizon.

    The first rows are all kept, up to `SAMPLE_ROWS` or the horizon. After those one row of each block of horizon_rows /
    SAMPLE_ROWS replaces the oldest: its place in the block is pseudo-random and depends on the number of the block
    alone, so a restart keeps the same rows, and how rows are divided into batches does not matter. The host knows which
    row is kept without asking the device. Rows of a step that is skipped stay: they are of the stream.
    """

    def __init__(self, shape: tuple[int, ...], horizon_rows: int) -> None:
        self._size = min(SAMPLE_ROWS, horizon_rows)
        self._stride = horizon_rows // self._size
        places = math.prod(shape[1:])
        self._step = max(1, -(-places // _PLACES))
        self._kept_NCP = torch.zeros((self._size, shape[0], -(-places // self._step)))
        # Rows observed, and rows kept. The host's own; `tensors` shares their memory.
        self._rows, self._kept = np.zeros((), np.int64), np.zeros((), np.int64)
        self._of_one = (shape[0], *(1 for _ in shape[1:]))

    def add(self, x: Tensor) -> bool:
        """Observe rows (B, *shape), and keep some of them. Returns whether the statistics are to be computed again."""
        self._move_to(x.device)
        first, kept = int(self._rows), int(self._kept)
        self._rows[...] = first + len(x)
        for row in self._turns(first, len(x)):
            pixels_CP = x[row].reshape(self._of_one[0], -1)[:, :: self._step]
            self._kept_NCP[kept % self._size] = pixels_CP.nan_to_num(nan=torch.finfo(pixels_CP.dtype).max)
            kept += 1
        before, self._kept[...] = int(self._kept), kept
        return kept > before and (before < self._size or kept // REFRESH_ROWS > before // REFRESH_ROWS)

    def statistics(self) -> tuple[Tensor, Tensor, Tensor]:
        """Centre and scale of each feature, and whether they are finite."""
        values_CN = self._kept_NCP[: int(self._kept)].transpose(0, 1).reshape(self._of_one[0], -1)
        centre_C1, scale_C1 = self._describe(values_CN)
        is_known_C1 = torch.isfinite(centre_C1) & torch.isfinite(scale_C1)
        return centre_C1.view(self._of_one), scale_C1.view(self._of_one), is_known_C1.view(self._of_one)

    @torch.no_grad()
    def begin(self, centre: Tensor, scale: Tensor) -> None:
        """Start with a few rows of this centre and scale, which a model of an earlier version has without a sample.

        Otherwise its first row alone would be the centre, with no scale.
        """
        rows = min(_FIRST_ROWS, self._size)
        z_N = torch.special.ndtri((torch.arange(rows, device=centre.device) + 0.5) / rows)
        tensors = self.tensors()
        tensors["sample"][:rows] = (centre.flatten() + scale.flatten() * z_N[:, None])[:, :, None]
        tensors["rows"].fill_(rows)
        tensors["kept"].fill_(rows)

    def tensors(self) -> dict[str, Tensor]:
        """Live, by name: part of the checkpoint."""
        return {
            "sample": self._kept_NCP,
            "rows": torch.from_numpy(self._rows),
            "kept": torch.from_numpy(self._kept),
        }

    def _describe(self, values_CN: Tensor) -> tuple[Tensor, Tensor]:
        centre_C1 = self._rank(values_CN, 0.5)
        distance_CN = (values_CN - centre_C1).abs()
        distance_CN = torch.where(distance_CN <= centre_C1.abs() * RELATIVE_FLOOR, 0.0, distance_CN)
        scale_C1 = self._rank(distance_CN, _QUANTILE) / _NORMAL_QUANTILE
        # Most rows are the same in a sparse feature: its scale is that of the others, whatever their share.
        others_C1 = torch.where(distance_CN > 0.0, distance_CN, torch.nan).nanmedian(dim=1, keepdim=True).values
        scale_C1 = torch.where(scale_C1 > 0.0, scale_C1, others_C1.nan_to_num(nan=1.0))
        return centre_C1, scale_C1

    def _rank(self, values_CN: Tensor, share: float) -> Tensor:
        """The value (C, 1) above that share of a feature's values."""
        return values_CN.kthvalue(int(share * (values_CN.shape[1] - 1)) + 1, dim=1, keepdim=True).values

    def _turns(self, first: int, count: int) -> Iterator[int]:
        """Which of `count` rows are kept, after `first` rows were observed."""
        yield from range(min(count, max(0, self._size - first)))
        for block in range(first // self._stride, (first + count - 1) // self._stride + 1):
            number = block * self._stride + scattered(block) % self._stride
            if max(first, self._size) <= number < first + count:
                yield number - first

    def _move_to(self, device: torch.device) -> None:
        if self._kept_NCP.device != device:
            self._kept_NCP = self._kept_NCP.to(device)


NumberT = TypeVar("NumberT", int, Tensor)


def scattered(number: NumberT) -> NumberT:
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
