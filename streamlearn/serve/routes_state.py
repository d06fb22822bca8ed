"""GET routes: the model, its scores, one label's life, metrics, and health. They read; they change nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query
from starlette.responses import Response

from streamlearn.errors import NotPublishedError
from streamlearn.ledger import LabelState, LabelStatus
from streamlearn.metrics import CONTENT_TYPE
from streamlearn.serve.failures import RequestError, retry_later
from streamlearn.serve.parts import ServerParts, ServeSettings
from streamlearn.serve.replies import JsonReply, iso
from streamlearn.serve.schemas import SCORES, LabelReply, LiveReply, ModelReply, ReadyReply, responses
from streamlearn.serve.scrape import merged
from streamlearn.serve.waiting import Waiters

_LINKS = {
    "docs": "/docs",
    "openapi": "/openapi.json",
    "predict": "/predict",
    "label": "/label",
    "sample": "/sample",
    "model": "/model",
    "score": "/score",
    "live": "/health/live",
    "ready": "/health/ready",
    "metrics": "/metrics",
}
_NEVER_LEARNED = frozenset(
    {LabelState.EXPIRED, LabelState.ORPHAN, LabelState.HELD, LabelState.RETRACTED, LabelState.ERASED}
)
"""A label that has come so far is in no teacher, unless something else brings it back: nobody waits for it."""


def add_state_routes(router: APIRouter, parts: ServerParts, settings: ServeSettings) -> None:
    """Add /, /model, /label/{id}, /score and /metrics."""
    _add_model_routes(router, parts, settings)
    _add_label_route(router, parts, settings)
    _add_figures_routes(router, parts, settings)


def _add_model_routes(router: APIRouter, parts: ServerParts, settings: ServeSettings) -> None:

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
            "classes": held.classes,
            "shape": parts.schema.shape,
            "dtype": parts.schema.dtype.name,
            "pinned": held.pinned,
            "newest_version": parts.predictor.newest_version,
            "notes": _notes(parts, status),
            "learner": status,
            "learner_seen_s": _seen_s(status, now_s),
        }
        return JsonReply(told)


def _add_label_route(router: APIRouter, parts: ServerParts, settings: ServeSettings) -> None:
    waiters = Waiters(parts.metrics, "a label to be learned", most=settings.queue)

    @router.get(
        "/label/{sample_id:path}",
        summary="What became of a label",
        response_model=LabelReply,
        responses=responses(404, 422, 429, 500, 503),
        tags=["learn"],
    )
    async def label(
        sample_id: Annotated[str, Path(description="The sample's id, percent-encoded.", examples=["invoice-7"])],
        wait_s: Annotated[
            float,
            Query(
                ge=0,
                allow_inf_nan=False,
                description="Wait so long, at most serve.timeout_s, until the served teacher has learned the label. "
                "After a correction, POST /predict with `after` instead: the label before may be learned already.",
            ),
        ] = 0.0,
    ) -> Response:
        """State, times, the prediction that it scored, and whether the served teacher has learned it."""

        def is_settled() -> bool:
            status = parts.ledger.get(sample_id)
            return status is not None and (status.state in _NEVER_LEARNED or _in_served_model(status, parts))

        if wait_s > 0.0:
            await waiters.until(is_settled, min(wait_s, settings.timeout_s))
        status = parts.ledger.get(sample_id)
        if status is None:
            message = "Neither a sample nor a label of this id is known: not read by the learner yet, or forgotten."
            raise RequestError(404, "unknown_sample", message, details={"id": sample_id[:512]})
        return JsonReply(_label(sample_id, status, parts))


def _add_figures_routes(router: APIRouter, parts: ServerParts, settings: ServeSettings) -> None:
    @router.get(
        "/score",
        summary="How good the model is, from predictions made before their labels came",
        responses={200: SCORES, **responses(500, 503)},
        response_class=Response,
        tags=["predict"],
    )
    async def score() -> Response:
        """The learner's scores, as of about a second ago; `age_s` is since then."""
        scores = parts.scores()
        if not scores:
            message = "The learner has written no scores yet: it takes labels of samples that were predicted before."
            raise retry_later(503, "no_scores_yet", message)
        return JsonReply({**scores, "age_s": _seen_s(scores, parts.clock())})

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
        status = parts.learner_status()
        lacking, stale = _model_lacking(parts), _learner_lacking(status, parts.clock(), settings.stale_after_s)
        is_ready = not lacking and (not stale or not require_learner)
        reasons = [*lacking, *stale, *_notes(parts, status)]
        return JsonReply({"ready": is_ready, "reasons": reasons}, status_code=200 if is_ready else 503)


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


def _notes(parts: ServerParts, status: Mapping[str, Any] | None) -> list[str]:
    """What to know that takes no readiness away: a pinned version, a log that is away, what the guard has found."""
    guard = None if status is None else status.get("guard")
    notes = parts.predictor.notes()
    if status is not None and status.get("state") == "log unavailable":
        notes.append("the learner cannot read the log, and learns nothing until it is back")
    if isinstance(guard, dict):
        if reasons := [str(reason) for reason in guard.get("reasons", ())]:
            notes.append(f"the learner's guard finds the model {', '.join(reasons)}")
        if guard.get("frozen"):
            notes.append("the learner's guard holds new versions back until the model is well")
    return notes


def _seen_s(status: Mapping[str, Any] | None, now_s: float) -> float | None:
    """Seconds since a status was written; None where there was none."""
    time_s = None if status is None else status.get("time_s")
    return round(max(0.0, now_s - time_s), 3) if isinstance(time_s, int | float) else None


def _in_served_model(status: LabelStatus, parts: ServerParts) -> bool:
    try:
        served = parts.predictor.current().step
    except NotPublishedError:
        return False
    return status.first_trained_step is not None and served >= status.first_trained_step


def _label(sample_id: str, status: LabelStatus, parts: ServerParts) -> dict[str, Any]:
    classes = parts.predictor.classes

    def name(class_index: int | None) -> str | None:
        """None for a class that was named after the served teacher was published."""
        return None if class_index is None or class_index >= len(classes) else classes[class_index]

    return {
        "id": sample_id,
        "state": status.state,
        "class": name(status.class_index) if status.class_name is None else status.class_name,
        "class_index": status.class_index,
        "label_position": None if status.label_position is None else status.label_position._asdict(),
        "label_time_s": status.label_time_s,
        "corrected": status.corrected,
        "implied": status.implied,
        "scored": status.scored,
        "first_trained_step": status.first_trained_step,
        "in_served_model": _in_served_model(status, parts),
        "sample_position": None if status.sample_position is None else status.sample_position._asdict(),
        "sample_time_s": status.sample_time_s,
        "predicted_class": name(status.predicted_class),
        "model_version": status.model_version,
    }
