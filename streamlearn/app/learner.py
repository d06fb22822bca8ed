"""The learner's process: restore, replay what the journal knows, learn, and stop without losing anything.

Threads: the main one runs the pipeline and is the only one that touches student, ledger and memory; `feed` reads the
log; `checkpoint` writes checkpoints; `heartbeat` says that we are alive. Stop, within one deadline: stop reading,
finish the step, publish, save, commit, close the log. A second signal leaves at once; the last checkpoint stands.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Sequence

import structlog

from streamlearn import __version__
from streamlearn.app.adapters import Checkpoints, DeadLetters, Patience, Teachers
from streamlearn.app.build import (
    make_batcher,
    make_board,
    make_cadence,
    make_election,
    make_guarding,
    make_learner,
    make_ledger,
    make_memory,
    make_recent,
    make_wanted,
)
from streamlearn.app.garbage import rare_collections
from streamlearn.app.monitor import Watch, Watching
from streamlearn.app.startup import (
    check_arrays,
    check_log_reaches,
    check_model,
    check_same_log,
    first_checkpoint,
    identity,
    with_new_partitions,
)
from streamlearn.app.wiring import (
    StatePaths,
    expose,
    make_codec,
    make_topics,
    open_log,
    state_lock,
)
from streamlearn.config import Config
from streamlearn.errors import (
    LogError,
    OffsetOutOfRangeError,
    StateError,
    StateLockedError,
)
from streamlearn.ledger.ledger import Ledger
from streamlearn.ledger.store import check_whole
from streamlearn.log.base import Log
from streamlearn.log.feed import Feed
from streamlearn.loop import Parts, Pipeline
from streamlearn.metrics import LearnerMetrics
from streamlearn.records import Offsets
from streamlearn.state import checkpoint as checkpoints
from streamlearn.state import journal as journals
from streamlearn.state.checkpoint import Checkpoint, Saved, Saver, load_newest
from streamlearn.state.fence import NO_FENCE, Fence, FencedFiles
from streamlearn.state.files import remove_leftovers
from streamlearn.state.journal import Journal, read_journal
from streamlearn.state.kill_points import reached
from streamlearn.state.publish import PublishedDir, load_arrays

_log = structlog.get_logger(__name__)


def learn(
    config: Config,
    stopping: threading.Event,
    *,
    until_end: bool = False,
    opened: Log | None = None,
    watching: Watching | None = None,
    ask_twin: bool = False,
) -> None:
    """Run the learner until told to stop, or, with `until_end`, until all that the log holds is learned.

    `opened` is a log to use, and to close, in place of the one that the config names. `watching` is called after each
    step, in the loop's thread, and must change nothing. With `ask_twin` the twin answers each sample on arrival too,
    for the oracle's scores of a simulation.
    """
    try:
        with rare_collections():
            _learn(config, stopping, until_end=until_end, opened=opened, watching=watching, ask_twin=ask_twin)
    except OSError as error:
        # Of the state folder: the log's errors are LogErrors. What was acknowledged is in the log or in a checkpoint.
        msg = f"{config.state.dir}: {error}; free space or repair the disk, then start again: nothing is lost"
        raise StateError(msg) from error


def _learn(
    config: Config,
    stopping: threading.Event,
    *,
    until_end: bool,
    opened: Log | None,
    watching: Watching | None,
    ask_twin: bool,
) -> None:
    paths = StatePaths(config.state.dir)
    with state_lock(paths), contextlib.closing(opened or open_log(config)) as log:
        fence = _take_over(paths)
        make_topics(log, config)
        checkpoint = load_newest(paths.checkpoints) or first_checkpoint(config, log, paths)
        check_model(config, checkpoint)
        next_offsets = with_new_partitions(config, log, checkpoint.next_offsets)
        journaled = list(read_journal(paths.journal, checkpoint.step))
        check_log_reaches(log, config, journaled[-1][1] if journaled else next_offsets)
        if not check_whole(paths.store):
            _log.warning("store_not_walked", path=str(paths.store), why="too large")
        try:
            with _Wired(
                config, log, paths, next_offsets, stopping=stopping, watching=watching, ask_twin=ask_twin, fence=fence
            ) as wired:
                wired.restore(checkpoint)
                check_same_log(log, make_codec(config), wired.parts.ledger.newest_sample())
                wired.start()
                _replay(wired, journaled, config, stopping)
                if not stopping.is_set():
                    wired.publish_if_behind()
                wired.pipeline.run(stopping, until_end=until_end)
                wired.finish()
        except Exception:
            fence.check()  # a successor writes where we read: whatever we met, that is why
            raise


def _take_over(paths: StatePaths) -> Fence:
    """From here on, whoever learned in this folder before writes nothing more, dead or not."""
    written = max(checkpoints.newest_epoch(paths.checkpoints), journals.newest_epoch(paths.journal))
    fence = Fence.take(paths.epoch, after=written)
    remove_leftovers(paths.root)
    return fence


class _Wired:
    """Every part of one learner, from the feed to the metrics, and the order in which they end."""

    def __init__(
        self,
        config: Config,
        log: Log,
        paths: StatePaths,
        next_offsets: Offsets,
        *,
        stopping: threading.Event,
        watching: Watching | None = None,
        ask_twin: bool = False,
        fence: Fence = NO_FENCE,
    ) -> None:
        topics, schema, codec = config.log.topics, config.schema_.build(), make_codec(config)
        self._config, self._log, self._paths, self._fence = config, log, paths, fence
        patience = Patience(stopping)
        self._ends = contextlib.ExitStack()
        self.metrics = LearnerMetrics(version=__version__)
        self._server, port = expose(config, self.metrics)
        self._ends.callback(self._server.close)
        self.feed = Feed(
            log,
            next_offsets,
            schema=schema,
            sample_topic=topics.samples,
            decode_sample=codec.decode_sample,
            decode_label=codec.decode_label,
            max_records=config.batch.prefetch_records,
            on_trimmed=config.log.on_trimmed,
        )
        self._ends.callback(self.feed.close)
        self.watch = Watch(
            self.metrics,
            paths.heartbeat,
            paths.scores,
            self.feed,
            metrics_host=config.metrics.host,
            metrics_port=port,
            watching=watching,
            files=FencedFiles(fence),
        )
        self.journal = Journal(paths.journal, max_bytes=config.state.journal_max_bytes, fence=fence)
        self._ends.callback(self.journal.close)
        self.saver = Saver(paths.checkpoints, keep=config.state.keep_checkpoints, on_saved=self._saved, fence=fence)
        ledger = make_ledger(config, paths, log, codec, patience, may_write=self._may_flush)
        self._ends.callback(self._close, ledger)
        wanted = make_wanted(config, paths)
        if wanted is not None:
            self._ends.callback(wanted.close)
        learner, memory, board = make_learner(config), make_memory(config), make_board(config)
        self.parts = Parts(
            schema=schema,
            source=self.feed,
            batcher=make_batcher(config, next_offsets),
            learner=learner,
            ledger=ledger,
            memory=memory,
            board=board,
            guarding=make_guarding(config, learner, memory, board),
            journal=self.journal,
            checkpoints=Checkpoints(self.saver, paths, identity(config)),
            teachers=Teachers(config, paths, self.watch, fence),
            dead_letters=DeadLetters(log, topics.dead_letters, patience),
            watcher=self.watch,
            wanted=wanted,
            recent=make_recent(config),
            election=make_election(config, learner),
            oracle_asks_twin=ask_twin,
        )
        self.pipeline = Pipeline(self.parts, make_cadence(config))

    def __enter__(self) -> _Wired:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        with self._ends:
            if self.watch.started:
                self.watch.stop("stopped" if error is None else f"failed: {error}")

    def restore(self, checkpoint: Checkpoint) -> None:
        """Be as of the checkpoint."""
        reached("restore", "begin")
        check_arrays(self.pipeline.arrays(), checkpoint)
        self.pipeline.restore(checkpoint.step, checkpoint.arrays, checkpoint.extra)
        was, now = checkpoint.extra["identity"]["method"], self._config.learn.method
        if was != now:
            _log.warning("method_changed", was=was, now=now, step=checkpoint.step)
            self.pipeline.another_method()
        if self.parts.election is None:
            self.parts.learner.serve(0)  # an election was held before, and none is now
        reached("restore", "end")

    def _may_flush(self) -> None:
        """Say whether the ledger may be flushed: a successor's store must not be written to."""
        reached("ledger-flush", "begin")
        self._fence.check()

    def _close(self, ledger: Ledger) -> None:
        """Let go of the ledger, what was not flushed with it where a successor is there."""
        try:
            ledger.close()
        except StateLockedError as error:
            _log.error("learner_fenced", epoch=self._fence.epoch, error=str(error))

    def publish_if_behind(self) -> None:
        """Servers may hold an older teacher than we do, or none, where the folder was lost or is corrupt."""
        step = self.parts.learner.step
        try:
            newest = PublishedDir(self._paths.published).newest()
            if newest is not None:
                load_arrays(newest)
        except StateError as error:
            _log.warning("published_unreadable", error=str(error), step=step)
            newest = None  # which is mended by publishing
        if step > 0 and (newest is None or newest.step != step) and self.parts.guarding.may_publish:
            self.pipeline.publish()

    def start(self) -> None:
        """Begin to read, and say that we live."""
        self.watch.start(self.parts)
        # Before the first save, and after a fallback to an older checkpoint, the log must not trim unread records.
        self._commit(self.parts.learner.step, self.parts.batcher.next_offsets)
        self.feed.start()
        _log.info("learner_started", step=self.parts.learner.step, **self.parts.learner.describe())

    def _saved(self, saved: Saved) -> None:
        """A checkpoint is durable: report it, and only now commit its offsets (I2). In the saver's thread."""
        self.watch.saved(saved)
        reached("offsets-commit", "begin")
        self._commit(saved.step, saved.next_offsets)
        reached("offsets-commit", "end")

    def _commit(self, step: int, next_offsets: Offsets) -> None:
        try:
            self._log.commit(next_offsets)
        except LogError as error:
            _log.warning("offsets_not_committed", step=step, error=str(error))

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


def _replay(wired: _Wired, journaled: Sequence[tuple[int, Offsets]], config: Config, stopping: threading.Event) -> None:
    """Form the steps after the checkpoint as the journal has them."""
    wired.journal.cut_after(wired.parts.learner.step + len(journaled))
    if not journaled:
        return
    started = time.monotonic()
    reached("replay", "begin")
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
        told = {"steps": count, "of": len(journaled), "step": wired.parts.learner.step}
        _log.info("journal_replayed", **told, duration_s=duration_s)
    reached("replay", "end")
