"""Connections over a real socket: invalid HTTP, large headers, slow clients, pipelining."""

from __future__ import annotations

import asyncio
import json
import random
import resource
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fuzzing import NUMBERS, damaged
from served import Served, X
from sockets import all_of, connected, exchange, serving
from support import ask

from streamlearn.serve import schemas
from streamlearn.serve.connections import Limits, limits_of_process

LIMITS = Limits(max_header_bytes=4096, header_timeout_s=0.4, write_timeout_s=0.5, max_connections=20)
LIVE = b"GET /health/live HTTP/1.1\r\nhost: localhost\r\n"
CLOSE = b"connection: close\r\n\r\n"
LABEL = json.dumps({"id": "a", "label": "cat"}).encode()


def post(path: str, *lines: str) -> bytes:
    head = [f"POST {path} HTTP/1.1", "host: localhost", "content-type: application/json"]
    return "\r\n".join([*head, *lines, "", ""]).encode()


LARGE = b"x" * (32 << 20)
"""More than the buffers of a socket hold."""


async def large_answer(scope: Any, receive: Any, send: Any) -> None:
    """An application with large answers."""
    assert scope["type"] == "http"
    headers = [(b"content-length", b"%d" % len(LARGE))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": LARGE})


def error_in(reply: bytes, status: int, code: str) -> None:
    """Check that a raw reply has the one error shape."""
    head, _, body = reply.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status), reply[:200]
    assert b"content-type: application/json" in head.lower()
    reported = schemas.Error.model_validate_json(body).error
    assert reported.code == code
    assert reported.request_id is not None
    assert reported.request_id.encode() in head


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    found = Served(tmp_path_factory.mktemp("served"), timeout_s=0.4)
    found.publish(7)
    return found


@pytest.fixture(scope="module")
def port(served: Served) -> Iterator[int]:
    with serving(served.app, LIMITS, timeout_keep_alive=1) as found:
        yield found


class TestInvalidRequests:
    @pytest.mark.parametrize(
        "sent",
        [
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
            b"GET\r\n\r\n",
            b"GET / HTTP/9.9\r\n\r\n",
            b"GET / HTTP/1.1\r\ncontent-length: x\r\n\r\n",
            b"CONNECT a:443 HTTP/1.1\r\n\r\n",
            b"GET /\xff HTTP/1.1\r\n\r\n",
            b"GET /nowhere?\xc2\xfd HTTP/1.1\r\n\r\n",
            post("/label", "content-length: 5", "transfer-encoding: chunked"),
            b"\x00" * 100,
        ],
    )
    def test_get_400_in_the_one_shape(self, port: int, sent: bytes) -> None:
        """TLS, noise, contradicting lengths, methods of proxies: the connection is closed."""
        error_in(exchange(port, sent), 400, "bad_request")

    def test_an_upgrade_is_answered_like_any_request(self, port: int) -> None:
        """There are no websockets."""
        reply = exchange(port, LIVE + b"connection: upgrade\r\nupgrade: websocket\r\nsec-websocket-key: x\r\n\r\n")

        assert reply.startswith(b"HTTP/1.1 200 ")

    def test_http_1_0_without_a_host_is_answered(self, port: int) -> None:
        """Although this server checks Host: every browser sends it."""
        assert exchange(port, b"GET /model HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 200 ")
        error_in(exchange(port, b"GET /model HTTP/1.1\r\nhost: a\r\n" + CLOSE), 403, "wrong_host")

    def test_noise_does_not_stop_the_server(self, port: int, served: Served, caplog: pytest.LogCaptureFixture) -> None:
        """Damaged requests: each connection closes in time, with a reply or none; no error is logged."""
        rng = random.Random(20261124)
        valid = [LIVE + CLOSE, post("/label", f"content-length: {len(LABEL)}", "connection: close") + LABEL]
        for _ in range(30):
            sent = damaged(rng, rng.choice(valid)).replace(b"host", rng.choice(NUMBERS).encode())
            reply = exchange(port, sent)
            assert reply == b"" or reply.startswith(b"HTTP/1.1 "), reply[:100]
            assert not reply.startswith(b"HTTP/1.1 500"), (sent, reply)

        assert ask(f"http://127.0.0.1:{port}/health/live")[0] == 200
        assert [record for record in caplog.records if record.levelname in ("ERROR", "WARNING")] == []


class TestSizes:
    @pytest.mark.parametrize("ended", [True, False])
    def test_headers_past_the_bound_get_431(self, port: int, ended: bool) -> None:
        """Complete or not, many or one."""
        pieces = [LIVE + b"x: ", b"y" * 5000, b"\r\n\r\n" * ended]
        error_in(exchange(port, *pieces, pause_s=0.05), 431, "headers_too_large")
        error_in(exchange(port, LIVE + b"x: y\r\n" * 800 + b"\r\n" * ended), 431, "headers_too_large")

    def test_a_long_url_counts_too(self, port: int) -> None:
        """It is buffered until it ends."""
        error_in(exchange(port, b"GET /" + b"x" * 5000), 431, "headers_too_large")

    def test_headers_within_the_bound_are_accepted(self, port: int) -> None:
        """Just below it."""
        assert exchange(port, LIVE + b"x: " + b"y" * 3800 + b"\r\n" + CLOSE).startswith(b"HTTP/1.1 200 ")

    @pytest.mark.parametrize("piece", [b"x: y\r\n", b"x" * 1000])
    def test_endless_trailers_close_the_connection(self, port: int, piece: bytes) -> None:
        """The parser would collect them indefinitely."""
        started = time.monotonic()
        sent = post("/label", "transfer-encoding: chunked") + b"1\r\n{\r\n0\r\n"

        exchange(port, sent, *[piece] * 2000)

        assert time.monotonic() - started < 5.0

    def test_a_body_in_chunks_of_one_byte_is_accepted(self, port: int) -> None:
        """Framing does not count as header bytes."""
        chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in LABEL + b" " * 2000) + b"0\r\n\r\n"

        reply = exchange(port, post("/label", "transfer-encoding: chunked", "connection: close") + chunks)

        assert reply.startswith(b"HTTP/1.1 202 ")


class TestSlowClients:
    @pytest.mark.parametrize("sent", [b"", b"GET", LIVE, LIVE + b"x: y"])
    def test_a_header_that_times_out_closes_the_connection(self, port: int, sent: bytes) -> None:
        """With 408 if a request has begun, without a reply if not."""
        started = time.monotonic()
        reply = exchange(port, sent)

        assert 0.3 < time.monotonic() - started < 3.0
        if sent:
            error_in(reply, 408, "request_timeout")
        else:
            assert reply == b""

    def test_a_byte_at_a_time_does_not_extend_the_timeout(self, port: int) -> None:
        """Slowloris."""
        started = time.monotonic()

        reply = exchange(port, *[bytes([byte]) for byte in LIVE * 3], pause_s=0.05)

        assert time.monotonic() - started < 3.0 + 0.05 * len(LIVE * 3)
        assert reply == b"" or reply.startswith(b"HTTP/1.1 408 ")

    def test_a_second_request_has_the_same_timeout(self, port: int) -> None:
        """The timeout is per request."""
        with connected(port) as client:
            client.sendall(LIVE + b"\r\n")
            assert client.recv(1 << 16).startswith(b"HTTP/1.1 200 ")
            started = time.monotonic()
            client.sendall(b"GET /hea")

            assert b"HTTP/1.1 408 " in all_of(client)
            assert time.monotonic() - started < 3.0

    def test_a_slow_body_gets_408(self, port: int) -> None:
        """`serve.timeout_s` for the whole body."""
        reply = exchange(port, post("/label", "content-length: 100"), *[b" "] * 12, pause_s=0.1)

        error_in(reply, 408, "body_timeout")

    def test_a_body_that_continues_after_its_answer_closes_the_connection(self, port: int) -> None:
        """A route that reads no body does not wait for it."""
        started = time.monotonic()

        reply = exchange(port, post("/nowhere", "content-length: 100000"), *[b" "] * 20, pause_s=0.1)

        assert time.monotonic() - started < 4.0
        assert reply == b"" or reply.startswith(b"HTTP/1.1 404 ")

    def test_a_client_that_does_not_read_its_answer_is_disconnected(self) -> None:
        """Otherwise a closed connection keeps its answer in memory; here it uses the only slot."""
        with serving(large_answer, replace(LIMITS, max_connections=1)) as port, connected(port) as client:
            client.sendall(LIVE + b"\r\n")
            time.sleep(0.2)
            error_in(exchange(port), 503, "too_many_connections")
            time.sleep(1.5)

            assert exchange(port, LIVE + CLOSE).startswith(b"HTTP/1.1 200 ")

    def test_a_client_that_reads_its_answers_is_not_disconnected(self) -> None:
        """Although the write buffer is never empty for longer than the timeout."""
        with serving(large_answer, LIMITS) as port, connected(port) as client:
            started = time.monotonic()
            while time.monotonic() - started < 3 * LIMITS.write_timeout_s:
                client.sendall(LIVE + b"\r\n")
                left = len(LARGE)
                time.sleep(0.1)
                while left > 0:
                    piece = client.recv(1 << 20)
                    assert piece, "disconnected"
                    left -= len(piece)


class TestPipelining:
    @pytest.mark.parametrize("rounds", [1, 30])
    def test_one_request_and_sixteen_behind_it_are_answered(self, port: int, rounds: int) -> None:
        """Repeatedly: the limit is on waiting requests, not on their total."""
        count = Limits().max_waiting + 1
        with connected(port) as client:
            for _ in range(rounds):
                client.sendall((LIVE + b"\r\n") * count)
                got = b""
                while got.count(b"HTTP/1.1 200 ") < count or not got.endswith(b"}"):
                    got += client.recv(1 << 16)

                assert got.count(b"HTTP/1.1 ") == count

    def test_more_than_that_close_the_connection(self, tmp_path: Path) -> None:
        """One read may hold thousands; none behind the sixteenth is parsed."""
        other = Served(tmp_path)
        with serving(other.app) as port:
            got = exchange(port, b"GET /health/live HTTP/1.1\r\n\r\n" * 5000)

            answered = sum(
                float(line.split()[1])
                for line in other.metrics.text().splitlines()
                if line.startswith("streamlearn_http_request_duration_seconds_count")
            )

        assert got.count(b"HTTP/1.1 ") <= answered <= 1, "the one that was running, no other"

    def test_reading_stops_while_requests_wait(self) -> None:
        """Also after an answer: a waiting body must not grow."""
        may_answer = threading.Semaphore(0)

        async def app(scope: Any, receive: Any, send: Any) -> None:
            assert scope["type"] == "http"
            while not may_answer.acquire(blocking=False):
                await asyncio.sleep(0.005)
            await send({"type": "http.response.start", "status": 204, "headers": []})
            await send({"type": "http.response.body", "body": b""})

        def sent_until_full(client: socket.socket) -> int:
            """Bytes accepted until sending stalls, or until they exceed any buffer."""
            total, idle_at = 0, time.monotonic() + 0.5
            while time.monotonic() < idle_at and total < 32 << 20:
                try:
                    total += client.send(b" " * (1 << 16))
                    idle_at = time.monotonic() + 0.5
                except BlockingIOError:
                    time.sleep(0.01)
            return total

        with serving(app) as port, ExitStack() as ends, connected(port) as client:
            ends.callback(may_answer.release, 100)  # a server waits for its answers before it ends
            client.sendall((LIVE + b"\r\n") * 4 + post("/label", f"content-length: {1 << 30}"))
            client.setblocking(False)
            assert sent_until_full(client) > 0
            for _ in range(3):
                may_answer.release()

                assert sent_until_full(client) == 0

            for _ in range(2):
                may_answer.release()
            assert sent_until_full(client) > 0, "the last one has its turn, and is read"


class TestNumbers:
    def test_connections_past_the_bound_get_503_at_once(self, served: Served, tmp_path: Path) -> None:
        """A closed connection makes room."""
        other = Served(tmp_path)
        limits = Limits(max_connections=3, header_timeout_s=30.0)
        with serving(other.app, limits) as port, ExitStack() as held:
            clients = [held.enter_context(connected(port)) for _ in range(3)]
            time.sleep(0.2)
            error_in(exchange(port), 503, "too_many_connections")
            clients[0].close()
            time.sleep(0.2)

            assert exchange(port, LIVE + CLOSE).startswith(b"HTTP/1.1 200 ")

    def test_the_bound_is_lower_if_the_process_may_open_few_files(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Otherwise accept would fail, also for metrics and log."""
        monkeypatch.setattr(resource, "getrlimit", lambda _: (512, 512))

        assert limits_of_process().max_connections == 256

    def test_a_prediction_fits_within_all_bounds(self, port: int) -> None:
        """A normal request is not affected."""
        status, reported = ask(f"http://127.0.0.1:{port}/predict", {"instances": [X] * 8})

        assert (status, len(reported["predictions"])) == (200, 8)
