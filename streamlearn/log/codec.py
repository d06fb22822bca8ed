"""Bytes to `Sample` and `Label`, and back. Any bytes give a sample or label, or a RecordError with a stable reason.

Samples: JSON {"id", "x", "label"?, "time"?, "domain"?, "true_label"?, "answer"?}, or a binary payload (raw
little-endian C-order tensor, .npy, PNG/JPEG/WebP). A binary payload's id is the record's key, and its other fields are
headers: label, time, domain, true-label, answer. The header content-type, or else the configured payload, says which.
Labels: JSON {"id", "label" or "class", "time"?, "source"?}, or a plain class name or index with the id as the key.
A label, inside a sample or not, may name a class that the schema does not have, if `unknown_class` allows it. An index
must be one of the schema's, and so must "true_label".

Sizes are checked before anything is parsed, shapes before anything is built (`payload`): no input costs more than its
own length times a small constant. Nothing here recurses over the input.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from typing import Any, Literal, cast

import numpy as np
import orjson

from streamlearn.errors import RecordError
from streamlearn.log.fields import (
    checked_id,
    header_value,
    is_number,
    json_object,
    record_id,
    seconds,
    short_text,
    time_from_header,
    utf8,
)
from streamlearn.log.payload import TYPE_OF_PAYLOAD, Payload, Tensors, json_type, payload_of
from streamlearn.records import (
    ERASED,
    RETRACTED,
    UNLABELLED,
    Array,
    Label,
    NewRecord,
    Position,
    Prediction,
    Record,
    Sample,
    Schema,
    is_whole,
)

MAX_MODEL_VERSION = 2**63


class Codec:
    """Decodes and encodes the records of one schema. It is immutable, so any thread may use it.

    A decoded raw payload is a read-only view of the record's bytes: copy it to change it.
    """

    def __init__(
        self,
        schema: Schema,
        *,
        payload: str = "json",
        max_record_bytes: int = 4 << 20,
        unknown_class: Literal["hold", "refuse", "grow"] = "refuse",
    ) -> None:
        assert payload in ("json", "raw", "npy", "image"), payload
        self.schema = schema
        self.takes_any_name = unknown_class != "refuse"
        """Whether a label may name a class that the schema does not have."""
        self.grows = unknown_class == "grow"
        """Whether such a name gets a spare class, while one is left."""
        self.payload = cast(Payload, payload)
        self.max_record_bytes = max_record_bytes
        self._tensors = Tensors(schema)
        self._names = {name: index for index, name in enumerate(schema.classes)}
        self._numbered = schema.numbered

    # Samples

    def decode_sample(self, record: Record) -> Sample:
        """Return the sample in a record of the samples topic.

        Raises:
            RecordError: it has none; the message starts with the record's position.
        """
        try:
            value = self._value(record)
            headers = {name.lower(): content for name, content in record.headers}
            payload = self.payload
            if (content_type := headers.get("content-type")) is not None:
                payload = payload_of(content_type.decode("latin-1"))
            if payload == "json":
                return self._sample_from_json(record, json_object(value))
            return self._sample_from_binary(record, value, payload, headers)
        except RecordError as error:
            raise RecordError(error.reason, f"{record.position}: {error}") from None

    def _sample_from_json(self, record: Record, fields: dict[str, Any]) -> Sample:
        x, true_label = fields.get("x"), fields.get("true_label")
        label, class_name = self._label_inside(fields.get("label"))
        if x is None:
            raise RecordError("no_value", 'expected the payload in the field "x", got none')
        return Sample(
            position=record.position,
            timestamp_s=record.timestamp_ms / 1000.0,
            sample_id=record_id(record.key, fields.get("id")),
            x=self.payload_from_json(x),
            label=label,
            event_time_s=seconds(fields.get("time")),
            domain=short_text(fields.get("domain"), "domain"),
            true_label=None if true_label is None else self._class_index(true_label),
            answer=self._answer(fields.get("answer")),
            class_name=class_name,
        )

    def _sample_from_binary(self, record: Record, value: bytes, payload: Payload, headers: dict[str, bytes]) -> Sample:
        sample = Sample(
            position=record.position,
            timestamp_s=record.timestamp_ms / 1000.0,
            sample_id=record_id(record.key, None),
            x=self._tensors.from_bytes(value, payload),
        )
        if (label := headers.get("label")) is not None:
            sample.label, sample.class_name = self.label_class(utf8(label, "label"))
        if (time := headers.get("time")) is not None:
            sample.event_time_s = time_from_header(time)
        if (domain := headers.get("domain")) is not None:
            sample.domain = short_text(utf8(domain, "domain"), "domain")
        if (true_label := headers.get("true-label")) is not None:
            sample.true_label = self._class_index(utf8(true_label, "true-label"))
        if (answer := headers.get("answer")) is not None:
            sample.answer = self._answer(json_object(answer))
        return sample

    def encode_sample(
        self,
        sample_id: str,
        x: Array,
        *,
        payload: str = "raw",
        label: int | None = None,
        class_name: str | None = None,
        event_time_s: float | None = None,
        domain: str | None = None,
        true_label: int | None = None,
        answer: Prediction | None = None,
        timestamp_ms: int | None = None,
    ) -> NewRecord:
        """Return a record that decodes to these values under any configured payload.

        Classes are written by name; a label without an index by `class_name`.

        Raises:
            RecordError: `decode_sample` would refuse one of the values.
        """
        assert payload in TYPE_OF_PAYLOAD, payload
        self._tensors.check(x)
        fields: dict[str, Any] = {
            "label": None if label is None else self._name_of(label, class_name),
            "time": seconds(event_time_s),
            "domain": short_text(domain, "domain"),
            "true_label": None if true_label is None else self._class_name(true_label),
            "answer": None if answer is None else self._answer_fields(answer),
        }
        fields = {name: value for name, value in fields.items() if value is not None}
        headers: list[tuple[str, bytes]] = [("content-type", TYPE_OF_PAYLOAD[payload])]
        if payload == "json":
            value = orjson.dumps({"id": checked_id(sample_id), "x": x.tolist(), **fields})
        else:
            value = self._tensors.to_bytes(x, payload)
            headers += [(name.replace("_", "-"), header_value(content)) for name, content in fields.items()]
        return self._checked_record(NewRecord(checked_id(sample_id).encode(), value, tuple(headers), timestamp_ms))

    # Labels

    def decode_label(self, record: Record) -> Label:
        """Return the label in a record of the labels topic.

        Raises:
            RecordError: it has none; the message starts with the record's position.
        """
        try:
            value = self._value(record)
            fields = json_object(value) if value.lstrip()[:1] == b"{" else self._plain_class(value)
            class_index, class_name = (ERASED, None) if _erases(fields) else self.class_of(fields)
            return Label(
                position=record.position,
                timestamp_s=record.timestamp_ms / 1000.0,
                sample_id=record_id(record.key, fields.get("id")),
                class_index=class_index,
                event_time_s=seconds(fields.get("time")),
                source=short_text(fields.get("source"), "source"),
                class_name=class_name,
            )
        except RecordError as error:
            raise RecordError(error.reason, f"{record.position}: {error}") from None

    def label_class(self, value: object) -> tuple[int, str | None]:
        """Return the index of the class that a label names, and None; for an unknown class UNLABELLED and its name.

        Raises:
            RecordError: `unknown_class` if unknown names are refused, or if it is not a name.
        """
        try:
            return self._class_index(value), None
        except RecordError:
            name = str(value) if type(value) is int and self._numbered else value
            if not self.takes_any_name or not isinstance(name, str) or not name.strip():
                raise
            if is_number(name) and not (self._numbered and is_whole(name)):
                raise
            return UNLABELLED, short_text(name, "label")

    def class_of(self, fields: Mapping[str, Any]) -> tuple[int, str | None]:
        """Return the class in a label's JSON, as `label_class` does; RETRACTED if it is null.

        Raises:
            RecordError: as `label_class`; `no_class` if the field is missing, or "label" and "class" differ.
        """
        given = [fields[name] for name in ("label", "class") if name in fields]
        found = {self.label_class(value) for value in given if value is not None}
        if given and not found:
            return RETRACTED, None
        if len(found) != 1:
            got = "two that differ" if found else "none"
            raise RecordError("no_class", f'expected a class in "label" (or its alias "class"), got {got}')
        return found.pop()

    def _plain_class(self, value: bytes) -> dict[str, Any]:
        """Return the fields of a label that is plain text or a JSON scalar; a class of exactly that name comes first.

        Empty text or null has no class. It does not retract: only JSON with a null in "label" does.
        """
        text = utf8(value, "label")
        if text in self._names:
            return {"label": text}
        text = text.strip()
        if not text or text == "null":
            return {}
        if text[0] != '"':
            return {"label": text}
        try:
            return {"label": orjson.loads(text)}
        except orjson.JSONDecodeError as error:
            raise RecordError("not_json", f"expected a class name, with or without JSON quotes: {error}") from None

    def encode_label(
        self,
        sample_id: str,
        class_index: int,
        *,
        class_name: str | None = None,
        event_time_s: float | None = None,
        source: str | None = None,
        timestamp_ms: int | None = None,
    ) -> NewRecord:
        """Return a record that decodes to these values. The class is written by name; without an index by `class_name`.

        RETRACTED is written as null.

        Raises:
            RecordError: `decode_label` would refuse one of the values.
        """
        fields: dict[str, Any] = {"id": checked_id(sample_id), "label": None}
        if class_index != RETRACTED:
            fields["label"] = self._name_of(class_index, class_name)
        if event_time_s is not None:
            fields["time"] = seconds(event_time_s)
        if (source := short_text(source, "source")) is not None:
            fields["source"] = source
        headers = (("content-type", b"application/json"),)
        key = fields["id"].encode()
        return self._checked_record(NewRecord(key, orjson.dumps(fields), headers, timestamp_ms))

    def encode_erasure(self, sample_id: str) -> NewRecord:
        """Return a record of the labels topic that erases a sample.

        Raises:
            RecordError: `no_id`.
        """
        sample_id = checked_id(sample_id)
        headers = (("content-type", b"application/json"),)
        value = orjson.dumps({"id": sample_id, "erase": True})
        return self._checked_record(NewRecord(sample_id.encode(), value, headers))

    # Payloads

    def decode_payload(self, body: bytes, content_type: str) -> Array:
        """Return the tensor in a raw, .npy or image body, in the schema's shape and dtype.

        Raises:
            RecordError: `bad_content_type` if it is none of those (JSON included); else what is wrong with the body.
        """
        payload = payload_of(content_type)
        if payload == "json":
            raise RecordError("bad_content_type", f"expected a tensor or an image, got {content_type:.80}")
        if len(body) > self.max_record_bytes:
            raise RecordError("too_large", f"expected at most {self.max_record_bytes} bytes, got {len(body)}")
        return self._tensors.from_bytes(body, payload)

    def payload_from_json(self, value: object) -> Array:
        """Return the tensor in a parsed JSON list: nested like the schema's shape, or flat.

        True and false are 1 and 0. An integer dtype accepts only numbers that it holds exactly.

        Raises:
            RecordError: `bad_shape`, `bad_dtype` or `not_finite`.
        """
        return self._tensors.from_json(value)

    # Checks of both directions

    def _value(self, record: Record) -> bytes:
        if record.value is None:
            raise RecordError("no_value", "expected a value, got null")
        size = len(record.value) + len(record.key or b"")
        for name, content in record.headers:
            size += len(name) + len(content)
        if size > self.max_record_bytes:
            raise RecordError("too_large", f"expected at most {self.max_record_bytes} bytes, got {size}")
        return record.value

    def _checked_record(self, record: NewRecord) -> NewRecord:
        self._value(Record(Position("", 0, 0), 0, record.key, record.value, record.headers))
        return record

    def _class_index(self, value: object) -> int:
        # Same result as `Schema.class_index`, which scans all names.
        if type(value) is int and not self._numbered and 0 <= value < len(self._names):
            return value
        if isinstance(value, str) and (index := self._names.get(value)) is not None:
            return index
        if not isinstance(value, (str, int)):
            # Schema.class_index formats what it got, and formatting a deeply nested list recurses.
            raise RecordError("unknown_class", f"expected a class name or index, got a JSON {json_type(value)}")
        return self.schema.class_index(value)

    def _label_inside(self, value: object) -> tuple[int | None, str | None]:
        return (None, None) if value is None else self.label_class(value)

    def _name_of(self, class_index: int, class_name: str | None) -> str:
        """Return the name to write: of the class, or `class_name` if no class has it."""
        if class_name is None:
            return self._class_name(class_index)
        assert self.label_class(class_name) == (class_index, class_name), class_name
        return class_name

    def _class_name(self, class_index: int) -> str:
        if not 0 <= class_index < len(self.schema.classes):
            raise RecordError("unknown_class", f"class {class_index} is not one of {len(self.schema.classes)}")
        return self.schema.classes[class_index]

    def _answer(self, fields: object) -> Prediction | None:
        """Check the answer that a client reports. All of it, since a forged answer would be scored."""
        if fields is None:
            return None
        if not isinstance(fields, dict):
            raise RecordError("not_json", f"answer: expected a JSON object, got a JSON {json_type(fields)}")
        class_index, version, values = (fields.get(k) for k in ("class_index", "model_version", "probabilities"))
        classes = self.schema.capacity
        if type(class_index) is not int or not 0 <= class_index < classes:
            raise RecordError("unknown_class", f"answer: expected class_index from 0 to {classes - 1}")
        if type(version) is not int or not 0 <= version < MAX_MODEL_VERSION:
            raise RecordError("bad_dtype", "answer: expected model_version, an integer of at least 0")
        if not isinstance(values, list) or len(values) != classes:
            raise RecordError("bad_shape", f"answer: expected probabilities, a list of {classes} numbers")
        try:
            probabilities_C = np.array(array("d", values))
        except (TypeError, OverflowError) as error:
            raise RecordError("bad_dtype", f"answer: expected numbers as probabilities: {error}") from None
        return Prediction(class_index, _checked_probabilities(probabilities_C), version)

    def _answer_fields(self, answer: Prediction) -> dict[str, Any]:
        fields = {
            "class_index": int(answer.class_index),
            "probabilities": answer.probabilities_C.tolist(),
            "model_version": int(answer.model_version),
        }
        self._answer(fields)
        return fields


def _erases(fields: Mapping[str, Any]) -> bool:
    """Whether a label record erases its sample: `"erase": true` without a class."""
    erase = fields.get("erase", False)
    if not isinstance(erase, bool):
        raise RecordError("bad_dtype", f"erase: expected true or false, got a JSON {json_type(erase)}")
    if erase and (fields.get("label") is not None or fields.get("class") is not None):
        raise RecordError("bad_dtype", "erase: expected no class in addition")
    return erase


def _checked_probabilities(values_C: np.ndarray[Any, np.dtype[np.float64]]) -> np.ndarray[Any, np.dtype[np.float32]]:
    # A client may round them to a few digits; their sum is still within this tolerance.
    if not (values_C.min() >= 0.0 and values_C.max() <= 1.001 and abs(values_C.sum() - 1.0) <= 0.01):
        raise RecordError("bad_dtype", "answer: expected probabilities from 0 to 1 that sum to 1")
    return values_C.astype(np.float32)
