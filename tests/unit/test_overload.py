"""What becomes of samples that come faster than they are learned (`log.shed_above_records`)."""

from __future__ import annotations

import json
import shutil
import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from streamlearn.app import learner as learning
from streamlearn.app.wiring import StatePaths, make_codec
from streamlearn.config import Config, load_config
from streamlearn.ledger import LabelState
from streamlearn.ledger.view import LedgerView
from streamlearn.state.checkpoint import Checkpoint, load_newest
from streamlearn.state.status import read_status
from streamlearn.testing import MemoryLog

torch.set_num_threads(1)
SAMPLES = 400


def config_in(folder: Path, **overrides: Any) -> Config:
    settings = {
        "state.dir": str(folder),
        "log.shed_above_records": 100,
        "schema.shape": [4],
        "schema.classes": 3,
        "model.options": {"hidden": [8]},
        "batch.fresh": 4,
        "batch.labelled": 4,
        "batch.prefetch_records": 40,
        "batch.max_age_s": 3600.0,
        "batch.merge_wait_s": 60.0,
        "learn.threads": 1,
        "metrics.port": 0,
    }
    return load_config(environ={}, overrides={**settings, **overrides})


def filled(config: Config, *, inline_every: int = 0) -> MemoryLog:
    """Samples, and the label of each after all of them."""
    log, codec, rng = MemoryLog(), make_codec(config), np.random.default_rng(0)
    log.create_topics({"samples": 1, "labels": 1, "dead-letters": 1})
    for n in range(SAMPLES):
        x, inside = rng.normal(size=4).astype(np.float32), inline_every and n % inline_every == 0
        log.append("samples", [codec.encode_sample(f"s{n}", x, label=n % 3 if inside else None, timestamp_ms=n)])
    if not inline_every:
        log.append("labels", [codec.encode_label(f"s{n}", n % 3, timestamp_ms=SAMPLES) for n in range(SAMPLES)])
    return log


def learn(config: Config, log: MemoryLog) -> Checkpoint:
    copy = MemoryLog()
    copy._shared = log._shared  # the same log, opened once more
    try:
        learning.learn(config, threading.Event(), until_end=True, opened=copy)
    finally:
        log._shared.closed = False
    found = load_newest(StatePaths(config.state.dir).checkpoints)
    assert found is not None
    return found


def ledger_of(folder: Path) -> dict[str, int]:
    status = read_status(StatePaths(folder).heartbeat)
    assert status is not None
    found: dict[str, int] = status["ledger"]
    return found


class TestKeep:
    def test_learns_every_sample_no_matter_how_many_wait(self, tmp_path: Path) -> None:
        """The default: none is passed by."""
        config = config_in(tmp_path, **{"log.shed_above_records": None})

        accounts = learn(config, filled(config)).extra["accounts"]

        assert (accounts["samples_learned"], accounts["samples_thinned"]) == (SAMPLES, 0)


class TestThin:
    def test_passes_samples_by_until_few_enough_wait(self, tmp_path: Path) -> None:
        """Wide batches of 40, of which 4 are learned, until at most a hundred wait; then all of them."""
        config = config_in(tmp_path)

        accounts = learn(config, filled(config)).extra["accounts"]

        assert accounts["samples_read"] == SAMPLES
        assert accounts["samples_learned"] + accounts["samples_thinned"] == SAMPLES
        assert 200 <= accounts["samples_thinned"] <= 300
        assert accounts["samples_thinned"] % 36 == 0

    def test_no_label_is_passed_by(self, tmp_path: Path) -> None:
        """The label of a sample that was passed by is joined and learned; it scores nothing, for nothing was said."""
        config = config_in(tmp_path)

        accounts = learn(config, filled(config)).extra["accounts"]

        ledger = ledger_of(tmp_path)
        assert accounts["labels_read"] == SAMPLES
        assert (ledger["joined"], ledger["trained"]) == (SAMPLES, SAMPLES)
        assert ledger["scored"] == accounts["samples_learned"]

    def test_a_label_inside_a_sample_keeps_it(self, tmp_path: Path) -> None:
        """Every tenth sample has one; all of these are predicted, scored and learned."""
        config = config_in(tmp_path)

        accounts = learn(config, filled(config, inline_every=10)).extra["accounts"]

        ledger = ledger_of(tmp_path)
        assert accounts["samples_thinned"] >= 200
        assert (ledger["joined"], ledger["scored"], ledger["trained"]) == (40, 40, 40)

    def test_of_a_sample_that_was_passed_by_no_prediction_is_told(self, tmp_path: Path) -> None:
        """`GET /label/{id}` names its place, and no class that nobody predicted."""
        config = config_in(tmp_path)

        thinned = learn(config, filled(config)).extra["accounts"]["samples_thinned"]

        with closing(LedgerView(StatePaths(tmp_path).store, config.schema_.build())) as view:
            found = [view.get(f"s{n}") for n in range(SAMPLES)]  # which of them, the clock decides
        told = [status for status in found if status is not None]
        passed = [status for status in told if status.predicted_class is None]
        assert len(told) == SAMPLES
        assert len(passed) == thinned >= 200
        assert {(s.state, s.model_version, s.scored) for s in passed} == {(LabelState.TRAINED, None, False)}
        assert all(status.sample_position is not None for status in passed)
        assert all(status.scored for status in told if status.predicted_class is not None)

    def test_journaled_steps_are_thinned_again_as_they_were(self, tmp_path: Path) -> None:
        """Whatever waits in the log now: the same cuts over the same records give the same bits (I3)."""
        first, again = config_in(tmp_path / "first"), config_in(tmp_path / "again")
        log = filled(first)
        whole = learn(first, log)
        shutil.copytree(StatePaths(first.state.dir).journal, StatePaths(again.state.dir).journal)

        replayed = learn(again, log)

        assert whole.extra["accounts"]["samples_thinned"] > 0
        assert json.dumps(replayed.extra) == json.dumps(whole.extra)
        assert replayed.step == whole.step
        assert all(np.array_equal(replayed.arrays[name], whole.arrays[name], equal_nan=True) for name in whole.arrays)

    @pytest.mark.parametrize("method", ["mean_teacher", "supervised"])
    def test_every_row_of_a_step_has_the_usual_place(self, tmp_path: Path, method: str) -> None:
        """No step is larger than `batch.fresh`, so a captured graph fits (D7)."""
        config, fresh = config_in(tmp_path, **{"learn.method": method}), set()

        learning.learn(
            config,
            threading.Event(),
            until_end=True,
            opened=filled(config),
            watching=lambda _, report: fresh.add(report.fresh),
        )

        assert max(fresh) == 4
