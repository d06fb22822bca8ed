"""Errors of requests: one exception with a status, a stable code and a sentence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from streamlearn.errors import (
    LogError,
    LogUnavailableError,
    NotPublishedError,
    RecordError,
    StoreError,
    StreamlearnError,
)

RETRY_AFTER = "1"
"""Whole seconds."""


class RequestError(StreamlearnError):
    """A request that does not get a 2xx: status, a stable code, a sentence, and details where they help."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        details: Any = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.details = status, code, message, details
        self.headers = dict(headers or {})


def retry_later(status: int, code: str, message: str) -> RequestError:
    """An error that may pass by itself, with Retry-After."""
    return RequestError(status, code, message, headers={"retry-after": RETRY_AFTER})


def overloaded(what: str) -> RequestError:
    """429: a bounded queue is full."""
    return retry_later(429, "queue_full", f"{what}; nothing was done. Retry a little later.")


_RECORD_STATUS = {"too_large": 413, "bad_content_type": 415}


def from_domain(error: Exception) -> RequestError:
    """The reply to an error of any kind; 500 if it is a bug."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, RecordError):
        return RequestError(_RECORD_STATUS.get(error.reason, 422), error.reason, str(error))
    if isinstance(error, NotPublishedError | StoreError):
        code = "store_unreadable" if isinstance(error, StoreError) else "not_published"
        return retry_later(503, code, f"{error}.")
    if isinstance(error, LogUnavailableError):
        message = (
            f"The log did not acknowledge in time, so it may or may not hold this: {error}. "
            "Retry with the same ids: a record that arrives twice counts once."
        )
        return retry_later(503, "log_unavailable", message)
    if isinstance(error, LogError):
        return RequestError(422, "log_refused", f"The log refused this permanently: {error}")
    return RequestError(500, "internal", "The server failed. Its log has the cause under this request id.")
