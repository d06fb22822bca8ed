"""The learner's heartbeat: a small JSON file by which servers tell a stalled learner from a live one."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from streamlearn.errors import StateError
from streamlearn.state.files import DISK, Files


def write_status(path: Path, status: Mapping[str, Any], files: Files = DISK) -> None:
    """Replace the heartbeat. Not synced: it says what is true now, and is worth nothing after a crash.

    Raises:
        OSError: the old one still stands.
        StateError: the same, where `files` are fenced.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        aside.write_bytes(json.dumps(status).encode())
        files.replace(aside, path)
    except (OSError, StateError):
        aside.unlink(missing_ok=True)
        raise


def read_status(path: Path) -> dict[str, Any] | None:
    """The last heartbeat; None where there is none that can be read."""
    try:
        status = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return status if isinstance(status, dict) else None
