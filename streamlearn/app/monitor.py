"""Watches the loop: metrics once a step, everything slower about twice a second, and the heartbeat file.

What must be asked in the loop's thread (costs, ledger counts, scores) is asked there and kept as one plain dict; the
heartbeat's thread only writes that dict down. So a hanging step shows as a `time_s` that stands still.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import structlog

from streamlearn.errors import StateLockedError
from streamlearn.judge.drift import SOURCES
from streamlearn.judge.prequential import NETWORKS, PrequentialReport
from streamlearn.judge.scoreboard import ScoreReport
from streamlearn.log.feed import Feed
from streamlearn.loop import Parts, StepReport
from streamlearn.loop.guarding import GuardingReport
from streamlearn.metrics import GUARD_ACTIONS, LABEL_STATES, SCORES, WINDOWS, LearnerMetrics
from streamlearn.records import Position
from streamlearn.state.checkpoint import Saved
from streamlearn.state.files import DISK, Files
from streamlearn.state.status import write_status

SLOW_EVERY_S = 0.5
Watching = Callable[[Parts, StepReport], None]
"""Called after each step, in the loop's thread, by who wants to see more than is exported. It must change nothing."""
_log = structlog.get_logger(__name__)


class Watch:
    """Implements the pipeline's `Watcher`."""

    def __init__(
        self,
        metrics: LearnerMetrics,
        heartbeat: Path,
        scores: Path,
        feed: Feed,
        *,
        metrics_host: str,
        metrics_port: int,
        watching: Watching | None = None,
        files: Files = DISK,
    ) -> None:
        """`files` may refuse what a learner writes that another has taken over from."""
        self._files = files
        self._refused: StateLockedError | None = None
        self.metrics, self._heartbeat, self._scores_path, self._feed = metrics, heartbeat, scores, feed
        self._watching = watching
        self._parts: Parts | None = None
        self._slow_at_s = float("-inf")
        self._counted: Counter[str] = Counter()
        exposed = {"metrics_host": metrics_host, "metrics_port": metrics_port}
        self._snapshot: dict[str, Any] = {"pid": os.getpid(), **exposed, "state": "starting"}
        self._scores: dict[str, Any] = {}
        self._windows_logged = 0
        self._saved: Saved | None = None
        self._published_step = 0
        self._first_step_at_s: float | None = None
        self._last_step_at_s = 0.0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    @property
    def started(self) -> bool:
        """The heartbeat was begun."""
        return self._parts is not None

    def start(self, parts: Parts) -> None:
        """Begin the heartbeat. Counters count from here: what a restored ledger had counted was another process's."""
        self._parts = parts
        self._counted = Counter(asdict(parts.ledger.counts()))
        self._counted.update(self._events(parts.guarding.report()))
        self._windows_logged = parts.board.prequential.scored // parts.board.window
        self.look()
        self._thread.start()

    def step_done(self, report: StepReport) -> None:
        """Count one step."""
        now_s, metrics = time.time(), self.metrics
        self._last_step_at_s = now_s
        if self._first_step_at_s is None:
            self._first_step_at_s = now_s - sum(report.phases_s.values())
        metrics.step(sum(report.phases_s.values()), now_s)
        for phase, duration_s in report.phases_s.items():
            metrics.phase(phase, duration_s)
        metrics.read("samples", report.samples)
        metrics.read("labels", report.labels)
        metrics.finished("samples", "learned", report.fresh)
        if report.thinned:
            metrics.finished("samples", "thinned", report.thinned)
        if report.duplicates:
            metrics.finished("samples", "duplicate_id", report.duplicates)
        for record in report.bad:
            metrics.dead_lettered(self._kind(record.position), record.error.reason)
        for gap in report.gaps:
            metrics.finished(self._kind(gap.position), "trimmed", gap.missing)
        for arrival in report.arrivals:
            if arrival.scored is not None:
                metrics.scored(arrival.scored.delay_s)
        if self._watching is not None:
            assert self._parts is not None
            self._watching(self._parts, report)

    def came_round(self) -> None:
        """The loop is alive: look at what is slow to read, about twice a second.

        Raises:
            StateLockedError: another learner has taken over, and there is nothing to do here any more.
        """
        if self._refused is not None:
            raise self._refused
        if time.monotonic() - self._slow_at_s >= SLOW_EVERY_S:
            self.look()

    def spent(self, phase: str, duration_s: float) -> None:
        """Time outside of steps."""
        self.metrics.phase(phase, duration_s)

    def look(self, state: str = "learning") -> None:
        """Read what is slow to read. In the loop's thread only."""
        self._slow_at_s = time.monotonic()
        parts = self._parts
        assert parts is not None
        counts, metrics = parts.ledger.counts(), self.metrics
        costs = parts.learner.read_costs()
        if costs.steps:
            metrics.costs(
                classification=costs.classification,
                consistency=costs.consistency,
                weight=costs.consistency_weight,
            )
            metrics.skipped(costs.skipped_steps)
            self._snapshot["costs"] = asdict(costs)
        ledger = asdict(counts)
        settled = ("joined", "duplicate", "corrected", "retracted", "erased", "expired", "orphan", "held_dropped")
        for outcome in settled:
            if (more := ledger[outcome] - self._counted[outcome]) > 0:
                metrics.finished("labels", outcome, more)
                self._counted[outcome] = ledger[outcome]  # and stays where a late record makes it fewer
        metrics.ledger(
            {name: ledger[name] for name in LABEL_STATES},
            samples=counts.samples,
            payload_bytes=counts.payload_bytes,
        )
        lag = self._feed.lag()
        for partition, records in lag.items():
            metrics.lag(partition.topic, partition.partition, records)
        available = self._feed.available
        metrics.log_available(available=available)
        scores, guarding = parts.board.report(), parts.guarding.report()
        self._export(scores, guarding)
        self._scores = {
            "time_s": time.time(),
            "step": parts.learner.step,
            **asdict(scores),
            **self._candidates(parts),
            **asdict(guarding),
        }
        self._log_window(parts, scores)
        self._snapshot = {
            **self._snapshot,
            "state": state if available else "log unavailable",
            "time_s": time.time(),
            "step": parts.learner.step,
            "published_step": self._published_step,
            "first_step_at_s": self._first_step_at_s,
            "last_step_at_s": self._last_step_at_s,
            "lag_records": sum(lag.values()),
            "accuracy": {"prequential": _accuracy(scores.at_arrival), "oracle": _accuracy(scores.oracle)},
            "accounts": parts.accounts.as_dict(),
            "ledger": ledger,
            "held_classes": parts.ledger.held(),
            "memory_rows": len(parts.memory),
            **asdict(guarding),
        }

    def published(self, step: int) -> None:
        """A teacher became visible."""
        self._published_step = step
        self.metrics.published(step)

    def saved(self, saved: Saved) -> None:
        """A checkpoint became durable. Called by the saver's thread."""
        self._saved = saved
        self.metrics.checkpoint_saved(duration_s=saved.duration_s, now_s=saved.saved_at_s)
        _log.info(
            "checkpoint_saved", step=saved.step, size_bytes=saved.size_bytes, duration_s=round(saved.duration_s, 4)
        )

    def stop(self, state: str) -> None:
        """Write the last heartbeat."""
        self._done.set()
        if self._thread.is_alive():
            self._thread.join()
        self._snapshot = {**self._snapshot, "state": state, "time_s": time.time()}
        with contextlib.suppress(StateLockedError):  # the successor's own stand there
            self._write()

    def _kind(self, position: Position) -> str:
        assert self._parts is not None
        return "samples" if position.topic == self._parts.batcher.sample_topic else "labels"

    def _export(self, scores: ScoreReport, guarding: GuardingReport) -> None:
        metrics, at_label, traffic = self.metrics, scores.at_label, scores.traffic
        for window in WINDOWS:
            span = getattr(scores.at_arrival, window)
            for network in NETWORKS:
                metrics.accuracy(network, window, span.accuracy[network])
            for score in SCORES:
                metrics.score(score, window, getattr(span, score))
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
        for name, count in self._events(guarding).items():
            if (more := count - self._counted[name]) > 0:
                (metrics.guard_acted if name in GUARD_ACTIONS else metrics.drifted)(name, more)
            self._counted[name] = count

    def _candidates(self, parts: Parts) -> dict[str, Any]:
        """The served candidate, and the accuracy of all of them on the newest labels."""
        served = parts.learner.candidates[parts.learner.served]
        for name in parts.learner.candidates:
            self.metrics.candidate(name, served=name == served)
        accuracies = {served: None} if parts.election is None else parts.election.accuracies()
        return {"bank": {"served": served, "accuracy": accuracies}}

    def _events(self, guarding: GuardingReport) -> dict[str, int]:
        """Actions of the guard and drift alarms since the state folder was new."""
        actions = {action: guarding.guard.actions[action] for action in GUARD_ACTIONS}
        return actions | {source: guarding.drift[source].alarms for source in SOURCES}

    def _log_window(self, parts: Parts, scores: ScoreReport) -> None:
        """One log line for each window of labels."""
        windows = parts.board.prequential.scored // parts.board.window
        if windows <= self._windows_logged:
            return
        self._windows_logged = windows
        now, at_label, traffic = scores.at_arrival.windowed, scores.at_label, scores.traffic
        _log.info(
            "scores",
            step=parts.learner.step,
            labels=parts.board.prequential.scored,
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
        write_status(self._heartbeat, self._snapshot, self._files)
        write_status(self._scores_path, self._scores, self._files)

    def _beat(self) -> None:
        failed = False
        while not self._done.wait(1.0):
            try:
                self._write()
                failed = False
            except StateLockedError as error:
                self._refused = error
                return
            except OSError as error:
                # Readiness turns to no by itself while the file is old; the loop stops at its next save if it must.
                if not failed:
                    _log.error("heartbeat_failed", error=str(error))
                failed = True


def _accuracy(report: PrequentialReport | None) -> dict[str, dict[str, float | None]]:
    """By network and window."""
    return {
        network: {window: None if report is None else getattr(report, window).accuracy[network] for window in WINDOWS}
        for network in NETWORKS
    }
