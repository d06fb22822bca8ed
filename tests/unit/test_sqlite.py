"""The embedded log's file: transactions, waiting for the lock, errors."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamlearn.errors import LogError, LogUnavailableError
from streamlearn.log.sqlite import connect, decode_headers, encode_headers, transaction, translated, wait_while_busy
from streamlearn.records import Headers

names = st.text(st.characters(exclude_categories=["Cs"]))


@pytest.fixture
def db(tmp_path: Path) -> Iterator[sqlite3.Connection]:
    """A new log's file."""
    with closing(connect(tmp_path / "log", 0.0, 10.0)) as db:
        yield db


def soon() -> float:
    return time.monotonic() + 0.05


@given(st.lists(st.tuples(names, st.binary())).map(tuple))
def test_headers_are_read_back_unchanged(headers: Headers) -> None:
    """Any name, any bytes, in order."""
    assert decode_headers(encode_headers(headers)) == headers


def test_no_headers_take_no_space() -> None:
    """Most records have none."""
    assert encode_headers(()) is None


def test_a_transaction_that_fails_leaves_nothing(db: sqlite3.Connection) -> None:
    """Also if an interrupt ended it."""

    def half_done() -> None:
        with transaction(db, soon()):
            db.execute("INSERT INTO topics VALUES ('t', 1)")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        half_done()

    assert not db.in_transaction
    assert db.execute("SELECT count(*) FROM topics").fetchone() == (0,)


def test_waiting_for_the_lock_ends_at_the_deadline(db: sqlite3.Connection, tmp_path: Path) -> None:
    """And not much later."""
    with closing(connect(tmp_path / "log", 0.0, 10.0)) as holder, transaction(holder, soon()):
        began = time.monotonic()

        with pytest.raises(sqlite3.OperationalError, match="locked"):
            wait_while_busy(db, "BEGIN IMMEDIATE", soon())

        assert 0.04 <= time.monotonic() - began < 2.0


def test_only_a_held_lock_is_retried(db: sqlite3.Connection) -> None:
    """Other errors would not go away."""
    began = time.monotonic()

    with pytest.raises(sqlite3.OperationalError, match="syntax"):
        wait_while_busy(db, "NO SUCH STATEMENT", time.monotonic() + 10.0)

    assert time.monotonic() - began < 5.0


def error_with(code: int) -> sqlite3.OperationalError:
    error = sqlite3.OperationalError("what SQLite says")
    error.sqlite_errorcode = code
    return error


@pytest.mark.parametrize(
    ("code", "advice"),
    [
        (sqlite3.SQLITE_BUSY, "lsof"),
        (sqlite3.SQLITE_FULL, "free some space"),
        (sqlite3.SQLITE_IOERR_FSYNC, "kernel"),
        (sqlite3.SQLITE_READONLY_DIRECTORY, "owner and mode"),
    ],
)
def test_errors_that_may_go_away_are_unavailable_and_give_advice(tmp_path: Path, code: int, advice: str) -> None:
    """With the path, the operation, and SQLite's message."""
    with (
        pytest.raises(LogUnavailableError, match=rf"log: append: what SQLite says; .*{advice}"),
        translated(tmp_path / "log", "append"),
    ):
        raise error_with(code)


def test_a_damaged_file_is_a_permanent_error(tmp_path: Path) -> None:
    """A retry would not help."""
    with pytest.raises(LogError, match="restore it") as raised, translated(tmp_path / "log", "read"):
        raise error_with(sqlite3.SQLITE_CORRUPT)

    assert not isinstance(raised.value, LogUnavailableError)


def test_a_programming_error_is_not_translated(db: sqlite3.Connection, tmp_path: Path) -> None:
    """Except for a closed connection."""
    with pytest.raises(sqlite3.ProgrammingError), translated(tmp_path, "read"):
        db.execute("SELECT ?", (1, 2))
