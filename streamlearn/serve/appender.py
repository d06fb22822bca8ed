"""The way into the log from async code: a few threads that wait for durability, behind a bounded queue.

Nothing is acknowledged here before the log says that it is durable (I2).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from streamlearn.errors import LogUnavailableError
from streamlearn.log.base import Appends
from streamlearn.metrics import ServerMetrics
from streamlearn.records import NewRecord, Position
from streamlearn.serve.failures import overloaded

WORKERS = 8
"""Appends in flight at once: a log groups what several threads append in one moment into one sync."""


class Appender:
    """Appends records and returns their positions once durable. Used from one event loop."""

    def __init__(
        self,
        log: Appends,
        metrics: ServerMetrics,
        *,
        queue: int,
        timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`queue` bounds the appends in flight and waiting; `timeout_s` bounds each, its wait included."""
        self._log, self._metrics, self._clock = log, metrics, clock
        self._max_pending, self._timeout_s = queue, timeout_s
        self.pending = 0
        """Appends in flight and waiting."""
        self._executor = ThreadPoolExecutor(WORKERS, thread_name_prefix="inlet")

    async def append(self, role: str, topic: str, records: Sequence[NewRecord]) -> list[Position]:
        """Append records to a topic, whose role is "samples" or "labels".

        Raises:
            RequestError: 429 where too many appends wait.
            LogUnavailableError: not acknowledged in time; some may be in the log all the same.
            LogError: refused for good.
        """
        if self.pending >= self._max_pending:
            self._metrics.rejected("queue_full")
            raise overloaded(f"{self.pending} requests already wait for the log")
        deadline_s = self._clock() + self._timeout_s
        self.pending += 1
        # Not cancelled with the request: a record on its way is better finished and counted than half known.
        running = asyncio.get_running_loop().run_in_executor(self._executor, self._append, topic, records, deadline_s)
        running.add_done_callback(self._finished)
        try:
            # The bound holds whatever the log's client does with its own timeout.
            positions = await asyncio.wait_for(asyncio.shield(running), self._timeout_s)
        except TimeoutError as error:
            self._metrics.rejected("log_unavailable")
            msg = f"{topic}: not acknowledged within {self._timeout_s:g} s"
            raise LogUnavailableError(msg) from error
        except LogUnavailableError:
            self._metrics.rejected("log_unavailable")
            raise
        self._metrics.appended(role, len(positions))
        return positions

    def _append(self, topic: str, records: Sequence[NewRecord], deadline_s: float) -> list[Position]:
        left_s = deadline_s - self._clock()
        if left_s <= 0.0:
            msg = f"{topic}: nothing was appended, {self._timeout_s:g} s passed in the queue"
            raise LogUnavailableError(msg)
        return self._log.append(topic, records, timeout_s=left_s)

    def _finished(self, running: asyncio.Future[list[Position]]) -> None:
        self.pending -= 1
        if not running.cancelled():
            running.exception()  # seen, also where the request that asked is gone

    def close(self) -> None:
        """Finish what is in flight; take no more."""
        self._executor.shutdown(wait=True)
