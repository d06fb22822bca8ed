"""`streamlearn evaluate`: how well a labelled data set would be learned as a stream; offline, and the same every time.

The protocol is that of CapyMOA's `prequential_ssl_evaluation` (Gomes et al. 2023):

    predict   each sample before it is learned, and score it by its true class, labelled or not: the oracle, which
              nobody has who runs a service
    label     a share of the samples, `label_probability`; a label comes `delay` samples after its own
    drop      labels that are not due when the stream ends

Beside the oracle stands what a service would observe: the first predictions of the samples that got a label. The gap
is what the choice and the lateness of labels do to the number that operators see. One thing differs from CapyMOA:
samples are predicted a micro-batch at a time (`batch.fresh`; with 1, one at a time), and a label that falls due is
learned in the micro-batch in which it comes.

The loop is the daemon's own. The whole stream is written to an embedded log in a state folder of its own, then
`learning.learn` runs until its end. Time is the stream's, and micro-batches close by count alone, so the same seed
gives the same curves, bit for bit, on a CPU with the same number of threads. Memory does not grow with the stream.
"""

from __future__ import annotations

import contextlib
import itertools
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from streamlearn import __version__
from streamlearn.app.learner import learn
from streamlearn.app.wiring import make_topics, open_log
from streamlearn.config import Config, load_config
from streamlearn.errors import ConfigError, StreamlearnError
from streamlearn.lab.datasets import Classes, Dataset, load
from streamlearn.lab.delays import parse_delay
from streamlearn.lab.drift import Drift, World, parse_drift
from streamlearn.lab.stream import Counts, Order, Stream, StreamPlan
from streamlearn.learn.learner import Learner
from streamlearn.loop import Parts, StepReport

Progress = Callable[[str, int, int], None]
"""Is told what is being done, and how many samples of how many it has come to."""
Point = dict[str, float | int | None]
"""Of the curves: numbers by name, flat, so that a table is made of them in one line. None where not defined."""

START_MS = 1_700_000_000_000
"""When the first sample comes, by the stream's clock; any fixed time would do."""
MOST_SAMPLES = 1_000_000_000
_APPEND_RECORDS = 1000
_TEST_ROWS = 128
_OVERHEAD_BYTES = 2048
"""Of a sample beside its payload, with its label, in the log and in the sample store; generous."""
_COPIES = 4
"""Of a payload: in the log and in the store, each in pages that may be half empty."""
_HANGS_ON = {"scale": "shape", "normalise": "factory"}
"""A setting that the data set suggests, and the one whose presence in the config says that it was thought of."""
_LEARNING_TABLES = ("schema", "model", "learn", "batch", "labels", "score", "guard", "drift")


@dataclass(frozen=True, kw_only=True)
class EvaluationPlan:
    """What to run: the protocol's own names where it has them."""

    dataset: str
    """A name, or the path of a .npz file."""
    label_probability: float = 0.05
    delay: str = "0"
    """From a sample to its label, in the grammar of `simulate.delays`."""
    window: int = 1000
    """Samples between two points of the curves; samples, or labels, in a windowed score."""
    order: str = "shuffle"
    """shuffle, file, or class-sorted."""
    drift: str = "none"
    limit: int | None = None
    passes: int = 1
    seed: int = 0
    """Of the stream, and of the learner where its config does not say."""
    rate: float = 1000.0
    """Samples a second of the stream's own time, for delays in time; nobody waits."""


@dataclass(frozen=True)
class Evaluation:
    """What came of it."""

    plan: EvaluationPlan
    dataset: Dataset
    """As the schema has it."""
    config: Config
    """With everything that was filled in."""
    counts: Counts
    """Of the stream that was written."""
    complete: bool
    """False: it was stopped, and everything here is of the samples until then."""
    samples: int
    labels: int
    steps: int
    curves: list[Point]
    scores: dict[str, Any]
    """The report of the scoreboard at the end, and that of guard and drift monitor."""
    test: dict[str, float | int | None] | None
    """Accuracy of each network on the held-out part at the end; None where the data set has none."""

    def as_json(self) -> dict[str, Any]:
        """Everything, without times or places of this run: equal for two runs that did the same."""
        tables = self.config.model_dump(mode="json", by_alias=True, include={*_LEARNING_TABLES, "schema_"})
        return {
            "streamlearn": __version__,
            "protocol": asdict(self.plan),
            "settings": {name: tables[name] for name in _LEARNING_TABLES},
            "complete": self.complete,
            "samples": self.samples,
            "labels": self.labels,
            "labels_not_due": self.counts.labels_pending,
            "steps": self.steps,
            "curves": self.curves,
            "scores": self.scores,
            "test": self.test,
        }


def _tell_nobody(_what: str, _done: int, _total: int) -> None:
    pass


def evaluate(
    config: Config,
    plan: EvaluationPlan,
    stopping: threading.Event,
    *,
    keep_state: Path | None = None,
    progress: Progress = _tell_nobody,
) -> Evaluation:
    """Run the protocol until the stream ends or the event is set.

    `keep_state` is where the learner's state is kept, log and all; without it, it is removed.

    Raises:
        ConfigError: the plan or a setting is wrong, they do not fit the data set, or the disk is too small.
        StreamlearnError: it was stopped before the first step.
    """
    loaded, drifts, delay = load(plan.dataset, limit=plan.limit), parse_drift(plan.drift), parse_delay(plan.delay)
    if not 0 < len(loaded.y) * plan.passes <= MOST_SAMPLES:
        raise ConfigError(f"passes: wanted 1 to {MOST_SAMPLES} samples in all, got {len(loaded.y)} times {plan.passes}")
    with _state_folder(keep_state) as folder:
        settings = settings_for(config, loaded, plan, folder)
        dataset = loaded.fit(settings.schema_.build())
        stream = StreamPlan(
            dataset=dataset,
            schema=dataset.schema,
            order=cast(Order, plan.order),  # the plan checks it
            passes=plan.passes,
            label_share=plan.label_probability,
            delay=delay,
            drifts=drifts,
            seed=plan.seed,
            drop_pending=True,
            start_time_ms=START_MS,
        )
        counts = _write(settings, Stream(stream, rate=plan.rate), len(dataset.y) * plan.passes, stopping, progress)
        recorder = Recorder(plan.window, lambda samples: progress("learning", samples, counts.samples))
        learn(settings, stopping, until_end=True, watching=recorder, ask_twin=True)
        parts = recorder.finish()
        return Evaluation(
            plan=plan,
            dataset=dataset,
            config=settings,
            counts=counts,
            complete=not stopping.is_set(),
            samples=parts.accounts.samples_learned,
            labels=parts.accounts.labels_read,
            steps=parts.learner.step,
            curves=recorder.curves,
            scores={**parts.board.report(), **parts.guarding.report()},
            test=held_out(parts.learner, dataset, drifts, ended_at=counts.samples - 1, seed=plan.seed),
        )


def settings_for(config: Config, dataset: Dataset, plan: EvaluationPlan, folder: Path) -> Config:
    """The config, with the data set's own shape, dtype, classes and model where it does not say; on a log of its own.

    Raises:
        ConfigError: a setting is out of bounds, or the data would not fit on the disk.
    """
    tables = fitting_tables(config, dataset, plan.seed)
    samples = len(dataset.y) * plan.passes
    size_bytes = samples * (_COPIES * dataset.schema.nbytes + _OVERHEAD_BYTES)
    free_bytes = shutil.disk_usage(folder).free
    if size_bytes > free_bytes:
        raise ConfigError(
            f"{samples} samples may take {size_bytes >> 20} MiB in {folder}, where {free_bytes >> 20} are free: take"
            " fewer by --limit or --passes, or name a larger disk by --keep-state or TMPDIR"
        )
    # The clock must close no batch and hurry no merge, and nothing may be trimmed before it is learned.
    tables["batch"] = tables.get("batch", {}) | {"max_age_s": 3600.0, "merge_wait_s": 60.0}
    tables["log"] = {
        "kind": "embedded",
        "embedded_max_bytes": max(size_bytes, 1 << 20),
        "max_record_bytes": config.log.max_record_bytes,
    }
    tables["labels"] = tables.get("labels", {}) | {"wanted_rows": 0}
    tables["score"] = tables.get("score", {}) | {"window": plan.window}
    tables["state"] = tables.get("state", {}) | {"dir": folder}
    tables["metrics"] = {"port": 0}
    return load_config(None, overrides=tables, environ={})


def fitting_tables(config: Config, dataset: Dataset, seed: int) -> dict[str, Any]:
    """What the config says, and for the rest what suits the data set; the seed where the config has none."""
    tables = config.model_dump(by_alias=True, exclude_unset=True)
    for table, suggested in dataset.suggested.items():
        given = tables.setdefault(table, {})
        fitting = {key: value for key, value in suggested.items() if _HANGS_ON.get(key) not in given}
        tables[table] = fitting | given
    tables["learn"] = {"seed": seed} | tables.get("learn", {})
    return tables


@dataclass(slots=True)
class _Since:
    """What came since the last point."""

    samples: int = 0
    labels: int = 0
    scored: int = 0
    right: int = 0

    def count(self, report: StepReport) -> None:
        """Of one step."""
        self.samples += report.fresh
        self.labels += report.labels
        for arrival in report.arrivals:
            if (scored := arrival.scored) is not None:
                self.scored += 1
                self.right += scored.prediction.class_index == scored.class_index


class Recorder:
    """Sees each step, and makes a point of the curves each time that another window of samples has been predicted.

    Accuracies are those of the scoreboard's windows, which end with the step: `oracle*` over the last `window` samples,
    `observed*` over the last `window` labels. Where labels are few, these reach far back into the stream: a service
    sees no better. `observed_since` is that of the labels alone that came since the point before, `scored_since` of
    them, few and noisy.
    """

    def __init__(self, window: int, progress: Callable[[int], None]) -> None:
        self.curves: list[Point] = []
        self._window, self._progress = window, progress
        self._parts: Parts | None = None
        self._since, self._full = _Since(), False

    def __call__(self, parts: Parts, report: StepReport) -> None:
        """After each step."""
        self._parts = parts
        samples = parts.accounts.samples_learned
        if self._full and report.fresh:
            self._since, self._full = _Since(), False
        self._since.count(report)
        if self._full:  # labels alone, after the last sample of the window: they belong to its point
            self.curves.pop()
            self._add(parts)
        elif samples // self._window > (samples - report.fresh) // self._window:
            self._add(parts)
            self._full = True
        self._progress(samples)

    def finish(self) -> Parts:
        """Make the last point, of all there was; the parts as they were left.

        Raises:
            StreamlearnError: there was no step.
        """
        if self._parts is None:
            msg = "stopped before the first step: there is nothing to tell"
            raise StreamlearnError(msg)
        if not self._full and self._since.samples:
            self._add(self._parts)
            self._full = True
        return self._parts

    def _add(self, parts: Parts) -> None:
        since, report = self._since, parts.board.report()
        oracle, observed, at_label = report["oracle"], report["at_arrival"], report["at_label"]
        twin = oracle["twin"] or {"twin": None, "cumulative": {"twin": None}}
        now, seen = oracle["windowed"], observed["windowed"]
        low, high = at_label["interval"] or (None, None)
        self.curves.append(
            {
                "samples": parts.accounts.samples_learned,
                "labels": parts.accounts.labels_read,
                "step": parts.learner.step,
                "labelled_share": since.labels / since.samples,
                "oracle": now["accuracy"]["teacher"],
                "oracle_student": now["accuracy"]["student"],
                "oracle_twin": twin["twin"],
                "oracle_cumulative": oracle["cumulative"]["accuracy"]["teacher"],
                "oracle_twin_cumulative": twin["cumulative"]["twin"],
                "oracle_log_loss": now["log_loss"],
                "oracle_ece": now["ece"],
                "observed": seen["accuracy"]["teacher"],
                "observed_student": seen["accuracy"]["student"],
                "observed_since": since.right / since.scored if since.scored else None,
                "scored_since": since.scored,
                "observed_cumulative": observed["cumulative"]["accuracy"]["teacher"],
                "observed_log_loss": seen["log_loss"],
                "observed_ece": seen["ece"],
                "majority": seen["accuracy"]["majority"],
                "no_change": seen["accuracy"]["no_change"],
                "at_label_teacher": at_label["teacher"],
                "at_label_twin": at_label["twin"],
                "ssl_gain": at_label["gain"],
                "ssl_gain_low": low,
                "ssl_gain_high": high,
            }
        )


@contextlib.contextmanager
def _state_folder(kept: Path | None) -> Iterator[Path]:
    """An empty folder: the one to be kept, or one that is removed again."""
    if kept is None:
        with tempfile.TemporaryDirectory(prefix="streamlearn-evaluate-") as folder:
            yield Path(folder)
        return
    try:
        kept.mkdir(parents=True, exist_ok=True)
        used = any(kept.iterdir())
    except OSError as error:
        raise ConfigError(f"--keep-state {kept}: {error.strerror or error}; name a folder that can be made") from error
    if used:
        raise ConfigError(f"--keep-state {kept}: not empty, and an evaluation begins anew; name another folder")
    yield kept


def _write(config: Config, stream: Stream, total: int, stopping: threading.Event, progress: Progress) -> Counts:
    """The whole stream into the log, or what there is of it when told to stop."""
    topics, samples, labels = config.log.topics, 0, 0
    with contextlib.closing(open_log(config)) as log:
        make_topics(log, config)
        events = iter(stream)
        while not stopping.is_set() and (taken := list(itertools.islice(events, _APPEND_RECORDS))):
            for topic, kind in ((topics.samples, "sample"), (topics.labels, "label")):
                if records := [record for of, record in taken if of == kind]:
                    log.append(topic, records)
            of_samples = sum(kind == "sample" for kind, _ in taken)
            samples, labels = samples + of_samples, labels + len(taken) - of_samples
            progress("writing the stream", samples, total)
        beginnings = [
            offset for topic in (topics.samples, topics.labels) for offset in log.beginning_offsets(topic).values()
        ]
        assert not any(beginnings), "the log trimmed what was to be learned"
    return Counts(samples, labels, stream.pending, stream.inline)


def held_out(
    learner: Learner, dataset: Dataset, drifts: tuple[Drift, ...], *, ended_at: int, seed: int
) -> dict[str, float | int | None] | None:
    """Accuracy of each network on the held-out part, shown as the world was when the stream ended."""
    if dataset.test_x is None or dataset.test_y is None or not len(dataset.test_y):
        return None
    lasting = [replace(drift, start=0, end=None) for drift in drifts if drift.holds_at(ended_at)]
    world = World(dataset, lasting, seed=seed)
    count = len(dataset.test_y)
    held_out_N = world.rows(np.arange(count), dataset.test_y, first=0)
    right: dict[str, int | None] = {"teacher": 0, "student": 0, "twin": 0}
    for first in range(0, count, _TEST_ROWS):
        rows = held_out_N[first : first + _TEST_ROWS].tolist()
        shown = [world.show(row, dataset.test_x[row], int(dataset.test_y[row])) for row in rows]
        x, y_B = np.stack([x for x, _ in shown]), np.array([y for _, y in shown])
        for network, answers_B in _answers(learner, x).items():
            so_far = right[network]
            right[network] = None if so_far is None or answers_B is None else so_far + int((answers_B == y_B).sum())
    return {"count": count, **{network: None if hits is None else hits / count for network, hits in right.items()}}


def _answers(learner: Learner, x: np.ndarray[Any, Any]) -> dict[str, Classes | None]:
    """The classes that each network gives to the same samples."""
    probabilities, classes = learner.predict(x), learner.classify(x)
    return {
        "teacher": probabilities.teacher_probs_BC.argmax(axis=1),  # the one that is served
        "student": probabilities.student_probs_BC.argmax(axis=1),
        "twin": classes.twin_B,
    }
