"""Formats: bytes to the fields of a record. fastavro and protobuf are imported here, when a format needs them.

A schema registry's frame is a zero byte and the schema's id, big-endian in four bytes. Avro is decoded with the schema
that it was written with; fields are then found by the paths of the config, so a schema may gain and lose fields.

Every error about the bytes is a RecordError. Schemas under which a few bytes could become an unbounded value are
refused: those that contain themselves, and arrays whose items take no bytes. Logical types have readers of our own,
which raise nothing and take bounded time: one odd date must not cost the record.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any, Final
from uuid import UUID

import orjson

from streamlearn.errors import ConfigError, RecordError
from streamlearn.imports import import_object
from streamlearn.schema.fields import json_type, unquoted
from streamlearn.schema.registry import MAX_SCHEMAS, Reference, SchemaRegistry

FRAME_BYTES: Final = 5
MAX_NESTING: Final = 64
"""Of an Avro schema."""
MAX_REFERENCES: Final = 200
"""Schemas that one schema may use."""
MAX_DECIMAL_BYTES: Final = 64
"""154 digits. A longer decimal stays bytes: its conversion takes time by the square of its length."""
_OURS = "streamlearn-"
"""Prefix of the logical types that `_READERS` reads."""
_EPOCH, _EPOCH_DAY = datetime(1970, 1, 1, tzinfo=UTC), date(1970, 1, 1).toordinal()
_BAD_AVRO = (ArithmeticError, AttributeError, EOFError, LookupError, MemoryError, TypeError, ValueError)
"""What fastavro raises on bytes or schemas that are no Avro. UnicodeDecodeError is a ValueError."""


def parse_json(text: bytes) -> Any:
    """Parse JSON. NaN and Infinity, which Python's own module and pandas write, become null.

    Raises:
        orjson.JSONDecodeError: it is no JSON, or no UTF-8.
    """
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        if b"NaN" not in text and b"Infinity" not in text:
            raise
        try:  # what orjson would not write, it would not read either: lone surrogates, integers beyond 64 bits
            return orjson.loads(orjson.dumps(json.loads(text.decode())))
        except (RecursionError, TypeError, ValueError):
            pass
        raise


def json_object(value: bytes) -> dict[str, Any]:
    """Parse a JSON object. Raises `not_json`."""
    try:
        fields = parse_json(value)
    except orjson.JSONDecodeError as error:
        raise RecordError("not_json", f"expected a JSON object: {error}{hint_of_json(value)}") from None
    if not isinstance(fields, dict):
        raise RecordError("not_json", f"expected a JSON object, got a JSON {json_type(fields)}")
    return fields


def hint_of_json(value: bytes) -> str:
    """Return a hint for what is not JSON: the frame of a registry."""
    return (
        '; it starts with a zero byte: set source.*.format = "avro", "json_schema" or "protobuf"'
        if value[:1] == b"\0"
        else ""
    )


def schema_id(value: bytes, reason: str) -> int:
    """Return the schema's id in the frame of a registry. Raises `reason`."""
    if len(value) < FRAME_BYTES or value[0] != 0:
        expected = "expected the frame of a schema registry, a zero byte and the schema's id in four bytes"
        raise RecordError(reason, f"{expected}; got {value[:FRAME_BYTES]!r}")
    return int.from_bytes(value[1:FRAME_BYTES], "big")


def is_framed(value: bytes) -> bool:
    """Whether a value begins as with the frame of a registry."""
    return len(value) >= FRAME_BYTES and value[0] == 0


def framed_json(value: bytes) -> dict[str, Any]:
    """Parse a JSON object, with the frame of a registry or without. Its schema is not needed. Raises `not_json`."""
    return json_object(value[FRAME_BYTES:] if value[:1] == b"\0" else value)


class Avro:
    """Decodes framed Avro, each record with the schema that it was written with."""

    def __init__(self, registry: SchemaRegistry) -> None:
        """Import fastavro.

        Raises:
            ConfigError: the extra `registry` is not installed.
        """
        fastavro = _fastavro()
        self._read, self._parse = fastavro.schemaless_reader, fastavro.parse_schema
        fastavro.read.LOGICAL_READERS.update(_READERS)
        self._not_a_schema = (fastavro.schema.SchemaParseException, RecursionError, *_BAD_AVRO)
        self._registry = registry
        self._parsed: dict[int, Any] = {}

    def __call__(self, value: bytes) -> object:
        """Return the record's fields, or the value of a schema that is no record.

        Raises:
            RecordError: `not_avro` or `unknown_schema`.
            RegistryUnavailableError: the schema is not cached, and the registry is away.
        """
        number = schema_id(value, "not_avro")
        schema = self._parsed.get(number)
        if schema is None:
            schema = self._schema(number)
        stream = io.BytesIO(value)
        stream.seek(FRAME_BYTES)
        try:
            found: object = self._read(stream, schema, None)
        except _BAD_AVRO as error:
            raise RecordError("not_avro", f"expected a record of schema {number}: {_shown(error)}") from None
        if stream.tell() != len(value):
            rest = len(value) - stream.tell()
            raise RecordError("not_avro", f"expected a record of schema {number}, got {rest} bytes more")
        return found

    def _schema(self, number: int) -> Any:
        registered = self._registry.schema(number)
        if registered.kind != "AVRO":
            raise RecordError("not_avro", f"expected an Avro schema, got schema {number} of {registered.kind:.20}")
        named: dict[str, Any] = {}
        try:
            self._load(registered.references, named, set())
            schema = self._parse(_with_our_types(orjson.loads(registered.text)), named)
            _takes_bytes(schema, named, {}, MAX_NESTING)
        except RecordError as error:
            raise RecordError(error.reason, f"schema {number}: {error}") from None
        except self._not_a_schema as error:
            raise RecordError("not_avro", f"expected schema {number} to be an Avro schema: {_shown(error)}") from None
        if len(self._parsed) >= MAX_SCHEMAS:
            self._parsed.clear()
        self._parsed[number] = schema
        return schema

    def _load(self, references: Sequence[Reference], named: dict[str, Any], seen: set[Reference]) -> None:
        """Parse the schemas that a schema uses, each after those that it uses itself."""
        for reference in references:
            if reference in seen:
                continue
            seen.add(reference)
            if len(seen) > MAX_REFERENCES:
                raise RecordError("not_avro", f"expected at most {MAX_REFERENCES} references")
            found = self._registry.reference(reference)
            self._load(found.references, named, seen)
            self._parse(_with_our_types(orjson.loads(found.text)), named)


class FixedAvro:
    """Encodes and decodes records of one schema of our own."""

    def __init__(self, schema: Mapping[str, Any]) -> None:
        """Import fastavro.

        Raises:
            ConfigError: the extra `registry` is not installed.
        """
        fastavro = _fastavro()
        self.text = orjson.dumps(schema).decode()
        """For a registry."""
        self._schema = fastavro.parse_schema(dict(schema))
        self._write, self._read = fastavro.schemaless_writer, fastavro.schemaless_reader

    def encode(self, fields: Mapping[str, Any], number: int) -> bytes:
        """Return a record in the frame of schema `number`."""
        stream = io.BytesIO(b"\0" + number.to_bytes(FRAME_BYTES - 1, "big"))
        stream.seek(FRAME_BYTES)
        self._write(stream, self._schema, fields)
        return stream.getvalue()

    def decode(self, value: bytes) -> dict[str, Any]:
        """Return the fields of a framed record. Raises `not_avro`."""
        stream = io.BytesIO(value)
        stream.seek(FRAME_BYTES)
        try:
            found: dict[str, Any] = self._read(stream, self._schema, None)
        except _BAD_AVRO as error:
            raise RecordError("not_avro", f"expected a record of our own schema: {_shown(error)}") from None
        return found


def _fastavro() -> Any:
    try:
        import fastavro  # noqa: PLC0415  of an extra
    except ImportError as error:
        msg = f"Avro needs the extra: pip install 'streamlearn[registry]' ({error})"
        raise ConfigError(msg) from error
    return fastavro


def _decimal(data: bytes, schema: Any, _: Any = None) -> Decimal | bytes:
    if len(data) > MAX_DECIMAL_BYTES:
        return data
    return Decimal(f"{int.from_bytes(data, 'big', signed=True)}E-{schema.get('scale', 0)}")


def _day(data: int, *_: Any) -> date | float:
    try:
        return date.fromordinal(data + _EPOCH_DAY)
    except (OverflowError, ValueError):
        return math.nan


def _moment(after: Callable[[int], timedelta]) -> Callable[..., datetime | float]:
    """A reader of a timestamp; one that datetime cannot hold is NaN."""

    def read(data: int, *_: Any) -> datetime | float:
        try:
            return _EPOCH + after(data)
        except OverflowError:
            return math.nan

    return read


_TIMESTAMPS = {
    f"long-{_OURS}{zone}timestamp-{name}": _moment(after)
    for zone in ("", "local-")
    for name, after in (
        ("millis", lambda data: timedelta(milliseconds=data)),
        ("micros", lambda data: timedelta(microseconds=data)),
        ("nanos", lambda data: timedelta(microseconds=data // 1000)),
    )
}
_READERS: Final[Mapping[str, Callable[..., Any]]] = {
    **_TIMESTAMPS,
    f"int-{_OURS}date": _day,
    f"bytes-{_OURS}decimal": _decimal,
    f"fixed-{_OURS}decimal": _decimal,
    f"fixed-{_OURS}uuid": lambda data, *_: str(UUID(bytes=data)) if len(data) == 16 else data,
    f"int-{_OURS}time-millis": lambda data, *_: data / 1e3,
    f"long-{_OURS}time-micros": lambda data, *_: data / 1e6,
}
"""By Avro type and logical type. Times of the day become seconds, and UUIDs text."""


def _with_our_types(schema: Any) -> Any:
    """The schema with logical types that are read by `_READERS`; others are read as the types below them."""
    if isinstance(schema, list):
        return [_with_our_types(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    found = {name: _with_our_types(each) if name in _NESTED else each for name, each in schema.items()}
    if isinstance(logical := found.get("logicalType"), str):
        found["logicalType"] = _OURS + logical
    return found


_NESTED = ("type", "fields", "items", "values")


def _takes_bytes(schema: Any, named: Mapping[str, Any], known: dict[str, bool | None], levels: int) -> bool:
    """Whether each value of a parsed Avro schema takes at least one byte.

    `known` has the result of each record that was seen, and None for those that are being looked at.

    Raises:
        RecordError: `not_avro`: a value could be without bound.
    """
    if levels == 0:
        raise RecordError("not_avro", f"expected a schema of at most {MAX_NESTING} levels")
    if isinstance(schema, str) and schema in named:
        schema = named[schema]
    kind = schema["type"] if isinstance(schema, dict) else schema
    if isinstance(kind, list):  # a union: its branch takes a byte
        for branch in kind:
            _takes_bytes(branch, named, known, levels - 1)
        return True
    if isinstance(kind, dict):
        return _takes_bytes(kind, named, known, levels - 1)
    if kind in ("record", "error"):
        return _record_takes_bytes(schema, named, known, levels)
    if kind == "array" and not _takes_bytes(schema["items"], named, known, levels - 1):
        raise RecordError("not_avro", "expected arrays whose items take bytes")
    if kind == "map":
        _takes_bytes(schema["values"], named, known, levels - 1)
    return bool(kind != "null" and (kind != "fixed" or schema["size"] > 0))


def _record_takes_bytes(schema: Any, named: Mapping[str, Any], known: dict[str, bool | None], levels: int) -> bool:
    name = schema["name"]
    if name in known and known[name] is None:
        raise RecordError("not_avro", f"expected a schema that does not contain itself, got {name:.80}")
    if name not in known:
        known[name] = None
        fields = [_takes_bytes(field["type"], named, known, levels - 1) for field in schema["fields"]]
        known[name] = any(fields)
    return bool(known[name])


class Protobuf:
    """Decodes messages of a user's generated class, with the frame of a registry or without.

    Integers of 64 bits become text and enums their names, as in Protobuf's JSON. Fields without a value in the message
    have their default, unless they are optional.
    """

    def __init__(self, message: str, *, key: str) -> None:
        """Import the class; `key` names the setting in errors.

        Raises:
            ConfigError: protobuf is not installed, or the class cannot be imported or is no message.
        """
        try:
            from google.protobuf import json_format, message as messages  # noqa: PLC0415, I001  of an extra
        except ImportError as error:
            msg = f"Protobuf needs the extra: pip install 'streamlearn[registry]' ({error})"
            raise ConfigError(msg) from error
        self._class = import_object(message, key=key)
        if not hasattr(self._class, "FromString"):
            msg = f"{key}: expected the generated class of a message, got {message!r}"
            raise ConfigError(msg)
        self._to_dict = json_format.MessageToDict
        self._errors = (messages.DecodeError, json_format.Error, RecursionError, *_BAD_AVRO)

    def __call__(self, value: bytes) -> object:
        """Return the message's fields by their names in the .proto file. Raises `not_protobuf`."""
        body = value[_message_start(value) :] if value[:1] == b"\0" else value  # no field has the number 0
        try:
            found: object = self._to_dict(
                self._class.FromString(body),  # type: ignore[attr-defined]
                preserving_proto_field_name=True,
                always_print_fields_with_no_presence=True,
            )
        except self._errors as error:
            expected = f"expected a message of {getattr(self._class, '__name__', 'the class')}"
            raise RecordError("not_protobuf", f"{expected}: {_shown(error)}") from None
        return found


def _message_start(value: bytes) -> int:
    """Where the message starts after the frame and the message's indexes: their count, then each, as zigzag varints."""
    schema_id(value, "not_protobuf")
    at = FRAME_BYTES
    count, at = _varint(value, at)
    for _ in range(count >> 1):
        _, at = _varint(value, at)
    return at


def _varint(value: bytes, at: int) -> tuple[int, int]:
    number = 0
    for shift in range(0, 70, 7):
        if at >= len(value):
            break
        byte = value[at]
        at += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, at
    raise RecordError("not_protobuf", "expected the indexes of the message after the schema's id")


class Keys:
    """Reads the value of a record's key: decoded by the registry if it has a frame, else text without JSON quotes."""

    def __init__(self, avro: Callable[[bytes], object] | None, registry: SchemaRegistry | None) -> None:
        self._avro, self._registry = avro, registry

    def text(self, key: bytes) -> object:
        """Return the key's value, for an id. Raises RecordError."""
        return self._framed(key) if self._is_framed(key) else unquoted(key)

    def fields(self, key: bytes) -> object:
        """Return a key that is an object, for a path into it. Raises RecordError."""
        if self._is_framed(key):
            return self._framed(key)
        try:
            return orjson.loads(key)
        except orjson.JSONDecodeError as error:
            raise RecordError("no_id", f"key: expected a JSON object, got {key!r:.80}: {error}") from None

    def _is_framed(self, key: bytes) -> bool:
        return self._registry is not None and key[:1] == b"\0"

    def _framed(self, key: bytes) -> object:
        assert self._registry is not None
        number = schema_id(key, "no_id")
        kind = self._registry.schema(number).kind
        if kind == "AVRO" and self._avro is not None:
            return self._avro(key)
        if kind == "JSON":
            try:
                return orjson.loads(key[FRAME_BYTES:])
            except orjson.JSONDecodeError as error:
                raise RecordError("no_id", f"key: expected JSON after the frame of schema {number}: {error}") from None
        raise RecordError("no_id", f"key: expected a schema of AVRO or JSON, got schema {number} of {kind:.20}")


def _shown(error: BaseException) -> str:
    return f"{type(error).__name__}: {error!s:.200}"
