"""Which version is served, changed by an operator: list the versions, roll back to one, return to the newest.

The routes change the published folder as `streamlearn models list`, `pin` and `unpin` do, so all servers that follow
the folder change. The learner is not affected.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import structlog
from fastapi import APIRouter, Request
from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from streamlearn.errors import NotPublishedError, StateError
from streamlearn.metrics import ServerMetrics
from streamlearn.serve.bodies import Bodies
from streamlearn.serve.failures import RequestError, overloaded, retry_later
from streamlearn.serve.predictor import LoadedModel, Predictor
from streamlearn.serve.replies import JsonReply, iso, request_id_of
from streamlearn.serve.request_schemas import rollback_body
from streamlearn.serve.schemas import RollbackBody, ServedReply, VersionsReply, responses
from streamlearn.serve.waiting import Waiters
from streamlearn.state.files import Files
from streamlearn.state.publish import PublishedModel, listing, pin, unpin

log = structlog.get_logger()


class VersionSwitch:
    """Changes the folder, and replies once this server serves the version. One change at a time."""

    def __init__(self, predictor: Predictor, metrics: ServerMetrics, *, timeout_s: float, files: Files) -> None:
        self.published = predictor.published
        self._predictor, self._timeout_s, self._files = predictor, timeout_s, files
        self._waiters = Waiters(metrics, "another version", most=1)
        self._busy = False

    async def roll_back(self, version: int, request: Request) -> Response:
        """Pin a version, after checking that it can be served.

        Raises:
            RequestError: 404, 422 or 503, nothing changed; 503 `not_served_yet`, it is pinned, and this server still
                answers with another.
        """
        with self._alone():
            before = self._served_version()
            pinned = await run_in_threadpool(self._pin, version)
            log.warning("version_pinned", step=pinned.step, before_step=before, **_origin(request))
            return await self._reply(before, lambda held: held.pinned and held.identity == pinned.identity)

    async def promote(self, request: Request) -> Response:
        """Remove the pin.

        Raises:
            RequestError: 503, the folder cannot be written.
        """
        with self._alone():
            before = self._served_version()
            try:
                was_pinned = await run_in_threadpool(unpin, self.published.folder, self._files)
            except OSError as error:
                raise _not_writable(error) from error
            if was_pinned:
                log.warning("version_unpinned", before_step=before, **_origin(request))
            return await self._reply(before, lambda held: not held.pinned)

    def _pin(self, version: int) -> PublishedModel:
        versions = {model.step: model for model in self.published.versions()}
        if version not in versions:
            message = f"Version {version} does not exist, or no longer; GET /models lists the versions."
            raise RequestError(404, "unknown_version", message, details={"versions": sorted(versions)})
        try:
            self._predictor.check(versions[version])
            return pin(self.published.folder, version, self._files)
        except StateError as error:
            raise RequestError(422, "not_servable", f"Nothing was changed: {error}") from error
        except OSError as error:
            raise _not_writable(error) from error

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        if self._busy:
            raise overloaded("Another change of the served version is in progress")
        self._busy = True
        try:
            yield
        finally:
            self._busy = False

    def _served_version(self) -> int | None:
        try:
            return self._predictor.current().step
        except NotPublishedError:
            return None

    async def _reply(self, before: int | None, is_right: Callable[[LoadedModel], bool]) -> Response:
        def is_served() -> bool:
            return self._served_version() is not None and is_right(self._predictor.current())

        if not await self._waiters.until(is_served, self._timeout_s):
            known = "; ".join(self._predictor.notes()) or "its log has the reason"
            message = f"The folder is changed, but this server does not serve the version yet: {known}."
            raise retry_later(503, "not_served_yet", message)
        held = self._predictor.current()
        reply = {
            "model_version": held.step,
            "published_at": iso(held.published_at_s),
            "pinned": held.pinned,
            "newest_version": self._predictor.newest_version,
            "before": before,
        }
        return JsonReply(reply)


def add_admin_routes(router: APIRouter, switch: VersionSwitch, bodies: Bodies, *, clock: Callable[[], float]) -> None:
    """Add GET /models, POST /model/rollback and POST /model/promote. The edge requires the admin token."""

    @router.get(
        "/models",
        summary="Versions that can be served",
        response_model=VersionsReply,
        responses=responses(403, 500),
        tags=["admin"],
    )
    async def models() -> Response:
        """Newest first, each with the scores of its time."""
        versions = await run_in_threadpool(listing, switch.published, clock())
        return JsonReply({"versions": versions})

    @router.post(
        "/model/rollback",
        summary="Serve an older version",
        response_model=ServedReply,
        responses=responses(403, 404, 408, 413, 422, 429, 500, 503),
        openapi_extra=rollback_body(),
        tags=["admin"],
    )
    async def rollback(request: Request) -> Response:
        """Pins the version: it answers until `promote`, whatever is published. Learning continues."""
        async with bodies.read(request) as body:
            version = _version_of(body)
        return await switch.roll_back(version, request)

    @router.post(
        "/model/promote",
        summary="Serve the newest version again",
        response_model=ServedReply,
        responses=responses(403, 429, 500, 503),
        tags=["admin"],
    )
    async def promote(request: Request) -> Response:
        """Ends a rollback. Without one, nothing changes."""
        return await switch.promote(request)


def _version_of(body: bytes) -> int:
    try:
        return RollbackBody.model_validate_json(body).version
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"])) or "body"
        message = f'{place}: {first["msg"]}; expected an object such as {{"version": 1200}}.'
        raise RequestError(422, "invalid_body", message) from error


def _origin(request: Request) -> dict[str, Any]:
    """Fields of the audit line: which request, and from where."""
    return {
        "by": "http",
        "client": request.client.host if request.client else None,
        "request_id": request_id_of(request),
    }


def _not_writable(error: OSError) -> RequestError:
    message = f"The published folder cannot be written: {error.strerror or error}; GET /models shows its state."
    return retry_later(503, "not_writable", message)
