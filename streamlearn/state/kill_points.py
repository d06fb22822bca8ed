"""Named points in the learner, around each durable operation, at which a fault harness can kill the process.

A point costs one comparison unless one is armed by the environment variable `STREAMLEARN_CRASH_AT`.
`STREAMLEARN_CRASH_AT=checkpoint.renamed:3` sends SIGKILL at the third pass; with `:3:stop` it sends
SIGSTOP. No setting arms a point. An unknown name stops the process, so that a misspelt point does not pass a test.

A file that is replaced as a whole has four points: `begin`, `written` (temporary file, synced), `renamed` (folder not
yet synced), `end`. The flush of the ledger has one, `ledger-flush.begin`; the next is `teacher.begin` or
`checkpoint.begin`.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Mapping

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
"""Every point, in the order in which a learner first passes them."""


_SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}


class _Armed:
    """Counts down the passes of one point, in any thread, and then sends a signal to this process."""

    def __init__(self, point: str, nth: int, sent: signal.Signals) -> None:
        if point not in POINTS or nth < 1:
            raise ValueError(f"{VARIABLE}: no pass {nth} of a point {point!r}; points are {', '.join(POINTS)}")
        self._point, self._left, self._sent = point, nth, sent
        self._counting = threading.Lock()

    def passed(self, point: str) -> None:
        if point != self._point:
            return
        with self._counting:
            self._left -= 1
            due = self._left == 0
        if due:
            os.kill(os.getpid(), self._sent)


_armed: _Armed | None = None


def reached(operation: str, place: str) -> None:
    """The process passes this point."""
    if _armed is not None:
        _armed.passed(f"{operation}.{place}")


def arm_from(environ: Mapping[str, str]) -> None:
    """Arm the point that the environment variable names; without it no point is armed.

    Raises:
        ValueError: the variable cannot be parsed, or there is no such point.
    """
    global _armed  # noqa: PLW0603  one point per process, so that it need not be passed through every part
    _armed = None
    if (value := environ.get(VARIABLE)) is not None:
        point, nth, act, *_ = [*value.split(":"), "", ""]
        if act and act not in _SIGNALS:
            raise ValueError(f"{VARIABLE}={value}: the action must be one of {', '.join(_SIGNALS)}")
        _armed = _Armed(point, int(nth or 1), _SIGNALS[act or "kill"])


arm_from(os.environ)
