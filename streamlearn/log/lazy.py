"""A connection that is made when it is first wanted, so that a process may start while the other side is away."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

from streamlearn.errors import LogError, LogUnavailableError

ClientT = TypeVar("ClientT")


class LazyClient(Generic[ClientT]):
    """A client that is made when first wanted, again after `drop`, and never after `close`."""

    def __init__(self, make: Callable[[float], ClientT], end: Callable[[ClientT], None]) -> None:
        self._make = make
        self._end = end
        self._lock = threading.Lock()
        self._client: ClientT | None = None
        self._closed = False

    def get(self, timeout_s: float) -> ClientT:
        """The client, for threads that share it."""
        with self.alone(timeout_s) as client:
            return client

    @contextmanager
    def alone(self, timeout_s: float) -> Iterator[ClientT]:
        """The client, for this thread only; at most `timeout_s` for others to be done, and again to connect.

        Raises:
            LogUnavailableError: others had it for too long, or no connection could be made.
            LogError: closed.
        """
        if not self._lock.acquire(timeout=max(0.0, timeout_s)):
            msg = "the connection to the log was busy for too long"
            raise LogUnavailableError(msg)
        try:
            if self._closed:
                msg = "the log is closed"
                raise LogError(msg)
            if self._client is None:
                self._client = self._make(timeout_s)
            yield self._client
        finally:
            self._lock.release()

    def spoilt(self) -> None:
        """Have a new one made next time; said inside `alone`, whose client must not be asked again."""
        assert self._lock.locked()
        client, self._client = self._client, None
        if client is not None:
            self._end(client)

    def drop(self, client: ClientT) -> None:
        """Have a new one made next time."""
        with self._lock:
            if self._client is not client:
                return
            self._client = None
        self._end(client)

    def close(self) -> None:
        """End it for good."""
        with self._lock:
            self._closed = True
            client, self._client = self._client, None
        if client is not None:
            self._end(client)
