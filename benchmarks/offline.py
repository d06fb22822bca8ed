"""Shared by `hostile.py`, `drift.py` and `recovery.py`: small data sets as tables, streams of events, one run.

A run is the daemon's own loop on a log in memory, and the teacher that a server would load.
"""

from __future__ import annotations

import contextlib
import logging
import math
import multiprocessing
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import common  # noqa: F401 - sets OMP_WAIT_POLICY before torch is imported
import numpy as np
import numpy.typing as npt
import structlog
from harness.fakes import MemoryLog
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

from streamlearn.app.learner import learn
from streamlearn.app.log import make_topics
from streamlearn.config import Config, load_config
from streamlearn.lab.datasets import Classes, load
from streamlearn.log.codec import Codec
from streamlearn.loop.loop import TrainingLoop
from streamlearn.loop.report import StepReport
from streamlearn.records import NewRecord, Schema
from streamlearn.serve.predictor import LoadedModel
from streamlearn.serve.predictor import load as load_published
from streamlearn.state.paths import StatePaths
from streamlearn.state.publish import PublishedDir

START_MS = 1_700_000_000_000
PUBLISH_EVERY_S = 0.25
_NEVER_S = 3600.0
_TEST_SHARE = 0.3
_MOST_TEST = 1500
_APPEND_RECORDS = 2000

CaseT = TypeVar("CaseT")
ResultT = TypeVar("ResultT")

Floats = npt.NDArray[np.float32]

MLP = {"factory": "mlp", "options": {"hidden": [64, 64]}}
CONVNET = {"factory": "convnet", "options": {"widths": [16, 32]}}


@dataclass(frozen=True)
class Data:
    """Samples x (N, *shape) with classes y (N,), and a held-out part; `scale` brings inputs to about 1."""

    name: str
    x: Floats
    y: Classes
    test_x: Floats
    test_y: Classes
    classes: int
    scale: float
    normalise: bool

    @property
    def schema(self) -> Schema:
        """The schema of its records."""
        return Schema(self.x.shape[1:], self.x.dtype, tuple(map(str, range(self.classes))))


def read(name: str, seed: int) -> Data:
    """A data set as a table, or `digit-images` as images, with a held-out part drawn by the seed.

    Raises:
        ConfigError: its library is not installed.
    """
    images = name == "digit-images"
    if name == "segments":
        x, y = _segments()
    else:
        loaded = load("digits" if images else name)
        x, y = np.asarray(loaded.x, np.float64), loaded.y
        if loaded.test_x is not None and loaded.test_y is not None:
            x, y = np.concatenate([x, loaded.test_x]), np.concatenate([y, loaded.test_y])
    order = np.random.default_rng((seed, 7)).permutation(len(x))
    held_out = min(_MOST_TEST, round(_TEST_SHARE * len(x)))
    test, train = order[:held_out], order[held_out:]
    x = (x if images else x.reshape(len(x), -1)).astype(np.float32)
    pixels = images or name == "digits"
    return Data(name, x[train], y[train], x[test], y[test], int(y.max()) + 1, 1 / 16 if pixels else 1.0, not pixels)


def _segments() -> tuple[npt.NDArray[np.float64], Classes]:
    from river.datasets import ImageSegments  # noqa: PLC0415

    rows = list(ImageSegments())
    names = sorted({label for _, label in rows})
    x = np.array([list(features.values()) for features, _ in rows])
    return x, np.array([names.index(label) for _, label in rows], np.int64)


class Event(NamedTuple):
    """One sample of a stream."""

    x: Floats | bytes
    """A sample, or the bytes of an undecodable record."""
    true_class: int
    label: int | None
    """The label sent `delay` samples later; None: no label."""
    delay: int


Hook = Callable[[TrainingLoop, StepReport, Path], None]
"""Called after each step in the learner's thread, with the state folder. Only `recovery.py` changes the learner."""


@dataclass(frozen=True)
class Learning:
    """Changes to the default settings, for short streams and a small network."""

    data: Data
    seed: int
    fresh: int = 64
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Overrides of everything else."""

    def config(self, folder: Path) -> Config:
        """Micro-batches close by count only, and nothing is saved before the end."""
        data = self.data
        tables: dict[str, dict[str, Any]] = {
            "source": {"samples": {"format": "raw"}},
            "schema": {
                "shape": list(data.x.shape[1:]),
                "dtype": "float32",
                "classes": data.classes,
                "scale": data.scale,
            },
            "model": {"normalise": data.normalise, **(CONVNET if data.x.ndim == 4 else MLP)},
            "learn": {
                "options": {"rampup_steps": 100},
                "ema_decay": 0.99,
                "seed": self.seed,
                "device": "cpu",
                "threads": 1,
            },
            # One step per micro-batch, as under a fast stream; it also makes the benchmark cheap.
            "batch": {"fresh": self.fresh, "steps": 1, "max_age_s": _NEVER_S},
            "labels": {"requests_per_hour": 0, "replay_rows": 1000},
            "state": {"dir": folder, "checkpoint_every_s": _NEVER_S, "publish_every_s": PUBLISH_EVERY_S},
            "metrics": {"port": 0},
        }
        for table, given in self.settings.items():
            options = tables.get(table, {}).get("options", {}) | given.get("options", {}) if table == "learn" else {}
            tables[table] = tables.get(table, {}) | dict(given) | ({"options": options} if options else {})
        return load_config(None, overrides=tables, environ={})


def published(folder: Path, schema: Schema) -> LoadedModel | None:
    """The published teacher, loaded as by a server."""
    newest = PublishedDir(StatePaths(folder).published).newest()
    return None if newest is None else load_published(newest, schema)


@contextlib.contextmanager
def run(learning: Learning, events: Iterator[Event], hook: Hook) -> Iterator[tuple[TrainingLoop, Path]]:
    """Learn a whole stream; yields the final parts and the state folder, which is removed afterwards."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    last: list[TrainingLoop] = []
    with tempfile.TemporaryDirectory(prefix="bench-offline-") as name:
        folder = Path(name)
        config = learning.config(folder)
        log = MemoryLog()
        make_topics(log, config)
        _write(log, config, events)

        def on_step(loop: TrainingLoop, report: StepReport) -> None:
            last[:] = [loop]
            hook(loop, report, folder)

        learn(config, threading.Event(), until_end=True, opened=log, on_step=on_step)
        yield last[0], folder


def _write(log: MemoryLog, config: Config, events: Iterator[Event]) -> None:
    """Append all records, a millisecond apart; a label has the timestamp of the sample before it."""
    codec, source = Codec(config.schema_.build()), config.source
    schema, labels, total = config.schema_.build(), [], 0
    samples: list[NewRecord] = []
    for number, event in enumerate(events):
        total = number + 1
        if event.label is not None:
            labels.append((number + event.delay, number, event.label))
        x = np.zeros(schema.shape, np.float32) if isinstance(event.x, bytes) else event.x
        record = codec.encode_sample(
            str(number), x, payload="raw", true_label=event.true_class, timestamp_ms=START_MS + number
        )
        if isinstance(event.x, bytes):
            kind = b"application/json" if event.x.startswith(b"{") else b"application/octet-stream"
            record = replace(record, value=event.x, headers=(("content-type", kind),))
        samples.append(record)
    due = sorted(labels)
    records = [
        codec.labels.encode(str(number), label, timestamp_ms=START_MS + at) for at, number, label in due if at < total
    ]
    for topic, written in ((source.samples.topics[0], samples), (source.labels.topic, records)):
        for first in range(0, len(written), _APPEND_RECORDS):
            log.append(topic, written[first : first + _APPEND_RECORDS])


def accuracy(classes_B: npt.NDArray[np.int64], true_B: Classes) -> float:
    """Share of equal classes."""
    return float((classes_B == true_B).mean())


def chance(true_B: Classes) -> float:
    """Share of the largest class, plus three standard errors."""
    largest = float(np.bincount(true_B).max() / len(true_B))
    return largest + 3.0 * math.sqrt(largest * (1.0 - largest) / len(true_B))


def median(values: Sequence[float | None]) -> float | None:
    """Median of the values that are not None."""
    there = [value for value in values if value is not None]
    return float(np.median(there)) if there else None


def in_pool(play: Callable[[CaseT], ResultT], wanted: Sequence[CaseT], jobs: int) -> Iterator[ResultT]:
    """Run each case in a process pool, with a bar on stderr; results in the order of completion."""
    context = multiprocessing.get_context("spawn")
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    with (
        Progress(*columns, console=Console(stderr=True)) as progress,
        ProcessPoolExecutor(jobs, mp_context=context) as pool,
    ):
        bar = progress.add_task("streams", total=len(wanted))
        for done in as_completed([pool.submit(play, case) for case in wanted]):
            yield done.result()
            progress.advance(bar)
