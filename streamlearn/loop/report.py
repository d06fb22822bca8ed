"""What the loop reports of each step, and the base class of those that observe it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from streamlearn.ledger import Arrival
from streamlearn.records import BadRecord, Gap, Skipped


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """The records of one step, by outcome, and where its time went."""

    step: int
    samples: int
    """Sample records, bad and skipped ones included."""
    labels: int
    """Label records, bad and skipped ones included."""
    fresh: int
    """Samples predicted and learned."""
    shed: int = 0
    """Samples skipped under overload."""
    duplicates: int = 0
    """Samples whose id was known."""
    inline_labels: int = 0
    """Labels inside sample records."""
    labelled: int = 0
    """Labelled rows of the micro-batch."""
    bad: Sequence[BadRecord] = ()
    skipped: Sequence[Skipped] = ()
    gaps: Sequence[Gap] = ()
    arrivals: Sequence[Arrival] = ()
    phases_s: Mapping[str, float]


class Observer:
    """Called by the loop, in its thread. This one does nothing."""

    def step_done(self, report: StepReport) -> None:
        """A step is finished."""

    def turn_done(self) -> None:
        """The loop has made a turn, with a step or without."""

    def phase_done(self, phase: str, duration_s: float) -> None:
        """The loop has spent time outside of steps: wait, publish, save."""

    def published(self, step: int) -> None:
        """Servers can load the teacher of this step."""


class Phases:
    """Durations of the phases of one step."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock, self._since_s = clock, clock()
        self.spent_s: dict[str, float] = {}

    def end(self, phase: str) -> None:
        """Add the time since the last end to a phase."""
        now_s = self._clock()
        self.spent_s[phase] = self.spent_s.get(phase, 0.0) + now_s - self._since_s
        self._since_s = now_s
