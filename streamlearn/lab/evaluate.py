"""`streamlearn evaluate`: prequential evaluation on a labelled data set as a stream. Reproducible from a seed.

The protocol is CapyMOA's `prequential_ssl_evaluation` (Gomes et al. 2023):

    predict   each sample before it is learned, and score it by its true class, labelled or not (oracle)
    label     a share of the samples, `label_probability`; a label comes `delay` samples after its sample
    drop      labels that are not due when the stream ends

Next to the oracle scores are the observed ones: first predictions of the labelled samples, which a service can measure.
Their gap is the effect of the choice and the delay of labels. One difference to CapyMOA: samples are predicted one
micro-batch at a time (`batch.fresh`), and a due label is learned in the micro-batch in which it comes.

The loop is the daemon's. The whole stream is written to an embedded log in its own state folder, then
`app.learner.learn` runs to the end. Time is event time and micro-batches close by count only, so the same seed gives
bit-equal curves on a CPU with the same number of threads. Memory does not grow with the stream.
"""

from __future__ import annotations

import contextlib
import itertools
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from streamlearn import __version__
from streamlearn.app.build import make_learner
from streamlearn.app.learner import learn
from streamlearn.app.log import make_topics, open_log
from streamlearn.config import Config, load_config
from streamlearn.errors import ConfigError
from streamlearn.judge.scoreboard import ScoreReport
from streamlearn.lab.curves import CurvePoint, Recorder
from streamlearn.lab.datasets import Dataset
from streamlearn.lab.delays import parse_delay
from streamlearn.lab.drift import parse_drift
from streamlearn.lab.files import open_dataset
from streamlearn.lab.held_out import (
    Accuracy,
    Progress,
    fitting_tables,
    no_progress,
    score_held_out,
    settings_as_json,
)
from streamlearn.lab.refit import RivalScores, refit
from streamlearn.lab.stream import Counts, Order, Stream, StreamPlan
from streamlearn.loop.guarding import GuardingReport
from streamlearn.records import MicroBatch

START_MS = 1_700_000_000_000
"""Event time of the first sample; any fixed time would do."""
MOST_SAMPLES = 1_000_000_000
DEFAULT_RATE = 1000.0
"""Samples per second of event time."""
_TIMED_STEPS = 30
_APPEND_RECORDS = 1000
_OVERHEAD_BYTES = 2048
"""Upper estimate per sample without its payload, with its label, in the log and the sample store."""
_COPIES = 4
"""Copies of a payload: in the log and in the store, each in pages that may be half empty."""
_TABLES = ("schema", "columns", "model", "learn", "batch", "labels", "score", "guard", "drift")


@dataclass(frozen=True, kw_only=True)
class EvaluationPlan:
    """What to run, with the names of the protocol."""

    dataset: str
    """A name, or the path of a file."""
    label: str | None = None
    """Path to the class in the records of a file; see `lab.files`."""
    label_probability: float = 0.05
    delay: str = "0"
    """From a sample to its label, in the grammar of `lab.delays`."""
    window: int = 1000
    """Samples between two points of the curves; also the window of the scores."""
    order: str = "shuffle"
    """shuffle, file, or class-sorted."""
    drift: str = "none"
    limit: int | None = None
    passes: int = 1
    seed: int = 0
    """Of the stream, and of the learner unless its config has a seed."""
    rate: float | None = None
    """Samples per second of event time: for delays in time, and for how many steps this machine has time. Evaluation
    does not wait. None: `batch.steps` are taken, and delays in time are of 1,000 samples per second."""

    def stream(self, dataset: Dataset) -> StreamPlan:
        """The stream of this plan over a data set that fits the schema.

        Raises:
            ConfigError: invalid values.
        """
        return StreamPlan(
            dataset=dataset,
            schema=dataset.schema,
            order=cast(Order, self.order),  # StreamPlan checks it
            passes=self.passes,
            label_share=self.label_probability,
            delay=parse_delay(self.delay),
            drifts=parse_drift(self.drift),
            seed=self.seed,
            drop_pending=True,
            start_time_ms=START_MS,
        )


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation."""

    plan: EvaluationPlan
    dataset: Dataset
    """In the schema of the config."""
    config: Config
    """Complete: with the settings of the data set and of the protocol."""
    counts: Counts
    """Of the stream that was written."""
    complete: bool
    """False if it was stopped: everything here covers the samples until then."""
    samples: int
    labels: int
    steps: int
    curves: list[CurvePoint]
    scores: ScoreReport
    """At the end."""
    guarding: GuardingReport
    """At the end."""
    test: Accuracy | None
    """On the held-out part at the end; None if the data set has none."""
    cpu_s: float
    """Of learning and scoring, all threads."""

    def against(self) -> RivalScores:
        """The teacher's scores in the form of its rivals'."""
        oracle = self.scores.oracle
        assert oracle is not None, "every sample of the stream has its true label"
        last = self.curves[len(self.curves) * 3 // 4 :]
        return RivalScores(
            name="streamlearn",
            accuracy=oracle.cumulative.accuracy["teacher"] or 0.0,
            last_accuracy=sum(point.oracle or 0.0 for point in last) / max(len(last), 1),
            pr_auc=oracle.windowed.pr_auc,
            log_loss=oracle.cumulative.log_loss,
            cpu_s=round(self.cpu_s, 2),
            fits=self.steps,
        )

    def rivals(self, stopping: threading.Event, *, progress: Progress = no_progress) -> list[RivalScores]:
        """What others make of the same stream. Raises as `lab.refit.refit`."""
        rate, block = self.plan.rate or DEFAULT_RATE, self.config.batch.fresh
        plan, schema = self.plan.stream(self.dataset), self.config.schema_.build()
        return refit(self.dataset, plan, schema, stopping, rate=rate, block=block, progress=progress)

    def as_json(self) -> dict[str, Any]:
        """Everything except times and paths, so equal runs give equal results."""
        return {
            "streamlearn": __version__,
            "protocol": asdict(self.plan),
            "settings": settings_as_json(self.config, _TABLES),
            "complete": self.complete,
            "samples": self.samples,
            "labels": self.labels,
            "labels_not_due": self.counts.labels_pending,
            "steps": self.steps,
            "curves": [asdict(point) for point in self.curves],
            "scores": {**asdict(self.scores), **asdict(self.guarding)},
            "test": None if self.test is None else asdict(self.test),
        }


def evaluate(
    config: Config,
    plan: EvaluationPlan,
    stopping: threading.Event,
    *,
    keep_state: Path | None = None,
    progress: Progress = no_progress,
    report: Callable[[str], None] = lambda _: None,
) -> Evaluation:
    """Run the protocol until the stream ends or `stopping` is set.

    `keep_state`: folder for the learner's state and log; None removes them. `report` is called with sentences on
    records of a file that cannot be used.

    Raises:
        ConfigError: the plan or a setting is invalid or does not fit the data set, or the disk is too small.
        StreamlearnError: stopped before the first step.
    """
    loaded = open_dataset(
        config, plan.dataset, stopping, label=plan.label, limit=plan.limit, report=report, progress=progress
    )
    plan.stream(loaded)  # reports an invalid plan before anything is written
    if not 0 < len(loaded.y) * plan.passes <= MOST_SAMPLES:
        raise ConfigError(f"passes: wanted 1 to {MOST_SAMPLES} samples in all, got {len(loaded.y)} times {plan.passes}")
    with _state_folder(keep_state) as folder:
        settings = settings_for(config, loaded, plan, folder)
        dataset = loaded.fit(settings.schema_.build())
        stream = plan.stream(dataset)
        events = Stream(stream, rate=DEFAULT_RATE if plan.rate is None else plan.rate)
        if plan.rate is not None:
            settings = with_steps_in_time(settings, plan.rate)
        counts = _write(settings, events, len(dataset.y) * plan.passes, stopping, progress)
        recorder = Recorder(plan.window, lambda samples: progress("learning", samples, counts.samples))
        began_s = time.process_time()
        learn(settings, stopping, until_end=True, on_step=recorder, ask_twin=True)
        cpu_s = time.process_time() - began_s
        loop = recorder.finish()
        return Evaluation(
            plan=plan,
            dataset=dataset,
            config=settings,
            counts=counts,
            complete=not stopping.is_set(),
            samples=loop.accounts.samples_learned,
            labels=loop.accounts.labels_read,
            steps=loop.learner.step,
            curves=recorder.curves,
            scores=loop.board.report(),
            guarding=loop.guarding.report(),
            test=score_held_out(loop.learner, dataset, stream.drifts, ended_at=counts.samples - 1, seed=plan.seed),
            cpu_s=cpu_s,
        )


def settings_for(config: Config, dataset: Dataset, plan: EvaluationPlan, folder: Path) -> Config:
    """The config, completed with the settings of the data set and those of the protocol, on its own embedded log.

    Raises:
        ConfigError: a setting is out of bounds, or the disk is too small.
    """
    tables = fitting_tables(config, dataset, plan.seed)
    samples = len(dataset.y) * plan.passes
    size_bytes = samples * (_COPIES * dataset.schema.nbytes + _OVERHEAD_BYTES)
    free_bytes = shutil.disk_usage(folder).free
    if size_bytes > free_bytes:
        raise ConfigError(
            f"{samples} samples may take {size_bytes >> 20} MiB in {folder}, which has {free_bytes >> 20} MiB free:"
            " reduce --limit or --passes, or choose a larger disk with --keep-state or TMPDIR"
        )
    # No micro-batch may close by time and nothing may be trimmed before it is learned.
    tables["batch"] = tables.get("batch", {}) | {"max_age_s": 3600.0}
    tables["source"] = {}  # the log of an evaluation has rows, not the user's records
    tables["log"] = {
        "kind": "embedded",
        "max_bytes": max(size_bytes, 1 << 20),
        "max_record_bytes": config.log.max_record_bytes,
    }
    tables["labels"] = tables.get("labels", {}) | {"requests_per_hour": 0}
    tables["score"] = tables.get("score", {}) | {"window": plan.window}
    tables["state"] = tables.get("state", {}) | {"dir": folder}
    tables["metrics"] = {"port": 0}
    return load_config(None, overrides=tables, environ={})


def with_steps_in_time(config: Config, rate: float) -> Config:
    """The config with as many steps per micro-batch as a daemon takes on this machine at `rate` samples per second.

    That is learn.cpu_share of the time between two micro-batches, over the time of a step, at most batch.steps.
    """
    batch, learner = config.batch, make_learner(config)
    x = np.zeros((batch.fresh, *learner.spec.shape), config.schema_.dtype)
    y = np.arange(batch.labelled) % learner.spec.classes
    labelled_x = np.zeros((batch.labelled, *learner.spec.shape), config.schema_.dtype)
    keys = np.arange(batch.fresh + batch.labelled) if learner.wants_keys else None
    rows = MicroBatch(x, batch.fresh, labelled_x, y, batch.labelled, keys=keys)
    times_s = []
    for _ in range(_TIMED_STEPS):
        began_s = time.perf_counter()
        learner.learn(rows)
        times_s.append(time.perf_counter() - began_s)
    fitting = config.learn.cpu_share * batch.fresh / rate / statistics.median(times_s)
    steps = max(1, min(batch.steps, int(fitting)))
    return config.model_copy(update={"batch": batch.model_copy(update={"steps": steps})})


@contextlib.contextmanager
def _state_folder(kept: Path | None) -> Iterator[Path]:
    """An empty folder: `kept`, or a temporary one."""
    if kept is None:
        with tempfile.TemporaryDirectory(prefix="streamlearn-evaluate-") as folder:
            yield Path(folder)
        return
    try:
        kept.mkdir(parents=True, exist_ok=True)
        used = any(kept.iterdir())
    except OSError as error:
        raise ConfigError(f"--keep-state {kept}: {error.strerror or error}; choose another folder") from error
    if used:
        raise ConfigError(
            f"--keep-state {kept}: not empty, and an evaluation starts from scratch; choose another folder"
        )
    yield kept


def _write(config: Config, stream: Stream, total: int, stopping: threading.Event, progress: Progress) -> Counts:
    """Append the stream to the log, up to its end or until `stopping` is set."""
    source, samples, labels = config.source, 0, 0
    with contextlib.closing(open_log(config)) as log:
        make_topics(log, config)
        events = iter(stream)
        while not stopping.is_set() and (batch := list(itertools.islice(events, _APPEND_RECORDS))):
            for topic, kind in ((source.samples.topics[0], "sample"), (source.labels.topic, "label")):
                if records := [record for of, record in batch if of == kind]:
                    log.append(topic, records)
            new_samples = sum(kind == "sample" for kind, _ in batch)
            samples, labels = samples + new_samples, labels + len(batch) - new_samples
            progress("writing the stream", samples, total)
        beginnings = [offset for topic in source.topics for offset in log.beginning_offsets(topic).values()]
        assert not any(beginnings), "the log was trimmed before it was learned"
    return Counts(samples, labels, stream.pending)
