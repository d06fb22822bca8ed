"""The user's own records: where [source] finds ids, times, labels and domains, and how the codec writes them."""

from __future__ import annotations

import io
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import fastavro
import numpy as np
import orjson
import pytest
from fake_registry import FakeRegistry
from harness.registry import framed
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from streamlearn.errors import RecordError, RegistryUnavailableError, SkippedError
from streamlearn.log.codec import Codec
from streamlearn.records import (
    ERASED,
    RETRACTED,
    UNLABELLED,
    Label,
    NewRecord,
    Position,
    Prediction,
    Record,
    Sample,
    Schema,
)
from streamlearn.schema.fields import checked_id
from streamlearn.schema.reader import OWN_ID
from streamlearn.schema.settings import ColumnConfig, SourceConfig, layout

CLASSES = ("fraud", "legitimate")
COLUMNS = {
    name: ColumnConfig.model_validate(given)
    for name, given in {
        "amount": "number",
        "merchant": {"kind": "category", "buckets": 8192},
        "created_at": {"kind": "timestamp", "unit": "ms"},
        "vip": "boolean",
    }.items()
}
ROW = Schema((6,), np.dtype(np.float32), CLASSES, columns=layout(COLUMNS))
TENSOR = Schema((2,), np.dtype(np.float32), CLASSES)
SAMPLES = {"id": "transaction_id", "time": "created_at", "time_unit": "ms", "domain": "country"}
LABELS = {"id": "transaction_id", "label": "is_fraud", "values": {"true": "fraud", "false": "legitimate"}}
TRANSACTION = {
    "transaction_id": "t1",
    "amount": 12.5,
    "merchant": "m7",
    "created_at": 1_772_733_600_000,
    "vip": True,
    "country": "DE",
}
AVRO = {
    "type": "record",
    "name": "Transaction",
    "fields": [
        {"name": "transaction_id", "type": "string"},
        {"name": "amount", "type": ["null", "double"], "default": None},
        {"name": "merchant", "type": ["null", "string"], "default": None},
        {"name": "created_at", "type": {"type": "long", "logicalType": "timestamp-millis"}},
        {"name": "vip", "type": "boolean"},
        {"name": "country", "type": "string"},
    ],
}


def codec_of(
    samples: dict[str, Any] | None = None,
    labels: dict[str, Any] | None = None,
    *,
    columns: bool = True,
    registry: str | None = None,
    unknown: Any = "refuse",
) -> Codec:
    tables = {"samples": samples or {}, "labels": labels or {}, "registry": {"url": registry, "timeout_s": 2.0}}
    source = SourceConfig.model_validate(tables)
    if columns:
        return Codec(ROW, source, columns=COLUMNS, unknown_class=unknown)
    return Codec(TENSOR, source, unknown_class=unknown)


def record(
    value: object, key: bytes | None = None, headers: tuple[tuple[str, bytes], ...] = (), topic: str = "in"
) -> Record:
    """A record as read; other values than bytes and None become JSON."""
    content = value if isinstance(value, bytes | None) else orjson.dumps(value)
    return Record(Position(topic, 0, 7), 1_700_000_000_500, key, content, headers)


def as_read(new: NewRecord) -> Record:
    return record(new.value, new.key, new.headers)


def reason_of(decode: Any, given: Record) -> str:
    with pytest.raises(RecordError) as caught:
        decode(given)
    assert not isinstance(caught.value, SkippedError)
    return caught.value.reason


@pytest.fixture(scope="module")
def fake() -> Iterator[FakeRegistry]:
    with FakeRegistry() as started:
        started.add(1, AVRO)
        started.add(2, '"string"')
        yield started


class TestSamples:
    def test_a_mapped_record_is_a_row_with_id_time_and_domain(self) -> None:
        """By the paths of the config; fields that no setting names are ignored."""
        sample = codec_of(SAMPLES).decode_sample(record({**TRANSACTION, "more": [1, {"a": 2}]}, b"customer-9"))

        assert (sample.sample_id, sample.event_time_s, sample.domain) == ("t1", 1_772_733_600.0, "DE")
        assert sample.x.tolist()[:3] == [12.5, 1.0, pytest.approx(sample.x[2])]
        assert sample.x[-1] == 1.0
        assert (sample.label, sample.true_label, sample.answer) == (None, None, None)

    @pytest.mark.parametrize(
        ("path", "key", "headers"),
        [
            ("transaction_id", b"other", ()),
            ("key", b"t1", ()),
            ("key", b'"t1"', ()),
            ("key.id", b'{"id": "t1"}', ()),
            ("key.payload.id", b'{"schema": {}, "payload": {"id": "t1"}}', ()),
            ("header:Trace", b"other", (("TRACE", b"t1"),)),
        ],
    )
    def test_the_path_alone_decides_the_id(self, path: str, key: bytes, headers: tuple[tuple[str, bytes], ...]) -> None:
        """The key may be anything, such as the customer."""
        assert codec_of({"id": path}).decode_sample(record(TRANSACTION, key, headers)).sample_id == "t1"

    def test_without_a_path_field_and_key_must_agree(self) -> None:
        """With JSON quotes or without. The error says what to set."""
        codec = codec_of()
        given = {"id": "t1", "amount": 1}

        assert codec.decode_sample(record(given, b'"t1"')).sample_id == "t1"
        assert codec.decode_sample(record({"amount": 1}, b'"t1"')).sample_id == "t1"
        with pytest.raises(RecordError, match=r"set source\.samples\.id"):
            codec.decode_sample(record(given, b"t2"))

    @pytest.mark.parametrize(
        ("unit", "value", "expected"),
        [
            ("s", 1_772_733_600.5, 1_772_733_600.5),
            ("ms", "1772733600500", 1_772_733_600.5),
            ("us", 1_772_733_600_500_000, 1_772_733_600.5),
            ("ns", 1_772_733_600_500_000_000, 1_772_733_600.5),
            ("ms", "2026-03-05T18:00:00Z", 1_772_733_600.0),
            ("ms", "2026-03-05 18:00:00", 1_772_733_600.0),
            ("ms", None, None),
        ],
    )
    def test_event_times_have_a_unit(self, unit: str, value: object, expected: float | None) -> None:
        """ISO 8601 without a zone is UTC."""
        codec = codec_of({"id": "transaction_id", "time": "when", "time_unit": unit})

        assert codec.decode_sample(record({**TRANSACTION, "when": value})).event_time_s == expected

    @pytest.mark.parametrize(("value", "unit"), [(1_772_733_600_500, "ms"), ("1772733600500000", "us")])
    def test_an_event_time_in_another_unit_is_refused_with_the_setting(self, value: object, unit: str) -> None:
        """A unit is not guessed: half of the records could have another one."""
        codec = codec_of({"id": "transaction_id", "time": "when"})

        with pytest.raises(RecordError, match=rf'set time_unit = "{unit}" if that is 2026-03-05'):
            codec.decode_sample(record({**TRANSACTION, "when": value}))

    @pytest.mark.parametrize("value", ["soon", -1, 1e30, True, [], {}])
    def test_an_event_time_that_is_none_is_a_dead_letter(self, value: object) -> None:
        """It was asked for: labels are ordered by it."""
        codec = codec_of({"id": "transaction_id", "time": "when"})

        assert reason_of(codec.decode_sample, record({**TRANSACTION, "when": value})) == "bad_time"

    def test_fields_of_our_own_names_may_be_anything(self) -> None:
        """With columns, "time", "label", "domain" and "answer" of the record are the user's."""
        given = {**TRANSACTION, "time": "12:30", "label": {"a": 1}, "domain": [], "answer": "x", "true_label": "y"}

        sample = codec_of({"id": "transaction_id"}).decode_sample(record(given))

        assert (sample.event_time_s, sample.label, sample.domain, sample.answer) == (None, None, None, None)

    def test_a_label_inside_is_found_by_its_path_and_translated(self) -> None:
        """Null is no label."""
        codec = codec_of({"id": "transaction_id", "label": "is_fraud"}, LABELS)

        labels = [
            codec.decode_sample(record({**TRANSACTION, "is_fraud": value})).label for value in (True, "false", None)
        ]

        assert labels == [0, 1, None]
        assert codec.decode_sample(record(TRANSACTION)).label is None

    def test_empty_text_is_no_label(self) -> None:
        """Unless it is set to stand for a class."""
        translated = codec_of({"label": "is_fraud"}, {"values": {"": "legitimate"}})

        for text in ("", " "):
            given = record({**TRANSACTION, "is_fraud": text}, b"t1")
            assert codec_of({"label": "is_fraud"}, LABELS).decode_sample(given).label is None
        assert translated.decode_sample(record({**TRANSACTION, "is_fraud": ""}, b"t1")).label == 1

    def test_a_value_that_its_column_cannot_take_is_no_dead_letter(self) -> None:
        """It is missing, and counted."""
        codec = codec_of(SAMPLES)

        sample = codec.decode_sample(record({**TRANSACTION, "amount": "N/A", "merchant": None}))

        assert sample.x.tolist()[:3] == [0.0, 0.0, 0.0]
        assert codec.rows is not None
        assert codec.rows.counts().invalid["amount"] == 1

    def test_paths_without_columns_name_the_fields_next_to_x(self) -> None:
        """What no path names is as in streamlearn's own records."""
        codec = codec_of({"id": "transaction_id", "time": "at"}, columns=False)

        sample = codec.decode_sample(
            record({"transaction_id": 5, "x": [1, 2], "at": 3, "label": "fraud", "domain": "web"})
        )

        assert (sample.sample_id, sample.event_time_s, sample.label, sample.domain) == ("5", 3.0, 0, "web")

    def test_a_tensor_has_its_id_and_label_in_key_and_headers(self) -> None:
        """A record without fields."""
        codec = codec_of({"format": "raw", "id": "header:id", "label": "header:class", "time": "header:at"},
                         columns=False)  # fmt: skip
        headers = (("id", b"t1"), ("class", b"fraud"), ("at", b"12.5"))

        sample = codec.decode_sample(record(np.array([1, 2], "<f4").tobytes(), None, headers))

        assert (sample.sample_id, sample.label, sample.event_time_s, sample.x.tolist()) == ("t1", 0, 12.5, [1.0, 2.0])


class TestTombstones:
    def test_a_null_value_is_skipped_on_a_mapped_topic(self) -> None:
        """A compacted topic deletes by them. On streamlearn's own topics it is an error, as ever."""
        codec = codec_of(SAMPLES, LABELS)

        for decode in (codec.decode_sample, codec.labels.decode):
            with pytest.raises(SkippedError, match="tombstone"):
                decode(record(None, b"t1"))
        plain = codec_of(columns=False)
        assert reason_of(plain.decode_sample, record(None, b"t1")) == "no_value"
        assert reason_of(plain.labels.decode, record(None, b"t1")) == "no_value"

    def test_a_deleted_row_of_debezium_is_skipped_or_retracts(self) -> None:
        """`after` is null. A label is retracted if its id is in `before`."""
        columns = {"amount": ColumnConfig.model_validate({"kind": "number", "from": "after.amount"})}
        source = SourceConfig.model_validate(
            {"samples": {"id": "after.id"}, "labels": {"id": "after.id", "label": "after.class"}}
        )
        schema = Schema((2,), np.dtype(np.float32), CLASSES, columns=layout(columns))
        codec = Codec(schema, source, columns=columns)
        insert = {"op": "c", "before": None, "after": {"id": 1, "amount": 2.5, "class": "fraud"}}
        delete = {"op": "d", "before": {"id": 1}, "after": None}

        assert codec.decode_sample(record(insert)).x.tolist() == [2.5, 1.0]
        with pytest.raises(SkippedError, match="deleted"):
            codec.decode_sample(record(delete))
        assert codec.labels.decode(record(insert)).class_index == 0
        label = codec.labels.decode(record(delete))
        assert (label.sample_id, label.class_index) == ("1", RETRACTED)
        with pytest.raises(SkippedError, match="no id"):
            codec.labels.decode(record({"op": "d", "before": None, "after": None}))


class TestLabels:
    @pytest.mark.parametrize(
        ("value", "expected"),
        [(True, 0), (False, 1), ("true", 0), ("fraud", 0), ("legitimate", 1), (1, 1), (0.0, 0), (None, RETRACTED)],
    )
    def test_values_are_translated(self, value: object, expected: int) -> None:
        """Others are class names or indexes; null retracts."""
        label = codec_of(SAMPLES, LABELS).labels.decode(record({"transaction_id": "t1", "is_fraud": value}, b"c9"))

        assert (label.sample_id, label.class_index) == ("t1", expected)

    def test_a_translation_wins_over_an_index(self) -> None:
        """1 and 2 may stand for the first and the second class."""
        codec = codec_of(labels={"id": "t", "label": "y", "values": {"1": "fraud", "2": "legitimate"}})

        assert [codec.labels.decode(record({"t": "a", "y": y})).class_index for y in (1, 2, "2", 2.0)] == [0, 1, 1, 1]

    @pytest.mark.parametrize(
        ("value", "reason"),
        [
            ({"transaction_id": "t1"}, "no_class"),
            ({"transaction_id": "t1", "is_fraud": ""}, "no_class"),
            ({"is_fraud": True}, "no_id"),
            ({"transaction_id": None, "is_fraud": True}, "no_id"),
            ({"transaction_id": {}, "is_fraud": True}, "no_id"),
            ({"transaction_id": "t1", "is_fraud": "maybe"}, "unknown_class"),
            ({"transaction_id": "t1", "is_fraud": [1]}, "unknown_class"),
            ([1], "no_id"),
            (b"{", "not_json"),
        ],
    )
    def test_a_label_without_id_or_class_is_a_dead_letter(self, value: object, reason: str) -> None:
        """With its reason."""
        assert reason_of(codec_of(SAMPLES, LABELS).labels.decode, record(value)) == reason

    def test_an_unknown_class_is_held_by_its_name(self) -> None:
        """As ever."""
        label = codec_of(SAMPLES, LABELS, unknown="hold").labels.decode(
            record({"transaction_id": "t1", "is_fraud": "chargeback"})
        )

        assert (label.class_index, label.class_name) == (UNLABELLED, "chargeback")

    def test_a_plain_class_has_its_id_in_the_key(self) -> None:
        """Translated too."""
        codec = codec_of(labels={"id": "key", "values": {"true": "fraud"}})

        label = codec.labels.decode(record(b"true", b'"t1"'))

        assert (label.sample_id, label.class_index) == ("t1", 0)

    def test_fields_of_our_own_names_may_be_anything(self) -> None:
        """Debezium's records have a `source` that is an object."""
        given = {"transaction_id": "t1", "is_fraud": True, "source": {"db": "x"}, "erase": "no", "time": "12:30"}

        assert codec_of(SAMPLES, LABELS).labels.decode(record(given)).source is None

    def test_values_are_translated_in_our_own_form_too(self) -> None:
        """Without paths."""
        codec = codec_of(labels={"values": {"true": "fraud"}})

        assert codec.labels.decode(record({"id": "t1", "label": True})).class_index == 0
        assert codec.labels.decode(record(b"true", b"t1")).class_index == 0


class TestFormats:
    def test_avro_and_json_give_the_same_row(self, fake: FakeRegistry) -> None:
        """And the same id, time and domain: `/predict` with the JSON row is what the topic taught."""
        codec = codec_of({**SAMPLES, "format": "avro"}, registry=fake.url)
        stream = io.BytesIO()
        moment = datetime.fromtimestamp(TRANSACTION["created_at"] / 1000, UTC)  # type: ignore[operator]
        fastavro.schemaless_writer(stream, fastavro.parse_schema(AVRO), {**TRANSACTION, "created_at": moment})

        one = codec.decode_sample(record(framed(1, stream.getvalue()), b"c"))
        other = codec.decode_sample(record(TRANSACTION, b"c", (("content-type", b"application/json"),)))

        assert one.x.tolist() == other.x.tolist()
        assert (one.sample_id, one.event_time_s, one.domain) == (other.sample_id, other.event_time_s, other.domain)

    def test_a_field_that_appears_later_is_read_once_it_is_there(self, fake: FakeRegistry) -> None:
        """Each record has the schema that it was written with. A field that is gone is missing."""
        codec = codec_of({"id": "transaction_id", "format": "avro"}, registry=fake.url)
        fields = [field for field in AVRO["fields"] if field["name"] != "merchant"]  # type: ignore[index]
        fake.add(11, {"type": "record", "name": "Transaction", "fields": fields})
        rows = []
        for number, schema in ((11, {**AVRO, "fields": fields}), (1, AVRO)):
            stream = io.BytesIO()
            fastavro.schemaless_writer(stream, fastavro.parse_schema(schema), TRANSACTION)
            rows.append(codec.decode_sample(record(framed(number, stream.getvalue()))).x.tolist())

        assert rows[0][2] == 0.0
        assert rows[1][2] > 0.0
        assert rows[0][:2] + rows[0][3:] == rows[1][:2] + rows[1][3:]

    def test_a_content_type_does_not_hide_a_frame(self, fake: FakeRegistry) -> None:
        """Foreign producers set any content type."""
        framed_codec = codec_of({"id": "transaction_id", "format": "json_schema"}, registry=fake.url)
        plain_codec = codec_of({"id": "transaction_id"})
        value = orjson.dumps(TRANSACTION)

        for content_type in (b"application/json", b"application/cloudevents+json", b"\xff"):
            headers = (("content-type", content_type),)
            assert framed_codec.decode_sample(record(framed(9, value), None, headers)).sample_id == "t1"
            assert plain_codec.decode_sample(record(value, None, headers)).sample_id == "t1"

    def test_a_label_may_be_one_avro_string(self, fake: FakeRegistry) -> None:
        """With its id in the key."""
        codec = codec_of(labels={"id": "key", "format": "avro"}, registry=fake.url)

        assert codec.labels.decode(record(framed(2, b"\x0afraud"), framed(2, b"\x04t1"))) == Label(
            Position("in", 0, 7), 1_700_000_000.5, "t1", 0
        )

    def test_a_registry_that_is_away_is_no_record_error(self, fake: FakeRegistry) -> None:
        """The caller waits."""
        codec = codec_of({"id": "transaction_id", "format": "avro"}, registry=fake.url)
        fake.broken = (503, b"")
        try:
            with pytest.raises(RegistryUnavailableError):
                codec.decode_sample(record(framed(1, b"")))
        finally:
            fake.broken = None

    @pytest.mark.parametrize(
        ("tables", "expected"),
        [
            ({"samples": {"format": "avro"}}, r"needs source\.registry\.url"),
            ({"samples": {"format": "protobuf"}}, "message: set both or neither"),
            ({"samples": {"message": "a:B"}}, "message: set both or neither"),
            ({"samples": {"format": "raw", "id": "a.b"}}, "has no fields"),
            ({"samples": {"topic": ["a", "a"]}}, "names must differ"),
            ({"samples": {"topic": []}}, "topic"),
            ({"labels": {"format": "raw"}}, "Input should be"),
            ({"labels": {"domain": "x"}}, "not permitted"),
        ],
    )
    def test_settings_that_do_not_fit_are_errors(self, tables: Any, expected: str) -> None:
        """Before any record is read."""
        with pytest.raises(ValidationError, match=expected):
            SourceConfig.model_validate(tables)


class TestEncoding:
    ANSWER = Prediction(0, np.array([0.75, 0.25], np.float32), 9)

    @pytest.mark.parametrize(
        "samples",
        [SAMPLES, {"id": "key"}, {"id": "header:trace"}, {"id": "nowhere.at.all"}, {"format": "json_schema"}, {}],
    )
    def test_a_users_record_is_appended_unchanged_and_decodes_to_the_same_row(self, samples: Any) -> None:
        """Whatever the mapping: the id is in a header. Answers and ground truth are in headers too."""
        codec = codec_of(samples)
        sample_id = "t1"

        new, checked = codec.encode_record(sample_id, TRANSACTION, true_label=1, answer=self.ANSWER, timestamp_ms=5)
        sample = codec.decode_sample(as_read(new))

        assert orjson.loads(new.value or b"") == TRANSACTION
        assert (new.key, new.timestamp_ms) == (b"t1", 5)
        assert (sample.sample_id, sample.true_label) == ("t1", 1)
        assert sample.answer is not None
        assert sample.answer.probabilities_C.tolist() == [0.75, 0.25]
        assert codec.rows is not None
        assert sample.x.tolist() == checked.x.tolist() == codec.rows.encode(TRANSACTION).tolist()

    def test_an_integer_of_more_than_64_bits_is_no_id(self) -> None:
        """JSON has made it a number with a fraction: its last digits are lost."""
        with pytest.raises(RecordError, match="no integer of 64 bits: send it as text"):
            checked_id(12345678901234567890123.0)

    @pytest.mark.parametrize(
        ("given", "reason"),
        [
            ({"amount": 1, "transaction_id": "t2"}, "no_id"),
            ({"total": 1}, "no_value"),
            ({"amount": 1, "created_at": "soon"}, "bad_time"),
            ({"amount": object()}, "not_json"),
            ({"amount": 1, "more": orjson.loads("[" * 500 + "]" * 500)}, "not_json"),
        ],
    )
    def test_what_would_be_refused_is_refused_before_it_is_appended(self, given: Any, reason: str) -> None:
        """Nothing that was acknowledged becomes a dead letter."""
        with pytest.raises(RecordError) as caught:
            codec_of(SAMPLES).encode_record("t1", given)
        assert caught.value.reason == reason

    def test_the_id_in_a_users_record_is_found_by_the_path(self) -> None:
        """None where it is in the key or a header."""
        assert codec_of(SAMPLES).id_in(TRANSACTION) == "t1"
        assert codec_of(SAMPLES).id_in({"amount": 1}) is None
        assert codec_of({"id": "key"}).id_in(TRANSACTION) is None
        assert codec_of().id_in({"id": 5}) == "5"

    def test_an_id_next_to_a_record_must_be_the_one_inside(self) -> None:
        """It alone is the id of a record without one."""
        assert codec_of(SAMPLES).id_in(TRANSACTION, "t1") == "t1"
        assert codec_of({"id": "key"}).id_in(TRANSACTION, 7) == "7"
        with pytest.raises(RecordError, match="expected the id 't2' in the record too, got 't1'"):
            codec_of(SAMPLES).id_in(TRANSACTION, "t2")

    @pytest.mark.parametrize(
        "labels", [LABELS, {"id": "key", "format": "json_schema"}, {"values": {"fraud": "legitimate"}}, {}]
    )
    def test_labels_of_the_api_decode_under_any_mapping(self, labels: Any) -> None:
        """In streamlearn's own form, with class names that are not translated again."""
        codec = codec_of(SAMPLES, labels)

        new = [
            codec.labels.encode("t1", 0, event_time_s=3.0, source="audit"),
            codec.labels.encode("t1", RETRACTED),
            codec.labels.encode_erasure("t1"),
        ]
        read = [codec.labels.decode(as_read(each)) for each in new]

        assert [label.class_index for label in read] == [0, RETRACTED, ERASED]
        assert {label.sample_id for label in read} == {"t1"}
        assert (read[0].event_time_s, read[0].source) == (3.0, "audit")

    @pytest.mark.parametrize(
        ("labels", "fields", "expected"),
        [
            (LABELS, {"transaction_id": "t1", "is_fraud": True}, 0),
            (LABELS, {"transaction_id": "t1", "is_fraud": "legitimate", "note": [1]}, 1),
            (LABELS, {"transaction_id": "t1", "is_fraud": None}, RETRACTED),
            (LABELS, {"transaction_id": "t1", "is_fraud": True, "erase": True}, 0),
            ({**LABELS, "format": "protobuf", "message": "a:B"}, {"transaction_id": "t1", "is_fraud": True}, 0),
            ({**LABELS, "id": "key"}, {"id": "t1", "is_fraud": True}, 0),
            ({**LABELS, "id": "key.id"}, {"id": "t1", "is_fraud": False, "note": 1}, 1),
            ({**LABELS, "id": "header:trace"}, {"id": "t1", "is_fraud": None}, RETRACTED),
            ({"label": "is_fraud"}, {"id": "t1", "is_fraud": "fraud"}, 0),
            ({"id": "after.id", "label": "after.fraud"}, {"after": {"id": "t1", "fraud": 1}}, 1),
            ({"id": "after.id", "label": "after.fraud"}, {"before": {"id": "t1"}, "after": None}, RETRACTED),
            ({"id": "source", "values": {"x": "fraud"}}, {"id": "other", "source": "t1", "label": "x"}, 0),
        ],
    )
    def test_a_users_label_decodes_to_what_was_accepted(self, labels: Any, fields: Any, expected: int) -> None:
        """Its id may be in the key or a header of a producer's records; over HTTP it is "id" then."""
        if "message" in labels:
            pytest.importorskip("google.protobuf")
            labels = {**labels, "message": "google.protobuf.struct_pb2:Struct"}
        codec = codec_of(SAMPLES, labels)

        assert not codec.labels.is_own(fields)
        new, checked = codec.labels.encode_users(fields)
        read = codec.labels.decode(as_read(new))

        assert (read.sample_id, read.class_index) == (checked.sample_id, checked.class_index) == ("t1", expected)
        if codec.source.labels.id and codec.source.labels.id.split(".")[0].split(":")[0] not in ("key", "header"):
            assert (new.key, orjson.loads(new.value or b"")) == (b"t1", fields)

    @pytest.mark.parametrize(
        ("fields", "reason"),
        [
            ({"transaction_id": "t1", "is_fraud": "dog"}, "unknown_class"),
            ({"transaction_id": "t1"}, "no_class"),
            ({"transaction_id": "t1", "is_fraud": ""}, "no_class"),
            ({"is_fraud": True}, "no_id"),
            ({"transaction_id": "t1", "is_fraud": True, "at": "soon"}, "bad_time"),
            ({"transaction_id": "t1", "is_fraud": True, "more": "x" * (5 << 20)}, "too_large"),
        ],
    )
    def test_a_users_label_that_would_be_refused_is_not_appended(self, fields: Any, reason: str) -> None:
        codec = codec_of(SAMPLES, {**LABELS, "time": "at"})

        with pytest.raises(RecordError) as caught:
            codec.labels.encode_users(fields)
        assert caught.value.reason == reason

    @pytest.mark.parametrize(
        ("labels", "fields", "own"),
        [
            ({}, {"transaction_id": "t1"}, True),
            (LABELS, {"id": "t1", "label": "fraud"}, True),
            (LABELS, {"id": "t1", "class": None, "time": 1.0, "source": "audit"}, True),
            (LABELS, {"id": "t1", "label": "fraud", "transaction_id": "t2"}, False),
            ({"id": "id", "label": "is_fraud"}, {"id": "t1", "label": "fraud"}, True),
            ({"id": "id", "label": "is_fraud"}, {"id": "t1", "is_fraud": "fraud"}, False),
            ({"id": "source"}, {"id": "t1", "label": "fraud"}, True),
            ({"id": "source"}, {"id": "t1", "label": "fraud", "source": "t2"}, False),
        ],
    )
    def test_our_own_labels_are_told_from_the_users(self, labels: Any, fields: Any, own: bool) -> None:
        """Where a field of ours is the user's id, the record is the user's."""
        assert codec_of(SAMPLES, labels).labels.is_own(fields) is own

    @pytest.mark.parametrize("sample_id", ['"t1"', '"', "\0x", "plain", '"half', "ß"])
    def test_an_id_with_quotes_survives_as_a_key(self, sample_id: str) -> None:
        """The key is quoted only where it would be read otherwise."""
        codec = codec_of(columns=False)
        x = np.zeros(2, np.float32)

        read = [codec.decode_sample(as_read(codec.encode_sample(sample_id, x, payload=p))) for p in ("raw", "json")]
        label = codec.labels.decode(as_read(codec.labels.encode(sample_id, 0)))

        assert {sample.sample_id for sample in read} | {label.sample_id} == {sample_id}

    def test_a_prepared_row_decodes_under_a_mapping(self) -> None:
        """As `simulate` writes it."""
        codec = codec_of(SAMPLES, LABELS)
        x = np.arange(6, dtype=np.float32)

        sample = codec.decode_sample(as_read(codec.encode_sample("t9", x, label=1, event_time_s=2.0)))

        assert (sample.sample_id, sample.x.tolist(), sample.label) == ("t9", x.tolist(), 1)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from([*TRANSACTION, "a"]), inner),
    max_leaves=12,
)
mapped_records = st.dictionaries(
    st.sampled_from([*TRANSACTION, "is_fraud", "after", "before", "id", "x", "time", "label"]), json_values
)
header_lists = st.lists(
    st.tuples(
        st.sampled_from(["content-type", OWN_ID, "answer", "true-label", "trace", "label"]),
        st.sampled_from([b"application/json", b"application/octet-stream", b"t1"]) | st.binary(max_size=20),
    ),
    max_size=3,
).map(tuple)
MAPPINGS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    (SAMPLES, LABELS),
    ({"id": "key", "label": "is_fraud"}, {"id": "key", "label": "is_fraud"}),
    ({"id": "key.id", "time": "header:trace"}, {"id": "header:trace", "label": "header:label"}),
    ({"id": "after.id", "format": "avro"}, {"id": "after.id", "label": "after.y", "format": "avro"}),
    ({"format": "json_schema", "domain": "after.a.0"}, {"format": "json_schema"}),
]


class TestAnything:
    @pytest.mark.parametrize("mapping", MAPPINGS, ids=["paths", "key", "headers", "avro", "json_schema"])
    @given(
        value=mapped_records.map(orjson.dumps)
        | json_values.map(orjson.dumps)
        | st.binary(max_size=60)
        | st.binary(max_size=60).map(lambda body: framed(1, body))
        | st.none(),
        key=st.none() | st.binary(max_size=20) | mapped_records.map(orjson.dumps),
        headers=header_lists,
    )
    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=150)
    def test_any_record_gives_a_sample_or_a_record_error(
        self, fake: FakeRegistry, mapping: Any, value: bytes | None, key: bytes | None, headers: Any
    ) -> None:
        """And so for labels. Nothing else is raised, whatever a producer writes."""
        codec = _codec(fake.url, MAPPINGS.index(mapping))
        given_record = record(value, key, headers)
        for decode, kind in ((codec.decode_sample, Sample), (codec.labels.decode, Label)):
            try:
                found = decode(given_record)
            except RecordError as error:
                assert str(error).startswith("in[0]@7: ")  # noqa: PT017  or no error
            else:
                assert isinstance(found, kind)
                assert 0 < len(found.sample_id.encode("utf-8", "surrogatepass")) <= 512
                if isinstance(found, Sample):
                    assert found.x.shape == (6,)
                    assert np.isfinite(found.x).all()  # type: ignore[call-overload]


_CODECS: dict[tuple[str, int], Codec] = {}


def _codec(url: str, number: int) -> Codec:
    if (url, number) not in _CODECS:
        _CODECS[url, number] = codec_of(*MAPPINGS[number], registry=url, unknown="hold")
    return _CODECS[url, number]
