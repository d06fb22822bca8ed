"""POST /label, POST /sample, DELETE /sample/{id}: records that are durable in the log before the reply."""

from __future__ import annotations

from typing import Annotated

import structlog
from fastapi import APIRouter, Path, Query, Request
from starlette.responses import Response

from streamlearn.serve.appender import Appender
from streamlearn.serve.bodies import Bodies, Item
from streamlearn.serve.failures import RequestError
from streamlearn.serve.parts import ServerParts, ServeSettings
from streamlearn.serve.replies import JsonReply, error_object, request_id_of
from streamlearn.serve.schemas import AppendReply, ErasedReply, label_body, responses, sample_body

log = structlog.get_logger()
_STATUSES = (408, 413, 415, 422, 429, 500, 503)


def add_append_routes(
    router: APIRouter, parts: ServerParts, settings: ServeSettings, *, bodies: Bodies, inlet: Appender
) -> None:
    """Add the three routes."""
    most = settings.max_instances

    @router.post(
        "/label",
        status_code=202,
        summary="Say what samples were",
        response_model=AppendReply,
        responses=responses(*_STATUSES),
        openapi_extra=label_body(parts.schema, most=most, any_name=parts.codec.takes_any_name),
        tags=["learn"],
    )
    async def label(request: Request) -> Response:
        """Labels may come late, early, twice, corrected or retracted (`"label": null`).

        202 once the good ones are durable; 422 if none is.
        """
        async with bodies.read(request) as body:
            content_type = request.headers.get("content-type", "")
            items = await bodies.decoded(len(body), lambda: bodies.labels(body, content_type))
            return await _append(inlet, "labels", settings.labels_topic, items, parts)

    @router.post(
        "/sample",
        status_code=202,
        summary="Hand in samples to learn from",
        response_model=AppendReply,
        responses=responses(*_STATUSES),
        openapi_extra=sample_body(parts.schema, most=most, any_name=parts.codec.takes_any_name),
        tags=["learn"],
    )
    async def sample(
        request: Request,
        name: Annotated[
            list[str] | None, Query(alias="id", description="Of a binary body's samples, one for each.")
        ] = None,
    ) -> Response:
        """Samples without an id get one. 202 once the good ones are durable; 422 if none is."""
        async with bodies.read(request) as body:
            content_type = request.headers.get("content-type", "")
            items = await bodies.decoded(len(body), lambda: bodies.samples(body, content_type, name or []))
            return await _append(inlet, "samples", settings.samples_topic, items, parts)

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
        """Erases payload, example and labels of a sample, and refuses what comes for this id within labels.horizon_s.

        202 once the order is durable in the log; the learner follows it, and `GET /label/{id}` then says `erased`.
        """
        record = parts.codec.encode_erasure(sample_id)
        (position,) = await inlet.append("labels", settings.labels_topic, [record])
        status = parts.ledger.get(sample_id)
        at = None if status is None or status.sample_position is None else status.sample_position._asdict()
        client = request.client.host if request.client else None
        log.warning("sample_erased", position=str(position), client=client, request_id=request_id_of(request))
        told = {"id": sample_id, "position": position._asdict(), "state": "accepted", "sample_position": at}
        return JsonReply({**told, "still_held_by": _holders(settings)}, status_code=202)


def _holders(settings: ServeSettings) -> list[dict[str, str]]:
    """Where copies of an erased sample stay for a while, and until when."""
    return [
        {
            "holder": f"topic {settings.samples_topic}",
            "until": "retention, or you, remove the record at sample_position",
        },
        {"holder": "checkpoints", "until": "state.keep_checkpoints newer ones are saved"},
        {"holder": "sample store", "until": "no checkpoint from before the erasure is left; then it is overwritten"},
        {"holder": "free pages of the sample store's file", "until": "they are used again"},
        {"holder": "weights", "until": "the network is trained from scratch: what it has learned is not unlearned"},
    ]


async def _append(inlet: Appender, role: str, topic: str, items: list[Item], parts: ServerParts) -> Response:
    """Append the good items, and tell of each in the order it came."""
    records = [item.record for item in items if item.record is not None]
    if not records:
        raise _all_bad(items)
    positions = iter(await inlet.append(role, topic, records))
    told = []
    for item in items:
        if item.error is not None:
            told.append({"id": item.sample_id, "error": error_object(item.error)})
        else:
            state = _state(item.class_name, parts)
            told.append({"id": item.sample_id, "position": next(positions)._asdict(), "state": state})
    return JsonReply({"items": told}, status_code=202)


def _state(class_name: str | None, parts: ServerParts) -> str:
    """What will become of a label of this unknown name, as far as a server knows: by the classes of its teacher."""
    classes, codec = parts.predictor.classes, parts.codec
    if class_name is None or class_name in classes:
        return "accepted"
    return "new_class" if codec.grows and len(classes) < codec.schema.capacity else "held"


def _all_bad(items: list[Item]) -> RequestError:
    """One bad item is its own error; several are told one by one."""
    errors = [item.error for item in items if item.error is not None]
    if len(errors) == 1:
        return errors[0]
    details = [{"id": item.sample_id, "error": error_object(item.error)} for item in items if item.error is not None]
    message = f"None of {len(items)} items is good; the first: {errors[0].message}"
    return RequestError(422, "all_refused", message, details=details)
