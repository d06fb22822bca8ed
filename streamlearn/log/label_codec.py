"""Bytes to `Label`, and back. Any bytes give a label, or a RecordError with a stable reason.

JSON {"id", "label" or "class", "time"?, "source"?}, or a plain class name or index with the id as the key; or a record
of the user's, as [source.labels] maps it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson

from streamlearn.errors import RecordError, SkippedError
from streamlearn.log.envelope import as_read, at_position, checked_record, format_of, headers_of, record_json, value_of
from streamlearn.log.label_classes import LabelClasses, plain_class
from streamlearn.log.payload import TYPE_OF_PAYLOAD
from streamlearn.records import ERASED, RETRACTED, Label, NewRecord, Record
from streamlearn.schema.fields import checked_id, json_type, key_of, seconds, short_text
from streamlearn.schema.formats import json_object
from streamlearn.schema.paths import MISSING
from streamlearn.schema.reader import OWN_ID, RecordReader
from streamlearn.schema.settings import FRAMED

OWN_LABEL_FIELDS = frozenset({"id", "label", "class", "time", "source"})
"""Of a label in streamlearn's form."""


class LabelCodec:
    """Decodes and encodes the records of the labels topic. Immutable."""

    def __init__(self, reader: RecordReader, classes: LabelClasses, max_record_bytes: int) -> None:
        self._reader, self._classes, self._max_record_bytes = reader, classes, max_record_bytes

    def decode(self, record: Record) -> Label:
        """Return the label in a record of the labels topic.

        Raises:
            RecordError: it has none; the message starts with the record's position.
        """
        try:
            value, headers = value_of(record, self._max_record_bytes, mapped=self._reader.mapped), headers_of(record)
            if self._reader.mapped and OWN_ID not in headers:
                return self._mapped_label(record, value, headers)
            fields = json_object(value) if value.lstrip()[:1] == b"{" else plain_class(value, self._classes.names)
            if _erases(fields):
                class_index, class_name = ERASED, None
            else:
                class_index, class_name = self._classes.of_label(fields, translate=OWN_ID not in headers)
            return Label(
                position=record.position,
                timestamp_s=record.timestamp_ms / 1000.0,
                sample_id=self._reader.sample_id(record, fields, headers),
                class_index=class_index,
                event_time_s=seconds(fields.get("time")),
                source=short_text(fields.get("source"), "source"),
                class_name=class_name,
            )
        except RecordError as error:
            raise at_position(record, error) from None

    def _mapped_label(self, record: Record, value: bytes, headers: Mapping[str, bytes]) -> Label:
        """The label in a record of the user's own. Null in its class retracts, and so does a deleted row."""
        reader = self._reader
        chosen = format_of(reader, value, headers) if reader.format in FRAMED and headers else reader.format
        if chosen == "json" and value.lstrip()[:1] != b"{":
            parsed: object = plain_class(value, self._classes.names).get("label", MISSING)
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
        reader = self._reader
        if not isinstance(parsed, dict):
            value = parsed  # the value of a schema that is no record, or a plain class
        elif reader.label is None:
            return self._classes.of_label(parsed)
        else:
            value = reader.find(reader.label, record, parsed, headers)
        if value is None:
            return RETRACTED, None
        if self._classes.is_none(value):
            place = "the record" if reader.label is None else reader.label.text
            raise RecordError("no_class", f"expected a class at {place}, got none")
        return self._classes.of_value(value)

    def encode(
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
            RecordError: `decode` would refuse one of the values.
        """
        fields: dict[str, Any] = {"id": checked_id(sample_id), "label": None}
        if class_index != RETRACTED:
            fields["label"] = self._classes.name_to_write(class_index, class_name)
        if event_time_s is not None:
            fields["time"] = seconds(event_time_s)
        if (source := short_text(source, "source")) is not None:
            fields["source"] = source
        return self._own_label(fields, timestamp_ms)

    def is_own(self, fields: Mapping[str, Any]) -> bool:
        """Whether a label's JSON is streamlearn's `{"id", "label"}`, and not a record as [source.labels] maps it.

        It has fields of `OWN_LABEL_FIELDS` only, and nothing at a path of another name.
        """
        if not self._reader.mapped:
            return True
        if not {"id"} <= fields.keys() <= OWN_LABEL_FIELDS or not fields.keys() & {"label", "class"}:
            return False
        paths = {"id": self._reader.id, "label": self._reader.label, "time": self._reader.time}
        renamed = [path for name, path in paths.items() if path and path.root == "value" and path.text != name]
        return all(path.find(fields) is MISSING for path in renamed)

    def encode_users(self, fields: Mapping[str, Any]) -> tuple[NewRecord, Label]:
        """Return a record for a label as [source.labels] maps it, and the label that it decodes to.

        The user's fields are unchanged. If their id is not among them, but in the key or a header, it is read from
        "id" here, and the record is written in streamlearn's form, which has a place for it.

        Raises:
            RecordError: `decode` would refuse it.
        """
        reader, value = self._reader, record_json(fields)
        headers = (("content-type", TYPE_OF_PAYLOAD["json"]),)
        users = as_read(checked_record(NewRecord(None, value, headers), self._max_record_bytes))
        if reader.id is None or reader.id.root == "value":
            label = self._mapped_label(users, value, dict(headers))
            return checked_record(NewRecord(key_of(label.sample_id), value, headers), self._max_record_bytes), label
        sample_id = checked_id(fields.get("id"))
        class_index, class_name = self._mapped_class(users, fields, {})
        time_s = reader.event_time(users, dict(fields), {})
        new = self.encode(sample_id, class_index, class_name=class_name, event_time_s=time_s)
        return new, self.decode(as_read(new))

    def encode_erasure(self, sample_id: str) -> NewRecord:
        """Return a record of the labels topic that erases a sample.

        Raises:
            RecordError: `no_id`.
        """
        return self._own_label({"id": checked_id(sample_id), "erase": True})

    def _own_label(self, fields: Mapping[str, Any], timestamp_ms: int | None = None) -> NewRecord:
        """A record in streamlearn's own form; on a topic of other records it is marked by a header."""
        headers: list[tuple[str, bytes]] = [("content-type", b"application/json")]
        if self._reader.mapped or self._classes.translates:
            headers.append((OWN_ID, fields["id"].encode()))
        key = key_of(fields["id"])
        new = NewRecord(key, orjson.dumps(fields), tuple(headers), timestamp_ms)
        return checked_record(new, self._max_record_bytes)


def _erases(fields: Mapping[str, Any]) -> bool:
    """Whether a label record erases its sample: `"erase": true` without a class."""
    erase = fields.get("erase", False)
    if not isinstance(erase, bool):
        raise RecordError("bad_dtype", f"erase: expected true or false, got a JSON {json_type(erase)}")
    if erase and (fields.get("label") is not None or fields.get("class") is not None):
        raise RecordError("bad_dtype", "erase: expected no class in addition")
    return erase
