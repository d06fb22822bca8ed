"""Records of the predictions topic: what scorers write, the learner reads; other bytes are a RecordError."""

from __future__ import annotations

import io
import json
from typing import Any

import fastavro
import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamlearn.errors import RecordError
from streamlearn.log.predictions import SCHEMA, avro, decode_prediction, encode_prediction
from streamlearn.records import Position, Prediction, PublishedAnswer, Record, Sample

AT = Position("predictions", 1, 40)
SAMPLE = Sample(Position("samples", 2, 7), 1_700_000_000.25, "digits-7", np.zeros(2, np.float32))
GOOD: dict[str, Any] = {
    "id": "a",
    "class_index": 1,
    "probabilities": [0.25, 0.75],
    "model_version": 3,
    "position": {"topic": "samples", "partition": 0, "offset": 5},
}
SCALARS = (
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text(max_size=4)
)
JSON = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner))


def decoded(value: bytes | None, classes: int = 3) -> PublishedAnswer:
    return decode_prediction(Record(AT, 1_700_000_001_500, b"a", value), classes, ("samples", "more"))


@pytest.mark.parametrize("schema_id", [None, 7])
@given(values=st.lists(st.floats(0.0009765625, 1.0, width=32), min_size=2, max_size=6))
def test_what_a_scorer_writes_is_read_bit_by_bit(schema_id: int | None, values: list[float]) -> None:
    """Class, probabilities, version and the sample's place; at the time of the record. As JSON and as Avro."""
    probabilities_C = np.array(values, np.float32)
    probabilities_C /= probabilities_C.sum()
    given_ = Prediction(1, probabilities_C, 1200)
    names = [f"class {n}" for n in range(len(values))]
    written = encode_prediction(SAMPLE, given_, names, 1_700_000_000.5, schema_id=schema_id)

    found = decoded(written.value, len(values))

    assert (found.position, found.timestamp_s) == (AT, 1_700_000_001.5)
    assert (found.sample_id, found.sample) == ("digits-7", SAMPLE.position)
    assert (found.prediction.class_index, found.prediction.model_version) == (1, 1200)
    assert found.prediction.probabilities_C.dtype == np.float32
    assert found.prediction.probabilities_C.tolist() == probabilities_C.tolist()


def test_a_class_without_a_name_has_no_probability() -> None:
    """What the network gave to spare outputs is missing from the sum."""
    written = encode_prediction(SAMPLE, Prediction(0, np.array([0.5, 0.2, 0.3], np.float32), 4), ("cat", "dog"), 0.0)

    found = decoded(written.value)

    assert found.prediction.probabilities_C.tolist() == np.array([0.5, 0.2, 0.0], np.float32).tolist()


@pytest.mark.parametrize(
    "changed",
    [
        {"id": None},
        {"id": ""},
        {"class_index": 2},
        {"class_index": -1},
        {"class_index": True},
        {"probabilities": []},
        {"probabilities": [0.25, 0.25, 0.25, 0.25]},
        {"probabilities": [0.9, 0.9]},
        {"probabilities": [-0.5, 1.0]},
        {"probabilities": ["1", 0]},
        {"probabilities": None},
        {"model_version": -1},
        {"model_version": 1.0},
        {"model_version": 2**63},
        {"position": None},
        {"position": []},
        {"position": {"topic": "labels", "partition": 0, "offset": 5}},
        {"position": {"topic": ["samples"], "partition": 0, "offset": 5}},
        {"position": {"topic": "samples", "partition": "0", "offset": 5}},
        {"position": {"topic": "samples", "partition": 0}},
    ],
)
def test_a_record_with_an_impossible_field_is_refused(changed: dict[str, Any]) -> None:
    """The same record without the change is read."""
    assert decoded(orjson.dumps(GOOD)).sample == Position("samples", 0, 5)

    with pytest.raises(RecordError):
        decoded(orjson.dumps(GOOD | changed))


@pytest.mark.parametrize("value", [None, b"", b"{", b"[]", b"null", b"\xff", b"[" * 2000, b'{"id":"\\ud800"}'])
def test_what_is_no_object_is_refused(value: bytes | None) -> None:
    """A tombstone too."""
    with pytest.raises(RecordError):
        decoded(value)


@given(
    changed=st.dictionaries(st.sampled_from([*GOOD]), JSON),
    position=st.dictionaries(st.sampled_from([*GOOD["position"]]), JSON),
)
def test_any_json_is_an_answer_or_a_record_error(changed: dict[str, Any], position: dict[str, Any]) -> None:
    """Nothing else is raised."""
    fields = GOOD | changed | ({} if "position" in changed else {"position": GOOD["position"] | position})
    try:
        value = orjson.dumps(fields)
    except TypeError:
        return  # lone surrogates
    try:
        found = decoded(value)
    except RecordError:
        return
    assert 0 <= found.prediction.class_index < 3
    assert found.prediction.probabilities_C.shape == (3,)
    assert np.isfinite(found.prediction.probabilities_C).all()


@given(value=st.binary(max_size=64))
def test_random_bytes_are_a_record_error(value: bytes) -> None:
    """And no other error."""
    with pytest.raises(RecordError):
        decoded(value)


@given(value=st.binary(max_size=200), cut=st.integers(0, 80))
def test_framed_bytes_are_an_answer_or_a_record_error(value: bytes, cut: int) -> None:
    """Random ones, and a true record that was cut."""
    whole = encode_prediction(
        SAMPLE, Prediction(1, np.array([0.25, 0.75], np.float32), 3), ("a", "b"), 0.0, schema_id=1
    )
    for framed in (b"\0\0\0\0\1" + value, (whole.value or b"")[: 5 + cut]):
        try:
            found = decoded(framed)
        except RecordError:
            continue
        assert 0 <= found.prediction.class_index < 3


def test_a_foreign_reader_needs_only_the_schema() -> None:
    """As a registry has it."""
    given_ = Prediction(1, np.array([0.25, 0.75], np.float32), 1200)
    written = encode_prediction(SAMPLE, given_, ("cat", "dog"), 1_700_000_000.5, schema_id=258).value

    assert written is not None
    assert written[:5] == b"\0\0\0\1\2"
    assert fastavro.schemaless_reader(
        io.BytesIO(written[5:]), fastavro.parse_schema(json.loads(avro().text)), None
    ) == {
        "id": "digits-7",
        "class": "dog",
        "class_index": 1,
        "probabilities": [0.25, 0.75],
        "model_version": 1200,
        "position": {"topic": "samples", "partition": 2, "offset": 7},
        "time": 1_700_000_000.25,
        "predicted_at": 1_700_000_000.5,
    }
    assert json.loads(avro().text) == SCHEMA
