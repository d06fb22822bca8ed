"""One server process: stateless, it follows the published teacher and appends what it is given to the log (D2).

It can be killed, multiplied, or run on another machine at will. SIGTERM: the socket closes, requests in flight are
answered within `run.shutdown_s`, the log is flushed.
"""

from __future__ import annotations

import contextlib
import functools
import ipaddress
import json
import os
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import structlog
import uvicorn
from pydantic import SecretStr

from streamlearn import __version__
from streamlearn.app.log import make_codec, make_topics, open_log
from streamlearn.app.signals import stop_signals
from streamlearn.config import Config
from streamlearn.errors import LogError, LogUnavailableError
from streamlearn.ledger.request_queue import RequestQueue
from streamlearn.ledger.view import LedgerView
from streamlearn.log.base import Appends, Log
from streamlearn.log.lazy import LazyClient
from streamlearn.metrics import ServerMetrics, start_http
from streamlearn.records import NewRecord, Position
from streamlearn.serve.api import create_app
from streamlearn.serve.connections import BoundedProtocol, limits_of_process
from streamlearn.serve.parts import ServerParts, ServeSettings
from streamlearn.serve.predictor import Predictor
from streamlearn.state.files import write_whole
from streamlearn.state.paths import StatePaths
from streamlearn.state.publish import PublishedDir
from streamlearn.state.status import read_status

_log = structlog.get_logger(__name__)
_OPEN_S = 10.0
_NOWHERE = "http://127.0.0.1:0/metrics"


def serve(config: Config, *, name: str, listener: socket.socket) -> None:
    """Serve until SIGTERM or SIGINT."""
    paths = StatePaths(config.state.dir)
    for path in config.serve.open_token_files():
        _log.warning("token_file_open", path=str(path), wanted="mode 0400, or 0440 with a group of its own")
    # uvicorn sends itself the signal that ended it once more: by default that would end us here and now, with the card
    # still there and the log still open.
    with stop_signals() as stopping, contextlib.closing(_LateLog(config)) as log:
        try:
            log.opened(_OPEN_S)
        except LogUnavailableError as error:
            # Predictions need no log; /label answers 503 until it is back.
            _log.warning("log_unavailable", during="start", error=str(error))
        metrics = ServerMetrics(version=__version__)
        exposed, port = start_http(metrics.registry, "127.0.0.1", 0)
        with contextlib.closing(exposed), _registered(paths, name, port):
            app = create_app(_parts(config, paths, log, metrics, name), _settings(config, name))
            server = uvicorn.Server(
                uvicorn.Config(
                    app,
                    log_config=None,
                    access_log=False,
                    server_header=False,
                    timeout_graceful_shutdown=int(config.run.shutdown_s),
                    # A class in all but name: uvicorn calls it for each connection.
                    http=cast(Any, functools.partial(BoundedProtocol, limits=limits_of_process())),
                    ws="none",
                    limit_concurrency=None,  # would answer in another shape than ours; BoundedProtocol bounds it
                    backlog=2048,
                )
            )
            _log.info("server_started", name=name, address="{}:{}".format(*listener.getsockname()[:2]))
            server.should_exit = stopping.is_set()
            server.run(sockets=[listener])
            _log.info("server_stopped", name=name)


class _LateLog:
    """The log of the config with its topics, opened when it can be: an embedded one cannot on a full disk."""

    def __init__(self, config: Config) -> None:
        def make(_timeout_s: float) -> Log:
            with contextlib.ExitStack() as ends:
                log = ends.enter_context(contextlib.closing(open_log(config)))
                make_topics(log, config)  # else a label would be refused for good for want of them
                ends.pop_all()
            return log

        self._log = LazyClient[Log](make, lambda log: log.close())
        self.close = self._log.close

    def opened(self, timeout_s: float) -> Log:
        """The log.

        Raises:
            LogUnavailableError: it cannot be opened, for now or before it is mended.
            ConfigError: its topics are not those of the config.
        """
        try:
            return self._log.get(timeout_s)
        except LogError as error:
            raise LogUnavailableError(str(error)) from error

    def append(self, topic: str, records: Sequence[NewRecord], timeout_s: float = 10.0) -> list[Position]:
        """See `Appends.append`."""
        return self.opened(timeout_s).append(topic, records, timeout_s)


def _parts(config: Config, paths: StatePaths, log: Appends, metrics: ServerMetrics, name: str) -> ServerParts:
    schema = config.schema_.build()
    return ServerParts(
        schema=schema,
        codec=make_codec(config),
        log=log,
        predictor=Predictor(
            PublishedDir(paths.published),
            schema,
            metrics,
            factory=config.model.factory,
            threads=config.serve.threads,
        ),
        ledger=LedgerView(paths.store, schema),
        metrics=metrics,
        learner_status=lambda: read_status(paths.heartbeat),
        siblings=lambda: _siblings(paths, name),
        scores=lambda: read_status(paths.scores),
        wanted=_wanted(config, paths),
    )


def _wanted(config: Config, paths: StatePaths) -> RequestQueue | None:
    per_hour = config.labels.requests_per_hour
    return RequestQueue(paths.label_requests, per_hour=per_hour) if per_hour else None


def _settings(config: Config, name: str) -> ServeSettings:
    serve_config = config.serve
    return ServeSettings(
        name=name,
        version=__version__,
        samples_topic=config.log.topics.samples,
        labels_topic=config.log.topics.labels,
        token=_secret(serve_config.token),
        predict_token=_secret(serve_config.predict_token),
        label_token=_secret(serve_config.label_token),
        admin_token=_secret(serve_config.admin_token),
        insecure=serve_config.insecure,
        max_body_bytes=serve_config.max_body_bytes,
        max_instances=serve_config.max_instances,
        queue=serve_config.queue,
        batch=serve_config.batch,
        timeout_s=serve_config.timeout_s,
        stale_after_s=serve_config.stale_after_s,
    )


def _secret(value: SecretStr | None) -> str | None:
    return value.get_secret_value() if value else None


@contextlib.contextmanager
def _registered(paths: StatePaths, name: str, port: int) -> Iterator[None]:
    """Tell the other servers where to scrape this one. It serves all the same where that cannot be written."""
    card = paths.processes / f"{name}.json"
    try:
        paths.processes.mkdir(parents=True, exist_ok=True)
        write_whole(card, [json.dumps({"pid": os.getpid(), "metrics_port": port}).encode()])
    except OSError as error:
        _log.error("server_not_registered", name=name, error=str(error))
    try:
        yield
    finally:
        card.unlink(missing_ok=True)


def _siblings(paths: StatePaths, own_name: str) -> dict[str, str]:
    """Where the learner and the other servers of this machine expose their metrics."""
    cards: dict[str, Path] = {path.stem: path for path in paths.processes.glob("*.json") if path.stem != own_name}
    cards["learner"] = paths.heartbeat
    # A learner is always asked for, dead or alive, so that its absence is a figure of its own (`scrape_failed`).
    found = {"learner": _NOWHERE}
    for name, path in sorted(cards.items()):
        status = read_status(path)
        if status is not None and _is_alive(status.get("pid")) and status.get("metrics_port"):
            found[name] = f"http://{_to_ask(status.get('metrics_host'))}:{int(status['metrics_port'])}/metrics"
    return found


def _to_ask(host: object) -> str:
    """The address, as a URL has it, of who listens on `host`: a server's card names none, and is on loopback."""
    if not isinstance(host, str) or not host:
        return "127.0.0.1"
    with contextlib.suppress(ValueError):  # else it is a name
        address = ipaddress.ip_address(host)
        if address.is_unspecified:  # listens on every address, and is none to ask itself
            return "127.0.0.1" if address.version == 4 else "[::1]"
    # A link-local address names its interface after a %, which begins an escape in a URL.
    return f"[{host.replace('%', '%25')}]" if ":" in host else host


def _is_alive(pid: object) -> bool:
    if not isinstance(pid, int) or pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
