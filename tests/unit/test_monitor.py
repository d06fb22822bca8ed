"""Metrics and heartbeat of the loop, also under faults."""

from __future__ import annotations

import contextlib
import math
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from served import COLUMNS, RECORD, record_codec
from small_learner import L, S, config_in, empty_log
from structlog.testing import capture_logs
from support import until

from streamlearn.app.build import build_loop
from streamlearn.app.learner import LearnerProcess
from streamlearn.app.log import make_codec
from streamlearn.app.monitor import Monitor
from streamlearn.errors import LogUnavailableError, RecordError
from streamlearn.ledger import Arrival, LabelState, Scored
from streamlearn.loop.accounts import Accounts
from streamlearn.loop.report import StepReport
from streamlearn.metrics import LEARNER_METRICS, Metrics
from streamlearn.records import BadRecord, MicroBatch, Position, Prediction, Record, Sample
from streamlearn.state.checkpoint import Saved
from streamlearn.state.fence import Fence
from streamlearn.state.paths import StatePaths
from streamlearn.state.status import read_status


class Learning:
    """A learner process whose loop is not run: the test calls the monitor."""

    def __init__(self, folder: Path) -> None:
        config = config_in(folder, **{"learn.options.contrast_weight": 0.3})
        self.log, self.paths, self.codec = empty_log(), StatePaths(folder), make_codec(config)
        self.metrics = Metrics(LEARNER_METRICS, version="1")
        self.monitor, stopping = Monitor(self.metrics, self.paths, metrics_port=9109), threading.Event()
        self.loop = build_loop(config, self.log, {S: 0, L: 0}, stopping=stopping, observer=self.monitor)
        self.process = LearnerProcess(config, self.loop, self.monitor, Fence(), stopping)

    def metric(self, name: str, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(f"streamlearn_{name}", labels)

    def status(self) -> dict[str, Any]:
        return read_status(self.paths.heartbeat) or {}

    def join_a_label(self, step: int) -> None:
        """One sample and its label into the ledger."""
        x, answer = np.zeros(4, np.float32), Prediction(1, np.full(3, 1 / 3, np.float32), 0)
        records = self.log.append("samples", [self.codec.encode_sample(f"s{step}", x)])
        labels = self.log.append("labels", [self.codec.labels.encode(f"s{step}", 1)])
        self.loop.ledger.begin(step, 1.0)
        self.loop.ledger.sample_arrived(Sample(records[0], 1.0, f"s{step}", x), answer, 1)
        (record,) = self.log.read(L, labels[0].offset, 1)
        self.loop.ledger.label_arrived(self.codec.labels.decode(record))
        self.loop.ledger.end()


@pytest.fixture
def learner(tmp_path: Path) -> Iterator[Learning]:
    made = Learning(tmp_path)
    with made.process:
        yield made


def report(**changes: Any) -> StepReport:
    whole: dict[str, Any] = {
        "step": 1,
        "counts": Accounts(),
        "phases_s": {"assemble": 0.25, "learn": 0.5},
    }
    return StepReport(**whole | changes)


class TestColumns:
    def test_values_are_counted_by_column_from_the_start(self, learner: Learning) -> None:
        """Unknown fields only as a number: their names are the producer's."""
        codec = record_codec()
        learner.loop.feed.codec = codec
        learner.monitor.start(learner.loop)
        first = [learner.metric("column_values_total", column=name, outcome="encoded") for name in COLUMNS]

        assert codec.rows is not None
        for record in (RECORD, {**RECORD, "amount": "N/A", "vip": None}, {"amount": 1, "else": 2}):
            codec.rows.encode(record)
        learner.monitor.look()
        learner.monitor.look()

        def counts(column: str) -> list[float | None]:
            outcomes = ("encoded", "missing", "invalid")
            return [learner.metric("column_values_total", column=column, outcome=outcome) for outcome in outcomes]

        assert first == [0.0] * len(COLUMNS)
        assert (counts("amount"), counts("vip")) == ([2.0, 0.0, 1.0], [1.0, 2.0, 0.0])
        assert learner.metric("unknown_fields_total") == 3.0
        assert learner.monitor.status["columns"]["unknown"] == {"more": 2, "else": 1}


class TestStep:
    def test_every_record_of_a_step_is_counted_once(self, learner: Learning) -> None:
        """Read = learned + shed + duplicate id + dead-lettered. Trimmed records were never read."""
        bad_sample = BadRecord(Record(Position("samples", 0, 7), 0, b"k", b"v"), RecordError("not_json", "no"))
        bad_label = BadRecord(Record(Position("labels", 0, 2), 0, b"k", b"v"), RecordError("no_class", "no"))
        counts = Accounts(
            samples_read=10,
            samples_learned=3,
            samples_thinned=4,
            samples_duplicate_id=2,
            samples_dead_lettered=1,
            labels_read=3,
            labels_taken=2,
            labels_dead_lettered=1,
            labels_trimmed=4,
        )
        learner.monitor.start(learner.loop)

        learner.monitor.step_done(report(counts=counts, bad=[bad_sample, bad_label]))

        assert learner.metric("records_read_total", topic="samples") == 10
        assert learner.metric("records_total", topic="samples", outcome="thinned") == 4
        assert learner.metric("records_read_total", topic="labels") == 3
        assert learner.metric("records_total", topic="samples", outcome="learned") == 3
        assert learner.metric("records_total", topic="samples", outcome="duplicate_id") == 2
        assert learner.metric("records_total", topic="samples", outcome="dead_lettered") == 1
        assert learner.metric("records_total", topic="labels", outcome="dead_lettered") == 1
        assert learner.metric("dead_letters_total", reason="not_json") == 1
        assert learner.metric("dead_letters_total", reason="no_class") == 1
        assert learner.metric("records_total", topic="labels", outcome="trimmed") == 4
        assert learner.metric("records_total", topic="samples", outcome="trimmed") == 0

    def test_its_duration_is_counted_in_total_and_by_phase(self, learner: Learning) -> None:
        """A step's duration is the sum of its phases."""
        learner.monitor.start(learner.loop)

        learner.monitor.step_done(report())
        learner.monitor.step_done(report(phases_s={"learn": 1.0}))

        assert learner.metric("steps_total") == 2
        assert learner.metric("step_duration_seconds_sum") == 1.75
        assert learner.metric("step_phase_seconds_total", phase="learn") == 1.5
        assert (learner.metric("last_step_timestamp_seconds") or 0) > 1e9

    def test_only_labels_that_scored_count_as_scored(self, learner: Learning) -> None:
        """With their delay."""
        prediction = Prediction(1, np.full(3, 1 / 3, np.float32), 5)
        scored = Scored(prediction, 1, 1, 42.0, None, None, prediction)
        arrivals = [Arrival(LabelState.SCORED, "a", 1, scored=scored), Arrival(LabelState.WAITING, "b", 1)]
        learner.monitor.start(learner.loop)

        learner.monitor.step_done(report(arrivals=arrivals))

        assert learner.metric("label_delay_seconds_count") == 1
        assert learner.metric("label_delay_seconds_sum") == 42.0


class TestLook:
    def test_label_outcomes_are_counted_once(self, learner: Learning) -> None:
        """However often the ledger is read."""
        learner.monitor.start(learner.loop)
        learner.join_a_label(1)

        learner.monitor.look()
        learner.monitor.look()
        learner.join_a_label(2)
        learner.monitor.look()

        assert learner.metric("records_total", topic="labels", outcome="joined") == 2
        assert learner.metric("ledger_labels", state="joined") == 2
        assert learner.metric("ledger_samples") == 2
        assert learner.metric("store_payload_bytes") == 32

    def test_outcomes_of_a_restored_ledger_are_not_counted_again(self, learner: Learning) -> None:
        """Counters start with the process; gauges show the ledger's totals."""
        learner.join_a_label(1)

        learner.monitor.start(learner.loop)

        assert learner.metric("records_total", topic="labels", outcome="joined") == 0
        assert learner.metric("ledger_labels", state="joined") == 1

    def test_accuracies_are_in_metrics_and_heartbeat(self, learner: Learning) -> None:
        """Of networks and baselines: windowed, faded and cumulative. What is not known is None."""
        for teacher_class in (1, 1, 1, 0):
            learner.loop.board.prequential.update(
                true_class=1,
                teacher_class=teacher_class,
                student_class=0,
                teacher_probabilities_C=np.full(3, 1 / 3, np.float32),
                majority_class=1,
            )
        learner.monitor.start(learner.loop)
        learner.monitor.stop("stopped")

        accuracy = learner.status()["accuracy"]
        assert learner.metric("prequential_accuracy_ratio", network="teacher", window="windowed") == 0.75
        assert learner.metric("prequential_accuracy_ratio", network="student", window="cumulative") == 0.0
        teacher = accuracy["prequential"]["teacher"]
        assert (teacher["windowed"], teacher["cumulative"]) == (0.75, 0.75)
        assert teacher["faded"] == pytest.approx(0.75, abs=0.001)
        assert accuracy["prequential"]["majority"]["windowed"] == 1.0
        assert accuracy["prequential"]["no_change"]["windowed"] is None
        assert accuracy["oracle"]["teacher"]["windowed"] is None

    def test_costs_are_exported_by_term(self, learner: Learning) -> None:
        """Means over the steps since the last look."""
        rng, y = np.random.default_rng(0), np.arange(3)
        x = rng.normal(size=(11, 4)).astype(np.float32)
        learner.loop.learner.learn(MicroBatch(x[:8], 8, x[8:], y, 3, ["a", "b", "c"], None))
        learner.monitor.start(learner.loop)
        learner.monitor.stop("stopped")

        costs = learner.status()["costs"]
        assert min(costs["classification"], costs["consistency"], costs["auxiliary"]) > 0.0
        for term in ("classification", "consistency", "auxiliary"):
            assert learner.metric("cost", term=term) == pytest.approx(costs[term])

    def test_the_score_file_has_the_keys_of_get_score(self, learner: Learning) -> None:
        """Clients read them."""
        learner.monitor.start(learner.loop)
        learner.monitor.stop("stopped")

        scores = read_status(learner.paths.scores) or {}
        report = ["classes", "at_arrival", "at_label", "first_minus_at_label", "calibration", "traffic", "oracle"]
        assert list(scores) == ["time_s", "step", *report, "bank", "guard", "drift", "trust"]
        assert scores["bank"] == {"served": "teacher", "accuracy": {"teacher": None, "twin": None}}
        assert learner.metric("candidate_served", candidate="teacher") == 1
        assert learner.metric("candidate_served", candidate="twin") == 0

    def test_lag_is_exported_by_partition_and_in_total(self, learner: Learning) -> None:
        """Records of the log that are in no step yet."""
        learner.log.append("samples", [learner.codec.encode_sample(f"s{n}", np.zeros(4, np.float32)) for n in range(5)])
        learner.log.append("labels", [learner.codec.labels.encode("s0", 1)])
        learner.process.start()
        until(lambda: sum(map(len, learner.loop.feed.queues.values())) == 6, "all to be read", 8.0)
        until(lambda: sum(learner.loop.feed.lag().values()) == 6, "the ends to be known", 8.0)

        learner.monitor.look()
        learner.monitor.stop("stopped")

        assert learner.metric("consumer_lag_records", topic="samples", partition="0") == 5
        assert learner.metric("consumer_lag_records", topic="labels", partition="0") == 1
        assert learner.status()["lag_records"] == 6

    def test_the_slow_figures_are_read_at_most_twice_a_second(self, learner: Learning) -> None:
        """They must not slow down the loop, nor keep a resting learner busy."""
        began_s = time.monotonic()
        learner.monitor.start(learner.loop)
        learner.join_a_label(1)

        for _ in range(100):
            learner.monitor.turn_done()
        soon = learner.metric("ledger_samples")

        def seen() -> bool:
            learner.monitor.turn_done()
            return learner.metric("ledger_samples") == 1

        until(seen, "the next look", 5.0)

        assert soon == 0
        assert time.monotonic() - began_s > 1.5, "no step was taken, so nothing is new"


class TestHeartbeat:
    def test_has_process_progress_and_scores(self, learner: Learning) -> None:
        """From the first one, before any record."""
        learner.monitor.start(learner.loop)

        beat = until(learner.status, "a heartbeat", 5.0)

        assert (beat["pid"], beat["state"], beat["step"], beat["published_step"]) == (os.getpid(), "learning", 0, 0)
        assert beat["metrics_port"] > 0
        assert learner.metric("log_available") == 1
        assert beat["accounts"] == learner.loop.accounts.as_dict()
        assert beat["ledger"]["joined"] == 0
        assert beat["memory_rows"] == 0
        assert beat["first_step_at_s"] is None

    def test_has_the_published_teacher_and_the_saved_checkpoint(self, learner: Learning) -> None:
        """The metrics too. The saver calls from its own thread."""
        learner.monitor.start(learner.loop)
        learner.monitor.published(41)
        saved = Saved(40, size_bytes=1000, duration_s=0.25, saved_at_s=1233.0, next_offsets={})

        with capture_logs() as lines:
            saver = threading.Thread(target=learner.monitor.saved, args=(saved,))
            saver.start()
            saver.join()
        learner.monitor.look()
        learner.monitor.stop("stopped")

        assert learner.status()["published_step"] == 41
        assert learner.metric("published_step") == 41
        assert learner.metric("checkpoint_last_success_timestamp_seconds") == 1233.0
        assert [(line["event"], line["step"], line["size_bytes"]) for line in lines] == [("checkpoint_saved", 40, 1000)]

    def test_shows_that_the_log_is_unavailable(self, learner: Learning) -> None:
        """While the loop still turns. The lag of a learner that had caught up would not show it."""
        before = learner.metric("log_available")
        learner.log.fail("poll", LogUnavailableError("away"), times=1000)
        learner.process.start()
        until(lambda: not learner.loop.feed.available, "the log to be unavailable", 5.0)

        learner.monitor.look()
        assert (learner.metric("log_available"), learner.monitor.status["lag_records"]) == (0, 0)
        assert before is not None
        assert math.isnan(before)
        learner.monitor.stop("stopped")

        assert learner.monitor.status["state"] == "stopped"
        learner.monitor.look()
        assert learner.monitor.status["state"] == "log unavailable"

    def test_ends_with_the_reason(self, tmp_path: Path) -> None:
        """The error that stopped the learner."""
        made = Learning(tmp_path)

        with contextlib.suppress(LogUnavailableError), made.process as process:
            process.start()
            raise LogUnavailableError("the broker is away")

        assert made.status()["state"] == "failed: the broker is away"

    def test_continues_after_a_full_disk(self, learner: Learning, tmp_path: Path) -> None:
        """The failure is logged once. Here the folder is missing for a second."""
        learner.monitor.start(learner.loop)
        until(learner.status, "a heartbeat", 5.0)
        away = tmp_path.with_name(tmp_path.name + "-away")

        with capture_logs() as lines:
            tmp_path.rename(away)
            until(lambda: lines, "a failed beat", 5.0)
            threading.Event().wait(1.3)  # longer than HEARTBEAT_EVERY_S
            away.rename(tmp_path)
        learner.paths.heartbeat.unlink()

        assert [line["event"] for line in lines] == ["heartbeat_failed"]
        assert until(learner.status, "the next beat", 5.0)["pid"] == os.getpid()
