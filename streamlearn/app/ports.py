"""The ports that processes listen on."""

from __future__ import annotations

import errno
import socket
import time

import structlog

from streamlearn.config import Config
from streamlearn.errors import ConfigError
from streamlearn.metrics import Metrics, MetricsServer

_log = structlog.get_logger(__name__)
_RETRY_S = 0.1


def listen(config: Config, *, wait_s: float = 0.0) -> socket.socket:
    """Bind the public port. All server processes share the socket.

    `wait_s`: how long to wait for another process to leave the port. Servers of a supervisor that was killed answer
    their requests first.

    Raises:
        ConfigError: the address is not available.
    """
    deadline_s, waited = time.monotonic() + wait_s, False
    while True:
        try:
            return _bound(config)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or time.monotonic() >= deadline_s:
                serve = config.serve
                msg = f"serve.host = {serve.host!r}, serve.port = {serve.port}: {error.strerror}; choose another"
                raise ConfigError(msg) from error
        if not waited:
            waited = True
            _log.info("waiting_for_port", port=config.serve.port, at_most_s=wait_s)
        time.sleep(_RETRY_S)


def _bound(config: Config) -> socket.socket:
    serve = config.serve
    family = socket.AF_INET6 if ":" in serve.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((serve.host, serve.port))
    except OSError:
        listener.close()
        raise
    listener.listen(2048)
    return listener


def expose(config: Config, metrics: Metrics) -> MetricsServer:
    """Serve the learner's own /metrics.

    Raises:
        ConfigError: the address is not available.
    """
    port = config.metrics.port
    try:
        return MetricsServer(metrics.registry, port)
    except OSError as error:
        msg = f"metrics.port = {port}: {error.strerror or error}; choose another, or 0"
        raise ConfigError(msg) from error
