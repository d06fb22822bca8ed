"""What `init` makes of the fields of records: paths, formats, times, columns, on what producers really send."""

from __future__ import annotations

import random
from collections.abc import Sequence
from datetime import UTC, date, datetime
from typing import Any

import pytest
from fake_registry import FakeRegistry
from hypothesis import given
from hypothesis import strategies as st

from streamlearn.errors import ConfigError
from streamlearn.schema.columns import RowEncoder
from streamlearn.schema.infer import (
    ColumnChoice,
    choose_column,
    collect,
    column_names,
    event_times,
    format_of,
    shown,
    time_field,
    words_of,
)
from streamlearn.schema.paths import MISSING
from streamlearn.schema.profile import profile
from streamlearn.schema.registry import SchemaRegistry
from streamlearn.schema.settings import ColumnConfig, RegistryConfig

NOW_S = 1_772_700_000.0


def column(name: str, values: Sequence[object]) -> ColumnChoice:
    found = profile(values)
    return choose_column(name, found, time_field(name, found, values, [NOW_S] * len(values)))


def repeated(values: Sequence[Any], count: int = 100) -> list[Any]:
    rng = random.Random(0)
    return [rng.choice(values) for _ in range(count)]


class TestCollect:
    def test_nested_objects_have_paths(self) -> None:
        """In the order of their first appearance; absent where a record has none."""
        fields = collect([{"a": 1, "b": {"c": {"d": 2}}}, {"b": {"e": None}, "a": 3}])

        assert list(fields.values.items()) == [
            ("a", [1, 3]), ("b.c.d", [2, MISSING]), ("b.e", [MISSING, None]),
        ]  # fmt: skip
        assert (fields.count, fields.root) == (2, "")

    def test_names_that_no_path_can_name(self) -> None:
        """With a dot, or empty."""
        assert collect([{"a.b": 1, "": 2, "c": {"d.e": 3}}]).unreachable == ("a.b", "", "c.d.e")

    @pytest.mark.parametrize("wrap", [False, True])
    def test_debezium_has_its_row_below_after(self, wrap: bool) -> None:
        """With a schema in each record, or without. Deletes have null there."""
        rows: list[dict[str, Any]] = [
            {"before": None, "after": {"id": n, "to": {"city": "x"}}, "op": "c", "source": {"ts_ms": 1}}
            for n in range(9)
        ]
        rows.append({"before": {"id": 1}, "after": None, "op": "d", "source": {"ts_ms": 1}})
        fields = collect([{"schema": {}, "payload": row} for row in rows] if wrap else rows)
        root = "payload.after." if wrap else "after."

        assert fields.root == root
        assert fields.row_paths == [f"{root}id", f"{root}to.city"]
        assert column_names(fields) == {f"{root}id": "id", f"{root}to.city": "to_city"}

    def test_a_field_called_after_is_no_envelope(self) -> None:
        """Without `op`."""
        assert collect([{"after": {"id": 1}}]).root == ""

    def test_column_names_differ(self) -> None:
        """Also where dots become underscores."""
        assert [*column_names(collect([{"a_b": 1, "a": {"b": 2}}])).values()] == ["a_b", "a_b_"]

    def test_what_is_no_object_has_no_fields(self) -> None:
        """A plain class, for example."""
        assert collect(["fraud", 3, None]).values == {}

    def test_deep_and_wide_records_are_bounded(self) -> None:
        """No recursion, and at most a thousand paths."""
        deep: dict[str, Any] = {}
        for _ in range(5000):
            deep = {"a": deep}

        assert [*collect([deep]).values] == ["a.a.a.a.a.a.a.a"]
        assert len(collect([{str(n): n for n in range(5000)}]).values) == 1000

    @pytest.mark.parametrize("name", ["customer_id", "customerId", "CustomerID", "a.b.customer-id"])
    def test_words_of_a_name(self, name: str) -> None:
        """Whatever the convention."""
        assert words_of(name) == ["customer", "id"]


class TestFormat:
    @pytest.mark.parametrize(
        ("values", "chosen"),
        [([b'{"a": 1}', b"x"], "json"), ([], "json"), ([b"\x93NUMPY\1"], "npy"), ([b"\x89PNG\r\n"], "image")],
    )
    def test_by_the_first_bytes(self, values: list[bytes], chosen: str) -> None:
        """Without a registry."""
        assert format_of(values, None, "t") == chosen

    @pytest.mark.parametrize(("kind", "chosen"), [(None, "avro"), ("JSON", "json_schema"), ("PROTOBUF", "protobuf")])
    def test_a_frame_is_of_what_the_registry_says(self, kind: str | None, chosen: str) -> None:
        """Each schema is asked for once."""
        with FakeRegistry() as fake:
            fake.add(7, "{}", kind=kind)
            registry = SchemaRegistry(RegistryConfig(url=fake.url))

            assert format_of([b"\0\0\0\0\7x"] * 20, registry, "t") == chosen
            assert len(fake.requests) == 1

    def test_a_few_odd_records_decide_nothing(self) -> None:
        """A zero byte at the start of one is no reason to ask for a registry."""
        assert format_of([b"\0", b"\0\0\0\0\7x", b'{"a": 1}', b"{}"], None, "t") == "json"

    def test_a_schema_that_the_registry_does_not_have(self) -> None:
        """It is another registry."""
        with FakeRegistry() as fake, pytest.raises(ConfigError, match=r"schema 7.*is source\.registry\.url"):
            format_of([b"\0\0\0\0\7x"], SchemaRegistry(RegistryConfig(url=fake.url)), "t")

    def test_a_frame_without_a_registry_names_the_option(self) -> None:
        """The user knows its address."""
        with pytest.raises(ConfigError, match=r"t: .*schema 7.*--registry"):
            format_of([b"\0\0\0\0\7x"], None, "t")


class TestTimes:
    @pytest.mark.parametrize(
        ("value", "unit"),
        [
            (NOW_S, "s"),
            (int(NOW_S), "s"),
            (int(NOW_S * 1e3), "ms"),
            (str(int(NOW_S * 1e3)), "ms"),
            (int(NOW_S * 1e6), "us"),
            (int(NOW_S * 1e9), "ns"),
            ("2026-03-05T09:20:00Z", None),
            ("2026-03-05", None),
            (datetime(2026, 3, 5, tzinfo=UTC), None),
            (date(2026, 3, 5), None),
        ],
    )
    def test_the_unit_follows_from_the_size(self, value: object, unit: str | None) -> None:
        """Seconds to nanoseconds since 1970; text and logical types have none."""
        values = [value] * 30
        found = time_field("x", profile(values), values, [NOW_S] * 30)

        assert found is not None
        assert found.unit == unit

    @pytest.mark.parametrize("value", [12, 20260305, 3.5, "blue", 5_551_234_567, True])
    def test_other_values_are_none(self, value: object) -> None:
        """Days as digits, phone numbers, measurements."""
        values = [value] * 30

        assert time_field("x", profile(values), values, [NOW_S] * 30) is None

    def test_a_number_far_from_the_log_needs_a_name(self) -> None:
        """An amount of 1,200,000,000 is in 2008 as seconds."""
        values = [1_200_000_000] * 30

        assert time_field("amount", profile(values), values, [NOW_S] * 30) is None
        assert time_field("signupDate", profile(values), values, [NOW_S] * 30) is not None

    def test_the_event_time_is_by_name_then_nearest(self) -> None:
        """A day has no time of the day, and one that is often missing is none of all."""
        columns: dict[str, list[object]] = {
            "born": ["1980-05-17"] * 20,
            "updated": [int(NOW_S)] * 20,
            "shipped": [int(NOW_S) - 9000] * 20,
            "created_at": [int(NOW_S) - 90_000] * 20,
            "returned": [int(NOW_S), *[None] * 19],
        }
        found = [time_field(n, profile(v), v, [NOW_S] * 20) for n, v in columns.items()]

        assert [each.path for each in event_times([each for each in found if each])] == [
            "created_at", "updated", "shipped",
        ]  # fmt: skip

    @pytest.mark.parametrize("name", ["key", "key.at", "header:at", "header:"])
    def test_a_field_that_the_path_of_a_source_cannot_name(self, name: str) -> None:
        """It would be read from the key or a header."""
        assert time_field(name, profile([int(NOW_S)] * 30), [int(NOW_S)] * 30, [NOW_S] * 30) is None


class TestColumns:
    @pytest.mark.parametrize(
        ("name", "values", "setting"),
        [
            ("amount", [n / 7 for n in range(100)], {"kind": "number"}),
            ("amount", [f"{n / 7:.2f}" for n in range(100)], {"kind": "number"}),
            ("amount", [*["N/A"] * 30, *map(str, range(70))], {"kind": "number"}),
            ("purchases", repeated(range(10)), {"kind": "number"}),
            ("mcc", repeated([5411, 5812, 7995]), {"kind": "category", "buckets": 16}),
            ("x", repeated([5411, 5812, 7995, 1200]), {"kind": "category", "buckets": 16}),
            ("channel", repeated([1, 2, 3]), {"kind": "category", "buckets": 16}),
            ("zip", repeated(["01234", "98765", "10115"]), {"kind": "category", "buckets": 16}),
            ("country", repeated([f"c{n}" for n in range(20)], 300), {"kind": "category", "buckets": 64}),
            ("card_present", repeated([True, False]), {"kind": "boolean"}),
            ("card_present", repeated([0, 1]), {"kind": "boolean"}),
            ("card_present", repeated([0.0, 1.0]), {"kind": "boolean"}),
            ("card_present", repeated(["true", "false", None]), {"kind": "boolean"}),
            ("card_present", repeated(["Yes", "No"]), {"kind": "boolean"}),
            ("at", [int(NOW_S * 1000) + n for n in range(100)], {"kind": "timestamp", "unit": "ms"}),
            ("at", [int(NOW_S) + n for n in range(100)], {"kind": "timestamp"}),
            ("booked", repeated(["2026-03-01", "2026-03-04"]), {"kind": "timestamp"}),
            ("born", repeated(["1980-05-17", "1999-12-31"]), {"kind": "timestamp", "cycle": "year"}),
            ("embedding", [[0.5, 1, 2]] * 100, {"kind": "vector", "size": 3}),
            ("note", [f"the customer {n} called again today" for n in range(100)], {"kind": "text", "size": 256}),
            ("promo", [*["SPRING"] * 10, *[None] * 90], {"kind": "category", "buckets": 16}),
        ],
    )
    def test_kinds(self, name: str, values: list[Any], setting: dict[str, Any]) -> None:
        """Numbers as text, integers that are categories, ISO dates, epoch milliseconds, nulls."""
        found = column(name, values)

        assert (found.setting, found.used) == (setting, True)

    @pytest.mark.parametrize(
        ("name", "values", "why"),
        [
            ("x", [None] * 50, "null in all 50"),
            ("currency", ["EUR"] * 50, "always EUR"),
            ("order_id", list(range(100, 150)), "an id?"),
            ("trace", [f"{n:032x}" for n in range(50)], "an id?"),
            ("tags", [["a", "b"]] * 50, "lists of other values"),
            ("history", [[1.0] * (n % 5 + 1) for n in range(50)], "lists of 1 to 5 numbers"),
            ("blob", repeated(["QUJD" * 40, "REVG" * 40]), "long texts"),
            ("extra", [{}] * 50, "objects"),
            ("price", [f"{n},50" for n in range(50)], "numbers with a comma, not a point, such as"),
            ("total", [f"1.{n:03},50" for n in range(50)], "numbers with a comma, not a point, such as"),
            ("placed", [f"{n % 28 + 1:02}.11.2026 10:11:{n:02}" for n in range(50)], "dates that are not ISO 8601"),
            ("raw", [b"\xff"] * 50, "bytes"),
        ],
    )
    def test_what_is_left_out(self, name: str, values: list[Any], why: str) -> None:
        """With a reason, and a setting that would be valid."""
        found = column(name, values)

        assert not found.used
        assert why in found.why
        ColumnConfig.model_validate(dict(found.setting))

    @pytest.mark.parametrize("values", [["1,2", "3,4"], ["S-10,5", "S-11,5"] * 10, [f"a,{n % 30}" for n in range(90)]])
    def test_codes_with_a_comma_are_categories(self, values: list[str]) -> None:
        """A few pairs of numbers, or texts that are no numbers."""
        assert column("slot", repeated(values)).setting["kind"] == "category"
        assert column("slot", repeated(values)).used

    def test_a_unique_measurement_is_a_number(self) -> None:
        """Whole or not; only a name makes it an id."""
        assert column("distance", list(range(50))).used

    def test_few_integers_without_a_telling_name_are_numbers_with_a_word(self) -> None:
        """It cannot be decided from the values."""
        found = column("rooms", repeated(range(1, 6)))

        assert found.setting == {"kind": "number"}
        assert "if the 5 values are codes" in found.why

    def test_with_few_records_nothing_is_constant_or_unique(self) -> None:
        """Three records show little."""
        assert column("city", ["a", "b", "c"]).used
        assert column("city", ["a", "a", "a"]).used

    def test_many_unseen_values_get_more_buckets(self) -> None:
        """Twice the estimate where all were seen, eight times where most were not."""
        seen = column("shop", repeated([f"m{n}" for n in range(40)], 500))
        unseen = column("shop", repeated([f"m{n}" for n in range(5000)], 500))

        assert seen.setting["buckets"] == 128
        assert unseen.setting["buckets"] >= 16_384

    def test_a_value_in_a_comment_is_short_and_printable(self) -> None:
        """Records are of others."""
        assert shown("a\n[serve]\nport = 1") == "a\N{REPLACEMENT CHARACTER}[serve]\N{REPLACEMENT CHARACTER}port = 1"
        assert len(shown("x" * 1000)) == 41


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.just(MISSING),
    lambda each: st.lists(each, max_size=3) | st.dictionaries(st.text(max_size=5), each, max_size=3),
    max_leaves=5,
)


@given(st.text(min_size=1), st.lists(ANY, min_size=1, max_size=30))
def test_any_field_becomes_a_valid_setting(name: str, values: list[Any]) -> None:
    """And its encoder takes the values."""
    found = column(name, values)
    config = ColumnConfig.model_validate({**found.setting, "from": "x"})

    encoder = RowEncoder({"c": config})
    for value in values:
        if value is not MISSING:
            encoder.encode({"x": value})
