"""Bytes that a server holds for requests: bodies are read within bounds of bytes and time, and large ones in turn."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import TypeVar

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from streamlearn.metrics import ServerMetrics
from streamlearn.serve.failures import RequestError, overloaded

BODIES_IN_FLIGHT = 8
"""Bodies of the largest size that may be held at once; beyond these bytes requests get 429."""
INLINE_BYTES = 1 << 16
"""Larger bodies are decoded in a thread, so that small requests do not wait behind them."""
LARGE_AT_ONCE = 2
"""Large bodies decoded at once: JSON may cost forty times its bytes while it is parsed."""

T = TypeVar("T")


class HeldBytes:
    """One bound for all requests of a process."""

    def __init__(self, metrics: ServerMetrics, *, max_bytes: int, timeout_s: float) -> None:
        self._metrics, self._max_bytes, self._timeout_s = metrics, max_bytes, timeout_s
        self._held_bytes = 0
        self._large = asyncio.Semaphore(LARGE_AT_ONCE)

    @asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[bytes]:
        """The whole body. Its bytes count against the bound of all requests until the context ends.

        Raises:
            RequestError: 413, too large by its header or as it arrives; 429, too many bytes held; 408, too slow.
        """
        declared = request.headers.get("content-length", "")
        if declared.isascii() and declared.isdigit() and int(declared[:20]) > self._max_bytes:
            raise self._too_large()
        chunks: list[bytes] = []
        size_bytes = 0
        try:
            try:
                async with asyncio.timeout(self._timeout_s):
                    async for chunk in request.stream():
                        size_bytes += len(chunk)
                        self._held_bytes += len(chunk)
                        self._check_bounds(size_bytes)
                        chunks.append(chunk)
            except TimeoutError:
                self._metrics.rejected("timeout")
                message = f"The body did not arrive within {self._timeout_s:g} s."
                raise RequestError(408, "body_timeout", message, headers={"connection": "close"}) from None
            yield b"".join(chunks)
        finally:
            self._held_bytes -= size_bytes

    async def decoded(self, size_bytes: int, decode: Callable[[], T]) -> T:
        """Run a function that reads or makes `size_bytes`; in a thread if they are many."""
        if size_bytes <= INLINE_BYTES:
            return decode()
        async with self._large:
            return await run_in_threadpool(decode)

    @contextmanager
    def room(self, size_bytes: int) -> Iterator[None]:
        """Count bytes that are made for a request, such as stored samples, against the bound of all requests.

        Raises:
            RequestError: 413, more than a body may have; 429, too many bytes held.
        """
        if size_bytes > self._max_bytes:
            self._metrics.rejected("body_too_large")
            message = f"The samples have {size_bytes} bytes, more than the maximum of {self._max_bytes}; ask for fewer."
            raise RequestError(413, "body_too_large", message)
        self._held_bytes += size_bytes
        try:
            self._check_bounds(0)
            yield
        finally:
            self._held_bytes -= size_bytes

    def _check_bounds(self, size_bytes: int) -> None:
        if size_bytes > self._max_bytes:
            raise self._too_large()
        if self._held_bytes > BODIES_IN_FLIGHT * self._max_bytes:
            self._metrics.rejected("queue_full")
            raise overloaded(f"the server already holds {BODIES_IN_FLIGHT * self._max_bytes} bytes of requests")

    def _too_large(self) -> RequestError:
        self._metrics.rejected("body_too_large")
        message = f"The body is larger than the maximum of {self._max_bytes} bytes; send fewer items at a time."
        return RequestError(413, "body_too_large", message, headers={"connection": "close"})
