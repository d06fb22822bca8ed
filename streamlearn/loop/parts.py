"""What the loop moves, and what it asks of the world: protocols stand with who uses them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from streamlearn.judge.election import Election
from streamlearn.judge.scoreboard import Scoreboard
from streamlearn.learn.batching import MicroBatcher, Queues
from streamlearn.learn.learner import Learner
from streamlearn.learn.recent import RecentSamples
from streamlearn.ledger import Arrival
from streamlearn.ledger.ledger import Ledger
from streamlearn.ledger.replay_buffer import ReplayBuffer
from streamlearn.loop.accounts import Accounts
from streamlearn.loop.guarding import Guarding
from streamlearn.records import Array, BadRecord, Gap, Offsets, Position, Probabilities, Schema, TopicPartition


class Source(Protocol):
    """What was read ahead, by partition."""

    @property
    def queues(self) -> Queues:
        """Records read and not yet in a step, oldest first."""
        ...

    def behind(self, partition: TopicPartition) -> bool:
        """The log holds more of this partition than was read so far."""
        ...

    def lag(self) -> Offsets:
        """Records of each partition that are in the log and not yet in a step."""
        ...

    def wait(self, timeout_s: float) -> None:
        """Wait for more, at most so long."""
        ...


class Journal(Protocol):
    """Remembers which records formed which step."""

    def append(self, step: int, next_offsets: Offsets) -> None:
        """Write one step down."""
        ...

    def sync(self) -> None:
        """Make what was written durable."""
        ...

    def keep_after(self, step: int) -> None:
        """Keep all steps after this one, that of the oldest kept checkpoint; earlier ones may be removed."""
        ...

    @property
    def load(self) -> float:
        """Bytes of steps that the oldest kept checkpoint needs, as a share of the bound."""
        ...


class Checkpoints(Protocol):
    """Saves in the background."""

    @property
    def busy(self) -> bool:
        """A save is under way."""
        ...

    def save(self, step: int, next_offsets: Offsets, arrays: Mapping[str, Array], extra: Mapping[str, Any]) -> bool:
        """Begin to save; False while a save is under way."""
        ...

    def oldest_step(self) -> int:
        """The step of the oldest checkpoint that a restart may fall back to; 0 where there is none."""
        ...


class Teachers(Protocol):
    """Shows a teacher to the servers."""

    def publish(self, step: int, arrays: Mapping[str, Array], told: Mapping[str, Any]) -> None:
        """Publish the teacher of a step, with what else is to be told of it (JSON values)."""
        ...


class Wanted(Protocol):
    """Keeps the samples whose labels would help most, for whoever labels. It changes nothing of what is learned."""

    def offer(
        self,
        ids: Sequence[str],
        positions: Sequence[Position],
        teacher_probs_BC: Probabilities,
        student_probs_BC: Probabilities,
        now_s: float,
    ) -> None:
        """Fresh samples without a label, and what both networks said of them."""
        ...

    def labelled(self, ids: Sequence[str]) -> None:
        """These need no label any more."""
        ...

    def flush(self) -> None:
        """Show what is wanted now."""
        ...


DeadLetters = Callable[[Sequence[BadRecord]], None]
"""Makes bad records durable elsewhere; raises when it cannot, and then the learner stops rather than lose them."""


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one step did, for whoever watches."""

    step: int
    samples: int
    labels: int
    fresh: int
    labelled: int
    bad: Sequence[BadRecord]
    gaps: Sequence[Gap]
    duplicates: int
    arrivals: Sequence[Arrival]
    phases_s: Mapping[str, float]
    thinned: int = 0
    """Samples that were passed by under overload."""


class Watcher(Protocol):
    """Sees each step; metrics and the heartbeat hang here."""

    def step_done(self, report: StepReport) -> None:
        """After step t."""
        ...

    def came_round(self) -> None:
        """The loop is alive, with records or without."""
        ...

    def spent(self, phase: str, duration_s: float) -> None:
        """Time of the loop that belongs to no step: wait, publish, save."""
        ...


@dataclass(frozen=True)
class Cadence:
    """How batches are cut, and how often state is shown and saved."""

    fresh: int
    labelled: int
    max_age_s: float
    publish_every_s: float
    checkpoint_every_s: float
    checkpoint_every_steps: int
    steps: int = 1
    """Of each micro-batch, at most: those after the first have no records, and make no micro-batch wait."""
    idle_steps: int = 0
    """And so many more at most, while nothing else is to be done."""
    thin_above: int | None = None
    """Samples that wait in the log, above which some are passed by; None: none ever are."""


@dataclass
class Parts:
    """Everything the loop moves."""

    schema: Schema
    source: Source
    batcher: MicroBatcher
    learner: Learner
    ledger: Ledger
    memory: ReplayBuffer
    board: Scoreboard
    guarding: Guarding
    journal: Journal
    checkpoints: Checkpoints
    teachers: Teachers
    dead_letters: DeadLetters
    watcher: Watcher
    wanted: Wanted | None = None
    recent: RecentSamples | None = None
    """What steps without records learn from once more, where there may be any."""
    election: Election | None = None
    """Says which candidate is served; None: always the teacher."""
    oracle_asks_twin: bool = False
    """Where a simulation tells the truth on arrival, the twin answers too: one more forward pass of fresh rows."""
    accounts: Accounts = field(default_factory=Accounts)
