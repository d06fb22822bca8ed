"""A connection that is opened on first use, so that a process can start while the log is away."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

from streamlearn.errors import LogError, LogUnavailableError

ClientT = TypeVar("ClientT")


class LazyClient(Generic[ClientT]):
    """A client that is opened on first use, and again after `drop`. After `close` it stays closed."""

    def __init__(self, connect: Callable[[float], ClientT], end: Callable[[ClientT], None]) -> None:
        """`connect` gets the seconds that are left; `end` closes a client."""
        self._connect = connect
        self._end = end
        self._lock = threading.RLock()
        self._client: ClientT | None = None
        self._closed = False

    def get(self, timeout_s: float) -> ClientT:
        """Return the client, for threads that share it. Raises as `alone` does."""
        with self.alone(timeout_s) as client:
            return client

    @contextmanager
    def alone(self, timeout_s: float) -> Iterator[ClientT]:
        """Hold the client for this thread alone. Waiting for other threads, and then connecting, take `timeout_s` each.

        Raises:
            LogUnavailableError: other threads held it for too long, or it could not connect.
            LogError: it is closed.
        """
        if not self._lock.acquire(timeout=max(0.0, timeout_s)):
            raise LogUnavailableError(f"the connection to the log was in use for {timeout_s:.3g} s")
        try:
            if self._closed:
                raise LogError("the log is closed")
            if self._client is None:
                self._client = self._connect(timeout_s)
            yield self._client
        finally:
            self._lock.release()

    def drop(self, client: ClientT) -> None:
        """Close this client, unless that was done already; the next use opens another."""
        with self._lock:
            if self._client is not client:
                return
            self._client = None
        self._end(client)

    def close(self) -> None:
        """Close permanently, once no thread holds the client."""
        with self._lock:
            self._closed = True
            client = self._client
        if client is not None:
            self.drop(client)
