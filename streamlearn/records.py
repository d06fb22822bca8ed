"""The vocabulary: what a log holds, and what its bytes mean once decoded. Imports nothing of ours but errors.

Dimension letters used everywhere: B batch, U unlabelled (fresh) rows, L labelled rows, F features, C classes.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from streamlearn.errors import RecordError

Array: TypeAlias = npt.NDArray[np.generic]
Probabilities: TypeAlias = npt.NDArray[np.float32]

UNLABELLED = -1
"""The class index of a row without a label; losses ignore it."""
RETRACTED = -2
"""What a label record has for a class where it withdraws the labels of its sample."""
ERASED = -3
"""The same where it erases the sample as well: payload, example, and all labels."""


class TopicPartition(NamedTuple):
    """One partition of one topic."""

    topic: str
    partition: int


class Position(NamedTuple):
    """Where one record stands in the log. Unique for ever, so a duplicate delivery is known by it."""

    topic: str
    partition: int
    offset: int

    def __str__(self) -> str:
        return f"{self.topic}[{self.partition}]@{self.offset}"

    @property
    def topic_partition(self) -> TopicPartition:
        """The partition it stands in."""
        return TopicPartition(self.topic, self.partition)


Offsets: TypeAlias = dict[TopicPartition, int]
"""`next_offset` of each partition: the offset to read next."""

Headers: TypeAlias = tuple[tuple[str, bytes], ...]


@dataclass(frozen=True, slots=True)
class NewRecord:
    """A record to append. The log picks the partition by hashing `key`, as Kafka's clients do."""

    key: bytes | None
    value: bytes | None
    headers: Headers = ()
    timestamp_ms: int | None = None
    """Milliseconds since the epoch; None lets the log stamp it."""


@dataclass(frozen=True, slots=True)
class Record:
    """A record as read from the log, untouched."""

    position: Position
    timestamp_ms: int
    key: bytes | None
    value: bytes | None
    headers: Headers = ()


def is_whole(text: str) -> bool:
    """Whether a class of this name is called by a number, as an index is."""
    return text.isascii() and text.isdigit() and len(text) < 10


@dataclass(frozen=True, slots=True)
class Schema:
    """What a sample is: shape and dtype of its payload, and the classes a label may name."""

    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]
    classes: tuple[str, ...]
    spare: int | None = None
    """Outputs beside those of the classes, for names that are not known yet; None where no such room was ever left."""
    scale: float = 1.0
    """The network sees x * scale."""

    @property
    def largest_float(self) -> float:
        """1.8e19 / scale: beyond it a feature's square, and with it a batch's variance, is infinite in the network."""
        return math.sqrt(float(np.finfo(np.float32).max)) / max(abs(self.scale), 1e-300)

    @property
    def capacity(self) -> int:
        """C: how many classes there are room for; every array over classes is so long."""
        return len(self.classes) + (self.spare or 0)

    @property
    def nbytes(self) -> int:
        """Size of one payload in bytes."""
        return int(np.prod(self.shape)) * self.dtype.itemsize

    def rows_within(self, rows: int, max_bytes: int, least: int = 1) -> int:
        """As many of `rows` payloads as fit in `max_bytes`, but at least `least`: a bound that never blocks."""
        return min(rows, max(least, max_bytes // self.nbytes))

    def class_index(self, value: object) -> int:
        """The index of a class given by name or by index; by name alone where a class is called by a number.

        Of classes "1", "2" and "3" the number 1 is the first, as text or as JSON has it, and 0 is none.

        Raises:
            RecordError: `unknown_class`, with the classes there are.
        """
        text = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
        if isinstance(text, str) and text in self.classes:
            return self.classes.index(text)
        if isinstance(text, str) and is_whole(text) and not self.numbered and int(text) < len(self.classes):
            return int(text)
        shown = ", ".join(self.classes[:12]) + (", …" if len(self.classes) > 12 else "")
        raise RecordError("unknown_class", f"class {value!r:.80} is none of {len(self.classes)}: {shown}")

    @property
    def numbered(self) -> bool:
        """Some class is called by a number that is not its index, so that a number is a name and no index."""
        return any(is_whole(name) and name != str(index) for index, name in enumerate(self.classes))


class Prediction(NamedTuple):
    """One answer, and the whole teacher (by its step) that gave it."""

    class_index: int
    """UNLABELLED where nobody was asked: a sample that was passed by under overload."""
    probabilities_C: Probabilities
    model_version: int


@dataclass(slots=True)
class Sample:
    """One decoded sample. `x` has the schema's shape and dtype."""

    position: Position
    timestamp_s: float
    """When the log took it: the clock of the stream, for order, age and label delay."""
    sample_id: str
    x: Array
    label: int | None = None
    """A label that came inside the sample; UNLABELLED where no class has its name."""
    event_time_s: float | None = None
    domain: str | None = None
    true_label: int | None = None
    """Simulations only: the truth, for oracle scores; nothing learns from it."""
    answer: Prediction | None = None
    """What a client was really told about this sample (`/predict` with `learn`)."""
    class_name: str | None = None
    """Of the label inside: the name that no class has."""

    @property
    def inside(self) -> Label | None:
        """The label that came inside, as a label record that stands where the sample does."""
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
    """UNLABELLED where no class has the name; RETRACTED or ERASED where the record withdraws labels."""
    event_time_s: float | None = None
    source: str | None = None
    class_name: str | None = None
    """The name that no class has."""


@dataclass(slots=True)
class BadRecord:
    """A record that could not be decoded, whole, with the reason."""

    record: Record
    error: RecordError

    @property
    def position(self) -> Position:
        """Where it stands in the log."""
        return self.record.position

    @property
    def timestamp_s(self) -> float:
        """When the log took it."""
        return self.record.timestamp_ms / 1000.0


@dataclass(frozen=True, slots=True)
class Gap:
    """Records that retention took before they were read; stands in the queue where they stood."""

    position: Position
    """Of the last record that is missing."""
    missing: int
    timestamp_s: float = 0.0


Item: TypeAlias = Sample | Label | BadRecord | Gap


@dataclass(slots=True)
class Example:
    """A labelled payload, ready to be learned."""

    sample_id: str
    x: Array
    class_index: int
    labelled_at_s: float = 0.0
    """When the log took the label, which is the order in which examples are old."""


def sample_key(sample_id: str) -> int:
    """A whole number in [0, 2^63) that stands for an id: 8 bytes of BLAKE2b, so that no two collide by design."""
    digest = hashlib.blake2b(sample_id.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@dataclass(slots=True)
class MicroBatch:
    """The rows of one step, padded to a fixed shape. Rows beyond the counts are zeros, and no part of the step."""

    fresh_x: Array
    """(U, *shape) in the schema's dtype."""
    fresh_count: int
    labelled_x: Array
    """(L, *shape)."""
    labelled_y: npt.NDArray[np.int64]
    """(L,), UNLABELLED where padded."""
    labelled_count: int
    trained_ids: list[str] = field(default_factory=list)
    """Samples whose label is learned here for the first time: the first of the labelled rows."""
    keys: npt.NDArray[np.int64] | None = None
    """(fresh_count + labelled_count,), the same for the same sample at any time, >= 0; for a method that wants them."""
    seen_before: bool = False
    """The fresh rows are recent ones once more, already observed and predicted."""
