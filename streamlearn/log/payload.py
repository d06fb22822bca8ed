"""Payloads: raw and .npy bytes, images and parsed JSON lists to tensors of one schema, and back.

Every error is a RecordError, for any bytes. Shapes are checked before anything is built: no input costs more than its
own length times a small constant. Nothing here recurses over the input.
"""

from __future__ import annotations

import io
import math
import re
import struct
import zlib
from array import array
from itertools import chain
from typing import Any, Literal, TypeAlias, cast

import numpy as np
from PIL import Image, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

from streamlearn.errors import RecordError
from streamlearn.records import Array, Schema
from streamlearn.schema.fields import FILL_IN, json_type

Payload: TypeAlias = Literal["json", "raw", "npy", "image"]

_NPY_HEADER_BYTES = 4096
MAX_JPEG_SCANS = 100
"""Each is a pass over all pixels and can be 14 bytes long: 4 MB of them would occupy a core for half a minute."""
_PAYLOAD_OF_TYPE: dict[str, Payload] = {
    "application/json": "json",
    "application/octet-stream": "raw",
    "application/x-npy": "npy",
}
TYPE_OF_PAYLOAD = {
    "json": b"application/json",
    "raw": b"application/octet-stream",
    "npy": b"application/x-npy",
}

_NPY_DESCR = re.compile(rb"""['"]descr['"]\s*:\s*['"]([<>|=][a-zA-Z][0-9]{1,3})['"]""")
_NPY_ORDER = re.compile(rb"""['"]fortran_order['"]\s*:\s*(True|False)""")
_NPY_SHAPE = re.compile(rb"""['"]shape['"]\s*:\s*\(([0-9,\s]{0,200})\)""")

# What Pillow's decoders raise on hostile bytes. Warnings too: a process may turn them into exceptions.
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


class Tensors:
    """Converts bytes or parsed JSON to a tensor of one schema, and back."""

    def __init__(self, schema: Schema) -> None:
        assert schema.shape, schema
        assert min(schema.shape) >= 1, schema.shape
        self.schema = schema
        self._count = math.prod(schema.shape)
        self._nbytes = schema.nbytes
        self._wire_dtype = schema.dtype.newbyteorder("<")
        self._floating = schema.dtype.kind == "f"
        self._largest = schema.largest_float

    def from_json(self, value: object) -> Array:
        """Return the tensor in a parsed JSON list: nested like the schema's shape, or flat.

        True and false are 1 and 0. An integer dtype accepts only numbers that it holds exactly.

        Raises:
            RecordError: `bad_shape`, `bad_dtype` or `not_finite`.
        """
        flat = self._flatten(value)
        try:
            numbers = np.frombuffer(array("d", flat), np.float64)
        except TypeError as error:
            if any(isinstance(item, list) for item in flat):
                raise self._bad_shape("lists nested unevenly or too deep") from None
            if None in flat:
                raise RecordError("bad_dtype", f"expected numbers, got null: {FILL_IN}") from None
            raise RecordError("bad_dtype", f"expected numbers: {error}") from None
        except OverflowError:
            raise RecordError("bad_dtype", f"expected {self.schema.dtype} numbers, got a larger one") from None
        return self._cast(numbers).reshape(self.schema.shape)

    def from_bytes(self, body: bytes, payload: Payload) -> Array:
        """Return the tensor in a raw, .npy or image body. Raises RecordError."""
        if payload == "image":
            return self._image(body)
        if payload == "npy":
            return self._npy(body)
        if len(body) != self._nbytes:
            expected = f"{self._nbytes} bytes ({self.schema.dtype} of shape {_shape_text(self.schema.shape)})"
            raise RecordError("bad_shape", f"expected {expected}, got {len(body)}")
        return self._tensor(body, self._wire_dtype, 0, "C")

    def to_bytes(self, x: Array, payload: str) -> bytes:
        """Return the tensor as a raw body (`payload` is "raw") or as a .npy file."""
        x = np.ascontiguousarray(x, self._wire_dtype)
        if payload == "raw":
            return x.tobytes()
        file = io.BytesIO()
        np.lib.format.write_array(file, x, allow_pickle=False)
        return file.getvalue()

    def check(self, x: Array) -> None:
        """Raise RecordError unless shape and dtype are the schema's, and all numbers are finite and not too large."""
        if x.shape != self.schema.shape:
            raise self._bad_shape(_shape_text(x.shape))
        if x.dtype != self.schema.dtype:
            raise RecordError("bad_dtype", f"expected dtype {self.schema.dtype}, got {x.dtype}")
        if self._floating:
            self._check_range(x)

    def _flatten(self, value: object) -> list[Any]:
        """Return the numbers of a flat or nested list; each level's length is checked before the next level."""
        if not isinstance(value, list):
            raise self._bad_shape(f"a JSON {json_type(value)}")
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
        """Return float64 numbers in the schema's dtype: exact if it is an integer, finite if it is a float."""
        dtype = self.schema.dtype
        if self._floating:
            with np.errstate(over="ignore"):
                x: Array = numbers.astype(dtype, copy=False)
            self._check_range(x)
            return x
        bounds = np.iinfo(cast(Any, dtype))
        # Float64 holds every integer of up to 32 bits, so equality after the cast means exact. NaN fails `<=`.
        if bounds.min <= numbers.min() and numbers.max() <= bounds.max:
            x = numbers.astype(dtype)
            if (x == numbers).all():
                return x
        wrong = next(number for number in numbers.tolist() if not _holds(bounds, number))
        raise RecordError("bad_dtype", f"expected {dtype} numbers, got {wrong:g}")

    def _tensor(self, body: bytes, dtype: np.dtype[Any], offset: int, order: Literal["C", "F"]) -> Array:
        """Return the tensor that starts at `offset`, without a copy if its layout is already the schema's."""
        x: Array = np.frombuffer(body, dtype, self._count, offset).reshape(self.schema.shape, order=order)
        if dtype != self.schema.dtype or order == "F":
            x = np.ascontiguousarray(x, self.schema.dtype)
        if self._floating:
            self._check_range(x)
        return x

    def _npy(self, body: bytes) -> Array:
        """Return the tensor of a .npy file. Its header, matched and not evaluated, must have our dtype and shape."""
        start, width = (10, 2) if body[6:7] == b"\x01" else (12, 4)
        if body[:6] != b"\x93NUMPY" or body[6:7] not in (b"\x01", b"\x02", b"\x03") or len(body) < start:
            raise RecordError("bad_shape", "expected a .npy file of version 1, 2 or 3")
        end = start + int.from_bytes(body[8 : 8 + width], "little")
        header = body[start:end] if end - start <= _NPY_HEADER_BYTES else b""
        descr, order, found = _NPY_DESCR.search(header), _NPY_ORDER.search(header), npy_shape(header)
        if descr is None or order is None or found is None:
            raise RecordError("bad_dtype", "expected a .npy header with a plain dtype, an order and a shape")
        named = descr[1].decode()
        if named[1:] != self._wire_dtype.str[1:]:
            raise RecordError("bad_dtype", f"expected dtype {self.schema.dtype}, got {named} in the .npy header")
        if found != self.schema.shape or len(body) != end + self._nbytes:
            got = f"{_shape_text(found)} in the .npy header and {max(0, len(body) - end)} bytes of data"
            raise self._bad_shape(got)
        byte_order: Literal[">", "<"] = ">" if named[0] == ">" else "<"
        dtype = self._wire_dtype.newbyteorder(byte_order)
        return self._tensor(body, dtype, end, "F" if order[1] == b"True" else "C")

    def _image(self, body: bytes) -> Array:
        """Return a PNG, JPEG or WebP file as uint8 (C, H, W); its size is checked before a pixel is decoded."""
        shape = self.schema.shape
        if len(shape) != 3 or shape[0] not in (1, 3) or self.schema.dtype != np.uint8:
            raise RecordError("bad_content_type", f"expected no image: samples are {self.schema.dtype} {shape}")
        channels, height, width = shape
        try:
            with _open_image(body, (width, height)) as image:
                _check_image_size(image.size, (width, height))
                if image.mode[:1] in ("I", "F"):
                    raise RecordError("bad_image", f"expected 8 bits a channel, got mode {image.mode}")
                # Pillow warns if it cannot convert a palette's transparency, which is not used.
                image.info.pop("transparency", None)
                pixels = np.asarray(image.convert("L" if channels == 1 else "RGB"))
        except _IMAGE_ERRORS as error:
            raise RecordError("bad_image", f"expected a whole PNG, JPEG or WebP: {error!s:.200}") from None
        return np.ascontiguousarray(np.moveaxis(pixels.reshape(height, width, channels), 2, 0))

    def _check_range(self, x: Array) -> None:
        """The network computes in float32: a number without a finite square would spoil the step for all rows."""
        smallest, largest = float(x.min()), float(x.max())
        if -self._largest <= smallest and largest <= self._largest:
            return
        if not np.isfinite(cast(Any, x)).all():
            place = np.argwhere(~np.isfinite(cast(Any, x)))[0].tolist()
            found = f"NaN or infinity at {place}: {FILL_IN}"
            raise RecordError("not_finite", f"expected finite {self.schema.dtype} numbers, got {found}")
        got = smallest if -smallest > largest else largest
        expected = f"expected numbers up to {self._largest:.2g}, whose square is finite in float32"
        raise RecordError("not_finite", f"{expected}, got {got:.3g}")

    def _bad_shape(self, got: str) -> RecordError:
        return RecordError("bad_shape", f"expected shape {_shape_text(self.schema.shape)}, got {got}")


def payload_of(content_type: str) -> Payload:
    """Return the payload that a content type names; parameters after a semicolon are ignored."""
    payload = _PAYLOAD_OF_TYPE.get(content_type)
    if payload is not None:
        return payload
    essence = content_type.partition(";")[0].strip().lower()
    if essence.startswith("image/"):
        return "image"
    if essence not in _PAYLOAD_OF_TYPE:
        known = ", ".join((*_PAYLOAD_OF_TYPE, "image/png, image/jpeg or image/webp"))
        raise RecordError("bad_content_type", f"expected content type {known}, got {essence!r:.80}")
    return _PAYLOAD_OF_TYPE[essence]


def npy_shape(header: bytes) -> tuple[int, ...] | None:
    """Return the shape in the header of a .npy file, matched and not evaluated; None if there is none."""
    if (match := _NPY_SHAPE.search(header)) is None:
        return None
    return tuple(int(size) for size in match[1].split(b",") if size.strip().isdigit())


def _open_image(body: bytes, size: tuple[int, int]) -> Image.Image:
    """Open an image: read its header, not its pixels. Only the three plugins named here can be reached.

    `Image.open` would reach all formats of Pillow, and warn about large images.
    """
    file = io.BytesIO(body)
    if body[:8] == b"\x89PNG\r\n\x1a\n":
        return PngImagePlugin.PngImageFile(file)
    if body[:3] == b"\xff\xd8\xff":
        # In coded data FF is followed by 00, so this counts the scans, and the few of a thumbnail.
        if (scans := body.count(b"\xff\xda")) > MAX_JPEG_SCANS:
            raise RecordError("bad_image", f"expected a JPEG of at most {MAX_JPEG_SCANS} scans, got {scans}")
        return JpegImagePlugin.JpegImageFile(file)
    if body[:4] == b"RIFF" and body[8:12] == b"WEBP":
        # The decoder allocates the canvas, up to two gigabytes, in its constructor.
        _check_image_size(_webp_size(body), size)
        return WebPImagePlugin.WebPImageFile(file)
    raise RecordError("bad_image", "expected a PNG, JPEG or WebP file")


def _webp_size(body: bytes) -> tuple[int, int]:
    """Return width and height of the canvas from the first chunk (lossy, lossless or extended); else zeros."""
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


def _check_image_size(found: tuple[int, int], size: tuple[int, int]) -> None:
    if found != size:
        raise RecordError("bad_shape", f"expected an image {size[0]} by {size[1]}, got {found[0]} by {found[1]}")


def _holds(bounds: np.iinfo[Any], number: float) -> bool:
    return bounds.min <= number <= bounds.max and number.is_integer()


def _shape_text(shape: tuple[int, ...]) -> str:
    return str(tuple(int(size) for size in shape))


def _nested_shape(value: object) -> str:
    """Return the shape of nested lists, from their first elements, to at most six levels."""
    sizes: list[int] = []
    while isinstance(value, list) and len(sizes) < 6:
        sizes.append(len(value))
        value = value[0] if value else None
    return f"{_shape_text(tuple(sizes))}, or uneven lists"
