"""One /metrics for all processes: this one's own, and what its siblings on the same machine expose."""

from __future__ import annotations

import asyncio
import urllib.error
import urllib.request
from collections.abc import Mapping
from http.client import HTTPException

from streamlearn.metrics import ServerMetrics, merge

TIMEOUT_S = 1.0
MAX_BYTES = 8 << 20


def fetch(url: str, timeout_s: float = TIMEOUT_S) -> str | None:
    """A process's exposition; None where it does not answer with one in time."""
    if not url.startswith("http://"):
        return None
    try:
        with urllib.request.urlopen(url, timeout=timeout_s) as reply:  # noqa: S310  the scheme is checked above
            body: bytes = reply.read(MAX_BYTES + 1)
        text = body.decode()
        merge({"": text})
    except (OSError, HTTPException, ValueError):
        # OSError holds URLError and timeouts; ValueError a reply that is not an exposition.
        return None
    return text if len(body) <= MAX_BYTES else None


async def merged(name: str, metrics: ServerMetrics, siblings: Mapping[str, str]) -> str:
    """This process's metrics and its siblings', as one text. Who cannot be reached is left out, and a gauge says so."""
    targets = {process: url for process, url in siblings.items() if process != name}
    texts = await asyncio.gather(*(asyncio.to_thread(fetch, url) for url in targets.values()))
    reached = {process: text for process, text in zip(targets, texts, strict=True) if text is not None}
    for process in targets:
        metrics.scraped(process, failed=process not in reached)
    return merge({name: metrics.text(), **reached})
