"""What is seen of the loop: metrics step by step, the heartbeat, and what a fault makes of it."""

from __future__ import annotations

import contextlib
import math
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from structlog.testing import capture_logs
from support import until

from streamlearn.app.learner import _Wired
from streamlearn.app.log import make_codec, make_topics
from streamlearn.config import Config, load_config
from streamlearn.errors import LogUnavailableError, RecordError
from streamlearn.ledger import Arrival, LabelState, Scored
from streamlearn.loop.report import StepReport
from streamlearn.records import BadRecord, Gap, Position, Prediction, Record, Sample, TopicPartition
from streamlearn.state.checkpoint import Saved
from streamlearn.state.paths import StatePaths
from streamlearn.state.status import read_status
from streamlearn.testing import MemoryLog

torch.set_num_threads(1)
S, L = TopicPartition("samples", 0), TopicPartition("labels", 0)


def config_in(folder: Path) -> Config:
    settings = {
        "state.dir": str(folder),
        "schema.shape": [4],
        "schema.classes": 3,
        "model.options": {"hidden": [8]},
        "batch.fresh": 8,
        "batch.labelled": 4,
        "learn.threads": 1,
        "metrics.port": 0,
    }
    return load_config(environ={}, overrides=settings)


class Learning:
    """A learner with all its parts, whose loop is the test."""

    def __init__(self, folder: Path) -> None:
        config = config_in(folder)
        self.log, self.paths, self.codec = MemoryLog(), StatePaths(folder), make_codec(config)
        make_topics(self.log, config)
        self.wired = _Wired(config, self.log, self.paths, {S: 0, L: 0}, stopping=threading.Event())
        self.watch, self.parts = self.wired.watch, self.wired.parts

    def metric(self, name: str, **labels: str) -> float | None:
        return self.wired.metrics.registry.get_sample_value(f"streamlearn_{name}", labels)

    def status(self) -> dict[str, Any]:
        return read_status(self.paths.heartbeat) or {}

    def join_a_label(self, step: int) -> None:
        """One sample and its label into the ledger."""
        x, answer = np.zeros(4, np.float32), Prediction(1, np.full(3, 1 / 3, np.float32), 0)
        records = self.log.append("samples", [self.codec.encode_sample(f"s{step}", x)])
        labels = self.log.append("labels", [self.codec.encode_label(f"s{step}", 1)])
        self.parts.ledger.begin(step, 1.0)
        self.parts.ledger.sample_arrived(Sample(records[0], 1.0, f"s{step}", x), answer, 1)
        (record,) = self.log.read(L, labels[0].offset, 1)
        self.parts.ledger.label_arrived(self.codec.decode_label(record))
        self.parts.ledger.end()


@pytest.fixture
def learner(tmp_path: Path) -> Iterator[Learning]:
    made = Learning(tmp_path)
    with made.wired:
        yield made


def report(**changes: Any) -> StepReport:
    whole: dict[str, Any] = {
        "step": 1,
        "samples": 0,
        "labels": 0,
        "fresh": 0,
        "labelled": 0,
        "bad": [],
        "gaps": [],
        "duplicates": 0,
        "arrivals": [],
        "phases_s": {"assemble": 0.25, "learn": 0.5},
    }
    return StepReport(**whole | changes)


class TestStep:
    def test_every_record_of_a_step_is_counted_in_one_place(self, learner: Learning) -> None:
        """Read = learned + thinned + duplicate id + dead-lettered; what was trimmed unread is counted beside them."""
        bad_sample = BadRecord(Record(Position("samples", 0, 7), 0, b"k", b"v"), RecordError("not_json", "no"))
        bad_label = BadRecord(Record(Position("labels", 0, 2), 0, b"k", b"v"), RecordError("no_class", "no"))
        gap = Gap(Position("labels", 0, 9), missing=4)
        learner.watch.start(learner.parts)

        learner.watch.step_done(
            report(samples=10, labels=3, fresh=3, thinned=4, duplicates=2, bad=[bad_sample, bad_label], gaps=[gap])
        )

        assert learner.metric("records_read_total", topic="samples") == 10
        assert learner.metric("records_total", topic="samples", outcome="thinned") == 4
        assert learner.metric("records_read_total", topic="labels") == 3
        assert learner.metric("records_total", topic="samples", outcome="learned") == 3
        assert learner.metric("records_total", topic="samples", outcome="duplicate_id") == 2
        assert learner.metric("records_total", topic="samples", outcome="dead_lettered") == 1
        assert learner.metric("records_total", topic="labels", outcome="dead_lettered") == 1
        assert learner.metric("dead_letters_total", reason="not_json") == 1
        assert learner.metric("dead_letters_total", reason="no_class") == 1
        assert learner.metric("trimmed_records_total", topic="labels") == 4
        assert learner.metric("trimmed_records_total", topic="samples") == 0

    def test_its_time_is_counted_whole_and_by_phase(self, learner: Learning) -> None:
        """A step's duration is the sum of its phases."""
        learner.watch.start(learner.parts)

        learner.watch.step_done(report())
        learner.watch.step_done(report(phases_s={"learn": 1.0}))

        assert learner.metric("steps_total") == 2
        assert learner.metric("step_duration_seconds_sum") == 1.75
        assert learner.metric("step_phase_seconds_total", phase="learn") == 1.5
        assert (learner.metric("last_step_timestamp_seconds") or 0) > 1e9

    def test_only_labels_that_scored_count_as_scored(self, learner: Learning) -> None:
        """With how late they were."""
        prediction = Prediction(1, np.full(3, 1 / 3, np.float32), 5)
        scored = Scored(prediction, 1, 1, 42.0, None, None)
        arrivals = [Arrival(LabelState.SCORED, "a", 1, scored=scored), Arrival(LabelState.WAITING, "b", 1)]
        learner.watch.start(learner.parts)

        learner.watch.step_done(report(labels=2, arrivals=arrivals))

        assert learner.metric("labelled_predictions_total") == 1
        assert learner.metric("label_delay_seconds_sum") == 42.0


class TestSlowLook:
    def test_the_ledger_is_exported_and_its_outcomes_are_counted_once(self, learner: Learning) -> None:
        """However often one looks."""
        learner.watch.start(learner.parts)
        learner.join_a_label(1)

        learner.watch.look()
        learner.watch.look()
        learner.join_a_label(2)
        learner.watch.look()

        assert learner.metric("records_total", topic="labels", outcome="joined") == 2
        assert learner.metric("ledger_labels", state="joined") == 2
        assert learner.metric("ledger_samples") == 2
        assert learner.metric("store_payload_bytes") == 32

    def test_what_a_restored_ledger_had_counted_is_not_counted_again(self, learner: Learning) -> None:
        """Counters begin with the process; the ledger's own totals are shown as they are."""
        learner.join_a_label(1)

        learner.watch.start(learner.parts)

        assert learner.metric("records_total", topic="labels", outcome="joined") == 0
        assert learner.metric("ledger_labels", state="joined") == 1

    def test_accuracies_are_exported_and_told(self, learner: Learning) -> None:
        """Networks and baselines, windowed, faded and over all; what is not known is left out."""
        for teacher_class in (1, 1, 1, 0):
            learner.parts.board.prequential.update(
                true_class=1,
                teacher_class=teacher_class,
                student_class=0,
                teacher_probabilities_C=np.full(3, 1 / 3, np.float32),
                majority_class=1,
            )
        learner.watch.start(learner.parts)
        learner.watch.stop("stopped")

        accuracy = learner.status()["accuracy"]
        oracle = learner.metric("oracle_accuracy_ratio", network="teacher", window="windowed")
        assert learner.metric("prequential_accuracy_ratio", network="teacher", window="windowed") == 0.75
        assert learner.metric("prequential_accuracy_ratio", network="student", window="cumulative") == 0.0
        teacher = accuracy["prequential"]["teacher"]
        assert (teacher["windowed"], teacher["cumulative"]) == (0.75, 0.75)
        assert teacher["faded"] == pytest.approx(0.75, abs=0.001)
        assert accuracy["prequential"]["majority"]["windowed"] == 1.0
        assert accuracy["prequential"]["no_change"]["windowed"] is None
        assert accuracy["oracle"]["teacher"]["windowed"] is None
        assert oracle is not None
        assert np.isnan(oracle)

    def test_lag_is_told_by_partition_and_in_sum(self, learner: Learning) -> None:
        """Records in the log that are in no step yet."""
        learner.log.append("samples", [learner.codec.encode_sample(f"s{n}", np.zeros(4, np.float32)) for n in range(5)])
        learner.log.append("labels", [learner.codec.encode_label("s0", 1)])
        learner.wired.start()
        until(lambda: sum(map(len, learner.wired.feed.queues.values())) == 6, "all to be read", 8.0)
        until(lambda: sum(learner.wired.feed.lag().values()) == 6, "the ends to be known", 8.0)

        learner.watch.look()
        learner.watch.stop("stopped")

        assert learner.metric("consumer_lag_records", topic="samples", partition="0") == 5
        assert learner.metric("consumer_lag_records", topic="labels", partition="0") == 1
        assert learner.status()["lag_records"] == 6

    def test_coming_round_looks_no_more_than_twice_a_second(self, learner: Learning) -> None:
        """What is slow to read does not slow the loop."""
        learner.watch.start(learner.parts)
        learner.join_a_label(1)

        for _ in range(100):
            learner.watch.came_round()
        soon = learner.metric("ledger_samples")

        def seen() -> bool:
            learner.watch.came_round()
            return learner.metric("ledger_samples") == 1

        until(seen, "the next look", 5.0)

        assert soon == 0


class TestHeartbeat:
    def test_says_who_learns_how_far_and_how_well(self, learner: Learning) -> None:
        """From its first beat on, before any record came."""
        learner.watch.start(learner.parts)

        said = until(learner.status, "a heartbeat", 5.0)

        assert (said["pid"], said["state"], said["step"], said["published_step"]) == (os.getpid(), "learning", 0, 0)
        assert said["metrics_host"] == "127.0.0.1"
        assert said["metrics_port"] > 0
        assert learner.metric("log_available") == 1
        assert said["accounts"] == learner.parts.accounts.as_dict()
        assert said["ledger"]["joined"] == 0
        assert said["memory_rows"] == 0
        assert said["first_step_at_s"] is None

    def test_tells_a_published_teacher_and_a_saved_checkpoint(self, learner: Learning) -> None:
        """The metrics too, from the thread that saves."""
        learner.watch.start(learner.parts)
        learner.watch.published(41, 1234.5)
        saved = Saved(40, size_bytes=1000, duration_s=0.25, saved_at_s=1233.0, next_offsets={})

        with capture_logs() as lines:
            saver = threading.Thread(target=learner.watch.saved, args=(saved,))
            saver.start()
            saver.join()
        learner.watch.look()
        learner.watch.stop("stopped")

        assert learner.status()["published_step"] == 41
        assert learner.metric("published_step") == 41
        assert learner.metric("published_timestamp_seconds") == 1234.5
        assert learner.metric("checkpoint_step") == 40
        assert learner.metric("checkpoint_last_success_timestamp_seconds") == 1233.0
        assert learner.metric("checkpoint_size_bytes") == 1000
        assert [(line["event"], line["step"], line["size_bytes"]) for line in lines] == [("checkpoint_saved", 40, 1000)]

    def test_says_that_the_log_is_away(self, learner: Learning) -> None:
        """While it is; the loop goes on coming round. A learner that had caught up has no lag that would grow."""
        before = learner.metric("log_available")
        learner.log.fail("poll", LogUnavailableError("away"), times=1000)
        learner.wired.start()
        until(lambda: not learner.wired.feed.available, "the log to be missed", 5.0)

        learner.watch.look()
        assert (learner.metric("log_available"), learner.watch._snapshot["lag_records"]) == (0, 0)
        assert before is not None
        assert math.isnan(before)
        learner.watch.stop("stopped")

        assert learner.watch._snapshot["state"] == "stopped"
        learner.watch.look()
        assert learner.watch._snapshot["state"] == "log unavailable"

    def test_its_last_words_are_how_it_ended(self, tmp_path: Path) -> None:
        """An error that stops the learner is in the heartbeat for whoever looks later."""
        made = Learning(tmp_path)

        with contextlib.suppress(LogUnavailableError), made.wired as wired:
            wired.start()
            raise LogUnavailableError("the broker is away")

        assert made.status()["state"] == "failed: the broker is away"

    def test_a_full_disk_is_told_once_and_beating_goes_on(self, learner: Learning, tmp_path: Path) -> None:
        """Here its folder is gone for a while. Readiness turns to no by the age of the file."""
        learner.watch.start(learner.parts)
        until(learner.status, "a heartbeat", 5.0)
        away = tmp_path.with_name(tmp_path.name + "-away")

        with capture_logs() as lines:
            tmp_path.rename(away)
            until(lambda: lines, "a failed beat", 5.0)
            threading.Event().wait(1.3)  # longer than from one beat to the next
            away.rename(tmp_path)
        learner.paths.heartbeat.unlink()

        assert [line["event"] for line in lines] == ["heartbeat_failed"]
        assert until(learner.status, "the next beat", 5.0)["pid"] == os.getpid()
