"""The served teacher: one immutable object, replaced by one assignment.

A watcher thread looks for the pinned teacher, else the newest. It loads it into a new network, tries it on one row, and
then swaps it in. So an answer and its version always come from the same weights. A teacher that cannot be loaded is
never served: the previous one stays if it is still pinned, else the newest answers. A server without a teacher falls
back to the newest version that can be loaded.
"""

from __future__ import annotations

import contextlib
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
from streamlearn.metrics import TeacherMetrics
from streamlearn.models.answer import corrected
from streamlearn.models.build import ModelSpec, build
from streamlearn.models.mlp import completed
from streamlearn.models.normalise import as_centre_and_scale
from streamlearn.models.settings import ROW_NETWORKS
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
    log_offsets_C: Probabilities | None = field(default=None, repr=False, compare=False)
    """Correction of its probabilities for the class prior of its step; None for none."""
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
        return probs if self.log_offsets_C is None else corrected(probs, self.log_offsets_C)


def load(published: PublishedModel, schema: Schema, *, factory: str | None = None) -> LoadedModel:
    """Rebuild a published teacher, and try it on one row, so that the first request does not pay for it.

    Raises:
        StateError: the file is missing, incomplete, not finite, or of another schema or network.
    """
    try:
        spec = ModelSpec.from_json(published.metadata["model_spec"])
        _check_factory(spec, factory)
        metadata = published.metadata
        names = tuple(json.loads(metadata["classes"])) if "classes" in metadata else schema.classes
        _check_schema(published, spec, names, schema)
        arrays = as_centre_and_scale(load_arrays(published))
        network = build(spec, seed=0)
        if spec.factory in ROW_NETWORKS:
            arrays = completed(arrays, network.state_dict())
        network.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()})
        network.eval().requires_grad_(requires_grad=False)
        model = LoadedModel(
            published.step,
            published.published_at_s,
            spec,
            network,
            max(names, schema.classes, key=len),
            learned_offsets_of(metadata),
            _log_offsets(metadata, schema.capacity),
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


def _log_offsets(metadata: Mapping[str, str], classes: int) -> Probabilities | None:
    """The correction of the class prior in a header; None where an earlier version published it."""
    if "log_offsets" not in metadata:
        return None
    offsets_C = np.array(json.loads(metadata["log_offsets"]), np.float32)
    if offsets_C.shape != (classes,) or not np.isfinite(offsets_C).all():
        raise ValueError(f"log_offsets: expected {classes} finite numbers, got {metadata['log_offsets']!r:.80}")
    return offsets_C


def _check_factory(spec: ModelSpec, factory: str | None) -> None:
    """Only the config may name code to import (D15), not a file in the folder."""
    if factory is not None and spec.factory != factory:
        raise ValueError(f"its model.factory is {spec.factory!r:.80}, the config has {factory!r}")


def _check_schema(published: PublishedModel, spec: ModelSpec, names: tuple[str, ...], schema: Schema) -> None:
    """A teacher of another schema would answer wrongly: its classes may be the same in another order.

    It may lack columns that were added at the end.
    """
    # Either side may have added names, in the room that the schema leaves for them.
    shared = min(len(names), len(schema.classes))
    columns = schema.columns[: max(1, len(spec.columns))]
    shape = (sum(column.width for column in columns),) if columns else schema.shape
    dtype = published.metadata.get("dtype", schema.dtype.name)
    found = (spec.columns, tuple(spec.shape), dtype, spec.classes, names[:shared])
    expected = (columns, shape, schema.dtype.name, schema.capacity, schema.classes[:shared])
    for name, got, right in zip(("columns", "shape", "dtype", "classes", "class names"), found, expected, strict=True):
        if got != right:
            msg = f"{published.path}: expected {name} {right!r:.200}, got {got!r:.200}"
            raise StateError(msg)


@dataclass(slots=True)
class _Place:
    """A place that names a teacher to serve, the pin or the newest, with its last failure."""

    look: Callable[[], PublishedModel | None]
    pins: bool
    error: str | None = None
    failed_identity: tuple[int, float] | None = None
    retry_at_s: float = 0.0


class Predictor:
    """Follows the published folder. It serves the pinned teacher, else the newest, else the newest older one."""

    def __init__(
        self,
        published: PublishedDir,
        schema: Schema,
        metrics: TeacherMetrics,
        *,
        factory: str | None = None,
        loaded: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`factory` is the only one that a teacher may name; None allows any. `loaded` is called after the first."""
        self.published = published
        self.newest_version: int | None = None
        """Step of the teacher that was published last, served or not; None before the first."""
        self._schema, self._metrics, self._clock, self._factory = schema, metrics, clock, factory
        self._loaded = loaded
        self.model: LoadedModel | None = None
        """The teacher that answers now; None before the first."""
        self._pin = _Place(published.pinned, pins=True)
        self._newest = _Place(published.newest, pins=False)
        self._stopping = threading.Event()
        self._thread = threading.Thread()

    def current(self) -> LoadedModel:
        """The teacher that answers now.

        Raises:
            NotPublishedError: before the first.
        """
        model = self.model
        if model is None:
            msg = "no teacher is published yet: the learner has not taken a step, or is not running"
            if error := self._newest.error:
                msg = f"no published teacher can be loaded; the newest: {error}"
            raise NotPublishedError(msg)
        return model

    @property
    def version(self) -> int | None:
        """Step of the teacher that answers now; None before the first."""
        return None if self.model is None else self.model.step

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names of the served teacher; of the schema before the first."""
        return self._schema.classes if self.model is None else self.model.classes

    def class_name(self, index: int | None) -> str | None:
        """A class of the served teacher; None if it was named after that was published."""
        classes = self.classes
        return None if index is None or index >= len(classes) else classes[index]

    def notes(self) -> list[str]:
        """Sentences on why the served teacher is not the newest; empty if it is."""
        model = self.model
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

    def load(self, published: PublishedModel) -> LoadedModel:
        """Load a teacher, without serving it.

        Raises:
            StateError: it cannot be served; the message has the reason.
        """
        return load(published, self._schema, factory=self._factory)

    def refresh(self) -> bool:
        """Serve the teacher that is to be served; True if it was swapped in. A failure keeps the current one.

        Once the watcher thread runs, only that thread calls this.
        """
        with contextlib.suppress(StateError):  # counted where the newest is needed
            if newest := self.published.newest():
                self.newest_version = newest.step
        held = self.model
        model = self._choose(held)
        if model is None or model == held:
            return False
        self.model = model
        if held is None:
            self._loaded()
        self._metrics.model(model.step, model.published_at_s, pinned=model.pinned)
        if model.pinned or (held is not None and held.pinned):
            log.info("pin_followed" if model.pinned else "pin_left", step=model.step, newest_step=self.newest_version)
        return True

    def _choose(self, held: LoadedModel | None) -> LoadedModel | None:
        """The teacher to serve; None if there is none yet."""
        if model := self._named_by(self._pin):
            return model
        if held is not None and held.pinned and self._pin.error is not None:
            return held  # the pin cannot be read or loaded: the pinned teacher stays
        if model := self._named_by(self._newest):
            return model
        return None if held is None else replace(held, pinned=False)

    def _named_by(self, place: _Place) -> LoadedModel | None:
        """The teacher that a place names, ready to answer. None if it names none, or one that cannot be loaded now."""
        held = self.model
        try:
            published = place.look()
        except StateError as error:
            return self._failed(place, (-1, 0.0), error)
        if published is None:
            model = None
        elif held is not None and held.identity == published.identity:
            model = replace(held, pinned=place.pins)
        elif self._waits(place, published.identity):
            return None
        else:
            try:
                model = replace(self.load(published), pinned=place.pins)
            except StateError as error:
                return self._failed(place, published.identity, error)
        place.error = place.failed_identity = None
        return model

    def _waits(self, place: _Place, identity: tuple[int, float]) -> bool:
        """Whether this teacher has failed, and its next try is not due."""
        return identity == place.failed_identity and self._clock() < place.retry_at_s

    def _failed(self, place: _Place, identity: tuple[int, float], error: StateError) -> LoadedModel | None:
        """Record a failure; if no teacher answers yet, return the newest older version that can be loaded."""
        if self._waits(place, identity):
            return None
        is_first = identity != place.failed_identity
        place.failed_identity, place.retry_at_s, place.error = identity, self._clock() + RETRY_S, str(error)
        self._count(identity[0], error, pinned=place.pins, is_first=is_first)
        if place.pins or self.model is not None:
            return None
        for published in reversed(self.published.versions()):
            if published.identity == identity:
                continue  # tried just now
            try:
                model = self.load(published)
            except StateError as older_error:
                self._count(published.step, older_error, pinned=False, is_first=is_first)
                continue
            log.warning("older_model_served", step=model.step, refused_step=self.newest_version)
            return model
        return None

    def _count(self, step: int, error: StateError, *, pinned: bool, is_first: bool) -> None:
        """Count a failure; log it if it is not one of a later try."""
        self._metrics.model_load_failed()
        if is_first:
            log.error("model_load_failed", step=step, still_serving_step=self.version, pinned=pinned, error=str(error))

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
