"""Requests that wait: bounded in number and time; a true condition does not wait."""

from __future__ import annotations

import asyncio
import time

import pytest

from streamlearn.metrics import ServerMetrics
from streamlearn.serve.failures import RequestError
from streamlearn.serve.waiting import POLL_S, Waiters


@pytest.fixture
def waiters() -> Waiters:
    return Waiters(ServerMetrics(version="1"), "rain", most=1)


class Sky:
    """Rains from the n-th check on."""

    def __init__(self, from_look: int) -> None:
        self.from_look, self.looks = from_look, 0

    def rains(self) -> bool:
        self.looks += 1
        return self.looks >= self.from_look


def test_a_true_condition_does_not_wait(waiters: Waiters) -> None:
    """One check."""
    sky = Sky(1)

    assert asyncio.run(waiters.until(sky.rains, 0.0))

    assert sky.looks == 1


def test_a_wait_ends_when_the_condition_becomes_true(waiters: Waiters) -> None:
    """Before its timeout."""
    started = time.monotonic()

    assert asyncio.run(waiters.until(Sky(3).rains, 60.0))

    assert time.monotonic() - started < 30.0


def test_a_wait_ends_at_its_timeout(waiters: Waiters) -> None:
    """With a last check."""
    sky = Sky(1000)

    assert not asyncio.run(waiters.until(sky.rains, POLL_S / 2))

    assert sky.looks == 2


def test_a_wait_past_the_bound_is_refused(waiters: Waiters) -> None:
    """429, counted. A finished wait makes room, also after an error."""
    looks = iter([False])

    async def play() -> int:
        first = asyncio.create_task(waiters.until(Sky(1000).rains, 60.0))
        await asyncio.sleep(0)
        with pytest.raises(RequestError) as refused:
            await waiters.until(Sky(2).rains, 60.0)
        assert await waiters.until(Sky(1).rains, 60.0)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        with pytest.raises(RuntimeError):
            await waiters.until(lambda: next(looks), 60.0)  # fails at the second look
        assert await waiters.until(Sky(2).rains, 60.0)
        return refused.value.status

    assert asyncio.run(play()) == 429
