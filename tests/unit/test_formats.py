"""Framed Avro, JSON Schema and Protobuf: any bytes give fields or a RecordError."""

from __future__ import annotations

import io
import json
import math
import sys
from collections.abc import Iterator
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

import fastavro
import pytest
from fake_registry import FakeRegistry
from harness.registry import framed
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from streamlearn.errors import ConfigError, RecordError, RegistryUnavailableError
from streamlearn.schema.formats import Avro, Keys, Protobuf, framed_json, json_object
from streamlearn.schema.registry import SchemaRegistry
from streamlearn.schema.settings import RegistryConfig

AGES = datetime(1970, 1, 1), datetime(2100, 1, 1)  # noqa: DTZ001  as Hypothesis wants them
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
UUID_TEXT = "12345678-1234-5678-1234-567812345678"
TRANSACTION: Any = {
    "type": "record",
    "name": "Transaction",
    "namespace": "shop",
    "fields": [
        {"name": "id", "type": {"type": "string", "logicalType": "uuid"}},
        {"name": "amount", "type": {"type": "bytes", "logicalType": "decimal", "precision": 9, "scale": 2}},
        {"name": "at", "type": {"type": "long", "logicalType": "timestamp-millis"}},
        {"name": "exact", "type": {"type": "long", "logicalType": "timestamp-micros"}},
        {"name": "day", "type": {"type": "int", "logicalType": "date"}},
        {"name": "country", "type": ["null", "string"], "default": None},
        {"name": "kind", "type": {"type": "enum", "name": "Kind", "symbols": ["WEB", "SHOP"]}},
        {"name": "tags", "type": {"type": "map", "values": "string"}},
        {"name": "embedding", "type": {"type": "array", "items": "float"}},
    ],
}
VALUE = {
    "id": UUID_TEXT,
    "amount": Decimal("12.50"),
    "at": datetime(2026, 3, 5, 18, 0, 0, 123000, tzinfo=UTC),
    "exact": datetime(2026, 3, 5, 18, 0, 0, 123456, tzinfo=UTC),
    "day": date(2026, 3, 5),
    "country": None,
    "kind": "SHOP",
    "tags": {"a": "b"},
    "embedding": [1.0, 2.5],
}
PROTO = """
syntax = "proto3";
package shop;
message Transaction {
  string transaction_id = 1;
  int64 at_ms = 2;
  optional double amount = 3;
  enum Kind { WEB = 0; SHOP = 1; }
  Kind kind = 4;
  repeated float embedding = 5;
  Place place = 6;
  message Place { string country = 1; }
}
message Other { string name = 1; }
"""


def encoded(schema: Any, value: Any) -> bytes:
    """Avro bytes, without a frame."""
    stream = io.BytesIO()
    fastavro.schemaless_writer(stream, fastavro.parse_schema(schema), value)
    return stream.getvalue()


@pytest.fixture(scope="module")
def fake() -> Iterator[FakeRegistry]:
    with FakeRegistry() as started:
        started.add(1, TRANSACTION)
        started.add(2, '{"type": "object"}', kind="JSON")
        started.add(3, '"string"')
        started.add(4, {"type": "record", "name": "Key", "fields": [{"name": "customer", "type": "long"}]})
        started.add(5, PROTO, kind="PROTOBUF")
        yield started


@pytest.fixture(scope="module")
def registry(fake: FakeRegistry) -> SchemaRegistry:
    return SchemaRegistry(RegistryConfig(url=fake.url, timeout_s=2.0))


@pytest.fixture(scope="module")
def avro(registry: SchemaRegistry) -> Avro:
    return Avro(registry)


@pytest.fixture(scope="module")
def messages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The module that protoc generates."""
    protoc = pytest.importorskip("grpc_tools.protoc")
    folder = tmp_path_factory.mktemp("proto")
    (folder / "shop_records.proto").write_text(PROTO)
    assert protoc.main(["protoc", f"-I{folder}", f"--python_out={folder}", str(folder / "shop_records.proto")]) == 0
    sys.path.insert(0, str(folder))
    import shop_records_pb2  # noqa: PLC0415

    yield shop_records_pb2
    sys.path.remove(str(folder))


def reason_of(decode: Any, value: bytes) -> str:
    with pytest.raises(RecordError) as caught:
        decode(value)
    return caught.value.reason


class TestAvro:
    def test_logical_types_and_nested_values_are_decoded(self, avro: Avro) -> None:
        """As fastavro writes them."""
        assert avro(framed(1, encoded(TRANSACTION, VALUE))) == VALUE

    @given(
        st.fixed_dictionaries(
            {
                "id": st.uuids().map(str),
                "amount": st.decimals(-9999999, 9999999, places=2, allow_nan=False),
                "at": st.integers(0, 2**37).map(lambda s: datetime.fromtimestamp(s % 2**33, UTC)),
                "exact": st.datetimes(*AGES, timezones=st.just(UTC)),
                "day": st.dates(),
                "country": st.none() | st.text(),
                "kind": st.sampled_from(["WEB", "SHOP"]),
                "tags": st.dictionaries(st.text(), st.text(), max_size=3),
                "embedding": st.lists(st.floats(width=32, allow_nan=False), max_size=4),
            }
        )
    )
    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
    def test_any_record_survives(self, avro: Avro, value: dict[str, Any]) -> None:
        """Field by field."""
        assert avro(framed(1, encoded(TRANSACTION, value))) == value

    @pytest.mark.parametrize(
        ("kind", "raw", "expected"),
        [
            ({"type": "long", "logicalType": "timestamp-millis"}, 2**62, math.nan),
            (
                {"type": "long", "logicalType": "timestamp-nanos"},
                1_500_000_000,
                datetime(1970, 1, 1, 0, 0, 1, 500000, UTC),
            ),
            (
                {"type": "long", "logicalType": "local-timestamp-micros"},
                -1,
                datetime(1969, 12, 31, 23, 59, 59, 999999, UTC),
            ),
            ({"type": "int", "logicalType": "date"}, -(2**31), math.nan),
            ({"type": "int", "logicalType": "time-millis"}, 2**31 - 1, 2147483.647),
            ({"type": "long", "logicalType": "time-micros"}, 1_500_000, 1.5),
            ({"type": "string", "logicalType": "uuid"}, "no uuid", "no uuid"),
            ({"type": "fixed", "name": "U", "size": 16, "logicalType": "uuid"}, UUID(UUID_TEXT).bytes, UUID_TEXT),
            ({"type": "bytes", "logicalType": "decimal", "precision": 4, "scale": 2}, b"\xff\x38", Decimal("-2")),
            ({"type": "bytes", "logicalType": "decimal", "precision": 4}, b"x" * 2_000_000, b"x" * 2_000_000),
            ({"type": "string", "logicalType": "colour"}, "red", "red"),
        ],
    )
    def test_a_logical_type_raises_nothing(
        self, fake: FakeRegistry, avro: Avro, kind: Any, raw: Any, expected: Any
    ) -> None:
        """A value that it cannot have is NaN or what it was, in bounded time: the other fields are good."""
        number = 300 + len(fake.schemas)
        fields = [{"name": "a", "type": kind}, {"name": "b", "type": "int"}]
        fake.add(number, {"type": "record", "name": "R", "fields": fields})
        plain = {name: each for name, each in kind.items() if name != "logicalType"}
        as_plain = {"type": "record", "name": "R", "fields": [{"name": "a", "type": plain}, fields[1]]}

        found = avro(framed(number, encoded(as_plain, {"a": raw, "b": 1})))

        assert isinstance(found, dict)
        assert found["b"] == 1
        assert (
            repr(found["a"]) == "nan"
            if isinstance(expected, float) and math.isnan(expected)
            else found["a"] == expected
        )

    @pytest.mark.parametrize(
        ("value", "reason"),
        [
            (b"", "not_avro"),
            (b"\0\0\0\0", "not_avro"),
            (b'{"id": 1}', "not_avro"),
            (framed(1, b""), "not_avro"),
            (framed(1, encoded(TRANSACTION, VALUE)[:-1]), "not_avro"),
            (framed(1, encoded(TRANSACTION, VALUE) + b"x"), "not_avro"),
            (framed(2, b"{}"), "not_avro"),
            (framed(99, b"x"), "unknown_schema"),
        ],
    )
    def test_other_bytes_are_record_errors(self, avro: Avro, value: bytes, reason: str) -> None:
        """Cut, too long, of another format, or of a schema that nobody registered."""
        assert reason_of(avro, value) == reason

    @given(st.binary(max_size=200))
    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
    def test_any_bytes_raise_nothing_else(self, avro: Avro, body: bytes) -> None:
        """Under a schema with every type."""
        try:
            avro(framed(1, body))
        except RecordError as error:
            assert error.reason == "not_avro"  # noqa: PT017  or no error

    def test_a_schema_that_is_no_record_gives_its_value(self, avro: Avro) -> None:
        """A label may be one string."""
        assert avro(framed(3, encoded("string", "fraud"))) == "fraud"

    def test_schemas_of_references_are_loaded_first(self, fake: FakeRegistry, avro: Avro) -> None:
        """Each once, those that are used by others before them."""
        place = {"type": "record", "name": "shop.Place", "fields": [{"name": "country", "type": "string"}]}
        stop = {"type": "record", "name": "shop.Stop", "fields": [{"name": "at", "type": "shop.Place"}]}
        trip = {
            "type": "record",
            "name": "Trip",
            "fields": [{"name": "start", "type": "shop.Place"}, {"name": "stop", "type": "shop.Stop"}],
        }
        of_place = {"name": "shop.Place", "subject": "place", "version": 1}
        of_stop = {"name": "shop.Stop", "subject": "stop", "version": 2}
        fake.subjects["place", 1] = {"schema": json.dumps(place)}
        fake.subjects["stop", 2] = {"schema": json.dumps(stop), "references": [of_place]}
        fake.add(20, trip, references=[of_stop, of_place])
        named: dict[str, Any] = {}
        for each in (place, stop):
            fastavro.parse_schema(each, named)
        stream = io.BytesIO()
        value = {"start": {"country": "DE"}, "stop": {"at": {"country": "FR"}}}
        fastavro.schemaless_writer(stream, fastavro.parse_schema(trip, named), value)

        assert avro(framed(20, stream.getvalue())) == value

    @pytest.mark.parametrize(
        "schema",
        [
            {"type": "record", "name": "L", "fields": [{"name": "next", "type": ["null", "L"]}]},
            {
                "type": "record",
                "name": "A",
                "fields": [
                    {
                        "name": "b",
                        "type": {"type": "record", "name": "B", "fields": [{"name": "a", "type": ["null", "A"]}]},
                    }
                ],
            },
            {"type": "record", "name": "N", "fields": [{"name": "a", "type": {"type": "array", "items": "null"}}]},
            {
                "type": "record",
                "name": "E",
                "fields": [
                    {
                        "name": "a",
                        "type": {"type": "array", "items": {"type": "record", "name": "X", "fields": []}},
                    }
                ],
            },
            {"type": "array", "items": {"type": "fixed", "name": "F", "size": 0}},
            '{"type": "nothing"}',
            '{"type"',
            "[" * 2000,
            '{"type":"array","items":' * 100 + '"int"' + "}" * 100,
        ],
    )
    def test_a_schema_of_unbounded_values_is_refused(self, fake: FakeRegistry, avro: Avro, schema: Any) -> None:
        """Fastavro recurses without a bound, and fills memory with items that take no bytes. Others are no schemas."""
        number = 100 + len(fake.schemas)
        fake.add(number, schema)

        assert reason_of(avro, framed(number, b"\x02" * 100_000)) == "not_avro"

    def test_a_schema_that_is_used_often_is_checked_in_linear_time(self, fake: FakeRegistry, avro: Avro) -> None:
        """Forty records, each with two of the one before."""
        fields: Any = [{"name": "v", "type": "int"}]
        schema: Any = {"type": "record", "name": "R0", "fields": fields}
        for n in range(1, 20):
            fields = [{"name": "a", "type": schema}, {"name": "b", "type": f"R{n - 1}"}]
            schema = {"type": "record", "name": f"R{n}", "fields": fields}
        fake.add(50, schema)

        assert reason_of(avro, framed(50, b"")) == "not_avro"

    def test_a_registry_that_is_away_is_not_an_error_of_the_record(self, fake: FakeRegistry, avro: Avro) -> None:
        """Until it answers."""
        fake.add(60, '"string"')
        fake.broken = (503, b"")
        try:
            with pytest.raises(RegistryUnavailableError):
                avro(framed(60, b"\x02a"))
        finally:
            fake.broken = None

        assert avro(framed(60, b"\x02a")) == "a"


class TestJson:
    def test_a_frame_is_skipped(self) -> None:
        """Its schema is not needed."""
        assert framed_json(framed(7, b'{"a": 1}')) == framed_json(b'{"a": 1}') == {"a": 1}

    def test_a_frame_under_the_format_json_has_a_hint(self) -> None:
        """The error says which setting."""
        with pytest.raises(RecordError, match=r"set source.\*.format"):
            json_object(framed(7, b'{"a": 1}'))


class TestProtobuf:
    def decoder(self) -> Protobuf:
        return Protobuf("shop_records_pb2:Transaction", key="source.samples.message")

    def test_fields_have_the_names_of_the_proto_file(self, messages: Any) -> None:
        """Integers of 64 bits are text, enums their names; an optional field that is not set is not there."""
        message = messages.Transaction(transaction_id="t1", at_ms=1772733600123, embedding=[1, 2])
        message.place.country = "DE"

        found = self.decoder()(message.SerializeToString())

        assert found == {
            "transaction_id": "t1",
            "at_ms": "1772733600123",
            "kind": "WEB",
            "embedding": [1.0, 2.0],
            "place": {"country": "DE"},
        }

    @pytest.mark.parametrize("indexes", [b"\0", b"\x02\x00", b"\x04\x02\x00"])
    def test_a_frame_and_its_indexes_are_skipped(self, messages: Any, indexes: bytes) -> None:
        """One zero is short for the first message."""
        body = messages.Transaction(transaction_id="t1", amount=0.0).SerializeToString()

        found = self.decoder()(framed(5, indexes + body))

        assert isinstance(found, dict)
        assert (found["transaction_id"], found["amount"]) == ("t1", 0.0)

    @pytest.mark.parametrize("value", [b"\0", b"\0\0\0\0\1", b"\0\0\0\0\1\xff\xff", b"\x0a\xff", b"\x0a\x01\xff"])
    def test_other_bytes_are_record_errors(self, messages: Any, value: bytes) -> None:
        """Cut, or text that is not UTF-8."""
        assert reason_of(self.decoder(), value) == "not_protobuf"

    @given(st.binary(max_size=200))
    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
    def test_any_bytes_raise_nothing_else(self, messages: Any, value: bytes) -> None:
        """With a frame and without."""
        for given_bytes in (value, b"\0\0\0\0\1\0" + value):
            try:
                self.decoder()(given_bytes)
            except RecordError as error:
                assert error.reason == "not_protobuf"  # noqa: PT017  or no error

    @pytest.mark.parametrize("path", ["shop_records_pb2:Nothing", "no_such_module:Message", "math:sqrt"])
    def test_what_is_no_message_is_an_error_at_once(self, messages: Any, path: str) -> None:
        """It names the setting."""
        with pytest.raises(ConfigError, match=r"source\.samples\.message"):
            Protobuf(path, key="source.samples.message")


class TestKeys:
    @pytest.mark.parametrize(
        ("key", "expected"),
        [
            (b"abc", "abc"),
            (b'"abc"', "abc"),
            (b'"a\\"b"', 'a"b'),
            (b'"abc', '"abc'),
            (b'"a"b"', '"a"b"'),
            (framed(2, b'"abc"'), "abc"),
            (framed(3, b"\x06abc"), "abc"),
            (framed(4, encoded({"type": "record", "name": "Key", "fields": [{"name": "customer", "type": "long"}]},
                               {"customer": 7})), {"customer": 7}),
        ],
    )  # fmt: skip
    def test_a_key_is_text_or_what_the_registry_says(
        self, registry: SchemaRegistry, avro: Avro, key: bytes, expected: object
    ) -> None:
        """JSON quotes are not part of an id."""
        assert Keys(avro, registry).text(key) == expected

    def test_without_a_registry_no_key_has_a_frame(self) -> None:
        """A zero byte is a character then."""
        assert Keys(None, None).text(b"\0abcdef") == "\0abcdef"

    @pytest.mark.parametrize("key", [framed(5, b"\0x"), framed(2, b"{"), framed(3, b""), b"\0", b"\xff"])
    def test_a_key_that_cannot_be_read_is_a_record_error(
        self, registry: SchemaRegistry, avro: Avro, key: bytes
    ) -> None:
        """Such as one in Protobuf."""
        assert reason_of(Keys(avro, registry).text, key) in ("no_id", "not_avro")

    def test_a_key_that_is_an_object_has_fields(self) -> None:
        """For paths into it."""
        keys = Keys(None, None)

        assert keys.fields(b'{"a": 1}') == {"a": 1}
        assert reason_of(keys.fields, b"a") == "no_id"


def test_without_the_extra_avro_is_a_config_error(registry: SchemaRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says what to install."""
    monkeypatch.setitem(sys.modules, "fastavro", None)

    with pytest.raises(ConfigError, match=r"streamlearn\[registry\]"):
        Avro(registry)


class TestNaNInJson:
    @pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
    def test_what_pandas_writes_for_missing_is_null(self, number: str) -> None:
        """The producer is often not the user's."""
        assert json_object(b'{"a": %s, "b": "NaN"}' % number.encode()) == {"a": None, "b": "NaN"}

    @pytest.mark.parametrize(
        "text",
        [
            b'{"a": NaN',
            b'{"a": nan}',
            b'{"a": NaN, "b": "\\ud800"}',
            b'{"a": NaN, "b": "\xff"}',
            b'{"a": NaN, "b": %s}' % (b"9" * 30),
            b'{"a": NaN, "b": %s}' % (b"9" * 5000),
            b'{"a": NaN, "b": ' + b"[" * 100_000,
        ],
    )
    def test_beyond_that_only_json_is_read(self, text: bytes) -> None:
        """As without NaN."""
        with pytest.raises(RecordError) as caught:
            json_object(text)

        assert caught.value.reason == "not_json"
