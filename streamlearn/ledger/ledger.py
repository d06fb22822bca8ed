"""What became of each label: joined with its sample, waiting for it, scored, trained, and every way to go wrong.

A fold over the log, kept on disk (`store`): the caller opens a step, shows the ledger that step's samples and labels,
ends it. After a crash it rewinds to the checkpoint's step and shows the same again, with the same result. Time is the
stream's (`now_s`), never the wall clock.

What a set of records comes to does not depend on the order in which they are read. The label records of a sample are
kept in the order of their times and positions. A record without a class (RETRACTED) withdraws the label. In that order
the last record counts, so a label after a retraction brings the sample back; or, by `corrections`, the first label
counts, and then a retraction is final. The first label carries the state, each further one is a duplicate or a
correction of the record before it, and a retraction is a retraction. So every record has one disposition, and they add
up:

    read == joined + waiting + duplicate + corrected + retracted + erased + expired + orphan + held + held_dropped

A record that is ERASED withdraws all labels for good, and the payload of the sample is not used from that record on: a
label that is read later has expired, and a sample that is read later is refused as known. The payload is overwritten
once no rewind can need it (`prune`). The id is remembered as erased for as long as ids are.

A sample is scored once, by the first label to come whose time is not before the sample's own, against the class that
counts then (that of this label where it is withdrawn already). Neither a correction nor a retraction changes a score.
Such a label was not known when the prediction was made, whichever of the two is read first; whether there
is one depends on the times alone. A label from before its sample is learned and never scores.

What does depend on the order of reading: which class an early score was held against, since the first score stands;
what the baselines knew when a sample came; the step that learned a label, and whether one did before the label was
withdrawn; whether a label joined or a sample came before its erasure; and of more than `rows.KEPT_RECORDS` records
of one sample, how the middle ones divide into duplicates and corrections. What depends on the stream's clock (horizon,
implied class) depends on when that has passed.

    labels   row of a sample → LabelRow; hash of an id → LabelRow of a label whose sample is not known
    queue    number → hash of an id whose label waits, oldest first
    counts   one row of counters, and what the baselines know     grown    class index → name that took a spare class
    erased   row of a sample → the step that erased it

Labels lie by their sample's row and not by its hash, since those that come in one second are mostly of samples that
came near each other: so they share pages, and a commit has few to write.

Samples and topics are in `samples`, labels of unknown classes in `held`, labels by class in `baselines`; the rows are
laid out in `rows`.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, replace
from pathlib import Path

from streamlearn.errors import ANEW, StoreError
from streamlearn.ledger import Arrival, LabelState, LedgerCounts, Scored
from streamlearn.ledger.baselines import Baselines
from streamlearn.ledger.held import MAX_HELD, HeldLabels
from streamlearn.ledger.rows import (
    CORRECTED,
    SCORED,
    Counters,
    LabelRecord,
    LabelRow,
    Said,
    key_of,
    pack_joined,
    trained_in,
)
from streamlearn.ledger.samples import Known, Samples, Topics
from streamlearn.ledger.settings import LabelsConfig
from streamlearn.ledger.store import Store, number
from streamlearn.records import (
    ERASED,
    RETRACTED,
    UNLABELLED,
    Array,
    Example,
    Label,
    Position,
    Prediction,
    Sample,
    Schema,
)

JOINED = LabelState.JOINED
"""Bound once: an enum looks its members up, and this one is asked for with every label."""
EXPIRE_PER_STEP = 4096
"""Most rows that one step lets go of (or twice its arrivals): a stream silent for long must not stall a step."""
UNFLUSHED_BYTES = 64 << 20
"""Payloads held in memory by the open transaction before it flushes itself."""


class Ledger:
    """Joins labels with samples. One learner, one thread; see `view.LedgerView` for everybody else.

    Raises:
        StateLockedError: another learner has it open.
        StoreError: it is of another format or another schema; here and from every method, it cannot be written.
    """

    def __init__(
        self,
        path: Path,
        schema: Schema,
        settings: LabelsConfig,
        *,
        read_back: Callable[[Position, str], Array | None],
        max_held: int = MAX_HELD,
        may_write: Callable[[], None] = lambda: None,
    ) -> None:
        """`may_write` raises StateLockedError where another learner has taken over, and is asked before each flush."""
        self._schema = schema
        self._payload_rows = max(settings.payload_max_bytes // schema.nbytes, 1)
        self._horizon_s, self._max_ids = settings.horizon_s, settings.max_ids
        self._last_counts = settings.corrections == "last"
        implied = settings.implied_class
        self._implied_class = None if implied is None else schema.class_index(implied)
        self._implied_after_s = settings.implied_after_s
        self._store = Store(
            path,
            tables=("counts", "topics", "ids", "labels", "queue", "held", "held_of", "held_names", "grown", "erased"),
            rings=("samples", "bare"),
            may_write=may_write,
        )
        tables = self._store.tables
        self._counts, self._labels, self._queue = tables["counts"], tables["labels"], tables["queue"]
        self._topics = Topics(tables["topics"])
        self._samples = Samples(self._store, self._topics, schema, read_back)
        self._held = HeldLabels(self._store, max_held=max_held)
        self._baselines = Baselines(self._counts, schema.capacity)
        self._grow, self._grown, self._erased = settings.unknown_class == "grow", tables["grown"], tables["erased"]
        self._classes: dict[str, int] = {}
        try:
            self._check_schema(path)
        except StoreError:
            self._store.close()
            raise
        self._joined: dict[str, bytes] = {}
        """Rows of samples that labels joined in this step, by their ids: most of them are learned in it too."""
        self._load()

    # -- steps

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
        self._samples.cut()
        self.flush()

    def begin(self, step: int, now_s: float) -> None:
        """Open a step. `now_s` is the largest timestamp that the stream has shown so far; it never goes back."""
        self._store.begin(step)
        self._c.now_s = max(self._c.now_s, now_s)
        self._began_at_row = self._c.high
        self._joined.clear()

    def end(self) -> None:
        """Let go of what is past its bounds, write the counters, close the step."""
        c = self._c
        limit, oldest_s = self._limit(), c.now_s - self._horizon_s
        self._samples.expire_payloads(self._payload_rows)
        for row_number in self._samples.expire_ids(limit, most=self._max_ids, oldest_s=oldest_s):
            self._labels.delete(row_number)
            if self._c.erased:
                self._erased.delete(row_number)
        self._expire_queue(limit, oldest_s)
        self._held.drop(limit, oldest_s=oldest_s)
        first = c.joined + c.waiting + c.expired + c.orphan
        settled = first + c.duplicate + c.corrected + c.retracted + c.erased + c.held + c.held_dropped
        assert c.read == settled, f"I7: {c.read} labels read, {settled} accounted for"
        self._counts.put(b"counters", c.pack())
        self._baselines.save()
        self._store.end()
        if (c.high - self._flushed_row) * self._schema.nbytes > UNFLUSHED_BYTES:
            self.flush()

    def flush(self) -> None:
        """Make every ended step durable and visible to views."""
        self._store.flush()
        self._flushed_row = self._c.high

    def prune(self, step: int) -> None:
        """Give up going back beyond `step`, and the payloads that only that needed: those let go, and those erased."""
        if step <= self._store.pruned:
            return
        for row_number, erased_step in self._erased.items():
            if self._store.pruned < int.from_bytes(erased_step, "big") <= step:
                self._samples.overwrite_payload(row_number)
        self._samples.trim(Counters.unpack(self._store.value_at(step, "counts", b"counters")))
        self._store.prune(step)

    def close(self) -> None:
        """Flush and let go; a step that is open is lost. May be called twice."""
        self._store.close()

    # -- what a step shows

    def is_known(self, sample_id: str) -> bool:
        """Whether a sample of this id came within the horizon, or was erased before it came."""
        key = key_of(sample_id)
        if self._samples.has(key):
            return True
        row = self._row_at(key) if self._c.queued else None
        return row is not None and row.class_index == ERASED

    def sample_arrived(self, sample: Sample, prediction: Prediction, student_class: int) -> list[Arrival]:
        """Remember a new sample and what was said about it; what its labels did: those that waited, one inside."""
        key, arrivals = key_of(sample.sample_id), []
        known = self._samples.append(key, sample, prediction, student_class)
        if self._c.queued and (waited := self._row_at(key)) is not None:
            arrivals += self._join_waiting(key, waited, sample.sample_id, known)
        if (inside := sample.inside) is not None:
            arrivals.append(self._take(key, inside, known))
        return arrivals

    def label_arrived(self, label: Label) -> Arrival:
        """Take one label record. The same record twice has no effect. One that is RETRACTED or ERASED withdraws.

        A class that is not known by its name (`class_index` is UNLABELLED) takes a spare one, or else is held.

        Raises:
            LogUnavailableError: the payload could not be read back for now; nothing has changed.
        """
        return self._take(key_of(label.sample_id), label, None)

    def labels_arrived(self, labels: Sequence[Label]) -> list[Arrival]:
        """Take label records in this order: what `label_arrived` makes of each, sooner where they are many.

        Most are the first of a sample whose payload is in the ring. They are looked up together, and go straight
        through here; every other one goes round by `label_arrived`.

        Raises:
            LogUnavailableError: as `label_arrived`, of one label; those before it are taken.
        """
        c, place, put, received = self._c, self._topics.place, self._labels.put, self._baselines.received
        arrivals: list[Arrival] = []
        keys = [key_of(label.sample_id) for label in labels]
        found = self._samples.fetch(keys)
        rows = self._labels.fetch([known[0] for known in found if known is not None])
        joined = self._joined
        for key, label, known in zip(keys, labels, found, strict=True):
            class_index, at_s = label.class_index, label.timestamp_s
            if known is None or class_index < 0 or rows[known[0]] is not None or (c.held and self._held.of(key)):
                arrivals.append(self.label_arrived(label))
                continue
            row_number, said, x = known
            scored = self._score(said, class_index, at_s) if at_s >= said[0] else None
            put(row_number, pack_joined(*place(label.position), at_s, class_index, scored=scored is not None))
            joined[label.sample_id] = row_number
            c.read += 1
            c.joined += 1
            received(class_index)
            example = Example(label.sample_id, x, class_index, at_s)
            arrivals.append(Arrival(JOINED, label.sample_id, class_index, example, scored, False, at_s))
        return arrivals

    def implied(self) -> list[Arrival]:
        """Give the implied class to samples that have gone without any label for so long. Once a step, after its joins.

        Such a label is learned, and scores its sample. It is no record, so a record that says the same class later
        takes its place as the first of that sample and changes nothing else; one of another class is a correction,
        whatever the policy. At most as many as `end` lets go of: the next steps do the rest.
        """
        if self._implied_after_s is None:
            return []
        c, samples, arrivals = self._c, self._samples, []
        oldest_s = c.now_s - self._implied_after_s
        for _ in range(self._limit()):
            if c.implied_low == c.high:
                break
            row_number = number(c.implied_low)
            key, arrived_s = samples.arrived(row_number)
            if samples.is_young(arrived_s, oldest_s):
                break
            if arrived_s < oldest_s and self._labels.get(row_number) is None and not self._held.of(key):
                arrivals.append(self._imply(samples.id_of(row_number), samples.at(row_number)))
            c.implied_low += 1
        return arrivals

    def release_held(self) -> list[Arrival]:
        """Take up held labels whose class is known by now. Once a step, before its joins; so many a step.

        Which they are depends on the state and the schema alone, so a replay releases them in the same step again.
        """
        arrivals = []
        for row in self._held.take(self._classes, self._limit()):
            self._c.read -= 1  # it is counted again as what it becomes
            position = Position(self._topics.name(row.topic), row.partition, row.offset)
            label = Label(position, row.time_s, row.sample_id, self._classes[row.class_name])
            arrivals.append(self._label(key_of(row.sample_id), label, None))
        return arrivals

    def trained(self, sample_ids: Iterable[str]) -> None:
        """These samples' labels are learned by the open step. Only the first time counts."""
        step, put, joined, row_of = self._store.step, self._labels.put, self._joined.get, self._samples.row_of
        found = [joined(sample_id) or row_of(key_of(sample_id)) for sample_id in sample_ids]
        numbers = [row_number for row_number in found if row_number is not None]
        rows = self._labels.fetch(numbers)
        for row_number in numbers:
            row = rows[row_number]
            if row is not None and (trained := trained_in(row, step)) is not None:
                put(row_number, trained[0])
                self._c.trained += trained[1]

    # -- for whoever asks

    def counts(self) -> LedgerCounts:
        """Totals and present sizes."""
        c = self._c
        return LedgerCounts(
            **{field.name: getattr(c, field.name) for field in fields(LedgerCounts) if hasattr(c, field.name)},
            samples_read=c.high,
            samples=c.high - c.id_low,
            payload_bytes=(c.high - c.payload_low) * self._schema.nbytes,
        )

    @property
    def baselines(self) -> tuple[int | None, int | None]:
        """What majority and no-change say of the next sample; None before the first label."""
        majority, last = self._c.majority_class, self._c.last_class
        return (None, None) if majority == UNLABELLED else (majority, last)

    @property
    def class_names(self) -> list[str]:
        """By index: the schema's, and those that took a spare class since."""
        return list(self._classes)

    def newest_sample(self) -> tuple[Position, str] | None:
        """Where the last sample stands in the log, and its id; None where none is known."""
        return self._samples.newest()

    def held(self) -> dict[str, int]:
        """Names of unknown classes, and how many labels of each are held; the commonest first, `held.NAMES_TOLD`."""
        return self._held.names()

    # -- one label record

    def _take(self, key: bytes, label: Label, known: Known | None) -> Arrival:
        """Take one label record by its class or by its name. `known`: its sample, where that has just come."""
        if label.class_index != UNLABELLED:
            return self._label(key, label, known)
        assert label.class_name is not None, label.position
        class_index = self._classes.get(label.class_name)
        if class_index is None and self._grow and len(self._classes) < self._schema.capacity:
            class_index = self._classes[label.class_name] = len(self._classes)
            self._grown.insert(number(class_index), label.class_name.encode())
        if class_index is None:
            return self._hold(key, label)
        return self._label(key, replace(label, class_index=class_index), known)

    def _label(self, key: bytes, label: Label, known: Known | None) -> Arrival:
        """Find the disposition of one label record. `known`: its sample, where that has just come."""
        record = LabelRecord(label.timestamp_s, *self._topics.place(label.position), label.class_index)
        found = known or self._samples.find(key)
        row = self._row_at(key if found is None else found.number)
        if (row is not None and row.holds(record.place)) or (self._c.held and self._held.has(key, record.place)):
            return self._unchanged(label, row)
        if row is not None and row.state is LabelState.ORPHAN:
            self._forget(key, row)  # counted already; this record starts anew
            row = None
        if row is not None:
            return self._further(key, row, record, label.sample_id, found)

        named = label.class_index >= 0
        row = LabelRow(LabelState.WAITING if named else LabelState.RETRACTED, label.class_index, [record])
        if found is not None and named:
            arrival = self._join(row, label.sample_id, found)
        else:
            arrival = Arrival(row.progress, label.sample_id, label.class_index)
            if found is None:
                self._enqueue(key, row)
            else:
                self._labels.put(found.number, row.pack())
            self._c.waiting += named
            self._withdrawn(record, found)
        self._c.read += 1
        self._baselines.received(row.class_index)
        return arrival

    def _join(self, row: LabelRow, sample_id: str, known: Known) -> Arrival:
        """Label and sample are together for the first time."""
        x = None if row.class_index == ERASED else self._samples.payload(known)
        deciding = row.deciding
        assert deciding is not None
        if x is None:
            row.state = LabelState.EXPIRED
            self._c.expired += 1
            self._labels.put(known.number, row.pack())
            return Arrival(row.state, sample_id, row.class_index)
        row.state = LabelState.JOINED
        self._c.joined += 1
        scored, example = None, None
        for record in row.records:
            if record.class_index >= 0 and record.time_s >= known.arrived_s:
                scored = self._score_row(row, known, record.class_index, record.time_s)
                break
        if row.class_index >= 0:
            example = Example(sample_id, x, row.class_index, deciding.time_s)
        self._labels.put(known.number, row.pack())
        return Arrival(row.state, sample_id, row.class_index, example, scored, labelled_at_s=deciding.time_s)

    def _join_waiting(self, key: bytes, row: LabelRow, sample_id: str, known: Known) -> list[Arrival]:
        """The sample of a waiting label has come."""
        self._forget(key, row)
        if row.state is LabelState.ORPHAN:
            return []
        if row.state is LabelState.RETRACTED:
            self._labels.put(known.number, row.pack())
            return []
        assert row.state is LabelState.WAITING, row.state
        self._c.waiting -= 1
        return [self._join(row, sample_id, known)]

    def _further(self, key: bytes, row: LabelRow, record: LabelRecord, sample_id: str, known: Known | None) -> Arrival:
        """A further label record of a sample, or the first after the implied class."""
        c, was_class, was_deciding, was_state = self._c, row.class_index, row.deciding, row.state
        placed = row.insert(record, self._order, last_counts=self._last_counts)
        changed = row.class_index != was_class
        example, scored = None, None
        if known is None:
            assert row.state in (LabelState.WAITING, LabelState.RETRACTED), "a label row outlived its sample"
            if placed.disposition is None:
                row.state = LabelState.WAITING
        else:
            example = self._follow(row, sample_id, known, first=placed.disposition is None, changed=changed)
            in_time = record.class_index >= 0 and record.time_s >= known.arrived_s
            if row.state is LabelState.JOINED and not row.flags & SCORED and in_time:
                scored = self._score_row(row, known, record.class_index, record.time_s)
        if was_deciding is None:  # of the implied class, which was counted apart
            c.implied -= 1
            self._move(1, row.state)
            row.flags |= CORRECTED if changed else 0
        elif row.state is not was_state:
            self._move(-1, was_state)
            self._move(1, row.state)
        c.read += 1
        self._withdrawn(record, known)
        c.duplicate += placed.duplicates
        c.corrected += placed.corrections
        if changed:
            self._baselines.received(row.class_index, was=was_class)
        self._labels.put(key if known is None else known.number, row.pack())
        deciding = row.deciding
        assert deciding is not None
        return Arrival(
            placed.disposition or (LabelState.CORRECTED if changed else row.progress),
            sample_id,
            row.class_index,
            example,
            scored,
            correction=changed,
            labelled_at_s=deciding.time_s if known is not None and deciding != was_deciding else None,
        )

    def _follow(self, row: LabelRow, sample_id: str, known: Known, *, first: bool, changed: bool) -> Example | None:
        """Let state and learning follow the records: an example where a class counts that was not learned yet.

        `first`: the first label has come, to the implied class or to retractions alone.
        """
        deciding = row.deciding
        assert deciding is not None
        counts = row.class_index >= 0
        joins = first and row.state is LabelState.RETRACTED
        wanted = (joins and row.class_index != ERASED) or (changed and counts)
        x = self._samples.payload(known) if wanted else None
        if x is not None:
            row.state = LabelState.JOINED
        elif joins:
            row.state = LabelState.EXPIRED
        elif not counts and len(row.records) == 1:
            row.state = LabelState.RETRACTED  # it was the implied class
        if changed:
            row.trained_step = 0
        return Example(sample_id, x, row.class_index, deciding.time_s) if x is not None and changed else None

    def _withdrawn(self, record: LabelRecord, known: Known | None) -> None:
        """Count a record without a class; remember what it erases."""
        if record.class_index == RETRACTED:
            self._c.retracted += 1
        elif record.class_index == ERASED:
            self._c.erased += 1
            if known is not None and self._erased.get(known.number) is None:
                self._erased.put(known.number, number(self._store.step))

    def _imply(self, sample_id: str, known: Known) -> Arrival:
        """Give a sample the implied class, as of the moment when its time for a label was over."""
        assert self._implied_class is not None
        assert self._implied_after_s is not None
        x, at_s = self._samples.payload(known), known.arrived_s + self._implied_after_s
        row = LabelRow(LabelState.EXPIRED if x is None else LabelState.JOINED, self._implied_class)
        example, scored = None, None
        if x is not None:
            example = Example(sample_id, x, row.class_index, at_s)
            scored = self._score_row(row, known, row.class_index, at_s)
        self._c.implied += 1
        self._baselines.received(row.class_index)
        self._labels.put(known.number, row.pack())
        labelled_at_s = None if x is None else at_s
        return Arrival(
            row.state, sample_id, row.class_index, example, scored, labelled_at_s=labelled_at_s, implied=True
        )

    def _score(self, said: Said, class_index: int, label_s: float) -> Scored | None:
        """Hold the prediction against the class that counts now. `label_s`: when the label in time was given."""
        arrived_s, student_class, prediction, majority, no_change = said
        if prediction.class_index == UNLABELLED:
            return None  # passed by under overload
        self._c.scored += 1
        return Scored(
            prediction,
            student_class,
            class_index,
            label_s - arrived_s,
            majority if majority >= 0 else None,
            no_change if no_change >= 0 else None,
        )

    def _score_row(self, row: LabelRow, known: Known, said_class: int, label_s: float) -> Scored | None:
        """The same of a row, which remembers it: a sample is scored once. `said_class`: that of the label in time."""
        class_index = said_class if row.class_index < 0 else row.class_index
        scored = self._score(known.said, class_index, label_s)
        if scored is not None:
            row.flags |= SCORED
        return scored

    def _hold(self, key: bytes, label: Label) -> Arrival:
        """Keep a label of an unknown class, once."""
        place = self._topics.place(label.position)
        row = self._label_row(key)
        if (row is not None and row.holds(place)) or self._held.has(key, place):
            return self._unchanged(label, row)
        self._held.hold(key, label, place)
        self._c.read += 1
        return Arrival(LabelState.HELD, label.sample_id, UNLABELLED)

    def _unchanged(self, label: Label, row: LabelRow | None) -> Arrival:
        """The very record was taken before."""
        if row is None:
            return Arrival(LabelState.HELD, label.sample_id, UNLABELLED)
        return Arrival(row.progress, label.sample_id, row.class_index)

    def _move(self, by: int, state: LabelState) -> None:
        """Count a label's state: the disposition of its first record."""
        c = self._c
        match state:
            case LabelState.JOINED:
                c.joined += by
            case LabelState.EXPIRED:
                c.expired += by
            case LabelState.WAITING:
                c.waiting += by
            case _:
                assert state is LabelState.RETRACTED, state  # no record carries it

    def _order(self, record: LabelRecord) -> tuple[float, str, int, int]:
        return record.time_s, self._topics.name(record.topic), record.partition, record.offset

    def _label_row(self, key: bytes) -> LabelRow | None:
        """The label of the sample that has this hash, whether that is known or not."""
        return self._row_at(self._samples.row_of(key) or key)

    def _row_at(self, at: bytes) -> LabelRow | None:
        """The label at a sample's row, or at the hash of an unknown one."""
        row = self._labels.get(at)
        return None if row is None else LabelRow.unpack(row)

    # -- the queue of those that wait

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

    def _expire_queue(self, limit: int, oldest_s: float) -> None:
        """A label past the horizon becomes an orphan, which is shown for one more horizon and then forgotten."""
        c = self._c
        for _ in range(limit):
            oldest = self._queue.first() if c.queued else None
            if oldest is None:
                break
            (queued_s,), key = struct.unpack_from("<d", oldest[1]), oldest[1][8:]
            crowded = c.queued > self._max_ids
            if not crowded and queued_s >= oldest_s:
                break
            row = self._row_at(key)
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

    def _limit(self) -> int:
        return max(EXPIRE_PER_STEP, 2 * (self._c.high - self._began_at_row))

    # -- opening

    def _load(self) -> None:
        """Take everything that is kept in memory from the tables."""
        self._c = self._samples.counters = Counters.unpack(self._counts.get(b"counters"))
        self._topics.load()
        self._held.load(self._c)
        self._baselines.load(self._c)
        self._classes = {name: index for index, name in enumerate(self._schema.classes)}
        self._classes |= {name.decode(): int.from_bytes(row, "big") for row, name in self._grown.items()}
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
            msg = f"{path}: the store is of another schema: found {found}, wanted {wanted}"
            raise StoreError(f"{msg}; set schema back, or {ANEW}")
        for row, name in self._grown.items():
            index, same = int.from_bytes(row, "big"), name.decode() in schema.classes
            if (index < len(schema.classes) or same) and schema.classes[index : index + 1] != (name.decode(),):
                raise StoreError(f"{path}: class {index} has grown as {name.decode()!r}: name it so, at its place")
        self._store.note("schema", json.dumps(wanted).encode())
        self._store.flush()
