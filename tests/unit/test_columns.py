"""A record's fields become a row: one encoder for each kind of column, all zeros for missing."""

from __future__ import annotations

import math
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from structlog.testing import capture_logs

from streamlearn.errors import ConfigError, RecordError
from streamlearn.schema.columns import LARGEST_NUMBER, MAX_UNKNOWN, ColumnCounts, RowEncoder, hashed_text
from streamlearn.schema.settings import ColumnConfig

ALL_KINDS = {
    "amount": "number",
    "vip": "boolean",
    "merchant": {"kind": "category", "buckets": 8192},
    "at": {"kind": "timestamp", "unit": "ms", "cycle": "year"},
    "embedding": {"kind": "vector", "size": 3},
    "note": {"kind": "text", "size": 16},
    "country": {"kind": "category", "from": "after.country"},
}
CATEGORY: Any = {"kind": "category", "buckets": 1 << 20}
VECTOR: Any = {"kind": "vector", "size": 3}
TEXT: Any = {"kind": "text", "size": 64}
UUID_TEXT = "12345678-1234-5678-1234-567812345678"


def encoder_of(columns: dict[str, Any], **options: Any) -> RowEncoder:
    return RowEncoder({name: ColumnConfig.model_validate(given) for name, given in columns.items()}, **options)


def row_of(kind: Any, value: object) -> list[float]:
    """The row of one column `c`, and another one that is always there."""
    return encoder_of({"c": kind, "other": "boolean"}).encode({"c": value, "other": True}).tolist()[:-1]


def counts_of(kind: Any, value: object) -> tuple[int, int]:
    """How often the column was missing and invalid."""
    encoder = encoder_of({"c": kind, "other": "boolean"})
    encoder.encode({"c": value, "other": True})
    counts = encoder.counts()
    return counts.missing["c"], counts.invalid["c"]


def failing(text: str) -> list[float]:
    """A user's encoder that refuses some texts."""
    if text == "bad":
        raise KeyError(text)
    return [1.0, float(len(text))]


class TestNumber:
    @pytest.mark.parametrize(
        ("value", "expected"),
        [
            (12.5, 12.5),
            (-3, -3.0),
            (True, 1.0),
            ("12.5", 12.5),
            (" 7 ", 7.0),
            (Decimal("1.25"), 1.25),
            (LARGEST_NUMBER, np.float32(LARGEST_NUMBER)),
            (datetime(1970, 1, 2, tzinfo=UTC), 86400.0),
            (date(1970, 1, 2), 86400.0),
        ],
    )
    def test_is_its_value_and_a_flag(self, value: object, expected: float) -> None:
        """Numbers may be given as text, decimals or dates."""
        assert row_of("number", value) == [expected, 1.0]

    @pytest.mark.parametrize(
        "value",
        [
            "N/A", "1_000", "nan", "inf", math.nan, math.inf, -math.inf, 1e300, 10**400, "1e300", [1], {"a": 1},
            Decimal("NaN"), Decimal("sNaN"), Decimal("1e400"), b"1", UUID(UUID_TEXT),
        ],
    )  # fmt: skip
    def test_that_is_none_is_invalid_and_encoded_as_missing(self, value: object) -> None:
        """Real producers send "N/A"; that is no reason to lose the record."""
        assert row_of("number", value) == [0.0, 0.0]
        assert counts_of("number", value) == (0, 1)

    @pytest.mark.parametrize("value", [None, "", "  "])
    def test_that_is_null_or_empty_is_missing(self, value: object) -> None:
        """Empty text is how CSV writes null."""
        assert row_of("number", value) == [0.0, 0.0]
        assert counts_of("number", value) == (1, 0)


class TestBoolean:
    @pytest.mark.parametrize(
        ("value", "expected"),
        [(True, 1), (False, -1), (1, 1), (0, -1), (1.0, 1), ("true", 1), ("FALSE", -1), ("0", -1), ("no", -1)],
    )
    def test_is_plus_or_minus_one(self, value: object, expected: float) -> None:
        """Also as number or text."""
        assert row_of("boolean", value) == [expected]

    @pytest.mark.parametrize(("value", "counts"), [(None, (1, 0)), ("", (1, 0)), ("maybe", (0, 1)), (2, (0, 1))])
    def test_else_it_is_missing_or_invalid(self, value: object, counts: tuple[int, int]) -> None:
        """0 stands for both."""
        assert row_of("boolean", value) == [0.0]
        assert counts_of("boolean", value) == counts


class TestCategory:
    @pytest.mark.parametrize(
        "values",
        [
            (1, 1.0, "1", Decimal("1"), Decimal("1.00")),
            (True, "true"),
            (UUID(UUID_TEXT), UUID_TEXT),
            ("é".encode(), "é"),
            (date(2026, 1, 2), "2026-01-02"),
        ],
    )
    def test_equal_texts_have_one_bucket(self, values: tuple[object, ...]) -> None:
        """A format's type must not matter: the same record comes as Avro and as JSON."""
        assert len({row_of(CATEGORY, value)[0] for value in values}) == 1

    def test_buckets_are_stable(self) -> None:
        """They are in published models: a change of the hash would change what those models see."""
        assert row_of(CATEGORY, "web") == [110665.0]

    def test_buckets_are_whole_numbers_from_1(self) -> None:
        """0 is missing; float32 holds all of them."""
        encoder = encoder_of({"c": {"kind": "category", "buckets": 5}})

        codes = {float(encoder.encode({"c": f"v{n}"})[0]) for n in range(200)}

        assert codes == {1.0, 2.0, 3.0, 4.0, 5.0}

    def test_columns_hash_differently(self) -> None:
        """Equal values of two columns are two things."""
        encoder = encoder_of({"a": CATEGORY, "b": CATEGORY})

        row = encoder.encode({"a": "x", "b": "x"})

        assert row[0] != row[1]

    def test_its_memory_is_bounded(self) -> None:
        """After thousands of values, a bucket is what it was."""
        encoder = encoder_of({"c": CATEGORY})
        first = encoder.encode({"c": "first"})[0]
        for n in range(10_000):
            encoder.encode({"c": n})

        assert encoder.encode({"c": "first"})[0] == first

    @pytest.mark.parametrize("value", [{"a": 1}, [1], {}, []])
    def test_a_nested_value_is_invalid(self, value: object) -> None:
        """Its text would depend on the order of its fields."""
        assert counts_of(CATEGORY, value) == (0, 1)


class TestTimestamp:
    MOMENT = datetime(2026, 3, 5, 18, 0, tzinfo=UTC)  # a Thursday, the 64th day of its year

    @pytest.mark.parametrize(
        ("unit", "value"),
        [
            ("s", 1772733600),
            ("ms", 1772733600_000),
            ("us", 1772733600e6),
            ("ns", "1772733600000000000"),
            ("ms", "2026-03-05T18:00:00Z"),
            ("ms", "2026-03-05 18:00:00"),
            ("s", "2026-03-05T20:00:00+02:00"),
            ("ms", MOMENT),
            ("ms", MOMENT.replace(tzinfo=None)),
        ],
    )
    def test_is_the_phase_of_its_cycle_and_of_shorter_ones(self, unit: str, value: object) -> None:
        """In UTC; text without a zone is UTC."""
        day, week, year = 0.75, 3.75 / 7, 63.75 / 365
        expected = [of(math.tau * part) for part in (day, week, year) for of in (math.sin, math.cos)]

        for cycle, places in {"day": 2, "week": 4, "year": 6}.items():
            row = row_of({"kind": "timestamp", "unit": unit, "cycle": cycle}, value)
            assert row == pytest.approx(expected[:places], abs=1e-6)
        assert len(row_of({"kind": "timestamp", "unit": unit}, value)) == 2

    @pytest.mark.parametrize("value", ["yesterday", 1e18, -1e18, math.nan, 10**400, True, [], b"2026"])
    def test_that_is_none_is_invalid(self, value: object) -> None:
        """Also one that is about the year 5138 or later, which is another unit."""
        assert row_of("timestamp", value) == [0.0] * 2
        assert counts_of("timestamp", value) == (0, 1)

    def test_before_1970_is_a_timestamp_too(self) -> None:
        """Birthdays are."""
        assert row_of("timestamp", -86400 * 365 * 20)[1] == 1.0
        assert row_of("timestamp", date(1950, 6, 1))[1] == 1.0


class TestVector:
    def test_is_its_numbers_and_a_flag(self) -> None:
        """As they are; the network standardises them."""
        assert row_of(VECTOR, [1, 2.5, -3]) == [1.0, 2.5, -3.0, 1.0]

    @pytest.mark.parametrize("value", [[1, 2], [1, 2, 3, 4], [1, 2, math.nan], [1, 2, 1e300], [1, 2, None], "abc", 3])
    def test_is_invalid_as_a_whole(self, value: object) -> None:
        """One bad number spoils an embedding."""
        assert row_of(VECTOR, value) == [0.0] * 4
        assert counts_of(VECTOR, value) == (0, 1)


class TestText:
    def test_is_of_unit_length(self) -> None:
        """A long text does not count more than a short one."""
        row = np.array(row_of(TEXT, "The quick brown fox"))

        assert np.linalg.norm(row) == pytest.approx(1.0, abs=1e-6)

    def test_similar_texts_are_close(self) -> None:
        """They share n-grams."""
        one, other, third = (
            np.array(hashed_text(text, 512)) for text in ("refund my order", "refund the orders", "hello world")
        )

        assert one @ other > 0.3 > one @ third

    def test_case_and_white_space_do_not_matter(self) -> None:
        """Words do."""
        assert row_of(TEXT, "Red  Shoes\n") == row_of(TEXT, "red shoes")

    def test_is_stable(self) -> None:
        """As for categories."""
        assert [round(float(x), 4) for x in hashed_text("red", 4)] == [-0.5774, 0.5774, 0.5774, 0.0]

    @given(st.text(max_size=200))
    def test_any_text_is_finite(self, text: str) -> None:
        """Of any script."""
        assert np.isfinite(hashed_text(text, 32)).all()

    def test_a_users_encoder_is_called(self) -> None:
        """By its import path."""
        assert row_of({"kind": "text", "size": 2, "encoder": f"{__name__}:failing"}, "abc") == [1.0, 3.0]

    @pytest.mark.parametrize(("size", "value"), [(2, "bad"), (3, "abc")])
    def test_what_a_users_encoder_refuses_is_invalid(self, size: int, value: str) -> None:
        """Also a result of another size."""
        assert counts_of({"kind": "text", "size": size, "encoder": f"{__name__}:failing"}, value) == (0, 1)

    def test_the_first_refusal_of_a_users_encoder_is_logged(self) -> None:
        """A mistake in it would otherwise show in counts only."""
        encoder = encoder_of({"c": {"kind": "text", "size": 3, "encoder": f"{__name__}:failing"}, "other": "boolean"})

        with capture_logs() as logged:
            for _ in range(2):
                encoder.encode({"c": "abc", "other": True})

        assert [(line["event"], line["column"]) for line in logged] == [("text_encoder_failed", "c")]
        assert logged[0]["error"] == "expected 3 numbers, got the shape (2,)"

    def test_an_encoder_that_does_not_exist_is_an_error_at_once(self) -> None:
        """With the setting."""
        with pytest.raises(ConfigError, match=r"columns\.c\.encoder"):
            row_of({"kind": "text", "size": 2, "encoder": f"{__name__}:none"}, "abc")


class TestRow:
    def test_has_its_columns_in_order(self) -> None:
        """Each at the sum of the widths before it."""
        encoder = encoder_of(ALL_KINDS)
        record = {"amount": 2.0, "vip": False, "embedding": [1, 2, 3], "after": {"country": "DE"}}

        row = encoder.encode(record)

        assert [column.width for column in encoder.columns] == [2, 1, 1, 6, 4, 16, 1]
        assert row.shape == (31,)
        assert row.dtype == np.float32
        assert row[:4].tolist() == [2.0, 1.0, -1.0, 0.0]
        assert row[10:14].tolist() == [1.0, 2.0, 3.0, 1.0]
        assert row[30] > 0

    def test_an_older_row_is_a_prefix_of_a_newer_one(self) -> None:
        """A column that is added later goes last, so that stored rows stay valid."""
        record = {"a": 1.5, "b": "x", "c": "y"}

        before = encoder_of({"a": "number", "b": "category"}).encode(record)
        after = encoder_of({"a": "number", "b": "category", "c": "category"}).encode(record)

        assert after[: len(before)].tolist() == before.tolist()

    def test_rows_do_not_share_memory(self) -> None:
        """A row is kept long after the next one is encoded."""
        encoder = encoder_of({"a": "number"})

        first, second = encoder.encode({"a": 1}), encoder.encode({"a": 2})

        assert (first[0], second[0]) == (1.0, 2.0)
        first[0] = 5.0

    def test_a_record_without_any_column_is_an_error(self) -> None:
        """It is another kind of record: a wrong topic, or a wrong path. Nulls are values."""
        encoder = encoder_of(ALL_KINDS)

        with pytest.raises(RecordError, match=r"at least one of the columns amount, .*, after\.country") as caught:
            encoder.encode({"total": 3})

        assert caught.value.reason == "no_value"
        assert encoder.encode({"amount": None}).tolist() == [0.0] * 31

    def test_counts_are_by_column(self) -> None:
        """Missing, invalid, and fields that no setting names."""
        encoder = encoder_of({"a": "number", "b": "category"}, used=("id",))
        for record in ({"a": 1, "b": "x", "id": 1}, {"a": "N/A", "z": 1}, {"b": None, "a": 2, "z": 1, "y": 1}):
            encoder.encode(record)

        assert encoder.counts() == ColumnCounts(3, {"a": 0, "b": 2}, {"a": 1, "b": 0}, {"z": 2, "y": 1})

    def test_names_of_unknown_fields_are_bounded(self) -> None:
        """A producer may make them up."""
        encoder = encoder_of({"a": "number"})
        for n in range(1000):
            encoder.encode({"a": 1, f"f{n}": 1})

        unknown = encoder.counts().unknown

        assert len(unknown) == MAX_UNKNOWN + 1
        assert unknown["…"] == 1000 - MAX_UNKNOWN

    @given(
        st.dictionaries(
            st.sampled_from([*ALL_KINDS, "after", "z"]),
            st.recursive(
                st.none()
                | st.booleans()
                | st.integers()
                | st.floats()
                | st.text()
                | st.binary()
                | st.decimals()
                | st.datetimes()
                | st.dates()
                | st.times()
                | st.uuids(),
                lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
                max_leaves=10,
            ),
        )
    )
    def test_any_values_give_a_finite_row_or_a_record_error(self, record: dict[str, Any]) -> None:
        """Nothing else is raised, and nothing else can reach the network."""
        try:
            row = encoder_of(ALL_KINDS).encode(record)
        except RecordError:
            assert not record.keys() & (ALL_KINDS.keys() - {"country"})
        else:
            assert np.isfinite(row).all()
            assert np.abs(row).max() <= LARGEST_NUMBER * 1.0001

    def test_names_the_columns_whose_value_is_invalid(self) -> None:
        """For the answer of `/predict`; missing ones are not named."""
        invalid: list[str] = []

        encoder_of(ALL_KINDS).encode({"amount": "N/A", "vip": None, "after": {"country": {}}}, invalid=invalid)

        assert invalid == ["amount", "country"]

    def test_shows_what_can_be_read_back(self) -> None:
        """A category's bucket; timestamps and texts are left out."""
        encoder = encoder_of(ALL_KINDS)
        fields = {"amount": 0, "vip": False, "merchant": "a", "at": 0, "embedding": [1, 2, 3], "note": "late"}

        found = encoder.values(encoder.encode(fields))
        missing = encoder.values(encoder.encode({"amount": None}))

        assert 1 <= found.pop("merchant") <= 8192
        assert found == {"amount": 0.0, "vip": False, "embedding": [1.0, 2.0, 3.0], "country": None}
        assert missing == dict.fromkeys(("amount", "vip", "merchant", "embedding", "country"))


class TestSettings:
    @pytest.mark.parametrize(
        ("given", "expected"),
        [
            ("vector", "needs size"),
            ({"kind": "number", "buckets": 3}, "a number column has no buckets"),
            ({"kind": "category", "unit": "ms"}, "a category column has no unit"),
            ({"kind": "number", "from": "a..b"}, "expected 1 to 16 names"),
            ({"kind": "category", "buckets": 1 << 21}, "less than or equal"),
            ({"kind": "text", "encoder": "name"}, "expected package.module:function"),
            ("colour", "Input should be"),
        ],
    )
    def test_that_do_not_fit_are_errors(self, given: Any, expected: str) -> None:
        """Before any record is read."""
        with pytest.raises(ValidationError, match=expected):
            ColumnConfig.model_validate(given)
