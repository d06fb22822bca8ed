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


def request_id_of(request: Request) -> str:
    """The id that the edge gave this request."""
    request_id: str = request.scope["state"]["request_id"]
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


def error_reply(error: RequestError, request_id: str) -> JsonReply:
    """The reply to a failed request."""
    body = {"error": {**error_object(error), "request_id": request_id}}
    return JsonReply(body, status_code=error.status, headers={**error.headers, "x-request-id": request_id})


def _of_http(request: Request, error: HTTPException) -> RequestError:
    path, headers = request.url.path[:200], error.headers or {}
    if error.status_code == 404:
        return RequestError(404, "not_found", f"There is nothing at {path}; /docs lists the routes.")
    if error.status_code == 405:
        message = f"{request.method[:20]} is not for {path}; use {headers.get('Allow')}."
        return RequestError(405, "method_not_allowed", message, headers=headers)
    return RequestError(error.status_code, "http_error", str(error.detail), headers=headers)


def _of_validation(error: RequestValidationError) -> RequestError:
    found = [
        {"where": ".".join(str(part) for part in one["loc"]), "message": str(one["msg"])} for one in error.errors()
    ]
    summary = "; ".join(f"{one['where']}: {one['message']}" for one in found[:5])
    return RequestError(422, "invalid_parameter", f"{summary}.", details=found[:50])


def add_error_handlers(app: FastAPI) -> None:
    """Give every error the one shape, including FastAPI's own and unexpected ones."""

    async def failed(request: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException):
            failure = _of_http(request, error)
        elif isinstance(error, RequestValidationError):
            failure = _of_validation(error)
        else:
            failure = from_domain(error)
        if failure.status == 500:
            log.error("request_failed", request_id=request_id_of(request), path=request.url.path, exc_info=error)
        return error_reply(failure, request_id_of(request))

    async def gone(_request: Request, _error: Exception) -> Response:
        return Response(status_code=499)  # only for the metrics; the client has left

    for kind in (StreamlearnError, HTTPException, RequestValidationError, Exception):
        app.add_exception_handler(kind, failed)
    app.add_exception_handler(ClientDisconnect, gone)
