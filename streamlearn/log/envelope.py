"""What decoding samples and labels has in common: a record's value, headers and format; its errors; JSON to append."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson

from streamlearn.errors import RecordError, SkippedError
from streamlearn.log.payload import payload_of
from streamlearn.records import NewRecord, Position, Record
from streamlearn.schema.fields import text_of
from streamlearn.schema.reader import OWN_ID, RecordReader
from streamlearn.schema.settings import FRAMED, Format

_NOWHERE = Position("", 0, 0)
_NO_HEADERS: Mapping[str, bytes] = {}


def format_of(reader: RecordReader, value: bytes, headers: Mapping[str, bytes]) -> Format:
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


def value_of(record: Record, max_bytes: int, *, mapped: bool = False) -> bytes:
    """The value of a record, if it is not too large. Raises RecordError."""
    if record.value is None and mapped:
        raise SkippedError("a tombstone")
    if record.value is None:
        raise RecordError("no_value", "expected a value, got null")
    if (size := record.size_bytes) > max_bytes:
        raise RecordError("too_large", f"expected at most {max_bytes} bytes, got {size}")
    return record.value


def checked_record(record: NewRecord, max_bytes: int) -> NewRecord:
    """The same record. Raises RecordError if a reader would refuse its size."""
    value_of(as_read(record), max_bytes)
    return record


def as_read(record: NewRecord) -> Record:
    """A record to append as its reader gets it, without a position."""
    return Record(_NOWHERE, 0, record.key, record.value, record.headers)


def record_json(record: Mapping[str, Any]) -> bytes:
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


def headers_of(record: Record) -> Mapping[str, bytes]:
    """By name in lower case."""
    return {name.lower(): content for name, content in record.headers} if record.headers else _NO_HEADERS


def at_position(record: Record, error: RecordError) -> RecordError:
    """The error with the position of its record."""
    if isinstance(error, SkippedError):
        return SkippedError(f"{record.position}: {error}")
    return RecordError(error.reason, f"{record.position}: {error}")
