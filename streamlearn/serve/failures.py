"""Why a request is refused: one exception, one JSON shape, one sentence that helps."""

from __future__ import annotations

import math
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

RETRY_AFTER_S = 1.0


class RequestError(StreamlearnError):
    """A request that gets no 2xx: its status, a stable code, a sentence, and details where they help."""

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


def retry_later(status: int, code: str, message: str, *, after_s: float = RETRY_AFTER_S) -> RequestError:
    """A refusal that time may lift, with Retry-After in whole seconds."""
    return RequestError(status, code, message, headers={"retry-after": str(math.ceil(after_s))})


def overloaded(what: str) -> RequestError:
    """429: a bounded queue is full."""
    return retry_later(429, "queue_full", f"{what}; nothing was done. Send it again a little later.")


def timed_out(what: str, timeout_s: float) -> RequestError:
    """504: a wait reached its bound."""
    return RequestError(504, "timeout", f"{what} within {timeout_s:g} s.")


_RECORD_STATUS = {"too_large": 413, "bad_content_type": 415}


def from_domain(error: StreamlearnError) -> RequestError:
    """What a client is told about an error of the tree."""
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
            "Send it again with the same ids: what came twice counts once."
        )
        return retry_later(503, "log_unavailable", message)
    if isinstance(error, LogError):
        return RequestError(422, "log_refused", f"The log refused it for good: {error}")
    return RequestError(500, "internal", "The server failed. Its log names the cause under this request id.")
