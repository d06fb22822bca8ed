"""The served teacher: one whole, immutable object, replaced by one assignment when another one is to be served.

A watcher thread asks which teacher is pinned, else which is the newest, loads it into a new network, tries it on one
row, and only then swaps it in. So an answer and its version always come from the same weights, and what does not fit is
never served: a pinned teacher that cannot be loaded leaves the one before to answer if that is pinned, else the newest.
A server that has no teacher yet, because the newest cannot be loaded, falls back to the newest one that can.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import TracebackType

import numpy as np
import structlog
import torch
from torch import nn

from streamlearn.errors import ConfigError, NotPublishedError, StateError
from streamlearn.metrics import ServerMetrics
from streamlearn.models.build import ModelSpec, build
from streamlearn.records import Array, Probabilities, Schema
from streamlearn.state.publish import PublishedDir, PublishedModel, learned_offsets_of, load_arrays

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
    classes: tuple[str, ...]
    """Names by class index: those of the schema, and those that a head has grown since."""
    learned_offsets: Mapping[str, int] | None = None
    """`next_offset` by "topic:partition", below which every label is learned; None where the teacher does not say."""
    pinned: bool = False
    """An operator chose it: it answers though newer ones may be there."""

    @property
    def identity(self) -> tuple[int, float]:
        """As `PublishedModel.identity`."""
        return self.step, self.published_at_s

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
        told = published.metadata
        offsets = learned_offsets_of(told)
        names = _class_names(told, schema)
        model = LoadedModel(
            published.step, published.published_at_s, spec, told, network, names, learned_offsets=offsets
        )
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
    # Names may have been added at either side, in the room that the schema leaves for them.
    names = json.loads(told["classes"])[: len(schema.classes)] if "classes" in told else list(schema.classes)
    found = (tuple(spec.shape), told.get("dtype", schema.dtype.name), spec.classes, names)
    wanted = (schema.shape, schema.dtype.name, schema.capacity, list(schema.classes[: len(names)]))
    for name, got, expected in zip(("shape", "dtype", "classes", "class names"), found, wanted, strict=True):
        if got != expected:
            msg = f"{published.path}: wanted {name} {expected!r:.200}, got {got!r:.200}"
            raise StateError(msg)


def _class_names(told: Mapping[str, str], schema: Schema) -> tuple[str, ...]:
    names = tuple(json.loads(told["classes"])) if "classes" in told else ()
    return max(names, schema.classes, key=len)


class _Source:
    """Where the teacher to serve is looked for, and what went wrong with what lies there now."""

    def __init__(self, look: Callable[[], PublishedModel | None], *, pins: bool) -> None:
        self.look, self.pins = look, pins
        self.error: str | None = None
        self.failed_identity: tuple[int, float] | None = None
        self._retry_at = 0.0

    def is_due(self, identity: tuple[int, float], now: float) -> bool:
        """Whether to try; what failed is tried again after a while only."""
        return identity != self.failed_identity or now >= self._retry_at

    def failed(self, identity: tuple[int, float], error: StateError, now: float) -> bool:
        """Remember a failure; True where it is the first of this teacher."""
        first = identity != self.failed_identity
        self.failed_identity, self._retry_at, self.error = identity, now + RETRY_S, str(error)
        return first

    def succeeded(self) -> None:
        """What lies there can be served, or nothing lies there: forget what was before."""
        self.failed_identity = self.error = None


class Predictor:
    """Follows the published directory, and answers with the pinned teacher, else the newest, that could be loaded.

    Where neither could be and none is held, it answers with the newest of the older ones.
    """

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
        self.published = published
        self.newest_version: int | None = None
        """Step of the teacher that was published last, whether it answers or not; None before the first."""
        self._schema, self._metrics, self._clock, self._factory = schema, metrics, clock, factory
        self._model: LoadedModel | None = None
        self._pinned = _Source(published.pinned, pins=True)
        self._newest = _Source(published.newest, pins=False)
        self._fall_back_at: float | None = None
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
            if error := self._newest.error:
                msg = f"no published teacher can be loaded; the newest: {error}"
            raise NotPublishedError(msg)
        return model

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names as the teacher that answers has them; the schema's before the first."""
        return self._schema.classes if self._model is None else self._model.classes

    def predict(self, x: Array) -> tuple[Probabilities, LoadedModel]:
        """Class probabilities (n, C), and the teacher that gave them.

        Raises:
            NotPublishedError: before the first teacher.
        """
        model = self.current()
        return model.probabilities(x), model

    def notes(self) -> list[str]:
        """What to know of how the teacher was chosen, as sentences; empty where the newest answers by itself."""
        model = self._model
        answering = "nothing" if model is None else f"version {model.step}"
        notes = []
        if (error := self._pinned.error) is not None:
            notes.append(f"the pinned version cannot be loaded, {answering} answers: {error}")
        elif model is not None and model.pinned:
            notes.append(f"version {model.step} is pinned, the newest is {self.newest_version}")
        # While a pinned version answers, the newest is not tried. Where nothing answers, `current` gives the error.
        if (error := self._newest.error) is not None and model is not None and not model.pinned:
            notes.append(f"the newest version cannot be loaded, {answering} answers: {error}")
        return notes

    def check(self, published: PublishedModel) -> None:
        """Load a teacher, and let it go: whether it could be served here.

        Raises:
            StateError: it could not; the message says why.
        """
        load(published, self._schema, factory=self._factory)

    def refresh(self) -> bool:
        """Have the teacher answer that is to; True where it was swapped in. Keeps the one that is held on failure.

        Called by the watcher thread alone once it runs.
        """
        pinned, newest = self._look(self._pinned), self._look(self._newest)
        if newest is not None:
            self.newest_version = newest.step
        held = self._model
        model = self._loaded(pinned, self._pinned)
        if model is None and not (held is not None and held.pinned and self._pinned.error is not None):
            model = self._loaded(newest, self._newest)
        if model is None and held is not None and held.pinned and self._pinned.error is None:
            model = replace(held, pinned=False)  # the pin is gone, and what was published since cannot be loaded
        if model is None and held is None and self._newest.error is not None:
            model = self._fall_back()
        if model is None or model is held:
            return False
        self._model = model
        self._metrics.model(model.step, model.published_at_s, pinned=model.pinned)
        log.debug("model_loaded", step=model.step, published_at_s=model.published_at_s)
        if model.pinned or (held is not None and held.pinned):
            log.info("pin_followed" if model.pinned else "pin_left", step=model.step, newest_step=self.newest_version)
        return True

    def _look(self, source: _Source) -> PublishedModel | None:
        try:
            published = source.look()
        except StateError as error:
            self._count_failure(source, (-1, 0.0), error)
            return None
        if published is None:
            source.succeeded()
        return published

    def _loaded(self, published: PublishedModel | None, source: _Source) -> LoadedModel | None:
        """A published teacher, ready to answer; the one that is held where it is that; None where it cannot be had."""
        held = self._model
        if published is None:
            return None
        if held is not None and held.identity == published.identity:
            source.succeeded()
            return held if held.pinned == source.pins else replace(held, pinned=source.pins)
        if not source.is_due(published.identity, self._clock()):
            return None
        try:
            model = load(published, self._schema, factory=self._factory)
        except StateError as error:
            self._count_failure(source, published.identity, error)
            return None
        source.succeeded()
        return replace(model, pinned=source.pins)

    def _fall_back(self) -> LoadedModel | None:
        """The newest of all versions that can be loaded; None where none can, to be tried again after a while."""
        now, due_at = self._clock(), self._fall_back_at
        if due_at is not None and now < due_at:
            return None
        self._fall_back_at = now + RETRY_S
        refused = self._newest.failed_identity
        for published in reversed(self.published.versions()):
            if published.identity == refused:
                continue  # tried just now
            try:
                model = load(published, self._schema, factory=self._factory)
            except StateError as error:
                self._metrics.model_load_failed()
                if due_at is None:  # the first time; as for the newest, it is logged once
                    self._log_failure(published.step, error, pinned=False)
                continue
            log.warning("older_model_served", step=model.step, refused_step=self.newest_version)
            return model
        return None

    def _count_failure(self, source: _Source, identity: tuple[int, float], error: StateError) -> None:
        now = self._clock()
        if not source.is_due(identity, now):
            return
        self._metrics.model_load_failed()
        if source.failed(identity, error, now):
            self._log_failure(identity[0], error, pinned=source.pins)

    def _log_failure(self, step: int, error: StateError, *, pinned: bool) -> None:
        held = self._model.step if self._model is not None else None
        log.error("model_load_failed", step=step, still_serving_step=held, pinned=pinned, error=str(error))

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
