"""Connections made on first use."""

from __future__ import annotations

import threading

import pytest

from streamlearn.errors import LogError, LogUnavailableError
from streamlearn.log.lazy import LazyClient


class Other:
    """The other side: makes connections, numbered, when it is there."""

    def __init__(self) -> None:
        self.away = False
        self.made: list[float] = []
        self.ended: list[int] = []

    def make(self, timeout_s: float) -> int:
        if self.away:
            raise LogUnavailableError("away")
        self.made.append(timeout_s)
        return len(self.made)

    def connection(self) -> LazyClient[int]:
        return LazyClient(self.make, self.ended.append)


def test_nothing_is_made_before_it_is_wanted() -> None:
    """And one is enough for all later uses."""
    other = Other()
    connection = other.connection()
    assert other.made == []

    assert [connection.get(3.0), connection.get(3.0)] == [1, 1]

    assert other.made == [3.0]


def test_what_could_not_be_made_is_tried_again() -> None:
    """The other side may come up later."""
    other = Other()
    connection = other.connection()
    other.away = True
    with pytest.raises(LogUnavailableError):
        connection.get(1.0)

    other.away = False

    assert connection.get(1.0) == 1


def test_one_that_was_dropped_is_ended_once_and_made_anew() -> None:
    """Two threads may find the same one broken: the second must not drop its successor."""
    other = Other()
    connection = other.connection()
    broken = connection.get(1.0)

    connection.drop(broken)
    connection.drop(broken)

    assert connection.get(1.0) == 2
    assert other.ended == [1]


def test_alone_keeps_others_waiting_no_longer_than_they_like() -> None:
    """A client of one thread is never used by two."""
    connection = Other().connection()
    raised: list[LogUnavailableError] = []

    def intrude() -> None:
        try:
            connection.get(0.05)
        except LogUnavailableError as error:
            raised.append(error)

    with connection.alone(1.0):
        thread = threading.Thread(target=intrude)
        thread.start()
        thread.join(10.0)

    assert len(raised) == 1
    assert connection.get(0.0) == 1


def test_after_close_there_is_none() -> None:
    """Closing ends what there is, and may be done twice."""
    other = Other()
    connection = other.connection()
    connection.get(1.0)

    connection.close()
    connection.close()

    assert other.ended == [1]
    with pytest.raises(LogError, match="closed"):
        connection.get(1.0)
