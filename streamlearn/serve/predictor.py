"""The served teacher: one whole, immutable object, replaced by one assignment when a newer one is published.

A watcher thread asks for the newest published teacher, loads it into a new network, tries it on one row, and only then
swaps it in. So an answer and its version always come from the same weights, and what does not fit is never served.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType

import numpy as np
import structlog
import torch
from torch import nn

from streamlearn.errors import ConfigError, NotPublishedError, StateError
from streamlearn.metrics import ServerMetrics
from streamlearn.models.build import ModelSpec, build
from streamlearn.records import Array, Probabilities, Schema
from streamlearn.state.publish import PublishedDir, PublishedModel, load_arrays

log = structlog.get_logger()

POLL_S = 0.2
RETRY_S = 5.0
"""A file that could not be loaded is tried again so often: a shared volume may have shown only half of it."""


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """One whole teacher. Never changed once built, so any thread may hold and use it."""

    step: int
    published_at_s: float
    spec: ModelSpec
    metadata: Mapping[str, str]
    network: nn.Module = field(repr=False)

    def probabilities(self, x: Array) -> Probabilities:
        """Class probabilities (n, C) of inputs (n, *shape) in the schema's dtype."""
        if not x.flags.writeable:
            x = x.copy()  # torch warns of read-only memory, which decoded request bodies are
        with torch.inference_mode():
            logits_BC = self.network(torch.from_numpy(x))
            probs: Probabilities = logits_BC.float().softmax(dim=1).numpy()
        return probs


def load(published: PublishedModel, schema: Schema, *, factory: str | None = None) -> LoadedModel:
    """Rebuild a published teacher, and try it on one row, so that the first request does not pay for it.

    Raises:
        StateError: the file is gone, not whole, not finite, or of another schema or network.
    """
    try:
        spec = ModelSpec.from_json(published.metadata["model_spec"])
        _check_factory(spec, factory)
        _check_schema(published, spec, schema)
        arrays = load_arrays(published)
        network = build(spec, seed=0)
        network.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()})
        network.eval().requires_grad_(requires_grad=False)
        model = LoadedModel(published.step, published.published_at_s, spec, published.metadata, network)
        tried = model.probabilities(np.zeros((1, *schema.shape), dtype=schema.dtype))
    except (ConfigError, KeyError, ValueError, TypeError, RuntimeError) as error:
        # RuntimeError is what load_state_dict and the forward pass raise for names and shapes that do not fit.
        msg = f"{published.path}: not a teacher that this server can serve: {error}"
        raise StateError(msg) from error
    broken = [name for name, array in arrays.items() if array.dtype.kind == "f" and not np.isfinite(array).all()]
    if broken or not np.isfinite(tried).all():
        msg = f"{published.path}: weights are not finite: {', '.join(broken[:5]) or 'the answer to zeros'}"
        raise StateError(msg)
    return model


def _check_factory(spec: ModelSpec, factory: str | None) -> None:
    """Only the config may name what is imported (D14), whoever can write into the folder."""
    if factory is not None and spec.factory != factory:
        raise ValueError(f"its model.factory is {spec.factory!r:.80}, the config says {factory!r}")


def _check_schema(published: PublishedModel, spec: ModelSpec, schema: Schema) -> None:
    """A teacher of another schema would answer, and be wrong: classes may even be the same in another order."""
    told = published.metadata
    classes = json.loads(told["classes"]) if "classes" in told else list(schema.classes)
    found = (tuple(spec.shape), told.get("dtype", schema.dtype.name), spec.classes, classes)
    wanted = (schema.shape, schema.dtype.name, len(schema.classes), list(schema.classes))
    for name, got, expected in zip(("shape", "dtype", "classes", "class names"), found, wanted, strict=True):
        if got != expected:
            msg = f"{published.path}: wanted {name} {expected!r:.200}, got {got!r:.200}"
            raise StateError(msg)


class Predictor:
    """Follows the published directory, and answers with the newest teacher that could be loaded."""

    def __init__(
        self,
        published: PublishedDir,
        schema: Schema,
        metrics: ServerMetrics,
        *,
        factory: str | None = None,
        threads: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Follow a folder.

        `factory` is the only one that a teacher may name; None takes any. `threads` sets torch's intra-op threads for
        the whole process; None leaves them.
        """
        if threads is not None:
            torch.set_num_threads(threads)
        self._published, self._schema, self._metrics, self._clock = published, schema, metrics, clock
        self._factory = factory
        self._model: LoadedModel | None = None
        self._failed: tuple[int, float] | None = None
        self._retry_at = 0.0
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def current(self) -> LoadedModel:
        """The teacher that answers now.

        Raises:
            NotPublishedError: before the first.
        """
        model = self._model
        if model is None:
            msg = "no teacher is published yet: the learner has not taken a step, or is not running"
            raise NotPublishedError(msg)
        return model

    def predict(self, x: Array) -> tuple[Probabilities, LoadedModel]:
        """Class probabilities (n, C), and the teacher that gave them.

        Raises:
            NotPublishedError: before the first teacher.
        """
        model = self.current()
        return model.probabilities(x), model

    def refresh(self) -> bool:
        """Load the newest teacher if it is not the current one; True where it was swapped in. Keeps the old on failure.

        Called by the watcher thread alone once it runs.
        """
        try:
            newest = self._published.newest()
        except StateError as error:
            self._count_failure((-1, 0.0), error)
            return False
        if newest is None:
            return False
        identity = (newest.step, newest.published_at_s)
        held = self._model
        if held is not None and identity == (held.step, held.published_at_s):
            return False
        if identity == self._failed and self._clock() < self._retry_at:
            return False
        try:
            model = load(newest, self._schema, factory=self._factory)
        except StateError as error:
            self._count_failure(identity, error)
            return False
        self._model = model
        self._failed = None
        self._metrics.model(model.step, model.published_at_s)
        log.debug("model_loaded", step=model.step, published_at_s=model.published_at_s)
        return True

    def _count_failure(self, identity: tuple[int, float], error: StateError) -> None:
        first = identity != self._failed
        if not first and self._clock() < self._retry_at:
            return
        self._failed, self._retry_at = identity, self._clock() + RETRY_S
        self._metrics.model_load_failed()
        if first:
            held = self._model.step if self._model is not None else None
            log.error("model_load_failed", step=identity[0], still_serving_step=held, error=str(error))

    def start(self) -> None:
        """Load what is there, then follow in the background."""
        assert self._thread is None, "started twice"
        self.refresh()
        self._stopping.clear()
        self._thread = threading.Thread(target=self._watch, name="model-watcher", daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stopping.wait(POLL_S):
            self.refresh()

    def close(self) -> None:
        """Stop following. The teacher that is held goes on answering."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(timeout=5.0)
            self._thread = None

    def __enter__(self) -> Predictor:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
