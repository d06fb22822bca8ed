"""Named places in the learner where a fault harness can have the process killed: around each durable operation.

Off, a place costs one comparison. On, it is the harness of `streamlearn.testing` that set it: by the environment
variable `STREAMLEARN_CRASH_AT=checkpoint.renamed:3` (SIGKILL at the third pass; with `:3:stop` SIGSTOP, to be continued
whenever the harness likes) or by `arm`, in the same process. No setting reaches it, and a name that is not in `POINTS`
stops the process, so that no test passes by a spelling mistake.

What is written whole has four places: `begin`, `written` (aside, and synced), `renamed` (the folder not yet synced),
`end`. The ledger's flush begins at `ledger-flush.begin`; the next place after it is `teacher.begin`, or
`checkpoint.begin`.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Mapping

VARIABLE = "STREAMLEARN_CRASH_AT"
_WHOLE = ("begin", "written", "renamed", "end")
_AROUND = ("begin", "end")
_OPERATIONS: Mapping[str, tuple[str, ...]] = {
    "epoch": _WHOLE,
    "ledger-flush": ("begin",),
    "restore": _AROUND,
    "journal-cut": _AROUND,
    "replay": _AROUND,
    "dead-letters": _AROUND,
    "journal-append": _AROUND,
    "journal-sync": _AROUND,
    "teacher": _WHOLE,
    "pointer": _WHOLE,
    "teacher-prune": _AROUND,
    "checkpoint": _WHOLE,
    "checkpoint-prune": _AROUND,
    "offsets-commit": _AROUND,
}
POINTS = tuple(f"{operation}.{place}" for operation, places in _OPERATIONS.items() for place in places)
"""Every place, in the order in which a life meets them first."""


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


_ACTS = {"kill": _kill, "stop": _stop}


class _Armed:
    """Counts down the passes of one place. Several threads pass here."""

    def __init__(self, point: str, nth: int, act: Callable[[], None]) -> None:
        if point not in POINTS or nth < 1:
            msg = f"{VARIABLE}: no pass {nth} of a place {point!r}; places are {', '.join(POINTS)}"
            raise ValueError(msg)
        self._point, self._left, self._act = point, nth, act
        self._counting = threading.Lock()

    def passed(self, point: str) -> None:
        if point != self._point:
            return
        with self._counting:
            self._left -= 1
            due = self._left == 0
        if due:
            self._act()


_armed: _Armed | None = None


def reached(operation: str, place: str) -> None:
    """The process is at this place now."""
    if _armed is not None:
        _armed.passed(f"{operation}.{place}")


def arm(point: str, nth: int = 1, act: Callable[[], None] = _kill) -> None:
    """Call `act` at the n-th pass of a place from now on; by default, SIGKILL to this process.

    Raises:
        ValueError: there is no such place.
    """
    global _armed  # noqa: PLW0603  one place a process, and nothing to carry it through every part
    _armed = _Armed(point, nth, act)


def disarm() -> None:
    """Pass every place."""
    global _armed  # noqa: PLW0603
    _armed = None


def arm_from(environ: Mapping[str, str]) -> None:
    """Do as the environment variable says.

    Raises:
        ValueError: it is not understood.
    """
    if (told := environ.get(VARIABLE)) is not None:
        point, nth, act, *_ = [*told.split(":"), "", ""]
        if act and act not in _ACTS:
            msg = f"{VARIABLE}={told}: nothing is known to do but {', '.join(_ACTS)}"
            raise ValueError(msg)
        arm(point, int(nth or 1), _ACTS[act or "kill"])


arm_from(os.environ)
