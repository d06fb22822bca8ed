"""One /metrics for all processes of a machine: this one's own metrics, and those of its siblings."""

from __future__ import annotations

import asyncio
import re
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.client import HTTPException

from streamlearn.metrics import ServerMetrics

TIMEOUT_S = 1.0
MAX_BYTES = 8 << 20
_SCRAPE_FAILED = "streamlearn_scrape_failed{"
# By default urllib uses HTTP_PROXY even for loopback, where a proxy cannot reach the siblings.
_open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open

_COMMENT = re.compile(r"# (HELP|TYPE) ([a-zA-Z_:][a-zA-Z0-9_:]*) (.*)", re.DOTALL)
_SAMPLE = re.compile(r"([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(.*)\})? (\S+(?: -?\d+)?)", re.DOTALL)


@dataclass(slots=True)
class _Family:
    comments: dict[str, str] = field(default_factory=dict)
    samples: list[str] = field(default_factory=list)


def merge(texts: Mapping[str, str]) -> str:
    """Merge the expositions of several processes by family, and label each sample with its process.

    If two processes differ in a family's help or type, the first one's is used.

    Raises:
        ValueError: a text is not an exposition; the message names its process and line.
    """
    families: dict[str, _Family] = {}
    for process, text in texts.items():
        label = 'process="' + process.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n") + '"'
        family: _Family | None = None
        # Not splitlines(): a label value may contain other line separators.
        for number, line in enumerate(text.split("\n"), 1):
            if match := _COMMENT.fullmatch(line):
                family = families.setdefault(match[2], _Family())
                family.comments.setdefault(match[1], line)
            elif (match := _SAMPLE.fullmatch(line)) and family is not None:
                labels = f"{label},{match[2]}" if match[2] else label
                family.samples.append(f"{match[1]}{{{labels}}} {match[3]}")
            elif line and not line.startswith("#"):
                msg = f"{process}: line {number} is not in Prometheus' text format: {line[:80]!r}"
                raise ValueError(msg)
    merged = (line for family in families.values() for line in (*family.comments.values(), *family.samples))
    return "".join(f"{line}\n" for line in merged)


def fetch(url: str) -> str | None:
    """A sibling's exposition, without its own `scrape_failed` gauges, which date from its last scrape.

    None if it does not answer with an exposition in time.
    """
    if not url.startswith("http://"):
        return None
    try:
        with _open(url, timeout=TIMEOUT_S) as reply:
            body: bytes = reply.read(MAX_BYTES + 1)
        text = "\n".join(line for line in body.decode().split("\n") if not line.startswith(_SCRAPE_FAILED))
        merge({"": text})
    except (OSError, HTTPException, ValueError):
        # OSError includes URLError and timeouts; ValueError is a reply that is not an exposition.
        return None
    return text if len(body) <= MAX_BYTES else None


async def merged(name: str, metrics: ServerMetrics, siblings: Mapping[str, str]) -> str:
    """The metrics of this process and its siblings as one text. A gauge reports siblings that cannot be reached."""
    targets = {process: url for process, url in siblings.items() if process != name}
    texts = await asyncio.gather(*(asyncio.to_thread(fetch, url) for url in targets.values()))
    reached = {process: text for process, text in zip(targets, texts, strict=True) if text is not None}
    for process in targets:
        metrics.scraped(process, failed=process not in reached)
    return merge({name: metrics.text(), **reached})
