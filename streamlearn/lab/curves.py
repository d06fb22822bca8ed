"""The curves of an evaluation: one point for every window of predicted samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from streamlearn.errors import StreamlearnError
from streamlearn.loop.loop import TrainingLoop
from streamlearn.loop.report import StepReport


@dataclass(frozen=True, kw_only=True, slots=True)
class CurvePoint:
    """Scores at the end of a step; None where a score is not defined.

    `oracle*` are over the last `window` samples, `observed*` over the last `window` labels, which may reach far back
    into the stream. `observed_since` is over the labels since the previous point only; there are `scored_since` of
    them.
    """

    samples: int
    labels: int
    step: int
    labelled_share: float
    oracle: float | None
    oracle_student: float | None
    oracle_twin: float | None
    oracle_cumulative: float | None
    oracle_twin_cumulative: float | None
    oracle_log_loss: float | None
    oracle_ece: float | None
    observed: float | None
    observed_student: float | None
    observed_since: float | None
    scored_since: int
    observed_cumulative: float | None
    observed_log_loss: float | None
    observed_ece: float | None
    majority: float | None
    no_change: float | None
    at_label_teacher: float | None
    at_label_twin: float | None
    ssl_gain: float | None
    ssl_gain_low: float | None
    ssl_gain_high: float | None


@dataclass(slots=True)
class _Since:
    """Counts since the previous point."""

    samples: int = 0
    labels: int = 0
    scored: int = 0
    right: int = 0

    def count(self, report: StepReport) -> None:
        self.samples += report.counts.samples_learned
        self.labels += report.counts.labels_read
        for arrival in report.arrivals:
            if (scored := arrival.scored) is not None:
                self.scored += 1
                self.right += scored.prediction.class_index == scored.class_index


class Recorder:
    """Called after each step; adds a point to `curves` whenever another window of samples has been predicted."""

    def __init__(self, window: int, progress: Callable[[int], None]) -> None:
        self.curves: list[CurvePoint] = []
        self._window, self._progress = window, progress
        self._loop: TrainingLoop | None = None
        self._since, self._full = _Since(), False

    def __call__(self, loop: TrainingLoop, report: StepReport) -> None:
        """Record one step."""
        self._loop = loop
        samples = loop.accounts.samples_learned
        if self._full and report.counts.samples_learned:
            self._since, self._full = _Since(), False
        self._since.count(report)
        if self._full:  # labels alone belong to the point of the samples before them
            if report.counts.labels_read:
                self.curves.pop()
                self._add(loop)
        elif samples // self._window > (samples - report.counts.samples_learned) // self._window:
            self._add(loop)
            self._full = True
        if report.counts.samples_learned:
            self._progress(samples)

    def finish(self) -> TrainingLoop:
        """Add the last point, and return the final loop.

        Raises:
            StreamlearnError: there was no step.
        """
        if self._loop is None:
            msg = "stopped before the first step: there are no scores"
            raise StreamlearnError(msg)
        if not self._full and self._since.samples:
            self._add(self._loop)
            self._full = True
        return self._loop

    def _add(self, loop: TrainingLoop) -> None:
        since, report = self._since, loop.board.report()
        oracle, observed, at_label = report.oracle, report.at_arrival, report.at_label
        assert oracle is not None, "every sample of the stream has its true label"
        now, seen, twin = oracle.windowed, observed.windowed, oracle.twin
        low, high = at_label.interval or (None, None)
        self.curves.append(
            CurvePoint(
                samples=loop.accounts.samples_learned,
                labels=loop.accounts.labels_read,
                step=loop.learner.step,
                labelled_share=since.labels / since.samples,
                oracle=now.accuracy["teacher"],
                oracle_student=now.accuracy["student"],
                oracle_twin=None if twin is None else twin.twin,
                oracle_cumulative=oracle.cumulative.accuracy["teacher"],
                oracle_twin_cumulative=None if twin is None else twin.cumulative.twin,
                oracle_log_loss=now.log_loss,
                oracle_ece=now.ece,
                observed=seen.accuracy["teacher"],
                observed_student=seen.accuracy["student"],
                observed_since=since.right / since.scored if since.scored else None,
                scored_since=since.scored,
                observed_cumulative=observed.cumulative.accuracy["teacher"],
                observed_log_loss=seen.log_loss,
                observed_ece=seen.ece,
                majority=seen.accuracy["majority"],
                no_change=seen.accuracy["no_change"],
                at_label_teacher=at_label.teacher,
                at_label_twin=at_label.twin,
                ssl_gain=at_label.gain,
                ssl_gain_low=low,
                ssl_gain_high=high,
            )
        )
