"""A small learner for unit tests, on a log in memory."""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from harness.fakes import MemoryLog

from streamlearn.app import learner as learning
from streamlearn.app.build import build_loop
from streamlearn.app.log import make_codec
from streamlearn.app.monitor import OnStep
from streamlearn.config import Config, load_config
from streamlearn.loop.loop import TrainingLoop
from streamlearn.loop.report import Observer, StepReport
from streamlearn.records import TopicPartition
from streamlearn.state.checkpoint import Checkpoint, load_newest
from streamlearn.state.paths import StatePaths
from streamlearn.state.status import read_status

S, L = TopicPartition("samples", 0), TopicPartition("labels", 0)


def config_in(folder: Path, **overrides: Any) -> Config:
    """Four features, three classes, a tiny network, micro-batches of eight that are closed by count."""
    settings = {
        "state.dir": str(folder),
        "schema.shape": [4],
        "schema.classes": 3,
        "model.options": {"hidden": [8]},
        "batch.fresh": 8,
        "batch.labelled": 4,
        "batch.max_age_s": 3600.0,
        "batch.steps": 1,
        "learn.threads": 1,
        "metrics.port": 0,
    }
    return load_config(environ={}, overrides={**settings, **overrides})


def empty_log() -> MemoryLog:
    """Its topics, and a clock of its own: records are merged by time, so that no two may have the same."""
    ticking = itertools.count(int(time.time()) - 60, 1 / 256).__next__  # exact in binary
    log = MemoryLog(clock=ticking)
    log.create_topics({"samples": 1, "labels": 1, "dead-letters": 1})
    return log


def filled_log(config: Config, samples: int = 40) -> MemoryLog:
    """Samples s0, s1, …, and labels of the even ones, each four samples later."""
    log, codec, rng = empty_log(), make_codec(config), np.random.default_rng(0)
    for n in range(samples):
        log.append("samples", [codec.encode_sample(f"s{n}", rng.normal(size=4).astype(np.float32), true_label=n % 3)])
        if n >= 4 and n % 2 == 0:
            log.append("labels", [codec.labels.encode(f"s{n - 4}", n % 3)])
    return log


def learn(
    config: Config, log: MemoryLog, *, stopping: threading.Event | None = None, on_step: OnStep | None = None
) -> Checkpoint:
    """Run a learner process until it has learned the log, or is stopped; its newest checkpoint."""
    learning.learn(config, stopping or threading.Event(), until_end=True, opened=log.reopen(), on_step=on_step)
    return newest_checkpoint(config)


def newest_checkpoint(config: Config) -> Checkpoint:
    """The newest valid checkpoint."""
    found = load_newest(StatePaths(config.state.dir).checkpoints)
    assert found is not None
    return found


def status(config: Config) -> dict[str, Any]:
    """The last heartbeat."""
    found = read_status(StatePaths(config.state.dir).heartbeat)
    assert found is not None
    return found


class Reports(Observer):
    """Keeps the report of each step."""

    def __init__(self) -> None:
        self.steps: list[StepReport] = []
        self.published_steps: list[int] = []
        self.phases: list[str] = []

    def step_done(self, report: StepReport) -> None:
        self.steps.append(report)

    def phase_done(self, phase: str, duration_s: float) -> None:
        self.phases.append(phase)

    def published(self, step: int) -> None:
        self.published_steps.append(step)


@contextlib.contextmanager
def loop_on(config: Config, log_: MemoryLog, /, **parts: Any) -> Iterator[TrainingLoop]:
    """A loop on a new state folder, which reads the log from its beginning. `parts` replace those of the config."""
    loop = build_loop(config, log_.reopen(), {S: 0, L: 0}, stopping=threading.Event(), until_end=True)
    loop = replace(loop, **parts)
    loop.feed.start()
    try:
        yield loop
    finally:
        loop.feed.close()
        loop.saver.close(60.0)
        loop.journal.close()
        loop.ledger.close()
        loop.requests.close()


def run_loop(config: Config, log_: MemoryLog, /, **parts: Any) -> TrainingLoop:
    """The loop once it has learned everything in the log."""
    with loop_on(config, log_, **parts) as loop:
        loop.run(threading.Event(), until_end=True)
        loop.close()
    return loop
