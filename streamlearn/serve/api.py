"""The HTTP API of one server process: its routes, and the edge around them.

A server is stateless: it answers from the newest published teacher, and appends to the log. Killing it loses nothing
that was acknowledged.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.security import HTTPBearer
from starlette.concurrency import run_in_threadpool

from streamlearn import __version__
from streamlearn.ledger.request_queue import RequestQueue
from streamlearn.ledger.view import LedgerView
from streamlearn.log.codec import Codec
from streamlearn.metrics import ServerMetrics
from streamlearn.serve.appender import Appender
from streamlearn.serve.batcher import QUEUE, Batcher
from streamlearn.serve.bodies import MAX_ITEMS, Bodies
from streamlearn.serve.edge import Edge
from streamlearn.serve.failures import RequestError
from streamlearn.serve.predictor import Predictor
from streamlearn.serve.replies import JsonReply, add_error_handlers
from streamlearn.serve.routes_admin import VersionSwitch, add_admin_routes
from streamlearn.serve.routes_append import AppendFlow, add_append_routes
from streamlearn.serve.routes_predict import PredictFlow, add_predict_route
from streamlearn.serve.routes_requests import add_request_routes
from streamlearn.serve.routes_state import (
    add_health_routes,
    add_label_route,
    add_metrics_route,
    add_model_routes,
    add_score_route,
)
from streamlearn.serve.schemas import responses
from streamlearn.serve.settings import ServeConfig
from streamlearn.serve.waiting import Waiters
from streamlearn.state.files import DISK, Files

_DESCRIPTION = """
Predictions from a model that learns from a stream, and labels for it.

1. `POST /predict` answers. With `learn` the sample is also appended to the log, with its answer.
2. `POST /label` gives the class of a sample, minutes or weeks later. It answers 202 once the label is durable.
3. `GET /label/{id}` shows what became of that label; `GET /model` which teacher answers; `GET /score` how well.
4. `GET /label/requests` hands out the samples whose label would help most; `GET /sample/{id}` shows one.

Every answer names its teacher (`model_version`) and its age. Every error has one shape,
`{"error": {"code", "message", "details", "request_id"}}`.
"""


async def _known_parameters(request: Request) -> None:
    """Refuse unknown query parameters: with `?lern=true` a sample would be answered, and never learned."""
    route = request.scope["route"]
    names = {parameter.alias for parameter in route.dependant.query_params}
    if names and (unknown := sorted(request.query_params.keys() - names)):
        message = f"unknown parameter {unknown[0]:.80}: expected {', '.join(sorted(names))}."
        raise RequestError(422, "invalid_parameter", message)


def create_app(
    settings: ServeConfig,
    *,
    name: str,
    samples_topic: str,
    labels_topic: str,
    codec: Codec,
    predictor: Predictor,
    appender: Appender,
    ledger: LedgerView,
    requests: RequestQueue | None,
    metrics: ServerMetrics,
    learner_status: Callable[[], Mapping[str, Any] | None],
    scores: Callable[[], Mapping[str, Any] | None],
    siblings: Callable[[], Mapping[str, str]],
    files: Files = DISK,
    clock: Callable[[], float] = time.time,
    queue: int = QUEUE,
    max_items: int = MAX_ITEMS,
) -> FastAPI:
    """The ASGI application. Its lifespan starts and stops the threads of predictor, batcher and appender.

    Args:
        settings: the [serve] section.
        name: of this process, such as server-0; the `process` label of its metrics.
        samples_topic: the topic that /sample appends to.
        labels_topic: the topic that /label appends to.
        codec: encodes records of the schema.
        predictor: follows the published teachers.
        appender: appends to the log.
        ledger: the learner's ledger and sample store, read only.
        requests: the active-learning queue; None if it is off.
        metrics: of this process.
        learner_status: the learner's last heartbeat; None before the first.
        scores: the learner's last scores; None before the first.
        siblings: process name to the URL of its own /metrics on this machine, never of a merged one.
        files: the disk that a pinned version is written to.
        clock: seconds since the epoch.
        queue: requests that may wait for the model, for a fresher model, and for a label each.
        max_items: samples or labels in one request.
    """
    timeout_s, schema = settings.timeout_s, codec.schema
    batcher = Batcher(predictor.current, metrics, queue=queue)
    bodies = Bodies(codec, metrics, max_bytes=settings.max_body_bytes, max_items=max_items, timeout_s=timeout_s)
    append = AppendFlow(samples_topic, labels_topic, codec, bodies, appender, predictor, ledger)
    predict = PredictFlow(
        samples_topic=samples_topic,
        labels_topic=labels_topic,
        codec=codec,
        bodies=bodies,
        predictor=predictor,
        batcher=batcher,
        appender=appender,
        ledger=ledger,
        metrics=metrics,
        waiters=Waiters(metrics, "a fresher model", most=queue),
        timeout_s=timeout_s,
        clock=clock,
    )
    label_waiters = Waiters(metrics, "a label to be learned", most=queue)
    switch = VersionSwitch(predictor, metrics, timeout_s=timeout_s, files=files)

    known, bearer = Depends(_known_parameters), Depends(HTTPBearer(auto_error=False))
    guarded = APIRouter(dependencies=[known], responses=responses(403))
    if settings.tokens:  # the edge checks tokens; `bearer` only documents them
        guarded = APIRouter(dependencies=[bearer, known], responses=responses(401, 403))
    admin = APIRouter(dependencies=[bearer], responses=responses(401))
    add_predict_route(guarded, predict)
    add_append_routes(guarded, append)
    add_request_routes(guarded, requests, predictor, ledger, clock=clock)
    add_model_routes(guarded, predictor, schema, learner_status, clock=clock)
    add_label_route(guarded, predictor, ledger, label_waiters, timeout_s=timeout_s)
    add_score_route(guarded, scores, clock=clock)
    add_metrics_route(guarded, name, metrics, siblings)
    add_admin_routes(admin, switch, bodies, clock=clock)

    app = _application(_lifespan(predictor, batcher, appender))
    app.add_middleware(Edge, metrics=metrics, settings=settings)
    app.include_router(guarded)
    app.include_router(admin)
    add_health_routes(app.router, predictor, learner_status, clock=clock)
    return app


def _application(lifespan: Callable[[FastAPI], AbstractAsyncContextManager[None]]) -> FastAPI:
    app = FastAPI(
        title="streamlearn",
        version=__version__,
        description=_DESCRIPTION,
        lifespan=lifespan,
        redirect_slashes=False,
        redoc_url=None,
        default_response_class=JsonReply,
    )
    add_error_handlers(app)
    return app


def _lifespan(
    predictor: Predictor, batcher: Batcher, appender: Appender
) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        await run_in_threadpool(predictor.start)
        batcher.start()
        appender.start()
        try:
            yield
        finally:
            await run_in_threadpool(batcher.close)
            await run_in_threadpool(predictor.close)
            await run_in_threadpool(appender.close)

    return lifespan
