"""The layout of the ledger's rows in the store: counters, samples, labels.

Integers and floats are little-endian and packed. A change of the layout is a new format (`store_file.FORMAT`).
"""

from __future__ import annotations

import bisect
import hashlib
import struct
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, field, fields
from operator import attrgetter
from typing import ClassVar, NamedTuple, TypeAlias

import numpy as np

from streamlearn.ledger import LabelState
from streamlearn.records import ERASED, RETRACTED, Array, Prediction, Probabilities, Schema

KEPT_RECORDS = 16
"""How many label records of one sample are remembered: the first by log time, and the last ones."""
SCORED, EVER_TRAINED, CORRECTED, FORGOTTEN = 1, 2, 4, 8
"""Flags of a LabelRow. FORGOTTEN: records between the first and the second were dropped."""
WITHDRAWN = {RETRACTED: LabelState.RETRACTED, ERASED: LabelState.ERASED}
"""The disposition of a record without a class."""
_FURTHER = (*WITHDRAWN.values(), LabelState.DUPLICATE, LabelState.CORRECTED)
_STATES = (LabelState.WAITING, LabelState.JOINED, LabelState.EXPIRED, LabelState.ORPHAN, LabelState.RETRACTED)
_NUMBERS = {state: number for number, state in enumerate(_STATES)}
_JOINED = _NUMBERS[LabelState.JOINED]
_SAMPLE = struct.Struct("<16sHiqdqiiiiH")
PAYLOAD_AT = _SAMPLE.size
"""Where the payload begins in a row: at a multiple of 16 bytes, so that arrays are aligned."""
assert PAYLOAD_AT % 16 == 0, PAYLOAD_AT
_PROBABILITY = np.dtype("<f4")
_ANSWER = struct.Struct("<qi")
"""The head of a published answer: version and class. Then probabilities as float32[C]."""
_RECORD = struct.Struct("<dHiqi")
_HEAD = struct.Struct("<BBq")
"""The head of each LabelRow: state, flags, trained_step."""
_ROW = struct.Struct("<BBqBiq")
_ROW_OF_ONE = struct.Struct("<BBqdHiqi")
"""A LabelRow with one record, and not in the queue: the common case. It is short, since a commit writes whole pages."""
assert (_ROW_OF_ONE.size - _ROW.size) % _RECORD.size, "the size tells the two layouts apart"


@dataclass(slots=True)
class Counters:
    """The counters of the ledger, one row of `counts`. One object is shared by all parts of the ledger.

    Row numbers of samples are in [id_low, high), those with payload in [payload_low, high).
    """

    now_s: float = 0.0
    high: int = 0
    payload_low: int = 0
    id_low: int = 0
    implied_low: int = 0
    """Samples below were checked for the implied class."""
    queue_high: int = 0
    queued: int = 0
    held_high: int = 0
    held_seen: int = 0
    """Held labels below were checked for a class that is known by now."""
    waiting: int = 0
    read: int = 0
    joined: int = 0
    scored: int = 0
    trained: int = 0
    duplicate: int = 0
    corrected: int = 0
    expired: int = 0
    orphan: int = 0
    implied: int = 0
    held: int = 0
    held_dropped: int = 0
    retracted: int = 0
    erased: int = 0
    majority_class: int = -1
    last_class: int = -1
    scored_published: int = 0
    """Of `scored`: by a published answer."""

    LAYOUT: ClassVar[struct.Struct] = struct.Struct("<d25q")

    def pack(self) -> bytes:
        """The row of `counts`."""
        return self.LAYOUT.pack(*_counter_values(self))

    def load(self, row: bytes | None) -> None:
        """The inverse of `pack`, in place. The initial values without a row; 0 for what a row of format 6 lacks."""
        values = astuple(Counters()) if row is None else self.LAYOUT.unpack(row.ljust(self.LAYOUT.size, b"\0"))
        for each, value in zip(fields(self), values, strict=True):
            setattr(self, each.name, value)


_counter_values = attrgetter(*(each.name for each in fields(Counters)))
"""A tuple of all of them, in less than a tenth of the time of `astuple`, which copies each value."""


class SampleRow(NamedTuple):
    """The head of a sample's row. Then the payload, unless it was evicted; probabilities as float32[C]; the id."""

    key: bytes
    topic: int
    partition: int
    offset: int
    arrived_s: float
    model_version: int
    predicted_class: int
    student_class: int
    majority_class: int
    no_change_class: int


class LabelRecord(NamedTuple):
    """One label record of a sample."""

    time_s: float
    """Log time."""
    topic: int
    partition: int
    offset: int
    class_index: int
    """RETRACTED or ERASED if the record withdraws the labels of the sample."""

    @property
    def place(self) -> tuple[int, int, int]:
        """Its position in the log, the topic by its number."""
        return self.topic, self.partition, self.offset


Answers: TypeAlias = tuple[float, int, Prediction, int, int, Prediction | None]
"""When a sample arrived, and what was predicted then: time, student's class, teacher's prediction, majority class and
no-change class; and the answer that was published. A plain tuple: one is made for each label, and a NamedTuple costs
several times as much."""
Order: TypeAlias = Callable[[LabelRecord], tuple[float, str, int, int]]
"""The sort key of label records: time and position, the topic by its name."""


class Placed(NamedTuple):
    """The disposition of an inserted record, and how the counters change."""

    disposition: LabelState | None
    """RETRACTED, ERASED, DUPLICATE or CORRECTED; None for the first label, which has the state of the sample."""
    duplicates: int
    corrections: int


@dataclass(slots=True)
class LabelRow:
    """The label of one sample: its records in order, and what follows from them.

    Without records, the class is the implied class.
    """

    state: LabelState
    """Of the first label; RETRACTED if all records withdraw."""
    class_index: int
    """The class that counts; RETRACTED or ERASED if none does."""
    records: list[LabelRecord] = field(default_factory=list)
    flags: int = 0
    counting: int = 0
    """The index of the record that counts."""
    queue_row: int = -1
    trained_step: int = 0

    def pack(self) -> bytes:
        """The row of `labels`."""
        head = (_NUMBERS[self.state], self.flags, self.trained_step)
        if len(self.records) == 1 and self.queue_row < 0:
            return _ROW_OF_ONE.pack(*head, *self.records[0])
        row = _ROW.pack(*head, self.counting, self.class_index, self.queue_row)
        return b"".join((row, *[_RECORD.pack(*record) for record in self.records]))

    @classmethod
    def unpack(cls, row: bytes) -> LabelRow:
        """The inverse of `pack`."""
        if len(row) == _ROW_OF_ONE.size:
            state, flags, trained_step, *fields = _ROW_OF_ONE.unpack(row)
            record = LabelRecord._make(fields)
            return cls(_STATES[state], record.class_index, [record], flags, trained_step=trained_step)
        state, flags, trained_step, counting, class_index, queue_row = _ROW.unpack_from(row)
        records = [LabelRecord._make(fields) for fields in _RECORD.iter_unpack(row[_ROW.size :])]
        return cls(_STATES[state], class_index, records, flags, counting, queue_row, trained_step)

    @property
    def deciding(self) -> LabelRecord | None:
        """The record that counts; None if the class is implied."""
        return self.records[self.counting] if self.records else None

    @property
    def counted_as(self) -> str | None:
        """The counter of the sample: that of its first label, `implied` without records, None if all withdraw."""
        if not self.records:
            return "implied"
        return None if self.state is LabelState.RETRACTED else self.state.value

    def holds(self, place: tuple[int, int, int]) -> bool:
        """Whether the record at this position is remembered: then it is delivered again."""
        return any(record.place == place for record in self.records)

    def insert(self, record: LabelRecord, order: Order, *, last_counts: bool) -> Placed:
        """Insert a record in order, and update the class that counts.

        The first label has the state of the sample. Each further label is a duplicate or a correction of the record
        before it, and each retraction and erasure is counted as such. So the counters depend on the set of records,
        not on the order in which they are read.

        Past `KEPT_RECORDS` the second record is dropped, or the third if the second counts. A record that belongs
        where others were dropped is compared with the record before it, and dropped as well.
        """
        records = self.records
        at = bisect.bisect_left(records, order(record), key=order)
        gap = bool(self.flags & FORGOTTEN) and (at == 1 or at == 2 == self.counting + 1)
        had_label = self.state is not LabelState.RETRACTED and bool(records)
        if records and records[0].class_index != record.class_index:  # without the flag, all have one class
            self.flags |= CORRECTED
        before = _dispositions(records)
        records.insert(at, record)
        after = _dispositions(records)
        if gap and at < len(before):
            after[at + 1] = before[at]
        moved = {kind: after.count(kind) - before.count(kind) for kind in (*_FURTHER, None)}
        disposition = after[at]
        if had_label and moved[None]:  # the first label is among the dropped records
            moved[LabelState.CORRECTED] += moved[None]
            disposition = LabelState.CORRECTED
        self.counting = self._which_counts(last_counts=last_counts)
        if len(records) > KEPT_RECORDS:
            del records[2 if self.counting == 1 else 1]
            self.flags |= FORGOTTEN
            self.counting = self._which_counts(last_counts=last_counts)
        self.class_index = records[self.counting].class_index
        return Placed(disposition, moved[LabelState.DUPLICATE], moved[LabelState.CORRECTED])

    def _which_counts(self, *, last_counts: bool) -> int:
        """An erasure, else the last record. With corrections = first: an erasure, else a retraction, else the first."""
        last = len(self.records) - 1
        classes = [record.class_index for record in self.records]
        for final in (ERASED,) if last_counts else (ERASED, RETRACTED):
            if final in classes:
                return last - classes[::-1].index(final)
        return last if last_counts else 0

    @property
    def progress(self) -> LabelState:
        """The state that is reported."""
        if self.class_index < 0:
            return WITHDRAWN[self.class_index]
        if self.state is not LabelState.JOINED:
            return self.state
        if self.trained_step:
            return LabelState.TRAINED
        return LabelState.SCORED if self.flags & SCORED else LabelState.JOINED


def _dispositions(records: Sequence[LabelRecord]) -> list[LabelState | None]:
    """The disposition of each record, in order; None for the first label."""
    found: list[LabelState | None] = []
    previous, labels = RETRACTED, 0
    for record in records:
        if record.class_index < 0:
            found.append(WITHDRAWN[record.class_index])
        elif not labels:
            found.append(None)
        else:
            found.append(LabelState.DUPLICATE if record.class_index == previous else LabelState.CORRECTED)
        labels += record.class_index >= 0
        previous = record.class_index
    return found


def pack_joined(topic: int, partition: int, offset: int, time_s: float, class_index: int, *, scored: bool) -> bytes:
    """The row of a joined label with one record."""
    return _ROW_OF_ONE.pack(_JOINED, SCORED if scored else 0, 0, time_s, topic, partition, offset, class_index)


def trained_in(row: bytes, step: int) -> tuple[bytes, bool] | None:
    """The row of a label that `step` learned, and whether the sample is learned for the first time.

    None if the label was learned before, or is not joined. It reads the head only, since each label passes here.
    """
    state, flags, trained_step = _HEAD.unpack_from(row)
    if state != _JOINED or trained_step:
        return None
    return _HEAD.pack(state, flags | EVER_TRAINED, step) + row[_HEAD.size :], not flags & EVER_TRAINED


def pack_sample(row: SampleRow, x: Array, probabilities_C: Array, sample_id: str) -> bytes:
    """The row of a sample with its payload."""
    encoded = _encoded(sample_id)
    probabilities = probabilities_C.astype(_PROBABILITY, copy=False).tobytes()
    return b"".join((_SAMPLE.pack(*row, len(encoded)), np.ascontiguousarray(x).data, probabilities, encoded))


def without_payload(data: bytes, payload_bytes: int) -> bytes:
    """The row without its payload, as `evicted` holds it."""
    return data[:PAYLOAD_AT] + data[PAYLOAD_AT + payload_bytes :]


def unpack_sample(data: bytes) -> SampleRow:
    """The head of a row of `samples` or `evicted`."""
    return SampleRow._make(_SAMPLE.unpack_from(data)[:-1])


def unpack_answers(data: bytes, payload_bytes: int) -> Answers:
    """The answers in a row of `samples` or `evicted`, without a published one; `payload_bytes` is 0 for the latter."""
    *_, arrived_s, version, predicted, student, majority, no_change, id_bytes = _SAMPLE.unpack_from(data)
    start = PAYLOAD_AT + payload_bytes
    count = (len(data) - start - id_bytes) // _PROBABILITY.itemsize
    # The constructor takes half the time of `frombuffer`.
    probabilities_C: Probabilities = np.ndarray((count,), _PROBABILITY, data, start)
    return arrived_s, student, Prediction(predicted, probabilities_C, version), majority, no_change, None


def pack_answer(answer: Prediction) -> bytes:
    """The row of `answers`."""
    probabilities = answer.probabilities_C.astype(_PROBABILITY, copy=False).tobytes()
    return _ANSWER.pack(answer.model_version, answer.class_index) + probabilities


def unpack_answer(row: bytes) -> Prediction:
    """The inverse of `pack_answer`."""
    version, class_index = _ANSWER.unpack_from(row)
    return Prediction(class_index, np.frombuffer(row, _PROBABILITY, offset=_ANSWER.size), version)


class Payloads:
    """Finds the payload in a row of `samples`. With columns it may be one of fewer columns: those at its time."""

    def __init__(self, schema: Schema) -> None:
        self._schema, self._shape, self._dtype, self._nbytes = schema, schema.shape, schema.dtype, schema.nbytes
        self._probabilities_bytes = schema.capacity * _PROBABILITY.itemsize

    def size(self, data: bytes) -> int:
        """In bytes."""
        if not self._schema.columns:
            return self._nbytes
        *_, id_bytes = _SAMPLE.unpack_from(data)
        return len(data) - PAYLOAD_AT - self._probabilities_bytes - int(id_bytes)

    def read(self, data: bytes) -> Array:
        """The payload, read-only; columns that were added since are missing."""
        size = self.size(data)
        if size == self._nbytes:
            return np.ndarray(self._shape, self._dtype, data, PAYLOAD_AT)
        return self._schema.padded(np.ndarray((size // self._dtype.itemsize,), self._dtype, data, PAYLOAD_AT))


def unpack_id(data: bytes) -> str:
    """The sample id in a row of `samples` or `evicted`."""
    *_, id_bytes = _SAMPLE.unpack_from(data)
    return data[len(data) - id_bytes :].decode("utf-8", "surrogatepass")


def key_of(sample_id: str) -> bytes:
    """A 128-bit hash: two of ten million ids collide with a probability of 1e-25."""
    return hashlib.blake2b(_encoded(sample_id), digest_size=16).digest()


def _encoded(sample_id: str) -> bytes:
    return sample_id.encode("utf-8", "surrogatepass")
