"""One inference thread behind a bounded queue: what waits together is predicted together.

An idle thread runs a request at once; while a forward pass runs, others gather, so batches grow with load and with
nothing else. All rows of one request are answered by one teacher, also where it is larger than a batch.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import numpy as np

from streamlearn.metrics import ServerMetrics
from streamlearn.records import Array, Probabilities
from streamlearn.serve.failures import overloaded, retry_later, timed_out


class Model(Protocol):
    """One whole teacher."""

    def probabilities(self, x: Array) -> Probabilities:
        """Class probabilities (n, C) of inputs (n, *shape)."""
        ...


M = TypeVar("M", bound=Model)


@dataclass(slots=True)
class _Waiting(Generic[M]):
    x: Array
    future: asyncio.Future[tuple[Probabilities, M]]
    """Cancelled where the request timed out or its client left."""


class Batcher(Generic[M]):
    """Answers requests in the order they came. `predict` is called from event loops, everything else happens here."""

    def __init__(
        self,
        current: Callable[[], M],
        metrics: ServerMetrics,
        *,
        queue: int,
        batch: int,
    ) -> None:
        """`queue` bounds the requests that wait, `queue * batch` their rows, `batch` the rows of one forward pass."""
        self._current, self._metrics = current, metrics
        self._max_requests, self._max_rows, self._batch = queue, queue * batch, batch
        self._changed = threading.Condition()
        self._queue: deque[_Waiting[M]] = deque()
        self._rows = 0
        self._stopping = False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the inference thread."""
        assert self._thread is None, "started twice"
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="inference", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Answer what waits, then stop. Later requests get 503."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join(timeout=10.0)
            self._thread = None

    async def predict(self, x: Array, timeout_s: float) -> tuple[Probabilities, M]:
        """Class probabilities (n, C) of inputs (n, *shape), and the teacher that gave them.

        Raises:
            RequestError: 429 where the queue is full, 504 after `timeout_s`, 503 while stopping.
            NotPublishedError: before the first teacher.
        """
        future: asyncio.Future[tuple[Probabilities, M]] = asyncio.get_running_loop().create_future()
        self._put(_Waiting(x, future))
        try:
            async with asyncio.timeout(timeout_s):
                return await future
        except TimeoutError:
            self._metrics.rejected("timeout")
            raise timed_out("The model did not answer", timeout_s) from None

    def _put(self, waiting: _Waiting[M]) -> None:
        rows = len(waiting.x)
        with self._changed:
            if self._stopping or self._thread is None:
                raise retry_later(503, "stopping", "The server is stopping; another one will answer.")
            # One request always fits, however many rows it has: `Bodies` bounds what came and what was stored.
            full = len(self._queue) >= self._max_requests or (self._queue and self._rows + rows > self._max_rows)
            if full:
                self._metrics.rejected("queue_full")
                raise overloaded(f"{len(self._queue)} requests already wait for the model")
            self._queue.append(waiting)
            self._rows += rows
            self._metrics.queue_length(len(self._queue))
            self._changed.notify()

    def _run(self) -> None:
        while group := self._take():
            self._answer(group)

    def _take(self) -> list[_Waiting[M]]:
        """Wait for requests, and take those that fill one batch; empty once stopped and drained."""
        with self._changed:
            while not self._queue and not self._stopping:
                self._changed.wait()
            group: list[_Waiting[M]] = []
            rows = 0
            while self._queue and (not group or rows + len(self._queue[0].x) <= self._batch):
                waiting = self._queue.popleft()
                self._rows -= len(waiting.x)
                rows += len(waiting.x)
                group.append(waiting)
            self._metrics.queue_length(len(self._queue))
        return group

    def _answer(self, group: list[_Waiting[M]]) -> None:
        """One teacher for the whole group; forward passes of at most `batch` rows."""
        group = [waiting for waiting in group if not waiting.future.done()]
        if not group:
            return
        try:
            model = self._current()
            x = group[0].x if len(group) == 1 else np.concatenate([waiting.x for waiting in group])
            parts = [self._forward(model, x[at : at + self._batch]) for at in range(0, len(x), self._batch)]
        except BaseException as error:  # carried over to the requests that wait, where it goes on rising
            for waiting in group:
                _deliver(waiting.future, error)
            return
        probs = parts[0] if len(parts) == 1 else np.concatenate(parts)
        at = 0
        for waiting in group:
            _deliver(waiting.future, (probs[at : at + len(waiting.x)], model))
            at += len(waiting.x)

    def _forward(self, model: M, x: Array) -> Probabilities:
        started = time.perf_counter()
        probs = model.probabilities(x)
        self._metrics.forward(len(x), time.perf_counter() - started)
        return probs


def _deliver(future: asyncio.Future[tuple[Probabilities, M]], result: tuple[Probabilities, M] | BaseException) -> None:
    """Hand a result to the loop that waits for it. A loop that is closed has nobody waiting."""

    def settle() -> None:
        if future.done():  # timed out or cancelled meanwhile
            return
        if isinstance(result, BaseException):
            future.set_exception(result)
        else:
            future.set_result(result)

    with contextlib.suppress(RuntimeError):  # the loop is closed
        future.get_loop().call_soon_threadsafe(settle)
