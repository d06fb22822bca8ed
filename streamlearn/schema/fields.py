"""Fields that samples and labels share: ids, keys, short texts, times, JSON objects. Every error is a RecordError.

Values come from JSON, or are what Avro's logical types become: datetime, date, Decimal, UUID, bytes.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import UTC, date, datetime
from datetime import time as time_of_day
from decimal import Decimal
from typing import NoReturn
from uuid import UUID

import orjson

from streamlearn.errors import RecordError

FILL_IN = "replace missing values before sending"
MAX_ID_BYTES = 512
MAX_TEXT_BYTES = 256
"""Of a domain or a source."""
MAX_TIME_S = 1e11
"""About the year 5138. A larger number is probably milliseconds, and is refused, not guessed."""

YEAR_2000_S, YEAR_2100_S = 946_684_800.0, 4_102_444_800.0

UNITS_PER_SECOND = {"s": 1.0, "ms": 1e3, "us": 1e6, "ns": 1e9}

_NUMBER = re.compile(r"[0-9]{1,12}(\.[0-9]*)?(e[+-]?[0-9]{1,3})?", re.ASCII | re.IGNORECASE)
_ANY_NUMBER = re.compile(r"[+-]?[0-9]{1,20}(\.[0-9]{0,20})?", re.ASCII)
_MOST_DIGITS = 64
"""Of a decimal that is written as text."""


def unquoted(key: bytes) -> str:
    """Return a record's key as text, without the quotes of a JSON string literal. Raises `no_id`."""
    text = utf8(key, "key", "no_id")
    if len(text) >= 2 and text[0] == text[-1] == '"':
        try:
            return str(orjson.loads(text))
        except orjson.JSONDecodeError:
            pass  # it only begins and ends with quotes
    return text


def key_of(sample_id: str) -> bytes:
    """Return the key that `unquoted` reads as this id: its text, in JSON quotes only where they are needed."""
    if sample_id[:1] in ('"', "\0"):
        return orjson.dumps(sample_id)
    return sample_id.encode()


def record_id(key: bytes | None, field: object, read_key: Callable[[bytes], object] = unquoted) -> str:
    """Return the id from the field or else from the key. They must agree.

    `read_key` gives the value of a key.

    Raises:
        RecordError: `no_id`.
    """
    if field is None:
        if not key:
            raise RecordError("no_id", 'expected an id in the record\'s key or in the field "id", got neither')
        return checked_id(read_key(key))
    sample_id = checked_id(field)
    if key and key != sample_id.encode() and checked_id(read_key(key)) != sample_id:
        expected = f"expected the id {sample_id!r:.80} as the record's key too, with or without JSON quotes"
        raise RecordError("no_id", f"{expected}, got {key!r:.80}; set source.samples.id if the key is another field")
    return sample_id


def checked_id(value: object) -> str:
    """Return a sample's id as text, from text or an integer.

    Raises:
        RecordError: `no_id` if it is neither, empty, or longer than `MAX_ID_BYTES`.
    """
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 64:
        return str(value)
    if isinstance(value, _LOGICAL):
        value = text_of(value)
    if not isinstance(value, str) or not value:
        big = " that is no integer of 64 bits: send it as text" if isinstance(value, float) else ""
        raise RecordError("no_id", f"expected an id that is text or an integer, got a JSON {json_type(value)}{big}")
    if len(value) > MAX_ID_BYTES or len(_encoded(value, "no_id")) > MAX_ID_BYTES:
        raise RecordError("no_id", f"expected an id of at most {MAX_ID_BYTES} bytes")
    return value


def short_text(value: object, name: str) -> str | None:
    """Return a short text, such as a domain; None if it is empty. Raises `bad_dtype` or `too_large`."""
    if value is None or value == "":
        return None
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 64:
        return str(value)
    if isinstance(value, _LOGICAL):
        value = text_of(value)
    if not isinstance(value, str):
        raise RecordError("bad_dtype", f"{name}: expected text, got a JSON {json_type(value)}")
    if len(value) > MAX_TEXT_BYTES or len(_encoded(value, "bad_dtype")) > MAX_TEXT_BYTES:
        raise RecordError("too_large", f"{name}: expected at most {MAX_TEXT_BYTES} bytes")
    return value


def text_of(value: object) -> str | None:
    """Return a scalar as text, the same for equal values of different formats; None if it is no scalar.

    1, 1.0 and "1" are "1"; true is "true".
    """
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value) if abs(value) < 1 << 64 else repr(float(value)) if abs(value) < 1 << 1000 else None
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() and abs(value) < 1e16 else repr(value)
    return _logical_text(value) if isinstance(value, _LOGICAL) else None


_LOGICAL = (Decimal, UUID, bytes, datetime, date, time_of_day)
"""What Avro's logical types and bytes become."""


def _logical_text(value: object) -> str | None:
    if isinstance(value, Decimal):
        exponent = value.as_tuple().exponent
        if not isinstance(exponent, int) or not -_MOST_DIGITS <= exponent <= _MOST_DIGITS:
            return None
        text = format(value, "f")
        return (text.rstrip("0").rstrip(".") if "." in text else text) or "0"
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return value.hex()
    if isinstance(value, datetime | date | time_of_day):
        return value.isoformat()
    return str(value)


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


def seconds_of(value: object, units_per_second: float) -> float | None:
    """Return seconds since 1970 from a number in some unit, ISO 8601 text or a date; None if it is none of these.

    Without a zone it is UTC. The result is within `MAX_TIME_S` of 1970.
    """
    found: float | None = None
    if isinstance(value, str):
        value = float(value) if _ANY_NUMBER.fullmatch(value) else _parsed(value)
    if isinstance(value, datetime):
        found = (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp()
    elif isinstance(value, bool):
        return None
    elif isinstance(value, int | float | Decimal):
        try:
            found = float(value) / units_per_second
        except (OverflowError, ValueError):  # a large integer, or a signalling NaN
            return None
    elif isinstance(value, date):
        found = datetime(value.year, value.month, value.day, tzinfo=UTC).timestamp()
    return found if found is not None and -MAX_TIME_S < found < MAX_TIME_S else None


def event_time(value: object, unit: str) -> float | None:
    """Return seconds since the epoch, as `seconds_of`; None for null. Raises `bad_time`."""
    if value is None:
        return None
    found = seconds_of(value, UNITS_PER_SECOND[unit])
    if found is None or found < 0.0:
        shown = f"{value!r:.80}" if isinstance(value, str | int | float) else f"a JSON {json_type(value)}"
        expected = f"expected a number in {unit} since 1970, ISO 8601 or a timestamp, up to the year 5138"
        raise RecordError("bad_time", f"time: {expected}; got {shown}{_unit_hint(value)}")
    return found + 0.0


def _unit_hint(value: object) -> str:
    """The setting under which a number is a time of this century; empty if there is none."""
    for unit, per_second in UNITS_PER_SECOND.items():
        if (found := seconds_of(value, per_second)) is not None and YEAR_2000_S < found < YEAR_2100_S:
            return f' (set time_unit = "{unit}" if that is {datetime.fromtimestamp(found, UTC):%Y-%m-%d})'
    return ""


def _parsed(text: str) -> datetime | None:
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        return None


def _bad_time(got: str) -> NoReturn:
    raise RecordError("bad_time", f"time: expected seconds since 1970 or ISO 8601 with a zone, got {got}")


def header_value(content: object) -> bytes:
    """Encode a field as a header: text unchanged, numbers and objects as JSON."""
    return content.encode() if isinstance(content, str) else orjson.dumps(content)


def json_type(value: object) -> str:
    """Return the JSON type of a parsed value, for messages: a value itself may be too deep or too long to show."""
    names = {dict: "object", list: "list", str: "string", bool: "boolean", int: "number", float: "number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)
