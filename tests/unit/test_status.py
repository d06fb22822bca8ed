"""The heartbeat file: whole, or none at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from streamlearn.state.status import read_status, write_status
from streamlearn.testing import FaultyFiles

STATUS = {"pid": 7, "state": "learning", "accuracy": {"teacher": None}, "note": "ünïcode"}


def test_what_was_written_is_read(tmp_path: Path) -> None:
    """The newest only, and no other file stays."""
    path = tmp_path / "learner.json"

    write_status(path, {"pid": 1})
    write_status(path, STATUS)

    assert read_status(path) == STATUS
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_one(tmp_path: Path) -> None:
    """Readers never see a torn heartbeat."""
    path = tmp_path / "learner.json"
    write_status(path, STATUS)

    with pytest.raises(OSError, match="injected fault in replace"):
        write_status(path, {"pid": 8}, FaultyFiles(fail_at=1))

    assert read_status(path) == STATUS


@pytest.mark.parametrize("content", [None, b"", b'{"pid": 7', b"\xff\xfe", b"[1, 2]", b'"text"', b"null"])
def test_what_cannot_be_read_counts_as_none(tmp_path: Path, content: bytes | None) -> None:
    """Missing, torn, not text, or no object: the reader has no status, and no exception."""
    path = tmp_path / "learner.json"
    if content is not None:
        path.write_bytes(content)

    assert read_status(path) is None


def test_a_heartbeat_nested_without_end_is_none(tmp_path: Path) -> None:
    """Whoever can write there must not end a server's thread: the parser recurses, and gives up in its own way."""
    path = tmp_path / "learner.json"
    path.write_bytes(b"[" * 200_000)

    assert read_status(path) is None
