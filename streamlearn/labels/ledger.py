"""What became of each label: joined with its sample, waiting for it, scored, trained, and every way to go wrong.

A fold over the log, kept on disk (`store`): the caller opens a step, shows the ledger that step's samples and labels in
their order, ends it. After a crash it rewinds to the checkpoint's step and shows the same again, with the same result.
Time is the stream's (`now_s`), never the wall clock. Every label record ends in one disposition, counted once:

    read == joined + waiting + duplicate + corrected + expired + orphan

    topics   number → topic name              ids      hash of a sample id → its row
    labels   hash of a sample id → LabelRow   queue    number → hash of an id whose label waits, oldest first
    samples  ring of SampleRow                payloads ring of payload bytes, under the same row numbers
    counts   one row of counters, and what the baselines know

The rows are laid out in `rows`.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable
from dataclasses import fields
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from streamlearn.errors import StoreError
from streamlearn.labels import Arrival, LabelState, LedgerCounts, Scored
from streamlearn.labels.rows import (
    CORRECTED,
    EVER_TRAINED,
    PLACE,
    SCORED,
    Counters,
    LabelRow,
    SampleRow,
    key_of,
    pack_sample,
    unpack_arrival,
    unpack_sample,
)
from streamlearn.labels.store import Store, number
from streamlearn.records import Array, Example, Label, Position, Prediction, Sample, Schema

EXPIRE_PER_STEP = 4096
"""Most rows that one step lets go of (or twice its arrivals): a stream silent for long must not stall a step."""
UNFLUSHED_BYTES = 64 << 20
"""Payloads held in memory by the open transaction before it flushes itself."""


class _Known(NamedTuple):
    """A known sample; `x` is None where its payload is nowhere any more."""

    row: SampleRow
    prediction: Prediction
    x: Array | None


class Ledger:
    """Joins labels with samples. One learner, one thread; see `view.LedgerView` for everybody else.

    Raises:
        StateLockedError: another learner has it open.
        StoreError: it is of another format or another schema; here and from every method, it cannot be written.
    """

    def __init__(
        self,
        path: Path,
        *,
        schema: Schema,
        read_back: Callable[[Position], Array | None],
        payload_max_bytes: int,
        payload_max_age_s: float,
        horizon_s: float,
        max_ids: int,
        corrections: Literal["last", "first"] = "last",
    ) -> None:
        self._schema = schema
        self._read_back = read_back
        self._payload_rows = max(payload_max_bytes // schema.nbytes, 1)
        self._payload_max_age_s = payload_max_age_s
        self._horizon_s = horizon_s
        self._max_ids = max_ids
        self._classes_changed = False
        self._last_counts = corrections == "last"
        # Sparse: only what is used takes disk. Twice the payloads for pages half filled, and room for what a checkpoint
        # still holds; 1 KB and the probabilities for an id with all its rows.
        map_size = 4 * payload_max_bytes + max_ids * (1024 + 8 * len(schema.classes)) + (16 << 30)
        self._store = Store(
            path,
            tables=("counts", "topics", "ids", "labels", "queue"),
            rings=("samples", "payloads"),
            map_size=map_size,
        )
        tables, rings = self._store.tables, self._store.rings
        self._counts, self._topics, self._ids = tables["counts"], tables["topics"], tables["ids"]
        self._labels, self._queue = tables["labels"], tables["queue"]
        self._samples, self._payloads = rings["samples"], rings["payloads"]
        try:
            self._check_schema(path)
        except StoreError:
            self._store.close()
            raise
        self._load()

    @property
    def step(self) -> int:
        """The last step begun; 0 before the first."""
        return self._store.step

    def rewind(self, step: int) -> None:
        """Make the ledger what it was when `step` ended, and durable so.

        Raises:
            StoreError: `step` is newer than the ledger or older than the last prune; nothing has changed.
        """
        self._store.rewind(step)
        self._load()
        self._samples.cut(self._c.high)
        self._payloads.cut(self._c.high)
        self.flush()

    def begin(self, step: int, now_s: float) -> None:
        """Open a step. `now_s` is the largest timestamp that the stream has shown so far; it never goes back."""
        self._store.begin(step)
        self._c.now_s = max(self._c.now_s, now_s)
        self._began_at_row = self._c.high

    def end(self) -> None:
        """Let go of what is past its bounds, write the counters, close the step."""
        c = self._c
        limit = max(EXPIRE_PER_STEP, 2 * (c.high - self._began_at_row))
        self._expire_payloads(limit)
        self._expire_ids(limit)
        self._expire_queue(limit)
        settled = c.joined + c.waiting + c.duplicate + c.corrected + c.expired + c.orphan
        assert c.read == settled, f"I7: {c.read} labels read, {settled} accounted for"
        self._counts.put(b"counters", c.pack())
        if self._classes_changed:
            self._counts.put(b"classes", self._class_counts_C.tobytes())
            self._classes_changed = False
        self._store.end()
        if (c.high - self._flushed_row) * self._schema.nbytes > UNFLUSHED_BYTES:
            self.flush()

    def flush(self) -> None:
        """Make every ended step durable and visible to views."""
        self._store.flush()
        self._flushed_row = self._c.high

    def prune(self, step: int) -> None:
        """Give up going back beyond `step`, and the disk space of payloads that only that needed."""
        if step <= self._store.pruned:
            return
        then = Counters.unpack(self._store.value_at(step, "counts", b"counters"))
        self._payloads.trim(then.payload_low)
        self._samples.trim(then.id_low)
        self._store.prune(step)

    def close(self) -> None:
        """Flush and let go; a step that is open is lost. May be called twice."""
        self._store.close()

    def is_known(self, sample_id: str) -> bool:
        """Whether a sample of this id came within the horizon."""
        return self._ids.get(key_of(sample_id)) is not None

    def sample_arrived(self, sample: Sample, prediction: Prediction, student_class: int) -> list[Arrival]:
        """Remember a new sample and what was said about it; what its labels did: one that waited, one inside."""
        c, schema, x = self._c, self._schema, sample.x
        assert x.shape == schema.shape, f"{sample.position}: {x.shape}, wanted {schema.shape}"
        assert x.dtype == schema.dtype, f"{sample.position}: {x.dtype}, wanted {schema.dtype}"
        probabilities_C = prediction.probabilities_C
        assert probabilities_C.shape == (len(schema.classes),), probabilities_C.shape
        key, row_number = key_of(sample.sample_id), c.high
        self._ids.insert(key, number(row_number))
        row = SampleRow(
            key,
            *self._place(sample.position),
            sample.timestamp_s,
            prediction.model_version,
            prediction.class_index,
            student_class,
            c.majority_class,
            c.last_class,
        )
        self._samples.append(row_number, pack_sample(row, probabilities_C))
        self._payloads.append(row_number, np.ascontiguousarray(x).data)
        c.high = row_number + 1

        arrivals = []
        if c.queued and (waited := self._label_row(key)) is not None:
            arrivals += self._join_waiting(key, waited, sample)
        if sample.label is not None:
            inside = Label(sample.position, sample.timestamp_s, sample.sample_id, sample.label)
            arrivals.append(self._label(key, inside, _Known(row, prediction, x)))
        return arrivals

    def label_arrived(self, label: Label) -> Arrival:
        """Take one label record. The same record twice has no effect.

        Raises:
            LogUnavailableError: the payload could not be read back for now; nothing has changed.
        """
        return self._label(key_of(label.sample_id), label, None)

    def trained(self, sample_ids: Iterable[str]) -> None:
        """These samples' labels are learned by the open step. Only the first time counts."""
        for sample_id in sample_ids:
            key = key_of(sample_id)
            row = self._label_row(key)
            if row is None or row.state is not LabelState.JOINED or row.trained_step:
                continue
            row.trained_step = self._store.step
            if not row.flags & EVER_TRAINED:
                row.flags |= EVER_TRAINED
                self._c.trained += 1
            self._labels.put(key, row.pack())

    def counts(self) -> LedgerCounts:
        """Totals and present sizes."""
        c = self._c
        return LedgerCounts(
            **{field.name: getattr(c, field.name) for field in fields(LedgerCounts) if hasattr(c, field.name)},
            samples_read=c.high,
            samples=c.high - c.id_low,
            payload_bytes=(c.high - c.payload_low) * self._schema.nbytes,
        )

    def _label(self, key: bytes, label: Label, known: _Known | None) -> Arrival:
        """Find the disposition of one label record. `known`: its sample, where that has just come."""
        place = PLACE.pack(*self._place(label.position))
        row = self._label_row(key)
        if row is not None and place in row.places:
            return Arrival(row.progress, label.sample_id, row.class_index)
        if row is not None and row.state is LabelState.ORPHAN:
            self._forget(key, row)  # counted already; this record starts anew
            row = None
        if row is not None:
            return self._again(key, row, label, place, known)

        found = known or self._sample(key)
        arrival = self._wait(key, label, place) if found is None else self._join(key, label, place, found)
        self._c.read += 1
        self._received(label.class_index)
        return arrival

    def _join(self, key: bytes, label: Label, place: bytes, known: _Known) -> Arrival:
        """A first label that comes after its sample."""
        sample, prediction, x = known
        if x is None:
            row = LabelRow(LabelState.EXPIRED, 0, label.class_index, -1, label.timestamp_s, 0, [place])
            self._labels.put(key, row.pack())
            self._c.expired += 1
            return Arrival(LabelState.EXPIRED, label.sample_id, label.class_index)
        row = LabelRow(LabelState.JOINED, SCORED, label.class_index, -1, label.timestamp_s, 0, [place])
        self._labels.put(key, row.pack())
        self._c.joined += 1
        self._c.scored += 1
        scored = Scored(
            prediction,
            sample.student_class,
            label.class_index,
            max(label.timestamp_s - sample.arrived_s, 0.0),
            sample.majority_class if sample.majority_class >= 0 else None,
            sample.no_change_class if sample.no_change_class >= 0 else None,
        )
        example = Example(label.sample_id, x, label.class_index)
        return Arrival(LabelState.JOINED, label.sample_id, label.class_index, example, scored)

    def _wait(self, key: bytes, label: Label, place: bytes) -> Arrival:
        row = LabelRow(LabelState.WAITING, 0, label.class_index, -1, label.timestamp_s, 0, [place])
        self._enqueue(key, row)
        self._c.waiting += 1
        return Arrival(LabelState.WAITING, label.sample_id, label.class_index)

    def _join_waiting(self, key: bytes, row: LabelRow, sample: Sample) -> list[Arrival]:
        """The sample has come. Its label was known before the prediction, so it is learned and never scored."""
        if row.state is LabelState.ORPHAN:
            self._forget(key, row)
            return []
        assert row.state is LabelState.WAITING, row.state
        self._dequeue(row)
        row.state = LabelState.JOINED
        self._labels.put(key, row.pack())
        self._c.waiting -= 1
        self._c.joined += 1
        example = Example(sample.sample_id, sample.x, row.class_index)
        return [Arrival(LabelState.JOINED, sample.sample_id, row.class_index, example)]

    def _again(self, key: bytes, row: LabelRow, label: Label, place: bytes, known: _Known | None) -> Arrival:
        """A further label of a sample that has one: a duplicate or a correction. The first score stands."""
        changed = label.class_index != row.class_index
        counts_now = changed and self._last_counts
        example = None
        if counts_now and row.state is not LabelState.WAITING:
            found = known or self._sample(key)
            assert found is not None, "a label row outlived its sample"
            if found.x is not None:
                example = Example(label.sample_id, found.x, label.class_index)
                row.state = LabelState.JOINED
        row.add_place(place, first=counts_now)
        if counts_now:
            row.class_index = label.class_index
            row.time_s = label.timestamp_s
            row.trained_step = 0
            row.flags |= CORRECTED
        self._labels.put(key, row.pack())
        self._c.read += 1
        if changed:
            self._c.corrected += 1
            return Arrival(LabelState.CORRECTED, label.sample_id, row.class_index, example, correction=counts_now)
        self._c.duplicate += 1
        return Arrival(LabelState.DUPLICATE, label.sample_id, row.class_index)

    def _received(self, class_index: int) -> None:
        """Tell the baselines, which know every first label as soon as it is received."""
        c, counts_C = self._c, self._class_counts_C
        counts_C[class_index] += 1
        self._classes_changed = True
        c.last_class = class_index
        if c.majority_class < 0 or counts_C[class_index] > counts_C[c.majority_class]:
            c.majority_class = class_index

    def _place(self, position: Position) -> tuple[int, int, int]:
        topic = self._topic_numbers.get(position.topic)
        if topic is None:
            topic = self._topic_numbers[position.topic] = len(self._topic_numbers)
            self._topics.insert(number(topic), position.topic.encode())
        return topic, position.partition, position.offset

    def _label_row(self, key: bytes) -> LabelRow | None:
        row = self._labels.get(key)
        return None if row is None else LabelRow.unpack(row)

    def _sample(self, key: bytes) -> _Known | None:
        """A known sample, its prediction, and its payload from the ring or else from the log."""
        found = self._ids.get(key)
        if found is None:
            return None
        row_number = int.from_bytes(found, "big")
        data = self._samples.get(row_number)
        assert data is not None, "an id outlived its row"
        row, prediction = unpack_sample(data)
        if row_number >= self._c.payload_low:
            payload = self._payloads.get(row_number)
            assert payload is not None, "a payload left before its time"
            return _Known(row, prediction, np.frombuffer(payload, self._schema.dtype).reshape(self._schema.shape))
        topic = self._topics.get(number(row.topic))
        assert topic is not None, "a row names no topic"
        x = self._read_back(Position(topic.decode(), row.partition, row.offset))
        assert x is None or (x.shape == self._schema.shape and x.dtype == self._schema.dtype), "read back wrongly"
        return _Known(row, prediction, x)

    def _enqueue(self, key: bytes, row: LabelRow) -> None:
        """Put at the end of the queue: waiting for a sample or, as an orphan, for oblivion."""
        c = self._c
        row.queue_row = c.queue_high
        c.queue_high += 1
        c.queued += 1
        self._queue.insert(number(row.queue_row), struct.pack("<d", c.now_s) + key)
        self._labels.put(key, row.pack())

    def _dequeue(self, row: LabelRow) -> None:
        self._queue.delete(number(row.queue_row))
        row.queue_row = -1
        self._c.queued -= 1

    def _forget(self, key: bytes, row: LabelRow) -> None:
        self._dequeue(row)
        self._labels.delete(key)

    def _arrived(self, row_number: int) -> tuple[bytes, float]:
        row = self._samples.get(row_number)
        assert row is not None, "a sample left before its time"
        return unpack_arrival(row)

    def _expire_payloads(self, limit: int) -> None:
        c = self._c
        c.payload_low = max(c.payload_low, c.high - self._payload_rows)
        oldest_s = c.now_s - self._payload_max_age_s
        for _ in range(limit):
            if c.payload_low == c.high or self._arrived(c.payload_low)[1] >= oldest_s:
                break
            c.payload_low += 1

    def _expire_ids(self, limit: int) -> None:
        c = self._c
        oldest_s = c.now_s - self._horizon_s
        for _ in range(limit):
            if c.id_low == c.high:
                break
            key, arrived_s = self._arrived(c.id_low)
            if c.high - c.id_low <= self._max_ids and arrived_s >= oldest_s:
                break
            self._ids.delete(key)
            self._labels.delete(key)
            c.id_low += 1
        c.payload_low = max(c.payload_low, c.id_low)

    def _expire_queue(self, limit: int) -> None:
        """A label past the horizon becomes an orphan, which is shown for one more horizon and then forgotten."""
        c = self._c
        oldest_s = c.now_s - self._horizon_s
        for _ in range(limit):
            oldest = self._queue.first() if c.queued else None
            if oldest is None:
                break
            (queued_s,), key = struct.unpack_from("<d", oldest[1]), oldest[1][8:]
            crowded = c.queued > self._max_ids
            if not crowded and queued_s >= oldest_s:
                break
            row = self._label_row(key)
            assert row is not None, "a queued label has no row"
            was_waiting = row.state is LabelState.WAITING
            if was_waiting:
                c.waiting -= 1
                c.orphan += 1
            self._dequeue(row)
            if was_waiting and not crowded:
                row.state = LabelState.ORPHAN
                self._enqueue(key, row)
            else:
                self._labels.delete(key)

    def _load(self) -> None:
        """Take everything that is kept in memory from the tables."""
        self._c = Counters.unpack(self._counts.get(b"counters"))
        self._topic_numbers = {name.decode(): int.from_bytes(row, "big") for row, name in self._topics.items()}
        self._class_counts_C = np.zeros(len(self._schema.classes), np.int64)
        saved_C = np.frombuffer(self._counts.get(b"classes") or b"", np.int64)
        self._class_counts_C[: len(saved_C)] = saved_C
        self._classes_changed = False
        self._flushed_row = self._began_at_row = self._c.high

    def _check_schema(self, path: Path) -> None:
        """Refuse payloads of another shape, and classes of another meaning. More classes may be added at the end."""
        schema = self._schema
        wanted = {"shape": list(schema.shape), "dtype": schema.dtype.str, "classes": list(schema.classes)}
        note = self._store.note("schema")
        found = wanted if note is None else json.loads(note)
        known_classes = found["classes"]
        grown = {**wanted, "classes": wanted["classes"][: len(known_classes)]}
        if found != grown:
            raise StoreError(f"{path}: the store is of another schema: found {found}, wanted {wanted}")
        self._store.note("schema", json.dumps(wanted).encode())
        self._store.flush()
