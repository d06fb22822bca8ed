"""Records of one topic for `init`: read by the format that they have, with the profile of each field."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from streamlearn.app.sampling import TopicSample
from streamlearn.errors import ConfigError, RecordError
from streamlearn.log.label_classes import plain_class
from streamlearn.records import Record
from streamlearn.schema.infer import Fields, TimeField, collect, format_of, profiles_of, time_field
from streamlearn.schema.paths import MISSING
from streamlearn.schema.paths import Path as RecordPath
from streamlearn.schema.profile import Profile
from streamlearn.schema.reader import OWN_ID, RecordReader
from streamlearn.schema.registry import SchemaRegistry
from streamlearn.schema.settings import TENSORS, Format, LabelSource, SampleSource

_POSITION = re.compile(r":? line \d+ column \d+ \(char \d+\)")
"""Where a JSON parser stopped: it differs between records with the same fault."""
_OWN_FIELDS = frozenset({"id", "x", "label", "time", "domain", "true_label", "answer"})


@dataclass(frozen=True)
class Topic:
    """Records of one side, as they were read and parsed."""

    some: TopicSample
    format: Format
    reader: RecordReader
    records: list[Record]
    """Those that could be parsed, without null values and deleted rows."""
    parsed: list[object]
    fields: Fields
    profiles: Mapping[str, Profile]
    times: Mapping[str, TimeField]
    unreadable: Counter[str]
    """Records that could not be parsed, by what is wrong."""


def read_topic(
    source: SampleSource | LabelSource, some: TopicSample, registry: SchemaRegistry | None, is_given: bool
) -> Topic:
    """Parse records by the format that they have, or that the user has set.

    Raises:
        ConfigError: none can be read, or they have no fields.
    """
    topics = ", ".join(some.topics)
    written = from_producers(some.records)
    values = [record.value for record in written if record.value]
    chosen = source.format if is_given else format_of(values, registry, topics)
    if chosen in TENSORS:
        msg = (
            f'{topics}: records are tensors or images: set source.samples.format = "{chosen}", schema.shape and '
            "schema.classes yourself; init finds columns in records with fields"
        )
        raise ConfigError(msg)
    if chosen == "protobuf" and source.message is None:
        msg = (
            f"{topics}: records are Protobuf: generate its Python class, and pass -s source.SIDE.format=protobuf "
            "-s source.SIDE.message=package.module:Message, where SIDE is samples or labels"
        )
        raise ConfigError(msg)
    table = "samples" if isinstance(source, SampleSource) else "labels"
    reader = RecordReader(source.model_copy(update={"format": chosen}), registry, table=table)
    records, parsed, errors = parse_records(reader, written, chosen, plain=table == "labels")
    if written and not records:
        reason = errors.most_common(1)[0][0] if errors else "all values are null"
        msg = f"{topics}: none of {len(written)} records could be read as {chosen}: {reason}"
        raise ConfigError(msg)
    fields = collect(parsed)
    if fields.root:
        row = RecordPath.in_value(fields.root.rstrip("."))
        kept = [number for number, value in enumerate(parsed) if isinstance(row.find(value), dict)]
        records, parsed = [records[number] for number in kept], [parsed[number] for number in kept]
        fields = collect(parsed)
    profiles, logged_s = profiles_of(fields), [record.timestamp_ms / 1000.0 for record in records]
    found = {path: time_field(path, profiles[path], values, logged_s) for path, values in fields.values.items()}
    times = {path: each for path, each in found.items() if each is not None}
    return Topic(some, chosen, reader, records, parsed, fields, profiles, times, errors)


def from_producers(records: Sequence[Record]) -> Sequence[Record]:
    """Without those that streamlearn's servers appended in its own form, unless there are no others.

    The learner reads them by their header, whatever `[source]` says.
    """
    return [record for record in records if all(name != OWN_ID for name, _ in record.headers)] or records


def parse_records(
    reader: RecordReader, records: Sequence[Record], chosen: Format, *, plain: bool = False
) -> tuple[list[Record], list[object], Counter[str]]:
    """The records that can be parsed, what they hold, and the errors of the others. Null values are left out."""
    readable: list[Record] = []
    parsed: list[object] = []
    errors: Counter[str] = Counter()
    for record in records:
        if record.value is None:
            continue
        try:
            parsed.append(_value(reader, record.value, chosen, plain=plain))
            readable.append(record)
        except RecordError as error:
            errors[_POSITION.sub("", str(error))[:200]] += 1
    return readable, parsed, errors


def _value(reader: RecordReader, value: bytes, chosen: Format, *, plain: bool) -> object:
    """The fields of a record; of a label also its plain class."""
    if plain and chosen == "json" and value.lstrip()[:1] != b"{":
        return plain_class(value).get("label")
    return reader.parse(value, chosen) if plain else reader.fields(value, chosen)


def tensor_shape(samples: Topic) -> list[int] | None:
    """The shape of `x`, if records are streamlearn's own `{"id", "x"}`."""
    if not samples.parsed or not all(isinstance(each, dict) and each.keys() <= _OWN_FIELDS for each in samples.parsed):
        return None
    shapes = set()
    for value in samples.fields.values.get("x", [MISSING]):
        if not isinstance(value, list):
            return None
        try:
            shapes.add(np.asarray(value, np.float64).shape)
        except (TypeError, ValueError, OverflowError):
            return None
    shape = next(iter(shapes))
    return list(shape) if len(shapes) == 1 and 1 <= len(shape) <= 4 and all(shape) else None
