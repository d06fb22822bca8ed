"""Bytes to `Sample` and `Label`, and back. Whatever bytes a producer sends, the only error that leaves is RecordError.

Samples: JSON {"id", "x", "label"?, "time"?, "domain"?, "true_label"?, "answer"?}, or a binary payload (raw
little-endian C-order tensor, .npy, PNG/JPEG/WebP) whose id is the record's key and whose other fields are headers:
label, time, domain, true-label, answer. The header content-type says which; without it the configured payload does.
Labels: JSON {"id", "label" or "class", "time"?, "source"?}, or a bare class name or index with the id as the key.

Sizes are checked before anything is parsed, shapes before anything is built: no input costs more than its own length
times a small constant. Nothing here recurses over the input.
"""

from __future__ import annotations

import io
import math
import re
import struct
import zlib
from array import array
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import chain
from typing import Any, Literal, NoReturn, TypeAlias, cast

import numpy as np
import orjson
from PIL import Image, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

from streamlearn.errors import RecordError
from streamlearn.records import Array, Label, NewRecord, Position, Prediction, Record, Sample, Schema

Payload: TypeAlias = Literal["json", "raw", "npy", "image"]

MAX_ID_BYTES = 512
MAX_TEXT_BYTES = 256
"""Of a domain or a source."""
MAX_TIME_S = 1e11
"""About the year 5138: a larger number is milliseconds, and is refused rather than guessed at."""
MAX_MODEL_VERSION = 2**63

_NPY_HEADER_BYTES = 4096
_PAYLOAD_OF_TYPE: dict[str, Payload] = {
    "application/json": "json",
    "application/octet-stream": "raw",
    "application/x-npy": "npy",
}
_TYPE_OF_PAYLOAD = {
    "json": b"application/json",
    "raw": b"application/octet-stream",
    "npy": b"application/x-npy",
}
_DEAD_LETTER_HEADERS = (
    "dead-letter-reason",
    "dead-letter-message",
    "dead-letter-topic",
    "dead-letter-partition",
    "dead-letter-offset",
    "dead-letter-timestamp-ms",
)
_NUMBER = re.compile(r"[0-9]{1,12}(\.[0-9]*)?(e[+-]?[0-9]{1,3})?", re.ASCII | re.IGNORECASE)
_NPY_DESCR = re.compile(rb"""['"]descr['"]\s*:\s*['"]([<>|=][a-zA-Z][0-9]{1,3})['"]""")
_NPY_ORDER = re.compile(rb"""['"]fortran_order['"]\s*:\s*(True|False)""")
_NPY_SHAPE = re.compile(rb"""['"]shape['"]\s*:\s*\(([0-9,\s]{0,200})\)""")

# What Pillow's decoders raise on hostile bytes. Warnings are here since they are exceptions where the process says so.
_IMAGE_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    Image.DecompressionBombError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    Warning,
    struct.error,
    zlib.error,
)


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

    def __init__(self, schema: Schema, *, payload: str = "json", max_record_bytes: int = 4 << 20) -> None:
        assert payload in ("json", "raw", "npy", "image"), payload
        self.schema = schema
        self.payload = cast(Payload, payload)
        self.max_record_bytes = max_record_bytes
        self._tensors = _Tensors(schema)
        self._names = {name: index for index, name in enumerate(schema.classes)}

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
                payload = _payload_of(content_type.decode("latin-1"))
            if payload == "json":
                return self._sample_from_json(record, _json_object(value))
            return self._sample_from_binary(record, value, payload, headers)
        except RecordError as error:
            raise RecordError(error.reason, f"{record.position}: {error}") from None

    def _sample_from_json(self, record: Record, fields: dict[str, Any]) -> Sample:
        x, label, true_label = fields.get("x"), fields.get("label"), fields.get("true_label")
        if x is None:
            raise RecordError("no_value", 'expected the payload in the field "x", got none')
        return Sample(
            position=record.position,
            timestamp_s=record.timestamp_ms / 1000.0,
            sample_id=_record_id(record.key, fields.get("id")),
            x=self.payload_from_json(x),
            label=None if label is None else self._class_index(label),
            event_time_s=_time_s(fields.get("time")),
            domain=_text(fields.get("domain"), "domain"),
            true_label=None if true_label is None else self._class_index(true_label),
            answer=self._answer(fields.get("answer")),
        )

    def _sample_from_binary(self, record: Record, value: bytes, payload: Payload, headers: dict[str, bytes]) -> Sample:
        sample = Sample(
            position=record.position,
            timestamp_s=record.timestamp_ms / 1000.0,
            sample_id=_record_id(record.key, None),
            x=self._tensors.from_bytes(value, payload),
        )
        if (label := headers.get("label")) is not None:
            sample.label = self._class_index(_utf8(label, "label"))
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
        event_time_s: float | None = None,
        domain: str | None = None,
        true_label: int | None = None,
        answer: Prediction | None = None,
        timestamp_ms: int | None = None,
    ) -> NewRecord:
        """A record that decodes to these values under any configured payload. Classes are written by name.

        Raises:
            RecordError: a value is one that `decode_sample` would refuse.
        """
        assert payload in _TYPE_OF_PAYLOAD, payload
        self._tensors.check(x)
        fields: dict[str, Any] = {
            "label": None if label is None else self._class_name(label),
            "time": _time_s(event_time_s),
            "domain": _text(domain, "domain"),
            "true_label": None if true_label is None else self._class_name(true_label),
            "answer": None if answer is None else self._answer_fields(answer),
        }
        fields = {name: value for name, value in fields.items() if value is not None}
        headers: list[tuple[str, bytes]] = [("content-type", _TYPE_OF_PAYLOAD[payload])]
        if payload == "json":
            value = orjson.dumps({"id": _id(sample_id), "x": x.tolist(), **fields})
        else:
            value = self._tensors.to_bytes(x, payload)
            headers += [(name.replace("_", "-"), _header(content)) for name, content in fields.items()]
        return self._checked_record(NewRecord(_id(sample_id).encode(), value, tuple(headers), timestamp_ms))

    # Labels

    def decode_label(self, record: Record) -> Label:
        """The label that a record of the labels topic holds.

        Raises:
            RecordError: it holds none; the message begins with the record's position.
        """
        try:
            value = self._value(record)
            fields = _json_object(value) if value.lstrip()[:1] == b"{" else {"label": self._bare_class(value)}
            return Label(
                position=record.position,
                timestamp_s=record.timestamp_ms / 1000.0,
                sample_id=_record_id(record.key, fields.get("id")),
                class_index=self._label_class(fields),
                event_time_s=_time_s(fields.get("time")),
                source=_text(fields.get("source"), "source"),
            )
        except RecordError as error:
            raise RecordError(error.reason, f"{record.position}: {error}") from None

    def _label_class(self, fields: dict[str, Any]) -> int:
        found = {self._class_index(fields[name]) for name in ("label", "class") if fields.get(name) is not None}
        if len(found) != 1:
            got = "two that differ" if found else "none"
            raise RecordError("no_class", f'expected a class in "label" (or its alias "class"), got {got}')
        return found.pop()

    def _bare_class(self, value: bytes) -> object:
        """A class as plain text or as a JSON scalar; the text as it stands wins."""
        text = _utf8(value, "label")
        if text in self._names:
            return text
        text = text.strip()
        if not text or text == "null":
            return None
        if text[0] != '"':
            return text
        try:
            return orjson.loads(text)
        except orjson.JSONDecodeError as error:
            raise RecordError("not_json", f"expected a class name, quoted as JSON or bare: {error}") from None

    def encode_label(
        self,
        sample_id: str,
        class_index: int,
        *,
        event_time_s: float | None = None,
        source: str | None = None,
        timestamp_ms: int | None = None,
    ) -> NewRecord:
        """A record that decodes to these values. The class is written by name.

        Raises:
            RecordError: a value is one that `decode_label` would refuse.
        """
        fields: dict[str, Any] = {"id": _id(sample_id), "label": self._class_name(class_index)}
        if event_time_s is not None:
            fields["time"] = _time_s(event_time_s)
        if (source := _text(source, "source")) is not None:
            fields["source"] = source
        headers = (("content-type", b"application/json"),)
        return self._checked_record(NewRecord(_id(sample_id).encode(), orjson.dumps(fields), headers, timestamp_ms))

    # Payloads

    def decode_payload(self, body: bytes, content_type: str) -> Array:
        """The tensor in a raw, .npy or image body, in the schema's shape and dtype.

        Raises:
            RecordError: `bad_content_type` when it is none of those, JSON included; else what is wrong with the body.
        """
        payload = _payload_of(content_type)
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
        if isinstance(value, str) and (index := self._names.get(value)) is not None:
            return index
        if not isinstance(value, (str, int)):
            # Schema.class_index shows what it got, and showing a deeply nested list recurses.
            raise RecordError("unknown_class", f"expected a class name or index, got a JSON {_json_type(value)}")
        return self.schema.class_index(value)

    def _class_name(self, class_index: int) -> str:
        return self.schema.classes[self.schema.class_index(int(class_index))]

    def _answer(self, fields: object) -> Prediction | None:
        """What a client says it was told. Checked whole, since a forged answer would be scored."""
        if fields is None:
            return None
        if not isinstance(fields, dict):
            raise RecordError("not_json", f"answer: expected a JSON object, got a JSON {_json_type(fields)}")
        class_index, version, values = (fields.get(k) for k in ("class_index", "model_version", "probabilities"))
        classes = len(self.schema.classes)
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
    """The record as it was, with the reason and where it stood as six more headers."""
    contents = (
        error.reason,
        str(error)[:1000],
        record.position.topic,
        str(record.position.partition),
        str(record.position.offset),
        str(record.timestamp_ms),
    )
    added = zip(_DEAD_LETTER_HEADERS, (text.encode("utf-8", "replace") for text in contents), strict=True)
    return NewRecord(record.key, record.value, (*record.headers, *added))


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


class _Tensors:
    """Bytes or parsed JSON to a tensor of one schema, and back. Knows nothing of records."""

    def __init__(self, schema: Schema) -> None:
        assert schema.shape, schema
        assert min(schema.shape) >= 1, schema.shape
        self.schema = schema
        self._count = math.prod(schema.shape)
        self._nbytes = schema.nbytes
        self._wire_dtype = schema.dtype.newbyteorder("<")
        self._floating = schema.dtype.kind == "f"

    def from_json(self, value: object) -> Array:
        """See `Codec.payload_from_json`."""
        flat = self._flatten(value)
        try:
            numbers = np.frombuffer(array("d", flat), np.float64)
        except TypeError as error:
            if any(isinstance(item, list) for item in flat):
                raise self._bad_shape("lists nested unevenly or too deep") from None
            raise RecordError("bad_dtype", f"expected numbers: {error}") from None
        except OverflowError:
            raise RecordError("bad_dtype", f"expected {self.schema.dtype} numbers, got a larger one") from None
        return self._cast(numbers).reshape(self.schema.shape)

    def from_bytes(self, body: bytes, payload: Payload) -> Array:
        if payload == "image":
            return self._image(body)
        if payload == "npy":
            return self._npy(body)
        if len(body) != self._nbytes:
            wanted = f"{self._nbytes} bytes ({self.schema.dtype} of shape {_shape_text(self.schema.shape)})"
            raise RecordError("bad_shape", f"expected {wanted}, got {len(body)}")
        return self._tensor(body, self._wire_dtype, 0, "C")

    def to_bytes(self, x: Array, payload: str) -> bytes:
        x = np.ascontiguousarray(x, self._wire_dtype)
        if payload == "raw":
            return x.tobytes()
        file = io.BytesIO()
        np.lib.format.write_array(file, x, allow_pickle=False)
        return file.getvalue()

    def check(self, x: Array) -> None:
        if x.shape != self.schema.shape:
            raise self._bad_shape(_shape_text(x.shape))
        if x.dtype != self.schema.dtype:
            raise RecordError("bad_dtype", f"expected dtype {self.schema.dtype}, got {x.dtype}")
        if self._floating:
            self._check_finite(x)

    def _flatten(self, value: object) -> list[Any]:
        """The numbers of a flat or nested list; each level's length is checked before the next is opened."""
        if not isinstance(value, list):
            raise self._bad_shape(f"a JSON {_json_type(value)}")
        if value and not isinstance(value[0], list):
            if len(value) != self._count:
                raise self._bad_shape(_shape_text((len(value),)))
            return value
        level: list[Any] = [value]
        for size in self.schema.shape:
            if not all(isinstance(row, list) and len(row) == size for row in level):
                raise self._bad_shape(_nested_shape(value))
            level = list(chain.from_iterable(level))
        return level

    def _cast(self, numbers: np.ndarray[Any, np.dtype[np.float64]]) -> Array:
        """Float64 numbers in the schema's dtype: exactly where it is an integer, finite where it is a float."""
        dtype = self.schema.dtype
        if self._floating:
            with np.errstate(over="ignore"):
                x: Array = numbers.astype(dtype, copy=False)
            self._check_finite(x)
            return x
        bounds = np.iinfo(cast(Any, dtype))
        # Float64 holds every integer of up to 32 bits, so that equality after the cast means exact. NaN fails `<=`.
        if bounds.min <= numbers.min() and numbers.max() <= bounds.max:
            x = numbers.astype(dtype)
            if (x == numbers).all():
                return x
        wrong = next(number for number in numbers.tolist() if not _holds(bounds, number))
        raise RecordError("bad_dtype", f"expected {dtype} numbers, got {wrong:g}")

    def _tensor(self, body: bytes, dtype: np.dtype[Any], offset: int, order: Literal["C", "F"]) -> Array:
        """The tensor that begins at `offset`, without a copy where its layout is already ours."""
        x: Array = np.frombuffer(body, dtype, self._count, offset).reshape(self.schema.shape, order=order)
        if dtype != self.schema.dtype or order == "F":
            x = np.ascontiguousarray(x, self.schema.dtype)
        if self._floating:
            self._check_finite(x)
        return x

    def _npy(self, body: bytes) -> Array:
        """A .npy file. The header is matched, not evaluated, and must name the schema's dtype and shape."""
        start, width = (10, 2) if body[6:7] == b"\x01" else (12, 4)
        if body[:6] != b"\x93NUMPY" or body[6:7] not in (b"\x01", b"\x02", b"\x03") or len(body) < start:
            raise RecordError("bad_shape", "expected a .npy file of version 1, 2 or 3")
        end = start + int.from_bytes(body[8 : 8 + width], "little")
        header = body[start:end] if end - start <= _NPY_HEADER_BYTES else b""
        descr, order, shape = (pattern.search(header) for pattern in (_NPY_DESCR, _NPY_ORDER, _NPY_SHAPE))
        if descr is None or order is None or shape is None:
            raise RecordError("bad_dtype", "expected a .npy header with a plain dtype, an order and a shape")
        named, wanted = descr[1].decode(), self._wire_dtype.str
        if named[1:] != wanted[1:]:
            raise RecordError("bad_dtype", f"expected dtype {self.schema.dtype}, got {named} in the .npy header")
        found = tuple(int(size) for size in shape[1].split(b",") if size.strip().isdigit())
        if found != self.schema.shape or len(body) != end + self._nbytes:
            got = f"{_shape_text(found)} in the .npy header and {max(0, len(body) - end)} bytes of data"
            raise self._bad_shape(got)
        byte_order: Literal[">", "<"] = ">" if named[0] == ">" else "<"
        dtype = self._wire_dtype.newbyteorder(byte_order)
        return self._tensor(body, dtype, end, "F" if order[1] == b"True" else "C")

    def _image(self, body: bytes) -> Array:
        """A PNG, JPEG or WebP file as uint8 (C, H, W); its size is known to be right before a pixel is decoded."""
        shape = self.schema.shape
        if len(shape) != 3 or shape[0] not in (1, 3) or self.schema.dtype != np.uint8:
            raise RecordError("bad_content_type", f"expected no image: samples are {self.schema.dtype} {shape}")
        channels, height, width = shape
        try:
            with _open_image(body, (width, height)) as image:
                _check_image_size(image.size, (width, height))
                if image.mode[:1] in ("I", "F"):
                    raise RecordError("bad_image", f"expected 8 bits a channel, got mode {image.mode}")
                # Pillow warns when it cannot carry a palette's transparency over; it is not wanted here.
                image.info.pop("transparency", None)
                pixels = np.asarray(image.convert("L" if channels == 1 else "RGB"))
        except _IMAGE_ERRORS as error:
            raise RecordError("bad_image", f"expected a whole PNG, JPEG or WebP: {error!s:.200}") from None
        return np.ascontiguousarray(np.moveaxis(pixels.reshape(height, width, channels), 2, 0))

    def _check_finite(self, x: Array) -> None:
        if not np.isfinite(cast(Any, x)).all():
            raise RecordError("not_finite", f"expected finite {self.schema.dtype} numbers, got NaN or infinity")

    def _bad_shape(self, got: str) -> RecordError:
        return RecordError("bad_shape", f"expected shape {_shape_text(self.schema.shape)}, got {got}")


def _payload_of(content_type: str) -> Payload:
    """The payload that a content type names; parameters after a semicolon are ignored."""
    payload = _PAYLOAD_OF_TYPE.get(content_type)
    if payload is not None:
        return payload
    essence = content_type.partition(";")[0].strip().lower()
    if essence.startswith("image/"):
        return "image"
    if essence not in _PAYLOAD_OF_TYPE:
        wanted = ", ".join((*_PAYLOAD_OF_TYPE, "image/png, image/jpeg or image/webp"))
        raise RecordError("bad_content_type", f"content type {essence!r:.80} is none of {wanted}")
    return _PAYLOAD_OF_TYPE[essence]


def _open_image(body: bytes, wanted: tuple[int, int]) -> Image.Image:
    """The image, header read and pixels not. The plugins are named, so no other of Pillow's formats can be reached.

    `Image.open` would do more: it warns of large images, which is an answer for a desktop, not for a server.
    """
    file = io.BytesIO(body)
    if body[:8] == b"\x89PNG\r\n\x1a\n":
        return PngImagePlugin.PngImageFile(file)
    if body[:3] == b"\xff\xd8\xff":
        return JpegImagePlugin.JpegImageFile(file)
    if body[:4] == b"RIFF" and body[8:12] == b"WEBP":
        # The decoder allocates the canvas, up to two gigabytes of it, as soon as it is made.
        _check_image_size(_webp_size(body), wanted)
        return WebPImagePlugin.WebPImageFile(file)
    raise RecordError("bad_image", "expected a PNG, JPEG or WebP file")


def _webp_size(body: bytes) -> tuple[int, int]:
    """Width and height of the canvas by the file's first chunk, lossy, lossless or extended; zeros if it is none."""
    kind = body[12:16] if len(body) >= 30 else b""
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", body, 26)
        return width & 0x3FFF, height & 0x3FFF
    if kind == b"VP8L":
        bits = int.from_bytes(body[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8X":
        return int.from_bytes(body[24:27], "little") + 1, int.from_bytes(body[27:30], "little") + 1
    return 0, 0


def _check_image_size(found: tuple[int, int], wanted: tuple[int, int]) -> None:
    if found != wanted:
        raise RecordError("bad_shape", f"expected an image {wanted[0]} by {wanted[1]}, got {found[0]} by {found[1]}")


def _json_object(value: bytes) -> dict[str, Any]:
    try:
        fields = orjson.loads(value)
    except orjson.JSONDecodeError as error:
        raise RecordError("not_json", f"expected a JSON object: {error}") from None
    if not isinstance(fields, dict):
        raise RecordError("not_json", f"expected a JSON object, got a JSON {_json_type(fields)}")
    return fields


def _record_id(key: bytes | None, field: object) -> str:
    """The id, from the field or else from the key. They must agree: the key decides the partition."""
    if field is None:
        if not key:
            raise RecordError("no_id", 'expected an id in the record\'s key or in the field "id", got neither')
        return _id(_utf8(key, "key", "no_id"))
    sample_id = _id(field)
    if key and key != sample_id.encode():
        raise RecordError("no_id", f"expected the id {sample_id!r:.80} as the record's key too, got {key!r:.80}")
    return sample_id


def _id(value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 64:
        return str(value)
    if not isinstance(value, str) or not value:
        raise RecordError("no_id", f"expected an id that is text or an integer, got a JSON {_json_type(value)}")
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
        raise RecordError("bad_dtype", f"{name}: expected text, got a JSON {_json_type(value)}")
    if len(value) > MAX_TEXT_BYTES or len(_encoded(value, "bad_dtype")) > MAX_TEXT_BYTES:
        raise RecordError("too_large", f"{name}: expected at most {MAX_TEXT_BYTES} bytes")
    return value


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
        _bad_time(f"a JSON {_json_type(value)}")
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


def _holds(bounds: np.iinfo[Any], number: float) -> bool:
    return bounds.min <= number <= bounds.max and number.is_integer()


def _shape_text(shape: tuple[int, ...]) -> str:
    return str(tuple(int(size) for size in shape))


def _nested_shape(value: object) -> str:
    """The shape of nested lists as their first elements show it, to at most six levels."""
    sizes: list[int] = []
    while isinstance(value, list) and len(sizes) < 6:
        sizes.append(len(value))
        value = value[0] if value else None
    return f"{_shape_text(tuple(sizes))}, or uneven lists"


def _json_type(value: object) -> str:
    names = {dict: "object", list: "list", str: "string", bool: "boolean", int: "number", float: "number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)
