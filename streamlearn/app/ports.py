"""The ports that processes listen on."""

from __future__ import annotations

import socket

from streamlearn.config import Config
from streamlearn.errors import ConfigError
from streamlearn.metrics import Metrics, MetricsServer


def listen(config: Config) -> socket.socket:
    """Bind the public port. All server processes share the socket.

    Raises:
        ConfigError: the address is not available.
    """
    serve = config.serve
    family = socket.AF_INET6 if ":" in serve.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((serve.host, serve.port))
    except OSError as error:
        listener.close()
        msg = f"serve.host = {serve.host!r}, serve.port = {serve.port}: {error.strerror}; choose another"
        raise ConfigError(msg) from error
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
