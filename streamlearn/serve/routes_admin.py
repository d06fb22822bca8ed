"""What is served, changed by an operator: list the versions, roll back to one, return to the newest.

Each does to the published folder what `streamlearn models`, `rollback` and `promote` do, so every server that follows
the folder does as this one. The learner is not asked and learns on.
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
from streamlearn.serve.bodies import Bodies
from streamlearn.serve.failures import RequestError, overloaded, retry_later
from streamlearn.serve.parts import ServerParts, ServeSettings
from streamlearn.serve.predictor import LoadedModel
from streamlearn.serve.replies import JsonReply, iso, request_id_of
from streamlearn.serve.schemas import RollbackBody, ServedReply, VersionsReply, responses, rollback_body
from streamlearn.serve.waiting import Waiters
from streamlearn.state.publish import PublishedModel, listing, pin, unpin

log = structlog.get_logger()


def add_admin_routes(router: APIRouter, parts: ServerParts, settings: ServeSettings, *, bodies: Bodies) -> None:
    """Add GET /models, POST /model/rollback and POST /model/promote. The edge asks for the admin token."""
    admin = _Admin(parts, settings)

    @router.get(
        "/models",
        summary="Versions that can be served",
        response_model=VersionsReply,
        responses=responses(403, 500),
        tags=["admin"],
    )
    async def models() -> Response:
        """Newest first, each with the scores of its time."""
        versions = await run_in_threadpool(listing, parts.predictor.published, parts.clock())
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
        """Pins the version: it answers, whatever is published, until `promote`. Learning goes on."""
        async with bodies.read(request) as body:
            version = _version_in(body)
        return await admin.roll_back(version, request)

    @router.post(
        "/model/promote",
        summary="Serve the newest version again",
        response_model=ServedReply,
        responses=responses(403, 429, 500, 503),
        tags=["admin"],
    )
    async def promote(request: Request) -> Response:
        """Ends a rollback; where none stands, nothing changes."""
        return await admin.promote(request)


def _version_in(body: bytes) -> int:
    try:
        return RollbackBody.model_validate_json(body).version
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"])) or "body"
        message = f'{place}: {first["msg"]}; expected an object such as {{"version": 1200}}.'
        raise RequestError(422, "invalid_body", message) from error


class _Admin:
    """Changes the folder, and answers once this server serves what it is to serve. One change at a time."""

    def __init__(self, parts: ServerParts, settings: ServeSettings) -> None:
        self._predictor, self._clock, self._timeout_s = parts.predictor, parts.clock, settings.timeout_s
        self._folder, self._files = parts.predictor.published.folder, parts.files
        self._waiters = Waiters(parts.metrics, "another version", most=1)
        self._busy = False

    async def roll_back(self, version: int, request: Request) -> Response:
        """Pin a version, once it has shown that it can be served.

        Raises:
            RequestError: 404, 422 or 503 with nothing changed; 503 `not_served_yet` where it is pinned, and this server
                still answers with another.
        """
        with self._alone():
            before = self._held_version()
            pinned = await run_in_threadpool(self._pin, version)
            log.warning("version_pinned", step=pinned.step, before_step=before, **_who(request))
            return await self._answer(before, lambda held: held.pinned and held.identity == pinned.identity)

    async def promote(self, request: Request) -> Response:
        """Remove the pin.

        Raises:
            RequestError: 503, the folder cannot be written.
        """
        with self._alone():
            before = self._held_version()
            try:
                was_pinned = await run_in_threadpool(unpin, self._folder, self._files)
            except OSError as error:
                raise _not_writable(error) from error
            if was_pinned:
                log.warning("version_unpinned", before_step=before, **_who(request))
            return await self._answer(before, lambda held: not held.pinned)

    def _pin(self, version: int) -> PublishedModel:
        versions = {model.step: model for model in self._predictor.published.versions()}
        if version not in versions:
            message = f"Version {version} is not there, or not any more; GET /models lists what is."
            raise RequestError(404, "unknown_version", message, details={"versions": sorted(versions)})
        try:
            self._predictor.check(versions[version])
            return pin(self._folder, version, self._files)
        except StateError as error:
            raise RequestError(422, "not_servable", f"Nothing was changed: {error}") from error
        except OSError as error:
            raise _not_writable(error) from error

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        if self._busy:
            raise overloaded("Another change of what is served is under way")
        self._busy = True
        try:
            yield
        finally:
            self._busy = False

    def _held_version(self) -> int | None:
        try:
            return self._predictor.current().step
        except NotPublishedError:
            return None

    async def _answer(self, before: int | None, is_right: Callable[[LoadedModel], bool]) -> Response:
        def is_served() -> bool:
            return self._held_version() is not None and is_right(self._predictor.current())

        if not await self._waiters.until(is_served, self._timeout_s):
            known = "; ".join(self._predictor.notes()) or "its log says why"
            message = f"It is done, but this server does not serve what it should yet: {known}."
            raise retry_later(503, "not_served_yet", message)
        held = self._predictor.current()
        told = {
            "model_version": held.step,
            "published_at": iso(held.published_at_s),
            "pinned": held.pinned,
            "newest_version": self._predictor.newest_version,
            "before": before,
        }
        return JsonReply(told)


def _who(request: Request) -> dict[str, Any]:
    """For the audit line: which request, from where."""
    return {
        "by": "http",
        "client": request.client.host if request.client else None,
        "request_id": request_id_of(request),
    }


def _not_writable(error: OSError) -> RequestError:
    message = (
        f"The published folder cannot be written from here: {error.strerror or error}; GET /models shows how it is."
    )
    return retry_later(503, "not_writable", message)
