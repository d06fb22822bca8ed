"""A server behind a real socket, in a thread of the test, and raw bytes to and from it."""

from __future__ import annotations

import functools
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import uvicorn
from support import until

from streamlearn.serve.connections import BoundedProtocol, Limits


@contextmanager
def serving(app: Any, limits: Limits | None = None, **options: Any) -> Iterator[int]:
    """Serve an application as `streamlearn serve` does; its port."""
    listener = socket.create_server(("127.0.0.1", 0))
    http = functools.partial(BoundedProtocol, limits=limits or Limits())
    server = uvicorn.Server(
        uvicorn.Config(app, http=cast(Any, http), ws="none", log_config=None, access_log=False, **options)
    )
    thread = threading.Thread(target=lambda: server.run(sockets=[listener]))
    thread.start()
    try:
        until(lambda: server.started, "a server", 20.0)
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(20.0)
        listener.close()
        assert not thread.is_alive(), "the server does not end"


@contextmanager
def connected(port: int, timeout_s: float = 10.0) -> Iterator[socket.socket]:
    """One connection."""
    with socket.create_connection(("127.0.0.1", port), timeout=timeout_s) as client:
        yield client


def all_of(client: socket.socket) -> bytes:
    """What is sent until the other side ends; a reset is an end."""
    got = b""
    try:
        while piece := client.recv(1 << 16):
            got += piece
    except ConnectionError:
        pass
    return got


def exchange(port: int, *pieces: bytes, pause_s: float = 0.0, timeout_s: float = 10.0) -> bytes:
    """Send pieces, and take all that comes until the other side ends."""
    with connected(port, timeout_s) as client:
        try:
            for piece in pieces:
                client.sendall(piece)
                time.sleep(pause_s)
        except ConnectionError:
            pass
        return all_of(client)
