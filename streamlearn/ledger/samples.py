"""The samples that the ledger knows: what was predicted on arrival, and the payload while ring or log holds it.

    topics   number → topic name
    ids      hash of a sample id → row number
    samples  ring of rows with payload
    evicted  ring of rows whose payload was evicted, under the same numbers
    erased   row number → the step that erased the sample
    answers  row number → the answer that was published, if it came before the label

Prediction and payload are in one row, since a join needs both and each lookup of a random row waits for memory.

A known id is refused by the caller. All samples of one id are in one partition, so which of them is the first does not
depend on the order in which partitions are read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from streamlearn.ledger.rows import (
    PAYLOAD_AT,
    Answers,
    Counters,
    Payloads,
    SampleRow,
    pack_answer,
    pack_sample,
    unpack_answer,
    unpack_answers,
    unpack_id,
    unpack_sample,
    without_payload,
)
from streamlearn.ledger.store import Store, Table
from streamlearn.records import Array, Position, Prediction, Sample, Schema

FAR_AHEAD_S = 30 * 86_400.0
"""A sample whose time is further ahead of the watermark has a wrong clock."""


class TopicNumbers:
    """Numbers of topic names, in the order of their first use."""

    def __init__(self, table: Table[int, str]) -> None:
        self._table = table
        self._names: list[str] = []
        self._numbers: dict[str, int] = {}

    def load(self) -> None:
        """Read the names from the table."""
        self._names = [name for _, name in self._table.items()]
        self._numbers = {name: row for row, name in enumerate(self._names)}

    def place(self, position: Position) -> tuple[int, int, int]:
        """A position with its topic as a number."""
        topic = self._numbers.get(position.topic)
        if topic is None:
            topic = self._numbers[position.topic] = len(self._names)
            self._names.append(position.topic)
            self._table.insert(topic, position.topic)
        return topic, position.partition, position.offset

    def name(self, topic: int) -> str:
        """The name of a topic. Numbers depend on the order of reading: sort by names."""
        return self._names[topic]

    def position(self, topic: int, partition: int, offset: int) -> Position:
        """The inverse of `place`."""
        return Position(self._names[topic], partition, offset)


class Known(NamedTuple):
    """A known sample."""

    row: int
    answers: Answers
    x: Array | None = None
    """The payload, unless it was evicted."""

    @property
    def arrived_s(self) -> float:
        """Log time of the sample."""
        return self.answers[0]


class Samples:
    """Ids, predictions and payloads in the store of the ledger."""

    def __init__(
        self,
        store: Store,
        counters: Counters,
        topics: TopicNumbers,
        schema: Schema,
        read_back: Callable[[Position, str], Array | None],
    ) -> None:
        self._c, self._topics, self._schema, self._read_back = counters, topics, schema, read_back
        self._payloads = Payloads(schema)
        self._ids: Table[bytes, int] = store.tables["ids"]
        self._erased: Table[int, int] = store.tables["erased"]
        self._published: Table[int, bytes] = store.tables["answers"]
        self._any_published = False
        """Else a join is spared the look-up."""
        self._rows, self._evicted = store.rings["samples"], store.rings["evicted"]

    def load(self) -> None:
        """Read from the table whether any answer was published."""
        self._any_published = self._published.first() is not None

    def append(
        self, key: bytes, sample: Sample, prediction: Prediction, student_class: int, published: Prediction | None
    ) -> Known:
        """Add a new sample, under the hash of its id."""
        c, schema, x = self._c, self._schema, sample.x
        assert x.shape == schema.shape, f"{sample.position}: {x.shape}, expected {schema.shape}"
        assert x.dtype == schema.dtype, f"{sample.position}: {x.dtype}, expected {schema.dtype}"
        class_index, probabilities_C, version = prediction
        assert probabilities_C.shape == (schema.capacity,), probabilities_C.shape
        arrived_s, row_number, baselines = sample.timestamp_s, c.high, (c.majority_class, c.last_class)
        place = self._topics.place(sample.position)
        row = SampleRow(key, *place, arrived_s, version, class_index, student_class, *baselines)
        self._ids.insert(key, row_number)
        self._rows.append(row_number, pack_sample(row, x, probabilities_C, sample.sample_id))
        c.high += 1
        if published is not None:
            self.publish(row_number, published)
        return Known(row_number, (arrived_s, student_class, prediction, *baselines, published), x)

    def publish(self, row_number: int, answer: Prediction) -> None:
        """Add the answer that was published for a sample."""
        self._published.put(row_number, pack_answer(answer))
        self._any_published = True

    def is_published(self, row_number: int) -> bool:
        """Whether a published answer of the sample is known."""
        return self._any_published and self._published.get(row_number) is not None

    def numbers(self, keys: Sequence[bytes]) -> Mapping[bytes, int | None]:
        """The row numbers of samples; None for one that is not known."""
        return self._ids.fetch(keys)

    def row_of(self, key: bytes) -> int | None:
        """The row number of a sample; None if it is not known."""
        return self._ids.get(key)

    def find(self, key: bytes) -> Known | None:
        """A sample by the hash of its id."""
        row_number = self._ids.get(key)
        return None if row_number is None else self.at(row_number)

    def fetch(self, keys: Sequence[bytes]) -> list[tuple[int, Answers, Array] | None]:
        """Many samples as (row number, answers, payload); None if the sample or its payload is not in the ring."""
        ids, low = self._ids.fetch(keys), self._c.payload_low
        numbers = [-1 if (row := ids[key]) is None or row < low else row for key in keys]
        rows, payloads = self._rows.fetch(numbers), self._payloads
        if self._any_published:
            self._published.fetch(numbers)
        return [
            None
            if (data := rows.get(row)) is None
            else (row, self._answers(row, data, payloads.size(data)), payloads.read(data))
            for row in numbers
        ]

    def rows_at(self, samples: Sequence[tuple[bytes, Position]]) -> list[int | None]:
        """The row numbers of samples by the hash of their id, of those that were read at these positions."""
        ids = self._ids.fetch([key for key, _ in samples])
        rows = self._rows.fetch([row for key, _ in samples if (row := ids[key]) is not None])
        found: list[int | None] = []
        for key, position in samples:
            row_number = ids[key]
            if row_number is not None:
                head = unpack_sample(rows.get(row_number) or self._row(row_number))
                if self._topics.position(head.topic, head.partition, head.offset) != position:
                    row_number = None
            found.append(row_number)
        return found

    def at(self, row_number: int) -> Known:
        """The sample of a row."""
        data = self._rows.get(row_number)
        if data is None:
            return Known(row_number, self._answers(row_number, self._row(row_number), 0))
        x = self._payloads.read(data) if row_number >= self._c.payload_low else None
        return Known(row_number, self._answers(row_number, data, self._payloads.size(data)), x)

    def _answers(self, row_number: int, data: bytes, payload_bytes: int) -> Answers:
        """The answers in a row, with the published one."""
        answers = unpack_answers(data, payload_bytes)
        published = self._published.get(row_number) if self._any_published else None
        return answers if published is None else (*answers[:5], unpack_answer(published))

    def head(self, row_number: int) -> SampleRow:
        """The head of a row."""
        return unpack_sample(self._row(row_number))

    def position_and_id(self, row_number: int) -> tuple[Position, str]:
        """Position and sample id of a row."""
        row = self.head(row_number)
        return self._topics.position(row.topic, row.partition, row.offset), unpack_id(self._row(row_number))

    def payload(self, known: Known) -> Array | None:
        """The payload from the ring or else from the log, read-only; None if neither holds it.

        Raises:
            LogUnavailableError: the log cannot be read now.
        """
        if known.x is not None:
            return known.x
        assert known.row < self._c.payload_low, "a payload is missing from the ring"
        x, schema = self._read_back(*self.position_and_id(known.row)), self._schema
        assert x is None or (x.shape == schema.shape and x.dtype == schema.dtype), "the log returned another payload"
        return x

    def _row(self, row_number: int) -> bytes:
        data = self._rows.get(row_number) or self._evicted.get(row_number)
        assert data is not None, "a known sample has no row"
        return data

    # -- erasure and expiry

    def erase(self, row_number: int, step: int) -> None:
        """Note that `step` erased a sample. Its payload is overwritten by `prune`."""
        if self._erased.get(row_number) is None:
            self._erased.put(row_number, step)

    def is_recent(self, arrived_s: float, oldest_s: float) -> bool:
        """Whether the oldest sample is to be kept by its time.

        A sample whose time is far ahead is not: it would keep all that arrived after it until that time.
        """
        return oldest_s <= arrived_s <= self._c.now_s + FAR_AHEAD_S

    def expire(self, limit: int, *, most: int, oldest_s: float) -> list[int]:
        """Remove samples beyond `most` or older than `oldest_s`, oldest first, at most `limit`; their row numbers."""
        c, removed = self._c, []
        for _ in range(limit):
            if c.id_low == c.high:
                break
            oldest = self.head(c.id_low)
            if c.high - c.id_low <= most and self.is_recent(oldest.arrived_s, oldest_s):
                break
            self._ids.delete(oldest.key)
            if self._any_published:
                self._published.delete(c.id_low)
            if c.erased:
                self._erased.delete(c.id_low)
            removed.append(c.id_low)
            c.id_low += 1
        c.payload_low = max(c.payload_low, c.id_low)
        c.implied_low = max(c.implied_low, c.id_low)
        return removed

    def prune(self, then: Counters, *, erased_after: int, until: int) -> None:
        """Remove from disk what no rewind can need. `then`: the counters at the end of step `until`.

        That is rows and payloads that were expired then, and payloads erased in steps (erased_after, until].
        """
        for row_number, step in self._erased.items():
            data = self._rows.get(row_number) if erased_after < step <= until else None
            if data is not None:
                zeros = bytes(self._payloads.size(data))
                self._rows.overwrite(row_number, data[:PAYLOAD_AT] + zeros + data[PAYLOAD_AT + len(zeros) :])
        self._rows.trim(then.id_low)
        self._evicted.trim(then.id_low)
        self._rows.move(then.payload_low, self._evicted, lambda row: without_payload(row, self._payloads.size(row)))
