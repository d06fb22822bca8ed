"""The served teacher: one immutable object, replaced by one assignment.

A watcher thread looks for the pinned teacher, else the newest. It loads it into a new network, tries it on one row, and
then swaps it in. So an answer and its version always come from the same weights. A teacher that cannot be loaded is
never served: the previous one stays if it is still pinned, else the newest answers. A server without a teacher falls
back to the newest version that can be loaded.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

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
"""Wait before a file that could not be loaded is tried again: a shared volume may have shown only part of it."""


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """One whole teacher. It never changes, so any thread may hold and use it."""

    step: int
    published_at_s: float
    spec: ModelSpec
    network: nn.Module = field(repr=False)
    classes: tuple[str, ...]
    """Class names by index: those of the schema, and those added to the head since."""
    learned_offsets: Mapping[str, int] | None = None
    """`next_offset` by "topic:partition": all labels below it are learned. None if the teacher does not say."""
    pinned: bool = False
    """An operator chose this version: it answers although newer ones may exist."""

    @property
    def identity(self) -> tuple[int, float]:
        """As `PublishedModel.identity`."""
        return self.step, self.published_at_s

    def probabilities(self, x: Array) -> Probabilities:
        """Class probabilities (n, C) of inputs (n, *shape) in the schema's dtype."""
        if self.spec.columns:
            x = x[:, : self.spec.shape[0]]  # columns that were added since it was published
        if not x.flags.writeable:
            x = x.copy()  # torch warns about read-only memory, such as decoded request bodies
        with torch.inference_mode():
            logits_BC = self.network(torch.from_numpy(x))
            probs: Probabilities = logits_BC.float().softmax(dim=1).numpy()
        return probs


def load(published: PublishedModel, schema: Schema, *, factory: str | None = None) -> LoadedModel:
    """Rebuild a published teacher, and try it on one row, so that the first request does not pay for it.

    Raises:
        StateError: the file is missing, incomplete, not finite, or of another schema or network.
    """
    try:
        spec = ModelSpec.from_json(published.metadata["model_spec"])
        _check_factory(spec, factory)
        _check_schema(published, spec, schema)
        arrays = load_arrays(published)
        network = build(spec, seed=0)
        network.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()})
        network.eval().requires_grad_(requires_grad=False)
        model = LoadedModel(
            published.step,
            published.published_at_s,
            spec,
            network,
            _class_names(published.metadata, schema),
            learned_offsets=learned_offsets_of(published.metadata),
        )
        probs_1C = model.probabilities(np.zeros((1, *schema.shape), dtype=schema.dtype))
    except (ConfigError, KeyError, ValueError, TypeError, RuntimeError) as error:
        # RuntimeError: load_state_dict and the forward pass, for names and shapes that do not match.
        msg = f"{published.path}: not a teacher that this server can serve: {error}"
        raise StateError(msg) from error
    broken = [name for name, array in arrays.items() if array.dtype.kind == "f" and not np.isfinite(array).all()]
    if broken or not np.isfinite(probs_1C).all():
        msg = f"{published.path}: weights are not finite: {', '.join(broken[:5]) or 'the answer to zeros'}"
        raise StateError(msg)
    return model


def _check_factory(spec: ModelSpec, factory: str | None) -> None:
    """Only the config may name code to import (D15), not a file in the folder."""
    if factory is not None and spec.factory != factory:
        raise ValueError(f"its model.factory is {spec.factory!r:.80}, the config has {factory!r}")


def _check_schema(published: PublishedModel, spec: ModelSpec, schema: Schema) -> None:
    """A teacher of another schema would answer wrongly: its classes may be the same in another order.

    It may lack columns that were added at the end.
    """
    metadata = published.metadata
    # Either side may have added names, in the room that the schema leaves for them.
    names = json.loads(metadata["classes"])[: len(schema.classes)] if "classes" in metadata else list(schema.classes)
    columns = schema.columns[: max(1, len(spec.columns))]
    shape = (sum(column.width for column in columns),) if columns else schema.shape
    found = (spec.columns, tuple(spec.shape), metadata.get("dtype", schema.dtype.name), spec.classes, names)
    expected = (columns, shape, schema.dtype.name, schema.capacity, list(schema.classes[: len(names)]))
    for name, got, right in zip(("columns", "shape", "dtype", "classes", "class names"), found, expected, strict=True):
        if got != right:
            msg = f"{published.path}: expected {name} {right!r:.200}, got {got!r:.200}"
            raise StateError(msg)


def _class_names(metadata: Mapping[str, str], schema: Schema) -> tuple[str, ...]:
    names = tuple(json.loads(metadata["classes"])) if "classes" in metadata else ()
    return max(names, schema.classes, key=len)


class _Candidate:
    """One of the two places that name a teacher to serve, the pin and the newest, with its last failure."""

    def __init__(self, look: Callable[[], PublishedModel | None], *, pins: bool) -> None:
        self.look, self.pins = look, pins
        self.error: str | None = None
        self.failed_identity: tuple[int, float] | None = None
        self._retry_at_s = 0.0

    def is_due(self, identity: tuple[int, float], now_s: float) -> bool:
        """Whether to try this teacher now."""
        return identity != self.failed_identity or now_s >= self._retry_at_s

    def failed(self, identity: tuple[int, float], error: StateError, now_s: float) -> bool:
        """Record a failure; True if it is the first of this teacher."""
        first = identity != self.failed_identity
        self.failed_identity, self._retry_at_s, self.error = identity, now_s + RETRY_S, str(error)
        return first

    def succeeded(self) -> None:
        """The teacher can be served, or none is named: clear the last failure."""
        self.failed_identity = self.error = None


class Predictor:
    """Follows the published folder. It serves the pinned teacher, else the newest, else the newest older one."""

    def __init__(
        self,
        published: PublishedDir,
        schema: Schema,
        metrics: ServerMetrics,
        *,
        factory: str | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`factory` is the only one that a teacher may name; None allows any."""
        self.published = published
        self.newest_version: int | None = None
        """Step of the teacher that was published last, served or not; None before the first."""
        self._schema, self._metrics, self._clock, self._factory = schema, metrics, clock, factory
        self._model: LoadedModel | None = None
        self._pin = _Candidate(published.pinned, pins=True)
        self._newest = _Candidate(published.newest, pins=False)
        self._fall_back_at_s: float | None = None
        self._stopping = threading.Event()
        self._thread = threading.Thread()

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
        """Class names of the served teacher; of the schema before the first."""
        return self._schema.classes if self._model is None else self._model.classes

    def notes(self) -> list[str]:
        """Sentences on why the served teacher is not the newest; empty if it is."""
        model = self._model
        answering = "nothing" if model is None else f"version {model.step}"
        notes = []
        if (error := self._pin.error) is not None:
            notes.append(f"the pinned version cannot be loaded, {answering} answers: {error}")
        elif model is not None and model.pinned:
            notes.append(f"version {model.step} is pinned, the newest is {self.newest_version}")
        # While a pinned version answers, the newest is not tried. While nothing answers, `current` has the error.
        if (error := self._newest.error) is not None and model is not None and not model.pinned:
            notes.append(f"the newest version cannot be loaded, {answering} answers: {error}")
        return notes

    def check(self, published: PublishedModel) -> None:
        """Check that a teacher could be served, by loading it.

        Raises:
            StateError: it cannot; the message has the reason.
        """
        load(published, self._schema, factory=self._factory)

    def refresh(self) -> bool:
        """Serve the teacher that is to be served; True if it was swapped in. A failure keeps the current one.

        Once the watcher thread runs, only that thread calls this.
        """
        pinned, newest = self._look(self._pin), self._look(self._newest)
        if newest is not None:
            self.newest_version = newest.step
        held = self._model
        model = self._choose(pinned, newest, held)
        if model is None or model is held:
            return False
        self._model = model
        self._report(model, was_pinned=held is not None and held.pinned)
        return True

    def _choose(
        self, pinned: PublishedModel | None, newest: PublishedModel | None, held: LoadedModel | None
    ) -> LoadedModel | None:
        """The teacher to serve; None keeps `held`."""
        if model := self._loaded(pinned, self._pin):
            return model
        is_pinned = held is not None and held.pinned
        if is_pinned and self._pin.error is not None:
            return None  # the pin cannot be read or loaded: the pinned teacher stays
        if model := self._loaded(newest, self._newest):
            return model
        if held is None:
            return self._fall_back() if self._newest.error is not None else None
        # The pin was removed, and the newest cannot be loaded.
        return replace(held, pinned=False) if is_pinned else None

    def _report(self, model: LoadedModel, *, was_pinned: bool) -> None:
        self._metrics.model(model.step, model.published_at_s, pinned=model.pinned)
        log.debug("model_loaded", step=model.step, published_at_s=model.published_at_s)
        if model.pinned or was_pinned:
            log.info("pin_followed" if model.pinned else "pin_left", step=model.step, newest_step=self.newest_version)

    def _look(self, candidate: _Candidate) -> PublishedModel | None:
        try:
            published = candidate.look()
        except StateError as error:
            self._count_failure(candidate, (-1, 0.0), error)
            return None
        if published is None:
            candidate.succeeded()
        return published

    def _loaded(self, published: PublishedModel | None, candidate: _Candidate) -> LoadedModel | None:
        """A published teacher, ready to answer. None if there is none, or it cannot be loaded now."""
        held = self._model
        if published is None:
            return None
        if held is not None and held.identity == published.identity:
            candidate.succeeded()
            return held if held.pinned == candidate.pins else replace(held, pinned=candidate.pins)
        if not candidate.is_due(published.identity, self._clock()):
            return None
        try:
            model = load(published, self._schema, factory=self._factory)
        except StateError as error:
            self._count_failure(candidate, published.identity, error)
            return None
        candidate.succeeded()
        return replace(model, pinned=candidate.pins)

    def _fall_back(self) -> LoadedModel | None:
        """The newest version that can be loaded. None if there is none, or the next try is not due."""
        now_s, due_at_s = self._clock(), self._fall_back_at_s
        if due_at_s is not None and now_s < due_at_s:
            return None
        self._fall_back_at_s = now_s + RETRY_S
        refused = self._newest.failed_identity
        for published in reversed(self.published.versions()):
            if published.identity == refused:
                continue  # tried just now
            try:
                model = load(published, self._schema, factory=self._factory)
            except StateError as error:
                self._metrics.model_load_failed()
                if due_at_s is None:  # each failure is logged once
                    self._log_failure(published.step, error, pinned=False)
                continue
            log.warning("older_model_served", step=model.step, refused_step=self.newest_version)
            return model
        return None

    def _count_failure(self, candidate: _Candidate, identity: tuple[int, float], error: StateError) -> None:
        now_s = self._clock()
        if not candidate.is_due(identity, now_s):
            return
        self._metrics.model_load_failed()
        if candidate.failed(identity, error, now_s):
            self._log_failure(identity[0], error, pinned=candidate.pins)

    def _log_failure(self, step: int, error: StateError, *, pinned: bool) -> None:
        held = self._model.step if self._model is not None else None
        log.error("model_load_failed", step=step, still_serving_step=held, pinned=pinned, error=str(error))

    def start(self) -> None:
        """Load the teacher that is there, then follow the folder in the background."""
        assert not self._thread.is_alive(), "started twice"
        self.refresh()
        self._stopping.clear()
        self._thread = threading.Thread(target=self._watch, name="model-watcher", daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stopping.wait(POLL_S):
            self.refresh()

    def close(self) -> None:
        """Stop following. The current teacher can still answer."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5.0)
