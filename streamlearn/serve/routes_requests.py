"""GET /label/requests and GET /sample/{id}: which samples to label next, and their content.

`/label/requests` reads the active-learning queue. It is a GET that takes: a sample that it returns is not returned to
others for a long time (see `ledger.request_queue`). `Cache-Control: no-store` keeps caches from repeating it, and
`peek` takes nothing. If a reply is lost, its samples are handed out later; they may be labelled at any time.

The label of a sample whose id is "requests" or "wanted" cannot be looked up.
"""

from __future__ import annotations

from typing import Annotated, Any
from urllib.parse import quote

from fastapi import APIRouter, Query
from pydantic import Field
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from streamlearn.errors import StoreError
from streamlearn.ledger.request_queue import LabelRequest
from streamlearn.serve.failures import RequestError, retry_later
from streamlearn.serve.parts import Parts
from streamlearn.serve.predictor import Predictor
from streamlearn.serve.replies import JsonReply
from streamlearn.serve.schemas import Parameters, RequestsReply, SampleId, SampleReply, described

MOST = 1000
"""Samples handed out at once."""
_NO_STORE = {"cache-control": "no-store"}


class TakeParameters(Parameters):
    """Parameters of GET /label/requests."""

    n: int = Field(10, ge=1, le=MOST)
    """How many, at most."""
    peek: bool = False
    """Show samples without taking them: others may get the same."""


def add_request_routes(router: APIRouter, parts: Parts) -> None:
    """Add the routes. They must be added before /label/{id}, whose path matches any."""
    requests, ledger = parts.requests, parts.ledger

    @router.get(
        "/label/requests",
        summary="Take samples whose label would help most",
        **described("learn", RequestsReply, 404, 422, 500, 503),
    )
    async def take(query: Annotated[TakeParameters, Query()]) -> Response:
        """Uncertain and common samples first, of all predicted classes; none twice, none past the hourly budget."""
        if requests is None:
            raise RequestError(404, "label_requests_off", "This server hands out no samples: active learning is off.")
        try:
            # The file may wait for another process; the event loop must not.
            taken = await run_in_threadpool(requests.take, query.n, parts.clock(), peek=query.peek)
        except StoreError as error:
            raise retry_later(503, "label_requests_unavailable", f"{error}.") from error
        items = [_item(one, parts.predictor) for one in taken.items]
        return JsonReply({"items": items, "budget_left": taken.budget_left}, headers=_NO_STORE)

    @router.get("/label/wanted", include_in_schema=False)
    async def moved() -> Response:
        """The path of earlier versions."""
        raise RequestError(404, "not_found", "GET /label/wanted is now GET /label/requests.")

    @router.get(
        "/sample/{sample_id:id}",
        summary="A sample as it is stored",
        **described("learn", SampleReply, 404, 422, 500, 503),
    )
    async def sample(sample_id: SampleId) -> Response:
        """For annotators: the values before any scaling, and the position in the log."""
        status, x = ledger.get(sample_id), ledger.payload(sample_id)
        details = {"id": sample_id[:512]}
        if status is None or status.sample_position is None:
            message = "No sample of this id is known: the learner has not read it yet, or it is past the horizon."
            raise RequestError(404, "unknown_sample", message, details=details)
        position = status.sample_position
        if x is None:
            message = "The sample is known, but its payload is evicted; the log may still have it at its position."
            raise RequestError(404, "payload_gone", message, details=details | {"position": position})
        reply = {"id": sample_id, "x": x.tolist(), "position": position, "time_s": status.sample_time_s}
        if (rows := parts.codec.rows) is not None:
            reply["fields"] = rows.values(x)
        return JsonReply(reply)


def _item(request: LabelRequest, predictor: Predictor) -> dict[str, Any]:
    return {
        "id": request.sample_id,
        "predicted_class": predictor.class_name(request.predicted_class),
        "utility": round(request.utility, 6),
        "entropy": round(request.entropy, 6),
        "disagreement": round(request.disagreement, 6),
        "position": request.position,
        "time_s": request.offered_at_s,
        "payload": f"/sample/{quote(request.sample_id, safe='')}",
    }
