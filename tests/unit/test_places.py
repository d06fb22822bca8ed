"""The layout of a row, and rows of fewer columns."""

from __future__ import annotations

import numpy as np

from streamlearn.models.places import places_of
from streamlearn.records import Column, Schema
from tests.tables import COLUMNS, rows, width_of


def test_places_of_every_kind():
    """In the order of the columns; a measured value knows the place that says whether it is present."""
    places = places_of(
        [Column("n", "number"), Column("c", "category", 9), Column("v", "vector", 2), Column("b", "boolean")]
    )

    assert places.column_W.tolist() == [0, 0, 1, 2, 2, 2, 3]
    assert places.is_measured_W.tolist() == [True, False, False, True, True, False, False]
    assert places.is_code_W.tolist() == [False, False, True, False, False, False, False]
    assert places.flag_W.tolist() == [1, 1, 2, 5, 5, 5, 6]


def test_no_place_of_timestamps_and_texts_is_measured():
    """Their values have one scale already."""
    places = places_of([Column("t", "timestamp", 6), Column("text", "text", 4)])

    assert len(places.column_W) == 10
    assert not places.is_measured_W.any()
    assert places.flag_W.tolist() == list(range(10))


def test_a_row_of_fewer_columns_is_completed_with_missing_ones():
    """Single rows and many; complete rows, and samples without columns, are not copied."""
    schema = Schema((width_of(COLUMNS),), np.dtype(np.float32), ("a", "b"), columns=COLUMNS)
    x, old = rows(COLUMNS, 5), rows(COLUMNS[:3], 5)

    assert np.array_equal(schema.padded(old)[:, :4], old)
    assert not schema.padded(old)[:, 4:].any()
    assert np.array_equal(schema.padded(old[0]), schema.padded(old)[0])
    assert schema.padded(x) is x
    assert Schema((2, 3), np.dtype(np.uint8), ("a", "b")).padded(x) is x
