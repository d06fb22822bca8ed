"""Cards: where the processes of one machine expose their metrics, so that any server can scrape all of them."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator

import structlog

from streamlearn.state.files import write_whole
from streamlearn.state.paths import StatePaths
from streamlearn.state.status import read_status

_log = structlog.get_logger(__name__)
_UNREACHABLE = "http://127.0.0.1:0/metrics"


@contextlib.contextmanager
def registered(paths: StatePaths, name: str, port: int) -> Iterator[None]:
    """Keep a card of this process on disk. A failed write is logged; the process serves all the same."""
    card = paths.processes / f"{name}.json"
    try:
        paths.processes.mkdir(parents=True, exist_ok=True)
        write_whole(card, [json.dumps({"pid": os.getpid(), "metrics_port": port}).encode()])
    except OSError as error:
        _log.error("server_not_registered", name=name, error=str(error))
    try:
        yield
    finally:
        card.unlink(missing_ok=True)


def siblings_of(paths: StatePaths, own_name: str) -> dict[str, str]:
    """URLs of the metrics of the learner and the other servers of this machine, by process name."""
    cards = {path.stem: path for path in paths.processes.glob("*.json") if path.stem != own_name}
    cards["learner"] = paths.heartbeat
    # The learner is always included, so that its absence shows as a failed scrape (`scrape_failed`).
    found = {"learner": _UNREACHABLE}
    for name, path in sorted(cards.items()):
        card = read_status(path)
        if card is not None and _is_alive(card.get("pid")) and card.get("metrics_port"):
            found[name] = f"http://127.0.0.1:{int(card['metrics_port'])}/metrics"
    return found


def _is_alive(pid: object) -> bool:
    if not isinstance(pid, int) or pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # a process of another user
        return True
    return True
