"""Observes the loop: metrics at each step, slower figures about twice a second, and the heartbeat file.

Costs, ledger counts and scores are read in the loop's thread and kept as one plain dict. The heartbeat's thread only
writes that dict, so a step that hangs shows as a `time_s` that stands still.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import structlog

from streamlearn.errors import StateLockedError
from streamlearn.judge.drift import SOURCES
from streamlearn.judge.prequential import NETWORKS, PrequentialReport
from streamlearn.judge.scoreboard import ScoreReport
from streamlearn.loop.guarding import GuardingReport
from streamlearn.loop.loop import TrainingLoop
from streamlearn.loop.report import Observer, StepReport
from streamlearn.metrics import CLASS_SCORES, GUARD_ACTIONS, LABEL_STATES, SCORES, WINDOWS, LearnerMetrics
from streamlearn.records import Position
from streamlearn.state.checkpoint import Saved
from streamlearn.state.fence import NO_FENCE, Fence, FencedFiles
from streamlearn.state.paths import StatePaths
from streamlearn.state.status import write_status

LOOK_EVERY_S = 0.5
HEARTBEAT_EVERY_S = 1.0
LABEL_OUTCOMES = ("joined", "duplicate", "corrected", "retracted", "erased", "expired", "orphan", "held_dropped")
OnStep = Callable[[TrainingLoop, StepReport], None]
"""Called after each step, in the loop's thread. It must change nothing."""
_log = structlog.get_logger(__name__)


class Monitor(Observer):
    """Methods are called in the loop's thread, except `saved`."""

    def __init__(
        self,
        metrics: LearnerMetrics,
        paths: StatePaths,
        *,
        metrics_address: tuple[str, int],
        classes: Sequence[str] = (),
        on_step: OnStep | None = None,
        fence: Fence = NO_FENCE,
    ) -> None:
        """`classes` are those with metrics of their own."""
        self._metrics, self._paths, self._files, self._on_step = metrics, paths, FencedFiles(fence), on_step
        self._classes = classes
        self._loop: TrainingLoop | None = None
        self._fenced: StateLockedError | None = None
        self._looked_at_s = float("-inf")
        self._counted: Counter[str] = Counter()
        host, port = metrics_address
        self.status: dict[str, Any] = {
            "pid": os.getpid(),
            "metrics_host": host,
            "metrics_port": port,
            "state": "starting",
        }
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
        self._counted = Counter(asdict(loop.ledger.counts()))
        self._counted.update(_events(loop.guarding.report()))
        self._windows_logged = loop.board.prequential.scored // loop.board.window
        self.look()
        self._thread.start()

    def step_done(self, report: StepReport) -> None:
        """Count the records of a step, and its time."""
        now_s, metrics, duration_s = time.time(), self._metrics, sum(report.phases_s.values())
        self._last_step_at_s = now_s
        if self._first_step_at_s is None:
            self._first_step_at_s = now_s - duration_s
        metrics.step(duration_s, now_s)
        for phase, phase_s in report.phases_s.items():
            metrics.phase(phase, phase_s)
        metrics.read("samples", report.samples)
        metrics.read("labels", report.labels)
        for outcome, count in (
            ("learned", report.fresh),
            ("thinned", report.shed),
            ("duplicate_id", report.duplicates),
        ):
            metrics.finished("samples", outcome, count)
        loop = self._running()
        for record in report.bad:
            metrics.dead_lettered(_kind(loop, record.position), record.error.reason)
        for gap in report.gaps:
            metrics.finished(_kind(loop, gap.position), "trimmed", gap.missing)
        for arrival in report.arrivals:
            if arrival.scored is not None:
                metrics.scored(arrival.scored.delay_s)
        if self._on_step is not None:
            self._on_step(loop, report)

    def turn_done(self) -> None:
        """Look at the slower figures, about twice a second.

        Raises:
            StateLockedError: another learner has taken over.
        """
        if self._fenced is not None:
            raise self._fenced
        if time.monotonic() - self._looked_at_s >= LOOK_EVERY_S:
            self.look()

    def phase_done(self, phase: str, duration_s: float) -> None:
        """Count time outside of steps."""
        self._metrics.phase(phase, duration_s)

    def published(self, step: int) -> None:
        """Count a published teacher."""
        self._published_step = step
        self._metrics.published(step)

    def saved(self, saved: Saved) -> None:
        """Count a durable checkpoint. Called in the saver's thread."""
        self._metrics.checkpoint_saved(duration_s=saved.duration_s, now_s=saved.saved_at_s)
        _log.info(
            "checkpoint_saved", step=saved.step, size_bytes=saved.size_bytes, duration_s=round(saved.duration_s, 4)
        )

    def look(self, state: str = "learning") -> None:
        """Read everything that is slow to read, and compose the heartbeat."""
        self._looked_at_s = time.monotonic()
        loop = self._running()
        self._export_costs(loop)
        lag_records, available = self._export_log(loop)
        ledger = self._export_labels(loop)
        scores, guarding = loop.board.report(), loop.guarding.report()
        self._export_scores(scores, guarding)
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
            "ledger": ledger,
            "held_classes": loop.ledger.held(),
            "memory_rows": len(loop.replay),
            **asdict(guarding),
        }

    def stop(self, state: str) -> None:
        """Write the last heartbeat, if there was a first."""
        if self._loop is None:
            return
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()
        self.status = {**self.status, "state": state, "time_s": time.time()}
        with contextlib.suppress(StateLockedError):  # the files are those of the next learner
            self._write()

    def _running(self) -> TrainingLoop:
        assert self._loop is not None, "not started"
        return self._loop

    def _export_costs(self, loop: TrainingLoop) -> None:
        costs = loop.learner.read_costs()
        if not costs.steps:
            return
        self._metrics.costs(
            classification=costs.classification,
            consistency=costs.consistency,
            weight=costs.consistency_weight,
        )
        self._metrics.skipped(costs.skipped_steps)
        self.status["costs"] = asdict(costs)

    def _export_log(self, loop: TrainingLoop) -> tuple[int, bool]:
        """Consumer lag in records, and whether the log answers."""
        lag = loop.feed.lag()
        for partition, records in lag.items():
            self._metrics.lag(partition.topic, partition.partition, records)
        available = loop.feed.available
        self._metrics.log_available(available=available)
        return sum(lag.values()), available

    def _export_labels(self, loop: TrainingLoop) -> dict[str, Any]:
        """The ledger's counts, by name."""
        counts = loop.ledger.counts()
        ledger = asdict(counts)
        for outcome in LABEL_OUTCOMES:
            if (more := ledger[outcome] - self._counted[outcome]) > 0:
                self._metrics.finished("labels", outcome, more)
                self._counted[outcome] = ledger[outcome]  # not lowered when a late record lowers the count
        self._metrics.ledger(
            {name: ledger[name] for name in LABEL_STATES},
            samples=counts.samples,
            payload_bytes=counts.payload_bytes,
        )
        return ledger

    def _export_scores(self, scores: ScoreReport, guarding: GuardingReport) -> None:
        metrics, at_label, traffic = self._metrics, scores.at_label, scores.traffic
        for window in WINDOWS:
            span = getattr(scores.at_arrival, window)
            for network in NETWORKS:
                metrics.accuracy(network, window, span.accuracy[network])
            for score in SCORES:
                metrics.score(score, window, getattr(span, score))
        by_class = {scores.classes[found.class_index]: found for found in scores.at_arrival.windowed.by_class}
        for name in self._classes:
            metrics.class_scores(name, **{score: getattr(by_class[name], score) for score in CLASS_SCORES})
        metrics.ranking(scores.at_arrival.windowed.pr_auc)
        calibration = scores.calibration
        metrics.calibration(network=calibration.network.ece, corrected=calibration.corrected.ece)
        metrics.label_time(teacher=at_label.teacher, twin=at_label.twin)
        low, high = at_label.interval or (None, None)
        metrics.ssl_gain(low=low, mean=at_label.gain, high=high)
        metrics.selection_bias(
            labelled_share=traffic.labelled_share.windowed,
            confidence_gap=traffic.confidence_gap,
            class_mix_distance=traffic.class_mix_distance,
            class_entropy=traffic.class_entropy,
        )
        metrics.guard(frozen=guarding.guard.frozen, reasons=guarding.guard.reasons)
        metrics.trust(guarding.trust.factor)
        for name, count in _events(guarding).items():
            if (more := count - self._counted[name]) > 0:
                (metrics.guard_acted if name in GUARD_ACTIONS else metrics.drifted)(name, more)
            self._counted[name] = count

    def _export_candidates(self, loop: TrainingLoop) -> dict[str, Any]:
        """The served candidate, and the accuracy of all of them on the newest labels."""
        served = loop.learner.candidates[loop.learner.served]
        for name in loop.learner.candidates:
            self._metrics.candidate(name, served=name == served)
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


def _kind(loop: TrainingLoop, position: Position) -> str:
    return "samples" if position.topic == loop.batcher.sample_topic else "labels"


def _accuracy(report: PrequentialReport | None) -> dict[str, dict[str, float | None]]:
    """By network and window."""
    return {
        network: {window: None if report is None else getattr(report, window).accuracy[network] for window in WINDOWS}
        for network in NETWORKS
    }


def _events(guarding: GuardingReport) -> dict[str, int]:
    """Actions of the guard and drift alarms since the state folder was new."""
    actions = {action: guarding.guard.actions[action] for action in GUARD_ACTIONS}
    return actions | {source: guarding.drift[source].alarms for source in SOURCES}
