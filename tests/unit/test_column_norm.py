"""Statistics of columns: those of `RunningNorm` over the rows in which a value is present."""

from __future__ import annotations

import pytest
import torch

from streamlearn.models.column_norm import ColumnNorm
from streamlearn.models.normalise import LIMIT, RunningNorm
from streamlearn.records import Column
from tests.tables import COLUMNS, rows

NUMBERS = (Column("often", "number"), Column("rare", "number"), Column("vector", "vector", 2))
OFTEN, RARE, VECTOR = 0, 2, slice(4, 6)


def number_rows(count: int, seed: int = 0) -> torch.Tensor:
    """`often` is always there, `rare` and `vector` in a tenth of the rows."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn((count, 4), generator=generator) * 3.0 + 100.0
    rare, vector = (torch.rand((2, count, 1), generator=generator) < 0.1).float()
    one = torch.ones((count, 1))
    return torch.cat((values[:, :1], one, values[:, 1:2] * rare, rare, values[:, 2:] * vector, vector), dim=1)


def observed(x_BW: torch.Tensor, *, batch: int = 32, columns: tuple[Column, ...] = NUMBERS) -> ColumnNorm:
    norm = ColumnNorm(columns, horizon_rows=2000)
    for part in x_BW.split(batch):
        norm.observe(part)
    return norm


def alone(values_BF: torch.Tensor, *, batch: int = 32) -> RunningNorm:
    norm = RunningNorm((values_BF.shape[1],), horizon_rows=2000)
    for part in values_BF.split(batch):
        norm.observe(part)
    return norm


class TestStatistics:
    @pytest.mark.parametrize("batch", [1, 32, 500])
    def test_equal_those_of_the_present_values_alone(self, batch):
        """Centre and scale; also beyond the horizon, and where a feature is rare."""
        x = number_rows(4000)
        norm = observed(x, batch=batch)

        for place, flag in ((OFTEN, 1), (RARE, 3), (VECTOR, 6)):
            values = x[x[:, flag] == 1.0][:, place].reshape(int(x[:, flag].sum()), -1)
            expected = alone(values, batch=1)
            # They are computed again after other rows, as those are batched.
            torch.testing.assert_close(norm.centre[place].flatten(), expected.centre, rtol=0.02, atol=0)
            torch.testing.assert_close(norm.scale[place].flatten(), expected.scale, rtol=0.15, atol=0)

    def test_keep_the_same_values_as_those_of_the_present_values_alone(self):
        """The sample that bounds outliers, value by value, whatever the batches."""
        x = number_rows(20_000)
        samples = [observed(x, batch=batch).sample.tensors() for batch in (32, 777)]
        values = x[x[:, 3] == 1.0][:, RARE : RARE + 1]
        expected = alone(values).sample.tensors()

        for found in samples:
            assert torch.equal(found["sample"][:, RARE], expected["sample"][:, 0])
            assert found["rows"].tolist() == [20_000, len(values), int(x[:, 6].sum())]

    def test_standardise_present_numbers_and_leave_everything_else(self):
        """Missing values become 0; flags, codes, booleans, timestamps and texts pass."""
        x = torch.from_numpy(rows(COLUMNS, 300))
        norm = observed(x, columns=COLUMNS)

        standard = norm(x)

        is_measured, flag = norm.is_measured_W, norm.flag_W
        assert torch.equal(standard[:, ~is_measured], x[:, ~is_measured])
        for place in torch.nonzero(is_measured).flatten().tolist():
            is_present = x[:, flag[place]] == 1.0
            assert standard[is_present, place].median().abs() < 0.1
            assert standard[is_present, place].std() == pytest.approx(0.76, abs=0.1)
            assert not standard[~is_present, place].any()

    def test_of_a_column_that_comes_late_start_then(self):
        """It is as if the stream had begun there."""
        x = number_rows(1000)
        late = x.clone()
        late[:600, 4:] = 0.0

        norm, expected = observed(late), observed(x[600:], batch=8)

        torch.testing.assert_close(norm.centre[VECTOR], expected.centre[VECTOR])
        torch.testing.assert_close(norm.scale[VECTOR], expected.scale[VECTOR])

    def test_one_sentinel_does_not_become_the_scale(self):
        """Also in a rare column, once it has a few values."""
        x = number_rows(3000)
        place = torch.nonzero(x[:, 3]).flatten()[20]
        x[place, RARE] = -999_999.0

        assert observed(x).scale[RARE].item() < 4.0

    def test_of_rows_without_a_value_are_the_identity(self):
        """Except for the spacing: before any row, and for a column that never comes."""
        x = torch.tensor([[3.0, 1.0, -2.0, 1.0, 1e9, -1.0, 1.0]])

        expected = x.asinh().clamp(-LIMIT, LIMIT)
        expected[0, [1, 3, 6]] = 1.0  # flags
        assert torch.equal(ColumnNorm(NUMBERS)(x), expected)

    def test_of_columns_without_numbers_are_empty(self):
        """A row of categories passes."""
        columns = (Column("a", "category", 5), Column("b", "boolean"))
        x = torch.tensor([[4.0, -1.0], [0.0, 0.0]])

        norm = observed(x, columns=columns)

        assert torch.equal(norm(x), x)
        assert norm.scale.tolist() == [1.0, 1.0]

    def test_do_not_depend_on_whether_the_host_may_ask(self):
        """Without asking, the statistics are computed in each step, of the same values."""
        x = number_rows(2000)
        norm, other = ColumnNorm(NUMBERS), ColumnNorm(NUMBERS)
        other.sample.host_may_ask = False
        for part in x.split(32):
            norm.observe(part)
            other.observe(part)

        for name, tensor in norm.sample.tensors().items():
            assert torch.equal(tensor, other.sample.tensors()[name])
        torch.testing.assert_close(norm.centre, other.centre, rtol=0.02, atol=0)
