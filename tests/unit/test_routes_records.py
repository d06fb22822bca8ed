"""The user's own records over HTTP: predicted, appended, labelled and described, by the mapping of the config."""

from __future__ import annotations

import io
from typing import Any

import fastavro
import numpy as np
import orjson
import pytest
from fake_registry import FakeRegistry
from harness.registry import framed
from hypothesis import given, settings
from hypothesis import strategies as st
from served import COLUMNS, MAPPING, RAW, RECORD, Served, client_of, error_of, record_codec, store

from streamlearn.records import RETRACTED, Position, Record
from streamlearn.schema.settings import ColumnConfig
from streamlearn.serve import record_schema, request_schemas, schemas

ONE_OF_COLUMNS = "amount, merchant, created_at, vip, place.country, embedding, note"


@pytest.fixture
def served(tmp_path):
    served = Served(tmp_path, codec=record_codec())
    served.publish(7)
    yield served
    served.view.close()


@pytest.fixture
def client(served):
    with client_of(served) as client:
        client.served = served
        yield client


def serving_with(folder, mapping):
    """A server under another mapping."""
    served = Served(folder, codec=record_codec(mapping))
    served.publish(7)
    return served


def without(fields, *names):
    return {name: value for name, value in fields.items() if name not in names}


def row_of(served, record):
    return served.codec.rows.encode(record)


def answer_to(reply):
    assert reply.status_code == 200, reply.text
    (answer,) = schemas.PredictReply.model_validate(reply.json()).predictions
    return answer


class TestPredict:
    def test_a_record_gets_the_answer_for_its_row(self, client, served):
        """Fields that nothing names are ignored; the id is found by its path."""
        answer = answer_to(client.post("/predict", json=RECORD))

        expected = served.expected(7, row_of(served, RECORD))[0]
        assert np.float32(answer.probabilities).tolist() == expected.tolist()
        assert (answer.id, answer.invalid) == ("t1", None)

    def test_several_records_are_answered_in_order(self, client, served):
        """Ids next to them are for those that have none inside."""
        records = [without(RECORD, "transaction_id"), {"amount": 1}, {**RECORD, "transaction_id": 7}]

        reply = client.post("/predict", json={"instances": records, "ids": ["a", "b", "7"]})
        without_ids = client.post("/predict", json={"instances": records})

        found = np.float32([one["probabilities"] for one in reply.json()["predictions"]])
        rows = [row_of(served, record) for record in records]
        np.testing.assert_allclose(found, served.expected(7, *rows), rtol=1e-6)
        assert [one["id"] for one in reply.json()["predictions"]] == ["a", "b", "7"]
        assert [one["id"] for one in without_ids.json()["predictions"]] == [None, None, "7"]

    def test_a_record_may_have_fields_called_as_ours(self, client, served):
        """It is a record if a column begins at one of its fields."""
        record = {"amount": 3, "instances": [1], "ids": "x", "learn": True, "x": None, "samples": [{}]}

        answer = answer_to(client.post("/predict", json=record))

        expected = served.expected(7, row_of(served, {"amount": 3}))[0]
        assert np.float32(answer.probabilities).tolist() == expected.tolist()
        assert served.records("clicks") == []

    def test_columns_called_as_lists_of_ours_hide_no_list(self, tmp_path):
        """No column takes a list of objects, and only a vector takes a list."""
        kinds = {"amount": "number", "samples": "number", "instances": "number", "ids": "number"}
        columns = {name: ColumnConfig.model_validate(kind) for name, kind in kinds.items()}
        served = Served(tmp_path, codec=record_codec({"samples": {"id": "name"}}, columns))
        served.publish(7)
        records = [{"name": "a", "amount": 1, "samples": 2}, {"name": "b", "instances": 1}]
        store(served, "t9", row_of(served, records[0]))

        with client_of(served) as client:
            several = client.post("/predict", json={"instances": records})
            stored = client.post("/predict", json={"ids": ["t9"]})
            one = client.post("/predict", json={"samples": 3, "instances": 1, "ids": 2})
            appended = client.post("/sample", json={"samples": records})
            empty = client.post("/sample", json={"samples": []})

        assert [answer["id"] for answer in several.json()["predictions"]] == ["a", "b"]
        assert [answer["id"] for answer in stored.json()["predictions"]] == ["t9"]
        assert len(one.json()["predictions"]) == 1
        assert [item["id"] for item in appended.json()["items"]] == ["a", "b"]
        assert empty.status_code == 422
        served.view.close()

    def test_values_that_a_column_cannot_take_are_named_and_count_as_missing(self, client, served):
        """A client sees what the log would only count."""
        record = {**RECORD, "amount": "N/A", "vip": None, "place": {"country": []}, "embedding": [1]}

        answer = answer_to(client.post("/predict", json=record))

        assert answer.invalid == ["amount", "country", "embedding"]
        missing = {**RECORD, "amount": None, "vip": None, "place": None, "embedding": None}
        expected = served.expected(7, row_of(served, missing))[0]
        assert np.float32(answer.probabilities).tolist() == expected.tolist()

    def test_stored_samples_are_predicted_by_their_ids(self, client, served):
        """As without columns."""
        store(served, "t9", row_of(served, RECORD))

        answer = answer_to(client.post("/predict", json={"ids": ["t9"]}))

        expected = served.expected(7, row_of(served, RECORD))[0]
        assert (answer.id, np.float32(answer.probabilities).tolist()) == ("t9", expected.tolist())

    @pytest.mark.parametrize(
        ("body", "code", "expected"),
        [
            ({"total": 1}, "no_value", ONE_OF_COLUMNS),
            ({}, "no_value", ONE_OF_COLUMNS),
            ({"instances": [RECORD, {"total": 1}]}, "no_value", "instances[1]: expected at least one of the columns"),
            ({"instances": [RECORD, 3]}, "invalid_body", "instances[1]: expected a record"),
            ({"instances": 3}, "invalid_body", "expected a list of 1 to 8, got no list"),
            ({"samples": [RECORD]}, "invalid_body", "unknown field samples: expected several items in instances"),
            ({"instances": [RECORD] * 9}, "invalid_body", "expected a list of 1 to 8, got a list of 9"),
            ({"instances": [RECORD], "learn": True}, "invalid_body", "unknown field learn: expected instances, ids"),
            ({"instances": [RECORD], "ids": ["a", "b"]}, "invalid_body", "expected one for each of 1 records, got 2"),
            ({"instances": [RECORD], "ids": ["t2"]}, "no_id", "expected the id 't2' in the record too, got 't1'"),
            ({"ids": ["a"], "more": 1}, "invalid_body", "unknown field more: expected ids"),
            ({**RECORD, "transaction_id": [1]}, "no_id", "expected an id that is text or an integer"),
        ],
    )
    def test_what_is_no_record_is_refused_with_what_was_expected(self, client, body, code, expected):
        error = error_of(client.post("/predict", json=body), 422, code)

        assert expected in error.message

    def test_only_json_holds_records(self, client, served):
        """A row by hand would bypass the encoder."""
        row = row_of(served, RECORD).tobytes()

        for path in ("/predict", "/sample"):
            error = error_of(client.post(path, content=row, headers=RAW), 415, "bad_content_type")
            assert "application/octet-stream" in error.message

    def test_rows_that_few_bytes_become_are_bounded(self, tmp_path):
        """A record of a few bytes becomes a row of the schema's width."""
        columns = {"note": type(COLUMNS["note"]).model_validate({"kind": "text", "size": 4096})}
        served = Served(tmp_path, codec=record_codec({}, columns), max_body_bytes=40_000)
        served.publish(7)
        with client_of(served) as client:
            error = error_of(client.post("/predict", json={"instances": [{"note": "a"}] * 3}), 413, "body_too_large")
            assert client.post("/predict", json={"instances": [{"note": "a"}] * 2}).status_code == 200
        assert "49152 bytes" in error.message


class TestLearn:
    def test_a_record_is_appended_unchanged_with_its_answer(self, client, served):
        """What is scored later is the answer that the client got."""
        answer = answer_to(client.post("/predict?learn=1", json=RECORD))

        (record,) = served.records("clicks")
        sample = served.codec.decode_sample(record)
        assert (orjson.loads(record.value), record.key) == (RECORD, b"t1")
        assert (sample.sample_id, sample.event_time_s, sample.domain) == ("t1", 1_772_733_600.0, "web")
        assert sample.x.tobytes() == row_of(served, RECORD).tobytes()
        assert sample.answer.class_index == answer.class_index
        assert sample.answer.model_version == 7
        assert sample.answer.probabilities_C.tolist() == np.float32(answer.probabilities).tolist()
        assert answer.position.offset == record.position.offset

    def test_a_record_without_an_id_gets_the_given_or_a_new_one(self, client, served):
        """It is in the key and a header: the record stays as it is."""
        record = without(RECORD, "transaction_id")

        given = answer_to(client.post("/predict?learn=1&id=t7", json=record))
        new = answer_to(client.post("/predict?learn=1", json=record))

        assert (given.id, len(new.id)) == ("t7", 32)
        decoded = [served.codec.decode_sample(record).sample_id for record in served.records("clicks")]
        assert sorted(decoded) == sorted(["t7", new.id])
        assert all(orjson.loads(one.value) == record for one in served.records("clicks"))

    @pytest.mark.parametrize(
        ("query", "body", "code", "expected"),
        [
            ("", {**RECORD, "verdict": "fraud"}, "label_not_allowed", "expected records without a label"),
            ("", {**RECORD, "created_at": "soon"}, "bad_time", "expected a number in ms"),
            ("", {"instances": [RECORD, RECORD]}, "duplicate_id", "each id may occur once"),
            ("", {"ids": ["t1"]}, "invalid_body", "stored samples are in the log already"),
            ("&id=t1", {"ids": ["t1"]}, "invalid_body", "stored samples"),
            ("&id=a", {"instances": [RECORD], "ids": ["a"]}, "invalid_body", "got both"),
            ("&id=a&id=b", RECORD, "invalid_body", "expected one for each of 1 records, got 2"),
        ],
    )
    def test_what_cannot_be_learned_is_refused_whole(self, client, query, body, code, expected):
        """Above all a label: a token that predicts gives no ground truth."""
        error = error_of(client.post(f"/predict?learn=1{query}", json=body), 422, code)

        assert expected in error.message
        assert client.served.records("clicks") == []

    def test_a_label_inside_does_no_harm_where_nothing_is_learned(self, client):
        """It is not looked at."""
        assert answer_to(client.post("/predict", json={**RECORD, "verdict": "no class"})).id == "t1"


class TestSample:
    def test_a_record_is_appended_unchanged(self, client, served):
        """With its label, id, time and domain by their paths."""
        record = {**RECORD, "verdict": True}

        reply = client.post("/sample", json=record)

        (appended,) = served.records("clicks")
        sample = served.codec.decode_sample(appended)
        assert (reply.status_code, reply.json()["items"][0]["id"]) == (202, "t1")
        assert (orjson.loads(appended.value), appended.key) == (record, b"t1")
        assert (sample.sample_id, sample.label, sample.domain) == ("t1", 0, "web")

    def test_items_are_accepted_or_refused_one_by_one(self, client, served):
        """Each error names its id where it has one."""
        samples = [RECORD, {**RECORD, "transaction_id": "t2", "verdict": "?"}, {"total": 1}, 3, RECORD, {"amount": 1}]

        items = client.post("/sample", json={"samples": samples}).json()["items"]

        codes = [item.get("error", {}).get("code") for item in items]
        assert codes == [None, "unknown_class", "no_value", "invalid_body", "duplicate_id", None]
        assert [item["id"] for item in items][:5] == ["t1", "t2", None, None, "t1"]
        assert len(items[5]["id"]) == 32
        assert len(served.records("clicks")) == 2

    @pytest.mark.parametrize("path", ["key", "key.id", "header:trace"])
    def test_an_id_in_key_or_header_is_given_next_to_the_record(self, tmp_path, path):
        """In the query, or in `ids`. A field "id" is the user's own then."""
        served = serving_with(tmp_path, {**MAPPING, "samples": {"id": path}})
        record = {**RECORD, "id": "of something else"}
        with client_of(served) as client:
            replies = [
                client.post("/sample?id=a", json=record),
                client.post("/sample", json={"samples": [record], "ids": ["b"]}),
                client.post("/sample", json=record),
            ]

        ids = [reply.json()["items"][0]["id"] for reply in replies]
        found = {served.codec.decode_sample(one).sample_id for one in served.records("clicks")}
        assert (ids[:2], found) == (["a", "b"], set(ids))

    def test_an_id_with_quotes_is_answered_as_it_was_given(self, client, served):
        """Its key in the log is quoted once more."""
        reply = client.post("/sample", json={**RECORD, "transaction_id": '"t1"'})

        (record,) = served.records("clicks")
        assert reply.json()["items"][0]["id"] == served.codec.decode_sample(record).sample_id == '"t1"'

    def test_a_stored_row_is_shown_by_column(self, client, served):
        """As far as it can be read back."""
        store(served, "t1", row_of(served, {**RECORD, "amount": None}))

        reply = schemas.SampleReply.model_validate(client.get("/sample/t1").json())

        assert reply.fields == {
            "amount": None,
            "merchant": pytest.approx(32, abs=32),
            "vip": True,
            "country": pytest.approx(512, abs=512),
            "embedding": [0.25, -1.0],
        }
        assert len(reply.x) == served.schema.shape[0]


class TestLabel:
    @pytest.mark.parametrize(
        ("body", "expected"),
        [
            ({"transaction_id": "t1", "is_fraud": True}, 0),
            ({"transaction_id": "t1", "is_fraud": False, "judged_at": 1e9, "note": {"by": "me"}}, 1),
            ({"transaction_id": "t1", "is_fraud": None}, RETRACTED),
            ({"id": "t1", "label": "fraud"}, 0),
            ({"id": "t1", "class": True, "time": 1e9, "source": "audit"}, 0),
            ({"id": "t1", "label": None}, RETRACTED),
            ({"transaction_id": "t1", "is_fraud": True, "lines": [{"a": 1}], "labels": ["x"]}, 0),
        ],
    )
    def test_both_forms_are_taken_and_decode_to_the_same_label(self, client, served, body, expected):
        """The user's own form is appended unchanged; ours is marked by a header."""
        reply = client.post("/label", json=body)

        (record,) = served.records("truths")
        label = served.codec.labels.decode(record)
        assert (reply.status_code, reply.json()["items"][0]["id"], record.key) == (202, "t1", b"t1")
        assert (label.sample_id, label.class_index) == ("t1", expected)
        if "transaction_id" in body:
            assert orjson.loads(record.value) == body
        if {"time", "judged_at"} & body.keys():
            assert label.event_time_s == 1e9

    def test_forms_may_be_mixed_and_errors_name_their_id(self, client, served):
        """One by one, as ever."""
        labels = [
            {"transaction_id": "t1", "is_fraud": True},
            {"id": "t2", "label": "legitimate"},
            {"transaction_id": "t3", "is_fraud": "maybe"},
            {"id": "t4", "label": "fraud", "why": 1},
        ]

        items = client.post("/label", json={"labels": labels}).json()["items"]

        assert [item["id"] for item in items] == ["t1", "t2", "t3", "t4"]
        assert [item.get("error", {}).get("code") for item in items] == [None, None, "unknown_class", "no_id"]
        assert len(served.records("truths")) == 2

    def test_an_id_that_producers_have_in_the_key_is_id_here(self, tmp_path):
        """The record is written in our form, which has a place for it."""
        served = serving_with(tmp_path, {**MAPPING, "labels": {**MAPPING["labels"], "id": "key"}})
        with client_of(served) as client:
            assert client.post("/label", json={"id": "t1", "is_fraud": True}).status_code == 202
            error_of(client.post("/label", json={"is_fraud": True}), 422, "no_id")

        (record,) = served.records("truths")
        label = served.codec.labels.decode(record)
        assert (label.sample_id, label.class_index) == ("t1", 0)

    def test_an_erasure_is_read_under_any_mapping(self, tmp_path):
        served = Served(tmp_path, codec=record_codec(), admin_token="rule")
        served.publish(7)
        with client_of(served) as client:
            reply = client.delete("/sample/t1", headers={"Authorization": "Bearer rule"})

        (record,) = served.records("truths")
        assert reply.status_code == 202
        assert served.codec.labels.decode(record).sample_id == "t1"


class TestSchema:
    def test_shows_fields_mapping_and_classes(self, client):
        found = schemas.SchemaReply.model_validate(client.get("/schema").json())

        columns = {column.name: (column.kind, column.path, column.options) for column in found.columns}
        assert columns["merchant"] == ("category", "merchant", {"buckets": 64, "embedding": 8})
        assert columns["country"][1] == "place.country"
        assert columns["created_at"][2] == {"unit": "ms", "cycle": "day"}
        assert columns["note"][2] == {"size": 8}
        assert (found.samples.id, found.samples.topic, found.labels.label) == ("transaction_id", "samples", "is_fraud")
        assert found.labels.values == {"true": "fraud", "false": "legitimate"}
        assert found.classes == ["fraud", "legitimate"]
        assert found.label_example == {"transaction_id": "invoice-7", "is_fraud": True}

    def test_its_examples_can_be_sent(self, client):
        """Nothing in them is invalid."""
        found = client.get("/schema").json()

        assert answer_to(client.post("/predict", json=found["sample_example"])).invalid is None
        assert client.post("/sample", json=found["sample_example"]).status_code == 202
        assert client.post("/label", json=found["label_example"]).status_code == 202

    def test_every_example_of_openapi_can_be_sent(self, client, served):
        store(served, "invoice-7", row_of(served, RECORD))
        document = client.get("/openapi.json").json()

        for path in ("/predict", "/sample", "/label"):
            content = document["paths"][path]["post"]["requestBody"]["content"]
            assert content.keys() == {"application/json"}
            for name, example in content["application/json"]["examples"].items():
                reply = client.post(path, json=example["value"])
                assert reply.status_code in (200, 202), (path, name, reply.text)

    def test_a_schema_without_columns_shows_its_tensor(self, tmp_path):
        served = Served(tmp_path)
        served.publish(7)
        with client_of(served) as client:
            found = schemas.SchemaReply.model_validate(client.get("/schema").json())
            assert client.post("/sample", json=found.sample_example).status_code == 202
            assert client.post("/label", json=found.label_example).status_code == 202

        assert (found.columns, found.shape) == ([], [4])

    def test_nested_fields_are_nested_in_the_json_schema(self):
        found = record_schema.sample_schema(record_codec())

        assert found["properties"]["place"]["properties"]["country"]["description"] == "category"
        assert {"required": ["place"], "properties": {"place": {"required": ["country"]}}} in found["anyOf"]

    @pytest.mark.parametrize("value", [12.5, "12.50", None])
    def test_the_json_schema_takes_what_a_number_takes(self, value):
        """A number as text too."""
        amount = record_schema.sample_schema(record_codec())["properties"]["amount"]

        assert amount["description"] == "number, also as text"
        assert {float: "number", str: "string", type(None): "null"}[type(value)] in amount["type"]
        assert record_codec().rows.encode({"amount": value, "merchant": "m1"}) is not None

    def test_a_label_in_our_own_form_is_shown_once(self):
        """Where the mapping has only names of ours."""
        body = request_schemas.label_body(record_codec({"labels": {"id": "id"}}), most=8)

        assert len(body["requestBody"]["content"]["application/json"]["schema"]["anyOf"]) == 2


AVRO = {
    "type": "record",
    "name": "Transaction",
    "fields": [
        {"name": "transaction_id", "type": "string"},
        {"name": "amount", "type": ["null", "double", "long", "string"]},
        {"name": "merchant", "type": ["null", "string", "long"]},
        {"name": "created_at", "type": ["null", "long"]},
        {"name": "vip", "type": ["null", "boolean"]},
        {
            "name": "place",
            "type": ["null", {"type": "record", "name": "Place", "fields": [{"name": "country", "type": "string"}]}],
        },
        {"name": "embedding", "type": ["null", {"type": "array", "items": "double"}]},
        {"name": "note", "type": ["null", "string"]},
    ],
}
WHOLE = st.integers(-(2**63), 2**63 - 1)
RECORDS = st.fixed_dictionaries(
    {
        "transaction_id": st.just("t1"),
        "amount": st.none() | st.floats(allow_nan=False, allow_infinity=False) | WHOLE | st.text(max_size=9),
        "merchant": st.none() | st.text(max_size=9) | WHOLE,
        "created_at": st.none() | st.integers(0, 10**14 - 1),
        "vip": st.none() | st.booleans(),
        "place": st.none() | st.fixed_dictionaries({"country": st.text(max_size=9)}),
        "embedding": st.none() | st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=3),
        "note": st.none() | st.text(max_size=40),
    }
)


@pytest.fixture(scope="module")
def codecs():
    """Of a topic of JSON, and of one of Avro."""
    with FakeRegistry() as registry:
        registry.add(1, AVRO)
        samples: dict[str, Any] = {**MAPPING["samples"], "format": "avro"}
        avro = {**MAPPING, "samples": samples, "registry": {"url": registry.url}}
        yield record_codec(), record_codec(avro)


@settings(max_examples=300, deadline=None)
@given(record=RECORDS)
def test_a_record_has_the_same_row_in_every_path(codecs, record):
    """No skew: `/predict`, what it appends, and the log's JSON and Avro agree bit by bit."""
    position = Position("clicks", 0, 0)
    file = io.BytesIO()
    fastavro.schemaless_writer(file, fastavro.parse_schema(AVRO), record)
    as_json, as_avro = orjson.dumps(record), framed(1, file.getvalue())

    for codec in codecs:
        bodies = Served.bodies_of(codec)
        body = bodies.predict(as_json, "application/json", [], learn=True)
        x, _ = bodies.encode(body.records)
        appended, checked = codec.encode_record("t1", body.records[0])
        read = codec.decode_sample(Record(position, 0, appended.key, appended.value, appended.headers))
        found = [x[0], checked.x, read.x]
        given_bytes = as_avro if codec.source.samples.format == "avro" else as_json
        found.append(codec.decode_sample(Record(position, 0, b"customer", given_bytes, ())).x)

        assert len({row.tobytes() for row in found}) == 1
        assert x[0].tobytes() == codecs[0].rows.encode(record).tobytes()
