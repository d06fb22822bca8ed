"""What the loop reports of each step, and the base class of those that observe it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from streamlearn.ledger import Arrival
from streamlearn.loop.accounts import Accounts
from streamlearn.records import BadRecord
from streamlearn.state.checkpoint import Saved


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """What became of the records of one step, and where its time went."""

    step: int
    counts: Accounts
    """Its records by outcome."""
    bad: Sequence[BadRecord] = ()
    arrivals: Sequence[Arrival] = ()
    phases_s: Mapping[str, float]


class Observer:
    """Called by the loop, in its thread but for `saved`. This one does nothing."""

    def step_done(self, report: StepReport) -> None:
        """A step is finished."""

    def turn_done(self) -> None:
        """The loop has made a turn, with a step or without."""

    def phase_done(self, phase: str, duration_s: float) -> None:
        """The loop has spent time outside of steps: wait, publish, save."""

    def published(self, step: int) -> None:
        """Servers can load the teacher of this step."""

    def saved(self, saved: Saved) -> None:
        """A checkpoint is durable. Called in the saver's thread."""


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
