"""Rows with columns of every kind, for unit tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from streamlearn.models.build import ModelSpec
from streamlearn.records import Column

COLUMNS = (
    Column("amount", "number"),
    Column("shop", "category", 50, 4),
    Column("known", "boolean"),
    Column("vector", "vector", 3),
    Column("at", "timestamp", 6),
    Column("country", "category", 7),
    Column("text", "text", 4),
)


def width_of(columns: Sequence[Column]) -> int:
    """Places of a row."""
    return sum(column.width for column in columns)


def table_spec(columns: Sequence[Column], classes: int = 3, **options: Any) -> ModelSpec:
    """A small network for these columns."""
    shape = (width_of(columns),)
    return ModelSpec("table", {"hidden": [16], **options}, shape, classes, True, 1.0, columns=tuple(columns))


def rows(columns: Sequence[Column], count: int, seed: int = 0, *, missing: float = 0.3) -> npt.NDArray[np.float32]:
    """(count, W), each value missing with that probability. The first columns are the same whichever follow."""
    return np.hstack(
        [_places(column, count, np.random.default_rng((seed, n)), missing) for n, column in enumerate(columns)]
    )


def _places(column: Column, count: int, rng: np.random.Generator, missing: float) -> npt.NDArray[np.float32]:
    present = (rng.random((count, 1)) >= missing).astype(np.float32)
    match column.kind:
        case "number" | "vector":
            values = np.hstack((100.0 + 30.0 * rng.normal(size=(count, column.width - 1)), np.ones((count, 1))))
        case "category":
            values = rng.integers(1, column.size + 1, (count, 1))
        case "boolean":
            values = rng.choice([-1.0, 1.0], (count, 1))
        case _:
            values = rng.normal(size=(count, column.width))
    return (values * present).astype(np.float32)
