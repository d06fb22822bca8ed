"""Which places of a row (W,) belong to which column, and what they hold. Without torch.

Letters: B rows, W places, K columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from streamlearn.records import Column


@dataclass(frozen=True, slots=True)
class Places:
    """The layout of a row, place by place."""

    column_W: npt.NDArray[np.int64]
    """The number of the column."""
    is_measured_W: npt.NDArray[np.bool_]
    """Values of numbers and vectors: they are standardised, and get Gaussian noise."""
    is_code_W: npt.NDArray[np.bool_]
    """Buckets of categories: names without order or distance."""
    flag_W: npt.NDArray[np.int64]
    """Of a measured value, the place that is 1 if it is present; of others, their own place."""


def places_of(columns: Sequence[Column]) -> Places:
    """The layout of the rows of these columns, in this order."""
    widths_K = np.array([column.width for column in columns], np.int64)
    column_W = np.repeat(np.arange(len(columns)), widths_K)
    last_W = np.repeat(np.cumsum(widths_K) - 1, widths_K)  # of each column: where its presence flag is, if it has one
    own_W = np.arange(len(column_W))
    has_flag_W = np.array([column.kind in {"number", "vector"} for column in columns], bool)[column_W]
    is_code_W = np.array([column.kind == "category" for column in columns], bool)[column_W]
    return Places(column_W, has_flag_W & (own_W != last_W), is_code_W, np.where(has_flag_W, last_W, own_W))
