"""Bytes to `Sample` and `Label`, and back. Any bytes give a sample or label, or a RecordError with a stable reason.

[source] says where a record has its id, time, label and domain, and [columns] which of its fields make the row. What
they do not name is as in streamlearn's own records:

Samples: JSON {"id", "x", "label"?, "time"?, "domain"?, "true_label"?, "answer"?}, or a binary payload (raw
little-endian C-order tensor, .npy, PNG/JPEG/WebP). A binary payload's id is the record's key, and its other fields are
headers: label, time, domain, true-label, answer. The header content-type, or else the configured format, says which.
Labels: `label_codec`.
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
from streamlearn.log.envelope import as_read, at_position, checked_record, format_of, headers_of, record_json, value_of
from streamlearn.log.label_classes import LabelClasses
from streamlearn.log.label_codec import LabelCodec
from streamlearn.log.payload import TYPE_OF_PAYLOAD, Payload, Tensors, payload_of
from streamlearn.log.predictions import avro, prediction_in
from streamlearn.records import (
    Array,
    NewRecord,
    Prediction,
    Record,
    Sample,
    Schema,
)
from streamlearn.schema.columns import RowEncoder
from streamlearn.schema.fields import (
    checked_id,
    header_value,
    key_of,
    seconds,
    short_text,
    time_from_header,
    utf8,
)
from streamlearn.schema.formats import json_object
from streamlearn.schema.paths import MISSING
from streamlearn.schema.reader import OWN_ID, RecordReader
from streamlearn.schema.registry import SchemaRegistry
from streamlearn.schema.settings import TENSORS, ColumnConfig, SourceConfig

_OWN_RECORDS = SourceConfig()


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
        """Asked by `decode_sample` and `labels.decode`, which raise RegistryUnavailableError while it is away."""
        paths = tuple(config.path(name) for name, config in self.columns.items())
        self._samples = RecordReader(source.samples, self.registry, table="samples", columns=paths)
        self.rows = RowEncoder(self.columns, used=self._samples.used) if columns else None
        """The encoder of [columns], with its counts; None without columns."""
        assert self.rows is None or self.rows.columns == schema.columns, "another layout"
        self.tensors = Tensors(schema)
        """Reads the payload of a sample without columns."""
        if source.predictions.format == "avro":
            avro()  # a missing extra is an error at the start
        self.classes = LabelClasses(schema, source.labels.values, takes_any_name=self.takes_any_name)
        reader = RecordReader(source.labels, self.registry, table="labels")
        self.labels = LabelCodec(reader, self.classes, max_record_bytes)

    def decode_sample(self, record: Record) -> Sample:
        """Return the sample in a record of a samples topic.

        Raises:
            RecordError: it has none; the message starts with the record's position. SkippedError if that is no error.
            RegistryUnavailableError: its schema is needed, and the registry is away.
        """
        reader = self._samples
        try:
            value = value_of(record, self.max_record_bytes, mapped=reader.mapped)
            headers = headers_of(record)
            chosen = format_of(reader, value, headers) if headers else reader.format
            if chosen in TENSORS:
                return self._sample_from_binary(record, value, cast(Payload, chosen), headers)
            return self._sample_from_fields(record, reader.fields(value, chosen), headers)
        except RecordError as error:
            raise at_position(record, error) from None

    def fields_of_sample(self, record: Record) -> dict[str, Any]:
        """Return the fields of a record of a samples topic, as `decode_sample` reads them; none for a tensor.

        Raises:
            RecordError: it cannot be read.
            RegistryUnavailableError: its schema is needed, and the registry is away.
        """
        reader, headers = self._samples, headers_of(record)
        value = value_of(record, self.max_record_bytes, mapped=reader.mapped)
        chosen = format_of(reader, value, headers) if headers else reader.format
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
        return self.tensors.from_json(fields["x"])

    def _sample_from_binary(
        self, record: Record, value: bytes, payload: Payload, headers: Mapping[str, bytes]
    ) -> Sample:
        reader = self._samples
        sample = Sample(
            position=record.position,
            timestamp_s=record.timestamp_ms / 1000.0,
            sample_id=reader.sample_id(record, None, headers),
            x=self.tensors.from_bytes(value, payload),
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
        self.tensors.check(x)
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
            value = self.tensors.to_bytes(x, payload)
            headers += [(name.replace("_", "-"), header_value(content)) for name, content in fields.items()]
        if self._samples.mapped or self.classes.translates:
            headers.append((OWN_ID, checked_id(sample_id).encode()))
        new = NewRecord(key_of(checked_id(sample_id)), value, tuple(headers), timestamp_ms)
        return checked_record(new, self.max_record_bytes)

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
        value = record_json(record)
        headers = [("content-type", TYPE_OF_PAYLOAD["json"]), (OWN_ID, sample_id.encode())]
        if true_label is not None:
            headers.append(("true-label", self.classes.name(true_label).encode()))
        if answer is not None:
            headers.append(("answer", header_value(self._answer_fields(answer))))
        new = NewRecord(key_of(sample_id), value, tuple(headers), timestamp_ms)
        checked_record(new, self.max_record_bytes)
        return new, self._sample_from_fields(as_read(new), json_object(value), dict(headers))

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
        return self.tensors.from_bytes(body, payload)

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
