"""uvicorn's HTTP protocol, with bounds on what one connection may cost before a request reaches a route.

uvicorn does not bound header size, pipelined requests, connections, or the time to send a header or read an answer. All
of these can be abused before any token is checked. A refused connection gets a reply in the error shape of the API,
unless an answer is being written, and is closed.
"""

from __future__ import annotations

import asyncio
import resource
import uuid
from collections.abc import Callable, Sized
from dataclasses import dataclass, replace
from http import HTTPStatus
from typing import Any

import httptools
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from streamlearn.serve.failures import RequestError, retry_later
from streamlearn.serve.replies import error_reply

SPARE_FILES = 256
"""File descriptors reserved for the log and the store, when RLIMIT_NOFILE bounds the connections."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one connection may cost."""

    max_header_bytes: int = 32 << 10
    """Request line, headers and trailers together."""
    header_timeout_s: float = 10.0
    """From the first byte of a request, or from the connection, to the end of its headers. Also from the answer to the
    end of the request's body, which is read and discarded."""
    write_timeout_s: float = 60.0
    """Time for a client to read its answer."""
    max_waiting: int = 16
    """Pipelined requests that wait behind the current one."""
    max_connections: int = 1024
    """Of one process; further connections get 503 at once."""


def limits_of_process() -> Limits:
    """The default limits, with fewer connections if the process may open fewer files."""
    limits = Limits()
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return limits
    return replace(limits, max_connections=min(limits.max_connections, max(64, soft - SPARE_FILES)))


class _Flow(FlowControl):
    """Stops reading while pipelined requests wait. uvicorn resumes after each answer, however many wait."""

    def __init__(self, transport: asyncio.Transport, waiting: Sized) -> None:
        super().__init__(transport)
        self._waiting = waiting

    def resume_reading(self) -> None:
        """Resume, unless requests wait."""
        if not self._waiting:
            super().resume_reading()


class BoundedProtocol(HttpToolsProtocol):
    """One connection, with a timer while a request is read and one while an answer is written."""

    def __init__(self, *arguments: Any, limits: Limits, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._limits = limits
        self._read_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._header_bytes = 0
        """Of the request that is being read, as reported by the parser so far."""
        self._held_bytes = 0
        """Received since the parser last reported something: it may hold an unfinished header line."""
        self._running: RequestResponseCycle | None = None
        """The request that is being answered. `cycle` is the one that was read last, and may wait behind it."""
        self._reading = False
        """True between the first byte of a request and its last."""

    # The connection

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the header timer, or refuse if too many connections are open."""
        super().connection_made(transport)
        self.flow = _Flow(transport, self.pipeline)
        if len(self.connections) > self._limits.max_connections:
            message = "Too many connections are open; retry a little later."
            self._refuse(retry_later(503, "too_many_connections", message))
            return
        self._start_read_timer(self._too_slow)

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancel the timers, drop the requests that wait, and notify the current one."""
        self._cancel_read_timer()
        self._cancel_write_timer()
        self.pipeline.clear()
        if self._running is not None and not self._running.response_complete:
            self._running.disconnected = True  # uvicorn notifies only the last request that was read
            self._running.message_event.set()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse what was received, within the limits."""
        if self.transport.is_closing():
            return
        self._unset_keepalive_if_required()
        if not self._reading and self._read_timer is None:
            self._start_read_timer(self._too_slow)
        self._held_bytes += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            pass  # answered like any request: this server has no websockets
        except httptools.HttpParserError as error:
            refusal = error.__context__  # httptools wraps what a callback raises
            if not isinstance(refusal, RequestError):
                refusal = RequestError(400, "bad_request", "This is not valid HTTP/1.1.")
            self._refuse(refusal)
            return
        if self._held_bytes > self._limits.max_header_bytes:
            self._refuse(self._too_large())

    # The parser

    def on_message_begin(self) -> None:
        """Refuse a request behind too many others: one read may hold thousands, and only an error stops the parser."""
        if len(self.pipeline) >= self._limits.max_waiting:
            raise RequestError(429, "too_many_requests", "Too many pipelined requests wait on this connection.")
        super().on_message_begin()
        self._header_bytes = self._held_bytes = 0
        self._reading = True

    def on_url(self, url: bytes) -> None:
        """Count part of the request line."""
        self._count_header(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Count one header or trailer."""
        self._count_header(len(name) + len(value) + 4)
        super().on_header(name, value)

    def _count_header(self, size: int) -> None:
        self._held_bytes = 0
        self._header_bytes += size
        if self._header_bytes > self._limits.max_header_bytes:
            raise self._too_large()

    def on_headers_complete(self) -> None:
        """Stop the header timer. The application bounds the time for body and answer."""
        self._cancel_read_timer()
        super().on_headers_complete()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        if self.transport.get_write_buffer_size() == 0:  # the client has read all answers before this one
            self._cancel_write_timer()
        super()._start_asgi_task(cycle, app)

    def on_body(self, body: bytes) -> None:
        """Take part of the body. The application bounds its size."""
        self._held_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The whole request has been read."""
        self._reading = False
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Bound the time for the rest of the request's body, and for writing the answer."""
        super().on_response_complete()
        if self._reading and self.cycle.response_complete and not self.transport.is_closing():
            self._start_read_timer(self.transport.close)
        self._start_write_timer()

    # Timers and refusals

    def _start_read_timer(self, on_timeout: Callable[[], None]) -> None:
        self._cancel_read_timer()
        self._read_timer = self.loop.call_later(self._limits.header_timeout_s, on_timeout)

    def _start_write_timer(self) -> None:
        """Abort if the client does not read in time. A closed transport would otherwise wait indefinitely."""
        if self._write_timer is None and self.transport.get_write_buffer_size() > 0:
            self._write_timer = self.loop.call_later(self._limits.write_timeout_s, self._abort_unread)

    def _cancel_read_timer(self) -> None:
        if self._read_timer is not None:
            self._read_timer.cancel()
            self._read_timer = None

    def _cancel_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _too_slow(self) -> None:
        if not self._reading:
            self.transport.close()  # no request was begun, so no reply is expected
            return
        message = f"No complete request came within {self._limits.header_timeout_s:g} s."
        self._refuse(RequestError(408, "request_timeout", message))

    def _too_large(self) -> RequestError:
        message = f"Request line and headers are larger than the maximum of {self._limits.max_header_bytes} bytes."
        return RequestError(431, "headers_too_large", message)

    def _abort_unread(self) -> None:
        self._write_timer = None
        if self.transport.get_write_buffer_size() > 0:
            self.transport.abort()

    def _refuse(self, error: RequestError) -> None:
        """Close the connection; reply with an error first, unless that would corrupt an answer being written."""
        self._cancel_read_timer()
        if self.transport.is_closing():
            return
        if self._running is None or self._running.response_complete:
            reply = error_reply(error, uuid.uuid4().hex)
            reply.headers["connection"] = "close"
            status = f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}".encode()
            lines = (status, *(name + b": " + value for name, value in reply.raw_headers), b"", b"")
            self.transport.write(b"\r\n".join(lines) + bytes(reply.body))
        self.transport.close()
        self._start_write_timer()
