"""The training loop: read, batch, predict, score, learn, publish, save.

The order is the safety argument, so it is written once, here. For each step t:

    1. dead-letter    bad records are durable in their own topic, with the reason, before anything else
    2. journal        the records of step t are written down before they have any effect
    3. predict        both networks answer every fresh sample before it is learned
    4. join           published answers, samples and labels enter the ledger, in an order that the records alone define;
                      labels score
    5. learn          one step, which changes only weights in memory
    6. guard          at some steps the model is checked, and repaired if necessary
    7. publish, save  journal and ledger are synced first; then the teacher is published, or all state is saved

A crash after 2 repeats step t with the same records. A crash before 2 may form step t from other records, and nothing
outside has seen a difference. Journaled steps are replayed on the same path with the batch given (D4); there is no
second loop.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import structlog

from streamlearn.judge.election import Election
from streamlearn.judge.scoreboard import Scoreboard
from streamlearn.judge.window import group_of, joined
from streamlearn.learn.batching import Draft, MicroBatcher, thin
from streamlearn.learn.learner import Learner
from streamlearn.learn.recent import RecentSamples
from streamlearn.ledger import Arrival
from streamlearn.ledger.ledger import Ledger
from streamlearn.ledger.replay_buffer import ReplayBuffer
from streamlearn.ledger.request_writer import RequestWriter
from streamlearn.log.feed import Feed
from streamlearn.loop.accounts import Accounts, accounts_of, accounts_of_predictions
from streamlearn.loop.assembler import BatchAssembler
from streamlearn.loop.further_steps import FurtherSteps
from streamlearn.loop.guarding import Guarding
from streamlearn.loop.interval import Interval
from streamlearn.loop.learned_offsets import LearnedOffsets
from streamlearn.loop.log_access import LogAccess
from streamlearn.loop.report import Observer, Phases, StepReport
from streamlearn.loop.scoring import Answers, Scoring
from streamlearn.loop.settings import BatchConfig
from streamlearn.loop.watermark import Watermark
from streamlearn.models.answer import Thresholds
from streamlearn.records import Array, BadRecord, Item, Label, Offsets, Prediction, Sample, Schema
from streamlearn.state.checkpoint import Checkpoint, Saver
from streamlearn.state.journal import Journal
from streamlearn.state.publish import Publisher
from streamlearn.state.settings import StateConfig

_log = structlog.get_logger(__name__)
WAITING_PER_ROW = 8
"""A micro-batch grows while this many times as many samples wait."""
_TURN_S = 0.05
"""How long the loop waits for records before it looks at its other duties."""
SOON = 0.25
"""Share of the least time between two teachers after which one with new labels is published, if no record waits."""
_JOURNAL_CROWDED = 0.5
"""Load of the journal from which the next checkpoint is saved at once. From 1 on, steps wait while one is saved."""


@dataclass(kw_only=True, eq=False)
class TrainingLoop:
    """The parts of a learner, and the loop that runs them in one thread. No other thread changes them."""

    schema: Schema
    batch: BatchConfig
    state: StateConfig
    log: LogAccess
    feed: Feed
    batcher: MicroBatcher
    ledger: Ledger
    learner: Learner
    replay: ReplayBuffer
    recent: RecentSamples
    board: Scoreboard
    election: Election
    guarding: Guarding
    requests: RequestWriter
    journal: Journal
    saver: Saver
    publisher: Publisher
    observer: Observer
    identity: Mapping[str, Any]
    """Saved in each checkpoint: the settings that its state depends on."""
    thresholds: Thresholds
    """Of classes, in the answers that are scored."""
    shed_above: int | None = None
    """Waiting samples above which some are shed; None: never."""
    backlog_rows: int = 0
    """Samples of the largest micro-batch of which none is shed; 0: `batch.fresh`."""
    twin_on_arrival: bool = False
    """In a simulation the twin answers fresh samples too: one more forward pass."""
    accounts: Accounts = field(default_factory=Accounts)
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self._assembler = BatchAssembler(self.schema, self.batch, self.learner, self.replay, self.recent)
        self._scoring = Scoring(
            self.learner,
            self.ledger,
            self.board,
            guarding=self.guarding,
            election=self.election,
            requests=self.requests,
            thresholds=self.thresholds,
            classes=self.schema.capacity,
            twin_on_arrival=self.twin_on_arrival,
        )
        self._watermark = Watermark()
        self._learned = LearnedOffsets(self.batcher.next_offsets)
        share = self.learner.config.cpu_share
        self._further = FurtherSteps(self.batch.steps, fresh=self.batch.fresh, cpu_share=share)
        now_s, step = self.clock(), self.learner.step
        self._publishing = Interval(self.state.publish_every_s, now_s, step)
        self._flushing = Interval(self.state.publish_every_s, now_s, step)
        self._saving = Interval(self.state.checkpoint_every_s, now_s, step)
        self._labels_unpublished = False
        self._stepped_at_s = now_s
        self._replay_stopped = False
        self._pruned_step = 0

    # -- run

    def replay_journal(self, journaled: Iterable[tuple[int, Offsets]], stopping: threading.Event) -> None:
        """Repeat the journaled steps. If `stopping` is set, it ends between two steps."""
        for step, next_offsets in journaled:
            assert step == self.learner.step + 1, f"the journal has step {step}, the learner {self.learner.step}"
            draft = None
            while draft is None:
                if stopping.is_set():
                    self._replay_stopped = True
                    return
                draft = self.batcher.take_exactly(self.feed.queues, next_offsets)
                if draft is None:
                    self.feed.wait(0.1)
            self.step(draft, journaled=True)
            self.observer.turn_done()

    def run(self, stopping: threading.Event, *, until_end: bool = False) -> None:
        """Learn until `stopping` is set or, with `until_end`, until everything in the log is learned."""
        self._further.start(self.clock())
        while not stopping.is_set():
            if self.journal.load >= 1.0 and self.saver.busy:
                self._wait_for_save(stopping)
                continue
            draft = self._next_batch(until_end=until_end)
            if draft is not None:
                self.step(draft, journaled=False)
            self._publish_if_due(has_time=draft is None or not draft.items)
            self._save_if_due()
            self.observer.turn_done()
            if draft is None:
                if until_end and self._read_all():
                    return
                further_s = self._further.wait_s(self.clock())
                with self._timed("wait"):
                    self.feed.wait(_TURN_S if further_s is None else min(_TURN_S, further_s))

    def step(self, draft: Draft, *, journaled: bool) -> None:
        """Take one step: the numbered sentences at the top of this file, up to 6."""
        began_s, phases = self.clock(), Phases(self.clock)
        items, t = draft.in_order(), self.learner.step + 1
        bad = [item for item in items if isinstance(item, BadRecord)]
        if not journaled:
            self.log.dead_letter(bad)
            self.journal.append(t, draft.next_offsets)
        self._watermark.advance(items)
        self.ledger.begin(t, self._watermark.time_s)
        fresh, shed, duplicates = self._select(items)
        phases.end("assemble")

        answers = self._scoring.predict(fresh, self._watermark.time_s) | self._scoring.unanswered(shed)
        phases.end("predict")

        published, outcomes = self._scoring.take_published(draft.predictions, (*fresh, *shed))
        arrivals = self._join(items, answers, published)
        self._scoring.take_labels(arrivals)
        self._assembler.take_labels(arrivals)
        phases.end("ledger")

        batch = self._assembler.assemble(fresh, t, again=not items)
        self._assembler.erase(arrivals)
        phases.end("assemble")

        factors = self.guarding.factors(t)
        self.learner.learn(batch, weight_factor=factors.consistency_weight, learning_rate_factor=factors.learning_rate)
        phases.end("learn")

        self.guarding.check(t)
        phases.end("guard")

        self._stepped_at_s = self.clock()
        self.ledger.trained(batch.trained_ids)
        self._labels_unpublished |= bool(batch.trained_ids)
        self.ledger.end()
        self._learned.step_done(draft.next_offsets, rows_added=self.replay.added, rows_drawn=self.replay.drawn_below)
        labels = sum(isinstance(item, Label) for item in items)
        self._further.step_done(len(fresh), labels, began_s=began_s, now_s=self._stepped_at_s)
        phases.end("ledger")

        topics = self.batcher.sample_topics
        counts = accounts_of(items, topics, learned=len(fresh), thinned=len(shed), duplicate_ids=duplicates)
        counts.add(accounts_of_predictions(draft.predictions, outcomes))
        self.accounts.add(counts)
        self.observer.step_done(StepReport(step=t, counts=counts, bad=bad, arrivals=arrivals, phases_s=phases.spent_s))

    def close(self) -> None:
        """Publish and save what is new. The save continues in the background."""
        if not self._replay_stopped:  # else what is published is newer
            self._publish_if_due(at_once=True)
        self._save_if_due(at_once=True)

    # -- the records of a step

    def _next_batch(self, *, until_end: bool) -> Draft | None:
        """The records of the next step; None if it is not time for one.

        Further steps have no records, and are taken only if no micro-batch can be closed. With `until_end` all those of
        each micro-batch are taken, and no batch grows, so that the result does not depend on time.
        """
        if until_end and self._further.any:
            return self.batcher.nothing()
        most, most_labelled = self._most_rows(may_grow=not until_end)
        draft = self.batcher.fill(
            self.feed.queues, self.feed.behind, self.clock(), most=most, most_labelled=most_labelled
        )
        if draft is None and self._step_due(until_end=until_end):
            draft = self.batcher.close()
        if draft is None and not until_end and self._further.wait_s(self.clock()) == 0.0:
            draft = self.batcher.nothing()
        return draft

    def _step_due(self, *, until_end: bool) -> bool:
        """Whether labels wait to be learned and no record comes, or the log ends with an open batch.

        Such a step may have no records. It is journaled like any other.
        """
        waiting = self.replay.new_count > 0
        if until_end and self._read_all():
            return waiting or self.batcher.opened_at_s is not None
        return waiting and self.clock() - self._stepped_at_s >= self.batch.max_age_s

    def _read_all(self) -> bool:
        """Whether everything in the log is in a step or in the open batch, except answers that it has no room for."""
        full_topic = None if self.batcher.takes_predictions else self.batcher.predictions_topic
        queues = {tp: queue for tp, queue in self.feed.queues.items() if tp.topic != full_topic}
        return not any(self.feed.behind(tp) for tp in queues) and not any(queues.values())

    def _most_rows(self, *, may_grow: bool) -> tuple[int, int]:
        """Samples of the next micro-batch, and those with a label inside, by the number of samples that wait."""
        fresh = self.batch.fresh
        if self.shed_above is None and not (may_grow and self.backlog_rows > fresh):
            return fresh, fresh
        waiting = sum(n for tp, n in self.feed.lag().items() if tp.topic in self.batcher.sample_topics)
        if self.shed_above is not None:  # all with a label inside are learned, so there must be few
            return (self.batcher.wide if waiting > self.shed_above else fresh), fresh
        grown = min(self.backlog_rows, max(fresh, waiting // WAITING_PER_ROW))
        return grown, grown

    def _select(self, items: Sequence[Item]) -> tuple[list[Sample], list[Sample], int]:
        """Samples to learn, samples to shed, and how many have a known id. Depends on items and settings only."""
        arrived = [item for item in items if isinstance(item, Sample)]
        known = self.ledger.known([sample.sample_id for sample in arrived])
        fresh: dict[str, Sample] = {}
        for sample in arrived:
            if sample.sample_id not in known:
                fresh.setdefault(sample.sample_id, sample)
        samples = list(fresh.values())
        duplicates = len(arrived) - len(samples)
        if self.shed_above is None or len(samples) <= self.batch.fresh:
            return samples, [], duplicates
        return *thin(samples, self.batch.fresh), duplicates

    def _join(self, items: Sequence[Item], answers: Answers, published: Mapping[str, Prediction]) -> list[Arrival]:
        """Enter samples and labels into the ledger, in order; what became of each label."""
        arrivals = self.ledger.release_held()
        labels: list[Label] = []  # consecutive labels enter together
        for item in items:
            if isinstance(item, Label):
                labels.append(item)
            elif isinstance(item, Sample):
                if labels:
                    arrivals += self.ledger.labels_arrived(labels)
                    labels = []
                if (answer := answers.pop(item.sample_id, None)) is not None:
                    arrivals += self.ledger.sample_arrived(item, *answer, published.get(item.sample_id))
                elif item.inside is not None:
                    labels.append(item.inside)  # the sample is a duplicate, but its label is new
        arrivals += self.ledger.labels_arrived(labels)
        return arrivals + self.ledger.implied()

    # -- publish and save

    def publish(self) -> None:
        """Publish the teacher, unless it is not finite. Everything that it came from is durable first."""
        self._flush()
        step, self._publishing.last_s = self.learner.step, self.clock()
        arrays = self.learner.teacher_state()
        if not_finite := [name for name, array in arrays.items() if not np.isfinite(array).all()]:
            _log.error("teacher_not_published", step=step, not_finite=not_finite[:5])
            return
        header: dict[str, Any] = {
            "scores": _summary(self.board),
            "learned_offsets": self._learned.as_json(),
            "classes": self.ledger.class_names,
        }
        if (offsets_C := self.learner.log_offsets).any():
            header["log_offsets"] = offsets_C.tolist()
        self._labels_unpublished = False
        self.publisher.publish(step, arrays, {name: json.dumps(value) for name, value in header.items()})
        self._publishing.last_step = step
        self.observer.published(step)

    def _publish_if_due(self, *, at_once: bool = False, has_time: bool = False) -> None:
        """`has_time`: no micro-batch is ready, so a teacher with new labels is published early.

        While the guard holds back the teacher, label states and label requests are still shown.
        """
        now_s, step = self.clock(), self.learner.step
        if self.guarding.may_publish:
            early = has_time and self._labels_unpublished
            share = 0.0 if at_once or self.guarding.just_repaired else SOON if early else 1.0
            if self._publishing.due(step, now_s, share=share):
                with self._timed("publish"):
                    self.publish()
        elif self._flushing.due(step, now_s, share=0.0 if at_once else 1.0):
            with self._timed("publish"):
                self._flush()

    def _save_if_due(self, *, at_once: bool = False) -> None:
        at_once = at_once or self.journal.load >= _JOURNAL_CROWDED
        # `busy` is asked first: a slow disk must not cost a copy of all state at each turn.
        if not self.saver.busy and self._saving.due(self.learner.step, self.clock(), share=0.0 if at_once else 1.0):
            with self._timed("save"):
                self._save()

    def _flush(self) -> None:
        """Make visible what became of labels, and label requests. The journal that leads to them is durable first."""
        self.journal.sync()
        self.ledger.flush()
        self.requests.flush()
        self._flushing.done(self.learner.step, self.clock())

    def _save(self) -> None:
        self._check()
        self.journal.sync()
        oldest = self.saver.oldest_step()
        if oldest > self._pruned_step:
            self.ledger.prune(oldest)
            self._pruned_step = oldest
        self.journal.keep_after(oldest)
        self.ledger.flush()
        step = self.learner.step
        if self.saver.submit(Checkpoint(step, self.batcher.next_offsets, self.arrays(), self.extra())):
            self._saving.done(step, self.clock())

    def _wait_for_save(self, stopping: threading.Event) -> None:
        """The journal is full of steps that a restart needs: wait until an old checkpoint is removed (I6)."""
        with self._timed("save"):
            stopping.wait(0.05)
        self.journal.keep_after(self.saver.oldest_step())
        self.observer.turn_done()

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        started_s = self.clock()
        yield
        self.observer.phase_done(phase, self.clock() - started_s)

    # -- checkpoints

    def arrays(self) -> dict[str, Array]:
        """Everything that a step changes, as arrays for the checkpoint. The names are its format."""
        return joined(
            {
                "learner": self.learner.state(),
                "memory": self.replay.state(),
                "board": self.board.state(),
                "guard": self.guarding.state(),
                "election": self.election.state(),
                "recent": self.recent.state(),
            }
        )

    def extra(self) -> dict[str, Any]:
        """The rest of it, as JSON."""
        return {
            "accounts": self.accounts.as_dict(),
            **self._watermark.as_json(),
            "learned_offsets": self._learned.as_json(),
            "further_steps": self._further.allowed,
            "identity": self.identity,
            "class_names": list(self.ledger.class_names),
        }

    def restore(self, checkpoint: Checkpoint) -> None:
        """Restore all state, including the ledger, to the end of the checkpoint's step."""
        step, arrays, extra = checkpoint.step, checkpoint.arrays, checkpoint.extra
        self.ledger.rewind(step)
        if step == 0:
            return  # the parts are as built
        self.learner.load_state(group_of(arrays, "learner"))
        self.replay.load(group_of(arrays, "memory"))
        self.board.load(group_of(arrays, "board"))
        self.guarding.load(group_of(arrays, "guard"))
        self.election.load(group_of(arrays, "election"))
        self.recent.load(group_of(arrays, "recent"))
        self.accounts = Accounts(**extra["accounts"])
        self._watermark.load(extra)
        self._learned.load(extra["learned_offsets"])
        self._further.allow(extra.get("further_steps", 0))  # the first version had none
        assert self.learner.step == step, (self.learner.step, step)
        if self.learner.served >= len(self.election.candidates):
            self.learner.serve(0)  # it was elected under other settings
        self.journal.keep_after(self.saver.oldest_step())
        for interval in (self._publishing, self._flushing, self._saving):
            interval.last_step = step
        self._check()

    def _check(self) -> None:
        """Assert I7: every record that was read has one outcome."""
        self.accounts.check()
        taken, accounts = self.ledger.counts().read, self.accounts
        assert taken == accounts.labels_taken + accounts.labels_inline, (taken, accounts)


def _summary(board: Scoreboard) -> dict[str, float | int | None]:
    """The scores in the header of a published teacher."""
    gain = board.gain.report()
    return {
        "labels": board.prequential.scored,
        "windowed_accuracy": board.prequential.windowed("teacher"),
        "accuracy_at_label": gain.teacher,
        "ssl_gain": gain.gain,
    }
