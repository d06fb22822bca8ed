"""The learner's heartbeat: a small JSON file that tells servers a stalled learner from a live one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from streamlearn.state.files import DISK, Files, replacing


def write_status(path: Path, status: Mapping[str, Any], files: Files = DISK) -> None:
    """Replace the heartbeat. Not synced, because it is worthless after a crash.

    Raises:
        OSError: the old one is unchanged.
        StateError: the same, if `files` are fenced.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(json.dumps(status).encode())
        files.replace(temporary, path)


def read_status(path: Path) -> dict[str, Any] | None:
    """The last heartbeat; None if there is none, or it cannot be read."""
    try:
        status = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return status if isinstance(status, dict) else None
