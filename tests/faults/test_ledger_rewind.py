"""Crash anywhere: a ledger that is ahead of the checkpoint is rewound, repeats the steps, and ends the same.

Equal means every row of every table, byte for byte, except undo and notes: the state is a fold over the log (I3).
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from harness.fakes import InjectedCrash
from hypothesis import given, settings
from hypothesis import strategies as st

from streamlearn.errors import StoreError
from streamlearn.ledger.ledger import Ledger
from streamlearn.ledger.settings import LabelsConfig
from streamlearn.ledger.store_file import FILE
from streamlearn.records import (
    ERASED,
    RETRACTED,
    UNLABELLED,
    Array,
    Label,
    Position,
    Prediction,
    PublishedAnswer,
    Sample,
    Schema,
)

SCHEMA = Schema((5,), np.dtype(np.uint8), ("ant", "bee", "cat"))
LABELS = LabelsConfig.model_construct(
    payload_max_bytes=4 * SCHEMA.nbytes, horizon_s=60.0, max_ids=9, implied_class="cat", implied_after_s=30.0
)
"""Bounds that are met within a few steps, below what the config allows."""

APART = ("undo", "meta")

Records = list[Sample | Label | PublishedAnswer]
Step = tuple[float, Records]
Content = dict[str, list[tuple[object, ...]]]


def stream(seed: int, steps: int) -> list[Step]:
    """Steps of samples and labels that repeat, correct, come early or late; the watermark sometimes jumps."""
    rng, answering = random.Random(seed), random.Random(f"answers {seed}")
    samples: list[Sample] = []
    offsets = {
        "samples": itertools.count(),
        "labels": itertools.count(),
        "more": itertools.count(),
        "predictions": itertools.count(),
    }
    now_s, made = 100.0, []
    for _ in range(steps):
        now_s += rng.choice((0.0, 1.0, 1.0, 5.0, 70.0 if rng.random() < 0.2 else 2.0))
        records: Records = []
        for _ in range(rng.randint(0, 5)):
            name = f"id{rng.randint(0, 14)}"
            inside = rng.choice((None, None, 0, 1))
            if rng.random() < 0.5:
                x = np.full(SCHEMA.shape, rng.randint(0, 255), np.uint8)
                records.append(Sample(Position("samples", 0, next(offsets["samples"])), now_s, name, x, inside))
            else:
                topic = rng.choice(("labels", "labels", "more"))
                position, unknown = (
                    Position(topic, 0, next(offsets[topic])),
                    rng.choice((None, None, None, "dog", "elk")),
                )
                class_index = (
                    rng.choice((0, 1, 2, 0, 1, 2, RETRACTED, RETRACTED, ERASED)) if unknown is None else UNLABELLED
                )
                records.append(Label(position, now_s, name, class_index, class_name=unknown))
        samples += [record for record in records if isinstance(record, Sample)]
        for sample in answering.sample(samples[-8:], min(2, len(samples))):
            probabilities_C = np.array([0.5, 0.25, 0.25], np.float32)
            answer = Prediction(answering.randint(0, 2), probabilities_C, answering.randint(1, 9))
            place = Position("predictions", 0, next(offsets["predictions"]))
            records.append(PublishedAnswer(place, now_s, sample.sample_id, sample.position, answer))
        made.append((now_s, records))
    return made


def read_back(position: Position, _sample_id: str) -> Array | None:
    """A log that has lost half of its records, always the same half."""
    return np.full(SCHEMA.shape, position.offset % 256, np.uint8) if position.offset % 2 else None


def open_ledger(path: Path, schema: Schema = SCHEMA, may_write: Callable[[], None] = lambda: None) -> Ledger:
    return Ledger(path, schema, LABELS, read_back=read_back, max_held=4, may_write=may_write)


def run_step(ledger: Ledger, step: int, steps: Sequence[Step]) -> Counter[str]:
    """Step `step`, counted from 1; what it joins is trained by the same step. What became of published answers."""
    now_s, records = steps[step - 1]
    ledger.begin(step, now_s)
    answers = [record for record in records if isinstance(record, PublishedAnswer)]
    new = {record.position for record in records if isinstance(record, Sample)}
    outcomes = Counter[str](ledger.answers_published([answer for answer in answers if answer.sample not in new]))
    arrivals = ledger.release_held()
    for are_labels, run in itertools.groupby(records, key=lambda record: isinstance(record, Label)):
        if are_labels:
            arrivals += ledger.labels_arrived(list(run))  # type: ignore[arg-type]
            continue
        for record in run:
            if isinstance(record, Sample) and not ledger.known([record.sample_id]):
                published = next((answer.prediction for answer in answers if answer.sample == record.position), None)
                capacity = len(ledger.class_names)
                probabilities_C = np.full(capacity, 1.0 / capacity, np.float32)
                prediction = Prediction(step % 3, probabilities_C, step - 1)
                arrivals += ledger.sample_arrived(record, prediction, (step + 1) % 3, published)
    arrivals += ledger.implied()
    ledger.trained([a.sample_id for a in arrivals if a.example is not None])
    ledger.end()
    return outcomes


def dump(path: Path) -> Content:
    """Every table and ring as of the last flush, except undo and notes."""
    with closing(sqlite3.connect(path / FILE)) as db:
        names = [name for (name,) in db.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")]
        return {name: db.execute(f"SELECT * FROM {name} ORDER BY key").fetchall() for name in {*names} - {*APART}}


def final(path: Path, ledger: Ledger, steps: int) -> Content:
    """The end of a run: undo of all steps but the last is pruned."""
    ledger.prune(steps)
    ledger.close()
    return dump(path)


def uncrashed(path: Path, steps: Sequence[Step]) -> Content:
    ledger = open_ledger(path)
    for step in range(1, len(steps) + 1):
        run_step(ledger, step, steps)
    return final(path, ledger, len(steps))


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=35, deadline=None)
def test_any_crash_rewind_and_replay_ends_as_if_nothing_had_happened(tmp_path_factory, seed):
    """Flushes, prunes, crashes and rewinds anywhere: the end equals the uninterrupted run, byte for byte."""
    choices = random.Random(f"choices {seed}")
    steps = stream(seed, 30)
    expected = uncrashed(tmp_path_factory.mktemp("whole"), steps)
    path = tmp_path_factory.mktemp("crashed")
    ledger, crashes, pruned, kept = open_ledger(path), 0, 0, 0

    try:
        while ledger.step < len(steps):
            run_step(ledger, ledger.step + 1, steps)
            if choices.random() < 0.3:
                ledger.flush()
                kept = pruned
            if choices.random() < 0.1:
                pruned = choices.randint(pruned, ledger.step)
                ledger.prune(pruned)
            if crashes < 5 and choices.random() < 0.2:
                crashes += 1
                ledger.close(flush=False)
                ledger, pruned = open_ledger(path), kept
                ledger.rewind(choices.randint(pruned, ledger.step))
        ended = final(path, ledger, len(steps))
    finally:
        ledger.close()  # Hypothesis may end the example by an exception

    assert ended == expected


@pytest.mark.parametrize("seed", range(4))
def test_a_rewind_restores_the_state_of_that_step(tmp_path, seed):
    """Right after the rewind, every row is as it was, and there is no other."""
    steps = stream(seed, 25)
    ledger = open_ledger(tmp_path)
    seen = [dump(tmp_path)]
    for step in range(1, 26):
        run_step(ledger, step, steps)
        ledger.flush()
        seen.append(dump(tmp_path))

    for step in (24, 17, 16, 5, 0):
        ledger.rewind(step)
        assert dump(tmp_path) == seen[step], f"seed {seed}, step {step}"
    ledger.close()


def test_the_streams_of_this_test_meet_every_state(tmp_path):
    """A crash test says nothing about states that its streams never reach."""
    names = ("joined", "scored", "trained", "duplicate", "corrected", "retracted", "erased", "expired", "orphan")
    total = dict.fromkeys((*names, "waiting", "implied", "held", "held_dropped", "scored_published"), 0)
    outcomes: Counter[str] = Counter()
    for seed in range(20):
        ledger = open_ledger(tmp_path / str(seed))
        steps = stream(seed, 30)
        for step in range(1, 31):
            outcomes += run_step(ledger, step, steps)
        total = {name: count + getattr(ledger.counts(), name) for name, count in total.items()}
        assert ledger.counts().samples < ledger.counts().samples_read, "ids expire"
        ledger.close()

    assert min(total.values()) >= 5, total
    assert min(outcomes[name] for name in ("taken", "late", "unknown")) >= 5, outcomes


@pytest.mark.parametrize("seed", range(4))
def test_a_class_that_becomes_known_releases_its_labels_in_the_same_step_after_a_crash(tmp_path, seed):
    """The schema grew at a restart. A crash after the release rewinds, and the replay releases the same labels."""
    steps, grown = stream(seed, 40), replace(SCHEMA, classes=(*SCHEMA.classes, "dog"))
    steps[19][1].append(Label(Position("labels", 0, 10_000), steps[19][0], "id3", UNLABELLED, class_name="dog"))
    ends = []
    for crashes in (0, 1, 2):
        path = tmp_path / str(crashes)
        ledger = open_ledger(path)
        for step in range(1, 21):
            run_step(ledger, step, steps)
        assert ledger.held().get("dog")
        ledger.close()
        ledger = open_ledger(path, grown)
        for _ in range(crashes):
            for step in range(21, 30):
                run_step(ledger, step, steps)
            ledger.flush()
            ledger.close(flush=False)
            ledger = open_ledger(path, grown)
            ledger.rewind(20)
        for step in range(21, 41):
            run_step(ledger, step, steps)
        ends.append(final(path, ledger, 40))

    assert ends[0] == ends[1] == ends[2]


def test_a_failed_rewind_changes_nothing(tmp_path):
    """A checkpoint of another run is refused, and the store stays as it was."""
    steps = stream(3, 10)
    ledger = open_ledger(tmp_path)
    for step in range(1, 11):
        run_step(ledger, step, steps)
    ledger.prune(4)
    ledger.flush()
    before = dump(tmp_path)

    for step in (3, 11):
        with pytest.raises(StoreError):
            ledger.rewind(step)
    ledger.close()

    assert dump(tmp_path) == before


def test_a_crash_before_the_rewind_is_flushed_can_be_rewound_again(tmp_path):
    """Rewind and cut are one transaction: a crash in between has no effect."""
    steps = stream(5, 20)
    crashing: list[bool] = []

    def may_write() -> None:
        if crashing:
            raise InjectedCrash

    ledger = open_ledger(tmp_path, may_write=may_write)
    for step in range(1, 21):
        run_step(ledger, step, steps)
    ledger.flush()
    before = dump(tmp_path)
    crashing.append(True)
    with pytest.raises(InjectedCrash):
        ledger.rewind(7)
    ledger.close(flush=False)

    ledger = open_ledger(tmp_path)

    assert dump(tmp_path) == before
    ledger.rewind(7)
    for step in range(8, 21):
        run_step(ledger, step, steps)
    ledger.close()
    assert dump(tmp_path) == before


@pytest.mark.parametrize("kill_after", [3, 11, 30])
def test_a_killed_process_leaves_a_whole_step_that_replays_to_the_same_end(tmp_path, kill_after):
    """SIGKILL at a random moment: on disk is the end of some step, and the replay ends the same."""
    steps = stream(7, 400)
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, __file__, str(tmp_path / "killed")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environ) as child:
        assert child.stdout is not None
        for _ in range(kill_after):
            assert child.stdout.readline(), "the child has exited"
        child.send_signal(signal.SIGKILL)

    ledger = open_ledger(tmp_path / "killed")
    flushed = ledger.step
    ledger.rewind(max(flushed - 5, 0))
    for step in range(ledger.step + 1, len(steps) + 1):
        run_step(ledger, step, steps)

    assert flushed >= kill_after
    assert final(tmp_path / "killed", ledger, len(steps)) == uncrashed(tmp_path / "whole", steps)


def be_killed(path: Path) -> None:
    """Run steps and print each flush, until killed."""
    steps = stream(7, 400)
    ledger = open_ledger(path)
    for step in range(1, len(steps) + 1):
        run_step(ledger, step, steps)
        if step % 2:
            ledger.flush()
            sys.stdout.write(f"{step}\n")
            sys.stdout.flush()
    signal.pause()


if __name__ == "__main__":
    be_killed(Path(sys.argv[1]))
