"""GET routes: the model, its scores, one label's life, metrics, and health. They change nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Query
from pydantic import Field
from starlette.responses import Response

from streamlearn import __version__
from streamlearn.errors import NotPublishedError
from streamlearn.ledger import LabelState, LabelStatus
from streamlearn.metrics import CONTENT_TYPE
from streamlearn.serve.failures import RequestError, retry_later
from streamlearn.serve.parts import Parts, Status
from streamlearn.serve.predictor import Predictor
from streamlearn.serve.replies import JsonReply, iso
from streamlearn.serve.schemas import (
    SCORES,
    LabelReply,
    LiveReply,
    ModelReply,
    Parameters,
    ReadyReply,
    SampleId,
    described,
    responses,
)
from streamlearn.serve.scrape import merged
from streamlearn.serve.waiting import Waiters

STALE_AFTER_S = 120.0
"""/health/ready fails after the learner has not been seen for this time."""
SCORER_STALE_AFTER_S = 15.0
"""A scorer that was not seen for this time is reported."""
_LINKS = {
    "docs": "/docs",
    "openapi": "/openapi.json",
    "predict": "/predict",
    "label": "/label",
    "sample": "/sample",
    "model": "/model",
    "schema": "/schema",
    "score": "/score",
    "live": "/health/live",
    "ready": "/health/ready",
    "metrics": "/metrics",
}
_NEVER_LEARNED = frozenset(
    {LabelState.EXPIRED, LabelState.ORPHAN, LabelState.HELD, LabelState.RETRACTED, LabelState.ERASED}
)
"""States of labels that no teacher will learn unless something changes: requests do not wait for them."""


class LabelParameters(Parameters):
    """Parameters of GET /label/{id}."""

    wait_s: float = Field(0.0, ge=0, allow_inf_nan=False)
    """Wait until the served teacher has learned the label, at most serve.timeout_s. After a correction, use POST
    /predict with `after`: the previous label may be learned already."""


def add_state_routes(router: APIRouter, parts: Parts) -> None:
    """Add /, /model, /label/{id}, /score and /metrics."""
    predictor, ledger, clock = parts.predictor, parts.ledger, parts.clock
    waiters = Waiters(parts.metrics, "a label to be learned", most=parts.queue)

    @router.get("/", include_in_schema=False)
    async def index() -> Response:
        """Links to the other routes."""
        return JsonReply({"name": "streamlearn", "version": __version__, "links": _LINKS})

    @router.get(
        "/model",
        summary="The teacher that answers, and its learner",
        **described("predict", ModelReply, 500, 503),
    )
    async def model() -> Response:
        """Version and age of the teacher, its input, and the learner's last heartbeat."""
        held, now_s, status = predictor.current(), clock(), parts.learner_status()
        reply = {
            "model_version": held.step,
            "published_at": iso(held.published_at_s),
            "age_s": round(max(0.0, now_s - held.published_at_s), 3),
            "factory": held.spec.factory,
            "classes": held.classes,
            "shape": parts.codec.schema.shape,
            "dtype": parts.codec.schema.dtype.name,
            "pinned": held.pinned,
            "newest_version": predictor.newest_version,
            "notes": [*_notes(predictor, status), *_scorers_missing(scorers := parts.scorers(), now_s)],
            "learner": status,
            "learner_seen_s": _seen_s(status, now_s),
            "scorers": {name: found and {**found, "seen_s": _seen_s(found, now_s)} for name, found in scorers.items()},
        }
        return JsonReply(reply)

    @router.get(
        "/label/{sample_id:id}",
        summary="What became of a label",
        **described("learn", LabelReply, 404, 422, 429, 500, 503),
    )
    async def label(sample_id: SampleId, query: Annotated[LabelParameters, Query()]) -> Response:
        """State, times, the prediction that it scored, and whether the served teacher has learned it."""

        def is_settled() -> bool:
            status = ledger.get(sample_id)
            return status is not None and (status.state in _NEVER_LEARNED or _is_served(status, predictor))

        if query.wait_s > 0.0:
            await waiters.until(is_settled, min(query.wait_s, parts.settings.timeout_s))
        status = ledger.get(sample_id)
        if status is None:
            message = (
                "No sample or label of this id is known: the learner has not read it yet, or it is past the horizon."
            )
            raise RequestError(404, "unknown_sample", message, details={"id": sample_id[:512]})
        return JsonReply(_label(sample_id, status, predictor))

    @router.get(
        "/score",
        summary="How good the model is, from predictions made before their labels came",
        responses={200: SCORES, **responses(500, 503)},
        response_class=Response,
        tags=["predict"],
    )
    async def score() -> Response:
        """The learner's scores; `age_s` is the time since they were written, about a second."""
        found = parts.scores()
        if not found:
            message = "The learner has written no scores yet: they need labels of samples that were predicted before."
            raise retry_later(503, "no_scores_yet", message)
        return JsonReply({**found, "age_s": _seen_s(found, clock())})

    @router.get(
        "/metrics",
        summary="Metrics of all processes, for Prometheus",
        responses={200: {"content": {"text/plain": {"example": "# TYPE streamlearn_steps_total counter\n"}}}},
        response_class=Response,
        tags=["health"],
    )
    async def scrape() -> Response:
        """This process's metrics and its siblings', each labelled with its process."""
        text = await merged(parts.name, parts.metrics, parts.siblings())
        return Response(text, headers={"content-type": CONTENT_TYPE})


def add_health_routes(router: APIRouter, parts: Parts) -> None:
    """Add /health/live and /health/ready, which need no token."""

    @router.get("/health/live", summary="Does the process run?", response_model=LiveReply, tags=["health"])
    async def live() -> Response:
        """Always 200. If it does not answer, restart the process."""
        return JsonReply({"live": True})

    @router.get(
        "/health/ready",
        summary="Are predictions available, from a model that still learns?",
        response_model=ReadyReply,
        responses={503: {"model": ReadyReply, "description": "Not ready; the reasons say why."}, **responses(422)},
        tags=["health"],
    )
    async def ready(
        require_learner: Annotated[
            bool, Query(description="False: a model is enough, so that a dead learner does not stop serving.")
        ] = True,
    ) -> Response:
        """503 before the first model, and while the learner is not seen for 120 s. Predictions continue."""
        status = parts.learner_status()
        missing, stale = _model_missing(parts.predictor), _learner_missing(status, parts.clock())
        is_ready = not missing and (not stale or not require_learner)
        late = _scorers_missing(parts.scorers(), parts.clock())
        reasons = [*missing, *stale, *_notes(parts.predictor, status), *late]
        return JsonReply({"ready": is_ready, "reasons": reasons}, status_code=200 if is_ready else 503)


def _model_missing(predictor: Predictor) -> list[str]:
    try:
        predictor.current()
    except NotPublishedError as error:
        return [str(error)]
    return []


def _learner_missing(status: Status | None, now_s: float) -> list[str]:
    seen_s = _seen_s(status, now_s)
    if status is None or seen_s is None:
        return ["no learner has been seen"]
    if seen_s > STALE_AFTER_S:
        state = status.get("state", "unknown")
        return [f"learner not seen for {seen_s:.0f} s (last state: {state}); the last model still answers"]
    return []


def _scorers_missing(scorers: Mapping[str, Status | None], now_s: float) -> list[str]:
    """Scorers that do not write predictions now. Servers answer without them, so readiness does not depend on it."""
    found = []
    for name, status in scorers.items():
        seen_s, state = _seen_s(status, now_s), "not seen" if status is None else status.get("state", "unknown")
        if seen_s is None or seen_s > SCORER_STALE_AFTER_S:
            since = "" if seen_s is None else f" for {seen_s:.0f} s"
            found.append(f"{name} not seen{since} (last state: {state}): its samples wait for their prediction")
        elif state != "scoring":
            found.append(f"{name}: {state}")
    return found


def _notes(predictor: Predictor, status: Status | None) -> list[str]:
    """Conditions that do not affect readiness: a pinned version, an unavailable log, the guard's findings."""
    notes = predictor.notes()
    if status is None:
        return notes
    if status.get("state") == "log unavailable":
        notes.append("the learner cannot read the log, and learns nothing until it is back")
    guard = status.get("guard")
    if isinstance(guard, dict):
        if reasons := [str(reason) for reason in guard.get("reasons", ())]:
            notes.append(f"the learner's guard finds the model {', '.join(reasons)}")
        if guard.get("frozen"):
            notes.append("the learner's guard publishes no new version until the model is healthy")
    return notes


def _seen_s(status: Status | None, now_s: float) -> float | None:
    """Seconds since a status was written; None before the first."""
    time_s = None if status is None else status.get("time_s")
    return round(max(0.0, now_s - time_s), 3) if isinstance(time_s, int | float) else None


def _is_served(status: LabelStatus, predictor: Predictor) -> bool:
    """Whether the served teacher has learned the label."""
    trained_step, model = status.first_trained_step, predictor.model
    return trained_step is not None and model is not None and model.step >= trained_step


def _label(sample_id: str, status: LabelStatus, predictor: Predictor) -> dict[str, Any]:
    """The status as it is, with its classes by name."""
    fields = asdict(status)
    unknown_class = fields.pop("class_name")
    fields |= {
        "id": sample_id,
        "class": unknown_class or predictor.class_name(status.class_index),
        "predicted_class": predictor.class_name(status.predicted_class),
        "in_served_model": _is_served(status, predictor),
    }
    return fields
