"""Requests that wait for a condition: bounded in number and time, without a thread each."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from streamlearn.metrics import ServerMetrics
from streamlearn.serve.failures import overloaded

POLL_S = 0.05
"""Interval of the checks. The condition changes in another process, which cannot notify us."""


class Waiters:
    """Requests that wait for one kind of condition. Used from one event loop."""

    def __init__(self, metrics: ServerMetrics, what: str, *, most: int) -> None:
        """At most `most` requests wait at once; `what` names the condition in the 429 of further ones."""
        self._metrics, self._what, self._most = metrics, what, most
        self._waiting = 0

    async def until(self, is_true: Callable[[], bool], timeout_s: float) -> bool:
        """Whether the condition becomes true in time. One that is true already never gets 429.

        Raises:
            RequestError: 429, it is not true yet and too many requests wait.
        """
        if is_true():
            return True
        if self._waiting >= self._most:
            self._metrics.rejected("queue_full")
            raise overloaded(f"{self._waiting} requests already wait for {self._what}")
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + timeout_s
        self._waiting += 1
        try:
            while (left_s := deadline_s - loop.time()) > 0.0:
                await asyncio.sleep(min(POLL_S, left_s))
                if is_true():
                    return True
            return False
        finally:
            self._waiting -= 1
