"""Bytes of all requests together have a bound, and a slow or large body does not hold up the others."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from starlette.requests import Request

from streamlearn.metrics import ServerMetrics
from streamlearn.serve.failures import RequestError
from streamlearn.serve.held_bytes import BODIES_IN_FLIGHT, LARGE_AT_ONCE, HeldBytes

Receive = Callable[[], Awaitable[dict[str, Any]]]


def held_bytes(timeout_s: float = 2.0) -> HeldBytes:
    return HeldBytes(ServerMetrics(version="1"), max_bytes=100, timeout_s=timeout_s)


def request_of(receive: Receive) -> Request:
    scope = {"type": "http", "method": "POST", "path": "/", "query_string": b"", "headers": []}
    return Request(scope, receive)  # type: ignore[arg-type]


async def whole() -> dict[str, Any]:
    return {"type": "http.request", "body": b" " * 100, "more_body": False}


def test_all_bodies_together_are_bounded() -> None:
    """Many slow uploads do not fill the memory: the one past the bound gets 429."""
    bytes_ = held_bytes()

    async def play() -> tuple[int, int]:
        async with contextlib.AsyncExitStack() as held:
            for _ in range(BODIES_IN_FLIGHT):
                await held.enter_async_context(bytes_.read(request_of(whole)))
            with pytest.raises(RequestError) as refused:
                await held.enter_async_context(bytes_.read(request_of(whole)))
        async with bytes_.read(request_of(whole)) as body:
            return refused.value.status, len(body)

    assert asyncio.run(play()) == (429, 100)


def test_what_is_made_for_a_request_counts_too() -> None:
    """Stored samples that an answer needs, up to the size of a body."""
    bytes_ = held_bytes()

    async def play() -> int:
        with bytes_.room(100), contextlib.ExitStack() as held:
            for _ in range(BODIES_IN_FLIGHT - 1):
                held.enter_context(bytes_.room(100))
            with pytest.raises(RequestError) as refused:
                async with bytes_.read(request_of(whole)):
                    pytest.fail("it was read")
        return refused.value.status

    assert asyncio.run(play()) == 429
    with pytest.raises(RequestError) as too_large, bytes_.room(101):
        pytest.fail("there is room")
    assert too_large.value.status == 413


def test_a_body_that_does_not_arrive_is_408() -> None:
    """A slow client does not hold a request indefinitely."""

    async def never() -> dict[str, Any]:
        await asyncio.Event().wait()
        return {}

    async def play() -> None:
        async with held_bytes(timeout_s=0.01).read(request_of(never)):
            pytest.fail("there is no body")

    with pytest.raises(RequestError) as late:
        asyncio.run(play())
    assert late.value.status == 408


def test_at_most_two_large_bodies_are_decoded_at_once() -> None:
    """JSON costs many times its bytes while it is parsed."""
    running, most, lock = 0, 0, threading.Lock()

    def decode() -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.02)
        with lock:
            running -= 1

    async def all_at_once() -> None:
        bytes_ = held_bytes()
        await asyncio.gather(*(bytes_.decoded(1 << 17, decode) for _ in range(8)))

    asyncio.run(all_at_once())

    assert most == LARGE_AT_ONCE
