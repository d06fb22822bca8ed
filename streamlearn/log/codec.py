"""Bytes to `Sample` and `Label`, and back. Whatever bytes a producer sends, the only error that leaves is RecordError.

Samples: JSON {"id", "x", "label"?, "time"?, "domain"?, "true_label"?, "answer"?}, or a binary payload (raw
little-endian C-order tensor, .npy, PNG/JPEG/WebP) whose id is the record's key and whose other fields are headers:
label, time, domain, true-label, answer. The header content-type says which; without it the configured payload does.
Labels: JSON {"id", "label" or "class", "time"?, "source"?}, or a bare class name or index with the id as the key.
A label, inside a sample or not, may name a class that the schema does not have, where `unknown_class` says so: it
keeps its name. An index must be one of the schema's, and so must "true_label".

Sizes are checked before anything is parsed, here; shapes before anything is built, in `payload`: no input costs more
than its own length times a small constant. Nothing here recurses over the input.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Literal, NoReturn, cast

import numpy as np
import orjson

from streamlearn.errors import RecordError
from streamlearn.log.payload import FILL_IN, TYPE_OF_PAYLOAD, Payload, Tensors, json_type, payload_of
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

MAX_ID_BYTES = 512
MAX_TEXT_BYTES = 256
"""Of a domain or a source."""
MAX_TIME_S = 1e11
"""About the year 5138: a larger number is milliseconds, and is refused rather than guessed at."""
MAX_MODEL_VERSION = 2**63

_DEAD_LETTER_HEADERS = (
    "dead-letter-reason",
    "dead-letter-message",
    "dead-letter-topic",
    "dead-letter-partition",
    "dead-letter-offset",
    "dead-letter-timestamp-ms",
)
_NUMBER = re.compile(r"[0-9]{1,12}(\.[0-9]*)?(e[+-]?[0-9]{1,3})?", re.ASCII | re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A record that was set aside, as it was, and why."""

    reason: str
    message: str
    record: Record


class Codec:
    """Decodes and encodes the records of one schema. Holds no state that changes, so any thread may use it.

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
        """Whether such a name takes a spare class, while there is one."""
        self.payload = cast(Payload, payload)
        self.max_record_bytes = max_record_bytes
        self._tensors = Tensors(schema)
        self._names = {name: index for index, name in enumerate(schema.classes)}
        self._numbered = schema.numbered

    # Samples

    def decode_sample(self, record: Record) -> Sample:
        """The sample that a record of the samples topic holds.

        Raises:
            RecordError: it holds none; the message begins with the record's position.
        """
        try:
            value = self._value(record)
            headers = {name.lower(): content for name, content in record.headers}
            payload = self.payload
            if (content_type := headers.get("content-type")) is not None:
                payload = payload_of(content_type.decode("latin-1"))
            if payload == "json":
                return self._sample_from_json(record, _json_object(value))
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
            sample_id=_record_id(record.key, fields.get("id")),
            x=self.payload_from_json(x),
            label=label,
            event_time_s=_time_s(fields.get("time")),
            domain=_text(fields.get("domain"), "domain"),
            true_label=None if true_label is None else self._class_index(true_label),
            answer=self._answer(fields.get("answer")),
            class_name=class_name,
        )

    def _sample_from_binary(self, record: Record, value: bytes, payload: Payload, headers: dict[str, bytes]) -> Sample:
        sample = Sample(
            position=record.position,
            timestamp_s=record.timestamp_ms / 1000.0,
            sample_id=_record_id(record.key, None),
            x=self._tensors.from_bytes(value, payload),
        )
        if (label := headers.get("label")) is not None:
            sample.label, sample.class_name = self.label_class(_utf8(label, "label"))
        if (time := headers.get("time")) is not None:
            sample.event_time_s = _time_from_header(time)
        if (domain := headers.get("domain")) is not None:
            sample.domain = _text(_utf8(domain, "domain"), "domain")
        if (true_label := headers.get("true-label")) is not None:
            sample.true_label = self._class_index(_utf8(true_label, "true-label"))
        if (answer := headers.get("answer")) is not None:
            sample.answer = self._answer(_json_object(answer))
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
        """A record that decodes to these values under any configured payload.

        Classes are written by name: the label by `class_name`, if it has no index.

        Raises:
            RecordError: a value is one that `decode_sample` would refuse.
        """
        assert payload in TYPE_OF_PAYLOAD, payload
        self._tensors.check(x)
        fields: dict[str, Any] = {
            "label": None if label is None else self._name_of(label, class_name),
            "time": _time_s(event_time_s),
            "domain": _text(domain, "domain"),
            "true_label": None if true_label is None else self._class_name(true_label),
            "answer": None if answer is None else self._answer_fields(answer),
        }
        fields = {name: value for name, value in fields.items() if value is not None}
        headers: list[tuple[str, bytes]] = [("content-type", TYPE_OF_PAYLOAD[payload])]
        if payload == "json":
            value = orjson.dumps({"id": checked_id(sample_id), "x": x.tolist(), **fields})
        else:
            value = self._tensors.to_bytes(x, payload)
            headers += [(name.replace("_", "-"), _header(content)) for name, content in fields.items()]
        return self._checked_record(NewRecord(checked_id(sample_id).encode(), value, tuple(headers), timestamp_ms))

    # Labels

    def decode_label(self, record: Record) -> Label:
        """The label that a record of the labels topic holds.

        Raises:
            RecordError: it holds none; the message begins with the record's position.
        """
        try:
            value = self._value(record)
            fields = _json_object(value) if value.lstrip()[:1] == b"{" else self._bare_class(value)
            class_index, class_name = (ERASED, None) if _erases(fields) else self.class_of(fields)
            return Label(
                position=record.position,
                timestamp_s=record.timestamp_ms / 1000.0,
                sample_id=_record_id(record.key, fields.get("id")),
                class_index=class_index,
                event_time_s=_time_s(fields.get("time")),
                source=_text(fields.get("source"), "source"),
                class_name=class_name,
            )
        except RecordError as error:
            raise RecordError(error.reason, f"{record.position}: {error}") from None

    def label_class(self, value: object) -> tuple[int, str | None]:
        """The class that a label names, by its index; of one that is not known, UNLABELLED and its name.

        Raises:
            RecordError: `unknown_class`, where such a label is refused, or where it gives an index or no text.
        """
        try:
            return self._class_index(value), None
        except RecordError:
            name = str(value) if type(value) is int and self._numbered else value
            if not self.takes_any_name or not isinstance(name, str) or not name.strip():
                raise
            if _is_number(name) and not (self._numbered and is_whole(name)):
                raise
            return UNLABELLED, _text(name, "label")

    def class_of(self, fields: Mapping[str, Any]) -> tuple[int, str | None]:
        """The class of a label's JSON, as `label_class` gives it; RETRACTED where it is null.

        Raises:
            RecordError: as there; `no_class` where the field is missing, or where two classes are named that differ.
        """
        given = [fields[name] for name in ("label", "class") if name in fields]
        found = {self.label_class(value) for value in given if value is not None}
        if given and not found:
            return RETRACTED, None
        if len(found) != 1:
            got = "two that differ" if found else "none"
            raise RecordError("no_class", f'expected a class in "label" (or its alias "class"), got {got}')
        return found.pop()

    def _bare_class(self, value: bytes) -> dict[str, Any]:
        """A class as plain text or as a JSON scalar; the text as it stands wins. Empty or null is no class.

        It is no retraction either, as a record without a value is none: only JSON with a null in "label" is.
        """
        text = _utf8(value, "label")
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
            raise RecordError("not_json", f"expected a class name, quoted as JSON or bare: {error}") from None

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
        """A record that decodes to these values. The class is written by name, `class_name` if it has no index.

        RETRACTED writes a null.

        Raises:
            RecordError: a value is one that `decode_label` would refuse.
        """
        fields: dict[str, Any] = {"id": checked_id(sample_id), "label": None}
        if class_index != RETRACTED:
            fields["label"] = self._name_of(class_index, class_name)
        if event_time_s is not None:
            fields["time"] = _time_s(event_time_s)
        if (source := _text(source, "source")) is not None:
            fields["source"] = source
        headers = (("content-type", b"application/json"),)
        key = fields["id"].encode()
        return self._checked_record(NewRecord(key, orjson.dumps(fields), headers, timestamp_ms))

    def encode_erasure(self, sample_id: str) -> NewRecord:
        """A record of the labels topic that erases a sample.

        Raises:
            RecordError: `no_id`.
        """
        sample_id = checked_id(sample_id)
        headers = (("content-type", b"application/json"),)
        value = orjson.dumps({"id": sample_id, "erase": True})
        return self._checked_record(NewRecord(sample_id.encode(), value, headers))

    # Payloads

    def decode_payload(self, body: bytes, content_type: str) -> Array:
        """The tensor in a raw, .npy or image body, in the schema's shape and dtype.

        Raises:
            RecordError: `bad_content_type` when it is none of those, JSON included; else what is wrong with the body.
        """
        payload = payload_of(content_type)
        if payload == "json":
            raise RecordError("bad_content_type", f"expected a tensor or an image, got {content_type:.80}")
        if len(body) > self.max_record_bytes:
            raise RecordError("too_large", f"expected at most {self.max_record_bytes} bytes, got {len(body)}")
        return self._tensors.from_bytes(body, payload)

    def payload_from_json(self, value: object) -> Array:
        """The tensor in a parsed JSON list: nested as the schema's shape, or flat with as many numbers.

        True and false are 1 and 0. An integer dtype takes no number that it cannot hold exactly.

        Raises:
            RecordError: `bad_shape`, `bad_dtype` or `not_finite`.
        """
        return self._tensors.from_json(value)

    # Checks shared by both directions

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
        # As `Schema.class_index` has it, which goes through all names.
        if type(value) is int and not self._numbered and 0 <= value < len(self._names):
            return value
        if isinstance(value, str) and (index := self._names.get(value)) is not None:
            return index
        if not isinstance(value, (str, int)):
            # Schema.class_index shows what it got, and showing a deeply nested list recurses.
            raise RecordError("unknown_class", f"expected a class name or index, got a JSON {json_type(value)}")
        return self.schema.class_index(value)

    def _label_inside(self, value: object) -> tuple[int | None, str | None]:
        return (None, None) if value is None else self.label_class(value)

    def _name_of(self, class_index: int, class_name: str | None) -> str:
        """What a label says: the class by its name, or the name that no class has."""
        if class_name is None:
            return self._class_name(class_index)
        assert self.label_class(class_name) == (class_index, class_name), class_name
        return class_name

    def _class_name(self, class_index: int) -> str:
        if not 0 <= class_index < len(self.schema.classes):
            raise RecordError("unknown_class", f"class {class_index} is none of {len(self.schema.classes)}")
        return self.schema.classes[class_index]

    def _answer(self, fields: object) -> Prediction | None:
        """What a client says it was told. Checked whole, since a forged answer would be scored."""
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


def dead_letter(record: Record, error: RecordError) -> NewRecord:
    """The record as it was, with the reason and where it stood as six more headers.

    One with neither key nor value, which a log takes from others and not from us, gets an empty value.
    """
    contents = (
        error.reason,
        str(error)[:1000],
        record.position.topic,
        str(record.position.partition),
        str(record.position.offset),
        str(record.timestamp_ms),
    )
    added = zip(_DEAD_LETTER_HEADERS, (text.encode("utf-8", "replace") for text in contents), strict=True)
    value = b"" if record.key is None and record.value is None else record.value
    return NewRecord(record.key, value, (*record.headers, *added))


def read_dead_letter(record: Record) -> DeadLetter:
    """The inverse of `dead_letter`. A record that was set aside twice comes back as it was the second time.

    Raises:
        RecordError: the record does not end in the headers of a dead letter.
    """
    added = record.headers[-len(_DEAD_LETTER_HEADERS) :]
    if tuple(name for name, _ in added) != _DEAD_LETTER_HEADERS:
        raise RecordError("no_value", f"{record.position}: expected the headers of a dead letter")
    reason, message, topic, *numbers = (content.decode("utf-8", "replace") for _, content in added)
    if not all(re.fullmatch(r"-?[0-9]{1,19}", number, re.ASCII) for number in numbers):
        raise RecordError("bad_dtype", f"{record.position}: expected partition, offset and time as integers")
    partition, offset, timestamp_ms = (int(number) for number in numbers)
    original = replace(
        record,
        position=Position(topic, partition, offset),
        timestamp_ms=timestamp_ms,
        headers=record.headers[: -len(_DEAD_LETTER_HEADERS)],
    )
    return DeadLetter(reason, message, original)


def hint_of_json(value: bytes) -> str:
    """What may be wrong with a text that is not JSON: many a library writes numbers that JSON does not have."""
    return f"; JSON has no NaN: {FILL_IN}" if b"NaN" in value or b"Infinity" in value else ""


def _json_object(value: bytes) -> dict[str, Any]:
    try:
        fields = orjson.loads(value)
    except orjson.JSONDecodeError as error:
        raise RecordError("not_json", f"expected a JSON object: {error}{hint_of_json(value)}") from None
    if not isinstance(fields, dict):
        raise RecordError("not_json", f"expected a JSON object, got a JSON {json_type(fields)}")
    return fields


def _erases(fields: Mapping[str, Any]) -> bool:
    """Whether a label record erases its sample: `"erase": true`, and no class."""
    erase = fields.get("erase", False)
    if not isinstance(erase, bool):
        raise RecordError("bad_dtype", f"erase: expected true or false, got a JSON {json_type(erase)}")
    if erase and (fields.get("label") is not None or fields.get("class") is not None):
        raise RecordError("bad_dtype", "erase: expected no class beside it")
    return erase


def _record_id(key: bytes | None, field: object) -> str:
    """The id, from the field or else from the key. They must agree: the key decides the partition."""
    if field is None:
        if not key:
            raise RecordError("no_id", 'expected an id in the record\'s key or in the field "id", got neither')
        return checked_id(_utf8(key, "key", "no_id"))
    sample_id = checked_id(field)
    if key and key != sample_id.encode():
        raise RecordError("no_id", f"expected the id {sample_id!r:.80} as the record's key too, got {key!r:.80}")
    return sample_id


def checked_id(value: object) -> str:
    """A sample's id as text, from text or an integer.

    Raises:
        RecordError: `no_id` when it is neither, empty, or longer than `MAX_ID_BYTES`.
    """
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 64:
        return str(value)
    if not isinstance(value, str) or not value:
        raise RecordError("no_id", f"expected an id that is text or an integer, got a JSON {json_type(value)}")
    if len(value) > MAX_ID_BYTES or len(_encoded(value, "no_id")) > MAX_ID_BYTES:
        raise RecordError("no_id", f"expected an id of at most {MAX_ID_BYTES} bytes")
    return value


def _text(value: object, name: str) -> str | None:
    """A short text, such as a domain. Empty is none."""
    if value is None or value == "":
        return None
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 64:
        return str(value)
    if not isinstance(value, str):
        raise RecordError("bad_dtype", f"{name}: expected text, got a JSON {json_type(value)}")
    if len(value) > MAX_TEXT_BYTES or len(_encoded(value, "bad_dtype")) > MAX_TEXT_BYTES:
        raise RecordError("too_large", f"{name}: expected at most {MAX_TEXT_BYTES} bytes")
    return value


def _is_number(text: str) -> bool:
    """Whether it is a number, or the lack of one, rather than a name."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def _encoded(text: str, reason: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise RecordError(reason, "expected text that UTF-8 can write, got a lone surrogate") from None


def _utf8(content: bytes, name: str, reason: str = "bad_dtype") -> str:
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise RecordError(reason, f"{name}: expected UTF-8 text, got {content!r:.80}") from None


def _time_from_header(content: bytes) -> float | None:
    text = _utf8(content, "time", "bad_time").strip()
    return _time_s(float(text) if _NUMBER.fullmatch(text) else text)


def _time_s(value: object) -> float | None:
    """Seconds since the epoch, from a number or from ISO 8601 with a zone."""
    if value is None:
        return None
    if isinstance(value, str):
        try:
            moment = datetime.fromisoformat(value)
            if moment.tzinfo is None:
                _bad_time(f"{value!r:.80}, which names no zone")
            value = moment.timestamp()
        except (ValueError, OverflowError):
            _bad_time(f"{value!r:.80}")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        _bad_time(f"a JSON {json_type(value)}")
    if not 0 <= value < MAX_TIME_S:
        _bad_time(f"{value!r:.30}" + (", which looks like milliseconds" if 1e11 <= value < 1e14 else ""))
    return float(value) + 0.0  # minus zero would not be read back


def _bad_time(got: str) -> NoReturn:
    raise RecordError("bad_time", f"time: expected seconds since 1970 or ISO 8601 with a zone, got {got}")


def _checked_probabilities(values_C: np.ndarray[Any, np.dtype[np.float64]]) -> np.ndarray[Any, np.dtype[np.float32]]:
    # Rounded to a few digits by a client they still sum to one within this.
    if not (values_C.min() >= 0.0 and values_C.max() <= 1.001 and abs(values_C.sum() - 1.0) <= 0.01):
        raise RecordError("bad_dtype", "answer: expected probabilities from 0 to 1 that sum to 1")
    return values_C.astype(np.float32)


def _header(content: object) -> bytes:
    """A field as a header: text as it is, numbers and objects as JSON."""
    return content.encode() if isinstance(content, str) else orjson.dumps(content)
