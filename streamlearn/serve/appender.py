"""Appends records of requests to the log: a bounded queue with one writer thread.

Group commit: the writer appends all that waits in one call per topic. A request is acknowledged only after the log has
acknowledged its records (I2).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from streamlearn.errors import LogError, LogUnavailableError
from streamlearn.log.base import Appends
from streamlearn.metrics import ServerMetrics
from streamlearn.records import NewRecord, Position
from streamlearn.serve.failures import overloaded
from streamlearn.serve.worker import Worker, resolve

QUEUE_RECORDS = 16_384
"""Records that wait or are being written; further requests get 429. A request that comes alone always fits."""
QUEUE_BYTES = 64 << 20
"""Bytes of keys, values and headers of these records."""

GATHER_S = 0.002
"""Longest wait for as many requests as the last call had: their clients may be about to send the next ones. Without it
a closed loop of clients splits into two halves that wait for each other."""

Result = list[Position] | Exception


@dataclass(slots=True, eq=False)
class _Request:
    topic: str
    records: Sequence[NewRecord]
    size_bytes: int
    deadline_s: float
    """On the appender's clock. The records are not written after it."""
    future: asyncio.Future[list[Position]]
    """Done early where the request timed out or its client left. The records are then written all the same."""


class Appender(Worker[_Request]):
    """Appends records, and returns their positions once durable. `append` is called from one event loop."""

    def __init__(
        self,
        open_log: Callable[[], Appends],
        metrics: ServerMetrics,
        *,
        timeout_s: float,
        max_records: int = QUEUE_RECORDS,
        max_bytes: int = QUEUE_BYTES,
        gather_s: float = GATHER_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`open_log` is called until it succeeds; its caller closes the log. `timeout_s` bounds each append."""
        super().__init__("appender")
        self._open_log, self._metrics, self._clock = open_log, metrics, clock
        self._timeout_s, self._gather_s = timeout_s, gather_s
        self._max_records, self._max_bytes = max_records, max_bytes
        self._log: Appends | None = None
        self._records = self._bytes = 0
        self._taken = 1
        """Requests of the last group."""

    @property
    def pending_records(self) -> int:
        """Records that wait or are being written."""
        return self._records

    def open(self) -> Appends:
        """The log, opened at the first call that can. Called by the writer thread, or before it starts.

        Raises:
            LogUnavailableError: the log cannot be opened now.
            ConfigError: its topics do not match the config.
        """
        if self._log is None:
            try:
                self._log = self._open_log()
            except LogError as error:
                raise LogUnavailableError(str(error)) from error
        return self._log

    async def append(self, role: str, topic: str, records: Sequence[NewRecord]) -> list[Position]:
        """Append records to a topic; `role`, "samples" or "labels", names the topic in metrics.

        Raises:
            RequestError: 429, too many records wait; 503, the server is stopping.
            LogUnavailableError: not acknowledged in time; some records may be in the log all the same.
            LogError: the log refused a record for good.
        """
        future: asyncio.Future[list[Position]] = asyncio.get_running_loop().create_future()
        size_bytes = sum(record.size_bytes for record in records)
        self._put(_Request(topic, records, size_bytes, self._clock() + self._timeout_s, future))
        try:
            # This bound holds even if the log's client exceeds its own timeout.
            async with asyncio.timeout(self._timeout_s):
                positions = await future
        except (TimeoutError, LogUnavailableError) as error:
            self._metrics.rejected("log_unavailable")
            if isinstance(error, LogUnavailableError):
                raise
            msg = f"{topic}: not acknowledged within {self._timeout_s:g} s"
            raise LogUnavailableError(msg) from error
        self._metrics.appended(role, len(positions))
        return positions

    def _admit(self, request: _Request) -> None:
        records, size_bytes = self._records + len(request.records), self._bytes + request.size_bytes
        if self._records and (records > self._max_records or size_bytes > self._max_bytes):
            self._metrics.rejected("queue_full")
            raise overloaded(f"{self._records} records already wait for the log")
        self._records, self._bytes = records, size_bytes

    # The writer thread

    def _take(self) -> list[_Request]:
        """All that wait, after a short wait for as many as the last time."""
        self._changed.wait_for(lambda: len(self._queue) >= self._taken or self._stopping, self._gather_s)
        requests = list(self._queue)
        self._queue.clear()
        self._taken = len(requests)
        return requests

    def _answer(self, group: list[_Request]) -> None:
        for topic in dict.fromkeys(request.topic for request in group):
            self._write(topic, [request for request in group if request.topic == topic])

    def _write(self, topic: str, requests: list[_Request]) -> None:
        """Append the records of all requests to their topic in one call, and answer each request."""
        now_s = self._clock()
        late = LogUnavailableError(f"{topic}: nothing was appended, {self._timeout_s:g} s passed in the queue")
        results: list[tuple[_Request, Result]] = [(one, late) for one in requests if one.deadline_s <= now_s]
        if group := [one for one in requests if one.deadline_s > now_s]:
            results += zip(group, self._append(group, now_s), strict=True)
        with self._changed:
            self._records -= sum(len(request.records) for request in requests)
            self._bytes -= sum(request.size_bytes for request in requests)
        resolve([(request.future, result) for request, result in results])

    def _append(self, group: list[_Request], now_s: float) -> list[Result]:
        """One result per request. If the log refuses the group, each request is tried alone while it has time left.

        Not if the log was unavailable: the records may be in the log, and must not be appended twice.
        """
        records = [record for request in group for record in request.records]
        # The longest time left: a short one would fail the others. Each waiter has its own timeout.
        timeout_s = max(request.deadline_s for request in group) - now_s
        try:
            positions = iter(self.open().append(group[0].topic, records, timeout_s=timeout_s))
        except Exception as error:  # raised again in the requests; the thread continues
            if len(group) == 1 or not isinstance(error, LogError) or isinstance(error, LogUnavailableError):
                return [error] * len(group)
            return [self._append_alone(request, error) for request in group]
        return [[next(positions) for _ in request.records] for request in group]

    def _append_alone(self, request: _Request, error: LogError) -> Result:
        now_s = self._clock()
        return error if request.deadline_s <= now_s else self._append([request], now_s)[0]
