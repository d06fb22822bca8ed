"""The learner's process: restore, replay what the journal knows, learn, and stop without losing anything.

Threads: the main one runs the pipeline and is the only one that touches student, ledger and memory; `feed` reads the
log; `checkpoint` writes checkpoints; `heartbeat` says that we are alive. Stop, within one deadline: stop reading,
finish the step, publish, save, commit, close the log. A second signal leaves at once; the last checkpoint stands.
"""

from __future__ import annotations

import contextlib
import functools
import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import structlog

from streamlearn import __version__
from streamlearn.config import Config
from streamlearn.daemon.watching import Watch
from streamlearn.daemon.wiring import (
    StatePaths,
    make_codec,
    make_topics,
    model_spec,
    open_log,
    state_lock,
)
from streamlearn.errors import (
    ConfigError,
    LogError,
    LogUnavailableError,
    OffsetOutOfRangeError,
    RecordError,
    StateError,
)
from streamlearn.judge.prequential import Prequential
from streamlearn.labels.ledger import Ledger
from streamlearn.labels.memory import LabelledMemory
from streamlearn.learn.batching import Batcher
from streamlearn.learn.learner import Learner, LearnSettings
from streamlearn.log.base import Log
from streamlearn.log.codec import Codec, dead_letter
from streamlearn.log.feed import Feed
from streamlearn.metrics import LearnerMetrics, MetricsServer, start_http
from streamlearn.pipeline import Cadence, Parts, Pipeline
from streamlearn.records import Array, BadRecord, Offsets, Position
from streamlearn.state.checkpoint import Checkpoint, Saved, Saver, load_newest, save_checkpoint, steps_in
from streamlearn.state.journal import Journal, read_journal
from streamlearn.state.publish import PublishedDir, Publisher

_log = structlog.get_logger(__name__)
_TRIES_S = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0)
"""Waits between tries, while the loop cannot go on without the log."""
_Answer = TypeVar("_Answer")


def learn(config: Config, stopping: threading.Event, *, until_end: bool = False, opened: Log | None = None) -> None:
    """Run the learner until told to stop, or, with `until_end`, until all that the log holds is learned.

    `opened` is a log to use, and to close, in place of the one that the config names.
    """
    try:
        _learn(config, stopping, until_end=until_end, opened=opened)
    except OSError as error:
        # Of the state folder: the log's errors are LogErrors. What was acknowledged is in the log or in a checkpoint.
        msg = f"{config.state.dir}: {error}; free space or repair the disk, then start again: nothing is lost"
        raise StateError(msg) from error


def _learn(config: Config, stopping: threading.Event, *, until_end: bool, opened: Log | None) -> None:
    paths = StatePaths(config.state.dir)
    with state_lock(paths), contextlib.closing(opened or open_log(config)) as log:
        make_topics(log, config)
        checkpoint = load_newest(paths.checkpoints) or _first_checkpoint(config, log, paths)
        _check_model(config, checkpoint)
        next_offsets = _with_new_partitions(config, log, checkpoint.next_offsets)
        journaled = list(read_journal(paths.journal, checkpoint.step))
        _check_log_reaches(log, config, journaled[-1][1] if journaled else next_offsets)
        with _Wired(config, log, paths, next_offsets, stopping) as wired:
            wired.restore(checkpoint)
            wired.start()
            _replay(wired, journaled, config, stopping)
            wired.publish_if_behind()
            wired.pipeline.run(stopping, until_end=until_end)
            wired.finish()


class _Wired:
    """Every part of one learner, from the feed to the metrics, and the order in which they end."""

    def __init__(
        self, config: Config, log: Log, paths: StatePaths, next_offsets: Offsets, stopping: threading.Event
    ) -> None:
        topics, schema, codec = config.log.topics, config.schema_.build(), make_codec(config)
        self._config, self._log, self._paths = config, log, paths
        patience = _Patience(stopping)
        self._ends = contextlib.ExitStack()
        self.metrics = LearnerMetrics(version=__version__)
        self._server, port = _expose(config, self.metrics)
        self._ends.callback(self._server.close)
        self.feed = Feed(
            log,
            next_offsets,
            sample_topic=topics.samples,
            decode_sample=codec.decode_sample,
            decode_label=codec.decode_label,
            max_records=config.batch.prefetch_records,
            on_trimmed=config.log.on_trimmed,
        )
        self._ends.callback(self.feed.close)
        self.watch = Watch(self.metrics, paths.heartbeat, self.feed, metrics_port=port)
        self.journal = Journal(paths.journal, max_bytes=config.state.journal_max_bytes)
        self._ends.callback(self.journal.close)
        self.saver = Saver(paths.checkpoints, keep=config.state.keep_checkpoints, on_saved=self._saved)
        ledger = Ledger(
            paths.store,
            schema=schema,
            read_back=_read_back(log, codec, patience),
            payload_max_bytes=config.labels.payload_max_bytes,
            payload_max_age_s=config.labels.payload_max_age_s,
            horizon_s=config.labels.horizon_s,
            max_ids=config.labels.max_ids,
            corrections=config.labels.corrections,
        )
        self._ends.callback(ledger.close)
        classes, window = len(schema.classes), config.score.window
        self.parts = Parts(
            schema=schema,
            source=self.feed,
            batcher=Batcher(
                next_offsets,
                sample_topic=topics.samples,
                fresh=config.batch.fresh,
                max_labels=config.batch.max_labels,
                max_age_s=config.batch.max_age_s,
                merge_wait_s=config.batch.merge_wait_s,
            ),
            learner=Learner(model_spec(config), LearnSettings(**config.learn.model_dump())),
            ledger=ledger,
            memory=LabelledMemory(config.labels.memory_rows, schema, config.learn.seed),
            judge=Prequential(classes, window),
            oracle=Prequential(classes, window),
            journal=self.journal,
            checkpoints=_Checkpoints(self.saver, paths, _identity(config)),
            teachers=_Teachers(config, paths, self.watch),
            dead_letters=_DeadLetters(log, topics.dead_letters, patience),
            watcher=self.watch,
        )
        cadence = Cadence(
            fresh=config.batch.fresh,
            labelled=config.batch.labelled,
            max_age_s=config.batch.max_age_s,
            publish_every_s=config.state.publish_every_s,
            checkpoint_every_s=config.state.checkpoint_every_s,
            checkpoint_every_steps=config.state.checkpoint_every_steps,
        )
        self.pipeline = Pipeline(self.parts, cadence)

    def __enter__(self) -> _Wired:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        with self._ends:
            if self.watch.started:
                self.watch.stop("stopped" if error is None else f"failed: {error}")

    def restore(self, checkpoint: Checkpoint) -> None:
        """Be as of the checkpoint."""
        self.pipeline.restore(checkpoint.step, checkpoint.arrays, checkpoint.extra)

    def publish_if_behind(self) -> None:
        """Servers may hold an older teacher than we do, or none, where the folder of teachers was lost."""
        newest, step = PublishedDir(self._paths.published).newest(), self.parts.learner.step
        if step > 0 and (newest is None or newest.step != step):
            self.pipeline.publish()

    def start(self) -> None:
        """Begin to read, and say that we live."""
        self.watch.start(self.parts)
        self.feed.start()
        _log.info("learner_started", step=self.parts.learner.step, **self.parts.learner.describe())

    def _saved(self, saved: Saved) -> None:
        """A checkpoint is durable: say so, and only now tell lag dashboards (I2). In the saver's thread."""
        self.watch.saved(saved)
        try:
            self._log.commit(saved.next_offsets)
        except LogError as error:
            _log.warning("offsets_not_committed", step=saved.step, error=str(error))

    def finish(self) -> None:
        """Publish and save what is new, durably."""
        deadline = time.monotonic() + self._config.run.shutdown_s
        if not self.saver.wait(self._config.run.shutdown_s):
            msg = f"a checkpoint took longer than run.shutdown_s = {self._config.run.shutdown_s}; the one before stands"
            raise StateError(msg)
        self.pipeline.close()
        self.saver.close(max(0.1, deadline - time.monotonic()))
        self.watch.look("stopped")
        _log.info("learner_stopped", step=self.parts.learner.step, **self.parts.accounts.as_dict())


def _expose(config: Config, metrics: LearnerMetrics) -> tuple[MetricsServer, int]:
    """The learner's own /metrics, and its port.

    Raises:
        ConfigError: the address cannot be had.
    """
    host, port = config.metrics.host, config.metrics.port
    try:
        return start_http(metrics.registry, host, port)
    except OSError as error:
        msg = f"metrics.host = {host!r}, metrics.port = {port}: {error.strerror or error}; choose another, or 0"
        raise ConfigError(msg) from error


class _Checkpoints:
    """The pipeline's view of the saver; adds what identifies the model."""

    def __init__(self, saver: Saver, paths: StatePaths, identity: Mapping[str, Any]) -> None:
        self._saver, self._paths, self._identity = saver, paths, identity

    def save(self, step: int, next_offsets: Offsets, arrays: Mapping[str, Array], extra: Mapping[str, Any]) -> bool:
        return self._saver.submit(Checkpoint(step, next_offsets, arrays, {**extra, "identity": self._identity}))

    def oldest_step(self) -> int:
        return min(steps_in(self._paths.checkpoints), default=0)


class _Teachers:
    """The pipeline's view of the publisher; adds what servers need to rebuild the network."""

    def __init__(self, config: Config, paths: StatePaths, watch: Watch) -> None:
        self._publisher = Publisher(paths.published, keep=config.state.keep_published, clock=time.time)
        self._metadata = {
            "model_spec": model_spec(config).to_json(),
            "classes": json.dumps(config.schema_.build().classes),
            "dtype": config.schema_.dtype,
            "streamlearn": __version__,
        }
        self._watch = watch

    def publish(self, step: int, arrays: Mapping[str, Array]) -> None:
        published = self._publisher.publish(step, arrays, self._metadata)
        self._watch.published(step, published.published_at_s)


class _DeadLetters:
    """Writes bad records aside; tries for a minute, then stops the learner rather than lose one."""

    def __init__(self, log: Log, topic: str, patience: _Patience) -> None:
        self._log, self._topic, self._patience = log, topic, patience

    def __call__(self, bad: Sequence[BadRecord]) -> None:
        letters = [dead_letter(item.record, item.error) for item in bad]
        try:
            self._patience.ask("dead_letters", lambda: self._log.append(self._topic, letters))
        except LogUnavailableError as error:
            msg = f"{len(letters)} dead letters cannot be written, and will not be dropped: {error}"
            raise LogError(msg) from error


def _read_back(log: Log, codec: Codec, patience: _Patience) -> Callable[[Position], Array | None]:
    """The payload of a sample by its position in the log; None once it has left the log."""

    def read_back(position: Position) -> Array | None:
        try:
            ask = functools.partial(log.read, position.topic_partition, position.offset, 1)
            records = patience.ask("read_back", ask)
            if not records or records[0].position != position:
                return None
            return codec.decode_sample(records[0]).x
        except (OffsetOutOfRangeError, RecordError):
            return None

    return read_back


class _Patience:
    """Asks a log that may be away again and again, for some minutes, or until we are told to stop."""

    def __init__(self, stopping: threading.Event) -> None:
        self._stopping = stopping

    def ask(self, what: str, ask: Callable[[], _Answer]) -> _Answer:
        """The answer.

        Raises:
            LogUnavailableError: it stayed away. The learner stops; a supervisor starts it again.
        """
        for wait_s in _TRIES_S:
            try:
                return ask()
            except LogUnavailableError as error:
                if self._stopping.is_set():
                    raise
                _log.warning("log_unavailable", during=what, retry_s=wait_s, error=str(error))
                self._stopping.wait(wait_s)
        return ask()


def _identity(config: Config) -> dict[str, Any]:
    """What a checkpoint must agree with the config on, since weights and offsets mean nothing without it."""
    topics = config.log.topics
    return {
        "model": json.loads(model_spec(config).to_json()),
        "classes": list(config.schema_.build().classes),
        "dtype": config.schema_.dtype,
        "method": config.learn.method,
        "optimizer": config.learn.optimizer,
        "topics": [topics.samples, topics.labels],
    }


def _first_checkpoint(config: Config, log: Log, paths: StatePaths) -> Checkpoint:
    """Save step 0, so that where the stream was entered is known for ever."""
    topics = (config.log.topics.samples, config.log.topics.labels)
    ask = log.beginning_offsets if config.log.start == "earliest" else log.end_offsets
    next_offsets = {partition: offset for topic in topics for partition, offset in ask(topic).items()}
    paths.checkpoints.mkdir(parents=True, exist_ok=True)
    checkpoint = Checkpoint(0, next_offsets, {}, {"identity": _identity(config)})
    save_checkpoint(paths.checkpoints, checkpoint)
    return checkpoint


def _check_model(config: Config, checkpoint: Checkpoint) -> None:
    """Refuse to go on with another model than the checkpoint's, and say what differs.

    Raises:
        ConfigError: a setting that the saved state depends on was changed.
    """
    saved, wanted = checkpoint.extra["identity"], json.loads(json.dumps(_identity(config)))
    changed = [
        f"  {key}: saved {saved.get(key)!r}, configured {wanted[key]!r}"
        for key in wanted
        if saved.get(key) != wanted[key]
    ]
    if changed:
        way_out = "set it back, or begin anew in another state.dir"
        msg = "\n".join(
            [f"the checkpoint of step {checkpoint.step} was made with other settings; {way_out}:", *changed]
        )
        raise ConfigError(msg)


def _with_new_partitions(config: Config, log: Log, next_offsets: Offsets) -> Offsets:
    """The checkpoint's offsets, and the beginning of partitions that did not exist then."""
    found: Offsets = {}
    for topic in (config.log.topics.samples, config.log.topics.labels):
        found.update(log.beginning_offsets(topic))
    return found | next_offsets


def _check_log_reaches(log: Log, config: Config, next_offsets: Offsets) -> None:
    """Refuse a log that ends before what was learned from it: it is another log, or it lost records.

    Raises:
        StateError: naming the partition.
    """
    for topic in (config.log.topics.samples, config.log.topics.labels):
        ends = log.end_offsets(topic)
        for partition, offset in next_offsets.items():
            if partition.topic == topic and ends.get(partition, 0) < offset:
                msg = (
                    f"{topic}[{partition.partition}] ends at {ends.get(partition, 0)}, and {offset} records of it were "
                    "learned: this is another log, or it lost records; restore it, or begin anew in another state.dir"
                )
                raise StateError(msg)


def _replay(wired: _Wired, journaled: Sequence[tuple[int, Offsets]], config: Config, stopping: threading.Event) -> None:
    """Form the steps after the checkpoint as the journal has them."""
    wired.journal.cut_after(wired.parts.learner.step + len(journaled))
    if not journaled:
        return
    started = time.monotonic()
    try:
        count = wired.pipeline.replay(iter(journaled), stopping)
    except OffsetOutOfRangeError as error:
        if config.log.on_trimmed == "stop":
            raise
        # The steps cannot be formed as they were: their records are gone. What is left is learned anew, and said.
        _log.error("journal_abandoned", step=wired.parts.learner.step, error=str(error))
        wired.journal.cut_after(wired.parts.learner.step)
    else:
        duration_s = round(time.monotonic() - started, 3)
        _log.info("journal_replayed", steps=count, step=wired.parts.learner.step, duration_s=duration_s)
