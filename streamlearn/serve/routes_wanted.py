"""GET /label/wanted and GET /sample/{id}: which samples to label next, and what they look like.

`/label/wanted` is a GET that hands out: what it returns, it returns to nobody else for a while. It carries
`Cache-Control: no-store`, and `peek` looks without taking. A reply that is lost on its way costs its samples a wait, no
more: they come again after a day (`request_queue.AGAIN_AFTER_S`), and may be labelled at any time.

The label of a sample whose id is "wanted" cannot be looked up.
"""

from __future__ import annotations

from typing import Annotated, Any
from urllib.parse import quote

from fastapi import APIRouter, Path, Query
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from streamlearn.errors import StoreError
from streamlearn.ledger.request_queue import LabelRequest
from streamlearn.serve.failures import RequestError, retry_later
from streamlearn.serve.parts import ServerParts
from streamlearn.serve.replies import JsonReply
from streamlearn.serve.schemas import SampleReply, WantedReply, responses

MOST = 1000
"""Samples handed out at once."""
_NO_STORE = {"cache-control": "no-store"}


def add_wanted_routes(router: APIRouter, parts: ServerParts) -> None:
    """Add the two routes. They must stand before /label/{id}, whose path would match any."""

    @router.get(
        "/label/wanted",
        summary="Take samples whose label would help most",
        response_model=WantedReply,
        responses=responses(404, 422, 500, 503),
        tags=["learn"],
    )
    async def wanted(
        *,
        n: Annotated[int, Query(ge=1, le=MOST, description="How many, at most.")] = 10,
        peek: Annotated[bool, Query(description="Look, and take none: others may be given the same.")] = False,
    ) -> Response:
        """Unsure and common samples first, of all predicted classes; none twice, none past the hour's budget."""
        queue = parts.wanted
        if queue is None:
            raise RequestError(404, "wanted_off", "This server hands out no samples: labels.requests_per_hour is 0.")
        try:
            # The file may wait for another process; the event loop must not.
            given = await run_in_threadpool(queue.take, n, parts.clock(), peek=peek)
        except StoreError as error:
            raise retry_later(503, "wanted_unavailable", f"{error}.") from error
        items = [_item(one, parts.predictor.classes) for one in given.items]
        return JsonReply({"items": items, "budget_left": given.budget_left}, headers=_NO_STORE)

    @router.get(
        "/sample/{sample_id:path}",
        summary="A sample as it is stored",
        response_model=SampleReply,
        responses=responses(404, 422, 500, 503),
        tags=["learn"],
    )
    async def sample(
        sample_id: Annotated[str, Path(description="The sample's id, percent-encoded.", examples=["invoice-7"])],
    ) -> Response:
        """What whoever labels it wants to see: the numbers, before any scaling, and where they stand in the log."""
        status, x = parts.ledger.get(sample_id), parts.ledger.payload(sample_id)
        details = {"id": sample_id[:512]}
        if status is None or status.sample_position is None:
            message = "No sample of this id is known: not read by the learner yet, or forgotten."
            raise RequestError(404, "unknown_sample", message, details=details)
        position = status.sample_position._asdict()
        if x is None:
            message = "The sample is known, its payload is no longer kept; the log may still have it at its position."
            raise RequestError(404, "payload_gone", message, details=details | {"position": position})
        return JsonReply({"id": sample_id, "x": x.tolist(), "position": position, "time_s": status.sample_time_s})


def _item(wanted: LabelRequest, classes: tuple[str, ...]) -> dict[str, Any]:
    known = wanted.predicted_class < len(classes)
    return {
        "id": wanted.sample_id,
        "predicted_class": classes[wanted.predicted_class] if known else None,
        "utility": round(wanted.utility, 6),
        "entropy": round(wanted.entropy, 6),
        "disagreement": round(wanted.disagreement, 6),
        "position": wanted.position._asdict(),
        "time_s": wanted.offered_at_s,
        "payload": f"/sample/{quote(wanted.sample_id, safe='')}",
    }
