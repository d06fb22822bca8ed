"""What a server is built from: parts made elsewhere, and plain values."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from streamlearn.ledger import LabelStatus
from streamlearn.ledger.request_queue import HandedOut
from streamlearn.log.base import Appends
from streamlearn.log.codec import Codec
from streamlearn.metrics import ServerMetrics
from streamlearn.records import Array, Schema
from streamlearn.serve.predictor import Predictor
from streamlearn.state.files import DISK, Files


class LedgerReader(Protocol):
    """What a server asks of the learner's sample store and label ledger."""

    def get(self, sample_id: str) -> LabelStatus | None:
        """The life of a sample's label; None where neither sample nor label is known."""
        ...

    def payload(self, sample_id: str) -> Array | None:
        """The stored payload, in the schema's shape and dtype; None where it is not there."""
        ...


class WantedSource(Protocol):
    """Hands out samples whose label would help; shared by all servers of a state folder."""

    def take(self, n: int, now_s: float, *, peek: bool = False) -> HandedOut:
        """At most `n`, each to one caller only; with `peek` they stay.

        Raises:
            StoreError: not now; nothing was handed out.
        """
        ...


@dataclass(frozen=True, slots=True)
class ServerParts:
    """The parts a server stands on. It starts and closes the predictor; the log is its maker's to close."""

    schema: Schema
    codec: Codec
    log: Appends
    predictor: Predictor
    ledger: LedgerReader
    metrics: ServerMetrics
    learner_status: Callable[[], Mapping[str, Any] | None]
    """The learner's heartbeat (`state.status.read_status`); None where none was ever seen."""
    siblings: Callable[[], Mapping[str, str]] = dict
    """Process name to the URL of its own bare /metrics on this machine (`metrics.start_http`), never a merged one."""
    scores: Callable[[], Mapping[str, Any] | None] = lambda: None
    """What the learner says of how good the model is; None before it has said anything."""
    wanted: WantedSource | None = None
    """None where nothing is handed out."""
    files: Files = DISK
    """The disk that an operator's choice of a version is written to."""
    clock: Callable[[], float] = time.time
    """Wall clock, in seconds since the epoch: the age of a teacher is told by it."""


@dataclass(frozen=True, slots=True)
class ServeSettings:
    """Plain values of a server. Bounds and defaults are the config's."""

    name: str
    """Of this process, as in server-0: its label in the merged metrics."""
    version: str
    samples_topic: str
    labels_topic: str
    token: str | None = field(repr=False)
    max_body_bytes: int
    max_instances: int
    queue: int
    batch: int
    timeout_s: float
    stale_after_s: float
    predict_token: str | None = field(default=None, repr=False)
    label_token: str | None = field(default=None, repr=False)
    admin_token: str | None = field(default=None, repr=False)
    """What each token opens stands in `edge`."""
    insecure: bool = False
    """Answer any Host and Origin without a token."""

    @property
    def wants_tokens(self) -> bool:
        """Whether any route but admin wants one."""
        return any((self.token, self.predict_token, self.label_token, self.admin_token))
