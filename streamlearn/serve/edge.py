"""The edge of the API, around every route: request id, authorisation, Host and Origin checks, and latency.

| token | grants |
|---|---|
| `serve.token` | predict, label |
| `serve.predict_token` | predict |
| `serve.label_token` | label |
| `serve.admin_token` | predict, label, admin |

Without any token, all routes are open except admin, which is closed unless an admin token is set. With any token, every
route except /health needs one. Routes without a role, such as `/schema`, `/metrics`, `/score` and the documentation,
accept any token. `/predict` with `learn` needs predict only, and refuses records with a label: what it appends may be
learned from, but is no ground truth.

A server without a token listens on loopback, where web pages in a browser of the same machine can reach it. It refuses
a Host that is not loopback (DNS rebinding: a page points its own name at 127.0.0.1), and requests that a browser marks
as sent by a page of another origin. `serve.insecure` turns both checks off, and allows any address.
"""

from __future__ import annotations

import hmac
import ipaddress
import re
import time
import uuid
from enum import StrEnum

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from streamlearn.metrics import ServerMetrics
from streamlearn.serve.failures import RequestError
from streamlearn.serve.replies import error_reply
from streamlearn.serve.settings import ServeConfig

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")
_HOST = re.compile(r"(\[[^\]]*\]|[^:]*)(:[0-9]*)?")
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
OPEN_PREFIX = "/health/"
"""Health probes have no token."""


class Role(StrEnum):
    """What a token grants."""

    PREDICT = "predict"
    LABEL = "label"
    ADMIN = "admin"


ROLES = {
    "predict": Role.PREDICT,
    "label": Role.LABEL,
    "sample": Role.LABEL,
    "models": Role.ADMIN,
    "schema": None,
    "score": None,
    "metrics": None,
}
"""The role that a path needs, by its first part. None: any token. A test refuses a route that is not here."""


def role_of(method: str, path: str) -> Role | None:
    """The role that a request needs, by its method and the first part of its path; None if any token will do.

    All routes below `/model/`, and all that delete, are admin: a new one is closed by default.
    """
    if method == "DELETE":
        return Role.ADMIN
    first, slash, _ = path.removeprefix("/").partition("/")
    if first == "model":
        return Role.ADMIN if slash else Role.PREDICT
    return ROLES.get(first)


class Edge:
    """ASGI middleware. It does without Starlette's helper, which adds a task and a queue around each body."""

    def __init__(self, app: ASGIApp, *, metrics: ServerMetrics, settings: ServeConfig) -> None:
        self._app, self._metrics = app, metrics
        grants = (
            (settings.token, {Role.PREDICT, Role.LABEL}),
            (settings.predict_token, {Role.PREDICT}),
            (settings.label_token, {Role.LABEL}),
            (settings.admin_token, set(Role)),
        )
        self._grants = [(token.get_secret_value().encode(), roles) for token, roles in grants if token]
        self._is_local = not self._grants and not settings.insecure

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started_s = time.perf_counter()
        headers = Headers(scope=scope)
        given_id = headers.get("x-request-id", "")
        request_id = given_id if _REQUEST_ID.fullmatch(given_id) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        status = "500"  # of an uncaught error, whose reply is made outside this middleware

        async def send_named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            refused = self._refusal(scope["method"], scope["path"], headers)
            if refused is None:
                await self._app(scope, receive, send_named)
            else:
                self._metrics.rejected("unauthorised")
                await error_reply(refused, request_id)(scope, receive, send_named)
        finally:
            route = getattr(scope.get("route"), "path", "unmatched")
            method = scope["method"] if scope["method"] in _METHODS else "OTHER"
            self._metrics.request(route, method, status, time.perf_counter() - started_s)

    def _refusal(self, method: str, path: str, headers: Headers) -> RequestError | None:
        """The error if the bearer may not do this. Without a token it reveals only that one is needed."""
        if path.startswith(OPEN_PREFIX):
            return None
        if self._is_local and (foreign := _foreign(headers)):
            return foreign
        held = self._roles(headers)
        if self._grants and not held:
            return _UNAUTHORISED
        needed = role_of(method, path)
        if needed is Role.ADMIN and not any(Role.ADMIN in roles for _, roles in self._grants):
            return _NO_ADMIN
        if not self._grants or needed is None or needed in held:
            return None
        message = f"This token grants {' and '.join(sorted(held))}; this route needs one that grants {needed}."
        return RequestError(403, "wrong_role", message, details={"needed": needed, "held": sorted(held)})

    def _roles(self, headers: Headers) -> set[Role]:
        """What the given token grants. It is compared with all tokens, each in constant time."""
        scheme, _, given = headers.get("authorization", "").encode("latin-1").partition(b" ")
        if scheme.lower() != b"bearer":
            return set()
        matches = [hmac.compare_digest(given.strip(), token) for token, _ in self._grants]
        return set().union(*(roles for (_, roles), match in zip(self._grants, matches, strict=True) if match))


def _foreign(headers: Headers) -> RequestError | None:
    """The error if a request may come from a foreign web page.

    Browsers always send Host, and from pages of other origins Origin or Sec-Fetch-Site. A request without them comes
    from a program.
    """
    hosts = headers.getlist("host")
    for host in hosts:
        if not _is_loopback(host):
            message = (
                f"This server has no token and accepts only loopback names; the Host header is {host!r:.200}. Use "
                f"http://localhost or http://127.0.0.1, or set serve.token. {_INSECURE}"
            )
            return RequestError(403, "wrong_host", message)
    origin, site = headers.get("origin"), headers.get("sec-fetch-site", "none")
    is_same = origin is None or origin.partition("://")[2].lower() in (host.lower() for host in hosts)
    if is_same and site in ("same-origin", "none"):
        return None
    name, value = ("Sec-Fetch-Site", site) if is_same else ("Origin", origin)
    message = (
        f"This server has no token and refuses web pages of other origins; the {name} header is {value!r:.200}. "
        f"Open its address directly, or set serve.token. {_INSECURE}"
    )
    return RequestError(403, "wrong_origin", message)


def _is_loopback(host: str) -> bool:
    """Whether a Host header names this machine, with or without a port."""
    match = _HOST.fullmatch(host)
    name = "" if match is None else match[1].strip("[]").lower()
    try:
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


_INSECURE = "serve.insecure = true turns this check off."
_UNAUTHORISED = RequestError(
    401,
    "unauthorised",
    "This server requires a token, in the header Authorization: Bearer TOKEN.",
    headers={"www-authenticate": 'Bearer realm="streamlearn"'},
)
_NO_ADMIN = RequestError(
    403,
    "admin_token_not_set",
    "This route requires an admin token, and this server has none: set serve.admin_token "
    "(STREAMLEARN_SERVE__ADMIN_TOKEN) and restart it. `streamlearn models` on its machine can change the version too.",
)
