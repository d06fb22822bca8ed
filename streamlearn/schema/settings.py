"""The settings of [source] and [columns]: where the user's records are, and which of their fields are used."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path as FilePath
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, ConfigDict, Field, field_validator, model_validator

from streamlearn.models.settings import ImportPath
from streamlearn.records import CYCLE_PLACES, Column, ColumnKind, Cycle
from streamlearn.schema.paths import Path
from streamlearn.section import Secret, Section

TimeUnit: TypeAlias = Literal["s", "ms", "us", "ns"]
MAX_BUCKETS = 1 << 20
"""A float32 holds every integer up to 2^24."""
MAX_SIZE = 1 << 16
"""Numbers of a vector or a text."""
MAX_COLUMNS = 4096
MAX_PLACES = 1 << 20
"""Of a row."""


def _checked_path(text: str) -> str:
    Path.parse(text)
    return text


def _checked_field(text: str) -> str:
    Path.in_value(text)
    return text


PathText = Annotated[str, AfterValidator(_checked_path)]
"""A path into the record (`a.b.c`), `key`, `key.a.b`, or `header:NAME`."""

FieldText = Annotated[str, AfterValidator(_checked_field)]

_OPTIONS: dict[ColumnKind, tuple[str, ...]] = {
    "number": (),
    "boolean": (),
    "category": ("buckets", "embedding"),
    "timestamp": ("unit", "cycle"),
    "vector": ("size",),
    "text": ("size", "encoder"),
}
"""The settings that a kind has besides `kind` and `from`."""


class ColumnConfig(Section):
    """[columns.NAME]: one column. `NAME = "number"` is short for `NAME = { kind = "number" }`."""

    model_config = ConfigDict(populate_by_name=True)

    kind: ColumnKind
    """What the column holds."""
    from_: FieldText | None = Field(None, alias="from")
    """Path to the value in the record, `a.b.c`; by default the column's name."""
    buckets: int = Field(1024, ge=2, le=MAX_BUCKETS)
    """Category: number of hash buckets. Twice the number of values keeps most of them apart."""
    embedding: int = Field(8, ge=1, le=256)
    """Category: dimensions of its embedding."""
    unit: TimeUnit = "s"
    """Timestamp: unit of a number since 1970. ISO 8601 text and logical types need none."""
    cycle: Cycle = "day"
    """Timestamp: longest cycle whose phase is an input; the shorter ones are too. A week or a year that the stream has
    not seen several times, with labels, is learned as a trend, and answers to the newest samples are wrong."""
    size: int = Field(256, ge=1, le=MAX_SIZE)
    """Vector and text: how many numbers."""
    encoder: ImportPath | None = None
    """Text: package.module:function from a text to `size` numbers. Not set: hashed n-grams."""

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, given: Any) -> Any:
        return {"kind": given} if isinstance(given, str) else given

    @field_validator("encoder")
    @classmethod
    def _import_path(cls, value: str | None) -> str | None:
        if value is not None and ":" not in value:
            raise ValueError("expected package.module:function")
        return value

    @model_validator(mode="after")
    def _check(self) -> ColumnConfig:
        foreign = self.model_fields_set - {"kind", "from_", *self.options}
        if foreign:
            msg = f"a {self.kind} column has no {', '.join(sorted(foreign))}"
            raise ValueError(msg)
        if self.kind == "vector" and "size" not in self.model_fields_set:
            raise ValueError("a vector column needs size, its number of numbers")
        return self

    @property
    def options(self) -> tuple[str, ...]:
        """The settings that a column of this kind has besides `kind` and `from`."""
        return _OPTIONS[self.kind]

    def path(self, name: str) -> Path:
        """The path of the column of this name.

        Raises:
            ValueError: the name is no path, and there is no `from`.
        """
        return Path.in_value(self.from_ or name)

    def column(self, name: str) -> Column:
        """The places of this column."""
        if self.kind == "category":
            return Column(name, self.kind, self.buckets, self.embedding)
        if self.kind == "timestamp":
            return Column(name, self.kind, CYCLE_PLACES[self.cycle])
        return Column(name, self.kind, self.size if self.kind in ("vector", "text") else 1)


def layout(columns: Mapping[str, ColumnConfig]) -> tuple[Column, ...]:
    """The columns of a row, in order.

    Raises:
        ValueError: they are too many, or too wide, or one has no path.
    """
    for name, config in columns.items():
        config.path(name)
    found = tuple(config.column(name) for name, config in columns.items())
    if len(found) > MAX_COLUMNS or sum(column.width for column in found) > MAX_PLACES:
        msg = f"expected at most {MAX_COLUMNS} columns of {MAX_PLACES} places in all"
        raise ValueError(msg)
    return found


Format: TypeAlias = Literal["json", "avro", "json_schema", "protobuf", "raw", "npy", "image"]
FRAMED: tuple[Format, ...] = ("avro", "json_schema", "protobuf")
"""Formats of records that start with the frame of a schema registry."""
TENSORS: tuple[Format, ...] = ("raw", "npy", "image")
"""Formats of records that are one tensor, without fields."""
Topic = Annotated[str, Field(pattern=r"^[a-zA-Z0-9._-]{1,249}$")]


class _TopicSource(Section):
    """What [source.samples] and [source.labels] have in common."""

    id: PathText | None = None
    """Path to the sample's id: `a.b.c` in the record, `key`, `key.a.b`, or `header:NAME`. Not set: "id" in the record,
    or else the key."""
    time: PathText | None = None
    """Path to the event time. Not set: "time" in the record."""
    time_unit: TimeUnit = "s"
    """Unit of an event time that is a number. ISO 8601 text and logical types need none."""
    message: ImportPath | None = None
    """Protobuf: package.module:Message, the generated class."""

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths that are set."""
        found = (getattr(self, name, None) for name in ("id", "time", "label", "domain"))
        return tuple(path for path in found if path is not None)

    def _check_format(self, chosen: Format) -> None:
        if (chosen == "protobuf") != (self.message is not None):
            raise ValueError('format = "protobuf" and message: set both or neither')
        if self.message is not None and ":" not in self.message:
            raise ValueError("message: expected package.module:Message")
        in_record = [path for path in self.paths if Path.parse(path).root == "value"]
        if chosen in TENSORS and in_record:
            msg = f'format = "{chosen}" has no fields: expected paths of key or header:NAME, got {in_record[0]!r}'
            raise ValueError(msg)


class SampleSource(_TopicSource):
    """[source.samples]: the topics of samples."""

    topic: Topic | Annotated[tuple[Topic, ...], Field(min_length=1, max_length=64)] = "samples"
    """Topic of samples, or a list of topics. Appends over HTTP go to the first."""
    format: Format = "json"
    """Of a record without a content-type header. avro, json_schema and protobuf: in the frame of a schema registry;
    protobuf also without. raw, npy and image: the record is one tensor."""
    label: PathText | None = None
    """Path to a label inside the sample. Not set: "label" in the record, and none with [columns]."""
    domain: PathText | None = None
    """Path to the domain. Not set: "domain" in the record, and none with [columns]."""

    @model_validator(mode="after")
    def _check(self) -> SampleSource:
        self._check_format(self.format)
        if len(set(self.topics)) < len(self.topics):
            raise ValueError("topic: names must differ")
        return self

    @property
    def topics(self) -> tuple[str, ...]:
        """All topics."""
        return (self.topic,) if isinstance(self.topic, str) else self.topic


class LabelSource(_TopicSource):
    """[source.labels]: the topic of labels."""

    topic: Topic = "labels"
    """Topic of labels."""
    format: Literal["json", "avro", "json_schema", "protobuf"] = "json"
    """Of a record without a content-type header."""
    label: PathText | None = None
    """Path to the class. Not set: "label" or "class" in the record."""
    values: dict[str, str] = Field(default_factory=dict)
    """Class names by the value in the record, such as { true = "fraud", false = "legitimate" }. Other values are class
    names or indexes. Also of a label inside a sample."""

    @model_validator(mode="after")
    def _check(self) -> LabelSource:
        self._check_format(self.format)
        return self


class PredictionsConfig(Section):
    """[source.predictions]: answers to all samples, as a stream."""

    topic: Topic | None = None
    """Topic that scorers write the answer to each sample to, exactly once; the learner scores them. Not set: there are
    none."""
    format: Literal["json", "avro"] = "json"
    """Of the records. avro: with a schema that the scorer registers at source.registry as `TOPIC-value`."""
    scorers: int = Field(1, ge=1, le=64)
    """Scorer processes of `streamlearn run`; they share the partitions of the samples. The embedded log has one."""


class RegistryConfig(Section):
    """[source.registry]: a schema registry with Confluent's API, also Apicurio's `/apis/ccompat/v7`."""

    url: str | None = Field(None, pattern=r"^https?://[^\s?#@]+$")
    """Base URL. Without it framed Avro cannot be read."""
    user: str | None = None
    """For basic authentication."""
    password: Secret = None
    """A value, or file:PATH. Do not pass a value with --set."""
    ca_file: FilePath | None = None
    """Certificates of the authorities to trust, as PEM. Not set: those of the system."""
    cert_file: FilePath | None = None
    """The client's certificate, for mutual TLS."""
    key_file: FilePath | None = None
    """Its key; not set if it is in `cert_file`."""
    timeout_s: float = Field(5.0, gt=0.0, le=60.0)
    """Longest wait for one answer. While the registry is away, reading stalls and no record is refused."""

    @model_validator(mode="after")
    def _check(self) -> RegistryConfig:
        if self.key_file is not None and self.cert_file is None:
            raise ValueError("key_file: set cert_file too")
        if (self.user is None) != (self.password is None):
            raise ValueError("user and password: set both or neither")
        return self


class SourceConfig(Section):
    """[source]: the user's records."""

    samples: SampleSource = SampleSource()
    """Of samples."""
    labels: LabelSource = LabelSource()
    """Of labels."""
    predictions: PredictionsConfig = PredictionsConfig()
    """Of the answers to samples."""
    registry: RegistryConfig = RegistryConfig()
    """Where schemas are."""

    @model_validator(mode="after")
    def _check(self) -> SourceConfig:
        if self.registry.url is None and "avro" in (self.samples.format, self.labels.format, self.predictions.format):
            raise ValueError('format = "avro" needs source.registry.url')
        return self

    @property
    def topics(self) -> tuple[str, ...]:
        """The topics of samples, and the one of labels."""
        return (*self.samples.topics, self.labels.topic)

    @property
    def all_topics(self) -> tuple[str, ...]:
        """What a learner reads: those of `topics`, and the one of predictions if it is set."""
        return (*self.topics, *([self.predictions.topic] if self.predictions.topic else []))
