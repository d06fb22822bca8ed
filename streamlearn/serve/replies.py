"""Replies: JSON written by orjson, and one shape for all errors."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import numpy as np
import orjson
import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response

from streamlearn.errors import StreamlearnError
from streamlearn.records import Position
from streamlearn.serve.failures import RequestError, from_domain

log = structlog.get_logger()


class JsonReply(JSONResponse):
    """A JSON body. float32 arrays are written with the digits that read back as the same float32.

    It subclasses `JSONResponse` because FastAPI describes any other reply as a string in OpenAPI.
    """

    def render(self, content: Any) -> bytes:
        """The body's bytes."""
        return orjson.dumps(content, default=_plain, option=orjson.OPT_SERIALIZE_NUMPY)


def _plain(value: object) -> object:
    """Values that orjson cannot write: positions, and non-contiguous arrays, which a user's network may return."""
    if isinstance(value, Position):
        return value._asdict()
    if isinstance(value, np.ndarray):
        return value.tolist()
    raise TypeError(type(value).__name__)


def iso(time_s: float) -> str:
    """Seconds since the epoch as ISO 8601 in UTC, to the millisecond."""
    return datetime.fromtimestamp(time_s, UTC).isoformat(timespec="milliseconds")


def request_id_of(request: Request) -> str | None:
    """The id that the edge gave this request."""
    request_id: str | None = request.scope.get("state", {}).get("request_id")
    return request_id


def origin_of(request: Request) -> dict[str, Any]:
    """Fields of an audit line: which request, and from where."""
    return {"client": request.client.host if request.client else None, "request_id": request_id_of(request)}


def error_object(error: RequestError) -> dict[str, Any]:
    """The `error` object of a reply, without the request id."""
    fields: dict[str, Any] = {"code": error.code, "message": error.message}
    if error.details is not None:
        fields["details"] = error.details
    return fields


def error_reply(error: RequestError, request_id: str | None) -> JsonReply:
    """The reply to a failed request."""
    body = {"error": {**error_object(error), "request_id": request_id}}
    return JsonReply(body, status_code=error.status, headers=error.headers)


_HTTP_CODES = {404: "not_found", 405: "method_not_allowed"}


def _of_http(request: Request, error: HTTPException) -> RequestError:
    allow = (error.headers or {}).get("Allow") or (error.headers or {}).get("allow")
    messages = {
        404: f"There is nothing at {request.url.path[:200]}; /docs lists the routes.",
        405: f"{request.method[:20]} is not for {request.url.path[:200]}" + (f"; use {allow}." if allow else "."),
    }
    message = messages.get(error.status_code, str(error.detail))
    code = _HTTP_CODES.get(error.status_code, "http_error")
    return RequestError(error.status_code, code, message, headers=error.headers)


def _of_validation(error: RequestValidationError) -> RequestError:
    found = [
        {"where": ".".join(str(part) for part in one["loc"]), "message": str(one["msg"])} for one in error.errors()
    ]
    summary = "; ".join(f"{one['where']}: {one['message']}" for one in found[:5])
    return RequestError(422, "invalid_parameter", f"{summary}.", details=found[:50])


def add_error_handlers(app: FastAPI) -> None:
    """Give every error the one shape, including FastAPI's own and unexpected ones."""

    async def domain(request: Request, error: Exception) -> Response:
        assert isinstance(error, StreamlearnError)
        reply = from_domain(error)
        if reply.status == 500:
            log.error("request_failed", request_id=request_id_of(request), path=request.url.path, exc_info=error)
        return error_reply(reply, request_id_of(request))

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return error_reply(_of_http(request, error), request_id_of(request))

    async def validation(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return error_reply(_of_validation(error), request_id_of(request))

    async def gone(_request: Request, _error: Exception) -> Response:
        return Response(status_code=499)  # only for the metrics; the client has left

    async def unexpected(request: Request, error: Exception) -> Response:
        request_id = request_id_of(request)
        log.error("request_failed", request_id=request_id, path=request.url.path, exc_info=error)
        reply = error_reply(from_domain(StreamlearnError()), request_id)
        reply.headers["x-request-id"] = request_id or ""
        return reply

    app.add_exception_handler(StreamlearnError, domain)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(RequestValidationError, validation)
    app.add_exception_handler(ClientDisconnect, gone)
    app.add_exception_handler(Exception, unexpected)
