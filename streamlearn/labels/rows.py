"""How the ledger writes its rows into the store, and reads them: counters, samples, labels.

Integers and floats are little-endian and packed. Another layout is another format of the store (`store.FORMAT`).
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import astuple, dataclass
from typing import ClassVar, NamedTuple

import numpy as np

from streamlearn.labels import LabelState
from streamlearn.records import Array, Prediction

KEPT_PLACES = 16
"""Most label records of one sample whose positions are remembered: the first, and the newest."""
PLACE = struct.Struct("<Hiq")
"""Where a record stands in the log: topic number, partition, offset."""
SCORED, EVER_TRAINED, CORRECTED = 1, 2, 4
"""Flags of a LabelRow."""
_STATES = (LabelState.WAITING, LabelState.JOINED, LabelState.EXPIRED, LabelState.ORPHAN)
_SAMPLE = struct.Struct("<16sHiqdqiiii")
_ARRIVED = struct.Struct("<16s14xd")


@dataclass(slots=True)
class Counters:
    """The row of `counts`. Rings: rows in [low, high)."""

    now_s: float = 0.0
    high: int = 0
    payload_low: int = 0
    id_low: int = 0
    queue_high: int = 0
    queued: int = 0
    waiting: int = 0
    read: int = 0
    joined: int = 0
    scored: int = 0
    trained: int = 0
    duplicate: int = 0
    corrected: int = 0
    expired: int = 0
    orphan: int = 0
    majority_class: int = -1
    last_class: int = -1

    LAYOUT: ClassVar[struct.Struct] = struct.Struct("<d16q")

    def pack(self) -> bytes:
        """The row."""
        return self.LAYOUT.pack(*astuple(self))

    @classmethod
    def unpack(cls, row: bytes | None) -> Counters:
        """From the row; the initial ones before there is a row."""
        return cls() if row is None else cls(*cls.LAYOUT.unpack(row))


class SampleRow(NamedTuple):
    """What is known of a sample besides its payload. Probabilities follow as float32[C]."""

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


@dataclass(slots=True)
class LabelRow:
    """The label of one sample; the positions of its records follow, that of the label that counts first."""

    state: LabelState
    flags: int
    class_index: int
    queue_row: int
    time_s: float
    trained_step: int
    places: list[bytes]

    LAYOUT: ClassVar[struct.Struct] = struct.Struct("<BBiqdq")

    def pack(self) -> bytes:
        """The row of `labels`."""
        head = self.LAYOUT.pack(
            _STATES.index(self.state), self.flags, self.class_index, self.queue_row, self.time_s, self.trained_step
        )
        return b"".join((head, *self.places))

    @classmethod
    def unpack(cls, row: bytes) -> LabelRow:
        """From the row of `labels`."""
        state, flags, class_index, queue_row, time_s, trained_step = cls.LAYOUT.unpack_from(row)
        places = [row[at : at + PLACE.size] for at in range(cls.LAYOUT.size, len(row), PLACE.size)]
        return cls(_STATES[state], flags, class_index, queue_row, time_s, trained_step, places)

    def add_place(self, place: bytes, *, first: bool = False) -> None:
        """Remember one more record; `first`: it is the one that counts now."""
        self.places.insert(0 if first else len(self.places), place)
        if len(self.places) > KEPT_PLACES:
            del self.places[1]

    @property
    def progress(self) -> LabelState:
        """How far the label has come, as it is told to others."""
        if self.state is not LabelState.JOINED:
            return self.state
        if self.trained_step:
            return LabelState.TRAINED
        return LabelState.SCORED if self.flags & SCORED else LabelState.JOINED


def pack_sample(row: SampleRow, probabilities_C: Array) -> bytes:
    """The row of `samples`."""
    return _SAMPLE.pack(*row) + probabilities_C.astype("<f4", copy=False).tobytes()


def unpack_sample(data: bytes) -> tuple[SampleRow, Prediction]:
    """The row of `samples`, and what was predicted."""
    row = SampleRow(*_SAMPLE.unpack_from(data))
    probabilities_C = np.frombuffer(data, "<f4", offset=_SAMPLE.size)
    return row, Prediction(row.predicted_class, probabilities_C, row.model_version)


def unpack_arrival(data: bytes) -> tuple[bytes, float]:
    """Of the row of `samples`, its key and when it arrived."""
    key, arrived_s = _ARRIVED.unpack_from(data)
    return key, arrived_s


def key_of(sample_id: str) -> bytes:
    """128 bits: two of ten million ids collide with a chance of 1e-25."""
    return hashlib.blake2b(sample_id.encode("utf-8", "surrogatepass"), digest_size=16).digest()
