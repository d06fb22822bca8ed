"""POST /label, POST /sample, DELETE /sample/{id}: the reply comes after the records are durable in the log."""

from __future__ import annotations

from typing import Annotated, Any

import structlog
from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from streamlearn.serve.bodies import Item
from streamlearn.serve.failures import RequestError
from streamlearn.serve.parts import Parts
from streamlearn.serve.replies import JsonReply, error_object, origin_of
from streamlearn.serve.request_schemas import label_body, sample_body
from streamlearn.serve.schemas import AppendReply, BinaryParameters, ErasedReply, SampleId, described

log = structlog.get_logger()
_ERRORS = (408, 413, 415, 422, 429, 500, 503)


def add_append_routes(router: APIRouter, parts: Parts) -> None:
    """Add the three routes."""
    bodies, codec = parts.bodies, parts.codec

    @router.post(
        "/label",
        status_code=202,
        summary="Give samples their labels",
        openapi_extra=label_body(codec, most=parts.max_items),
        **described("learn", AppendReply, *_ERRORS),
    )
    async def label(request: Request) -> Response:
        """Labels may arrive late, early, twice, corrected or retracted (`"label": null`).

        202 once the valid ones are durable; 422 if none is valid.
        """
        async with bodies.read_as(request, bodies.labels) as items:
            return await _append(parts, "labels", parts.labels_topic, items)

    @router.post(
        "/sample",
        status_code=202,
        summary="Send samples to learn from",
        openapi_extra=sample_body(codec, most=parts.max_items),
        **described("learn", AppendReply, *_ERRORS),
    )
    async def sample(request: Request, query: Annotated[BinaryParameters, Query()]) -> Response:
        """Samples without an id get one. 202 once the valid ones are durable; 422 if none is valid."""
        async with bodies.read_as(request, lambda body, kind: bodies.samples(body, kind, query.id)) as items:
            return await _append(parts, "samples", parts.samples_topic, items)

    @router.delete(
        "/sample/{sample_id:id}",
        status_code=202,
        summary="Erase a sample",
        **described("admin", ErasedReply, 403, 422, 429, 500, 503),
    )
    async def erase(request: Request, sample_id: SampleId) -> Response:
        """Erases payload, example and labels of a sample, and refuses records of its id within labels.horizon_s.

        202 once the order is durable in the log. After the learner has read it, `GET /label/{id}` reports `erased`.
        """
        (position,) = await parts.appender.append(
            "labels", parts.labels_topic, [codec.labels.encode_erasure(sample_id)]
        )
        status = parts.ledger.get(sample_id)
        log.warning("sample_erased", position=str(position), **origin_of(request))
        reply = {
            "id": sample_id,
            "position": position,
            "state": "accepted",
            "sample_position": None if status is None else status.sample_position,
            "still_held_by": _holders(parts.samples_topic),
        }
        return JsonReply(reply, status_code=202)


async def _append(parts: Parts, role: str, topic: str, items: list[Item]) -> Response:
    """Append the valid items as "samples" or "labels", and reply to each item in its order."""
    records = [item.record for item in items if item.record is not None]
    if not records:
        raise _all_refused(items)
    positions = iter(await parts.appender.append(role, topic, records))
    replies: list[dict[str, Any]] = []
    for item in items:
        if item.error is not None:
            replies.append({"id": item.sample_id, "error": error_object(item.error)})
        else:
            state = _state(parts, item.class_name)
            replies.append({"id": item.sample_id, "position": next(positions), "state": state})
    return JsonReply({"items": replies}, status_code=202)


def _state(parts: Parts, class_name: str | None) -> str:
    """What will become of a label with this unknown class name, judged by the classes of the served teacher."""
    classes = parts.predictor.classes
    if class_name is None or class_name in classes:
        return "accepted"
    return "new_class" if parts.codec.grows and len(classes) < parts.codec.schema.capacity else "held"


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
