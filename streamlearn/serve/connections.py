"""uvicorn's HTTP protocol, with bounds on what one connection may cost before a request reaches a route.

uvicorn has no bound on the size of a header, on the number of pipelined requests, on the number of connections, or on
the time that a client takes to send a header or to read an answer. All of these can be used before any token is
checked. A refused connection gets a reply in the error shape of the API, unless an answer is being written, and is
closed.
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
import orjson
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

SPARE_FILES = 256
"""File descriptors kept for the log, the store and everything else, when connections are bounded by RLIMIT_NOFILE."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one connection may cost."""

    max_header_bytes: int = 32 << 10
    """Of request line, headers and trailers together."""
    header_timeout_s: float = 10.0
    """From the first byte of a request, or from the connection, to the end of its headers. Also from the answer to a
    request to the end of its body, which is read and discarded."""
    write_timeout_s: float = 60.0
    """How long a client may take to read its answer."""
    max_waiting: int = 16
    """Pipelined requests that wait behind the one that is being answered."""
    max_connections: int = 1024
    """Of one process; further ones get 503 at once."""


def limits_of_process() -> Limits:
    """The default limits, with fewer connections where the process may open fewer files."""
    limits = Limits()
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return limits
    return replace(limits, max_connections=min(limits.max_connections, max(64, soft - SPARE_FILES)))


class _OverLimitError(Exception):
    """Raised in a callback of the parser, to stop it; httptools wraps it. Arguments: status, code, message."""


class _Flow(FlowControl):
    """Reads nothing more while pipelined requests wait: uvicorn reads on after each answer, however many wait."""

    def __init__(self, transport: asyncio.Transport, waiting: Sized) -> None:
        super().__init__(transport)
        self._waiting = waiting

    def resume_reading(self) -> None:
        """Resume, unless requests wait."""
        if not self._waiting:
            super().resume_reading()


class BoundedProtocol(HttpToolsProtocol):
    """One connection. It has a timer while a request is read, and one while an answer waits to be written."""

    def __init__(self, *arguments: Any, limits: Limits, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._limits = limits
        self._reads: asyncio.TimerHandle | None = None
        self._writes: asyncio.TimerHandle | None = None
        self._header_bytes = 0
        """Of the request that is being read, as far as the parser has handed them out."""
        self._held_bytes = 0
        """Received since the parser last handed something out: it may be holding an unfinished header line."""
        self._running: RequestResponseCycle | None = None
        """The request that is being answered; `cycle` is the one that was read last, which may wait behind it."""
        self._reading = False
        """Between the first byte of a request and its last."""

    # The connection

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the header timer, or refuse where too many connections are open."""
        super().connection_made(transport)
        self.flow = _Flow(transport, self.pipeline)
        if len(self.connections) > self._limits.max_connections:
            self._refuse(503, "too_many_connections", "Too many connections are open; try again a little later.")
            return
        self._read_within(self._too_slow)

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancel the timers, drop the requests that wait, and notify the one that is being answered."""
        self._disarm()
        self._disarm_writes()
        self.pipeline.clear()
        if self._running is not None and not self._running.response_complete:
            self._running.disconnected = True  # uvicorn notifies only the last one that was read
            self._running.message_event.set()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse what was received, within the limits."""
        if self.transport.is_closing():
            return
        self._unset_keepalive_if_required()
        if not self._reading and self._reads is None:
            self._read_within(self._too_slow)
        self._held_bytes += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            pass  # answered like any other request: this server has no websockets
        except httptools.HttpParserError as error:
            if isinstance(error.__context__, _OverLimitError):
                self._refuse(*error.__context__.args)
            else:
                self._refuse(400, "bad_request", "This is not HTTP/1.1 as this server understands it.")
            return
        if self._held_bytes > self._limits.max_header_bytes:
            self._refuse(*self._too_large())

    # The parser

    def on_message_begin(self) -> None:
        """Refuse a request behind too many others. One read may hold thousands, and the parser stops at no other."""
        if len(self.pipeline) >= self._limits.max_waiting:
            raise _OverLimitError(429, "too_many_requests", "Too many pipelined requests wait on this connection.")
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
            raise _OverLimitError(*self._too_large())

    def on_headers_complete(self) -> None:
        """Stop the header timer; the time for the body and the answer is the application's to bound."""
        self._disarm()
        super().on_headers_complete()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        if self.transport.get_write_buffer_size() == 0:  # the client has read all answers before this one
            self._disarm_writes()
        super()._start_asgi_task(cycle, app)

    def on_body(self, body: bytes) -> None:
        """Take part of the body; its size is the application's to bound."""
        self._held_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The whole request has been read."""
        self._reading = False
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Bound the time for the rest of an answered request's body, and for writing the answer."""
        super().on_response_complete()
        if self._reading and self.cycle.response_complete and not self.transport.is_closing():
            self._read_within(self.transport.close)
        self._written_within()

    # Timers and refusals

    def _read_within(self, else_do: Callable[[], None]) -> None:
        self._disarm()
        self._reads = self.loop.call_later(self._limits.header_timeout_s, else_do)

    def _written_within(self) -> None:
        """Abort if the client does not read in time; without it, a closed transport waits for the client forever."""
        if self._writes is None and self.transport.get_write_buffer_size() > 0:
            self._writes = self.loop.call_later(self._limits.write_timeout_s, self._abort_unread)

    def _disarm(self) -> None:
        if self._reads is not None:
            self._reads.cancel()
            self._reads = None

    def _disarm_writes(self) -> None:
        if self._writes is not None:
            self._writes.cancel()
            self._writes = None

    def _too_slow(self) -> None:
        if not self._reading:
            self.transport.close()  # nothing was asked, so no reply is expected
            return
        self._refuse(408, "request_timeout", f"No whole request came within {self._limits.header_timeout_s:g} s.")

    def _too_large(self) -> tuple[int, str, str]:
        message = f"Request line and headers are larger than the {self._limits.max_header_bytes} bytes that are taken."
        return 431, "headers_too_large", message

    def _abort_unread(self) -> None:
        self._writes = None
        if self.transport.get_write_buffer_size() > 0:
            self.transport.abort()

    def _refuse(self, status: int, code: str, message: str) -> None:
        """Close the connection, after an error reply if no answer is being written that it would corrupt."""
        self._disarm()
        if self.transport.is_closing():
            return
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
