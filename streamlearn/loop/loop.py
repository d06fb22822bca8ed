"""The loop: read, batch, score, learn, save, publish. The whole program in one screen.

Order is the safety argument, so it is written once, here. For each step t:

    1. dead-letter   bad records are durable elsewhere, with their reasons, before they are passed by
    2. journal       which records form step t is written down before anything comes of them
    3. predict       both networks answer every fresh sample before it is learned (under overload, those that are)
    4. join          samples and labels enter the ledger, in the one order that the records define; scores follow
    5. learn         one step; only weights in memory change
    6. look          the guard looks at what came of it, and mends it where it must
    7. show, save    journal and ledger are synced first; then the teacher is published, or everything saved together

A crash after 2 forms step t again from the same records. A crash before 2 lets the clock cut anew, and nobody has seen
the difference. Replay of journaled steps takes the same path with the cut given (D4): there is no second loop.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import structlog

from streamlearn.judge.scoreboard import Scoreboard
from streamlearn.learn.batching import Draft, thin
from streamlearn.ledger import Arrival
from streamlearn.loop.accounts import Accounts
from streamlearn.loop.further_steps import FurtherSteps
from streamlearn.loop.learned_offsets import LearnedOffsets
from streamlearn.loop.parts import Cadence, Parts, StepReport
from streamlearn.loop.watermark import Watermark
from streamlearn.records import (
    ERASED,
    RETRACTED,
    UNLABELLED,
    Array,
    BadRecord,
    Gap,
    Item,
    Label,
    MicroBatch,
    Offsets,
    Prediction,
    Sample,
    sample_key,
)

_log = structlog.get_logger(__name__)
_JOURNAL_CROWDED = 0.5
"""From this load on, the next checkpoint is saved at once, and from 1 on no step is taken while a save is under way."""


class Pipeline:
    """Runs in one thread, the only one that touches student, ledger and memory."""

    def __init__(self, parts: Parts, cadence: Cadence, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.parts, self._cadence, self._clock = parts, cadence, clock
        self._published_step = self._shown_step = self._saved_step = parts.learner.step
        self._published_at_s = self._shown_at_s = self._saved_at_s = clock()
        self._stepped_at_s = clock()
        self._nothing_said = Prediction(UNLABELLED, np.zeros(parts.schema.capacity, np.float32), 0)
        """Of a sample that got no answer."""
        self._behind_journal = False
        """A replay was stopped before its end."""
        self._pruned_step = 0
        self._admitted = 0
        self._watermark = Watermark()
        self._learned = LearnedOffsets(parts.batcher.next_offsets)
        self._further = FurtherSteps(per_batch=cadence.steps - 1, idle=cadence.idle_steps)

    def replay(self, journaled: Iterator[tuple[int, Offsets]], stopping: threading.Event) -> int:
        """Form the steps that the journal knows, exactly as they were; returns how many.

        Told to stop, it ends between two of them: they may be as many as were not saved yet.
        """
        count, watcher = 0, self.parts.watcher
        for step, next_offsets in journaled:
            assert step == self.parts.learner.step + 1, (
                f"the journal goes on at {step}, the learner at {self.parts.learner.step}"
            )
            draft = None
            while not stopping.is_set():
                draft = self.parts.batcher.take_exactly(self.parts.source.queues, next_offsets)
                if draft is not None:
                    break
                self.parts.source.wait(0.1)
            if draft is None:
                self._behind_journal = True
                return count
            self.step(draft, journaled=True)
            watcher.came_round()
            count += 1
        return count

    def run(self, stopping: threading.Event, *, until_end: bool = False) -> None:
        """Learn until told to stop (or, with `until_end`, until all that the log holds is learned).

        Further steps are taken as far as no micro-batch can be closed instead; all of them with `until_end`, where
        nothing but the end is waited for.
        """
        self._further.apply_settings()
        parts = self.parts
        while not stopping.is_set():
            if parts.journal.load >= 1.0 and parts.checkpoints.busy:
                self._wait_for_save(stopping)
                continue
            source = parts.source
            draft = parts.batcher.nothing() if until_end and self._further.of_batch else None
            if draft is None:
                overloaded = self._overloaded()
                draft = parts.batcher.fill(source.queues, source.behind, self._clock(), overloaded=overloaded)
            if draft is None and self._owes_a_step(until_end=until_end):
                draft = parts.batcher.close_now()
            if draft is None and self._further and not until_end:
                draft = parts.batcher.nothing()
            if draft is not None:
                self.step(draft, journaled=False)
            self._keep()
            parts.watcher.came_round()
            if draft is None:
                if until_end and self._read_all():
                    return
                with self._timed("wait"):
                    parts.source.wait(0.05)

    def step(self, draft: Draft, *, journaled: bool) -> None:
        """One step of the loop: the numbered sentences at the top of this file."""
        parts, phases = self.parts, _Phases(self._clock)
        items = draft.in_order()
        t = parts.learner.step + 1

        bad = [item for item in items if isinstance(item, BadRecord)]
        if bad and not journaled:
            parts.dead_letters(bad)
        if not journaled:
            parts.journal.append(t, draft.next_offsets)
        self._watermark.advance(items)
        parts.ledger.begin(t, self._watermark.time_s)
        fresh, duplicates = self._fresh(items)
        fresh, thinned = self._thin(fresh)
        phases.end("assemble")

        predictions = self._predict(fresh)
        predictions |= {sample.sample_id: (self._nothing_said, UNLABELLED) for sample in thinned}
        phases.end("predict")

        arrivals = self._join(items, predictions)
        phases.end("ledger")

        batch = self._assemble(fresh, t, again=not items)
        self._erase_recent(arrivals)
        phases.end("assemble")

        factors = parts.guarding.factors(t)
        parts.learner.learn(batch, weight_factor=factors.consistency_weight, learning_rate_factor=factors.learning_rate)
        phases.end("learn")

        parts.guarding.look(t)
        if parts.election is not None and parts.guarding.just_mended:
            parts.election.restart()
        phases.end("guard")

        self._stepped_at_s = self._clock()
        parts.ledger.trained(batch.trained_ids)
        parts.ledger.end()
        self._learned.step_done(draft.next_offsets, rows_added=parts.memory.added, rows_drawn=parts.memory.drawn_below)
        self._further.step_done(with_records=bool(items))
        phases.end("ledger")
        gaps = [item for item in items if isinstance(item, Gap)]
        samples = sum(item.position.topic == parts.batcher.sample_topic for item in items if not isinstance(item, Gap))
        report = StepReport(
            step=t,
            samples=samples,
            labels=len(items) - len(gaps) - samples,
            fresh=len(fresh),
            labelled=batch.labelled_count,
            bad=bad,
            gaps=gaps,
            duplicates=duplicates,
            arrivals=arrivals,
            phases_s=phases.spent_s,
            thinned=len(thinned),
        )
        self._account(report, items)
        parts.watcher.step_done(report)

    def close(self) -> None:
        """Publish and save what was learned since the last time. The save goes on in the background."""
        if self._behind_journal:
            pass  # what is shown is newer than this
        elif self.parts.learner.step > self._published_step and self.parts.guarding.may_publish:
            self.publish()
        elif self.parts.learner.step > self._shown_step:
            self._show()
        if self.parts.learner.step > self._saved_step:
            self._save()

    def arrays(self) -> dict[str, Array]:
        """Everything that changes with a step, as arrays for the checkpoint."""
        parts = self.parts
        groups = {
            "learner": parts.learner.state(),
            "memory": parts.memory.state(),
            "board": parts.board.state(),
            "guard": parts.guarding.state(),
            "election": parts.election.state() if parts.election is not None else {},
            "recent": parts.recent.state() if parts.recent is not None else {},
        }
        return {f"{group}.{name}": array for group, arrays in groups.items() for name, array in arrays.items()}

    def extra(self) -> dict[str, Any]:
        """The same, what is no array."""
        return {
            "accounts": self.parts.accounts.as_dict(),
            **self._watermark.as_json(),
            "learned_offsets": self._learned.as_json(),
            **self._further.as_json(),
        }

    def restore(self, step: int, arrays: Mapping[str, Array], extra: Mapping[str, Any]) -> None:
        """Be as of the end of that step, the ledger included."""
        parts = self.parts
        parts.ledger.rewind(step)
        if step == 0:
            return  # as built
        groups: dict[str, dict[str, Array]] = {"learner": {}, "memory": {}, "board": {}, "guard": {}}
        groups |= {"election": {}, "recent": {}}
        for name, array in arrays.items():
            group, _, rest = name.partition(".")
            groups[group][rest] = array
        parts.learner.load_state(groups["learner"])
        parts.memory.load(groups["memory"])
        parts.board.load(groups["board"])
        parts.guarding.load(groups["guard"])
        if parts.election is not None:
            parts.election.load(groups["election"])
        if parts.recent is not None and groups["recent"]:
            parts.recent.load(groups["recent"])
        parts.accounts = Accounts(**extra["accounts"])
        self._watermark.load(extra)
        self._learned.load(extra["learned_offsets"])
        self._further.load(extra)
        assert parts.learner.step == step, (parts.learner.step, step)
        parts.journal.keep_after(parts.checkpoints.oldest_step())
        self._saved_step = self._published_step = self._shown_step = step
        self._check()

    def another_method(self) -> None:
        """What was restored was learned by another method: what was counted to judge that one by is forgotten."""
        self.parts.learner.another_method()
        self.parts.guarding.another_learns()
        if self.parts.election is not None:
            self.parts.election.restart()

    def _check(self) -> None:
        """Assert I7: what was read is what became of it."""
        self.parts.accounts.check()
        taken, accounts = self.parts.ledger.counts().read, self.parts.accounts
        assert taken == accounts.labels_taken + accounts.labels_inline, (taken, accounts)

    def _fresh(self, items: Sequence[Item]) -> tuple[list[Sample], int]:
        """Samples with a new id, in order, and how many had an id that was seen before."""
        fresh: dict[str, Sample] = {}
        duplicates = 0
        for item in items:
            if isinstance(item, Sample):
                if item.sample_id in fresh or self.parts.ledger.is_known(item.sample_id):
                    duplicates += 1
                else:
                    fresh[item.sample_id] = item
        return list(fresh.values()), duplicates

    def _overloaded(self) -> bool:
        """So many samples wait in the log that some are to be passed by (`log.shed_above_records`)."""
        if self._cadence.thin_above is None:
            return False
        topic, lag = self.parts.batcher.sample_topic, self.parts.source.lag()
        return sum(records for partition, records in lag.items() if partition.topic == topic) > self._cadence.thin_above

    def _thin(self, fresh: list[Sample]) -> tuple[list[Sample], list[Sample]]:
        """What of a wide batch is learned, and what is passed by: by the batch and the settings alone."""
        if self._cadence.thin_above is None or len(fresh) <= self._cadence.fresh:
            return fresh, []
        return thin(fresh, self._cadence.fresh)

    def _predict(self, fresh: Sequence[Sample]) -> dict[str, tuple[Prediction, int]]:
        """Teacher's prediction and student's class of each fresh sample; the given answer where a client had one."""
        if not fresh:
            return {}
        parts, version = self.parts, self.parts.learner.step
        x = np.stack([sample.x for sample in fresh])
        asked = parts.learner.ask(x)
        majority, no_change = parts.ledger.baselines
        ids, positions = [sample.sample_id for sample in fresh], [sample.position for sample in fresh]
        answers = asked()
        twin_B = parts.learner.classify(x).twin_B if parts.oracle_asks_twin else None
        teacher_B = answers.teacher_probs_BC.argmax(axis=1).tolist()
        finite_B = np.isfinite(answers.student_probs_BC.sum(axis=1))
        student_B = np.where(finite_B, answers.student_probs_BC.argmax(axis=1), UNLABELLED).tolist()
        # A value may be too much for a network; a server refuses to answer it, and here it is as if it was not asked.
        answered_B = np.isfinite(answers.teacher_probs_BC.sum(axis=1))
        predictions: dict[str, tuple[Prediction, int]] = {}
        for n, sample in enumerate(fresh):
            own = Prediction(teacher_B[n], answers.teacher_probs_BC[n], version)
            predictions[sample.sample_id] = (
                sample.answer or (own if answered_B[n] else self._nothing_said),
                student_B[n],
            )
            if sample.true_label is not None and answered_B[n]:
                parts.board.oracle.update(
                    true_class=sample.true_label,
                    teacher_class=teacher_B[n],
                    student_class=student_B[n],
                    teacher_probabilities_C=own.probabilities_C,
                    majority_class=majority,
                    no_change_class=no_change,
                )
                if twin_B is not None:
                    parts.board.oracle_gain.update(sample.true_label, teacher_B[n], int(twin_B[n]))
        given = [answer for answer, _ in predictions.values() if answer.class_index != UNLABELLED]
        parts.board.traffic.arrived(given)
        parts.guarding.arrived(x, answers)
        if parts.wanted is not None:
            parts.wanted.offer(
                ids, positions, answers.teacher_probs_BC, answers.student_probs_BC, self._watermark.time_s
            )
        return predictions

    def _join(self, items: Sequence[Item], predictions: dict[str, tuple[Prediction, int]]) -> list[Arrival]:
        """Enter samples and labels into the ledger in order; remember examples, score what can be scored."""
        parts = self.parts
        arrivals = parts.ledger.release_held()
        labels: list[Label] = []  # those in a row enter together
        for item in items:
            if isinstance(item, Label):
                labels.append(item)
            elif isinstance(item, Sample):
                arrivals += parts.ledger.labels_arrived(labels)
                labels = []
                if (answer := predictions.pop(item.sample_id, None)) is not None:
                    arrivals += parts.ledger.sample_arrived(item, *answer)
                elif item.inside is not None:
                    # A sample sent again with its label: the sample is a duplicate, the label is news.
                    labels.append(item.inside)
        arrivals += parts.ledger.labels_arrived(labels)
        arrivals += parts.ledger.implied()
        self._admit()
        self._compare_now(arrivals)
        for arrival in arrivals:
            self._learn_of(arrival)
        if parts.wanted is not None and arrivals:
            parts.wanted.labelled([arrival.sample_id for arrival in arrivals])
        return arrivals

    def _admit(self) -> None:
        """Classes that have a name since a moment ago, or since the config names them, are learned from here on."""
        names = self.parts.ledger.class_names
        if len(names) > self._admitted:
            self.parts.learner.admit(len(names))
            self.parts.board.name(names)
            self._admitted = len(names)

    def _compare_now(self, arrivals: Sequence[Arrival]) -> None:
        """Ask all that could be served once more, now that the label is here and before it is learned."""
        compared = [arrival for arrival in arrivals if arrival.scored is not None and arrival.example is not None]
        if not compared:
            return
        parts = self.parts
        found = parts.learner.classify(np.stack([a.example.x for a in compared if a.example is not None]))
        champion = parts.learner.served
        for n, arrival in enumerate(compared):
            assert arrival.scored is not None
            parts.board.gain.update(
                arrival.class_index,
                int(found.teacher_B[n]),
                None if found.twin_B is None else int(found.twin_B[n]),
                first_class=arrival.scored.prediction.class_index,
                served_class=int(found.candidates_KB[parts.learner.served, n]),
            )
            parts.guarding.compared(
                right=bool(found.teacher_B[n] == arrival.class_index),
                version=arrival.scored.prediction.model_version,
            )
            if parts.election is not None:
                champion = parts.election.update(champion, found.candidates_KB[:, n] == arrival.class_index)
        if champion != parts.learner.served:
            parts.learner.serve(champion)
            parts.guarding.another_answers()

    def _learn_of(self, arrival: Arrival) -> None:
        """What one label changes in memory and scores."""
        if arrival.example is not None and self.parts.learner.clips(arrival.example.x):
            # Once as a fresh sample is enough: replayed, it would determine the batch statistics again and again.
            _log.warning("labelled_rows_evicted", step=self.parts.learner.step + 1, ids=[arrival.sample_id])
        elif arrival.example is not None:
            self.parts.memory.add(arrival.example)
        elif arrival.class_index in (RETRACTED, ERASED):
            self.parts.memory.remove(arrival.sample_id)
        elif arrival.correction or arrival.labelled_at_s is not None:
            self.parts.memory.relabel(arrival.sample_id, arrival.class_index, arrival.labelled_at_s)
        if (scored := arrival.scored) is not None:
            prediction = scored.prediction
            self.parts.board.prequential.update(
                true_class=scored.class_index,
                teacher_class=prediction.class_index,
                student_class=scored.student_class,
                teacher_probabilities_C=prediction.probabilities_C,
                majority_class=scored.majority_class,
                no_change_class=scored.no_change_class,
            )
            self.parts.board.traffic.labelled(prediction, scored.delay_s)
            self.parts.guarding.scored(wrong=prediction.class_index != scored.class_index)

    def _assemble(self, fresh: Sequence[Sample], step: int, *, again: bool) -> MicroBatch:
        """Rows of one fixed shape: fresh samples, and labelled rows from the memory, new ones first (D7).

        `again`: a step without records learns from recent samples once more, where there are any.
        """
        parts, schema, cadence = self.parts, self.parts.schema, self._cadence
        # A journaled step may be larger than batch.fresh is now.
        fresh_x = np.zeros((max(cadence.fresh, len(fresh)), *schema.shape), schema.dtype)
        for n, sample in enumerate(fresh):
            fresh_x[n] = sample.x
        labelled_x = np.zeros((cadence.labelled, *schema.shape), schema.dtype)
        labelled_y = np.full(cadence.labelled, UNLABELLED, np.int64)
        new_ids = parts.memory.draw_into(labelled_x, labelled_y, step)
        drawn = cadence.labelled if len(parts.memory) else 0
        count, wants_keys = len(fresh), parts.learner.wants_keys
        # Recent samples outlive a change of the method, so they have their keys whether this one asks for them or not.
        keyed = wants_keys or parts.recent is not None
        keys_U = np.array([sample_key(s.sample_id) for s in fresh] if keyed else [0] * count, np.int64)
        if again and parts.recent is not None and len(parts.recent):
            keys_U = parts.recent.draw_into(fresh_x, step)
            count = len(keys_U)
        elif parts.recent is not None and count:
            parts.recent.add(fresh_x[:count], keys_U)
        keys = None
        if wants_keys:
            keys_L = np.array([sample_key(sample_id) for sample_id in parts.memory.drawn_ids], np.int64)
            keys = np.concatenate((keys_U, keys_L))
        return MicroBatch(fresh_x, count, labelled_x, labelled_y, drawn, new_ids, keys, seen_before=again)

    def _erase_recent(self, arrivals: Sequence[Arrival]) -> None:
        """No later step learns from erased samples, those of this step included."""
        if self.parts.recent is not None:
            for arrival in arrivals:
                if arrival.class_index == ERASED:
                    self.parts.recent.remove(sample_key(arrival.sample_id))

    def _account(self, report: StepReport, items: Sequence[Item]) -> None:
        accounts, sample_topic = self.parts.accounts, self.parts.batcher.sample_topic
        bad_samples = sum(item.position.topic == sample_topic for item in report.bad)
        bad_labels = len(report.bad) - bad_samples
        accounts.samples_read += report.samples
        accounts.samples_learned += report.fresh
        accounts.samples_thinned += report.thinned
        accounts.samples_duplicate_id += report.duplicates
        accounts.samples_dead_lettered += bad_samples
        accounts.labels_read += report.labels
        accounts.labels_dead_lettered += bad_labels
        accounts.labels_taken += report.labels - bad_labels
        accounts.labels_inline += sum(isinstance(item, Sample) and item.label is not None for item in items)
        for gap in report.gaps:
            if gap.position.topic == sample_topic:
                accounts.samples_trimmed += gap.missing
            else:
                accounts.labels_trimmed += gap.missing

    def _owes_a_step(self, *, until_end: bool) -> bool:
        """Labels wait to be learned and no record has come for a while; or the log ends with an open batch.

        Such a step may have no records at all. It is journaled like any other.
        """
        waiting = self.parts.memory.new_count > 0
        if until_end and self._read_all():
            return waiting or self.parts.batcher.opened_at_s is not None
        return waiting and self._clock() - self._stepped_at_s >= self._cadence.max_age_s

    def _read_all(self) -> bool:
        """All that the log holds now is in a step, or in the batch that is open."""
        source = self.parts.source
        return not any(source.behind(tp) for tp in source.queues) and not any(source.queues.values())

    def _keep(self) -> None:
        """Publish and save where that is due."""
        now, cadence, step = self._clock(), self._cadence, self.parts.learner.step
        guarding = self.parts.guarding
        due = now - self._published_at_s >= cadence.publish_every_s or guarding.just_mended
        if step > self._published_step and due and guarding.may_publish:
            with self._timed("publish"):
                self.publish()
        elif not guarding.may_publish and now - self._shown_at_s >= cadence.publish_every_s and step > self._shown_step:
            with self._timed("publish"):
                self._show()
        by_steps = cadence.checkpoint_every_steps and step - self._saved_step >= cadence.checkpoint_every_steps
        by_time = now - self._saved_at_s >= cadence.checkpoint_every_s
        due = by_steps or by_time or self.parts.journal.load >= _JOURNAL_CROWDED
        # A disk slower than that must not have all state copied at each turn, to learn that it is still at the last.
        if step > self._saved_step and due and not self.parts.checkpoints.busy:
            with self._timed("save"):
                self._save()

    def _wait_for_save(self, stopping: threading.Event) -> None:
        """The journal is full, and may not drop what a restart needs: wait until an old checkpoint is removed (I6)."""
        with self._timed("save"):
            stopping.wait(0.05)
        self.parts.journal.keep_after(self.parts.checkpoints.oldest_step())
        self.parts.watcher.came_round()

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        started = self._clock()
        yield
        self.parts.watcher.spent(phase, self._clock() - started)

    def publish(self) -> None:
        """Publish the teacher as it is now, unless it is not finite. What it came of is durable first."""
        parts = self.parts
        self._show()
        self._published_at_s = self._clock()
        arrays = parts.learner.teacher_state()
        if broken := [name for name, array in arrays.items() if not np.isfinite(array).all()]:
            _log.error("teacher_not_published", step=parts.learner.step, not_finite=broken[:5])
            return
        told = {
            "scores": _summary(parts.board),
            "learned_offsets": self._learned.as_json(),
            "classes": parts.ledger.class_names,
        }
        parts.teachers.publish(parts.learner.step, arrays, told)
        self._published_step = parts.learner.step

    def _show(self) -> None:
        """Show what became of labels, and which are wanted: also where the guard keeps the teacher back.

        Labels are wanted most exactly then. What is shown is durable, and so is the journal that leads to it.
        """
        self.parts.journal.sync()
        self.parts.ledger.flush()
        if self.parts.wanted is not None:
            self.parts.wanted.flush()
        self._shown_step, self._shown_at_s = self.parts.learner.step, self._clock()

    def _save(self) -> None:
        parts, step = self.parts, self.parts.learner.step
        self._check()
        parts.journal.sync()
        oldest = parts.checkpoints.oldest_step()
        if oldest > self._pruned_step:
            parts.ledger.prune(oldest)
            self._pruned_step = oldest
        parts.journal.keep_after(oldest)
        parts.ledger.flush()
        if parts.checkpoints.save(step, parts.batcher.next_offsets, self.arrays(), self.extra()):
            self._saved_step, self._saved_at_s = step, self._clock()


def _summary(board: Scoreboard) -> dict[str, float | int | None]:
    """What is known of a version when it is published."""
    gain = board.gain.report()
    return {
        "labels": board.prequential.scored,
        "windowed_accuracy": board.prequential.windowed("teacher"),
        "accuracy_at_label": gain.teacher,
        "ssl_gain": gain.gain,
    }


class _Phases:
    """Where the time of a step goes."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock, self._since_s = clock, clock()
        self.spent_s: dict[str, float] = {}

    def end(self, phase: str) -> None:
        now = self._clock()
        self.spent_s[phase] = self.spent_s.get(phase, 0.0) + now - self._since_s
        self._since_s = now
