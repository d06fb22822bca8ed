"""Measures the cost of clients that pipeline requests without reading answers or sending a token.

A server with a token is attacked over ten connections in three ways. `flood`: as many small requests as the sockets
take. `headers`: no more requests than may wait, each with 30 KiB of headers. `bodies`: the same with bodies of 1 MiB.
For each: the growth of the server's resident memory, its CPU time after the last byte, and the slowest answer to
another client meanwhile.

Run: python benchmarks/pipelining.py [--quick]. The last line is JSON.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import socket
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

from common import arguments, figures, running, tell, wait_ready, write_config
from harness.hour import memory_mb

from streamlearn.lab.broker import free_port
from streamlearn.serve.connections import Limits

CONNECTIONS = 10
COUNT = Limits().max_waiting + 1
SENT = {
    "flood": b"GET / HTTP/1.1\r\n\r\n" * 100_000,
    "headers": (b"GET / HTTP/1.1\r\nx: " + b"y" * (30 << 10) + b"\r\n\r\n") * COUNT,
    "bodies": (b"POST /label HTTP/1.1\r\ncontent-length: 1048576\r\n\r\n" + b"z" * (1 << 20)) * COUNT,
}


class Cost(NamedTuple):
    """Cost of one attack."""

    growth_mb: float
    cpu_s: float
    slowest_ms: float


def cpu_s(pid: int) -> float:
    """CPU time of a process."""
    user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def send(client: socket.socket, data: bytes, until_s: float) -> None:
    """Send as much as the server accepts."""
    client.setblocking(False)
    at = 0
    with contextlib.suppress(ConnectionError):  # refused
        while at < len(data) and time.monotonic() < until_s:
            try:
                at += client.send(data[at : at + (256 << 10)])
            except BlockingIOError:
                time.sleep(0.01)


def attacked(port: int, pid: int, data: bytes, *, send_s: float, hold_s: float) -> Cost:
    """Send for `send_s`, hold the connections for `hold_s`; measure the server and a legitimate client."""
    before_mb = most_mb = memory_mb(pid)[0]
    slowest_s = 0.0
    with contextlib.ExitStack() as ends:
        clients = []
        for _ in range(CONNECTIONS):
            client = ends.enter_context(socket.socket())
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            client.connect(("127.0.0.1", port))
            clients.append(client)
        started = time.monotonic()
        threads = [threading.Thread(target=send, args=(client, data, started + send_s)) for client in clients]
        for thread in threads:
            thread.start()
        held_at, held_cpu_s = float("inf"), 0.0
        while (now := time.monotonic()) < held_at + hold_s:
            if now > started + send_s and held_at > now:
                held_at, held_cpu_s = now, cpu_s(pid)
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            connection.request("GET", "/health/live")
            with connection.getresponse() as reply:
                assert reply.status == 200, reply.status
            connection.close()
            slowest_s = max(slowest_s, time.monotonic() - now)
            most_mb = max(most_mb, memory_mb(pid)[0])
            time.sleep(0.05)
        spent_s = cpu_s(pid) - held_cpu_s
        for thread in threads:
            thread.join()
    return Cost(round(most_mb - before_mb, 1), round(spent_s, 2), round(slowest_s * 1000, 1))


def main() -> None:
    """Print the costs."""
    quick = arguments(__doc__ or "").quick
    send_s, hold_s = (2.0, 2.0) if quick else (5.0, 10.0)
    os.environ["STREAMLEARN_SERVE__TOKEN"] = "secret"
    with tempfile.TemporaryDirectory() as name:
        folder, port = Path(name), free_port("127.0.0.1")
        config = write_config(folder / "streamlearn.toml", kind="embedded", port=port)
        with running("serve", "--config", config, output=folder / "server.log") as server:
            wait_ready(f"http://127.0.0.1:{port}/health/live")
            costs = {}
            for way, data in SENT.items():
                costs[way] = attacked(port, server.pid, data, send_s=send_s, hold_s=hold_s)
                tell(f"{way}: {costs[way]}")
    growth_mb = round(sum(cost.growth_mb for cost in costs.values()), 1)
    figures(
        connections=CONNECTIONS,
        hold_s=hold_s,
        **{way: cost._asdict() for way, cost in costs.items()},
        growth_mb=growth_mb,
        ok=growth_mb <= 20.0,
    )


if __name__ == "__main__":
    main()
