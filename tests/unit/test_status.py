"""The heartbeat file."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness.fakes import FaultyFiles

from streamlearn.state.status import read_status, write_status

STATUS = {"pid": 7, "state": "learning", "accuracy": {"teacher": None}, "note": "ünïcode"}


def test_what_was_written_is_read(tmp_path: Path) -> None:
    """Only the newest, and no temporary file stays."""
    path = tmp_path / "learner.json"

    write_status(path, {"pid": 1})
    write_status(path, STATUS)

    assert read_status(path) == STATUS
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_keeps_the_old_one(tmp_path: Path) -> None:
    """Readers never see a torn heartbeat."""
    path = tmp_path / "learner.json"
    write_status(path, STATUS)

    with pytest.raises(OSError, match="injected fault in replace"):
        write_status(path, {"pid": 8}, FaultyFiles(fail_at=1))

    assert read_status(path) == STATUS


@pytest.mark.parametrize("content", [None, b"", b'{"pid": 7', b"\xff\xfe", b"[1, 2]", b'"text"', b"null"])
def test_an_unreadable_file_is_none(tmp_path: Path, content: bytes | None) -> None:
    """Missing, torn, not text, or no JSON object."""
    path = tmp_path / "learner.json"
    if content is not None:
        path.write_bytes(content)

    assert read_status(path) is None


def test_a_deeply_nested_heartbeat_is_none(tmp_path: Path) -> None:
    """The parser's RecursionError must not end a server's thread."""
    path = tmp_path / "learner.json"
    path.write_bytes(b"[" * 200_000)

    assert read_status(path) is None
