"""How processes of the daemon end: on a signal, with their parent, and when a thread fails."""

from __future__ import annotations

import _thread
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import structlog

THREAD_DIED = 70
"""Exit code after an unhandled error in any thread."""


@contextmanager
def stop_signals(*, insist: bool = True) -> Iterator[threading.Event]:
    """SIGTERM and SIGINT set the event. A second signal exits immediately; the last checkpoint stands.

    Without `insist` a second signal has no effect: there is something that must be stopped first.

    The event is set by another thread. A handler runs in the main thread, which may be in `Event.wait` at that moment
    and hold the event's lock: there `set` would wait for itself.
    """
    stopping = threading.Event()
    asked = False

    def stop(number: int, _: FrameType | None) -> None:
        nonlocal asked
        if asked and insist:
            os._exit(128 + number)
        asked = True
        _thread.start_new_thread(stopping.set, ())  # `Thread.start` has locks that the main thread may hold too

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stopping
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def exit_with_parent(parent: int) -> None:
    """Ask the kernel for SIGTERM when the parent dies (Linux), so that no orphan keeps the port and the lock."""
    if sys.platform != "linux":
        return
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)
    if os.getppid() != parent:  # the parent died before the request
        os.kill(os.getpid(), signal.SIGTERM)


def exit_on_thread_error() -> None:
    """Exit the process when an error ends any thread: a daemon with a dead thread must not look healthy."""

    def report(args: threading.ExceptHookArgs) -> None:
        error = (args.exc_type, args.exc_value, args.exc_traceback)
        name = args.thread.name if args.thread else "?"
        structlog.get_logger(__name__).critical("thread_died", thread=name, exc_info=error)
        os._exit(THREAD_DIED)

    threading.excepthook = report
