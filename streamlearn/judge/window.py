"""A ring buffer of rows with named columns: the bounded memory of every windowed score.

Letters: W size of the window, N rows held, at most W.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from streamlearn.records import Array

Column = np.ndarray[tuple[int], np.dtype[Any]]
"""One number per row, oldest first."""


def joined(groups: Mapping[str, Mapping[str, Array]]) -> dict[str, Array]:
    """The states of several parts as one mapping, keyed "part.name"."""
    return {f"{group}.{name}": array for group, state in groups.items() for name, array in state.items()}


def group_of(state: Mapping[str, Array], group: str) -> dict[str, Array]:
    """The state of one part of a mapping made by `joined`."""
    start = f"{group}."
    return {name.removeprefix(start): array for name, array in state.items() if name.startswith(start)}


class Window:
    """A ring of `size` rows. Reading copies them oldest first, so sums do not depend on the ring's position.

    Args:
        size: W.
        columns: names and types of the columns, in the order in which `append` takes them. A type may have a shape.
    """

    def __init__(self, size: int, columns: Mapping[str, npt.DTypeLike]) -> None:
        assert size >= 1, size
        self._size = size
        self._columns = {name: np.zeros(size, dtype) for name, dtype in columns.items()}
        self._arrays = tuple(self._columns.values())
        self.clear()

    def __len__(self) -> int:
        return self._held

    def clear(self) -> None:
        """Remove all rows."""
        self._held = self._next = 0

    def append(self, *row: float | Array) -> None:
        """Add a row; a full window drops its oldest."""
        at = self._next
        for column_W, value in zip(self._arrays, row, strict=True):
            column_W[at] = value
        self._held = min(self._held + 1, self._size)
        self._next = (at + 1) % self._size

    def extend(self, *columns: Column | float) -> None:
        """Add as many rows as the arrays have; a single number is the value of every row."""
        count = max(len(column) if isinstance(column, np.ndarray) else 0 for column in columns)
        kept = min(count, self._size)
        places = np.arange(self._next + count - kept, self._next + count) % self._size
        for column_W, values in zip(self._arrays, columns, strict=True):
            column_W[places] = values[count - kept :] if isinstance(values, np.ndarray) else values
        self._held = min(self._held + count, self._size)
        self._next = (self._next + count) % self._size

    def column(self, name: str) -> Column:
        """A copy of one column."""
        return self._columns[name][self._places()]

    def state(self) -> dict[str, Array]:
        """Copies of all columns by name."""
        places = self._places()
        return {name: column_W[places] for name, column_W in self._columns.items()}

    def load(self, state: Mapping[str, Array]) -> None:
        """Restore what `state` saved; of a longer window the newest rows."""
        self.clear()
        lengths = {len(state[name]) for name in self._columns}
        assert len(lengths) == 1, lengths
        self.extend(*(np.asarray(state[name]) for name in self._columns))

    def _places(self) -> npt.NDArray[np.int64]:
        """Indices of the rows, oldest first."""
        return np.arange(self._next - self._held, self._next) % self._size
