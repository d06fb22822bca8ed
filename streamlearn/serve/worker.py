"""A thread that answers requests of an event loop in groups, behind a bounded queue."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from abc import ABC, abstractmethod
from collections import deque
from typing import Generic, TypeVar

from streamlearn.serve.failures import retry_later

RequestT = TypeVar("RequestT")
ResultT = TypeVar("ResultT")


class Worker(ABC, Generic[RequestT]):
    """One thread and its queue. Subclasses bound the queue, choose the groups, and answer them."""

    def __init__(self, name: str) -> None:
        """`name` is the thread's."""
        self._name = name
        self._changed = threading.Condition()
        self._queue: deque[RequestT] = deque()
        self._stopping = True
        self._thread = threading.Thread()

    def start(self) -> None:
        """Start the thread."""
        assert not self._thread.is_alive(), "started twice"
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
        self._thread.start()

    def close(self, timeout_s: float | None = None) -> None:
        """Answer what waits, then stop. Later requests get 503."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def _put(self, request: RequestT) -> None:
        with self._changed:
            if self._stopping:
                raise retry_later(503, "stopping", "The server is stopping; another one will answer.")
            self._admit(request)
            self._queue.append(request)
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._stopping)
                group = self._take()
            if not group:  # stopped and drained
                return
            self._answer(group)

    @abstractmethod
    def _admit(self, request: RequestT) -> None:
        """Count a request that is put into the queue, or raise if the queue is full. Called with the lock."""

    @abstractmethod
    def _take(self) -> list[RequestT]:
        """Remove requests from the queue, to be answered together; empty if it is. Called with the lock."""

    @abstractmethod
    def _answer(self, group: list[RequestT]) -> None:
        """Answer requests. Called by the thread."""


def resolve(results: list[tuple[asyncio.Future[ResultT], ResultT | BaseException]]) -> None:
    """Pass results or errors to the futures of one event loop, from another thread."""
    with contextlib.suppress(RuntimeError):  # the loop is closed
        results[0][0].get_loop().call_soon_threadsafe(_resolve, results)


def _resolve(results: list[tuple[asyncio.Future[ResultT], ResultT | BaseException]]) -> None:
    for future, result in results:
        if future.done():  # timed out, or its client left
            continue
        if isinstance(result, BaseException):
            future.set_exception(result)
        else:
            future.set_result(result)
