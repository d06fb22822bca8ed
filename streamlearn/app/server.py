"""One server process: stateless, it follows the published teacher and appends to the log (D1, D12).

It can be killed, multiplied, or run on another machine. At SIGTERM the socket closes, requests in flight are answered
within `run.shutdown_s`, and the log is flushed.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import socket
from typing import Any, cast

import structlog
import torch
import uvicorn

from streamlearn import __version__
from streamlearn.app.garbage import short_pauses
from streamlearn.app.log import make_codec, make_topics, open_log
from streamlearn.app.siblings import registered, scorers_of, siblings_of
from streamlearn.app.signals import stop_signals
from streamlearn.config import Config
from streamlearn.errors import LogUnavailableError
from streamlearn.ledger.request_queue import RequestQueue
from streamlearn.ledger.view import LedgerView
from streamlearn.log.base import Log
from streamlearn.metrics import MetricsServer, ServerMetrics
from streamlearn.models.answer import Thresholds
from streamlearn.serve.api import create_app
from streamlearn.serve.appender import Appender
from streamlearn.serve.connections import BoundedProtocol, limits_of_process
from streamlearn.serve.parts import Parts
from streamlearn.serve.predictor import Predictor
from streamlearn.state.paths import StatePaths
from streamlearn.state.publish import PublishedDir
from streamlearn.state.status import read_status

_log = structlog.get_logger(__name__)
THREADS = 1
"""torch's intra-op threads: several processes share the cores, and rows of one forward pass are few."""


def serve(config: Config, *, name: str, listener: socket.socket) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises:
        ConfigError: the topics of the log do not match the config.
    """
    torch.set_num_threads(THREADS)
    paths = StatePaths(config.state.dir)
    for path in config.serve.exposed_token_files():
        _log.warning("token_file_open", path=str(path), expected="mode 0400, or 0440 with a group of its own")
    with short_pauses(), contextlib.ExitStack() as ends:
        # uvicorn raises the signal that stopped it again. Without a handler, that would end the process before the card
        # is removed and the log is closed.
        stopping = ends.enter_context(stop_signals())
        metrics = ServerMetrics(version=__version__)
        appender = Appender(
            lambda: ends.enter_context(contextlib.closing(_open_log(config))),
            metrics,
            timeout_s=config.serve.timeout_s,
        )
        try:
            appender.open()
        except LogUnavailableError as error:
            # Predictions need no log. /label answers 503 until it can be opened, such as after a full disk.
            _log.warning("log_unavailable", during="start", error=str(error))
        exposed = ends.enter_context(contextlib.closing(MetricsServer(metrics.registry, 0)))
        ends.enter_context(registered(paths, name, exposed.port))
        server = _server(config, paths, name, appender, metrics)
        _log.info("server_started", name=name, address="{}:{}".format(*listener.getsockname()[:2]))
        server.should_exit = stopping.is_set()
        server.run(sockets=[listener])
        _log.info("server_stopped", name=name)


def _open_log(config: Config) -> Log:
    """The log, with its topics: without them a label would be refused for good."""
    log = open_log(config)
    try:
        make_topics(log, config)
        for topic in (config.source.samples.topics[0], config.source.labels.topic):
            log.append(topic, [])
    except BaseException:
        log.close()
        raise
    return log


def _server(config: Config, paths: StatePaths, name: str, appender: Appender, metrics: ServerMetrics) -> uvicorn.Server:
    schema, per_hour = config.schema_.build(), config.labels.requests_per_hour
    predictions = config.source.predictions
    parts = Parts(
        settings=config.serve,
        name=name,
        samples_topic=config.source.samples.topics[0],
        labels_topic=config.source.labels.topic,
        codec=make_codec(config),
        predictor=Predictor(
            PublishedDir(paths.published), schema, metrics, factory=config.model.factory, loaded=gc.freeze
        ),
        appender=appender,
        thresholds=Thresholds(schema, config.score.thresholds),
        ledger=LedgerView(paths.store, schema),
        requests=RequestQueue(paths.label_requests, per_hour=per_hour) if per_hour else None,
        metrics=metrics,
        learner_status=lambda: read_status(paths.heartbeat),
        scores=lambda: read_status(paths.scores),
        siblings=lambda: siblings_of(paths, name),
        scorers=lambda: scorers_of(paths, predictions.scorers) if predictions.topic else {},
    )
    settings = uvicorn.Config(
        create_app(parts),
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=int(config.run.shutdown_s),
        # uvicorn calls it like a class, for each connection. It bounds their number: uvicorn's limit_concurrency would
        # reply in another shape.
        http=cast(Any, functools.partial(BoundedProtocol, limits=limits_of_process())),
        ws="none",
    )
    return uvicorn.Server(settings)
