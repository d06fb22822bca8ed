"""The samples that the ledger knows: what was predicted of each, and its payload while the ring or the log has it.

    topics   number → topic name
    ids      hash of a sample id → its row
    samples  ring of rows with payloads      bare   ring of those whose payload has left, under the same numbers

Prediction and payload lie in one row, since a join wants both and each walk to a random row waits for memory.

An id is taken once while it is known: the same id again is refused by the caller. One id stands in one partition, where
records keep their order, so which of two is the first does not depend on how partitions are read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from streamlearn.ledger.rows import (
    PAYLOAD_AT,
    Counters,
    Said,
    SampleRow,
    pack_sample,
    unpack_arrival,
    unpack_id,
    unpack_said,
    unpack_sample,
    without_payload,
)
from streamlearn.ledger.store import Store, Table, number
from streamlearn.records import Array, Position, Prediction, Sample, Schema

FAR_AHEAD_S = 30 * 86_400.0
"""No clock that is right is so far ahead of the stream."""


class Topics:
    """Topic names as small numbers, given as they come."""

    def __init__(self, table: Table) -> None:
        self._table = table
        self._names: list[str] = []
        self._numbers: dict[str, int] = {}
        self.load()

    def load(self) -> None:
        """Take the names from the table."""
        self._names = [name.decode() for _, name in self._table.items()]
        self._numbers = {name: row for row, name in enumerate(self._names)}

    def place(self, position: Position) -> tuple[int, int, int]:
        """A position with its topic as a number."""
        topic = self._numbers.get(position.topic)
        if topic is None:
            topic = self._numbers[position.topic] = len(self._names)
            self._names.append(position.topic)
            self._table.insert(number(topic), position.topic.encode())
        return topic, position.partition, position.offset

    def name(self, topic: int) -> str:
        """The name of a number. Numbers go by what was read first: order by names."""
        return self._names[topic]


class Known(NamedTuple):
    """A known sample."""

    number: bytes
    """Its row."""
    said: Said
    x: Array | None = None
    """The payload, where it is in the ring or has just come."""

    @property
    def arrived_s(self) -> float:
        """When it came."""
        return self.said[0]


class Samples:
    """Ids, predictions and payloads in the store of the ledger. `counters` are the ledger's, set anew when it loads."""

    def __init__(
        self, store: Store, topics: Topics, schema: Schema, read_back: Callable[[Position, str], Array | None]
    ) -> None:
        self.counters = Counters()
        self._topics, self._schema, self._read_back = topics, schema, read_back
        self._ids = store.tables["ids"]
        self._rows, self._bare = store.rings["samples"], store.rings["bare"]

    def has(self, key: bytes) -> bool:
        """Whether the sample is known."""
        return self.row_of(key) is not None

    def append(self, key: bytes, sample: Sample, prediction: Prediction, student_class: int) -> Known:
        """Remember a new sample, under the hash of its id."""
        c, schema, x = self.counters, self._schema, sample.x
        assert x.shape == schema.shape, f"{sample.position}: {x.shape}, wanted {schema.shape}"
        assert x.dtype == schema.dtype, f"{sample.position}: {x.dtype}, wanted {schema.dtype}"
        class_index, probabilities_C, version = prediction
        assert probabilities_C.shape == (schema.capacity,), probabilities_C.shape
        arrived_s, row_number, baselines = sample.timestamp_s, number(c.high), (c.majority_class, c.last_class)
        place = self._topics.place(sample.position)
        row = SampleRow(key, *place, arrived_s, version, class_index, student_class, *baselines)
        self._ids.insert(key, row_number)
        self._rows.append(row_number, pack_sample(row, x, probabilities_C, sample.sample_id))
        c.high += 1
        return Known(row_number, (arrived_s, student_class, prediction, *baselines), x)

    def row_of(self, key: bytes) -> bytes | None:
        """The row of a known sample."""
        return self._ids.get(key)

    def find(self, key: bytes) -> Known | None:
        """A known sample, its prediction, and its payload where that has not left the ring."""
        row_number = self._ids.get(key)
        return None if row_number is None else self.at(row_number)

    def fetch(self, keys: Sequence[bytes]) -> list[tuple[bytes, Said, Array] | None]:
        """Many samples, as `Known`, with their payloads, from the ring; None where either is not there."""
        ids, low = self._ids.fetch(keys), number(self.counters.payload_low)
        numbers = [row if (row := ids[key]) is not None and row >= low else None for key in keys]
        shape, dtype, nbytes = self._schema.shape, self._schema.dtype, self._schema.nbytes
        return [
            None
            if row is None or data is None
            else (row, unpack_said(data, nbytes), np.ndarray(shape, dtype, data, PAYLOAD_AT))
            for row, data in zip(numbers, self._rows.fetch(numbers), strict=True)
        ]

    def at(self, row_number: bytes) -> Known:
        """The sample of a row, with its payload where that has not left the ring."""
        data = self._rows.get(row_number)
        if data is None:
            return Known(row_number, unpack_said(self._row(row_number), 0))
        schema, x = self._schema, None
        if row_number >= number(self.counters.payload_low):
            x = np.ndarray(schema.shape, schema.dtype, data, PAYLOAD_AT)
        return Known(row_number, unpack_said(data, schema.nbytes), x)

    def id_of(self, row_number: bytes) -> str:
        """The id of the sample of a row."""
        return unpack_id(self._row(row_number))

    def newest(self) -> tuple[Position, str] | None:
        """Where the last sample stands in the log, and its id; None where none is known."""
        if self.counters.high == self.counters.id_low:
            return None
        data = self._row(number(self.counters.high - 1))
        row = unpack_sample(data)
        return Position(self._topics.name(row.topic), row.partition, row.offset), unpack_id(data)

    def arrived(self, row_number: bytes) -> tuple[bytes, float]:
        """Key and time of the sample of a row."""
        return unpack_arrival(self._row(row_number))

    def _row(self, row_number: bytes) -> bytes:
        data = self._rows.get(row_number) or self._bare.get(row_number)
        assert data is not None, "a sample left before its time"
        return data

    def payload(self, known: Known) -> Array | None:
        """The payload from the ring or else from the log, read-only; None where it is nowhere any more.

        Raises:
            LogUnavailableError: the log cannot say for now.
        """
        if known.x is not None:
            return known.x
        assert known.number < number(self.counters.payload_low), "a payload left before its time"
        data, schema = self._row(known.number), self._schema
        row = unpack_sample(data)
        x = self._read_back(Position(self._topics.name(row.topic), row.partition, row.offset), unpack_id(data))
        assert x is None or (x.shape == schema.shape and x.dtype == schema.dtype), "read back wrongly"
        return x

    def overwrite_payload(self, row_number: bytes) -> None:
        """Fill the payload with zeros, where it is on the disk. Not undone: nobody may rewind to need it."""
        data = self._rows.get(row_number)
        if data is not None:
            ends = PAYLOAD_AT + self._schema.nbytes
            self._rows.overwrite(row_number, data[:PAYLOAD_AT] + bytes(self._schema.nbytes) + data[ends:])

    def is_young(self, arrived_s: float, oldest_s: float) -> bool:
        """Whether a sample that is the oldest by its row is not old by its time.

        One of a clock that is far ahead goes with those before it, or all that came after it would wait for that time.
        """
        return oldest_s <= arrived_s <= self.counters.now_s + FAR_AHEAD_S

    def expire_payloads(self, most: int) -> None:
        """Keep the payloads of the newest `most` samples."""
        self.counters.payload_low = max(self.counters.payload_low, self.counters.high - most)

    def expire_ids(self, limit: int, *, most: int, oldest_s: float) -> list[bytes]:
        """Forget the oldest samples that are too many or too old, at most `limit`; their rows."""
        c, forgotten = self.counters, []
        for _ in range(limit):
            if c.id_low == c.high:
                break
            row_number = number(c.id_low)
            key, arrived_s = self.arrived(row_number)
            if c.high - c.id_low <= most and self.is_young(arrived_s, oldest_s):
                break
            self._ids.delete(key)
            forgotten.append(row_number)
            c.id_low += 1
        c.payload_low = max(c.payload_low, c.id_low)
        c.implied_low = max(c.implied_low, c.id_low)
        return forgotten

    def cut(self) -> None:
        """Remove rows that a rewind has unmade."""
        self._rows.cut(self.counters.high)

    def trim(self, then: Counters) -> None:
        """Remove from the disk the rows and payloads that were let go when the counters stood like this."""
        self._rows.trim(then.id_low)
        self._bare.trim(then.id_low)
        self._rows.move(then.payload_low, self._bare, lambda row: without_payload(row, self._schema.nbytes))
