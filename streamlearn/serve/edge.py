"""The edge of the API, around every route: the request's id, the bearer token, and the time it took."""

from __future__ import annotations

import hmac
import re
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from streamlearn.metrics import ServerMetrics
from streamlearn.serve.failures import RequestError
from streamlearn.serve.replies import error_reply

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
OPEN_PREFIX = "/health/"
"""Probes carry no token."""


class Edge:
    """ASGI middleware, on ASGI itself: Starlette's helper would put a task and a queue around each body."""

    def __init__(self, app: ASGIApp, *, metrics: ServerMetrics, token: str | None) -> None:
        self._app, self._metrics = app, metrics
        self._token = None if token is None else token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        headers = Headers(scope=scope)
        asked = headers.get("x-request-id", "")
        request_id = asked if _REQUEST_ID.fullmatch(asked) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        status = "500"  # what an error that nobody caught becomes, outside of this middleware

        async def send_named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            if self._may(scope["path"], headers):
                await self._app(scope, receive, send_named)
            else:
                await error_reply(self._unauthorised(), request_id)(scope, receive, send_named)
        finally:
            route = getattr(scope.get("route"), "path", "unmatched")
            method = scope["method"] if scope["method"] in _METHODS else "OTHER"
            self._metrics.request(route, method, status, time.perf_counter() - started)

    def _may(self, path: str, headers: Headers) -> bool:
        if self._token is None or path.startswith(OPEN_PREFIX):
            return True
        scheme, _, token = headers.get("authorization", "").encode("latin-1").partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(token.strip(), self._token)

    def _unauthorised(self) -> RequestError:
        self._metrics.rejected("unauthorised")
        return RequestError(
            401,
            "unauthorised",
            "This server wants its token, in a header: Authorization: Bearer TOKEN.",
            headers={"www-authenticate": 'Bearer realm="streamlearn"'},
        )
