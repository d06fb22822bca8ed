"""Observes the loop: metrics at each step, slower figures about twice a second, and the heartbeat file.

Costs, ledger counts and scores are read in the loop's thread and kept as one plain dict. The heartbeat's thread only
writes that dict, so a step that hangs shows as a `time_s` that stands still.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import structlog

from streamlearn.errors import StateLockedError
from streamlearn.judge.prequential import NETWORKS, PrequentialReport
from streamlearn.judge.scoreboard import ScoreReport
from streamlearn.loop.guarding import GuardingReport
from streamlearn.loop.loop import TrainingLoop
from streamlearn.loop.report import Observer, StepReport
from streamlearn.metrics import (
    CLASS_SCORES,
    COLUMN_OUTCOMES,
    GUARD_REASONS,
    LABEL_OUTCOMES,
    LABEL_STATES,
    SCORES,
    STEP_OUTCOMES,
    TOPICS,
    WINDOWS,
    Metrics,
)
from streamlearn.schema.columns import RowEncoder
from streamlearn.state.checkpoint import Saved
from streamlearn.state.files import DISK, Files
from streamlearn.state.paths import StatePaths
from streamlearn.state.status import write_status

LOOK_EVERY_S = 0.5
IDLE_LOOK_EVERY_S = 2.0
"""While no step is taken. Scores are slow to compute, and only lag and the state of the log can be new."""
HEARTBEAT_EVERY_S = 1.0
OnStep = Callable[[TrainingLoop, StepReport], None]
"""Called after each step, in the loop's thread. It must change nothing."""
Events = dict[tuple[str, ...], int]
"""How often each event occurred, by the name of its counter and the values of its labels."""
_log = structlog.get_logger(__name__)


class Monitor(Observer):
    """Methods are called in the loop's thread, except `saved`."""

    def __init__(
        self,
        metrics: Metrics,
        paths: StatePaths,
        *,
        metrics_port: int,
        classes: Sequence[str] = (),
        on_step: OnStep | None = None,
        fence: Files = DISK,
    ) -> None:
        """`classes` are those with metrics of their own."""
        self._metrics, self._paths, self._files, self._on_step = metrics, paths, fence, on_step
        self._classes = classes
        self._loop: TrainingLoop
        self._fenced: StateLockedError | None = None
        self._looked_at_s, self._looked_step = float("-inf"), 0
        self._counted: Events = {}
        self.status: dict[str, Any] = {"pid": os.getpid(), "metrics_port": metrics_port, "state": "starting"}
        """What the heartbeat writes."""
        self._scores: dict[str, Any] = {}
        self._windows_logged = 0
        self._published_step = 0
        self._first_step_at_s: float | None = None
        self._last_step_at_s = 0.0
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def start(self, loop: TrainingLoop) -> None:
        """Start the heartbeat. Counters start here too: a restored ledger has counted for other processes."""
        self._loop = loop
        self._counted = _events(asdict(loop.ledger.counts()), loop.guarding.report(), loop.feed.codec.rows)
        for event in self._counted:
            self._metrics.count(event[0], 0, *event[1:])  # so that Prometheus sees the first one of each column
        self._windows_logged = loop.board.prequential.scored // loop.board.window
        self.look()
        self._thread.start()

    def step_done(self, report: StepReport) -> None:
        """Count the records of a step, and its time."""
        now_s, metrics, duration_s = time.time(), self._metrics, sum(report.phases_s.values())
        self._last_step_at_s = now_s
        if self._first_step_at_s is None:
            self._first_step_at_s = now_s - duration_s
        metrics.count("steps_total", 1)
        metrics.observe("step_duration_seconds", duration_s)
        metrics.set("last_step_timestamp_seconds", now_s)
        for phase, phase_s in report.phases_s.items():
            self.phase_done(phase, phase_s)
        counts = report.counts.as_dict()
        for topic in TOPICS:
            metrics.count("records_read_total", counts[f"{topic}_read"], topic)
        for topic, outcome in STEP_OUTCOMES:
            metrics.count("records_total", counts[f"{topic}_{outcome}"], topic, outcome)
        for record in report.bad:
            metrics.count("dead_letters_total", 1, record.error.reason)
        for arrival in report.arrivals:
            if arrival.scored is not None:
                metrics.observe("label_delay_seconds", arrival.scored.delay_s)
        if self._on_step is not None:
            self._on_step(self._loop, report)

    def turn_done(self) -> None:
        """Look at the slower figures, about twice a second while steps are taken.

        Raises:
            StateLockedError: another learner has taken over.
        """
        if self._fenced is not None:
            raise self._fenced
        every_s = IDLE_LOOK_EVERY_S if self._loop.learner.step == self._looked_step else LOOK_EVERY_S
        if time.monotonic() - self._looked_at_s >= every_s:
            self.look()

    def phase_done(self, phase: str, duration_s: float) -> None:
        """Count time outside of steps."""
        self._metrics.count("step_phase_seconds_total", duration_s, phase)

    def published(self, step: int) -> None:
        """Count a published teacher."""
        self._published_step = step
        self._metrics.set("published_step", step)

    def saved(self, saved: Saved) -> None:
        """Count a durable checkpoint. Called in the saver's thread."""
        self._metrics.observe("checkpoint_duration_seconds", saved.duration_s)
        self._metrics.set("checkpoint_last_success_timestamp_seconds", saved.saved_at_s)
        _log.info(
            "checkpoint_saved", step=saved.step, size_bytes=saved.size_bytes, duration_s=round(saved.duration_s, 4)
        )

    def look(self, state: str = "learning") -> None:
        """Read everything that is slow to read, and compose the heartbeat."""
        loop = self._loop
        self._looked_at_s, self._looked_step = time.monotonic(), loop.learner.step
        self._export_costs(loop)
        lag_records, available = self._export_log(loop)
        ledger = self._export_labels(loop)
        scores, guarding = loop.board.report(), loop.guarding.report()
        self._export_scores(scores, guarding)
        for event, count in _events(ledger, guarding, loop.feed.codec.rows).items():
            if (more := count - self._counted[event]) > 0:
                self._metrics.count(event[0], more, *event[1:])
                self._counted[event] = count  # not lowered when a late record lowers the count
        self._scores = {
            "time_s": time.time(),
            "step": loop.learner.step,
            **asdict(scores),
            **self._export_candidates(loop),
            **asdict(guarding),
        }
        self._log_window(loop, scores)
        self.status = {
            **self.status,
            "state": state if available else "log unavailable",
            "time_s": time.time(),
            "step": loop.learner.step,
            "published_step": self._published_step,
            "first_step_at_s": self._first_step_at_s,
            "last_step_at_s": self._last_step_at_s,
            "lag_records": lag_records,
            "accuracy": {"prequential": _accuracy(scores.at_arrival), "oracle": _accuracy(scores.oracle)},
            "accounts": loop.accounts.as_dict(),
            **_source(loop),
            "ledger": ledger,
            "held_classes": loop.ledger.held(),
            "memory_rows": len(loop.replay),
            **asdict(guarding),
        }

    def stop(self, state: str) -> None:
        """Write the last heartbeat, if there was a first."""
        if self._thread.ident is None:
            return
        self._stopping.set()
        self._thread.join()
        self.status = {**self.status, "state": state, "time_s": time.time()}
        with contextlib.suppress(StateLockedError):  # the files are those of the next learner
            self._write()

    def _export_costs(self, loop: TrainingLoop) -> None:
        costs = loop.learner.read_costs()
        if not costs.steps:
            return
        for term in ("classification", "consistency", "auxiliary"):
            self._metrics.set("cost", getattr(costs, term), term)
        self._metrics.set("consistency_weight", costs.consistency_weight)
        self._metrics.count("steps_skipped_total", costs.skipped_steps)
        self.status["costs"] = asdict(costs)

    def _export_log(self, loop: TrainingLoop) -> tuple[int, bool]:
        """Consumer lag in records, and whether the log answers."""
        lag = loop.feed.lag()
        for partition, records in lag.items():
            self._metrics.set("consumer_lag_records", records, partition.topic, str(partition.partition))
        available = loop.feed.available
        self._metrics.set("log_available", available)
        return sum(lag.values()), available

    def _export_labels(self, loop: TrainingLoop) -> dict[str, Any]:
        """The ledger's counts, by name."""
        counts = loop.ledger.counts()
        ledger = asdict(counts)
        for state in LABEL_STATES:
            self._metrics.set("ledger_labels", ledger[state], state)
        self._metrics.set("ledger_samples", counts.samples)
        self._metrics.set("store_payload_bytes", counts.payload_bytes)
        return ledger

    def _export_scores(self, scores: ScoreReport, guarding: GuardingReport) -> None:
        metrics, at_label, traffic = self._metrics, scores.at_label, scores.traffic
        for window in WINDOWS:
            span = getattr(scores.at_arrival, window)
            for network in NETWORKS:
                metrics.set("prequential_accuracy_ratio", span.accuracy[network], network, window)
            for score in SCORES:
                metrics.set("score", getattr(span, score), score, window)
        windowed = scores.at_arrival.windowed
        metrics.set("pr_auc_ratio", windowed.pr_auc)
        for found in windowed.by_class:
            if (name := scores.classes[found.class_index]) in self._classes:
                for score in CLASS_SCORES:
                    metrics.set("class_score", getattr(found, score), name, score)
        metrics.set("calibration_error_ratio", scores.calibration.network.ece, "network")
        metrics.set("calibration_error_ratio", scores.calibration.corrected.ece, "corrected")
        metrics.set("label_time_accuracy_ratio", at_label.teacher, "teacher")
        metrics.set("label_time_accuracy_ratio", at_label.twin, "twin")
        low, high = at_label.interval or (None, None)
        for bound, ratio in (("low", low), ("mean", at_label.gain), ("high", high)):
            metrics.set("ssl_gain_ratio", ratio, bound)
        metrics.set("selection_bias", traffic.labelled_share.windowed, "labelled_share")
        for measure in ("confidence_gap", "class_mix_distance", "class_entropy"):
            metrics.set("selection_bias", getattr(traffic, measure), measure)
        metrics.set("guard_frozen", guarding.guard.frozen)
        for reason in GUARD_REASONS:
            metrics.set("guard_reason", reason in guarding.guard.reasons, reason)
        metrics.set("teacher_trust_ratio", guarding.trust.factor)

    def _export_candidates(self, loop: TrainingLoop) -> dict[str, Any]:
        """The served candidate, and the accuracy of all of them on the newest labels."""
        served = loop.learner.candidates[loop.learner.served]
        for name in loop.learner.candidates:
            self._metrics.set("candidate_served", name == served, name)
        return {"bank": {"served": served, "accuracy": loop.election.accuracies()}}

    def _log_window(self, loop: TrainingLoop, scores: ScoreReport) -> None:
        """Log the scores once per window of labels."""
        labels = loop.board.prequential.scored
        windows = labels // loop.board.window
        if windows <= self._windows_logged:
            return
        self._windows_logged = windows
        now, at_label, traffic = scores.at_arrival.windowed, scores.at_label, scores.traffic
        _log.info(
            "scores",
            step=loop.learner.step,
            labels=labels,
            **{f"accuracy_{network}": now.accuracy[network] for network in NETWORKS},
            **{score: getattr(now, score) for score in SCORES},
            accuracy_at_label=at_label.teacher,
            ssl_gain=at_label.gain,
            ssl_gain_interval=at_label.interval,
            delay_s=asdict(traffic.delay_s),
            labelled_share=traffic.labelled_share.windowed,
            confidence_gap=traffic.confidence_gap,
        )

    def _write(self) -> None:
        write_status(self._paths.heartbeat, self.status, self._files)
        write_status(self._paths.scores, self._scores, self._files)

    def _beat(self) -> None:
        failed = False
        while not self._stopping.wait(HEARTBEAT_EVERY_S):
            try:
                self._write()
                failed = False
            except StateLockedError as error:
                self._fenced = error
                return
            except OSError as error:
                # Readiness fails by the age of the file. The loop itself stops at its next save, if it cannot write.
                if not failed:
                    _log.error("heartbeat_failed", error=str(error))
                failed = True


def _source(loop: TrainingLoop) -> dict[str, Any]:
    """Of the user's records: counts by column since the process started, and whether the schema registry answers."""
    rows, registry = loop.feed.codec.rows, loop.feed.codec.registry
    return {
        "columns": None if rows is None else asdict(rows.counts()),
        "registry": None
        if registry is None
        else {"down_since_s": registry.down_since_s, "failures": registry.failures},
    }


def _accuracy(report: PrequentialReport | None) -> dict[str, dict[str, float | None]]:
    """By network and window."""
    return {
        network: {window: None if report is None else getattr(report, window).accuracy[network] for window in WINDOWS}
        for network in NETWORKS
    }


def _events(ledger: Mapping[str, int], guarding: GuardingReport, rows: RowEncoder | None) -> Events:
    """Counts by metric: of labels, guard and alarms since the state folder was new, of columns since this start."""
    events: Events = {("records_total", "labels", outcome): ledger[outcome] for outcome in LABEL_OUTCOMES}
    events |= {("guard_actions_total", action): count for action, count in guarding.guard.actions.items()}
    events |= {("drift_alarms_total", source): report.alarms for source, report in guarding.drift.items()}
    if rows is not None:
        counts = rows.counts()
        for column, missing in counts.missing.items():
            invalid = counts.invalid[column]
            values = (counts.records - missing - invalid, missing, invalid)
            events |= {("column_values_total", column, o): n for o, n in zip(COLUMN_OUTCOMES, values, strict=True)}
        events["unknown_fields_total",] = sum(counts.unknown.values())
    return events
