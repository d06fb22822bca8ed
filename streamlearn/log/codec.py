"""Bytes to `Sample` and `Label`, and back. Any bytes give a sample or label, or a RecordError with a stable reason.

[source] says where a record has its id, time, label and domain, and [columns] which of its fields make the row. What
they do not name is as in streamlearn's own records:

Samples: JSON {"id", "x", "label"?, "time"?, "domain"?, "true_label"?, "answer"?}, or a binary payload (raw
little-endian C-order tensor, .npy, PNG/JPEG/WebP). A binary payload's id is the record's key, and its other fields are
headers: label, time, domain, true-label, answer. The header content-type, or else the configured format, says which.
Labels: JSON {"id", "label" or "class", "time"?, "source"?}, or a plain class name or index with the id as the key.
A label, inside a sample or not, may name a class that the schema does not have, if `unknown_class` allows it. An index
must be one of the schema's, and so must "true_label".

The header `streamlearn-id` marks records that were appended for a mapped topic: it is the id. Such a sample is the
user's record as JSON, such a label is as above. A label over HTTP in the user's own form has no such header.

Sizes are checked before anything is parsed, shapes before anything is built (`payload`): no input costs more than its
own length times a small constant. Nothing here recurses over the input.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, cast

import orjson

from streamlearn.errors import RecordError, SkippedError
from streamlearn.log.label_classes import LabelClasses, plain_class
from streamlearn.log.payload import TYPE_OF_PAYLOAD, Payload, Tensors, payload_of
from streamlearn.log.predictions import avro, prediction_in
from streamlearn.records import (
    ERASED,
    RETRACTED,
    Array,
    Label,
    NewRecord,
    Position,
    Prediction,
    Record,
    Sample,
    Schema,
)
from streamlearn.schema.columns import RowEncoder
from streamlearn.schema.fields import (
    checked_id,
    header_value,
    json_type,
    key_of,
    seconds,
    short_text,
    text_of,
    time_from_header,
    utf8,
)
from streamlearn.schema.formats import json_object
from streamlearn.schema.paths import MISSING
from streamlearn.schema.reader import OWN_ID, RecordReader
from streamlearn.schema.registry import SchemaRegistry
from streamlearn.schema.settings import FRAMED, TENSORS, ColumnConfig, Format, SourceConfig

_NOWHERE = Position("", 0, 0)
_OWN_RECORDS = SourceConfig()
_NO_HEADERS: Mapping[str, bytes] = {}
OWN_LABEL_FIELDS = frozenset({"id", "label", "class", "time", "source"})
"""Of a label in streamlearn's form."""


class Codec:
    """Decodes and encodes the records of one schema. It is immutable, so any thread may use it.

    A decoded raw payload is a read-only view of the record's bytes: copy it to change it.
    """

    def __init__(
        self,
        schema: Schema,
        source: SourceConfig = _OWN_RECORDS,
        *,
        columns: Mapping[str, ColumnConfig] | None = None,
        max_record_bytes: int = 4 << 20,
        unknown_class: Literal["hold", "refuse", "grow"] = "refuse",
    ) -> None:
        """`columns` are those of [columns], of which `schema` has the layout.

        Raises:
            ConfigError: [source] or [columns] name something that cannot be imported or read.
        """
        self.schema, self.source, self.columns = schema, source, dict(columns or {})
        self.takes_any_name = unknown_class != "refuse"
        """Whether a label may name a class that the schema does not have."""
        self.grows = unknown_class == "grow"
        """Whether such a name gets a spare class, while one is left."""
        self.max_record_bytes = max_record_bytes
        self.registry = None if source.registry.url is None else SchemaRegistry(source.registry)
        """Asked by `decode_sample` and `decode_label`, which raise RegistryUnavailableError while it is away."""
        paths = tuple(config.path(name) for name, config in self.columns.items())
        self._samples = RecordReader(source.samples, self.registry, table="samples", columns=paths)
        self._labels = RecordReader(source.labels, self.registry, table="labels")
        self.rows = RowEncoder(self.columns, used=self._samples.used) if columns else None
        """The encoder of [columns], with its counts; None without columns."""
        assert self.rows is None or self.rows.columns == schema.columns, "another layout"
        self._tensors = Tensors(schema)
        if source.predictions.format == "avro":
            avro()  # a missing extra is an error at the start
        self.classes = LabelClasses(schema, source.labels.values, takes_any_name=self.takes_any_name)

    # Samples

    def decode_sample(self, record: Record) -> Sample:
        """Return the sample in a record of a samples topic.

        Raises:
            RecordError: it has none; the message starts with the record's position. SkippedError if that is no error.
            RegistryUnavailableError: its schema is needed, and the registry is away.
        """
        reader = self._samples
        try:
            value = self._value(record, mapped=reader.mapped)
            headers = _by_name(record)
            chosen = self._format(reader, value, headers) if headers else reader.format
            if chosen in TENSORS:
                return self._sample_from_binary(record, value, cast(Payload, chosen), headers)
            return self._sample_from_fields(record, reader.fields(value, chosen), headers)
        except RecordError as error:
            raise _at(record, error) from None

    def fields_of_sample(self, record: Record) -> dict[str, Any]:
        """Return the fields of a record of a samples topic, as `decode_sample` reads them; none for a tensor.

        Raises:
            RecordError: it cannot be read.
            RegistryUnavailableError: its schema is needed, and the registry is away.
        """
        reader, headers = self._samples, _by_name(record)
        value = self._value(record, mapped=reader.mapped)
        chosen = self._format(reader, value, headers) if headers else reader.format
        return {} if chosen in TENSORS else reader.fields(value, chosen)

    def _sample_from_fields(self, record: Record, fields: dict[str, Any], headers: Mapping[str, bytes]) -> Sample:
        reader = self._samples
        if reader.has_envelope and reader.deleted(fields):
            raise SkippedError("the row was deleted")
        x = self.x_of(fields)
        sample_id, time_s = reader.sample_id(record, fields, headers), reader.event_time(record, fields, headers)
        sample = Sample(record.position, record.timestamp_ms / 1000.0, sample_id, x, event_time_s=time_s)
        own = fields if self.rows is None else {}  # fields of these names may be the user's
        label = reader.find(reader.label, record, fields, headers) if reader.label else own.get("label")
        if not self.classes.is_none(label):
            is_own = self.rows is None and OWN_ID in headers
            sample.label, sample.class_name = self.classes.of_name(label) if is_own else self.classes.of_value(label)
        domain = reader.find(reader.domain, record, fields, headers) if reader.domain else own.get("domain")
        if domain is not MISSING:
            sample.domain = short_text(domain, "domain")
        true_label, answer = own.get("true_label"), own.get("answer")
        if true_label is not None:
            sample.true_label = self.classes.index(true_label)
        if answer is not None:
            sample.answer = self._answer(answer)
        return self._with_headers(sample, headers) if headers else sample

    def x_of(self, fields: Mapping[str, Any]) -> Array:
        """Return the row of a parsed record, or without columns the tensor in its field "x".

        Raises:
            RecordError: it has none.
        """
        if self.rows is not None:
            return self.rows.encode(fields)
        if fields.get("x") is None:
            raise RecordError("no_value", 'expected the payload in the field "x", got none')
        return self._tensors.from_json(fields["x"])

    def _sample_from_binary(
        self, record: Record, value: bytes, payload: Payload, headers: Mapping[str, bytes]
    ) -> Sample:
        reader = self._samples
        sample = Sample(
            position=record.position,
            timestamp_s=record.timestamp_ms / 1000.0,
            sample_id=reader.sample_id(record, None, headers),
            x=self._tensors.from_bytes(value, payload),
        )
        if reader.time is not None:
            sample.event_time_s = reader.event_time(record, {}, headers)
        elif (time := headers.get("time")) is not None:
            sample.event_time_s = time_from_header(time)
        label: object = reader.find(reader.label, record, None, headers) if reader.label else MISSING
        if label is MISSING and (content := headers.get("label")) is not None:
            label = utf8(content, "label")
        if not self.classes.is_none(label):
            read = self.classes.of_name if OWN_ID in headers else self.classes.of_value
            sample.label, sample.class_name = read(label)
        domain: object = reader.find(reader.domain, record, None, headers) if reader.domain else MISSING
        if domain is MISSING and (content := headers.get("domain")) is not None:
            domain = utf8(content, "domain")
        if domain is not MISSING:
            sample.domain = short_text(domain, "domain")
        return self._with_headers(sample, headers)

    def _with_headers(self, sample: Sample, headers: Mapping[str, bytes]) -> Sample:
        """Add what streamlearn writes as headers."""
        if (true_label := headers.get("true-label")) is not None:
            sample.true_label = self.classes.index(utf8(true_label, "true-label"))
        if (answer := headers.get("answer")) is not None:
            sample.answer = self._answer(json_object(answer))
        return sample

    def _format(self, reader: RecordReader, value: bytes, headers: Mapping[str, bytes]) -> Format:
        """The format by the header content-type. On a mapped topic an unknown one is ignored: producers write any."""
        if (content := headers.get("content-type")) is None:
            return reader.format
        try:
            found = payload_of(content.decode("latin-1"))
        except RecordError:
            if not reader.mapped or OWN_ID in headers:
                raise
            return reader.format
        if reader.format not in FRAMED or OWN_ID in headers:
            return found
        return "json" if found == "json" and value[:1] != b"\0" else reader.format

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
        assert payload != "json" or self.rows is None, "a prepared row is not the user's record"
        self._tensors.check(x)
        fields: dict[str, Any] = {
            "label": None if label is None else self.classes.name_to_write(label, class_name),
            "time": seconds(event_time_s),
            "domain": short_text(domain, "domain"),
            "true_label": None if true_label is None else self.classes.name(true_label),
            "answer": None if answer is None else self._answer_fields(answer),
        }
        fields = {name: value for name, value in fields.items() if value is not None}
        headers: list[tuple[str, bytes]] = [("content-type", TYPE_OF_PAYLOAD[payload])]
        if payload == "json":
            value = orjson.dumps({"id": checked_id(sample_id), "x": x.tolist(), **fields})
        else:
            value = self._tensors.to_bytes(x, payload)
            headers += [(name.replace("_", "-"), header_value(content)) for name, content in fields.items()]
        if self._samples.mapped or self.classes.translates:
            headers.append((OWN_ID, checked_id(sample_id).encode()))
        return self._checked_record(NewRecord(key_of(checked_id(sample_id)), value, tuple(headers), timestamp_ms))

    def encode_record(
        self,
        sample_id: str,
        record: Mapping[str, Any],
        *,
        true_label: int | None = None,
        answer: Prediction | None = None,
        timestamp_ms: int | None = None,
    ) -> tuple[NewRecord, Sample]:
        """Return a record with the user's fields unchanged, as JSON, and the sample that it decodes to.

        For a configuration with [columns].

        Raises:
            RecordError: `decode_sample` would refuse it, or the record has another id.
        """
        assert self.rows is not None, "no columns"
        sample_id = checked_id(sample_id)
        self.id_in(record, sample_id)
        value = _record_json(record)
        headers = [("content-type", TYPE_OF_PAYLOAD["json"]), (OWN_ID, sample_id.encode())]
        if true_label is not None:
            headers.append(("true-label", self.classes.name(true_label).encode()))
        if answer is not None:
            headers.append(("answer", header_value(self._answer_fields(answer))))
        new = NewRecord(key_of(sample_id), value, tuple(headers), timestamp_ms)
        self._checked_record(new)
        as_read = Record(_NOWHERE, 0, new.key, value, new.headers)
        return new, self._sample_from_fields(as_read, json_object(value), dict(headers))

    def id_in(self, record: Mapping[str, Any], given: object = None) -> str | None:
        """Return the id in the user's record, or the one that is `given` next to it; None if there is none.

        Raises:
            RecordError: `no_id`: one of them is no id, or they differ.
        """
        sample_id = None if given is None else checked_id(given)
        path = self._samples.id
        if path is not None and path.root != "value":
            return sample_id
        found = record.get("id") if path is None else path.find(record)
        if found is None or found is MISSING:
            return sample_id
        inside = checked_id(found)
        if sample_id not in (None, inside):
            raise RecordError("no_id", f"expected the id {sample_id!r:.80} in the record too, got {inside!r:.80}")
        return inside

    # Labels

    def decode_label(self, record: Record) -> Label:
        """Return the label in a record of the labels topic.

        Raises:
            RecordError: it has none; the message starts with the record's position.
        """
        try:
            value, headers = self._value(record, mapped=self._labels.mapped), _by_name(record)
            if self._labels.mapped and OWN_ID not in headers:
                return self._mapped_label(record, value, headers)
            fields = json_object(value) if value.lstrip()[:1] == b"{" else plain_class(value, self.classes.names)
            if _erases(fields):
                class_index, class_name = ERASED, None
            else:
                class_index, class_name = self.classes.of_label(fields, translate=OWN_ID not in headers)
            return Label(
                position=record.position,
                timestamp_s=record.timestamp_ms / 1000.0,
                sample_id=self._labels.sample_id(record, fields, headers),
                class_index=class_index,
                event_time_s=seconds(fields.get("time")),
                source=short_text(fields.get("source"), "source"),
                class_name=class_name,
            )
        except RecordError as error:
            raise _at(record, error) from None

    def _mapped_label(self, record: Record, value: bytes, headers: Mapping[str, bytes]) -> Label:
        """The label in a record of the user's own. Null in its class retracts, and so does a deleted row."""
        reader = self._labels
        chosen = self._format(reader, value, headers) if reader.format in FRAMED and headers else reader.format
        if chosen == "json" and value.lstrip()[:1] != b"{":
            parsed: object = plain_class(value, self.classes.names).get("label", MISSING)
        else:
            parsed = reader.parse(value, chosen)
        fields = parsed if isinstance(parsed, dict) else {}
        deleted = reader.deleted(fields)
        sample_id = reader.deleted_id(record, fields, headers) if deleted else reader.sample_id(record, fields, headers)
        if sample_id is None:
            raise SkippedError("the row was deleted, and has no id")
        class_index, class_name = RETRACTED, None
        if not deleted:
            class_index, class_name = self._mapped_class(record, parsed, headers)
        return Label(
            position=record.position,
            timestamp_s=record.timestamp_ms / 1000.0,
            sample_id=sample_id,
            class_index=class_index,
            event_time_s=None if deleted else reader.event_time(record, fields, headers),
            class_name=class_name,
        )

    def _mapped_class(self, record: Record, parsed: object, headers: Mapping[str, bytes]) -> tuple[int, str | None]:
        reader = self._labels
        if not isinstance(parsed, dict):
            value = parsed  # the value of a schema that is no record, or a plain class
        elif reader.label is None:
            return self.classes.of_label(parsed)
        else:
            value = reader.find(reader.label, record, parsed, headers)
        if value is None:
            return RETRACTED, None
        if self.classes.is_none(value):
            place = "the record" if reader.label is None else reader.label.text
            raise RecordError("no_class", f"expected a class at {place}, got none")
        return self.classes.of_value(value)

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
            fields["label"] = self.classes.name_to_write(class_index, class_name)
        if event_time_s is not None:
            fields["time"] = seconds(event_time_s)
        if (source := short_text(source, "source")) is not None:
            fields["source"] = source
        return self._own_label(fields, timestamp_ms)

    def is_own_label(self, fields: Mapping[str, Any]) -> bool:
        """Whether a label's JSON is streamlearn's `{"id", "label"}`, and not a record as [source.labels] maps it.

        It has fields of `OWN_LABEL_FIELDS` only, and nothing at a path of another name.
        """
        if not self._labels.mapped:
            return True
        if not {"id"} <= fields.keys() <= OWN_LABEL_FIELDS or not fields.keys() & {"label", "class"}:
            return False
        paths = {"id": self._labels.id, "label": self._labels.label, "time": self._labels.time}
        renamed = [path for name, path in paths.items() if path and path.root == "value" and path.text != name]
        return all(path.find(fields) is MISSING for path in renamed)

    def encode_users_label(self, fields: Mapping[str, Any]) -> tuple[NewRecord, Label]:
        """Return a record for a label as [source.labels] maps it, and the label that it decodes to.

        The user's fields are unchanged. If their id is not among them, but in the key or a header, it is read from
        "id" here, and the record is written in streamlearn's form, which has a place for it.

        Raises:
            RecordError: `decode_label` would refuse it.
        """
        reader, value = self._labels, _record_json(fields)
        headers = (("content-type", TYPE_OF_PAYLOAD["json"]),)
        as_read = Record(_NOWHERE, 0, None, value, headers)
        self._value(as_read)
        if reader.id is None or reader.id.root == "value":
            label = self._mapped_label(as_read, value, dict(headers))
            return self._checked_record(NewRecord(key_of(label.sample_id), value, headers)), label
        sample_id = checked_id(fields.get("id"))
        class_index, class_name = self._mapped_class(as_read, fields, {})
        time_s = reader.event_time(as_read, dict(fields), {})
        new = self.encode_label(sample_id, class_index, class_name=class_name, event_time_s=time_s)
        return new, self.decode_label(Record(_NOWHERE, 0, new.key, new.value, new.headers))

    def encode_erasure(self, sample_id: str) -> NewRecord:
        """Return a record of the labels topic that erases a sample.

        Raises:
            RecordError: `no_id`.
        """
        return self._own_label({"id": checked_id(sample_id), "erase": True})

    def _own_label(self, fields: Mapping[str, Any], timestamp_ms: int | None = None) -> NewRecord:
        """A record in streamlearn's own form; on a topic of other records it is marked by a header."""
        headers: list[tuple[str, bytes]] = [("content-type", b"application/json")]
        if self._labels.mapped or self.classes.translates:
            headers.append((OWN_ID, fields["id"].encode()))
        key = key_of(fields["id"])
        return self._checked_record(NewRecord(key, orjson.dumps(fields), tuple(headers), timestamp_ms))

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

    def _value(self, record: Record, *, mapped: bool = False) -> bytes:
        if record.value is None and mapped:
            raise SkippedError("a tombstone")
        if record.value is None:
            raise RecordError("no_value", "expected a value, got null")
        if (size := record.size_bytes) > self.max_record_bytes:
            raise RecordError("too_large", f"expected at most {self.max_record_bytes} bytes, got {size}")
        return record.value

    def _checked_record(self, record: NewRecord) -> NewRecord:
        self._value(Record(_NOWHERE, 0, record.key, record.value, record.headers))
        return record

    def _answer(self, fields: object) -> Prediction | None:
        """Check the answer that a client reports. All of it, since a forged answer would be scored."""
        return None if fields is None else prediction_in(fields, self.schema.capacity)

    def _answer_fields(self, answer: Prediction) -> dict[str, Any]:
        fields = {
            "class_index": int(answer.class_index),
            "probabilities": answer.probabilities_C.tolist(),
            "model_version": int(answer.model_version),
        }
        self._answer(fields)
        return fields


def _record_json(record: Mapping[str, Any]) -> bytes:
    """The JSON of a user's record. Raises `not_json`."""
    try:
        return orjson.dumps(record, default=_json_text, option=orjson.OPT_SERIALIZE_NUMPY)
    except TypeError as error:  # also nesting that orjson reads, and does not write
        raise RecordError("not_json", f"expected a record that JSON can hold: {error}") from None


def _json_text(value: object) -> str:
    """A value that JSON does not have, as text. Raises TypeError."""
    text = text_of(value)
    if text is None:
        raise TypeError(f"got a {type(value).__name__}")
    return text


def _by_name(record: Record) -> Mapping[str, bytes]:
    return {name.lower(): content for name, content in record.headers} if record.headers else _NO_HEADERS


def _at(record: Record, error: RecordError) -> RecordError:
    """The error with the position of its record."""
    if isinstance(error, SkippedError):
        return SkippedError(f"{record.position}: {error}")
    return RecordError(error.reason, f"{record.position}: {error}")


def _erases(fields: Mapping[str, Any]) -> bool:
    """Whether a label record erases its sample: `"erase": true` without a class."""
    erase = fields.get("erase", False)
    if not isinstance(erase, bool):
        raise RecordError("bad_dtype", f"erase: expected true or false, got a JSON {json_type(erase)}")
    if erase and (fields.get("label") is not None or fields.get("class") is not None):
        raise RecordError("bad_dtype", "erase: expected no class in addition")
    return erase
