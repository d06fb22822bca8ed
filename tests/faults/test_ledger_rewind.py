"""Crash anywhere: a ledger that is ahead of the checkpoint is rewound, shown the same again, and ends the same.

Equal means every row of every database, byte for byte, but for the undo log: the state is a fold over the log (I3).
"""

from __future__ import annotations

import itertools
import random
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamlearn.errors import StoreError
from streamlearn.ledger.ledger import Ledger
from streamlearn.ledger.settings import LabelsConfig
from streamlearn.records import ERASED, RETRACTED, UNLABELLED, Array, Label, Position, Prediction, Sample, Schema

SCHEMA = Schema((5,), np.dtype(np.uint8), ("ant", "bee", "cat"))
LABELS = LabelsConfig.model_construct(
    payload_max_bytes=4 * SCHEMA.nbytes, horizon_s=60.0, max_ids=9, implied_class="cat", implied_after_s=30.0
)
"""Bounds that are met within a few steps, below what the config allows."""

Step = tuple[float, list[Sample | Label]]


def stream(seed: int, steps: int) -> list[Step]:
    """Steps of samples and labels that repeat, correct, come early, come late; the clock now and then leaps."""
    rng = random.Random(seed)
    offsets = {"samples": itertools.count(), "labels": itertools.count(), "more": itertools.count()}
    now_s, made = 100.0, []
    for _ in range(steps):
        now_s += rng.choice((0.0, 1.0, 1.0, 5.0, 70.0 if rng.random() < 0.2 else 2.0))
        records: list[Sample | Label] = []
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
        made.append((now_s, records))
    return made


def read_back(position: Position, _sample_id: str) -> Array | None:
    """A log that has forgotten half of its records, always the same half."""
    return np.full(SCHEMA.shape, position.offset % 256, np.uint8) if position.offset % 2 else None


def open_ledger(path: Path, schema: Schema = SCHEMA) -> Ledger:
    return Ledger(path, schema, LABELS, read_back=read_back, max_held=4)


def run_step(ledger: Ledger, step: int, steps: Sequence[Step]) -> None:
    """Step `step`, counted from 1; what it joins is trained by the same step."""
    now_s, records = steps[step - 1]
    ledger.begin(step, now_s)
    arrivals = ledger.release_held()
    for are_labels, run in itertools.groupby(records, key=lambda record: isinstance(record, Label)):
        if are_labels:
            arrivals += ledger.labels_arrived(list(run))  # type: ignore[arg-type]
            continue
        for record in run:
            if not ledger.is_known(record.sample_id):
                probabilities_C = np.full(ledger._schema.capacity, 1.0 / ledger._schema.capacity, np.float32)
                prediction = Prediction(step % 3, probabilities_C, step - 1)
                arrivals += ledger.sample_arrived(record, prediction, (step + 1) % 3)
    arrivals += ledger.implied()
    ledger.trained([a.sample_id for a in arrivals if a.example is not None])
    ledger.end()


def crash(ledger: Ledger) -> None:
    """What kill -9 leaves: nothing that was not flushed, and no lock."""
    ledger._store._db.close()
    ledger._store._lock.close()


def dump(ledger: Ledger) -> dict[str, list[tuple[bytes, bytes]]]:
    """Every database but undo."""
    store = ledger._store
    databases = {**store.tables, **store.rings}
    return {name: store._db.execute(f"SELECT * FROM {name} ORDER BY key").fetchall() for name in databases}


def final(ledger: Ledger, steps: int) -> dict[str, list[tuple[bytes, bytes]]]:
    """The end of a run: nothing but the last step is kept."""
    ledger.prune(steps)
    ledger.flush()
    content = dump(ledger)
    ledger.close()
    return content


def uncrashed(path: Path, steps: Sequence[Step]) -> dict[str, list[tuple[bytes, bytes]]]:
    ledger = open_ledger(path)
    for step in range(1, len(steps) + 1):
        run_step(ledger, step, steps)
    return final(ledger, len(steps))


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=35, deadline=None)
def test_any_crash_rewind_and_replay_ends_as_if_nothing_had_happened(tmp_path_factory, seed):
    """Flushes, prunes, crashes and rewinds anywhere: the end is equal to the run that never died, byte for byte."""
    choices = random.Random(f"choices {seed}")
    steps = stream(seed, 30)
    expected = uncrashed(tmp_path_factory.mktemp("whole"), steps)
    path = tmp_path_factory.mktemp("crashed")
    ledger, crashes = open_ledger(path), 0

    try:
        while ledger.step < len(steps):
            run_step(ledger, ledger.step + 1, steps)
            if choices.random() < 0.3:
                ledger.flush()
            if choices.random() < 0.1:
                ledger.prune(choices.randint(ledger._store.pruned, ledger.step))
            if crashes < 5 and choices.random() < 0.2:
                crashes += 1
                crash(ledger)
                ledger = open_ledger(path)
                ledger.rewind(choices.randint(ledger._store.pruned, ledger.step))
        ended = final(ledger, len(steps))
    finally:
        ledger.close()  # hypothesis may leave by an exception of its own

    assert ended == expected


@pytest.mark.parametrize("seed", range(4))
def test_a_rewind_gives_the_very_state_of_that_step(tmp_path, seed):
    """Not only the end is equal: right after the rewind every row is what it was, and none is left over."""
    steps = stream(seed, 25)
    ledger = open_ledger(tmp_path)
    seen = [dump(ledger)]
    for step in range(1, 26):
        run_step(ledger, step, steps)
        seen.append(dump(ledger))

    for step in (24, 17, 16, 5, 0):
        ledger.rewind(step)
        assert dump(ledger) == seen[step], f"seed {seed}, step {step}"
    ledger.close()


def test_the_streams_of_this_test_meet_every_state(tmp_path):
    """A crash test proves nothing about states that its streams never reach."""
    names = ("joined", "scored", "trained", "duplicate", "corrected", "retracted", "erased", "expired", "orphan")
    total = dict.fromkeys((*names, "waiting", "implied", "held", "held_dropped"), 0)
    for seed in range(20):
        ledger = open_ledger(tmp_path / str(seed))
        steps = stream(seed, 30)
        for step in range(1, 31):
            run_step(ledger, step, steps)
        total = {name: count + getattr(ledger.counts(), name) for name, count in total.items()}
        assert ledger.counts().samples < ledger.counts().samples_read, "ids expire"
        ledger.close()

    assert min(total.values()) >= 5, total


@pytest.mark.parametrize("seed", range(4))
def test_a_class_that_becomes_known_releases_its_labels_in_the_same_step_after_a_crash(tmp_path, seed):
    """The schema grew at a restart; a crash after the release goes back and releases them again, equally."""
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
            crash(ledger)
            ledger = open_ledger(path, grown)
            ledger.rewind(20)
        for step in range(21, 41):
            run_step(ledger, step, steps)
        ends.append(final(ledger, 40))

    assert ends[0] == ends[1] == ends[2]


def test_a_failed_rewind_changes_nothing(tmp_path):
    """A checkpoint of another run is refused, and the store is as it was."""
    steps = stream(3, 10)
    ledger = open_ledger(tmp_path)
    for step in range(1, 11):
        run_step(ledger, step, steps)
    ledger.prune(4)
    before = dump(ledger)

    for step in (3, 11):
        with pytest.raises(StoreError):
            ledger.rewind(step)

    assert dump(ledger) == before
    ledger.close()


def test_a_crash_before_the_rewind_is_flushed_can_be_rewound_again(tmp_path):
    """The rewind and its cut are one transaction: a crash in their middle is as if it had not been begun."""
    steps = stream(5, 20)
    ledger = open_ledger(tmp_path)
    for step in range(1, 21):
        run_step(ledger, step, steps)
    ledger.flush()
    before = dump(ledger)
    ledger._store.rewind(7)
    crash(ledger)

    ledger = open_ledger(tmp_path)

    assert dump(ledger) == before
    ledger.rewind(7)
    for step in range(8, 21):
        run_step(ledger, step, steps)
    assert dump(ledger) == before
    ledger.close()


@pytest.mark.parametrize("kill_after", [3, 11, 30])
def test_a_killed_process_leaves_a_whole_step_that_replays_to_the_same_end(tmp_path, kill_after):
    """SIGKILL at no chosen moment: what is on disk is some whole step, whichever, and the end is the same."""
    steps = stream(7, 400)
    child = subprocess.Popen([sys.executable, __file__, str(tmp_path / "killed")], stdout=subprocess.PIPE)
    assert child.stdout is not None
    for _ in range(kill_after):
        assert child.stdout.readline(), "the child ended by itself"
    child.send_signal(signal.SIGKILL)
    child.communicate(timeout=10)

    ledger = open_ledger(tmp_path / "killed")
    flushed = ledger.step
    ledger.rewind(max(flushed - 5, 0))
    for step in range(ledger.step + 1, len(steps) + 1):
        run_step(ledger, step, steps)

    assert flushed >= kill_after
    assert final(ledger, len(steps)) == uncrashed(tmp_path / "whole", steps)


def be_killed(path: Path) -> None:
    """Run steps, saying each flush, until killed."""
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
