"""Inference: which fields records have, and which columns and times to make of them. For `streamlearn init`.

A choice is a guess from some hundred records, so each has a reason in words, and what is left out has one too. The
settings of a column are written as in [columns].
"""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from streamlearn.errors import ConfigError, RecordError
from streamlearn.schema.fields import UNITS_PER_SECOND, YEAR_2000_S, YEAR_2100_S
from streamlearn.schema.formats import FRAME_BYTES, is_framed
from streamlearn.schema.paths import MISSING, Path
from streamlearn.schema.profile import Profile, profile
from streamlearn.schema.registry import SchemaRegistry
from streamlearn.schema.settings import MAX_BUCKETS, MAX_SIZE, Format, TimeUnit

MAX_FIELDS: Final = 1000
"""Paths that are looked at; the first ones."""
MAX_DEPTH: Final = 8
"""Of nested objects."""
FEW_RECORDS: Final = 20
"""With fewer values a field is not called unique or constant."""
MOST: Final = 0.95
"""The share of values that decides about a field: producers send a few odd ones."""
_DAY_S = 86_400.0
_NEAR_S = 400 * _DAY_S
"""A number without a telling name is a time only if it is within this of the log's time."""
_MIN_BUCKETS, _MOST_CODES, _SPARSE = 16, 1000, 10
_COVERED = 0.9
_LONG_CHARACTERS = 64
_TEXT_WORDS = 3.0
_ENVELOPE_SHARE = 0.9
_ROOTS = ("payload.after.", "after.")
"""Where Debezium has the row, with the schema in each record and without."""
_ID_WORDS = frozenset({"id", "ids", "uuid", "guid", "key", "ref", "hash", "token"})
_CODE_WORDS = _ID_WORDS | {
    "code", "type", "kind", "category", "class", "group", "zip", "postcode", "postal", "mcc", "status", "state",
    "country", "region", "store", "channel", "merchant", "device", "version", "model", "segment", "product", "sku",
}  # fmt: skip
_TIME_WORDS = frozenset({"time", "date", "timestamp", "datetime", "at", "ts", "created", "updated", "when", "ms"})
_EVENT_NAMES = ("event_time", "event_timestamp", "timestamp", "ts", "time", "occurred_at", "created_at", "created")
_BOOLEAN_TEXTS = frozenset({"true", "false", "yes", "no", "0", "1"})


@dataclass(frozen=True)
class Fields:
    """The fields of some records, by path."""

    count: int
    """Records."""
    values: Mapping[str, Sequence[object]]
    """The value in each record, `MISSING` where it is absent; paths in the order of their first appearance."""
    root: str = ""
    """What the paths of the row begin with: `after.` in Debezium's envelope."""
    unreachable: tuple[str, ...] = ()
    """Names that no path can name."""

    @property
    def row_paths(self) -> list[str]:
        """The paths of the row, without those of an envelope."""
        return [path for path in self.values if path.startswith(self.root)]


def collect(parsed: Sequence[object]) -> Fields:
    """Return the fields of parsed records. Those that are no objects have none."""
    objects = [each if isinstance(each, dict) else {} for each in parsed]
    values: dict[str, list[object]] = {}
    unreachable: dict[str, None] = {}
    for number, fields in enumerate(objects):
        for path, value in _leaves(fields, unreachable):
            if path not in values:
                if len(values) >= MAX_FIELDS:
                    continue
                values[path] = [MISSING] * len(objects)
            values[path][number] = value
    return Fields(len(objects), values, _root(objects), tuple(unreachable)[:MAX_FIELDS])


def _leaves(fields: Mapping[str, Any], unreachable: dict[str, None]) -> Iterator[tuple[str, object]]:
    """Paths and values of what is no object; objects that are nested too deeply have a path too."""
    waiting: list[tuple[str, Iterator[tuple[str, Any]]]] = [("", iter(fields.items()))]
    while waiting:
        above, items = waiting[-1]
        for name, value in items:
            path = f"{above}{name}"
            if not name or "." in name:
                unreachable[path[:80]] = None
            elif isinstance(value, dict) and value and len(waiting) < MAX_DEPTH:
                waiting.append((f"{path}.", iter(value.items())))
                break
            else:
                yield path, value
        else:
            waiting.pop()


def _root(objects: Sequence[Mapping[str, Any]]) -> str:
    """The path of the row in Debezium's envelope, which has `after` and `op`; else the record itself."""
    for root in _ROOTS:
        inner = [each.get("payload") if root.startswith("payload") else each for each in objects]
        envelopes = sum(isinstance(each, dict) and "after" in each and "op" in each for each in inner)
        if objects and envelopes >= _ENVELOPE_SHARE * len(objects):
            return root
    return ""


def words_of(path: str) -> list[str]:
    """The words in the last name of a path, in lower case: `customerId` and `customer_id` have the same."""
    name = re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", path.rpartition(".")[2])
    return [word for word in re.split(r"[^a-z0-9]+", name.lower()) if word]


def in_record(path: str) -> bool:
    """Whether [source] would find this path in the record: a field may be called `key`, as the record's key is."""
    try:
        return Path.parse(path).root == "value"
    except ValueError:
        return False


def format_of(values: Sequence[bytes], registry: SchemaRegistry | None, topic: str) -> Format:
    """Return the format that most of these values have.

    Raises:
        ConfigError: they have the frame of a registry, and there is none.
        RegistryUnavailableError: it did not answer.
    """
    framed = [int.from_bytes(value[1:FRAME_BYTES], "big") for value in values if is_framed(value)]
    if 2 * len(framed) > len(values):
        number, _ = Counter(framed).most_common(1)[0]
        if registry is None:
            msg = f"{topic}: records have the frame of a schema registry (schema {number}): name it with --registry"
            raise ConfigError(msg)
        try:
            return _FRAMED.get(registry.schema(number).kind, "avro")
        except RecordError as error:
            msg = f"{topic}: {error}; is source.registry.url the registry of this topic?"
            raise ConfigError(msg) from error
    seen = Counter(map(_unframed, values))
    return seen.most_common(1)[0][0] if seen else "json"


def _unframed(value: bytes) -> Format:
    return next((chosen for start, chosen in _STARTS.items() if value.startswith(start)), "json")


_FRAMED: Final[Mapping[str, Format]] = {"JSON": "json_schema", "PROTOBUF": "protobuf"}
_STARTS: Final[Mapping[bytes, Format]] = {
    b"\x93NUMPY": "npy",
    b"\x89PNG": "image",
    b"\xff\xd8\xff": "image",
    b"RIFF": "image",
}


# Times


@dataclass(frozen=True)
class TimeField:
    """A field that is a time."""

    path: str
    unit: TimeUnit | None
    """Of its numbers; None if it is text or a logical type."""
    kind: str
    """What it is, in words."""
    distance_s: float
    """Median distance from the log's time."""
    is_day: bool
    """Whether it has no time of the day."""
    missing: float
    """Share of records without it."""


def time_field(path: str, found: Profile, values: Sequence[object], logged_s: Sequence[float]) -> TimeField | None:
    """Return how a field is a time; None if it is none. `logged_s` are the log's times of the same records."""
    if not found.present or not in_record(path):
        return None
    unit: TimeUnit | None = None
    seconds = found.seconds
    if found.share("time", "time_text") < MOST:
        if found.share("integer", "number", "number_text") < MOST or not found.is_whole:
            return None
        unit = _unit_of(found.numbers)
        if unit is None:
            return None
        seconds = [number / UNITS_PER_SECOND[unit] for number in found.numbers]
        near = abs(statistics.median(seconds) - statistics.median(logged_s)) < _NEAR_S
        if not near and not _TIME_WORDS & {*words_of(path)}:
            return None
    distance_s = abs(statistics.median(seconds) - statistics.median(logged_s))
    is_day = all(second % _DAY_S == 0.0 for second in seconds)
    kind = f"{unit} since 1970" if unit else "ISO 8601 text" if found.kinds["time_text"] else "a timestamp or date"
    return TimeField(path, unit, kind, distance_s, is_day, found.missing / max(1, len(values)))


def _unit_of(numbers: Sequence[float]) -> TimeUnit | None:
    """The unit in which all numbers are from 2000 to 2100: at most one is."""
    for unit, per_second in _UNITS:
        if YEAR_2000_S * per_second <= numbers[0] and numbers[-1] < YEAR_2100_S * per_second:
            return unit
    return None


_UNITS: tuple[tuple[TimeUnit, float], ...] = (("s", 1.0), ("ms", 1e3), ("us", 1e6), ("ns", 1e9))


def event_times(times: Iterable[TimeField]) -> list[TimeField]:
    """The fields that may be the event time, the likeliest first: by name, then by distance from the log's time."""
    candidates = [found for found in times if found.missing <= 1.0 - MOST and not found.is_day]
    return sorted(candidates, key=lambda found: (_event_rank(found.path), found.distance_s))


def _event_rank(path: str) -> int:
    name = "_".join(words_of(path))
    return _EVENT_NAMES.index(name) if name in _EVENT_NAMES else len(_EVENT_NAMES)


# Columns


@dataclass(frozen=True)
class ColumnChoice:
    """What to make of one field."""

    path: str
    setting: Mapping[str, Any]
    """As in [columns]; without `from`."""
    used: bool
    """Whether it becomes a column. If not, `setting` is what it would be."""
    why: str


def choose_column(path: str, found: Profile, time: TimeField | None) -> ColumnChoice:
    """Return what a field becomes."""
    if not found.present:
        return ColumnChoice(path, {"kind": "category"}, False, f"null in all {found.count} records")
    if found.share("vector", "list", "object", "other") > 1.0 - MOST:
        return _nested_column(path, found)
    setting, why = _scalar(path, found, time)
    reason = None
    if found.distinct == 1 and not found.missing and found.count >= FEW_RECORDS:
        reason = f"always {shown(found.most_common(1)[0])}"
    elif setting["kind"] == "category" and (form := _unread_form(found)):
        reason = form
    elif _is_id(path, found, setting["kind"]):
        reason = f"another value in each of {found.present} records: an id?"
    elif setting["kind"] == "category" and _mean_length(found) > _LONG_CHARACTERS:
        reason = f"long texts of one word, {_mean_length(found):.0f} characters on average"
    return ColumnChoice(path, setting, reason is None, reason or why)


def _unread_form(found: Profile) -> str | None:
    """What nearly all values are, if it is a number or a date in a form that no column reads."""
    for form, what in _UNREAD:
        count = sum(number for text, number in found.texts.items() if form.fullmatch(text.strip()))
        if found.distinct > _MIN_BUCKETS and count >= MOST * found.present:
            return f"{what} such as {shown(found.most_common(1)[0])}"
    return None


_UNREAD: Final = (
    (re.compile(r"[+-]?[0-9.]*[0-9],[0-9]+", re.ASCII), "numbers with a comma, not a point,"),
    (re.compile(r"\d{1,2}[./-]\d{1,2}[./-]\d{2,4}([ T].*)?", re.ASCII), "dates that are not ISO 8601,"),
)


def _nested_column(path: str, found: Profile) -> ColumnChoice:
    sizes = found.sizes.most_common(1)
    setting = {"kind": "vector", "size": max(1, sizes[0][0]) if sizes else 1}
    if not sizes or found.share("vector") < MOST:
        kind = found.kinds.most_common(1)[0][0]
        named = {
            "list": "lists of other values than numbers: no column reads them",
            "object": "objects that are empty or nested too deeply",
        }
        return ColumnChoice(path, setting, False, named.get(kind, "values of mixed kinds, or bytes"))
    size, count = sizes[0]
    if count < MOST * found.present or not 1 <= size <= MAX_SIZE:
        lengths = f"{min(found.sizes)} to {max(found.sizes)}"
        return ColumnChoice(path, setting, False, f"lists of {lengths} numbers: a vector has one length")
    return ColumnChoice(path, setting, True, f"{size} numbers")


def _scalar(path: str, found: Profile, time: TimeField | None) -> tuple[dict[str, Any], str]:
    """The setting of a field of scalars, and why."""
    if time is not None:
        unit = {} if time.unit in (None, "s") else {"unit": time.unit}
        # A birthday has only a phase of the year. A recent date would be learned as a trend: see `ColumnConfig.cycle`.
        cycle = {"cycle": "year"} if time.is_day and time.distance_s > _NEAR_S else {}
        return {"kind": "timestamp", **unit, **cycle}, time.kind
    texts = {text.strip().lower() for text in found.texts}
    if found.share("boolean") >= MOST or (len(texts) == 2 and texts <= _BOOLEAN_TEXTS):
        return {"kind": "boolean"}, "/".join(shown(text) for text in found.most_common(3))
    numeric = found.share("integer", "number", "number_text")
    if numeric > 0.0 and numeric + found.share("no_value") >= MOST:
        return _numeric(path, found)
    words = found.words / max(1, found.present)
    if words >= _TEXT_WORDS and 2 * found.distinct > found.present and found.present >= FEW_RECORDS:
        return {"kind": "text", "size": 256}, f"{words:.0f} words on average"
    return _category(found), _values(found)


def _numeric(path: str, found: Profile) -> tuple[dict[str, Any], str]:
    low, high = found.numbers[0], found.numbers[-1]
    as_text = ", as text" if found.kinds["number_text"] else ""
    if found.kinds["no_value"]:
        as_text += f", {found.kinds['no_value']} of {found.present} without a number"
    span = f"{low:g} to {high:g}{as_text}"
    if not found.is_whole or found.present < FEW_RECORDS:
        return {"kind": "number"}, span
    few = found.distinct <= min(_MOST_CODES, found.present // 2)
    sparse = low >= 100.0 and high - low > _SPARSE * found.distinct and 5 * found.distinct < found.present
    if few and (_CODE_WORDS & {*words_of(path)} or sparse):
        return _category(found), f"codes: {_values(found)}"
    if _CODE_WORDS & {*words_of(path)} and _ID_WORDS & {*words_of(path)}:
        return _category(found), f"ids of something else: {_values(found)}"
    if found.distinct <= _MIN_BUCKETS and found.distinct > 2:
        return {"kind": "number"}, f'{span}; "category" if the {found.distinct} values are codes'
    return {"kind": "number"}, span


def _category(found: Profile) -> dict[str, Any]:
    """At least twice as many buckets as there may be values, as a power of two.

    Eight times as many where most values were not seen yet: the estimate is a lower bound, and a bucket is cheap.
    """
    factor = 2 if found.coverage >= _COVERED else 8
    buckets = 1 << (factor * found.distinct_estimate - 1).bit_length()
    return {"kind": "category", "buckets": min(max(_MIN_BUCKETS, buckets), MAX_BUCKETS >> 3)}


def _values(found: Profile) -> str:
    head = ", ".join(shown(text) for text in found.most_common(3))
    if found.distinct <= 3:
        return head
    estimate = found.distinct_estimate
    more = f", about {estimate} in all" if estimate > found.distinct else ""
    return f"{head}, …: {found.distinct} values{more}"


def _is_id(path: str, found: Profile, kind: str) -> bool:
    """Whether each record has its own value, and it is no measurement."""
    if not found.is_unique:
        return False
    named = bool(_ID_WORDS & {*words_of(path)})
    if kind == "number":
        return named and found.is_whole
    return kind == "category" and (named or found.present >= FEW_RECORDS)


def _mean_length(found: Profile) -> float:
    return sum(len(text) * count for text, count in found.texts.items()) / max(1, found.texts.total())


def shown(text: str) -> str:
    """A value as it may be shown in a line: short, without control characters."""
    clean = "".join(each if each.isprintable() else "\N{REPLACEMENT CHARACTER}" for each in text)
    return clean if len(clean) <= 40 else f"{clean[:40]}…"


def column_names(fields: Fields) -> dict[str, str]:
    """A column's name for each path of the row: the path below the root, its dots as underscores; all differ."""
    names: dict[str, str] = {}
    taken: set[str] = set()
    for path in fields.row_paths:
        name = path.removeprefix(fields.root).replace(".", "_")
        while name in taken:
            name += "_"
        taken.add(name)
        names[path] = name
    return names


def profiles_of(fields: Fields) -> dict[str, Profile]:
    """The profile of each field."""
    return {path: profile(values) for path, values in fields.values.items()}
