"""Fields that samples and labels share: ids, short texts, times, JSON objects. Every error is a RecordError."""

from __future__ import annotations

import re
from datetime import datetime
from typing import Any, NoReturn

import orjson

from streamlearn.errors import RecordError
from streamlearn.log.payload import FILL_IN, json_type

MAX_ID_BYTES = 512
MAX_TEXT_BYTES = 256
"""Of a domain or a source."""
MAX_TIME_S = 1e11
"""About the year 5138. A larger number is probably milliseconds, and is refused, not guessed."""

_NUMBER = re.compile(r"[0-9]{1,12}(\.[0-9]*)?(e[+-]?[0-9]{1,3})?", re.ASCII | re.IGNORECASE)


def json_object(value: bytes) -> dict[str, Any]:
    """Parse a JSON object. Raises `not_json`."""
    try:
        fields = orjson.loads(value)
    except orjson.JSONDecodeError as error:
        raise RecordError("not_json", f"expected a JSON object: {error}{hint_of_json(value)}") from None
    if not isinstance(fields, dict):
        raise RecordError("not_json", f"expected a JSON object, got a JSON {json_type(fields)}")
    return fields


def hint_of_json(value: bytes) -> str:
    """Return a hint for text that is not JSON: many libraries write numbers that JSON does not have."""
    return f"; JSON has no NaN: {FILL_IN}" if b"NaN" in value or b"Infinity" in value else ""


def record_id(key: bytes | None, field: object) -> str:
    """Return the id from the field or else from the key. They must agree: the key decides the partition.

    Raises:
        RecordError: `no_id`.
    """
    if field is None:
        if not key:
            raise RecordError("no_id", 'expected an id in the record\'s key or in the field "id", got neither')
        return checked_id(utf8(key, "key", "no_id"))
    sample_id = checked_id(field)
    if key and key != sample_id.encode():
        raise RecordError("no_id", f"expected the id {sample_id!r:.80} as the record's key too, got {key!r:.80}")
    return sample_id


def checked_id(value: object) -> str:
    """Return a sample's id as text, from text or an integer.

    Raises:
        RecordError: `no_id` if it is neither, empty, or longer than `MAX_ID_BYTES`.
    """
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 64:
        return str(value)
    if not isinstance(value, str) or not value:
        raise RecordError("no_id", f"expected an id that is text or an integer, got a JSON {json_type(value)}")
    if len(value) > MAX_ID_BYTES or len(_encoded(value, "no_id")) > MAX_ID_BYTES:
        raise RecordError("no_id", f"expected an id of at most {MAX_ID_BYTES} bytes")
    return value


def short_text(value: object, name: str) -> str | None:
    """Return a short text, such as a domain; None if it is empty. Raises `bad_dtype` or `too_large`."""
    if value is None or value == "":
        return None
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 64:
        return str(value)
    if not isinstance(value, str):
        raise RecordError("bad_dtype", f"{name}: expected text, got a JSON {json_type(value)}")
    if len(value) > MAX_TEXT_BYTES or len(_encoded(value, "bad_dtype")) > MAX_TEXT_BYTES:
        raise RecordError("too_large", f"{name}: expected at most {MAX_TEXT_BYTES} bytes")
    return value


def is_number(text: str) -> bool:
    """Whether a text is a number (or `nan`), not a name."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def _encoded(text: str, reason: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise RecordError(reason, "expected text that UTF-8 can encode, got a lone surrogate") from None


def utf8(content: bytes, name: str, reason: str = "bad_dtype") -> str:
    """Decode UTF-8. Raises `reason`."""
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise RecordError(reason, f"{name}: expected UTF-8 text, got {content!r:.80}") from None


def time_from_header(content: bytes) -> float | None:
    """Return seconds since the epoch from a header's text, as `seconds` does."""
    text = utf8(content, "time", "bad_time").strip()
    return seconds(float(text) if _NUMBER.fullmatch(text) else text)


def seconds(value: object) -> float | None:
    """Return seconds since the epoch, from a number or from ISO 8601 with a zone. Raises `bad_time`."""
    if value is None:
        return None
    if isinstance(value, str):
        try:
            moment = datetime.fromisoformat(value)
            if moment.tzinfo is None:
                _bad_time(f"{value!r:.80}, which has no zone")
            value = moment.timestamp()
        except (ValueError, OverflowError):
            _bad_time(f"{value!r:.80}")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        _bad_time(f"a JSON {json_type(value)}")
    if not 0 <= value < MAX_TIME_S:
        _bad_time(f"{value!r:.30}" + (", which looks like milliseconds" if 1e11 <= value < 1e14 else ""))
    return float(value) + 0.0  # turns minus zero into zero


def _bad_time(got: str) -> NoReturn:
    raise RecordError("bad_time", f"time: expected seconds since 1970 or ISO 8601 with a zone, got {got}")


def header_value(content: object) -> bytes:
    """Encode a field as a header: text unchanged, numbers and objects as JSON."""
    return content.encode() if isinstance(content, str) else orjson.dumps(content)
