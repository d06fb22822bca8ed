"""A learner on topics as they are: several of samples, keyed by customer, with other partitions than the labels."""

from __future__ import annotations

import itertools
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from fake_registry import FakeRegistry
from harness.fakes import MemoryLog
from small_learner import learn, newest_checkpoint, status

from streamlearn.app.log import make_codec
from streamlearn.config import Config, load_config
from streamlearn.ledger import LabelState
from streamlearn.ledger.view import LedgerView
from streamlearn.loop.loop import TrainingLoop
from streamlearn.loop.report import StepReport
from streamlearn.records import NewRecord
from streamlearn.state.paths import StatePaths

SAMPLES = 200
START_S = 1_772_700_000


def config_in(folder: Path, **overrides: Any) -> Config:
    """Three columns, ids and times by path, labels true and false."""
    settings = {
        "state.dir": str(folder),
        "source.samples": {"topic": ["web", "shop"], "id": "tx.id", "time": "tx.at", "time_unit": "ms"},
        "source.labels": {
            "topic": "frauds",
            "id": "transaction_id",
            "label": "is_fraud",
            "values": {"true": "fraud", "false": "legitimate"},
        },
        "columns": {
            "amount": "number",
            "merchant": {"kind": "category", "buckets": 64},
            "at": {"kind": "timestamp", "from": "tx.at", "unit": "ms"},
        },
        "schema.classes": ["fraud", "legitimate"],
        "model.options": {"hidden": [8]},
        "batch.fresh": 16,
        "batch.labelled": 8,
        "batch.max_age_s": 3600.0,
        "learn.threads": 1,
        "metrics.port": 0,
    }
    return load_config(environ={}, overrides={**settings, **overrides})


def transaction(n: int) -> dict[str, Any]:
    return {
        "tx": {"id": f"t{n}", "at": (START_S + n) * 1000},
        "amount": None if n % 7 == 0 else "N/A" if n % 11 == 0 else n / 10,
        "merchant": f"m{n % 50}",
        "terminal": n,
    }


def filled_log() -> MemoryLog:
    """Transactions keyed by customer, tombstones of customers, one that is no JSON, and labels ten records later."""
    ticking = itertools.count(START_S, 1 / 256).__next__
    log = MemoryLog(clock=ticking)
    log.create_topics({"web": 2, "shop": 1, "frauds": 3, "dead-letters": 1})
    for n in range(SAMPLES):
        key = b"customer-%d" % (n % 13)
        log.append("web" if n % 3 else "shop", [NewRecord(key, orjson.dumps(transaction(n)))])
        if n % 20 == 0:
            log.append("web", [NewRecord(key, None)])
        if n >= 10:
            label = {"transaction_id": f"t{n - 10}", "is_fraud": n % 2 == 0}
            log.append("frauds", [NewRecord(b"%d" % n, orjson.dumps(label))])
    log.append("web", [NewRecord(b"c", b"\xff")])
    log.append("frauds", [NewRecord(b"c", None)])
    return log


class TestLearner:
    def test_every_record_has_one_outcome(self, tmp_path: Path) -> None:
        """I7, with tombstones. Labels find their samples whatever the partition."""
        config, log = config_in(tmp_path), filled_log()

        accounts = learn(config, log).extra["accounts"]

        assert (accounts["samples_read"], accounts["samples_learned"]) == (SAMPLES + 11, SAMPLES)
        assert (accounts["samples_tombstone"], accounts["samples_dead_lettered"]) == (10, 1)
        assert (accounts["labels_read"], accounts["labels_taken"]) == (SAMPLES - 9, SAMPLES - 10)
        assert (accounts["labels_tombstone"], accounts["labels_dead_lettered"]) == (1, 0)
        view = LedgerView(StatePaths(tmp_path).store, config.schema_.build())
        labels = [view.get(f"t{n}") for n in range(SAMPLES - 10)]
        view.close()
        assert all(label is not None and label.state is LabelState.TRAINED for label in labels)
        assert len(log.records("dead-letters")) == 1

    def test_the_heartbeat_counts_values_by_column(self, tmp_path: Path) -> None:
        """And the fields that no setting names."""
        learn(config_in(tmp_path), filled_log())

        columns = status(config_in(tmp_path))["columns"]

        missing = sum(n % 7 == 0 for n in range(SAMPLES))
        invalid = sum(n % 11 == 0 and n % 7 != 0 for n in range(SAMPLES))
        assert columns["missing"] == {"amount": missing, "merchant": 0, "at": 0}
        assert columns["invalid"] == {"amount": invalid, "merchant": 0, "at": 0}
        assert columns["unknown"] == {"terminal": SAMPLES}

    @pytest.mark.parametrize("stop_at", [1, 5])
    def test_a_restart_equals_an_uninterrupted_run(self, tmp_path: Path, stop_at: int) -> None:
        """I3: a row is a function of its record."""
        log, stopping = filled_log(), threading.Event()
        whole, stopped = config_in(tmp_path / "whole"), config_in(tmp_path / "stopped")

        def stop(_: TrainingLoop, report: StepReport) -> None:
            if report.step == stop_at:
                stopping.set()

        expected = learn(whole, log)
        learn(stopped, log, stopping=stopping, on_step=stop)
        found = learn(stopped, log)

        assert found.extra["accounts"] == expected.extra["accounts"]
        assert found.arrays.keys() == expected.arrays.keys()
        assert [
            n for n in found.arrays if not np.array_equal(found.arrays[n], expected.arrays[n], equal_nan=True)
        ] == []

    def test_an_outage_of_the_registry_changes_nothing(self, tmp_path: Path) -> None:
        """JSON Schema keys are read by the registry. It is away at the start, for a while; then all is learned."""
        with FakeRegistry() as registry:
            registry.add(5, "{}", kind="JSON")
            samples = {"topic": ["web", "shop"], "id": "key"}
            settings = {"source.samples": samples, "source.registry": {"url": registry.url, "timeout_s": 1.0}}
            config = config_in(tmp_path, **settings)
            log = MemoryLog()
            log.create_topics({"web": 1, "shop": 1, "frauds": 1, "dead-letters": 1})
            for n in range(32):
                key = b"\0\0\0\0\5" + orjson.dumps(f"t{n}")
                log.append("web", [NewRecord(key, orjson.dumps(transaction(n)))])
            registry.broken = (503, b"")
            threading.Timer(1.0, lambda: setattr(registry, "broken", None)).start()
            began_s = time.monotonic()

            accounts = learn(config, log).extra["accounts"]

            assert time.monotonic() - began_s > 1.0
            assert (accounts["samples_learned"], accounts["samples_dead_lettered"]) == (32, 0)
            assert status(config)["registry"] == {"down_since_s": None, "failures": pytest.approx(5, abs=4)}

    def test_a_registry_that_stays_away_does_not_keep_the_process(self, tmp_path: Path) -> None:
        """It stops at a signal, with everything saved."""
        with FakeRegistry() as registry:
            settings = {
                "source.samples": {"topic": ["web", "shop"], "id": "key"},
                "source.registry": {"url": registry.url, "timeout_s": 1.0},
            }
            config, log, stopping = config_in(tmp_path, **settings), MemoryLog(), threading.Event()
            log.create_topics({"web": 1, "shop": 1, "frauds": 1, "dead-letters": 1})
            log.append("web", [NewRecord(b"\0\0\0\0\5x", orjson.dumps(transaction(0)))])
            registry.broken = (503, b"")
            threading.Timer(1.0, stopping.set).start()

            learn(config, log, stopping=stopping)

            assert newest_checkpoint(config).step == 0
            assert status(config)["registry"]["down_since_s"] is not None


def test_the_codec_of_a_config_has_its_columns(tmp_path: Path) -> None:
    """The schema and the encoder have one layout."""
    config = config_in(tmp_path)
    codec = make_codec(config)

    assert codec.rows is not None
    assert codec.schema.columns == codec.rows.columns
    assert codec.schema.shape == (codec.rows.width,) == (5,)
