"""uvicorn's HTTP protocol with the bounds that it leaves open: bytes of headers, time for a request, connections.

uvicorn closes a connection that is idle between two requests, and no other: a client that sends half a header, a body
after its answer, or never reads an answer, is kept for ever. Nor does httptools bound a header, or what comes between
the bytes of a chunked body. What is refused here was no request yet, so no route knows of it; the reply has the one
error shape all the same, and its connection ends.
"""

from __future__ import annotations

import asyncio
import resource
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from http import HTTPStatus
from typing import Any

import httptools
import orjson
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

SPARE_FILES = 256
"""Descriptors left for the log, the store and all else, when connections are bounded by the process's own limit."""
OVERHEAD_PER_BODY_BYTE = 8
"""A chunked body costs at most five bytes beside each of its own; more is trailers or chunk extensions without end."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one connection may cost."""

    max_header_bytes: int = 32 << 10
    """Of request line and headers together."""
    header_timeout_s: float = 10.0
    """From the first byte of a request, or from the connection, to the end of its headers."""
    linger_s: float = 2.0
    """How long the rest of a body is read and thrown away after its request was answered."""
    write_timeout_s: float = 60.0
    """How long a client may take to read its answer."""
    max_connections: int = 1024
    """In one process; more get 503 at once."""


def limits_of_process() -> Limits:
    """The default limits, with no more connections than the process may have files open."""
    limits = Limits()
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return limits
    return replace(limits, max_connections=min(limits.max_connections, max(64, soft - SPARE_FILES)))


class _HeadersTooLargeError(Exception):
    """Leaves a callback of the parser; httptools wraps it in an error of its own."""


class BoundedProtocol(HttpToolsProtocol):
    """One connection. It has a timer while a request is read, and one while an answer is."""

    def __init__(self, *arguments: Any, limits: Limits, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._limits = limits
        self._reads: asyncio.TimerHandle | None = None
        self._writes: asyncio.TimerHandle | None = None
        self._received = self._unclaimed = self._body = self._headers_bytes = 0
        self._running: RequestResponseCycle | None = None
        """What is being answered; `cycle` is what was read last, which in a pipeline is another."""
        self._reading = False
        """Between the first byte of a request and its last."""

    # The connection

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin, unless too many are open."""
        super().connection_made(transport)
        if len(self.connections) > self._limits.max_connections:
            self._refuse(503, "too_many_connections", "Too many connections are open; try again a little later.")
            return
        self._read_within(self._limits.header_timeout_s, self._too_slow)

    def connection_lost(self, exc: Exception | None) -> None:
        """End."""
        self._disarm()
        if self._writes is not None:
            self._writes.cancel()
        self.pipeline.clear()
        if self._running is not None and not self._running.response_complete:
            self._running.disconnected = True  # uvicorn tells only the last one, and the others then fail to write
            self._running.message_event.set()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse what came, within the bounds."""
        if self.transport.is_closing():
            return
        self._unset_keepalive_if_required()
        if not self._reading and self._reads is None:
            self._read_within(self._limits.header_timeout_s, self._too_slow)
        self._received += len(data)
        self._unclaimed = 0 if self._reading else len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            pass  # answered as any other request: this server upgrades to nothing
        except httptools.HttpParserError as error:
            if isinstance(error.__context__, _HeadersTooLargeError):
                self._too_large()
            else:
                self._refuse(400, "bad_request", "This is not HTTP/1.1 as this server understands it.")
            return
        overhead = self._received - self._body
        if overhead > self._limits.max_header_bytes + OVERHEAD_PER_BODY_BYTE * self._body:
            self._too_large()

    # The parser

    def on_message_begin(self) -> None:
        """A request begins. What came with it is counted, unless it came behind another: at most one read is not."""
        super().on_message_begin()
        self._received, self._unclaimed = self._unclaimed, 0
        self._body = self._headers_bytes = 0
        self._reading = True

    def on_url(self, url: bytes) -> None:
        """Part of the request line."""
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header, or trailer."""
        self._count(len(name) + len(value) + 4)
        super().on_header(name, value)

    def _count(self, size: int) -> None:
        self._headers_bytes += size
        if self._headers_bytes > self._limits.max_header_bytes:
            raise _HeadersTooLargeError

    def on_headers_complete(self) -> None:
        """The request can be answered; how long that takes is the application's to bound."""
        self._disarm()
        super().on_headers_complete()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def on_body(self, body: bytes) -> None:
        """Part of the body."""
        self._body += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The request is here, whole."""
        self._reading = False
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """It is answered: what is left of its body, and of the answer in our buffers, has a while to go."""
        super().on_response_complete()
        if self._reading and not self.transport.is_closing():
            self._read_within(self._limits.linger_s, self.transport.close)
        self._written_within()

    # Ends

    def _read_within(self, seconds: float, else_do: Callable[[], None]) -> None:
        self._disarm()
        self._reads = self.loop.call_later(seconds, else_do)

    def _written_within(self) -> None:
        """Give what waits to be written so long; one that is closed waits for its client for ever otherwise."""
        if self._writes is None and self.transport.get_write_buffer_size() > 0:
            self._writes = self.loop.call_later(self._limits.write_timeout_s, self._abort_unread)

    def _disarm(self) -> None:
        if self._reads is not None:
            self._reads.cancel()
            self._reads = None

    def _too_slow(self) -> None:
        if not self._reading:
            self.transport.close()  # nobody who waits for an answer
            return
        self._refuse(408, "request_timeout", f"No whole request came within {self._limits.header_timeout_s:g} s.")

    def _too_large(self) -> None:
        message = f"Request line and headers are larger than the {self._limits.max_header_bytes} bytes that are taken."
        self._refuse(431, "headers_too_large", message)

    def _abort_unread(self) -> None:
        self._writes = None
        if self.transport.get_write_buffer_size() > 0:
            self.transport.abort()

    def _refuse(self, status: int, code: str, message: str) -> None:
        """Answer what is no request, and end the connection."""
        self._disarm()
        if self.transport.is_closing():
            return
        # An answer that is on its way must not be torn.
        if self._running is None or self._running.response_complete:
            request_id = uuid.uuid4().hex
            error = {"code": code, "message": message, "request_id": request_id}
            body = orjson.dumps({"error": error})
            lines = (
                f"HTTP/1.1 {status} {HTTPStatus(status).phrase}",
                "content-type: application/json",
                f"content-length: {len(body)}",
                f"x-request-id: {request_id}",
                "connection: close",
                *(["retry-after: 1"] if status == 503 else []),
            )
            self.transport.write("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
        self.transport.close()
        self._written_within()
