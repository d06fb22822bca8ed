"""How the ledger writes its rows into the store, and reads them: counters, samples, labels.

Integers and floats are little-endian and packed. Another layout is another format of the store (`store.FORMAT`).
"""

from __future__ import annotations

import bisect
import hashlib
import struct
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, field
from typing import ClassVar, NamedTuple, TypeAlias

import numpy as np

from streamlearn.ledger import LabelState
from streamlearn.records import ERASED, RETRACTED, Array, Prediction, Probabilities

KEPT_RECORDS = 16
"""Most label records of one sample that are remembered: the first in order, and the last ones."""
SCORED, EVER_TRAINED, CORRECTED, FORGOTTEN = 1, 2, 4, 8
"""Flags of a LabelRow. FORGOTTEN: there were more records between the first that is kept and the second."""
WITHDRAWN = {RETRACTED: LabelState.RETRACTED, ERASED: LabelState.ERASED}
"""The disposition of a record without a class."""
_FURTHER = (*WITHDRAWN.values(), LabelState.DUPLICATE, LabelState.CORRECTED)
_STATES = (LabelState.WAITING, LabelState.JOINED, LabelState.EXPIRED, LabelState.ORPHAN, LabelState.RETRACTED)
_NUMBERS = {state: number for number, state in enumerate(_STATES)}
_JOINED = _NUMBERS[LabelState.JOINED]
_SAMPLE = struct.Struct("<16sHiqdqiiiiH")
PAYLOAD_AT = _SAMPLE.size
"""Where the payload begins in a row: at a multiple of 16 bytes, so that no array is unaligned."""
assert PAYLOAD_AT % 16 == 0, PAYLOAD_AT
_PROBABILITY = np.dtype("<f4")
_ARRIVED = struct.Struct("<16s14xd")
_PREDICTED = struct.Struct("<30xdqiiiiH")
"""What a join reads of a sample: all but the key and the place."""
_RECORD = struct.Struct("<dHiqi")
_HEAD = struct.Struct("<BBq")
"""What every LabelRow begins with: state, flags, trained_step."""
_ROW = struct.Struct("<BBqBiq")
_ROW_OF_ONE = struct.Struct("<BBqdHiqi")
"""A LabelRow with its only record and not in the queue, as almost all are. Short, since labels come for samples
far apart, and a commit writes whole pages of them."""
assert (_ROW_OF_ONE.size - _ROW.size) % _RECORD.size, "the two are told apart by their size"


@dataclass(slots=True)
class Counters:
    """The row of `counts`. Rings: rows in [low, high)."""

    now_s: float = 0.0
    high: int = 0
    payload_low: int = 0
    id_low: int = 0
    implied_low: int = 0
    """Samples below were looked at for the implied class."""
    queue_high: int = 0
    queued: int = 0
    held_high: int = 0
    held_seen: int = 0
    """Held labels below were looked at for a class that is known by now."""
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

    LAYOUT: ClassVar[struct.Struct] = struct.Struct("<d24q")

    def pack(self) -> bytes:
        """The row."""
        return self.LAYOUT.pack(*astuple(self))

    @classmethod
    def unpack(cls, row: bytes | None) -> Counters:
        """From the row; the initial ones before there is a row."""
        return cls() if row is None else cls(*cls.LAYOUT.unpack(row))


class SampleRow(NamedTuple):
    """The head of a sample's row. The payload follows, unless it has left; probabilities as float32[C]; the id."""

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
    """When the log took it."""
    topic: int
    partition: int
    offset: int
    class_index: int
    """RETRACTED or ERASED where it withdraws the labels of the sample."""

    @property
    def place(self) -> tuple[int, int, int]:
        """Where it stands in the log."""
        return self.topic, self.partition, self.offset


Said: TypeAlias = tuple[float, int, Prediction, int, int]
"""When a sample came, and what was said of it then: time, student's class, teacher's answer, majority's class and
no-change's. A plain tuple: one is made for every label, and one with names costs several times as much."""
Order: TypeAlias = Callable[[LabelRecord], tuple[float, str, int, int]]
"""What label records are sorted by: time and position, the topic by its name."""


class Placed(NamedTuple):
    """The disposition of a record among those of its sample, and how it moves the counters."""

    disposition: LabelState | None
    """RETRACTED, ERASED, DUPLICATE or CORRECTED; None of the first label, which carries the state."""
    duplicates: int
    corrections: int


@dataclass(slots=True)
class LabelRow:
    """The label of one sample: the records that said it, in their order, and what follows from them.

    Without any record the class is an implied one.
    """

    state: LabelState
    """Of the first label; RETRACTED where there is none, so that no record carries a state."""
    class_index: int
    """The class that counts; RETRACTED or ERASED where none does."""
    records: list[LabelRecord] = field(default_factory=list)
    flags: int = 0
    counting: int = 0
    """Which of the records is the one that counts."""
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
        """From the row of `labels`."""
        if len(row) == _ROW_OF_ONE.size:
            state, flags, trained_step, *fields = _ROW_OF_ONE.unpack(row)
            record = LabelRecord._make(fields)
            return cls(_STATES[state], record.class_index, [record], flags, trained_step=trained_step)
        state, flags, trained_step, counting, class_index, queue_row = _ROW.unpack_from(row)
        records = [LabelRecord._make(fields) for fields in _RECORD.iter_unpack(row[_ROW.size :])]
        return cls(_STATES[state], class_index, records, flags, counting, queue_row, trained_step)

    @property
    def deciding(self) -> LabelRecord | None:
        """The record that counts; None where the class is implied."""
        return self.records[self.counting] if self.records else None

    def holds(self, place: tuple[int, int, int]) -> bool:
        """Whether the very record was taken before, and is still remembered."""
        return any(record.place == place for record in self.records)

    def insert(self, record: LabelRecord, order: Order, *, last_counts: bool) -> Placed:
        """Put a record in its place among the others, and let the class that counts follow.

        The last record counts, or the first one by the policy of corrections; with that policy a retraction is final,
        and an erasure is with both.

        Each retraction and each erasure is counted as one. The first label carries the state, and each further one is a
        duplicate or a correction of the record before it. So the counters depend on which records there are and not on
        how they came. Past `KEPT_RECORDS` the second one is forgotten, or the third where the second is the one that
        counts: the one that counts is never. A record that belongs where others were forgotten is compared with
        the one before, and forgotten as well.
        """
        records = self.records
        at = bisect.bisect_left(records, order(record), key=order)
        gap = bool(self.flags & FORGOTTEN) and (at == 1 or at == 2 == self.counting + 1)
        had_label = self.state is not LabelState.RETRACTED and bool(records)
        if records and records[0].class_index != record.class_index:  # where the flag is not set yet, all are alike
            self.flags |= CORRECTED
        before = _dispositions(records)
        records.insert(at, record)
        after = _dispositions(records)
        if gap and at < len(before):
            after[at + 1] = before[at]
        moved = {kind: after.count(kind) - before.count(kind) for kind in (*_FURTHER, None)}
        disposition = after[at]
        if had_label and moved[None]:  # the first label was forgotten
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
        """An erasure, else the last record; or by the other policy an erasure, else a retraction, else the first."""
        last = len(self.records) - 1
        classes = [record.class_index for record in self.records]
        for final in (ERASED,) if last_counts else (ERASED, RETRACTED):
            if final in classes:
                return last - classes[::-1].index(final)
        return last if last_counts else 0

    @property
    def progress(self) -> LabelState:
        """How far the label has come, as it is told to others."""
        if self.class_index < 0:
            return WITHDRAWN[self.class_index]
        if self.state is not LabelState.JOINED:
            return self.state
        if self.trained_step:
            return LabelState.TRAINED
        return LabelState.SCORED if self.flags & SCORED else LabelState.JOINED


def _dispositions(records: Sequence[LabelRecord]) -> list[LabelState | None]:
    """Of each record, in their order; None of the first label."""
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
    """The row of a label that its only record has joined with its sample."""
    return _ROW_OF_ONE.pack(_JOINED, SCORED if scored else 0, 0, time_s, topic, partition, offset, class_index)


def trained_in(row: bytes, step: int) -> tuple[bytes, bool] | None:
    """The row of a label that `step` learned, and whether it is the first; None where it had not to be learned.

    The records are not looked at, since every label passes here.
    """
    state, flags, trained_step = _HEAD.unpack_from(row)
    if state != _JOINED or trained_step:
        return None
    return _HEAD.pack(state, flags | EVER_TRAINED, step) + row[_HEAD.size :], not flags & EVER_TRAINED


def pack_sample(row: SampleRow, x: Array, probabilities_C: Array, sample_id: str) -> bytes:
    """The row of `samples`."""
    encoded = _encoded(sample_id)
    probabilities = probabilities_C.astype(_PROBABILITY, copy=False).tobytes()
    return b"".join((_SAMPLE.pack(*row, len(encoded)), np.ascontiguousarray(x).data, probabilities, encoded))


def without_payload(data: bytes, payload_bytes: int) -> bytes:
    """The row of `bare`, of that of `samples`."""
    return data[:PAYLOAD_AT] + data[PAYLOAD_AT + payload_bytes :]


def unpack_sample(data: bytes) -> SampleRow:
    """The head of a row of `samples` or `bare`."""
    return SampleRow._make(_SAMPLE.unpack_from(data)[:-1])


def unpack_said(data: bytes, payload_bytes: int) -> Said:
    """Of such a row, with so much payload in it."""
    arrived_s, version, predicted, student, majority, no_change, id_bytes = _PREDICTED.unpack_from(data)
    start = PAYLOAD_AT + payload_bytes
    count = (len(data) - start - id_bytes) // _PROBABILITY.itemsize
    # The constructor itself: half of what `frombuffer` costs.
    probabilities_C: Probabilities = np.ndarray((count,), _PROBABILITY, data, start)
    return arrived_s, student, Prediction(predicted, probabilities_C, version), majority, no_change


def unpack_id(data: bytes) -> str:
    """Of such a row, the sample's id."""
    *_, id_bytes = _SAMPLE.unpack_from(data)
    return data[len(data) - id_bytes :].decode("utf-8", "surrogatepass")


def unpack_arrival(data: bytes) -> tuple[bytes, float]:
    """Of such a row, its key and when it arrived."""
    key, arrived_s = _ARRIVED.unpack_from(data)
    return key, arrived_s


def key_of(sample_id: str) -> bytes:
    """128 bits: two of ten million ids collide with a chance of 1e-25."""
    return hashlib.blake2b(_encoded(sample_id), digest_size=16).digest()


def _encoded(sample_id: str) -> bytes:
    return sample_id.encode("utf-8", "surrogatepass")
