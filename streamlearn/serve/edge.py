"""The edge of the API, around every route: the request's id, who may do what, and the time it took.

| token | opens |
|---|---|
| `serve.token` | predict, label |
| `serve.predict_token` | predict |
| `serve.label_token` | label |
| `serve.admin_token` | predict, label, admin |

Where none of them is set, all is open but admin, which nobody may do by not having set a token. Where any is set, every
route but health wants one: what is not in the table of roles, `/metrics`, `/score` and the documentation among it, any.
`/predict` with `learn` is predict: a sample that was asked about may be learned from, only a label says what it was.

A server without a token is on loopback, where web pages in a browser of the same machine reach it. So it refuses a Host
that is not loopback, which a page has that points its own name at 127.0.0.1 (DNS rebinding), and whatever a browser
marks as sent by a page of another origin. `serve.insecure` turns this off, and lets it bind any address.
"""

from __future__ import annotations

import hmac
import ipaddress
import re
import string
import time
import uuid
from enum import StrEnum
from urllib.parse import quote_from_bytes

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from streamlearn.metrics import ServerMetrics
from streamlearn.serve.failures import RequestError
from streamlearn.serve.parts import ServeSettings
from streamlearn.serve.replies import error_reply

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")
_HOST = re.compile(r"(\[[^\]]*\]|[^:]*)(:[0-9]*)?")
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
OPEN_PREFIX = "/health/"
"""Probes carry no token."""


class Role(StrEnum):
    """What a token lets its bearer do."""

    PREDICT = "predict"
    LABEL = "label"
    ADMIN = "admin"


_ROLES = {"predict": Role.PREDICT, "label": Role.LABEL, "sample": Role.LABEL, "models": Role.ADMIN}


def role_of(method: str, path: str) -> Role | None:
    """The role that a request wants, by its method and the first part of its path; None where any will do.

    All below `/model/` is admin, so that no route put there is ever open by having been forgotten here; so is whatever
    deletes.
    """
    if method == "DELETE":
        return Role.ADMIN
    first, slash, _ = path.removeprefix("/").partition("/")
    if first == "model":
        return Role.ADMIN if slash else Role.PREDICT
    return _ROLES.get(first)


class Edge:
    """ASGI middleware, on ASGI itself: Starlette's helper would put a task and a queue around each body."""

    def __init__(self, app: ASGIApp, *, metrics: ServerMetrics, settings: ServeSettings) -> None:
        self._app, self._metrics = app, metrics
        grants = (
            (settings.token, {Role.PREDICT, Role.LABEL}),
            (settings.predict_token, {Role.PREDICT}),
            (settings.label_token, {Role.LABEL}),
            (settings.admin_token, set(Role)),
        )
        self._grants = [(token.encode(), roles) for token, roles in grants if token]
        self._is_local = not self._grants and not settings.insecure

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        _make_ascii(scope)
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
            refused = self._refusal(scope["method"], scope["path"], headers)
            if refused is None:
                await self._app(scope, receive, send_named)
            else:
                self._metrics.rejected("unauthorised")
                await error_reply(refused, request_id)(scope, receive, send_named)
        finally:
            route = getattr(scope.get("route"), "path", "unmatched")
            method = scope["method"] if scope["method"] in _METHODS else "OTHER"
            self._metrics.request(route, method, status, time.perf_counter() - started)

    def _refusal(self, method: str, path: str, headers: Headers) -> RequestError | None:
        """Why the bearer may not do this; None where it may. A stranger learns no more than that a token is wanted."""
        if path.startswith(OPEN_PREFIX):
            return None
        if self._is_local and (foreign := _foreign(headers)):
            return foreign
        held = self._roles(headers)
        if self._grants and not held:
            return _UNAUTHORISED
        wanted = role_of(method, path)
        if wanted is Role.ADMIN and not any(Role.ADMIN in roles for _, roles in self._grants):
            return _NO_ADMIN
        if not self._grants or wanted is None or wanted in held:
            return None
        told = {"wanted": wanted, "held": sorted(held)}
        message = f"This token opens {' and '.join(told['held'])}; this route wants one that opens {wanted}."
        return RequestError(403, "wrong_role", message, details=told)

    def _roles(self, headers: Headers) -> set[Role]:
        """What the token that came opens. All tokens are compared, each in constant time, whichever it is."""
        scheme, _, given = headers.get("authorization", "").encode("latin-1").partition(b" ")
        if scheme.lower() != b"bearer":
            return set()
        matches = [hmac.compare_digest(given.strip(), token) for token, _ in self._grants]
        return set().union(*(roles for (_, roles), match in zip(self._grants, matches, strict=True) if match))


def _foreign(headers: Headers) -> RequestError | None:
    """Why a request may come from a web page of somebody else; None where it does not.

    One without these headers comes from a program: all browsers send Host, and Origin or Sec-Fetch-Site from any page
    but the server's own.
    """
    hosts = headers.getlist("host")
    for host in hosts:
        if not _is_loopback(host):
            message = (
                f"This server has no token and answers to loopback names alone; the Host header is {host!r:.200}. Use "
                f"http://localhost or http://127.0.0.1, or set serve.token. {_INSECURE}"
            )
            return RequestError(403, "wrong_host", message)
    origin, site = headers.get("origin"), headers.get("sec-fetch-site", "none")
    is_same = origin is None or origin.partition("://")[2].lower() in (host.lower() for host in hosts)
    if is_same and site in ("same-origin", "none"):
        return None
    name, value = ("Sec-Fetch-Site", site) if is_same else ("Origin", origin)
    message = (
        f"This server has no token and answers no web page of another origin; the {name} header is {value!r:.200}. "
        f"Open its address directly, or set serve.token. {_INSECURE}"
    )
    return RequestError(403, "wrong_origin", message)


def _is_loopback(host: str) -> bool:
    """Whether a Host header names this machine, with any port or none."""
    match = _HOST.fullmatch(host)
    name = "" if match is None else match[1].strip("[]").lower()
    try:
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _make_ascii(scope: Scope) -> None:
    """Percent-encode what a client should have: httptools refuses raw bytes, other servers hand them on to fail on."""
    query: bytes = scope["query_string"]
    if not query.isascii():
        scope["query_string"] = quote_from_bytes(query, safe=string.printable).encode()


_INSECURE = "serve.insecure = true turns this check off."
_UNAUTHORISED = RequestError(
    401,
    "unauthorised",
    "This server wants a token, in a header: Authorization: Bearer TOKEN.",
    headers={"www-authenticate": 'Bearer realm="streamlearn"'},
)
_NO_ADMIN = RequestError(
    403,
    "admin_token_not_set",
    "This route wants an admin token, and this server has none: set serve.admin_token "
    "(STREAMLEARN_SERVE__ADMIN_TOKEN) and restart it. Versions can also be changed by `streamlearn models`, "
    "`rollback` and `promote` on its machine.",
)
