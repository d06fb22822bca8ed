"""The HTTP API of one server process: its parts, its routes, and the edge around them.

A server is stateless. It answers from the newest published teacher, and appends what it is given to the log; killing it
loses nothing that was acknowledged.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.security import HTTPBearer
from starlette.concurrency import run_in_threadpool

from streamlearn.serve.appender import Appender
from streamlearn.serve.batcher import Batcher
from streamlearn.serve.bodies import Bodies
from streamlearn.serve.edge import Edge
from streamlearn.serve.failures import RequestError
from streamlearn.serve.parts import ServerParts, ServeSettings
from streamlearn.serve.predictor import LoadedModel
from streamlearn.serve.replies import JsonReply, add_error_handlers
from streamlearn.serve.routes_admin import add_admin_routes
from streamlearn.serve.routes_append import add_append_routes
from streamlearn.serve.routes_predict import add_predict_route
from streamlearn.serve.routes_state import add_health_routes, add_state_routes
from streamlearn.serve.routes_wanted import add_wanted_routes
from streamlearn.serve.schemas import responses

__all__ = ["ServeSettings", "ServerParts", "create_app"]

_DESCRIPTION = """
Ask a model that learns from a stream while it answers, and tell it what was right.

1. `POST /predict` answers. With `learn` the sample also goes into the log, with the answer that was given.
2. `POST /label` says, minutes or weeks later, what a sample was. It answers 202 only once the label is durable.
3. `GET /label/{id}` shows what became of that label; `GET /model` which teacher answers; `GET /score` how well.
4. `GET /label/wanted` gives out the samples whose label would help most; `GET /sample/{id}` shows one.

Every answer names its teacher (`model_version`) and its age. Every error has one shape,
`{"error": {"code", "message", "details", "request_id"}}`.
"""


async def _known_parameters(request: Request) -> None:
    """Refuse what a route has no use for: with `?lern=true` a sample would be answered, and never learned."""
    route = request.scope["route"]
    names = {parameter.alias for parameter in route.dependant.query_params}
    if names and (unknown := sorted(request.query_params.keys() - names)):
        message = f"unknown parameter {unknown[0]:.80}: expected {', '.join(sorted(names))}."
        raise RequestError(422, "invalid_parameter", message)


def create_app(parts: ServerParts, settings: ServeSettings) -> FastAPI:
    """The ASGI application. Its lifespan starts the threads of the predictor and the batcher, and ends them."""
    batcher: Batcher[LoadedModel] = Batcher(
        parts.predictor.current, parts.metrics, queue=settings.queue, batch=settings.batch
    )
    inlet = Appender(parts.log, parts.metrics, queue=settings.queue, timeout_s=settings.timeout_s)
    bodies = Bodies(
        parts.codec,
        parts.metrics,
        max_bytes=settings.max_body_bytes,
        max_items=settings.max_instances,
        timeout_s=settings.timeout_s,
    )

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        await run_in_threadpool(parts.predictor.start)
        batcher.start()
        try:
            yield
        finally:
            await run_in_threadpool(batcher.close)
            await run_in_threadpool(parts.predictor.close)
            await run_in_threadpool(inlet.close)

    app = FastAPI(
        title="streamlearn",
        version=settings.version,
        description=_DESCRIPTION,
        lifespan=lifespan,
        redirect_slashes=False,
        redoc_url=None,
        default_response_class=JsonReply,
    )
    app.add_middleware(Edge, metrics=parts.metrics, settings=settings)
    add_error_handlers(app)
    # The edge checks tokens; this only has OpenAPI say so.
    bearer = [Depends(HTTPBearer(auto_error=False))]
    known = Depends(_known_parameters)
    guarded = APIRouter(dependencies=[known], responses=responses(403))
    if settings.wants_tokens:
        guarded = APIRouter(dependencies=[*bearer, known], responses=responses(401, 403))
    add_predict_route(guarded, parts, settings, bodies=bodies, batcher=batcher, inlet=inlet)
    add_append_routes(guarded, parts, settings, bodies=bodies, inlet=inlet)
    add_wanted_routes(guarded, parts)
    add_state_routes(guarded, parts, settings)
    app.include_router(guarded)
    admin = APIRouter(dependencies=bearer, responses=responses(401))
    add_admin_routes(admin, parts, settings, bodies=bodies)
    app.include_router(admin)
    add_health_routes(app.router, parts, settings)
    return app
