"""Joins label records with samples: the state of each sample's label, what is learned and scored, and what is counted.

The result does not depend on the order in which records are read. The label records of a sample are sorted by log time
and position. The last one counts, or with `corrections = first` the first label. A record without a class withdraws the
label: RETRACTED until a later label comes (with `first`, finally), ERASED finally. `rows.LabelRow.insert` has the
details, docs/label-states.md the table of states.

A sample is scored once: by the first label read whose log time is not before the sample's, against the class that
counts then. Such a label was not known when the prediction was made, whichever of the two is read first. Corrections
and retractions do not change a score. A label older than its sample is learned and never scored. The published answer
is scored if it is known by then, else the learner's own prediction.

The order of reading does decide:
- against which class an early score is taken, and what the baselines knew when a sample arrived;
- which step learned a label, and whether one did before the label was withdrawn;
- whether a label joined before its sample was erased;
- how the middle ones of more than `rows.KEPT_RECORDS` records divide into duplicates and corrections;
- with a watermark that passes the horizon or the time of the implied class in between, on which side a record falls.

    labels   row number of a sample → LabelRow

Labels are keyed by row number, not by hash: labels that come together are mostly of samples that came together, so they
share pages, and a commit writes few. Labels without a sample are in `waiting`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from streamlearn.ledger import Arrival, LabelState, PublishedOutcome, Scored
from streamlearn.ledger.baselines import Baselines
from streamlearn.ledger.class_names import ClassNames
from streamlearn.ledger.held import HeldLabels, HeldRow
from streamlearn.ledger.rows import (
    CORRECTED,
    SCORED,
    Answers,
    Counters,
    LabelRecord,
    LabelRow,
    Placed,
    key_of,
    pack_joined,
    trained_in,
)
from streamlearn.ledger.samples import Known, Samples, TopicNumbers
from streamlearn.ledger.store import Table
from streamlearn.ledger.waiting import WaitingLabels
from streamlearn.records import ERASED, RETRACTED, UNLABELLED, Example, Label, PublishedAnswer

JOINED = LabelState.JOINED
"""Bound once: the lookup of an enum member is slow, and each label needs it."""


@dataclass(slots=True)
class Joiner:
    """What one label record does. The parts of the ledger are shared; `Ledger` opens and closes the steps."""

    labels: Table[int, bytes]
    counters: Counters
    samples: Samples
    topics: TopicNumbers
    waiting: WaitingLabels
    held: HeldLabels
    classes: ClassNames
    baselines: Baselines
    last_counts: bool
    """corrections = last."""
    step: int = 0
    """The open step."""
    _joined: dict[str, int] = field(default_factory=dict)
    """Row numbers of samples that were joined in this step, by id: most of them are learned in the same step."""

    def begin(self, step: int) -> None:
        """Open a step."""
        self.step = step
        self._joined.clear()

    # -- records

    def sample(self, key: bytes, sample_id: str, known: Known) -> list[Arrival]:
        """Join a new sample with the label that waits for it, if there is one."""
        row = self.waiting.get(key)
        if row is None:
            return []
        self.waiting.remove(key, row)
        if row.state is LabelState.ORPHAN:
            return []
        if row.state is LabelState.RETRACTED:
            self.labels.put(known.row, row.pack())
            return []
        return [self._join(row, sample_id, known, was_counted=row.counted_as)]

    def label(self, key: bytes, label: Label, known: Known | None = None) -> Arrival:
        """Take one label record. `known`: its sample, if the caller has it."""
        class_index: int | None = label.class_index
        if class_index == UNLABELLED:
            assert label.class_name is not None, label.position
            class_index = self.classes.index(label.class_name)
        place = self.topics.place(label.position)
        known = known or self.samples.find(key)
        row = self.waiting.get(key) if known is None else self._row(known.row)
        is_held = self.held.has(key, place)
        if row is not None and (is_held or row.holds(place)):  # delivered before
            return Arrival(row.progress, label.sample_id, row.class_index)
        if is_held or class_index is None:
            if not is_held:
                self.held.hold(key, label, place)
                self.counters.read += 1
            return Arrival(LabelState.HELD, label.sample_id, UNLABELLED)
        record = LabelRecord(label.timestamp_s, *place, class_index)
        if row is not None and row.state is LabelState.ORPHAN:
            self.waiting.remove(key, row)  # it stays counted as an orphan
            row = None
        if row is None:
            return self._first(key, record, label.sample_id, known)
        return self._further(key, row, record, label.sample_id, known)

    def labels_together(self, labels: Sequence[Label]) -> list[Arrival]:
        """Take label records in this order: the same as `label` for each, faster for many.

        Most records are the first label of a sample whose payload is in the ring. They are looked up together and take
        the short path here. All others go through `label`.
        """
        c, place, put, received = self.counters, self.topics.place, self.labels.put, self.baselines.received
        arrivals: list[Arrival] = []
        keys = [key_of(label.sample_id) for label in labels]
        found = self.samples.fetch(keys)
        rows = self.labels.fetch([known[0] for known in found if known is not None])
        joined = self._joined
        for key, label, known in zip(keys, labels, found, strict=True):
            class_index, at_s = label.class_index, label.timestamp_s
            if known is None or class_index < 0 or rows[known[0]] is not None or (c.held and self.held.of(key)):
                arrivals.append(self.label(key, label))
                continue
            row_number, answers, x = known
            scored = self._score(answers, class_index, at_s) if at_s >= answers[0] else None
            put(row_number, pack_joined(*place(label.position), at_s, class_index, scored=scored is not None))
            joined[label.sample_id] = row_number
            c.read += 1
            c.joined += 1
            received(class_index)
            example = Example(label.sample_id, x, class_index, at_s)
            arrivals.append(Arrival(JOINED, label.sample_id, class_index, example, scored, False, at_s))
        return arrivals

    def release(self, row: HeldRow) -> Arrival:
        """Take a label that was held, now that its class is known."""
        self.counters.read -= 1  # `label` counts it again
        position = self.topics.position(row.topic, row.partition, row.offset)
        label = Label(position, row.time_s, row.sample_id, self.classes.known[row.class_name])
        return self.label(key_of(row.sample_id), label)

    def imply(self, row_number: int, class_index: int, after_s: float) -> Arrival:
        """Give a sample the implied class, with the log time at which its time for a label was over."""
        known, (_, sample_id) = self.samples.at(row_number), self.samples.position_and_id(row_number)
        arrival = self._join(LabelRow(JOINED, class_index), sample_id, known, implied_s=known.arrived_s + after_s)
        self.baselines.received(class_index)
        return arrival

    def trained(self, sample_ids: Iterable[str]) -> None:
        """The open step learns the labels of these samples. Only the first time counts."""
        put, joined, row_of = self.labels.put, self._joined, self.samples.row_of
        found = [joined[name] if name in joined else row_of(key_of(name)) for name in sample_ids]
        numbers = [row_number for row_number in found if row_number is not None]
        rows = self.labels.fetch(numbers)
        for row_number in numbers:
            row = rows[row_number]
            if row is not None and (trained := trained_in(row, self.step)) is not None:
                put(row_number, trained[0])
                self.counters.trained += trained[1]

    def publish(self, answers: Sequence[PublishedAnswer]) -> list[PublishedOutcome]:
        """Take published answers in this order."""
        outcomes: list[PublishedOutcome] = []
        rows = self.samples.rows_at([(key_of(answer.sample_id), answer.sample) for answer in answers])
        self.labels.fetch([row_number for row_number in rows if row_number is not None])
        for answer, row_number in zip(answers, rows, strict=True):
            if row_number is None:
                outcomes.append("unknown")
                continue
            label = self._row(row_number)
            is_over = label is not None and (label.flags & SCORED or label.class_index == ERASED)
            if is_over or self.samples.is_published(row_number):
                outcomes.append("late")
                continue
            self.samples.publish(row_number, answer.prediction)
            outcomes.append("taken")
        return outcomes

    # -- the cases

    def _first(self, key: bytes, record: LabelRecord, sample_id: str, known: Known | None) -> Arrival:
        """The first record of a sample."""
        named = record.class_index >= 0
        row = LabelRow(LabelState.WAITING if named else LabelState.RETRACTED, record.class_index, [record])
        if known is not None and named:
            arrival = self._join(row, sample_id, known)
        else:
            arrival = Arrival(row.progress, sample_id, row.class_index)
            self._recount(None, row)
            if known is None:
                self.waiting.add(key, row)
            else:
                self.labels.put(known.row, row.pack())
        self._count(record, known)
        self.baselines.received(row.class_index)
        return arrival

    def _join(
        self, row: LabelRow, sample_id: str, known: Known, *, was_counted: str | None = None, implied_s: float = 0.0
    ) -> Arrival:
        """Label and sample are together for the first time. `implied_s`: log time of the implied class."""
        x = self.samples.payload(known)
        row.state = LabelState.EXPIRED if x is None else JOINED
        self._recount(was_counted, row)
        example, scored, at_s = None, None, None
        if x is not None:
            labels = [(record.class_index, record.time_s) for record in row.records]
            for label_class, label_s in labels or [(row.class_index, implied_s)]:
                scored = scored or self._score_once(row, known, label_class, label_s)
            at_s = row.deciding.time_s if row.deciding else implied_s
            example = Example(sample_id, x, row.class_index, at_s) if row.class_index >= 0 else None
        self.labels.put(known.row, row.pack())
        implied = not row.records
        return Arrival(row.state, sample_id, row.class_index, example, scored, labelled_at_s=at_s, implied=implied)

    def _further(self, key: bytes, row: LabelRow, record: LabelRecord, sample_id: str, known: Known | None) -> Arrival:
        """A further record of a sample, or the first one after the implied class."""
        was_class, was_deciding, was_counted = row.class_index, row.deciding, row.counted_as
        placed = row.insert(record, self._order, last_counts=self.last_counts)
        is_first, changed = placed.disposition is None, row.class_index != was_class
        if was_deciding is None and changed:
            row.flags |= CORRECTED
        example, scored, at_s = None, None, None
        if known is None:
            row.state = LabelState.WAITING if is_first else row.state
            self.waiting.update(key, row)
        else:
            example = self._follow(row, sample_id, known, is_first=is_first, changed=changed)
            if row.state is JOINED:
                scored = self._score_once(row, known, record.class_index, record.time_s)
            at_s = row.deciding.time_s if row.deciding and row.deciding != was_deciding else None
            self.labels.put(known.row, row.pack())
        self._recount(was_counted, row)
        self._count(record, known, placed)
        if changed:
            self.baselines.received(row.class_index, was=was_class)
        state = placed.disposition or (LabelState.CORRECTED if changed else row.progress)
        return Arrival(state, sample_id, row.class_index, example, scored, correction=changed, labelled_at_s=at_s)

    def _follow(self, row: LabelRow, sample_id: str, known: Known, *, is_first: bool, changed: bool) -> Example | None:
        """Update the state after a further record. Returns an example if another class counts now.

        `is_first`: the record is the first label, after the implied class or after retractions.
        """
        counts = row.class_index >= 0
        joins = is_first and row.state is LabelState.RETRACTED
        x = None
        if (joins and row.class_index != ERASED) or (changed and counts):
            x = self.samples.payload(known)
        if x is not None:
            row.state = JOINED
        elif joins:
            row.state = LabelState.EXPIRED
        elif not counts and len(row.records) == 1:
            row.state = LabelState.RETRACTED  # it withdraws the implied class
        if not changed:
            return None
        row.trained_step = 0
        return None if x is None else Example(sample_id, x, row.class_index, row.records[row.counting].time_s)

    # -- scores and counters

    def _score_once(self, row: LabelRow, known: Known, label_class: int, label_s: float) -> Scored | None:
        """Score a sample by a label that is not older than it, unless it is scored already.

        The class that counts is compared with the prediction; the label's own class if that is withdrawn already.
        """
        if row.flags & SCORED or label_class < 0 or label_s < known.arrived_s:
            return None
        scored = self._score(known.answers, label_class if row.class_index < 0 else row.class_index, label_s)
        if scored is not None:
            row.flags |= SCORED
        return scored

    def _score(self, answers: Answers, class_index: int, label_s: float) -> Scored | None:
        arrived_s, student_class, own, majority, no_change, published = answers
        prediction = own if published is None else published
        if prediction.class_index == UNLABELLED:
            return None  # load shedding: no prediction was made
        self.counters.scored += 1
        self.counters.scored_published += published is not None
        majority_class = majority if majority >= 0 else None
        no_change_class = no_change if no_change >= 0 else None
        delay_s = label_s - arrived_s
        return Scored(prediction, student_class, class_index, delay_s, majority_class, no_change_class, own)

    def _count(self, record: LabelRecord, known: Known | None, placed: Placed | None = None) -> None:
        """Count one label record, and note an erasure for `Samples.prune`."""
        c = self.counters
        c.read += 1
        if placed is not None:
            c.duplicate += placed.duplicates
            c.corrected += placed.corrections
        if record.class_index == RETRACTED:
            c.retracted += 1
        elif record.class_index == ERASED:
            c.erased += 1
            if known is not None:
                self.samples.erase(known.row, self.step)

    def _recount(self, was: str | None, row: LabelRow) -> None:
        """Move a sample from one counter to another. `was`: `LabelRow.counted_as` before."""
        c, now = self.counters, row.counted_as
        if was is not None:
            setattr(c, was, getattr(c, was) - 1)
        if now is not None:
            setattr(c, now, getattr(c, now) + 1)

    def _order(self, record: LabelRecord) -> tuple[float, str, int, int]:
        return record.time_s, self.topics.name(record.topic), record.partition, record.offset

    def _row(self, row_number: int) -> LabelRow | None:
        data = self.labels.get(row_number)
        return None if data is None else LabelRow.unpack(data)
