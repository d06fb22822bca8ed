"""Connections that are opened on first use."""

from __future__ import annotations

import threading

import pytest

from streamlearn.errors import LogError, LogUnavailableError
from streamlearn.log.lazy import LazyClient


class Remote:
    """The other side of the connections: numbers the clients that connect, unless it is away."""

    def __init__(self) -> None:
        self.away = False
        self.timeouts: list[float] = []
        self.closed: list[int] = []

    def connect(self, timeout_s: float) -> int:
        if self.away:
            raise LogUnavailableError("away")
        self.timeouts.append(timeout_s)
        return len(self.timeouts)

    def client(self) -> LazyClient[int]:
        return LazyClient(self.connect, self.closed.append)


def test_nothing_connects_before_the_first_use() -> None:
    """All later uses share one client."""
    remote = Remote()
    client = remote.client()
    assert remote.timeouts == []

    assert [client.get(3.0), client.get(3.0)] == [1, 1]

    assert remote.timeouts == [3.0]


def test_each_use_tries_to_connect_until_one_succeeds() -> None:
    """The other side may start later."""
    remote = Remote()
    client = remote.client()
    remote.away = True
    with pytest.raises(LogUnavailableError):
        client.get(1.0)

    remote.away = False

    assert client.get(1.0) == 1


def test_a_dropped_client_is_closed_once_and_replaced() -> None:
    """Two threads may find the same client broken: the second must not drop its successor."""
    remote = Remote()
    client = remote.client()
    broken = client.get(1.0)

    client.drop(broken)
    client.drop(broken)

    assert client.get(1.0) == 2
    assert remote.closed == [1]


def test_the_thread_that_holds_a_client_may_drop_it() -> None:
    """It is the one that finds it broken."""
    remote = Remote()
    client = remote.client()

    with client.alone(1.0) as broken:
        client.drop(broken)

    assert client.get(1.0) == 2


def test_other_threads_wait_no_longer_than_their_timeout() -> None:
    """Two threads never use a client at once."""
    client = Remote().client()
    raised: list[LogUnavailableError] = []

    def intrude() -> None:
        try:
            client.get(0.05)
        except LogUnavailableError as error:
            raised.append(error)

    with client.alone(1.0):
        thread = threading.Thread(target=intrude)
        thread.start()
        thread.join(10.0)

    assert len(raised) == 1
    assert client.get(0.0) == 1


def test_a_closed_client_stays_closed() -> None:
    """Closing twice is allowed."""
    remote = Remote()
    client = remote.client()
    client.get(1.0)

    client.close()
    client.close()

    assert remote.closed == [1]
    with pytest.raises(LogError, match="closed"):
        client.get(1.0)
