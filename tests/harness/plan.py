"""Which faults strike whom, and when: drawn from a seed, endless. Pure; `soak` and `startups` carry them out."""

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
"""Of what happens while the learner is dead, what is no damage: retention takes the log past its checkpoint."""
ONCE = ("epoch", "restore", "journal-cut", "replay", "dead-letters")
"""Operations that a life passes once, or that are rare: only the first pass is waited for."""
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
"""Places that a learner passes right after it flushed its ledger."""
REWOUND = ("restore.end", "journal-cut.begin", "journal-cut.end", "replay.begin", "replay.end")
"""Places that it passes at its start, when it has rewound its ledger and not flushed it again."""
STARTING = (
    *REWOUND,
    "epoch.written",
    "ledger-flush.begin",
    "restore.begin",
    "journal-append.begin",
    "journal-sync.end",
)
"""All that it passes at its start."""


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong."""

    victim: Victim
    how: How
    """SIGKILL at some time, SIGKILL at a named place, SIGTERM, or SIGSTOP and SIGCONT later.

    A producer may hold its labels back, and send them in another order when it is over; the disk may be full.
    """
    after_s: float = 0.0
    """After the learner's first step in this life, or, where `early`, after its start."""
    early: bool = False
    for_s: float = 0.0
    point: str = ""
    nth: int = 1
    damage: str | None = None
    """To the state folder, or `TRIM`, while the learner is dead."""


def draw_faults(seed: int, *, broker: bool = False, disk: bool = False) -> Iterator[Fault]:
    """Faults for ever. Named places come in a shuffled round, so that each is met before any is met twice.

    `broker`: there is one to kill, and its log is not ours to trim. `disk`: there is one that can be filled.
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
    """A process that is started as a user starts it, and killed soon after."""

    command: Command
    phase: Phase
    """Killed while it imports, at a named place, or after its first step (of a server: its first answer)."""
    after_s: float
    """Since the start of the process, or since that step. At a place, how long it may take to get there."""
    point: str = ""
    with_children: bool = False
    """A supervisor's learner and servers are killed at the same moment."""


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
    """Bursts for ever: in turn of the learner alone, of all commands, of the supervisor alone.

    Every other start lives until it has flushed what it learned, so that the next has something to rewind and replay.
    The first learner of a burst dies right after its first flush, the second right after it has rewound that: the free
    pages of the store are few then, so new ones are taken at the end of the file.
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
