"""The label ledger: what became of each label, as a fold over the log, on disk.

The caller opens a step, gives the ledger the samples and labels of that step, and ends it. After a crash it rewinds to
the step of the checkpoint and repeats the steps after it, with the same result. Time is the watermark (`now_s`), never
the wall clock.

Each label record read is in exactly one of these counts:

    read == joined + waiting + duplicate + corrected + retracted + erased + expired + orphan + held + held_dropped

An erasure withdraws all labels of a sample for good. From then on its payload is not used: a later label expires, and a
sample that is read after its erasure is refused as known. The payload is overwritten when no rewind can need it
(`prune`). The id is known as erased for as long as ids are kept.

    counts   the counters, and the labels by class (`baselines`)

What a record does is in `joining`; samples and topics are in `samples`, labels without a sample in `waiting`, labels of
unknown classes in `held`. The layout of rows is in `rows`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from pathlib import Path

from streamlearn.errors import ConfigError, StoreError
from streamlearn.ledger import Arrival, LedgerCounts, PublishedOutcome
from streamlearn.ledger.baselines import Baselines
from streamlearn.ledger.class_names import ClassNames
from streamlearn.ledger.held import MAX_HELD, HeldLabels
from streamlearn.ledger.joining import Joiner
from streamlearn.ledger.rows import Counters, key_of
from streamlearn.ledger.samples import Samples, TopicNumbers
from streamlearn.ledger.settings import LabelsConfig
from streamlearn.ledger.store import Store
from streamlearn.ledger.waiting import WaitingLabels
from streamlearn.records import UNLABELLED, Array, Label, Position, Prediction, PublishedAnswer, Sample, Schema

TABLES = ("counts", "ids", "early", "held_of")
NUMBERED = ("topics", "labels", "queue", "held", "grown", "erased", "answers")
RINGS = ("samples", "evicted")
EXPIRE_PER_STEP = 4096
"""A step expires at most this many rows of a kind, or twice its samples: the end of a long silence must not stall."""
_ANSWERS_TOGETHER = 64
"""Published answers whose samples are looked up together. Their rows hold the payloads."""
UNFLUSHED_BYTES = 64 << 20
"""Payloads in the open transaction, beyond which the ledger flushes by itself."""


class Ledger:
    """Joins labels with samples. For the learner's thread; other processes use `view.LedgerView`.

    Raises:
        StateLockedError: another learner has it open.
        ConfigError: it is of another schema.
        StoreError: it is of another format. Every method raises it when the store cannot be read or written.
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
        """`read_back` returns an evicted payload by the position and id of its sample, None if the log lost it.

        `may_write` is called before each flush. It raises StateLockedError if another learner has taken over.
        """
        self._schema, self._settings = schema, settings
        self._payload_rows = max(settings.payload_max_bytes // schema.nbytes, 1)
        implied = settings.implied_class
        self._implied_class = None if implied is None else schema.class_index(implied)
        self._store = Store(path, tables=TABLES, numbered=NUMBERED, rings=RINGS, may_write=may_write)
        tables, self._c = self._store.tables, Counters()
        self._counts, self._labels = tables["counts"], tables["labels"]
        self._topics = TopicNumbers(tables["topics"])
        self._samples = Samples(self._store, self._c, self._topics, schema, read_back)
        self._waiting = WaitingLabels(self._store, self._c)
        self._held = HeldLabels(self._store, self._c, most=max_held)
        self._classes = ClassNames(self._store, schema, grow=settings.unknown_class == "grow")
        self._baselines = Baselines(self._counts, self._c, schema.capacity)
        parts = (self._samples, self._topics, self._waiting, self._held, self._classes, self._baselines)
        self._joiner = Joiner(self._labels, self._c, *parts, last_counts=settings.corrections == "last")
        try:
            self._classes.check(path)
        except (ConfigError, StoreError):
            self._store.close()
            raise
        self._load()

    def _load(self) -> None:
        """Read from the tables everything that is kept in memory."""
        self._c.load(self._counts.get("counters"))
        for part in (self._topics, self._samples, self._held, self._classes, self._baselines):
            part.load()
        self._flushed_row = self._began_at_row = self._c.high

    # -- steps

    @property
    def step(self) -> int:
        """The last step begun; 0 before the first."""
        return self._store.step

    def rewind(self, step: int) -> None:
        """Restore the ledger to the end of `step`, durably.

        Raises:
            StoreError: `step` is newer than the ledger or older than the last prune; nothing has changed.
        """
        self._store.rewind(step)
        self._load()
        self._store.rings["samples"].cut(self._c.high)
        self.flush()

    def begin(self, step: int, now_s: float) -> None:
        """Open a step. `now_s` is the watermark; an earlier one than before has no effect."""
        self._store.begin(step)
        self._joiner.begin(step)
        self._c.now_s = max(self._c.now_s, now_s)
        self._began_at_row = self._c.high

    def end(self) -> None:
        """Expire what is past its bounds, write the counters, close the step."""
        c, limit, most = self._c, self._limit(), self._settings.max_ids
        oldest_s = c.now_s - self._settings.horizon_s
        c.payload_low = max(c.payload_low, c.high - self._payload_rows)
        for row_number in self._samples.expire(limit, most=most, oldest_s=oldest_s):
            self._labels.delete(row_number)
        self._waiting.expire(limit, most=most, oldest_s=oldest_s)
        self._held.expire(limit, oldest_s=oldest_s)
        first = c.joined + c.waiting + c.expired + c.orphan
        counted = first + c.duplicate + c.corrected + c.retracted + c.erased + c.held + c.held_dropped
        assert c.read == counted, f"I7: {c.read} labels read, {counted} counted"
        self._counts.put("counters", c.pack())
        self._baselines.save()
        self._store.end()
        if (c.high - self._flushed_row) * self._schema.nbytes > UNFLUSHED_BYTES:
            self.flush()

    def flush(self) -> None:
        """Make every ended step durable and visible to views."""
        self._store.flush()
        self._flushed_row = self._c.high

    def prune(self, step: int) -> None:
        """Delete what only a rewind to before `step` would need: undo, evicted payloads, erased payloads."""
        pruned = self._store.pruned
        if step <= pruned:
            return
        then = Counters()
        then.load(self._store.value_at(step, "counts", "counters"))
        self._samples.prune(then, erased_after=pruned, until=step)
        self._store.prune(step)

    def close(self, *, flush: bool = True) -> None:
        """Flush and close; an open step is lost. Without `flush`, so is all since the last flush, as by kill -9."""
        self._store.close(flush=flush)

    # -- the records of a step

    def known(self, sample_ids: Sequence[str]) -> set[str]:
        """Those ids of which a sample arrived within the horizon, or was erased before it arrived."""
        keys = [key_of(sample_id) for sample_id in sample_ids]
        numbers, erased = self._samples.numbers(keys), self._waiting.erased(keys)
        named = zip(sample_ids, keys, strict=True)
        return {sample_id for sample_id, key in named if numbers.get(key) is not None or key in erased}

    def sample_arrived(
        self, sample: Sample, prediction: Prediction, student_class: int, published: Prediction | None = None
    ) -> list[Arrival]:
        """Add a new sample and what was predicted. Returns what its labels did: one that waited, one inside it.

        `published`: its published answer, if that is read in the same step; a later one goes to `answers_published`.
        """
        key = key_of(sample.sample_id)
        known = self._samples.append(key, sample, prediction, student_class, published)
        arrivals = self._joiner.sample(key, sample.sample_id, known)
        if (inside := sample.inside) is not None:
            arrivals.append(self._joiner.label(key, inside, known))
        return arrivals

    def answers_published(self, answers: Sequence[PublishedAnswer]) -> list[PublishedOutcome]:
        """Take records of the predictions topic: they are scored in place of what was predicted on arrival."""
        some = (answers[at : at + _ANSWERS_TOGETHER] for at in range(0, len(answers), _ANSWERS_TOGETHER))
        return [outcome for part in some for outcome in self._joiner.publish(part)]

    def label_arrived(self, label: Label) -> Arrival:
        """Take one label record. A record that is delivered again has no effect.

        Raises:
            LogUnavailableError: the payload cannot be read back now; nothing has changed.
        """
        return self._joiner.label(key_of(label.sample_id), label)

    def labels_arrived(self, labels: Sequence[Label]) -> list[Arrival]:
        """Take label records in this order: the same as `label_arrived` for each, faster for many.

        Raises:
            LogUnavailableError: as `label_arrived`, of one label; those before it are taken.
        """
        return self._joiner.labels_together(labels)

    def implied(self) -> list[Arrival]:
        """Give the implied class to samples without a label `implied_after_s` after they arrived.

        Called once a step, after its joins. At most as many samples as `end` expires; the next steps continue.

        The implied class is learned and scored. It is counted apart, since there is no record. A later record of the
        same class becomes the first label and changes nothing else. A record of another class is a correction,
        whatever `corrections` is.
        """
        after_s, c = self._settings.implied_after_s, self._c
        if self._implied_class is None or after_s is None:
            return []
        arrivals, oldest_s = [], c.now_s - after_s
        for _ in range(self._limit()):
            if c.implied_low == c.high:
                break
            row_number = c.implied_low
            sample = self._samples.head(row_number)
            if self._samples.is_recent(sample.arrived_s, oldest_s):
                break
            if sample.arrived_s < oldest_s and self._labels.get(row_number) is None and not self._held.of(sample.key):
                arrivals.append(self._joiner.imply(row_number, self._implied_class, after_s))
            c.implied_low += 1
        return arrivals

    def release_held(self) -> list[Arrival]:
        """Take the held labels whose class is known by now. Called once a step, before its joins.

        Which labels those are is a function of state and schema, so a replay releases them in the same step.
        """
        return [self._joiner.release(row) for row in self._held.release(self._classes.known, self._limit())]

    def trained(self, sample_ids: Iterable[str]) -> None:
        """The open step learns the labels of these samples. Only the first time counts."""
        self._joiner.trained(sample_ids)

    def _limit(self) -> int:
        return max(EXPIRE_PER_STEP, 2 * (self._c.high - self._began_at_row))

    # -- queries

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
        """The majority class and the no-change class; None before the first label."""
        majority, last = self._c.majority_class, self._c.last_class
        return (None, None) if majority == UNLABELLED else (majority, last)

    @property
    def class_names(self) -> list[str]:
        """By index: the schema's, then those that took a spare output."""
        return list(self._classes.known)

    def newest_sample(self) -> tuple[Position, str] | None:
        """Position and id of the newest sample; None if there is none."""
        c = self._c
        return None if c.high == c.id_low else self._samples.position_and_id(c.high - 1)

    def held(self) -> dict[str, int]:
        """How many labels are held by class name, the most frequent names first (`held.NAMES_REPORTED`)."""
        return self._held.names()
