"""One inference thread behind a bounded queue: requests that wait are predicted together.

An idle thread runs a request at once. During a forward pass further requests gather, so batches grow with load. All
rows of one request are answered by one teacher, even if it has more rows than a batch.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from streamlearn.metrics import ServerMetrics
from streamlearn.records import Array, Probabilities
from streamlearn.serve.failures import RequestError, overloaded, retry_later
from streamlearn.serve.predictor import LoadedModel

QUEUE = 256
"""Requests that wait for the model. Their rows are at most QUEUE * BATCH_ROWS."""
BATCH_ROWS = 64
"""Rows of one forward pass."""

Answer = tuple[Probabilities, LoadedModel]


@dataclass(slots=True)
class _Waiting:
    x: Array
    future: asyncio.Future[Answer]
    """Cancelled if the request timed out or its client left."""


class Batcher:
    """Answers requests in order of arrival. `predict` is called from event loops."""

    def __init__(
        self,
        current: Callable[[], LoadedModel],
        metrics: ServerMetrics,
        *,
        queue: int = QUEUE,
        batch_rows: int = BATCH_ROWS,
    ) -> None:
        """`current` returns the served teacher."""
        self._current, self._metrics = current, metrics
        self._max_requests, self._max_rows, self._batch_rows = queue, queue * batch_rows, batch_rows
        self._changed = threading.Condition()
        self._queue: deque[_Waiting] = deque()
        self._rows = 0
        self._stopping = True
        self._thread = threading.Thread()

    def start(self) -> None:
        """Start the inference thread."""
        assert not self._thread.is_alive(), "started twice"
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="inference", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Answer what waits, then stop. Later requests get 503."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(timeout=10.0)

    async def predict(self, x: Array, timeout_s: float) -> Answer:
        """Class probabilities (n, C) of inputs (n, *shape), and the teacher that gave them.

        Raises:
            RequestError: 429 if the queue is full, 504 after `timeout_s`, 503 while stopping.
            NotPublishedError: before the first teacher.
        """
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._put(_Waiting(x, future))
        try:
            async with asyncio.timeout(timeout_s):
                return await future
        except TimeoutError:
            self._metrics.rejected("timeout")
            raise RequestError(504, "timeout", f"The model did not answer within {timeout_s:g} s.") from None

    def _put(self, waiting: _Waiting) -> None:
        rows = len(waiting.x)
        with self._changed:
            if self._stopping:
                raise retry_later(503, "stopping", "The server is stopping; another one will answer.")
            # One request always fits, whatever its rows: `Bodies` bounds its bytes.
            if len(self._queue) >= self._max_requests or (self._queue and self._rows + rows > self._max_rows):
                self._metrics.rejected("queue_full")
                raise overloaded(f"{len(self._queue)} requests already wait for the model")
            self._queue.append(waiting)
            self._rows += rows
            self._metrics.queue_length(len(self._queue))
            self._changed.notify()

    # The inference thread

    def _run(self) -> None:
        while group := self._take():
            self._answer(group)

    def _take(self) -> list[_Waiting]:
        """Wait for requests, and take those that fill one batch; empty once stopped and drained."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._stopping)
            group: list[_Waiting] = []
            rows = 0
            while self._queue and (not group or rows + len(self._queue[0].x) <= self._batch_rows):
                waiting = self._queue.popleft()
                self._rows -= len(waiting.x)
                rows += len(waiting.x)
                group.append(waiting)
            self._metrics.queue_length(len(self._queue))
        return group

    def _answer(self, group: list[_Waiting]) -> None:
        """Answer the group by one teacher, in forward passes of at most `batch_rows` rows."""
        group = [waiting for waiting in group if not waiting.future.done()]
        if not group:
            return
        try:
            model = self._current()
            x = group[0].x if len(group) == 1 else np.concatenate([waiting.x for waiting in group])
            parts = [self._forward(model, x[at : at + self._batch_rows]) for at in range(0, len(x), self._batch_rows)]
        except BaseException as error:  # raised again in the requests
            for waiting in group:
                _deliver(waiting.future, error)
            return
        probs_BC = parts[0] if len(parts) == 1 else np.concatenate(parts)
        at = 0
        for waiting in group:
            _deliver(waiting.future, (probs_BC[at : at + len(waiting.x)], model))
            at += len(waiting.x)

    def _forward(self, model: LoadedModel, x: Array) -> Probabilities:
        started_s = time.perf_counter()
        probs_BC = model.probabilities(x)
        self._metrics.forward(len(x), time.perf_counter() - started_s)
        return probs_BC


def _deliver(future: asyncio.Future[Answer], result: Answer | BaseException) -> None:
    """Pass a result to the event loop of its request."""

    def settle() -> None:
        if future.done():  # timed out or cancelled since
            return
        if isinstance(result, BaseException):
            future.set_exception(result)
        else:
            future.set_result(result)

    with contextlib.suppress(RuntimeError):  # the loop is closed
        future.get_loop().call_soon_threadsafe(settle)
