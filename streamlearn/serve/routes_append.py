"""POST /label, POST /sample, DELETE /sample/{id}: the reply comes after the records are durable in the log."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import structlog
from fastapi import APIRouter, Path, Query, Request
from starlette.responses import Response

from streamlearn.ledger.view import LedgerView
from streamlearn.log.codec import Codec
from streamlearn.serve.appender import Appender
from streamlearn.serve.bodies import Bodies, Item
from streamlearn.serve.failures import RequestError
from streamlearn.serve.predictor import Predictor
from streamlearn.serve.replies import JsonReply, error_object, request_id_of
from streamlearn.serve.request_schemas import label_body, sample_body
from streamlearn.serve.schemas import AppendReply, ErasedReply, responses

log = structlog.get_logger()
_STATUSES = (408, 413, 415, 422, 429, 500, 503)


@dataclass(frozen=True, slots=True)
class AppendFlow:
    """The steps that the three routes share."""

    samples_topic: str
    labels_topic: str
    codec: Codec
    bodies: Bodies
    appender: Appender
    predictor: Predictor
    ledger: LedgerView

    async def append(self, role: str, items: list[Item]) -> Response:
        """Append the valid items as "samples" or "labels", and reply to each item in its order."""
        records = [item.record for item in items if item.record is not None]
        if not records:
            raise _all_refused(items)
        topic = self.labels_topic if role == "labels" else self.samples_topic
        positions = iter(await self.appender.append(role, topic, records))
        replies = []
        for item in items:
            if item.error is not None:
                replies.append({"id": item.sample_id, "error": error_object(item.error)})
            else:
                position, state = next(positions)._asdict(), self._state(item.class_name)
                replies.append({"id": item.sample_id, "position": position, "state": state})
        return JsonReply({"items": replies}, status_code=202)

    def _state(self, class_name: str | None) -> str:
        """What will become of a label with this unknown class name, judged by the classes of the served teacher."""
        classes = self.predictor.classes
        if class_name is None or class_name in classes:
            return "accepted"
        return "new_class" if self.codec.grows and len(classes) < self.codec.schema.capacity else "held"

    async def erase(self, sample_id: str, request: Request) -> Response:
        """Append an erasure, and list where copies of the sample remain."""
        record = self.codec.encode_erasure(sample_id)
        (position,) = await self.appender.append("labels", self.labels_topic, [record])
        status = self.ledger.get(sample_id)
        at = None if status is None or status.sample_position is None else status.sample_position._asdict()
        client = request.client.host if request.client else None
        log.warning("sample_erased", position=str(position), client=client, request_id=request_id_of(request))
        reply = {"id": sample_id, "position": position._asdict(), "state": "accepted", "sample_position": at}
        return JsonReply({**reply, "still_held_by": _holders(self.samples_topic)}, status_code=202)


def add_append_routes(router: APIRouter, flow: AppendFlow) -> None:
    """Add the three routes."""
    _add_label_route(router, flow)
    _add_sample_route(router, flow)

    @router.delete(
        "/sample/{sample_id:path}",
        status_code=202,
        summary="Erase a sample",
        response_model=ErasedReply,
        responses=responses(403, 422, 429, 500, 503),
        tags=["admin"],
    )
    async def erase(
        request: Request,
        sample_id: Annotated[str, Path(description="The sample's id, percent-encoded.", examples=["invoice-7"])],
    ) -> Response:
        """Erases payload, example and labels of a sample, and refuses records of its id within labels.horizon_s.

        202 once the order is durable in the log. After the learner has read it, `GET /label/{id}` reports `erased`.
        """
        return await flow.erase(sample_id, request)


def _add_label_route(router: APIRouter, flow: AppendFlow) -> None:
    bodies, codec = flow.bodies, flow.codec

    @router.post(
        "/label",
        status_code=202,
        summary="Give samples their labels",
        response_model=AppendReply,
        responses=responses(*_STATUSES),
        openapi_extra=label_body(codec.schema, most=bodies.max_items, any_name=codec.takes_any_name),
        tags=["learn"],
    )
    async def label(request: Request) -> Response:
        """Labels may arrive late, early, twice, corrected or retracted (`"label": null`).

        202 once the valid ones are durable; 422 if none is valid.
        """
        async with bodies.read(request) as body:
            content_type = request.headers.get("content-type", "")
            items = await bodies.decoded(len(body), lambda: bodies.labels(body, content_type))
            return await flow.append("labels", items)


def _add_sample_route(router: APIRouter, flow: AppendFlow) -> None:
    bodies, codec = flow.bodies, flow.codec

    @router.post(
        "/sample",
        status_code=202,
        summary="Send samples to learn from",
        response_model=AppendReply,
        responses=responses(*_STATUSES),
        openapi_extra=sample_body(codec.schema, most=bodies.max_items, any_name=codec.takes_any_name),
        tags=["learn"],
    )
    async def sample(
        request: Request,
        name: Annotated[
            list[str] | None, Query(alias="id", description="Of a binary body's samples, one for each.")
        ] = None,
    ) -> Response:
        """Samples without an id get one. 202 once the valid ones are durable; 422 if none is valid."""
        async with bodies.read(request) as body:
            content_type = request.headers.get("content-type", "")
            items = await bodies.decoded(len(body), lambda: bodies.samples(body, content_type, name or []))
            return await flow.append("samples", items)


def _holders(samples_topic: str) -> list[dict[str, str]]:
    """Where copies of an erased sample remain, and until when."""
    return [
        {"holder": f"topic {samples_topic}", "until": "retention, or you, remove the record at sample_position"},
        {"holder": "checkpoints", "until": "state.keep_checkpoints newer ones are saved"},
        {"holder": "sample store", "until": "no checkpoint older than the erasure is left; then it is overwritten"},
        {"holder": "free pages of the sample store's file", "until": "SQLite reuses them"},
        {"holder": "weights", "until": "the network is trained from scratch: what it has learned is not unlearned"},
    ]


def _all_refused(items: list[Item]) -> RequestError:
    """The error of a single item, or one error with all of them as details."""
    errors = [item.error for item in items if item.error is not None]
    if len(errors) == 1:
        return errors[0]
    details = [{"id": item.sample_id, "error": error_object(item.error)} for item in items if item.error is not None]
    message = f"None of {len(items)} items is valid; the first: {errors[0].message}"
    return RequestError(422, "all_refused", message, details=details)
