"""The HTTP API of one server process: its routes, and the edge around them.

A server is stateless: it answers from the newest published teacher, and appends to the log. Killing it loses nothing
that was acknowledged.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import APIRouter, Depends, FastAPI
from fastapi.security import HTTPBearer
from starlette.concurrency import run_in_threadpool

from streamlearn import __version__
from streamlearn.serve.edge import Edge
from streamlearn.serve.parts import Parts
from streamlearn.serve.replies import JsonReply, add_error_handlers
from streamlearn.serve.routes_admin import add_admin_routes
from streamlearn.serve.routes_append import add_append_routes
from streamlearn.serve.routes_predict import add_predict_route
from streamlearn.serve.routes_requests import add_request_routes
from streamlearn.serve.routes_schema import add_schema_route
from streamlearn.serve.routes_state import add_health_routes, add_state_routes
from streamlearn.serve.schemas import responses

_DESCRIPTION = """
Predictions from a model that learns from a stream, and labels for it.

0. `GET /schema` shows what a sample looks like: its fields, and an example.
1. `POST /predict` answers. With `learn` the sample is also appended to the log, with its answer.
2. `POST /label` gives the class of a sample, minutes or weeks later. It answers 202 once the label is durable.
3. `GET /label/{id}` shows what became of that label; `GET /model` which teacher answers; `GET /score` how well.
4. `GET /label/requests` hands out the samples whose label would help most; `GET /sample/{id}` shows one.

Every answer names its teacher (`model_version`) and its age. Every error has one shape,
`{"error": {"code", "message", "details", "request_id"}}`.
"""


def create_app(parts: Parts) -> FastAPI:
    """The ASGI application. Its lifespan starts and stops the threads of predictor, batcher and appender."""

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        await run_in_threadpool(parts.predictor.start)
        parts.batcher.start()
        parts.appender.start()
        try:
            yield
        finally:
            await run_in_threadpool(parts.batcher.close, 10.0)
            await run_in_threadpool(parts.predictor.close)
            await run_in_threadpool(parts.appender.close)

    app = FastAPI(
        title="streamlearn",
        version=__version__,
        description=_DESCRIPTION,
        lifespan=lifespan,
        redirect_slashes=False,
        redoc_url=None,
        default_response_class=JsonReply,
    )
    bearer = Depends(HTTPBearer(auto_error=False))
    guarded = APIRouter(responses=responses(403))
    if parts.settings.tokens:  # the edge checks tokens; `bearer` only documents them
        guarded = APIRouter(dependencies=[bearer], responses=responses(401, 403))
    admin = APIRouter(dependencies=[bearer], responses=responses(401))
    add_predict_route(guarded, parts)
    add_append_routes(guarded, parts)
    add_request_routes(guarded, parts)
    add_schema_route(guarded, parts)
    add_state_routes(guarded, parts)
    add_admin_routes(admin, parts)

    add_error_handlers(app)
    app.add_middleware(Edge, metrics=parts.metrics, settings=parts.settings)
    app.include_router(guarded)
    app.include_router(admin)
    add_health_routes(app.router, parts)
    return app
