"""Draws the faults of a soak from a seed: which process, which fault, when. Pure; `soak` and `startups` inject them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import Literal

from harness.damage import KINDS
from streamlearn.state.kill_points import POINTS

Victim = Literal["learner", "server", "producer", "broker", "disk"]
How = Literal["kill", "point", "term", "stop", "hold", "fill"]
TRIM = "log-trim"
"""Retention trims the log past the checkpoint while the learner is dead. Not damage: files stay valid."""
ONCE = ("epoch", "restore", "journal-cut", "replay", "dead-letters")
"""Operations that run once per process, or rarely: a fault waits for their first pass only."""
MOST_PASSES = 4
EARLY_SHARE = 0.3
DAMAGED_SHARE = 0.25
Command = Literal["learn", "serve", "run"]
Phase = Literal["import", "point", "steps"]
PHASES: tuple[Phase, ...] = ("import", "point", "steps")
BURST = 10
SAVE_OFTEN_S, SAVE_SELDOM_S = 0.5, 3600.0
"""Time between checkpoints in every other burst, and in the others: there mostly none is saved."""
FLUSHED = ("teacher.begin", "teacher.end")
"""Kill points right after a flush of the store: its transaction is committed to the write-ahead log."""
REWOUND = ("restore.end", "journal-cut.begin", "journal-cut.end", "replay.begin", "replay.end")
"""Kill points between the rewind of the store and the next flush: the rewind is not committed yet."""
STARTING = (
    *REWOUND,
    "epoch.written",
    "ledger-flush.begin",
    "restore.begin",
    "journal-append.begin",
    "journal-sync.end",
)
"""All kill points on the way from the start to the first step."""


@dataclass(frozen=True)
class Fault:
    """One fault to inject."""

    victim: Victim
    how: How
    """`kill`: SIGKILL at a random time. `point`: SIGKILL at a kill point. `term`: SIGTERM. `stop`: SIGSTOP, SIGCONT.

    `hold`: the producer holds its labels back, then sends them in another order. `fill`: the disk is full.
    """
    after_s: float = 0.0
    """Seconds after the learner's first step since its start; with `early`, after the start itself."""
    early: bool = False
    for_s: float = 0.0
    point: str = ""
    nth: int = 1
    damage: str | None = None
    """Damage to the state folder, or `TRIM`, while the learner is dead."""


def draw_faults(seed: int, *, broker: bool = False, disk: bool = False) -> Iterator[Fault]:
    """Draw faults endlessly. Kill points come in shuffled rounds: each one occurs before any occurs twice.

    `broker`: a broker can be killed, and its log cannot be trimmed. `disk`: a small disk can be filled.
    """
    draw = Random(f"faults/{seed}")
    points, damages = _rounds(POINTS, draw), _rounds(KINDS if broker else (*KINDS, TRIM), draw)
    choices: list[tuple[Victim, How]] = [
        ("learner", "point"),
        ("learner", "kill"),
        ("server", "kill"),
        ("producer", "kill"),
        ("learner", "term"),
        ("learner", "stop"),
        ("server", "stop"),
        ("producer", "stop"),
        ("producer", "hold"),
        ("broker", "kill"),
        ("disk", "fill"),
    ]
    weights = [50, 25, 8, 6, 3, 3, 3, 2, 4, 60 if broker else 0, 5 if disk else 0]
    while True:
        ((victim, how),) = draw.choices(choices, weights)
        point = next(points) if how == "point" else ""
        rare = point.partition(".")[0] in ONCE
        dies = victim == "learner" and how in ("kill", "point")
        yield Fault(
            victim,
            how,
            after_s=draw.uniform(0.0, 0.5),
            early=draw.random() < EARLY_SHARE,
            for_s=draw.uniform(0.2, 1.5) if how in ("stop", "hold", "fill") else 0.0,
            point=point,
            nth=1 if rare else draw.randint(1, MOST_PASSES),
            damage=next(damages) if dies and draw.random() < DAMAGED_SHARE else None,
        )


@dataclass(frozen=True)
class Start:
    """A process that is started with the real command line and killed soon after."""

    command: Command
    phase: Phase
    """Killed during imports, at a kill point, or after its first step (a server: after its first answer)."""
    after_s: float
    """`import`: seconds after the start. `steps`: seconds after the first step. `point`: timeout for reaching it."""
    point: str = ""
    with_children: bool = False
    """Kill the supervisor's learner and servers at the same moment."""


@dataclass(frozen=True)
class Burst:
    """Starts on one state folder, one after another."""

    starts: tuple[Start, ...]
    checkpoint_every_s: float


_COMMANDS: dict[str, tuple[Command, ...]] = {
    "learner": ("learn",),
    "mixed": ("learn", "run", "serve", "serve"),
    "supervisor": ("run",),
}


def draw_bursts(seed: int) -> Iterator[Burst]:
    """Draw bursts endlessly, in turn: learners only, all commands, supervisors only.

    Every other process lives until it has flushed, so that the next one has steps to rewind and to replay. In a
    burst of learners the first two deaths are fixed, for the recovery of the SQLite store in WAL mode:

        first   right after a flush: its transaction is in the write-ahead log only
        second  after the rewind, before the next flush: SQLite discards the rewind, and the third start repeats it

    No process closes the store, so the write-ahead log grows over the burst until SQLite copies it into the file
    (its checkpoint, `ledger.store.WAL_PAGES`).
    """
    draw = Random(f"bursts/{seed}")
    flushed, rewound, starting = (_rounds(points, draw) for points in (FLUSHED, REWOUND, STARTING))
    for number, kind in enumerate(itertools.cycle(_COMMANDS)):
        starts = []
        for index in range(BURST):
            command = draw.choice(_COMMANDS[kind])
            works = index % 2 == 0
            (phase,) = draw.choices(PHASES, (0 if works else 4, 5 if command == "learn" else 0, 3))
            if index < 2 and command == "learn":
                phase = "point"
            after_s = {"import": draw.uniform(0.0, 4.0), "point": 10.0, "steps": draw.uniform(0.0, 1.0) + works}[phase]
            points = flushed if works else rewound if index == 1 else starting
            point = next(points) if phase == "point" else ""
            starts.append(Start(command, phase, after_s, point, with_children=draw.random() < 0.5))
        yield Burst(tuple(starts), checkpoint_every_s=SAVE_OFTEN_S if number % 2 else SAVE_SELDOM_S)


def _rounds(names: tuple[str, ...], draw: Random) -> Iterator[str]:
    while True:
        yield from draw.sample(names, len(names))
