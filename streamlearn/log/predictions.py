"""Records of the predictions topic: one answer of a published teacher, with the sample's id as the key.

As JSON, or in Avro in the frame of a schema registry:

    {"id", "class", "class_index", "probabilities", "model_version",
     "position": {"topic", "partition", "offset"}, "time", "predicted_at"}

`position` is the sample's place in the log, `time` is when the log received it and `predicted_at` when it was answered,
in seconds since the epoch. `probabilities` are in the order of the classes; a spare class without a name has none.

Scorers encode them. The learner decodes them, to score what was published. A client's answer inside a sample has
`class_index`, `probabilities` and `model_version` too.
"""

from __future__ import annotations

from array import array
from collections.abc import Collection, Sequence
from functools import cache

import numpy as np
import orjson

from streamlearn.errors import RecordError
from streamlearn.records import NewRecord, Position, Prediction, PublishedAnswer, Record, Sample
from streamlearn.schema.fields import checked_id, json_type, key_of
from streamlearn.schema.formats import FixedAvro, is_framed, json_object

_MAX_INTEGER = 2**63
_HEADERS = (("content-type", b"application/json"),)
SCHEMA = {
    "type": "record",
    "name": "Prediction",
    "namespace": "streamlearn",
    "fields": [
        {"name": "id", "type": "string"},
        {"name": "class", "type": "string"},
        {"name": "class_index", "type": "int"},
        {"name": "probabilities", "type": {"type": "array", "items": "float"}},
        {"name": "model_version", "type": "long"},
        {
            "name": "position",
            "type": {
                "type": "record",
                "name": "Position",
                "fields": [
                    {"name": "topic", "type": "string"},
                    {"name": "partition", "type": "int"},
                    {"name": "offset", "type": "long"},
                ],
            },
        },
        {"name": "time", "type": "double", "doc": "when the log received the sample, seconds since the epoch"},
        {"name": "predicted_at", "type": "double", "doc": "when it was answered, seconds since the epoch"},
    ],
}
"""In Avro. The learner reads it without asking the registry: nobody else writes to the topic."""


@cache
def avro() -> FixedAvro:
    """The Avro form. Raises ConfigError without the extra `registry`."""
    return FixedAvro(SCHEMA)


def encode_prediction(
    sample: Sample,
    prediction: Prediction,
    classes: Sequence[str],
    predicted_at_s: float,
    *,
    schema_id: int | None = None,
) -> NewRecord:
    """Return the record of one answer: JSON, or Avro in the frame of a schema.

    `classes` are the teacher's, by index.
    """
    fields = {
        "id": sample.sample_id,
        "class": classes[prediction.class_index],
        "class_index": prediction.class_index,
        "probabilities": prediction.probabilities_C[: len(classes)],
        "model_version": prediction.model_version,
        "position": sample.position._asdict(),
        "time": sample.timestamp_s,
        "predicted_at": round(predicted_at_s, 3),
    }
    if schema_id is not None:
        fields["probabilities"] = prediction.probabilities_C[: len(classes)].tolist()
        return NewRecord(key_of(sample.sample_id), avro().encode(fields, schema_id))
    value = orjson.dumps(fields, option=orjson.OPT_SERIALIZE_NUMPY)
    return NewRecord(key_of(sample.sample_id), value, _HEADERS)


def decode_prediction(record: Record, classes: int, sample_topics: Collection[str]) -> PublishedAnswer:
    """Return the answer in a record. `classes` counts the outputs of the schema, spare ones included.

    Raises:
        RecordError: it has none, or none to a sample of these topics.
    """
    if record.value is None:
        raise RecordError("no_value", "expected an answer, got null")
    fields = avro().decode(record.value) if is_framed(record.value) else json_object(record.value)
    sample_id, prediction = checked_id(fields.get("id")), prediction_in(fields, classes, named_only=True)
    position = fields.get("position")
    topic = position.get("topic") if isinstance(position, dict) else None
    if not isinstance(position, dict) or not isinstance(topic, str) or topic not in sample_topics:
        raise RecordError("bad_dtype", f"position: expected a place in {', '.join(sample_topics)}")
    place = Position(topic, _integer(position, "partition"), _integer(position, "offset"))
    return PublishedAnswer(record.position, record.timestamp_ms / 1000.0, sample_id, place, prediction)


def prediction_in(fields: object, classes: int, *, named_only: bool = False) -> Prediction:
    """Return the prediction in the fields of an answer, with this many probabilities.

    With `named_only` the last classes, those without a name, may be missing: they are 0.

    Raises:
        RecordError: a field is missing or no possible value.
    """
    if not isinstance(fields, dict):
        raise RecordError("not_json", f"answer: expected a JSON object, got a JSON {json_type(fields)}")
    version, values = _integer(fields, "model_version"), fields.get("probabilities")
    if not isinstance(values, list) or not (1 <= len(values) <= classes if named_only else len(values) == classes):
        raise RecordError("bad_shape", f"answer: expected probabilities, a list of {classes} numbers")
    class_index = fields.get("class_index")
    if type(class_index) is not int or not 0 <= class_index < len(values):
        raise RecordError("unknown_class", f"answer: expected class_index from 0 to {len(values) - 1}")
    try:
        given_C = np.array(array("d", values))
    except (TypeError, OverflowError) as error:
        raise RecordError("bad_dtype", f"answer: expected numbers as probabilities: {error}") from None
    # A client may round them to a few digits; their sum is still within this tolerance.
    least = 0.0 if named_only else 0.99
    if not (given_C.min() >= 0.0 and given_C.max() <= 1.001 and least <= given_C.sum() <= 1.01):
        raise RecordError("bad_dtype", "answer: expected probabilities from 0 to 1 that sum to 1")
    probabilities_C = np.zeros(classes, np.float32)
    probabilities_C[: len(values)] = given_C
    return Prediction(class_index, probabilities_C, version)


def _integer(fields: dict[str, object], name: str) -> int:
    value = fields.get(name)
    if type(value) is not int or not 0 <= value < _MAX_INTEGER:
        raise RecordError("bad_dtype", f"answer: expected {name}, an integer of at least 0")
    return value
