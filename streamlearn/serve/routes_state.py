"""GET routes: the model, one label's life, metrics, and health. They read; they change nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query
from starlette.responses import Response

from streamlearn.errors import NotPublishedError
from streamlearn.labels import LabelStatus
from streamlearn.metrics import CONTENT_TYPE
from streamlearn.serve.failures import RequestError
from streamlearn.serve.parts import ServerParts, ServeSettings
from streamlearn.serve.replies import JsonReply, iso
from streamlearn.serve.schemas import LabelReply, LiveReply, ModelReply, ReadyReply, responses
from streamlearn.serve.scrape import merged

_LINKS = {
    "docs": "/docs",
    "openapi": "/openapi.json",
    "predict": "/predict",
    "label": "/label",
    "sample": "/sample",
    "model": "/model",
    "live": "/health/live",
    "ready": "/health/ready",
    "metrics": "/metrics",
}


def add_state_routes(router: APIRouter, parts: ServerParts, settings: ServeSettings) -> None:
    """Add /, /model, /label/{id} and /metrics."""

    @router.get("/", include_in_schema=False)
    async def index() -> Response:
        """Where to go from here."""
        return JsonReply({"name": "streamlearn", "version": settings.version, "links": _LINKS})

    @router.get(
        "/model",
        summary="The teacher that answers, and its learner",
        response_model=ModelReply,
        responses=responses(500, 503),
        tags=["predict"],
    )
    async def model() -> Response:
        """Version and age of the teacher, what it takes, and the learner's last heartbeat."""
        held = parts.predictor.current()
        now_s = parts.clock()
        status = parts.learner_status()
        told = {
            "model_version": held.step,
            "published_at": iso(held.published_at_s),
            "age_s": round(max(0.0, now_s - held.published_at_s), 3),
            "factory": held.spec.factory,
            "classes": parts.schema.classes,
            "shape": parts.schema.shape,
            "dtype": parts.schema.dtype.name,
            "learner": status,
            "learner_seen_s": _seen_s(status, now_s),
        }
        return JsonReply(told)

    @router.get(
        "/label/{sample_id:path}",
        summary="What became of a label",
        response_model=LabelReply,
        responses=responses(404, 422, 500),
        tags=["learn"],
    )
    async def label(
        sample_id: Annotated[str, Path(description="The sample's id, percent-encoded.", examples=["invoice-7"])],
    ) -> Response:
        """State, times, the prediction that it scored, and whether the served teacher has learned it."""
        status = parts.ledger.get(sample_id)
        if status is None:
            message = "Neither a sample nor a label of this id is known: not read by the learner yet, or forgotten."
            raise RequestError(404, "unknown_sample", message, details={"id": sample_id[:512]})
        return JsonReply(_label(sample_id, status, parts))

    @router.get(
        "/metrics",
        summary="Metrics of all processes, for Prometheus",
        responses={200: {"content": {"text/plain": {"example": "# TYPE streamlearn_steps_total counter\n"}}}},
        response_class=Response,
        tags=["health"],
    )
    async def metrics() -> Response:
        """This process's metrics and its siblings', each labelled with its process."""
        text = await merged(settings.name, parts.metrics, parts.siblings())
        return Response(text, headers={"content-type": CONTENT_TYPE})


def add_health_routes(router: APIRouter, parts: ServerParts, settings: ServeSettings) -> None:
    """Add /health/live and /health/ready, which want no token."""

    @router.get("/health/live", summary="Does the process run?", response_model=LiveReply, tags=["health"])
    async def live() -> Response:
        """Always 200: restart the process where this does not answer."""
        return JsonReply({"live": True})

    @router.get(
        "/health/ready",
        summary="Can predictions be had, from a model that still learns?",
        response_model=ReadyReply,
        responses={503: {"model": ReadyReply, "description": "Not ready; the reasons say why."}, **responses(422)},
        tags=["health"],
    )
    async def ready(
        require_learner: Annotated[
            bool, Query(description="False: a model is enough, so that a dead learner does not take serving away.")
        ] = True,
    ) -> Response:
        """503 before the first model, and while the learner is not seen for too long. Serving goes on all the same."""
        lacking = _model_lacking(parts)
        stale = _learner_lacking(parts.learner_status(), parts.clock(), settings.stale_after_s)
        is_ready = not lacking and (not stale or not require_learner)
        return JsonReply({"ready": is_ready, "reasons": lacking + stale}, status_code=200 if is_ready else 503)


def _model_lacking(parts: ServerParts) -> list[str]:
    try:
        parts.predictor.current()
    except NotPublishedError as error:
        return [str(error)]
    return []


def _learner_lacking(status: Mapping[str, Any] | None, now_s: float, stale_after_s: float) -> list[str]:
    seen_s = _seen_s(status, now_s)
    if seen_s is None:
        return ["no learner has been seen"]
    if seen_s > stale_after_s:
        state = "unknown" if status is None else status.get("state", "unknown")
        return [f"learner not seen for {seen_s:.0f} s (last state: {state}); predictions go on with the last model"]
    return []


def _seen_s(status: Mapping[str, Any] | None, now_s: float) -> float | None:
    """Seconds since the heartbeat; None where there was none."""
    time_s = None if status is None else status.get("time_s")
    return round(max(0.0, now_s - time_s), 3) if isinstance(time_s, int | float) else None


def _label(sample_id: str, status: LabelStatus, parts: ServerParts) -> dict[str, Any]:
    classes, step = parts.schema.classes, status.first_trained_step
    try:
        served = parts.predictor.current().step
    except NotPublishedError:
        served = -1

    def name(class_index: int | None) -> str | None:
        return None if class_index is None else classes[class_index]

    return {
        "id": sample_id,
        "state": status.state,
        "class": name(status.class_index),
        "class_index": status.class_index,
        "label_position": None if status.label_position is None else status.label_position._asdict(),
        "label_time_s": status.label_time_s,
        "corrected": status.corrected,
        "scored": status.scored,
        "first_trained_step": step,
        "in_served_model": step is not None and served >= step,
        "sample_position": None if status.sample_position is None else status.sample_position._asdict(),
        "sample_time_s": status.sample_time_s,
        "predicted_class": name(status.predicted_class),
        "model_version": status.model_version,
    }
