"""One inference thread behind a bounded queue: requests that wait are predicted together.

An idle thread runs a request at once. During a forward pass further requests gather, so batches grow with load. All
rows of one request are answered by one teacher, even if it has more rows than a batch.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from streamlearn.metrics import ServerMetrics
from streamlearn.records import Array, Probabilities
from streamlearn.serve.failures import RequestError, overloaded
from streamlearn.serve.predictor import LoadedModel
from streamlearn.serve.worker import Worker, resolve

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


class Batcher(Worker[_Waiting]):
    """Answers requests in order of arrival. `predict` is called from one event loop."""

    def __init__(
        self,
        current: Callable[[], LoadedModel],
        metrics: ServerMetrics,
        *,
        queue: int = QUEUE,
        batch_rows: int = BATCH_ROWS,
    ) -> None:
        """`current` returns the served teacher."""
        super().__init__("inference")
        self._current, self._metrics = current, metrics
        self._max_requests, self._max_rows, self._batch_rows = queue, queue * batch_rows, batch_rows
        self._rows = 0

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

    def _admit(self, request: _Waiting) -> None:
        rows = self._rows + len(request.x)
        # One request always fits, whatever its rows: `Bodies` bounds its bytes.
        if len(self._queue) >= self._max_requests or (self._queue and rows > self._max_rows):
            self._metrics.rejected("queue_full")
            raise overloaded(f"{len(self._queue)} requests already wait for the model")
        self._rows = rows
        self._metrics.queue_length(len(self._queue) + 1)

    # The inference thread

    def _take(self) -> list[_Waiting]:
        """Those that fill one batch."""
        group: list[_Waiting] = []
        rows = 0
        while self._queue and (not group or rows + len(self._queue[0].x) <= self._batch_rows):
            group.append(self._queue.popleft())
            rows += len(group[-1].x)
        self._rows -= rows
        self._metrics.queue_length(len(self._queue))
        return group

    def _answer(self, group: list[_Waiting]) -> None:
        """Answer the group by one teacher, in forward passes of at most `batch_rows` rows."""
        group = [waiting for waiting in group if not waiting.future.done()]
        if not group:
            return
        results: list[tuple[asyncio.Future[Answer], Answer | BaseException]] = []
        try:
            model = self._current()
            x = group[0].x if len(group) == 1 else np.concatenate([waiting.x for waiting in group])
            parts = [self._forward(model, x[at : at + self._batch_rows]) for at in range(0, len(x), self._batch_rows)]
            probs_BC = parts[0] if len(parts) == 1 else np.concatenate(parts)
            at = 0
            for waiting in group:
                results.append((waiting.future, (probs_BC[at : at + len(waiting.x)], model)))
                at += len(waiting.x)
        except BaseException as error:  # raised again in the requests
            results = [(waiting.future, error) for waiting in group]
        resolve(results)

    def _forward(self, model: LoadedModel, x: Array) -> Probabilities:
        started_s = time.perf_counter()
        probs_BC = model.probabilities(x)
        self._metrics.forward(len(x), time.perf_counter() - started_s)
        return probs_BC
