"""Data types that all folders share: records of the log, and the samples and labels decoded from them.

Dimension letters: B batch, U unlabelled (fresh) rows, L labelled rows, F features, C classes.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from streamlearn.errors import RecordError

Array: TypeAlias = npt.NDArray[np.generic]
Probabilities: TypeAlias = npt.NDArray[np.float32]

UNLABELLED = -1
"""The class index of a row without a label; losses ignore it."""
RETRACTED = -2
"""The class index of a label record that withdraws all labels of its sample."""
ERASED = -3
"""The class index of a label record that erases its sample: payload, example and all labels."""


class TopicPartition(NamedTuple):
    """One partition of one topic."""

    topic: str
    partition: int


class Position(NamedTuple):
    """The place of one record in the log. It is never reused, so it identifies a duplicate delivery."""

    topic: str
    partition: int
    offset: int

    def __str__(self) -> str:
        return f"{self.topic}[{self.partition}]@{self.offset}"

    @property
    def topic_partition(self) -> TopicPartition:
        """The partition that the record is in."""
        return TopicPartition(self.topic, self.partition)


Offsets: TypeAlias = dict[TopicPartition, int]
"""The next offset to read of each partition."""

Headers: TypeAlias = tuple[tuple[str, bytes], ...]


@dataclass(frozen=True, slots=True)
class NewRecord:
    """A record to append. The log chooses the partition by a hash of `key`, as Kafka's clients do."""

    key: bytes | None
    value: bytes | None
    headers: Headers = ()
    timestamp_ms: int | None = None
    """Milliseconds since the epoch; if None, the log sets its own time."""

    @property
    def size_bytes(self) -> int:
        """Of key, value and headers: what counts against `log.max_record_bytes`."""
        return _size_bytes(self)


@dataclass(frozen=True, slots=True)
class Record:
    """A record as read from the log."""

    position: Position
    timestamp_ms: int
    key: bytes | None
    value: bytes | None
    headers: Headers = ()

    @property
    def size_bytes(self) -> int:
        """As of a new record."""
        return _size_bytes(self)


def _size_bytes(record: NewRecord | Record) -> int:
    headers = sum(len(name) + len(value) for name, value in record.headers) if record.headers else 0
    return len(record.key or b"") + len(record.value or b"") + headers


def is_whole(text: str) -> bool:
    """Whether a class name looks like an index."""
    return text.isascii() and text.isdigit() and len(text) < 10


ColumnKind: TypeAlias = Literal["number", "boolean", "category", "timestamp", "vector", "text"]

Cycle: TypeAlias = Literal["day", "week", "year"]
"""Of a timestamp column."""
CYCLE_PLACES: dict[Cycle, int] = {"day": 2, "week": 4, "year": 6}
"""Sine and cosine of the phase of this cycle and of each shorter one."""


@dataclass(frozen=True, slots=True)
class Column:
    """One column of the user's records: its places in a row. All zeros mean missing, for every kind.

    number: value, 1.0 if present. boolean: +1 or -1. category: bucket from 1 to `size`. timestamp:
    `size` numbers of `CYCLE_PLACES`. vector: `size` numbers, 1.0 if present. text: `size` numbers.
    """

    name: str
    kind: ColumnKind
    size: int = 1
    """Numbers of a vector, a timestamp or a text; buckets of a category."""
    embedding: int = 0
    """Dimensions of a category's embedding."""

    @property
    def width(self) -> int:
        """Number of places in the row."""
        if self.kind == "vector":
            return self.size + 1
        if self.kind in ("text", "timestamp"):
            return self.size
        return 2 if self.kind == "number" else 1


@dataclass(frozen=True, slots=True)
class Schema:
    """What a sample is: shape and dtype of its payload, and its classes."""

    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]
    classes: tuple[str, ...]
    spare: int | None = None
    """Additional outputs for classes without a name yet; None if the network was built without them."""
    scale: float = 1.0
    """The network sees x * scale."""
    columns: tuple[Column, ...] = ()
    """With columns a sample is a float32 row of all their places, in this order. A new column is added at the end, so
    an older row is a prefix of a newer one."""

    @property
    def largest_float(self) -> float:
        """1.8e19 / scale: above it a feature's square, and so a batch's variance, is infinite in the network."""
        return math.sqrt(float(np.finfo(np.float32).max)) / max(abs(self.scale), 1e-300)

    @property
    def capacity(self) -> int:
        """C: the number of classes, spare ones included; the length of every array over classes."""
        return len(self.classes) + (self.spare or 0)

    @property
    def nbytes(self) -> int:
        """Size of one payload in bytes."""
        return int(np.prod(self.shape)) * self.dtype.itemsize

    def rows_within(self, rows: int, max_bytes: int, least: int = 1) -> int:
        """Return how many of `rows` payloads fit in `max_bytes`; at least `least`, so that the bound never blocks."""
        return min(rows, max(least, max_bytes // self.nbytes))

    def padded(self, x: Array) -> Array:
        """Rows (..., W) from rows that may lack the last columns; zeros, which mean missing, in their place."""
        if not self.columns or x.shape[-1:] == self.shape:
            return x
        wider = np.zeros((*x.shape[:-1], *self.shape), self.dtype)
        wider[..., : x.shape[-1]] = x
        return wider

    def class_index(self, value: object) -> int:
        """Return the index of a class given by name or by index; only by name if the classes are `numbered`.

        Of the classes "1", "2" and "3", 1 is the first, as text or as a number; 0 is not a class.

        Raises:
            RecordError: `unknown_class`; the message lists the classes.
        """
        text = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
        if isinstance(text, str) and text in self.classes:
            return self.classes.index(text)
        if isinstance(text, str) and is_whole(text) and not self.numbered and int(text) < len(self.classes):
            return int(text)
        shown = ", ".join(self.classes[:12]) + (", …" if len(self.classes) > 12 else "")
        raise RecordError("unknown_class", f"class {value!r:.80} is not one of {len(self.classes)}: {shown}")

    @property
    def numbered(self) -> bool:
        """Whether the name of a class is a number other than its index; every number is a name then."""
        return any(is_whole(name) and name != str(index) for index, name in enumerate(self.classes))


class Prediction(NamedTuple):
    """One answer, and the step of the teacher that gave it."""

    class_index: int
    """UNLABELLED if no prediction was made, because load shedding skipped the sample."""
    probabilities_C: Probabilities
    model_version: int


@dataclass(slots=True)
class Sample:
    """One decoded sample. `x` has the schema's shape and dtype."""

    position: Position
    timestamp_s: float
    """When the log received it. Order, age and label delay are measured by this clock."""
    sample_id: str
    x: Array
    label: int | None = None
    """The label inside the sample; UNLABELLED if its class is unknown."""
    event_time_s: float | None = None
    domain: str | None = None
    true_label: int | None = None
    """Simulation only: the ground truth, for oracle scores. It is never learned."""
    answer: Prediction | None = None
    """The answer that a client received for this sample (`/predict` with `learn`)."""
    class_name: str | None = None
    """The name in the label inside the sample, if its class is unknown."""

    @property
    def inside(self) -> Label | None:
        """The label inside the sample, as a label at the sample's position."""
        if self.label is None:
            return None
        where = self.position, self.timestamp_s, self.sample_id
        return Label(*where, self.label, self.event_time_s, class_name=self.class_name)


@dataclass(slots=True)
class Label:
    """One decoded label of one sample."""

    position: Position
    timestamp_s: float
    sample_id: str
    class_index: int
    """UNLABELLED if the class is unknown; RETRACTED or ERASED if the record withdraws labels."""
    event_time_s: float | None = None
    source: str | None = None
    class_name: str | None = None
    """The name, if the class is unknown."""


@dataclass(slots=True)
class PublishedAnswer:
    """One decoded record of the predictions topic: the answer that was published for one sample."""

    position: Position
    timestamp_s: float
    sample_id: str
    sample: Position
    """The place of the sample that was answered. An id may have been sent twice."""
    prediction: Prediction
    """Of every class of the schema; 0 for those without a name at the time."""


@dataclass(slots=True)
class BadRecord:
    """A record that could not be decoded, and the reason."""

    record: Record
    error: RecordError

    @property
    def position(self) -> Position:
        """The place of the record in the log."""
        return self.record.position

    @property
    def timestamp_s(self) -> float:
        """When the log received it."""
        return self.record.timestamp_ms / 1000.0


@dataclass(frozen=True, slots=True)
class Skipped:
    """A record that has nothing to learn: a tombstone, a deleted row, or an unreadable record of the predictions topic.

    It takes its place in the queue.
    """

    position: Position
    timestamp_s: float


@dataclass(frozen=True, slots=True)
class Gap:
    """Records that retention removed before they were read. It takes their place in the queue."""

    position: Position
    """Of the last missing record."""
    missing: int
    timestamp_s: float = 0.0


Item: TypeAlias = Sample | Label | PublishedAnswer | BadRecord | Skipped | Gap


@dataclass(slots=True)
class Example:
    """A labelled payload to learn."""

    sample_id: str
    x: Array
    class_index: int
    labelled_at_s: float = 0.0
    """When the log received the label. Examples are ordered by it."""


def sample_key(sample_id: str) -> int:
    """Return a hash of an id in [0, 2^63), from 8 bytes of BLAKE2b."""
    digest = hashlib.blake2b(sample_id.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@dataclass(slots=True)
class MicroBatch:
    """The rows of one step, padded to a fixed shape. Rows beyond the counts are zeros and not part of the step."""

    fresh_x: Array
    """(U, *shape) in the schema's dtype."""
    fresh_count: int
    labelled_x: Array
    """(L, *shape)."""
    labelled_y: npt.NDArray[np.int64]
    """(L,), UNLABELLED in padding rows."""
    labelled_count: int
    trained_ids: list[str] = field(default_factory=list)
    """Samples whose label is learned for the first time: the first of the labelled rows."""
    keys: npt.NDArray[np.int64] | None = None
    """(fresh_count + labelled_count,), >= 0: `sample_key` of each row, for methods that keep state per sample."""
    seen_before: bool = False
    """The fresh rows are recent rows repeated: already observed and predicted."""
