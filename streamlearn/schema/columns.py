"""Encoders: from the fields of a record to a row, one for each kind of column.

The row of a record is a function of its fields and the settings alone, so that the log, `/predict` and `evaluate` give
equal rows. An encoder never raises: a value that its kind cannot take is invalid, is encoded as missing and counted.
All zeros mean missing.
"""

from __future__ import annotations

import calendar
import hashlib
import math
import time
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from datetime import date
from datetime import time as time_of_day
from decimal import Decimal
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt
import structlog

from streamlearn.errors import RecordError
from streamlearn.imports import import_object
from streamlearn.records import Array, Column, ColumnKind
from streamlearn.schema.fields import MAX_TIME_S, UNITS_PER_SECOND, seconds_of, text_of
from streamlearn.schema.paths import MISSING, Path
from streamlearn.schema.settings import ColumnConfig

_log = structlog.get_logger(__name__)

LARGEST_NUMBER: Final = math.sqrt(float(np.finfo(np.float32).max))
"""1.8e19: a larger number has no finite square in float32. It is invalid."""
MAX_TEXT_CHARACTERS = 4096
"""Of a text; the rest is ignored."""
MAX_UNKNOWN = 100
"""Names of unknown fields that are counted; the others are counted together, as "…"."""
_REMEMBERED = 4096
"""Texts whose bucket a category remembers."""
_REMEMBERED_CHARACTERS = 64
_DAY_S = 86_400.0
_BOOLEANS = {"true": 1.0, "1": 1.0, "yes": 1.0, "false": -1.0, "0": -1.0, "no": -1.0}
_GRAMS = (3, 4, 5)
"""Lengths of the character n-grams of a text."""

Row: TypeAlias = "array[float]"
Outcome: TypeAlias = bool | None
"""Of one value: True if it was encoded, None if it is missing, False if it is invalid. It is written only if True."""


Encoder: TypeAlias = Callable[[Row, object], Outcome]
"""Writes one value to its places. Closures, because they are called for every column of every record."""


def _number(at: int) -> Encoder:
    """value, 1.0."""
    present, largest = at + 1, LARGEST_NUMBER

    def encode(row: Row, value: object) -> Outcome:
        number = value if type(value) is float or type(value) is int else _number_of(value)
        if number is None:
            return None
        if not -largest <= number <= largest:  # NaN too
            return False
        row[at] = number
        row[present] = 1.0
        return True

    return encode


def _number_of(value: object) -> float | None:
    """Return a number; NaN if the value is none, None if it is an empty text."""
    if isinstance(value, str) and not value.strip():
        return None
    if isinstance(value, time_of_day):
        return value.hour * 3600.0 + value.minute * 60.0 + value.second + value.microsecond / 1e6
    if isinstance(value, date):
        value = seconds_of(value, 1.0)
    is_number = isinstance(value, int | float | Decimal) or (isinstance(value, str) and "_" not in value)
    try:
        return float(value) if is_number else math.nan  # type: ignore[arg-type]  # float() takes 1_000 for a number
    except (ValueError, OverflowError):
        return math.nan


def _boolean(at: int) -> Encoder:
    """+1 or -1."""

    def encode(row: Row, value: object) -> Outcome:
        if value is True or value is False:
            row[at] = 1.0 if value else -1.0
            return True
        text = text_of(value)
        if text is None:
            return False
        text = text.strip().lower()
        if not text:
            return None
        code = _BOOLEANS.get(text)
        if code is None:
            return False
        row[at] = code
        return True

    return encode


def _category(at: int, name: str, buckets: int) -> Encoder:
    """A bucket from 1 on: a hash of the column's name and the value's text."""
    prefix = name.encode("utf-8", "surrogatepass") + b"\0"
    codes: dict[str, int] = {}  # of recent texts: hashing costs ten times as much as looking up

    def encode(row: Row, value: object) -> Outcome:
        text = value if type(value) is str else text_of(value)
        if not text:
            return False if text is None else None
        code = codes.get(text)
        if code is None:
            digest = hashlib.blake2b(prefix + text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
            code = int.from_bytes(digest, "big") % buckets + 1
            if len(text) <= _REMEMBERED_CHARACTERS:
                if len(codes) >= _REMEMBERED:
                    codes.clear()
                codes[text] = code
        row[at] = code
        return True

    return encode


def _timestamp(at: int, unit: str, places: int) -> Encoder:
    """The first `places` of: sine and cosine of the time of the day, of the week and of the year, in UTC."""
    units_per_second = UNITS_PER_SECOND[unit]
    largest = MAX_TIME_S * units_per_second
    sin, cos, tau, end = math.sin, math.cos, math.tau, at + places
    dates: dict[int, tuple[int, int, int]] = {}  # of recent days

    def encode(row: Row, value: object) -> Outcome:
        if type(value) is int or type(value) is float:
            if not -largest < value < largest:
                return False
            seconds = value / units_per_second
        elif isinstance(value, str) and not value.strip():
            return None
        elif (found_s := seconds_of(value, units_per_second)) is None:
            return False
        else:
            seconds = found_s
        number = int(seconds // _DAY_S)
        part = seconds / _DAY_S - number
        if places == 2:  # of `CYCLE_PLACES`: the calendar is not needed
            row[at:end] = array("f", (sin(tau * part), cos(tau * part)))
            return True
        found = dates.get(number)
        if found is None:
            found = _date(number)
            if len(dates) >= _REMEMBERED:
                dates.clear()
            dates[number] = found
        weekday, day_of_year, days = found
        day, week, year = tau * part, tau * (weekday + part) / 7.0, tau * (day_of_year + part) / days
        phases = (sin(day), cos(day), sin(week), cos(week), sin(year), cos(year))
        row[at:end] = array("f", phases[:places])
        return True

    return encode


def _date(number: int) -> tuple[int, int, int]:
    """Weekday (Monday is 0), day of the year (from 0) and days of that year, of a day since 1970."""
    found = time.gmtime(number * _DAY_S)
    return found.tm_wday, found.tm_yday - 1, 366 if calendar.isleap(found.tm_year) else 365


def _vector(at: int, size: int) -> Encoder:
    """`size` numbers, 1.0. One number that is not finite makes all of it invalid."""
    end = at + size

    def encode(row: Row, value: object) -> Outcome:
        if not isinstance(value, list | tuple) or len(value) != size:
            return False
        try:
            numbers = np.frombuffer(array("d", value), np.float64)
        except (TypeError, OverflowError, ValueError):
            return False
        if not -LARGEST_NUMBER <= numbers.min() <= numbers.max() <= LARGEST_NUMBER:
            return False
        row[at:end] = array("f", numbers.astype(np.float32).tobytes())
        row[end] = 1.0
        return True

    return encode


def _text(at: int, name: str, size: int, read: Callable[[str], Any]) -> Encoder:
    """`size` numbers: hashed words and character n-grams, or what a user's function returns.

    What the function refuses is invalid, and counted; the first reason is logged: it may be a mistake in the function.
    """
    reported = False

    def refused(reason: str) -> bool:
        nonlocal reported
        if not reported:
            reported = True
            _log.warning("text_encoder_failed", column=name, error=reason)
        return False

    def encode(row: Row, value: object) -> Outcome:
        text = text_of(value)
        if text is None:
            return False
        text = text[:MAX_TEXT_CHARACTERS].strip()
        if not text:
            return None
        try:
            numbers = np.asarray(read(text), np.float32)
        except Exception as error:  # of the user's code
            return refused(f"{type(error).__name__}: {error}"[:200])
        if numbers.shape != (size,):
            return refused(f"expected {size} numbers, got the shape {numbers.shape}")
        if not np.abs(numbers).max() <= LARGEST_NUMBER:
            return refused("a number is not finite, or too large")
        row[at : at + size] = array("f", numbers.tobytes())
        return True

    return encode


def hashed_text(text: str, size: int) -> npt.NDArray[np.float32]:
    """Return signed counts of hashed words and character n-grams (3 to 5, white space folded), of unit length.

    The sign makes collisions cancel out on average (Weinberger et al. 2009).
    """
    words = text.lower().split()
    codes = np.frombuffer(f" {' '.join(words)} ".encode("utf-32-le", "surrogatepass"), np.uint32)
    hashes = [_hash_windows(codes, length) for length in _GRAMS if len(codes) >= length]
    hashes.append(np.array([zlib.crc32(word.encode("utf-8", "surrogatepass")) for word in words], np.uint32))
    hashed = _mixed(np.concatenate(hashes))
    signs = np.where(hashed >> np.uint32(31), 1.0, -1.0)
    counts = np.bincount((hashed & np.uint32(0x7FFFFFFF)) % np.uint32(size), signs, minlength=size)
    norm = math.sqrt(float(counts @ counts))
    return (counts / norm if norm else counts).astype(np.float32)


def _hash_windows(codes: npt.NDArray[np.uint32], length: int) -> npt.NDArray[np.uint32]:
    """A polynomial hash, modulo 2^32, of each window of this length."""
    count = len(codes) - length + 1
    hashed = np.full(count, length, np.uint32)
    for start in range(length):
        hashed = hashed * np.uint32(16_777_619) + codes[start : start + count]
    return hashed


def _mixed(hashed: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    """Spread each bit over all 32: the last step of MurmurHash3."""
    hashed = (hashed ^ (hashed >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    hashed = (hashed ^ (hashed >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return hashed ^ (hashed >> np.uint32(16))


@dataclass(frozen=True)
class ColumnCounts:
    """How many records were encoded, and in how many of them a column was missing or invalid."""

    records: int
    missing: Mapping[str, int]
    """By column."""
    invalid: Mapping[str, int]
    """By column; they are encoded as missing, and not counted as missing."""
    unknown: Mapping[str, int]
    """Fields at the top of a record that no setting names, by name; at most `MAX_UNKNOWN` names."""

    @property
    def sentences(self) -> list[str]:
        """The columns with invalid or missing values, for a report on a file."""
        kinds = (("invalid values, taken as missing", self.invalid), ("missing values", self.missing))
        shown = {what: ", ".join(f"{name} {n}" for name, n in counts.items() if n) for what, counts in kinds}
        return [f"{what}: {columns}" for what, columns in shown.items() if columns]


class RowEncoder:
    """Encodes records of one configuration. Any thread may use it; its counts are approximate then.

    The path and the encoder of each column are resolved once, here.
    """

    def __init__(self, columns: Mapping[str, ColumnConfig], *, used: Collection[str] = ()) -> None:
        """`used`: fields at the top of a record that other settings use.

        Raises:
            ConfigError: the encoder of a text cannot be imported.
        """
        assert columns
        self.columns: tuple[Column, ...] = tuple(config.column(name) for name, config in columns.items())
        self.width = sum(column.width for column in self.columns)
        self._zeros = bytes(4 * self.width)
        self._plan: list[tuple[int, str, Path | None, Encoder, int]] = []
        """Of each column: its number, the field at the top of the record, a path if it goes deeper, its encoder, and
        the place of a number; else -1."""
        at = 0
        for number, (column, config) in enumerate(zip(self.columns, columns.values(), strict=True)):
            path = config.path(column.name)
            deeper = path if len(path.parts) > 1 else None
            place = at if column.kind == "number" else -1
            self._plan.append((number, path.parts[0], deeper, _encoder(column, config, at), place))
            at += column.width
        self._known = frozenset({name for _, name, *_ in self._plan} | set(used))
        self._records = 0
        self._missing, self._invalid = [0] * len(self.columns), [0] * len(self.columns)
        self._unknown: Counter[str] = Counter()

    def encode(self, fields: Mapping[str, Any], *, invalid: list[str] | None = None) -> npt.NDArray[np.float32]:
        """Return the row (width,) of a parsed record. The names of columns with an invalid value go into `invalid`.

        Raises:
            RecordError: `no_value` if the record has none of the columns' fields, not even as null: it is another kind
                of record.
        """
        row = array("f", self._zeros)
        absent, largest, get = 0, LARGEST_NUMBER, fields.get
        for number, name, path, write, place in self._plan:
            value = get(name, MISSING) if path is None else path.find(fields)
            if type(value) is float and place >= 0 and -largest <= value <= largest:  # most values, without a call
                row[place] = value
                row[place + 1] = 1.0
                continue
            if value is MISSING:
                absent += 1
            outcome = None if value is None or value is MISSING else write(row, value)
            if not outcome:
                counts = self._missing if outcome is None else self._invalid
                counts[number] += 1
                if outcome is False and invalid is not None:
                    invalid.append(self.columns[number].name)
        self._records += 1
        if absent == len(self._plan):
            raise RecordError("no_value", f"expected at least one of the columns {self.described}, got none of them")
        if not self._known.issuperset(fields):
            self._count_unknown(fields)
        return np.frombuffer(row, np.float32)

    @property
    def described(self) -> str:
        """The paths of the columns, for messages; at most twelve."""
        paths = [name if path is None else path.text for _, name, path, *_ in self._plan]
        return ", ".join(paths[:12]) + (", …" if len(paths) > 12 else "")

    def reads_any(self, fields: Mapping[str, Any]) -> bool:
        """Whether a column, or its path, begins at a field of this object."""
        return any(name in fields for _, name, *_ in self._plan)

    def values(self, row: Array) -> dict[str, Any]:
        """Return what a row (width,) still shows of its record, by column: None where it is missing.

        A category shows its bucket. Timestamps and texts cannot be read back, and are left out.
        """
        found: dict[str, Any] = {}
        at = 0
        for column in self.columns:
            places = row[at : at + column.width].tolist()
            at += column.width
            if column.kind == "number":
                found[column.name] = places[0] if places[1] else None
            elif column.kind == "boolean":
                found[column.name] = places[0] > 0.0 if places[0] else None
            elif column.kind == "category":
                found[column.name] = int(places[0]) or None
            elif column.kind == "vector":
                found[column.name] = places[:-1] if places[-1] else None
        return found

    def counts(self) -> ColumnCounts:
        """Counts since this encoder was made."""
        names = [column.name for column in self.columns]
        missing, invalid = (dict(zip(names, found, strict=True)) for found in (self._missing, self._invalid))
        return ColumnCounts(self._records, missing, invalid, dict(self._unknown))

    def _count_unknown(self, fields: Mapping[str, Any]) -> None:
        for name in fields.keys() - self._known:
            short = name[:80]
            self._unknown[short if short in self._unknown or len(self._unknown) < MAX_UNKNOWN else "…"] += 1


def _encoder(column: Column, config: ColumnConfig, at: int) -> Encoder:
    def text() -> Encoder:
        if config.encoder is None:
            return _text(at, column.name, column.size, lambda text: hashed_text(text, column.size))
        return _text(at, column.name, column.size, import_object(config.encoder, key=f"columns.{column.name}.encoder"))

    makers: Mapping[ColumnKind, Callable[[], Encoder]] = {
        "number": lambda: _number(at),
        "boolean": lambda: _boolean(at),
        "category": lambda: _category(at, column.name, column.size),
        "timestamp": lambda: _timestamp(at, config.unit, column.width),
        "vector": lambda: _vector(at, column.size),
        "text": text,
    }
    return makers[column.kind]()
