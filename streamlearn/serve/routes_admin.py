"""Which version is served, changed by an operator: list the versions, roll back to one, return to the newest.

The routes change the published folder as `streamlearn models list`, `pin` and `unpin` do, so all servers that follow
the folder change. The learner is not affected.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import structlog
from fastapi import APIRouter, Request
from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from streamlearn.errors import StateError
from streamlearn.serve.failures import RequestError, overloaded, retry_later
from streamlearn.serve.parts import Parts
from streamlearn.serve.predictor import LoadedModel
from streamlearn.serve.replies import JsonReply, iso, origin_of
from streamlearn.serve.request_schemas import rollback_body
from streamlearn.serve.schemas import RollbackBody, ServedReply, VersionsReply, described
from streamlearn.serve.waiting import Waiters
from streamlearn.state.publish import PublishedModel, listing, pin, unpin

log = structlog.get_logger()


class VersionSwitch:
    """Changes the folder, and replies once this server serves the version. One change at a time."""

    def __init__(self, parts: Parts) -> None:
        self._parts, self._predictor = parts, parts.predictor
        self._waiters = Waiters(parts.metrics, "another version", most=1)
        self._busy = False

    def pin(self, version: int) -> PublishedModel:
        """Pin a version, after checking that it can be served.

        Raises:
            RequestError: 404 or 422, nothing changed.
            OSError: the folder cannot be written.
        """
        published = self._predictor.published
        versions = {model.step: model for model in published.versions()}
        if version not in versions:
            message = f"Version {version} does not exist, or no longer; GET /models lists the versions."
            raise RequestError(404, "unknown_version", message, details={"versions": sorted(versions)})
        try:
            self._predictor.load(versions[version])
            return pin(published.folder, version, self._parts.files)
        except StateError as error:
            raise RequestError(422, "not_servable", f"Nothing was changed: {error}") from error

    @contextlib.contextmanager
    def change(self) -> Iterator[int | None]:
        """Yield the version that answers before the change. One change at a time.

        Raises:
            RequestError: 429, another change is in progress; 503, the folder cannot be written.
        """
        if self._busy:
            raise overloaded("Another change of the served version is in progress")
        self._busy = True
        try:
            yield self._predictor.version
        except OSError as error:
            message = f"The published folder cannot be written: {error.strerror or error}; GET /models shows its state."
            raise retry_later(503, "not_writable", message) from error
        finally:
            self._busy = False

    async def reply(self, before: int | None, is_right: Callable[[LoadedModel], bool]) -> Response:
        """Reply once this server answers with the right version.

        Raises:
            RequestError: 503 `not_served_yet`, the folder is changed, and this server still answers with another.
        """

        def is_served() -> bool:
            held = self._predictor.model
            return held is not None and is_right(held)

        if not await self._waiters.until(is_served, self._parts.settings.timeout_s):
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


def add_admin_routes(router: APIRouter, parts: Parts) -> None:
    """Add GET /models, POST /model/rollback and POST /model/promote. The edge requires the admin token."""
    switch = VersionSwitch(parts)

    @router.get(
        "/models",
        summary="Versions that can be served",
        **described("admin", VersionsReply, 403, 500),
    )
    async def models() -> Response:
        """Newest first, each with the scores of its time."""
        versions = await run_in_threadpool(listing, parts.predictor.published, parts.clock())
        return JsonReply({"versions": versions})

    @router.post(
        "/model/rollback",
        summary="Serve an older version",
        openapi_extra=rollback_body(),
        **described("admin", ServedReply, 403, 404, 408, 413, 422, 429, 500, 503),
    )
    async def rollback(request: Request) -> Response:
        """Pins the version: it answers until `promote`, whatever is published. Learning continues."""
        async with parts.bodies.held.read(request) as body:
            version = _version_of(body)
        with switch.change() as before:
            pinned = await run_in_threadpool(switch.pin, version)
            log.warning("version_pinned", step=pinned.step, before_step=before, by="http", **origin_of(request))
            return await switch.reply(before, lambda held: held.pinned and held.identity == pinned.identity)

    @router.post(
        "/model/promote",
        summary="Serve the newest version again",
        **described("admin", ServedReply, 403, 429, 500, 503),
    )
    async def promote(request: Request) -> Response:
        """Ends a rollback. Without one, nothing changes."""
        with switch.change() as before:
            if await run_in_threadpool(unpin, parts.predictor.published.folder, parts.files):
                log.warning("version_unpinned", before_step=before, by="http", **origin_of(request))
            return await switch.reply(before, lambda held: not held.pinned)


def _version_of(body: bytes) -> int:
    try:
        return RollbackBody.model_validate_json(body).version
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"])) or "body"
        message = f'{place}: {first["msg"]}; expected an object such as {{"version": 1200}}.'
        raise RequestError(422, "invalid_body", message) from error
