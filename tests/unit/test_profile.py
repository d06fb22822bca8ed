"""Profiles of values: kinds, ranges, distinct values, on what producers really send."""

from __future__ import annotations

import random
from datetime import UTC, date, datetime
from datetime import time as time_of_day
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamlearn.schema.paths import MISSING
from streamlearn.schema.profile import NO_VALUE, number_in, profile


class TestKinds:
    @pytest.mark.parametrize(
        ("value", "kind"),
        [
            (True, "boolean"),
            (3, "integer"),
            (10**400, "other"),
            (2.5, "number"),
            (Decimal("12.30"), "number"),
            (time_of_day(12, 30), "number"),
            (float("nan"), "no_value"),
            ("12.5", "number_text"),
            ("1e3", "number_text"),
            ("-7", "number_text"),
            ("007", "text"),
            ("1_000", "text"),
            ("N/A", "no_value"),
            ("2026-03-05", "time_text"),
            ("2026-03-05T12:00:00+01:00", "time_text"),
            ("20260305", "number_text"),
            ("blue", "text"),
            (datetime(2026, 3, 5, tzinfo=UTC), "time"),
            (date(2026, 3, 5), "time"),
            ([1, 2.5], "vector"),
            ([1, "a"], "list"),
            ([True], "list"),
            ({"a": 1}, "object"),
            (b"\xff", "other"),
        ],
    )
    def test_of_a_value(self, value: object, kind: str) -> None:
        """One kind each."""
        assert dict(profile([value]).kinds) == {kind: 1}

    def test_absent_null_and_empty_text_are_missing(self) -> None:
        """They have no kind."""
        found = profile([MISSING, None, "", "  ", 0])

        assert (found.count, found.missing, found.present) == (5, 4, 1)

    @pytest.mark.parametrize("text", ["0123", "00", "-07", "abc", "nan", "inf", "1_0"])
    def test_a_code_is_no_number(self, text: str) -> None:
        """A leading zero has a meaning, as in a postal code."""
        assert number_in(text) is None

    @pytest.mark.parametrize(("text", "number"), [("0", 0.0), ("0.5", 0.5), ("-0.5", -0.5), ("+3", 3.0)])
    def test_a_number_in_a_text(self, text: str, number: float) -> None:
        """With sign and fraction."""
        assert number_in(text) == number


class TestNumbers:
    def test_are_sorted_whatever_their_form(self) -> None:
        """Numbers, decimals and texts together."""
        assert profile([3, "1.5", Decimal(2), 0.5]).numbers == [0.5, 1.5, 2.0, 3.0]

    def test_whole_ones_may_be_floats(self) -> None:
        """As JavaScript and Avro doubles write them."""
        assert profile([1.0, 2, "3"]).is_whole
        assert not profile([1.0, 2.5]).is_whole


class TestDistinct:
    def test_equal_values_of_different_forms_are_one(self) -> None:
        """1, 1.0 and "1"."""
        assert profile([1, 1.0, "1", "one"]).distinct == 2

    def test_the_estimate_is_the_number_when_all_were_seen_often(self) -> None:
        """Nothing is added."""
        assert profile([n % 7 for n in range(700)]).distinct_estimate == 7

    def test_the_estimate_is_near_the_truth_when_half_were_seen(self) -> None:
        """1,000 equally frequent values, 700 draws."""
        rng = random.Random(0)
        found = profile([rng.randrange(1000) for _ in range(700)])

        assert found.distinct < 550
        assert 800 < found.distinct_estimate < 1250

    def test_unique_values(self) -> None:
        """Each once; missing ones do not matter, and lists are no scalars."""
        assert profile(["a", "b", None]).is_unique
        assert not profile(["a", "a"]).is_unique
        assert not profile([[1], [2]]).is_unique
        assert not profile([]).is_unique

    def test_the_most_common_come_in_a_fixed_order(self) -> None:
        """Ties by text."""
        assert profile(["b", "a", "c", "c"]).most_common(2) == ["c", "a"]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.decimals() | st.binary() | st.datetimes()
    | st.sampled_from([*NO_VALUE, MISSING]),
    lambda each: st.lists(each, max_size=3) | st.dictionaries(st.text(), each, max_size=3),
    max_leaves=6,
)  # fmt: skip


@given(st.lists(VALUES, max_size=20))
def test_any_values_have_a_profile(values: list[Any]) -> None:
    """Each is missing or of one kind."""
    found = profile(values)

    assert found.count == len(values) == found.missing + sum(found.kinds.values())
    assert found.numbers == sorted(found.numbers)
