"""Any order of arrival, redelivery, correction and crash ends in the same ledger, replay buffer and counters.

A state machine gives records to ledger and replay buffer as the loop does, in any order, repeatedly, with crashes in
between. The end is compared twice: to a fresh ledger and buffer that get the same set once, in order, and to a model in
plain Python that sees the set alone. STREAMLEARN_SOAK_EXAMPLES sets the number of runs.
"""

from __future__ import annotations

import itertools
import os
import shutil
import sqlite3
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from streamlearn.ledger import Arrival, LabelState, LabelStatus
from streamlearn.ledger.ledger import Ledger
from streamlearn.ledger.replay_buffer import ReplayBuffer
from streamlearn.ledger.settings import LabelsConfig
from streamlearn.ledger.store_file import FILE
from streamlearn.ledger.view import LedgerView
from streamlearn.records import RETRACTED, Array, Label, Position, Prediction, Sample, Schema

EXAMPLES = int(os.environ.get("STREAMLEARN_SOAK_EXAMPLES", "60"))
SCHEMA = Schema((2,), np.dtype(np.uint8), ("ant", "bee", "cat"))
IDS = "abc"
TOPICS = ("more", "labels", "also")
"""Not in the order of their names, so that an order by number would be noticed."""
PLACES = 2
"""Labels of one id in each topic: fewer than a row of the ledger keeps, so that none is dropped."""
PREDICTION = Prediction(1, np.array([0.25, 0.5, 0.25], np.float32), 3)
MEMORY_DISK = next((name for name in ("/dev/shm",) if os.path.isdir(name)), None)
"""A sync costs nothing here. Power cuts are not tested, and syncs would take nine tenths of the time."""

Corrections = Literal["last", "first"]
Record = Sample | Label


@dataclass
class Run:
    """A ledger and a replay buffer with a step open, driven as `loop.py` drives them."""

    path: Path
    corrections: Corrections
    together: bool = False
    """Consecutive labels are taken together, as in the loop; else one by one."""
    steps: list[list[Record]] = field(default_factory=list)
    """The records of each step, the open one last: the journal."""
    scores: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.buffer = ReplayBuffer(100, SCHEMA, seed=0)
        self.ledger = self._open()
        self.saved: tuple[int, dict[str, Array], Counter[str]] = (0, self.buffer.state(), Counter())
        self.begin()

    def _open(self) -> Ledger:
        return Ledger(
            self.path,
            SCHEMA,
            LabelsConfig(horizon_s=1e6, corrections=self.corrections),
            read_back=lambda *_: None,
        )

    def begin(self) -> None:
        self.ledger.begin(self.ledger.step + 1, 110.0)
        self.steps.append([])

    def take(self, records: Iterable[Record]) -> None:
        for are_labels, run in itertools.groupby(records, key=lambda record: isinstance(record, Label)):
            taken = list(run)
            self.steps[-1] += taken
            if are_labels and self.together:
                self._learn_of(self.ledger.labels_arrived(taken))
            else:
                for record in taken:
                    self._learn_of(self._arrivals(record))

    def _learn_of(self, arrivals: Iterable[Arrival]) -> None:
        for arrival in arrivals:
            if arrival.example is not None:
                self.buffer.add(arrival.example)
            elif arrival.class_index == RETRACTED:
                self.buffer.remove(arrival.sample_id)
            elif arrival.labelled_at_s is not None:
                self.buffer.relabel(arrival.sample_id, arrival.class_index, arrival.labelled_at_s)
            self.scores[arrival.sample_id] += arrival.scored is not None

    def _arrivals(self, record: Record) -> list[Arrival]:
        if isinstance(record, Label):
            return [self.ledger.label_arrived(record)]
        if not self.ledger.known([record.sample_id]):
            return self.ledger.sample_arrived(record, PREDICTION, 2)
        return [self.ledger.label_arrived(label) for label in labels_of([record])]

    def end(self) -> None:
        """Learn one row, close the step."""
        x_L, y_L = np.empty((1, *SCHEMA.shape), SCHEMA.dtype), np.empty(1, np.int64)
        self.ledger.trained(self.buffer.draw_into(x_L, y_L, self.ledger.step))
        self.ledger.end()

    def save(self) -> None:
        """A checkpoint between two steps."""
        self.end()
        self.ledger.flush()
        self.saved = (self.ledger.step, self.buffer.state(), self.scores.copy())
        self.begin()

    def crash(self) -> None:
        """Lose what was not flushed, restore the checkpoint, replay the journal."""
        self.ledger.close(flush=False)
        step, state, scores = self.saved
        self.ledger = self._open()
        self.ledger.rewind(step)
        self.buffer.load(state)
        self.scores = scores.copy()
        again, self.steps = self.steps[step:], self.steps[:step]
        for n, records in enumerate(again):
            if n:
                self.end()
            self.begin()
            self.take(records)

    def outcome(self) -> dict[str, Any]:
        """Everything that can be compared, after all labels are learned."""
        self.end()
        while self.buffer.new_count:
            self.begin()
            self.end()
        state = self.buffer.state()
        ends = state["id_offsets"].tolist()
        ids = [state["ids"].tobytes()[a:b].decode() for a, b in itertools.pairwise(ends)]
        counts = asdict(self.ledger.counts())
        self.ledger.close()
        with closing(sqlite3.connect(self.path / FILE)) as db:
            row = db.execute("SELECT value FROM counts WHERE key = 'classes'").fetchone()
        class_counts = [0] * len(SCHEMA.classes) if row is None else np.frombuffer(row[0], np.int64).tolist()
        view = LedgerView(self.path, SCHEMA)
        statuses = {name: status for name in IDS if (status := view.get(name)) is not None}
        view.close()
        return {
            # Which step learned a label depends on the order; whether one did is in the state.
            "statuses": {name: replace(status, first_trained_step=None) for name, status in statuses.items()},
            "counts": counts,
            "class_counts": class_counts,
            "buffer": list(zip(ids, state["y"].tolist(), state["labelled_at_s"].tolist(), state["x"].tolist())),  # noqa: B905 - of one length
            "scores": {name: count for name, count in self.scores.items() if count},
        }


def labels_of(records: Iterable[Record]) -> list[Label]:
    """The label records among these, in order, including those inside samples."""
    labels = []
    for record in records:
        if isinstance(record, Label):
            labels.append(record)
        elif record.label is not None:
            labels.append(Label(record.position, record.timestamp_s, record.sample_id, record.label))
    return sorted(labels, key=when)


def when(record: Record) -> tuple[float, Position]:
    return record.timestamp_s, record.position


def modelled(records: Iterable[Record], corrections: Corrections) -> dict[str, Any]:
    """The expected outcome, from the set of records alone."""
    samples = {record.sample_id: record for record in records if isinstance(record, Sample)}
    counts: Counter[str] = Counter(samples=len(samples), samples_read=len(samples))
    counts["payload_bytes"] = len(samples) * SCHEMA.nbytes
    statuses, buffer, class_counts = {}, [], [0] * len(SCHEMA.classes)
    for name in IDS:
        sample, labels = samples.get(name), [label for label in labels_of(records) if label.sample_id == name]
        status = LabelStatus(LabelState.UNLABELLED)
        if labels:
            classes = [label.class_index for label in labels]
            retractions = [label for label in labels if label.class_index == RETRACTED]
            named = [label for label in labels if label.class_index != RETRACTED]
            counts["read"] += len(labels)
            counts["retracted"] += len(retractions)
            for before, label in itertools.pairwise(labels):
                if label in named[1:]:
                    counts["duplicate" if before.class_index == label.class_index else "corrected"] += 1
            deciding = labels[-1] if corrections == "last" else (*labels[:1], *retractions)[-1]
            retracted = deciding.class_index == RETRACTED
            if not retracted:
                class_counts[deciding.class_index] += 1
            status = LabelStatus(
                LabelState.RETRACTED if retracted else LabelState.TRAINED if sample else LabelState.WAITING,
                None if retracted else deciding.class_index,
                deciding.position,
                deciding.timestamp_s,
                corrected=len(set(classes)) > 1,
                scored=sample is not None and any(label.timestamp_s >= sample.timestamp_s for label in named),
            )
            if named:
                counts["joined" if sample else "waiting"] += 1
            counts["scored"] += status.scored
            counts["trained"] += sample is not None and not retracted
            if sample and not retracted:
                buffer.append((deciding.timestamp_s, name, deciding.class_index, sample.x.tolist()))
        if sample:
            status = replace(
                status,
                sample_position=sample.position,
                sample_time_s=sample.timestamp_s,
                predicted_class=PREDICTION.class_index,
                model_version=PREDICTION.model_version,
            )
        if sample or labels:
            statuses[name] = status
    return {
        "statuses": statuses,
        "counts": counts,
        "class_counts": class_counts,
        "buffer": [(name, class_index, at_s, x) for at_s, name, class_index, x in sorted(buffer)],
        "scores": {name: 1 for name, status in statuses.items() if status.scored},
    }


def assert_same(outcome: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Part by part, so that the failure names the part that differs. Counters that the model omits are zero.

    Whether a label was learned before it was retracted depends on the order of reading.
    """
    for part in ("statuses", "class_counts", "buffer", "scores"):
        assert outcome[part] == expected[part], part
    counts, expected_counts = Counter(outcome["counts"]), Counter(expected["counts"])
    statuses = outcome["statuses"].values()
    trained = sum(status.state is LabelState.TRAINED for status in statuses)
    retracted = sum(status.state is LabelState.RETRACTED for status in statuses)
    for found in (counts, expected_counts):
        assert trained <= found.pop("trained", 0) <= trained + retracted
    assert counts == expected_counts


def a_sample(name: str, at_s: float, inside: int | None) -> Sample:
    x = np.full(SCHEMA.shape, ord(name), SCHEMA.dtype)
    return Sample(Position("samples", 0, IDS.index(name)), at_s, name, x, inside)


def a_label(name: str, topic: str, place: int, at_s: float, class_index: int) -> Label:
    return Label(Position(topic, 0, IDS.index(name) * PLACES + place), at_s, name, class_index)


TIMES = st.integers(98, 101).map(float)
"""Before, at and after the samples, often equal; all within the horizon."""
SAMPLES = st.builds(a_sample, st.sampled_from(IDS), TIMES, st.none() | st.integers(0, 2))
LABELS = st.builds(
    a_label,
    st.sampled_from(IDS),
    st.sampled_from(TOPICS),
    st.integers(0, PLACES - 1),
    TIMES,
    st.sampled_from((0, 1, 2, RETRACTED, RETRACTED)),
)
SOME = st.lists(st.one_of(SAMPLES, LABELS, LABELS), max_size=3)


class AnyOrder(RuleBasedStateMachine):
    """Each id has one sample and many labels. Any record may come at any time, and again."""

    def __init__(self) -> None:
        super().__init__()
        self.records: dict[Position, Record] = {}
        self.run: Run | None = None

    @initialize(corrections=st.sampled_from(("last", "first")), some=SOME)
    def start(self, corrections: Corrections, some: list[Record]) -> None:
        self.folder = Path(tempfile.mkdtemp(dir=MEMORY_DISK))
        self.run = Run(self.folder / "run", corrections, together=True)
        self.take(some)

    def take(self, some: Iterable[Record]) -> Run:
        """A position in the log always holds the same record."""
        assert self.run is not None
        self.run.take([self.records.setdefault(record.position, record) for record in some])
        return self.run

    @rule(some=SOME, choice=st.integers(0, 99))
    def redeliver(self, some: list[Record], choice: int) -> None:
        self.take(some)
        if self.records:
            self.take([list(self.records.values())[choice % len(self.records)]])

    @rule(some=SOME, flush=st.booleans())
    def next_step(self, some: list[Record], flush: bool) -> None:
        run = self.take(some)
        run.end()
        if flush:
            run.ledger.flush()
        run.begin()

    @rule(some=SOME)
    def save(self, some: list[Record]) -> None:
        self.take(some).save()

    @rule(some=SOME)
    def crash(self, some: list[Record]) -> None:
        self.take(some).crash()

    def teardown(self) -> None:
        if self.run is None:
            return
        records, corrections = list(self.records.values()), self.run.corrections
        ordered = Run(self.folder / "ordered", corrections)
        try:
            for n, record in enumerate(sorted(records, key=when)):
                if n % 3 == 2:
                    ordered.end()
                    ordered.begin()
                ordered.take([record])
            outcome = self.run.outcome()
            assert_same(outcome, ordered.outcome())
            assert_same(outcome, modelled(records, corrections))
        finally:
            ordered.ledger.close()
            self.run.ledger.close()
            shutil.rmtree(self.folder)


@pytest.mark.timeout(60 + EXAMPLES)
def test_any_order_ends_as_the_sorted_order() -> None:
    """Samples and labels in any order and repeated, with steps, flushes, checkpoints and crashes anywhere."""
    run_state_machine_as_test(
        AnyOrder,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=10,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
