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
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import structlog

from streamlearn.errors import StateLockedError
from streamlearn.judge.prequential import Prequential
from streamlearn.loop.loop import TrainingLoop
from streamlearn.loop.report import Observer, StepReport
from streamlearn.metrics import GUARD_ACTIONS, INTERVAL, LABEL_STATES, NETWORKS, SCORES, WINDOWS, LearnerMetrics
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
        on_step: OnStep | None = None,
        fence: Fence = NO_FENCE,
    ) -> None:
        self._metrics, self._paths, self._files, self._on_step = metrics, paths, FencedFiles(fence), on_step
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
            metrics.trimmed(_kind(loop, gap.position), gap.missing)
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

    def published(self, step: int, published_at_s: float) -> None:
        """Count a published teacher."""
        self._published_step = step
        self._metrics.published(step, published_at_s)

    def saved(self, saved: Saved) -> None:
        """Count a durable checkpoint. Called in the saver's thread."""
        self._metrics.checkpoint_saved(
            saved.step, duration_s=saved.duration_s, size_bytes=saved.size_bytes, now_s=saved.saved_at_s
        )
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
        accuracy = {
            "prequential": _accuracies(loop.board.prequential, self._metrics.accuracy),
            "oracle": _accuracies(loop.board.oracle, self._metrics.oracle_accuracy),
        }
        guarding = self._export_scores(loop)
        self.status = {
            **self.status,
            "state": state if available else "log unavailable",
            "time_s": time.time(),
            "step": loop.learner.step,
            "published_step": self._published_step,
            "first_step_at_s": self._first_step_at_s,
            "last_step_at_s": self._last_step_at_s,
            "lag_records": lag_records,
            "accuracy": accuracy,
            "accounts": loop.accounts.as_dict(),
            "ledger": ledger,
            "held_classes": loop.ledger.held(),
            "memory_rows": len(loop.replay),
            **guarding,
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
            learning_rate=costs.learning_rate,
        )
        self._metrics.skipped(costs.skipped_steps, costs.skipped_rows)
        self.status["costs"] = asdict(costs)

    def _export_log(self, loop: TrainingLoop) -> tuple[int, bool]:
        """Consumer lag in records, and whether the log answers."""
        self._metrics.waiting("samples", loop.feed.waiting(loop.batcher.sample_topic))
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
        self._metrics.waiting("labels", counts.waiting)
        self._metrics.ledger(
            {name: ledger[name] for name in LABEL_STATES},
            samples=counts.samples,
            payload_bytes=counts.payload_bytes,
        )
        self._metrics.memory(len(loop.replay))
        return ledger

    def _export_scores(self, loop: TrainingLoop) -> dict[str, Any]:
        """Export scores, guard and drift; the part of them that the heartbeat shows."""
        report, guarding, metrics = loop.board.report(), loop.guarding.report(), self._metrics
        at_label, traffic, guard = report["at_label"], report["traffic"], guarding["guard"]
        for window in WINDOWS:
            for score in SCORES:
                metrics.score(score, window, report["at_arrival"][window][score])
        metrics.label_time("teacher", at_label["teacher"])
        metrics.label_time("twin", at_label["twin"])
        low, high = at_label["interval"] or (None, None)
        for bound, ratio in zip(INTERVAL, (low, at_label["gain"], high), strict=True):
            metrics.ssl_gain(bound, ratio)
        metrics.traffic(
            labelled_share=traffic["labelled_share"]["windowed"],
            confidence_gap=traffic["confidence_gap"],
            class_mix_distance=traffic["class_mix_distance"],
            class_entropy=traffic["class_entropy"],
        )
        candidates = self._export_candidates(loop)
        metrics.guard(frozen=guard["frozen"], reasons=guard["reasons"])
        metrics.trust(guarding["trust"]["factor"])
        for name, count in _events(guarding).items():
            if (more := count - self._counted[name]) > 0:
                (metrics.guard_acted if name in GUARD_ACTIONS else metrics.drifted)(name, more)
            self._counted[name] = count
        self._scores = {"time_s": time.time(), "step": loop.learner.step, **report, **candidates, **guarding}
        self._log_window(loop, report)
        return guarding

    def _export_candidates(self, loop: TrainingLoop) -> dict[str, Any]:
        """Which candidate is served, and the recent accuracy of each."""
        served, accuracies = loop.learner.candidates[loop.learner.served], loop.election.accuracies()
        for name, accuracy in accuracies.items():
            self._metrics.candidate(name, served=name == served, accuracy=accuracy)
        return {"bank": {"served": served, "accuracy": accuracies}}

    def _log_window(self, loop: TrainingLoop, report: Mapping[str, Any]) -> None:
        """Log the scores once per window of labels."""
        labels = loop.board.prequential.scored
        windows = labels // loop.board.window
        if windows <= self._windows_logged:
            return
        self._windows_logged = windows
        now, at_label, traffic = report["at_arrival"]["windowed"], report["at_label"], report["traffic"]
        _log.info(
            "scores",
            step=loop.learner.step,
            labels=labels,
            **{f"accuracy_{network}": now["accuracy"][network] for network in NETWORKS},
            **{score: now[score] for score in SCORES},
            accuracy_at_label=at_label["teacher"],
            ssl_gain=at_label["gain"],
            ssl_gain_interval=at_label["interval"],
            delay_s=traffic["delay_s"],
            labelled_share=traffic["labelled_share"]["windowed"],
            confidence_gap=traffic["confidence_gap"],
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


def _accuracies(
    scores: Prequential, export: Callable[[str, str, float | None], None]
) -> dict[str, dict[str, float | None]]:
    """Accuracy by network and window; each is exported."""
    found: dict[str, dict[str, float | None]] = {}
    for network in NETWORKS:
        found[network] = {window: getattr(scores, window)(network) for window in WINDOWS}
        for window, ratio in found[network].items():
            export(network, window, ratio)
    return found


def _events(guarding: Mapping[str, Any]) -> dict[str, int]:
    """Actions of the guard and alarms of the drift monitor, since the state folder was created."""
    actions = {action: guarding["guard"]["actions"][action] for action in GUARD_ACTIONS}
    return actions | {source: drift["alarms"] for source, drift in guarding["drift"].items()}
