"""Running statistics of rows with columns: of numbers and vectors, where they are present.

As `RunningNorm` for each place of a row, over the rows in which it is present: a column that was added later, or that
is rarely present, has its own sample. Presence flags, booleans, timestamps, texts and the buckets of categories pass
unchanged.

Letters: B rows, W places, K columns, N kept values.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from streamlearn.models.normalise import HORIZON_ROWS, REFRESH_ROWS, InputSample, RunningNorm, scattered
from streamlearn.models.places import places_of
from streamlearn.records import Column


class ColumnNorm(RunningNorm):
    """As `RunningNorm` for each measured value that is present; 0 where it is missing."""

    is_measured_W: Tensor
    flag_W: Tensor
    sample: ColumnSample

    def __init__(self, columns: Sequence[Column], *, horizon_rows: int = HORIZON_ROWS) -> None:
        places = places_of(columns)
        super().__init__((len(places.column_W),), horizon_rows=horizon_rows)
        self.register_buffer("is_measured_W", torch.from_numpy(places.is_measured_W), persistent=False)
        self.register_buffer("flag_W", torch.from_numpy(places.flag_W), persistent=False)
        self.sample = ColumnSample(torch.from_numpy(places.column_W), horizon_rows)

    def forward(self, x: Tensor) -> Tensor:
        """Rows (B, W); changes nothing."""
        standard = torch.where(x[:, self.flag_W] != 0.0, super().forward(x), 0.0)
        return torch.where(self.is_measured_W, standard, x)

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Take the values of rows (B, W), B >= 1, that are present into the statistics."""
        present_BW = (x[:, self.flag_W] != 0.0) & self.is_measured_W
        if not self.sample.add_present(x, present_BW):
            return
        centre, scale, is_known = self.sample.statistics()
        self.centre.copy_(torch.where(is_known, centre, self.centre))
        self.scale.copy_(torch.where(is_known, scale, self.scale))


class ColumnSample(InputSample):
    """Values of each column, spread over the rows in which it is present, by the rules of `InputSample`.

    Which rows are kept depends on the data. If the host must not ask the device, the statistics are computed again in
    each step.
    """

    def __init__(self, column_W: Tensor, horizon_rows: int) -> None:
        super().__init__((len(column_W),), horizon_rows)
        self.host_may_ask = True
        self._column_W = column_W
        self._first_K = torch.nonzero(column_W.diff(prepend=column_W.new_tensor([-1]))).flatten()
        self._rows_K, self._kept_K = torch.zeros_like(self._first_K), torch.zeros_like(self._first_K)

    def add_present(self, x: Tensor, present_BW: Tensor) -> bool:
        """Observe rows (B, W), and keep some of the values that are present. Returns the same as `add`."""
        self._move_to(x.device)
        present_BK = present_BW[:, self._first_K]  # all values of a column are present together
        number_BK = self._rows_K + present_BK.cumsum(dim=0) - 1
        block_BK = torch.div(number_BK, self._stride, rounding_mode="floor")
        is_turn_BK = number_BK == block_BK * self._stride + scattered(block_BK) % self._stride
        is_kept_BK = present_BK & ((number_BK < self._size) | is_turn_BK)
        self._rows_K.copy_(number_BK[-1] + 1)
        if self.host_may_ask and not bool(is_kept_BK.any()):
            return False
        rank_BK = is_kept_BK.cumsum(dim=0)
        # Of more than fit the last ones stay. The others are written to a further row, which is dropped.
        is_kept_BK = is_kept_BK & (rank_BK > rank_BK[-1] - self._size)
        slot_BK = torch.where(is_kept_BK, (self._kept_K + rank_BK - 1) % self._size, self._size)
        kept_NW = self._kept_NCP[:, :, 0]
        written = torch.cat((kept_NW, kept_NW[:1]))
        written.scatter_(0, slot_BK[:, self._column_W], x.nan_to_num(nan=torch.finfo(x.dtype).max))
        kept_NW.copy_(written[: self._size])
        before_K = self._kept_K.clone()
        self._kept_K += rank_BK[-1]
        is_due_K = (before_K < self._size) | (self._kept_K // REFRESH_ROWS > before_K // REFRESH_ROWS)
        return not self.host_may_ask or bool((is_due_K & (self._kept_K > before_K)).any())

    def tensors(self) -> dict[str, Tensor]:
        """Live, by name."""
        return {"sample": self._kept_NCP, "rows": self._rows_K, "kept": self._kept_K}

    def statistics(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of the values that are kept; unknown of a column without any."""
        self._count_W1 = self._kept_K.clamp(max=self._size)[self._column_W][:, None]
        is_kept_WN = torch.arange(self._size, device=self._count_W1.device) < self._count_W1
        centre_W1, scale_W1 = self._describe(torch.where(is_kept_WN, self._kept_NCP[:, :, 0].t(), torch.nan))
        is_known_W = (torch.isfinite(centre_W1) & torch.isfinite(scale_W1))[:, 0]
        return centre_W1[:, 0], scale_W1[:, 0], is_known_W

    def _rank(self, values_CN: Tensor, share: float) -> Tensor:
        """Of the values that are not NaN, which are sorted last."""
        place_C1 = ((self._count_W1 - 1).clamp(min=0) * share).to(torch.int64)
        return values_CN.sort(dim=1).values.gather(1, place_C1)

    def _move_to(self, device: torch.device) -> None:
        if self._kept_NCP.device != device:
            self._kept_NCP, self._rows_K, self._kept_K = (
                tensor.to(device) for tensor in (self._kept_NCP, self._rows_K, self._kept_K)
            )
            self._column_W, self._first_K = self._column_W.to(device), self._first_K.to(device)
