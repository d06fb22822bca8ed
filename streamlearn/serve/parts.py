"""The parts of one server process, as its routes share them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from starlette.convertors import Convertor, register_url_convertor

from streamlearn.ledger.request_queue import RequestQueue
from streamlearn.ledger.view import LedgerView
from streamlearn.log.codec import Codec
from streamlearn.metrics import ServerMetrics
from streamlearn.models.answer import Thresholds
from streamlearn.serve.appender import Appender
from streamlearn.serve.batcher import QUEUE, Batcher
from streamlearn.serve.bodies import MAX_ITEMS, Bodies
from streamlearn.serve.predictor import Predictor
from streamlearn.serve.settings import ServeConfig
from streamlearn.state.files import DISK, Files

Status = Mapping[str, Any]
"""A file that a process writes about once a second: a heartbeat, or the learner's scores."""


class _SampleId(Convertor[str]):
    """The rest of the path: an id may have slashes, and line breaks, which `path` does not match."""

    regex = "(?s:.*)"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


register_url_convertor("id", _SampleId())


@dataclass(slots=True, kw_only=True)
class Parts:
    """One server process: what it reads, what it writes, and its bounds."""

    settings: ServeConfig
    name: str
    """Of this process, such as server-0; the `process` label of its metrics."""
    samples_topic: str
    labels_topic: str
    codec: Codec
    predictor: Predictor
    """Follows the published teachers."""
    thresholds: Thresholds
    """Of classes: which one is answered."""
    appender: Appender
    """The way into the log."""
    ledger: LedgerView
    """The learner's ledger and sample store, read only."""
    requests: RequestQueue | None
    """The active-learning queue; None if it is off."""
    metrics: ServerMetrics
    learner_status: Callable[[], Status | None]
    """The learner's last heartbeat; None before the first."""
    scores: Callable[[], Status | None]
    """The learner's last scores; None before the first."""
    scorers: Callable[[], Mapping[str, Status | None]] = dict
    """The last heartbeat of each scorer that should run, by name; None before the first."""
    siblings: Callable[[], Mapping[str, str]]
    """Process name to the URL of its own /metrics on this machine, never of a merged one."""
    files: Files = DISK
    """The disk that a pinned version is written to."""
    clock: Callable[[], float] = time.time
    """Seconds since the epoch."""
    queue: int = QUEUE
    """Requests that may wait for the model, for a fresher model, and for a label each."""
    max_items: int = MAX_ITEMS
    """Samples or labels in one request."""
    batcher: Batcher = field(init=False)
    bodies: Bodies = field(init=False)

    def __post_init__(self) -> None:
        """Add the parts that are made of others."""
        self.batcher = Batcher(self.predictor.current, self.metrics, queue=self.queue)
        self.bodies = Bodies(
            self.codec,
            self.metrics,
            max_bytes=self.settings.max_body_bytes,
            max_items=self.max_items,
            timeout_s=self.settings.timeout_s,
        )
