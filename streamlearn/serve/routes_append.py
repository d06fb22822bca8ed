"""POST /label, POST /sample, DELETE /sample/{id}: the reply comes after the records are durable in the log."""

from __future__ import annotations

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


def add_append_routes(
    router: APIRouter,
    *,
    samples_topic: str,
    labels_topic: str,
    codec: Codec,
    bodies: Bodies,
    appender: Appender,
    predictor: Predictor,
    ledger: LedgerView,
) -> None:
    """Add the three routes."""
    most, any_name = bodies.max_items, codec.takes_any_name

    async def append(role: str, topic: str, items: list[Item]) -> Response:
        """Append the valid items, and reply to each item in its order."""
        records = [item.record for item in items if item.record is not None]
        if not records:
            raise _all_refused(items)
        positions = iter(await appender.append(role, topic, records))
        replies = []
        for item in items:
            if item.error is not None:
                replies.append({"id": item.sample_id, "error": error_object(item.error)})
            else:
                state = _state(item.class_name, predictor, codec)
                replies.append({"id": item.sample_id, "position": next(positions)._asdict(), "state": state})
        return JsonReply({"items": replies}, status_code=202)

    @router.post(
        "/label",
        status_code=202,
        summary="Give samples their labels",
        response_model=AppendReply,
        responses=responses(*_STATUSES),
        openapi_extra=label_body(codec.schema, most=most, any_name=any_name),
        tags=["learn"],
    )
    async def label(request: Request) -> Response:
        """Labels may arrive late, early, twice, corrected or retracted (`"label": null`).

        202 once the valid ones are durable; 422 if none is valid.
        """
        async with bodies.read(request) as body:
            content_type = request.headers.get("content-type", "")
            items = await bodies.decoded(len(body), lambda: bodies.labels(body, content_type))
            return await append("labels", labels_topic, items)

    @router.post(
        "/sample",
        status_code=202,
        summary="Send samples to learn from",
        response_model=AppendReply,
        responses=responses(*_STATUSES),
        openapi_extra=sample_body(codec.schema, most=most, any_name=any_name),
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
            return await append("samples", samples_topic, items)

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
        record = codec.encode_erasure(sample_id)
        (position,) = await appender.append("labels", labels_topic, [record])
        status = ledger.get(sample_id)
        at = None if status is None or status.sample_position is None else status.sample_position._asdict()
        client = request.client.host if request.client else None
        log.warning("sample_erased", position=str(position), client=client, request_id=request_id_of(request))
        reply = {"id": sample_id, "position": position._asdict(), "state": "accepted", "sample_position": at}
        return JsonReply({**reply, "still_held_by": _holders(samples_topic)}, status_code=202)


def _holders(samples_topic: str) -> list[dict[str, str]]:
    """Where copies of an erased sample remain, and until when."""
    return [
        {"holder": f"topic {samples_topic}", "until": "retention, or you, remove the record at sample_position"},
        {"holder": "checkpoints", "until": "state.keep_checkpoints newer ones are saved"},
        {"holder": "sample store", "until": "no checkpoint older than the erasure is left; then it is overwritten"},
        {"holder": "free pages of the sample store's file", "until": "SQLite reuses them"},
        {"holder": "weights", "until": "the network is trained from scratch: what it has learned is not unlearned"},
    ]


def _state(class_name: str | None, predictor: Predictor, codec: Codec) -> str:
    """What will become of a label with this unknown class name, judged by the classes of the served teacher."""
    if class_name is None or class_name in predictor.classes:
        return "accepted"
    return "new_class" if codec.grows and len(predictor.classes) < codec.schema.capacity else "held"


def _all_refused(items: list[Item]) -> RequestError:
    """The error of a single item, or one error with all of them as details."""
    errors = [item.error for item in items if item.error is not None]
    if len(errors) == 1:
        return errors[0]
    details = [{"id": item.sample_id, "error": error_object(item.error)} for item in items if item.error is not None]
    message = f"None of {len(items)} items is valid; the first: {errors[0].message}"
    return RequestError(422, "all_refused", message, details=details)
