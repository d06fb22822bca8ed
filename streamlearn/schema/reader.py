"""Reads records as [source.samples] or [source.labels] describes them: bytes to fields, and ids and times in them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from streamlearn.errors import RecordError
from streamlearn.records import Record
from streamlearn.schema.fields import (
    UNITS_PER_SECOND,
    checked_id,
    event_time,
    json_type,
    record_id,
    seconds,
    seconds_of,
    utf8,
)
from streamlearn.schema.formats import Avro, Keys, Protobuf, framed_json, json_object
from streamlearn.schema.paths import MISSING, Path
from streamlearn.schema.registry import SchemaRegistry
from streamlearn.schema.settings import FRAMED, TENSORS, Format, LabelSource, SampleSource

OWN_ID: Final = "streamlearn-id"
"""The header with the id of a record that streamlearn appended to a mapped topic."""
Headers = Mapping[str, bytes]
"""By name in lower case."""


class RecordReader:
    """The compiled settings of one source. Immutable, so any thread may use it."""

    def __init__(
        self,
        source: SampleSource | LabelSource,
        registry: SchemaRegistry | None,
        *,
        table: str,
        columns: tuple[Path, ...] = (),
    ) -> None:
        """`table` is the name of the settings, for errors; `columns` are the paths of [columns].

        Raises:
            ConfigError: a library is missing, or the Protobuf class cannot be imported.
        """
        self.format: Format = source.format
        self.mapped = bool(columns or source.paths or source.format in FRAMED)
        """Whether records are the user's own, and not of streamlearn's `{"id", "x"}` or `{"id", "label"}`."""
        self.id, self.time = _compiled(source.id), _compiled(source.time)
        self.label = _compiled(source.label)
        self.domain = _compiled(source.domain) if isinstance(source, SampleSource) else None
        self._unit = source.time_unit
        self._after = next((path.after for path in (self.id, self.label, *columns) if path and path.after), None)
        self.has_envelope = self._after is not None
        """Whether a path goes through Debezium's `after`."""
        avro = Avro(registry) if registry is not None and _needs_avro(source) else None
        self._keys = Keys(avro, registry)
        self._parsers: dict[str, Callable[[bytes], object]] = {"json": json_object, "json_schema": framed_json}
        if avro is not None:
            self._parsers["avro"] = avro
        if source.message is not None:
            self._parsers["protobuf"] = Protobuf(source.message, key=f"source.{table}.message")

    @property
    def used(self) -> set[str]:
        """The fields at the top of a record that this reader uses."""
        paths = (self.id, self.time, self.label, self.domain)
        return {"id", "time"} | {path.parts[0] for path in paths if path is not None and path.root == "value"}

    def parse(self, value: bytes, chosen: Format) -> object:
        """Return the fields of a record's value, or the value of a schema that is no record.

        Raises:
            RecordError: it is not of this format.
            RegistryUnavailableError: its schema is needed, and the registry is away.
        """
        return self._parsers[chosen](value)

    def fields(self, value: bytes, chosen: Format) -> dict[str, Any]:
        """Return the fields of a record's value. Raises as `parse`."""
        fields = self._parsers[chosen](value)
        if not isinstance(fields, dict):
            raise RecordError("bad_dtype", f"expected a record with fields, got a JSON {json_type(fields)}")
        return fields

    def find(self, path: Path, record: Record, fields: object, headers: Headers) -> object:
        """Return what is at a path of this record, or `MISSING`. Raises RecordError for a key that cannot be read."""
        if path.root == "value":
            return path.find(fields)
        if path.root == "header":
            content = headers.get(path.parts[0])
            return MISSING if content is None else utf8(content, path.text)
        if not record.key:
            return MISSING
        return path.find(self._keys.fields(record.key)) if path.parts else self._keys.text(record.key)

    def sample_id(self, record: Record, fields: object, headers: Headers) -> str:
        """Return the id of the record's sample.

        Raises:
            RecordError: `no_id`.
        """
        if headers and (own := headers.get(OWN_ID)) is not None:
            return checked_id(utf8(own, OWN_ID, "no_id"))
        if self.id is None:
            field = fields.get("id") if isinstance(fields, dict) else None
            return record_id(record.key, field, self._keys.text)
        found = self.find(self.id, record, fields, headers)
        if found is MISSING or found is None:
            raise RecordError("no_id", f"expected an id at {self.id.text}, got none")
        return checked_id(found)

    def event_time(self, record: Record, fields: dict[str, Any], headers: Headers) -> float | None:
        """Return the event time in seconds since 1970.

        Without a path it is the field "time". In a mapped record that may be something else, and is ignored then.

        Raises:
            RecordError: `bad_time`.
        """
        if self.time is not None:
            found = self.find(self.time, record, fields, headers)
            return None if found is MISSING or found is None else event_time(found, self._unit)
        value = fields.get("time")
        if not self.mapped:
            return seconds(value) if self._unit == "s" else event_time(value, self._unit)
        found_s = seconds_of(value, UNITS_PER_SECOND[self._unit])
        return None if found_s is None or found_s < 0.0 else found_s

    def deleted(self, fields: object) -> bool:
        """Whether this is Debezium's record of a deleted row."""
        return self._after is not None and self._after.find(fields) is None

    def deleted_id(self, record: Record, fields: object, headers: Headers) -> str | None:
        """Return the id of a deleted row, from `before` or the key; None if there is none."""
        if self.id is None:
            return None
        found = self.find(self.id.before, record, fields, headers)
        return None if found is MISSING or found is None else checked_id(found)


def _compiled(text: str | None) -> Path | None:
    return None if text is None else Path.parse(text)


def _needs_avro(source: SampleSource | LabelSource) -> bool:
    """Whether values are Avro, or keys may be: only keys that are read."""
    reads_key = source.id is None or any(Path.parse(path).root == "key" for path in source.paths)
    return source.format == "avro" or (source.format not in TENSORS and reads_key)
