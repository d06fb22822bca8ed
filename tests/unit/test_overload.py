"""Samples that arrive faster than they are learned: larger micro-batches, or load shedding."""

from __future__ import annotations

import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_learner
from harness.fakes import MemoryLog
from small_learner import L, Reports, S, empty_log, loop_on, newest_checkpoint, run_loop

from streamlearn.app.log import make_codec
from streamlearn.config import Config
from streamlearn.learn.batching import MicroBatcher
from streamlearn.learn.learner import Learner
from streamlearn.ledger import LabelState
from streamlearn.ledger.view import LedgerView
from streamlearn.loop.loop import TrainingLoop
from streamlearn.loop.report import StepReport
from streamlearn.records import MicroBatch
from streamlearn.state.journal import read_journal
from streamlearn.state.paths import StatePaths

SAMPLES = 400


def config_in(folder: Path, **overrides: Any) -> Config:
    settings = {"log.shed_above_records": 100, "batch.fresh": 4}
    return small_learner.config_in(folder, **{**settings, **overrides})


def wide() -> MicroBatcher:
    """Under overload it takes 40 samples."""
    return MicroBatcher({S: 0, L: 0}, sample_topics=("samples",), fresh=4, wide=40, max_age_s=3600.0, merge_wait_s=60.0)


def filled(config: Config, *, inline_every: int = 0) -> MemoryLog:
    """Samples, and the label of each after all of them."""
    log, codec, rng = empty_log(), make_codec(config), np.random.default_rng(0)
    for n in range(SAMPLES):
        x, inside = rng.normal(size=4).astype(np.float32), inline_every and n % inline_every == 0
        log.append("samples", [codec.encode_sample(f"s{n}", x, label=n % 3 if inside else None, timestamp_ms=n)])
    if not inline_every:
        log.append("labels", [codec.labels.encode(f"s{n}", n % 3, timestamp_ms=SAMPLES) for n in range(SAMPLES)])
    return log


def learned(config: Config, log: MemoryLog, **parts: Any) -> TrainingLoop:
    return run_loop(config, log, batcher=wide(), **parts)


class TestKeep:
    def test_learns_every_sample(self, tmp_path: Path) -> None:
        """The default."""
        config = config_in(tmp_path, **{"log.shed_above_records": None})

        accounts = learned(config, filled(config)).accounts

        assert (accounts.samples_learned, accounts.samples_thinned) == (SAMPLES, 0)


class Until(Reports):
    """Stops the loop once all samples are learned."""

    def __init__(self) -> None:
        super().__init__()
        self.stopping = threading.Event()

    def step_done(self, report: StepReport) -> None:
        super().step_done(report)
        if sum(self.sizes) == SAMPLES:
            self.stopping.set()

    @property
    def sizes(self) -> list[int]:
        """Samples of each step."""
        return [report.counts.samples_learned for report in self.steps]


class TestGrow:
    """Far behind, micro-batches are larger (`batch.backlog`)."""

    @pytest.fixture
    def config(self, tmp_path: Path) -> Config:
        return config_in(tmp_path / "first", **{"log.shed_above_records": None, "batch.backlog": 40})

    def caught_up(self, config: Config, log: MemoryLog) -> tuple[TrainingLoop, list[int]]:
        reports = Until()
        with loop_on(config, log, observer=reports) as loop:
            loop.run(reports.stopping)
            loop.close()
        return loop, reports.sizes

    def test_with_the_number_of_samples_that_wait(self, config: Config) -> None:
        """From an eighth of them, at most 40, down to `batch.fresh`."""
        _, sizes = self.caught_up(config, filled(config))

        assert sizes[0] == 40
        assert sizes == sorted(sizes, reverse=True)
        assert sizes[-1] == 4
        assert sum(sizes) == SAMPLES

    def test_labelled_rows_grow_alike(self, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
        """So that the costs of labelled and unlabelled rows keep their proportion."""
        rows: list[tuple[int, int]] = []
        learn = Learner.learn

        def noted(learner: Learner, batch: MicroBatch, **factors: float) -> None:
            rows.append((batch.fresh_count, batch.labelled_count))
            learn(learner, batch, **factors)

        monkeypatch.setattr(Learner, "learn", noted)

        self.caught_up(config, filled(config, inline_every=2))

        assert rows[0] == (40, 40)
        assert rows[-1] == (4, 4)

    def test_a_replay_has_the_same_batches(self, config: Config, tmp_path: Path) -> None:
        """Whatever waits in the log then: the same records in a step give the same bits (I3)."""
        again = config_in(tmp_path / "again", **{"log.shed_above_records": None, "batch.backlog": 0})
        log = filled(config, inline_every=10)
        self.caught_up(config, log)
        steps = list(read_journal(StatePaths(config.state.dir).journal, 0))

        with loop_on(again, log) as loop:
            loop.replay_journal(steps, threading.Event())
            loop.close()

        a, b = newest_checkpoint(config), newest_checkpoint(again)
        assert a.step == b.step == len(steps)
        assert all(np.array_equal(a.arrays[name], b.arrays[name]) for name in a.arrays)

    def test_not_where_the_run_ends_with_the_log(self, config: Config) -> None:
        """There the result must not depend on how fast the log is read."""
        reports = Until()

        run_loop(config, filled(config), observer=reports)

        assert set(reports.sizes) <= {0, 4}


class TestShed:
    def test_until_few_enough_samples_wait(self, tmp_path: Path) -> None:
        """From each batch of 40 four are learned, until at most a hundred wait; then all."""
        config = config_in(tmp_path)

        accounts = learned(config, filled(config)).accounts

        assert accounts.samples_read == accounts.samples_learned + accounts.samples_thinned == SAMPLES
        assert 200 <= accounts.samples_thinned <= 300
        assert accounts.samples_thinned % 36 == 0

    def test_labels_are_never_shed(self, tmp_path: Path) -> None:
        """The label of a shed sample is joined and learned. It scores nothing, because there is no prediction."""
        config = config_in(tmp_path)

        loop = learned(config, filled(config))

        counts = loop.ledger.counts()
        assert (loop.accounts.labels_read, counts.joined, counts.trained) == (SAMPLES, SAMPLES, SAMPLES)
        assert counts.scored == loop.accounts.samples_learned

    def test_samples_with_a_label_inside_are_never_shed(self, tmp_path: Path) -> None:
        """Every tenth sample has one. All of them are predicted, scored and learned."""
        config = config_in(tmp_path)

        loop = learned(config, filled(config, inline_every=10))

        counts = loop.ledger.counts()
        assert loop.accounts.samples_thinned >= 200
        assert (counts.joined, counts.scored, counts.trained) == (40, 40, 40)

    def test_a_shed_sample_has_no_prediction(self, tmp_path: Path) -> None:
        """`GET /label/{id}` has its position, and no class."""
        config = config_in(tmp_path)

        shed = learned(config, filled(config)).accounts.samples_thinned

        with closing(LedgerView(StatePaths(tmp_path).store, config.schema_.build())) as view:
            found = [label for n in range(SAMPLES) if (label := view.get(f"s{n}")) is not None]
        without = [label for label in found if label.predicted_class is None]
        assert (len(found), len(without)) == (SAMPLES, shed)
        assert {(s.state, s.model_version, s.scored) for s in without} == {(LabelState.TRAINED, None, False)}
        assert all(label.sample_position is not None for label in without)
        assert all(label.scored for label in found if label.predicted_class is not None)

    def test_a_replay_sheds_the_same_samples(self, tmp_path: Path) -> None:
        """Whatever waits in the log now: the same records in a step give the same bits (I3)."""
        first, again = config_in(tmp_path / "first"), config_in(tmp_path / "again")
        log = filled(first)
        whole = learned(first, log)
        steps = list(read_journal(StatePaths(first.state.dir).journal, 0))

        with loop_on(again, log) as loop:
            loop.replay_journal(steps, threading.Event())
            loop.close()

        assert whole.accounts.samples_thinned > 0
        a, b = newest_checkpoint(first), newest_checkpoint(again)
        assert (a.step, a.next_offsets, a.extra) == (b.step, b.next_offsets, b.extra)
        assert all(np.array_equal(a.arrays[name], b.arrays[name], equal_nan=True) for name in a.arrays)

    @pytest.mark.parametrize("method", ["mean_teacher", "supervised"])
    def test_no_step_is_larger_than_usual(self, tmp_path: Path, method: str) -> None:
        """So a captured graph fits (D7)."""
        config, reports = config_in(tmp_path, **{"learn.method": method}), Reports()

        learned(config, filled(config), observer=reports)

        assert max(report.counts.samples_learned for report in reports.steps) == 4
