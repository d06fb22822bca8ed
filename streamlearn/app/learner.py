"""The learner's process: restore, replay the journal, learn, and stop without losing anything.

Threads: the main one runs the loop, and alone changes student, ledger and replay buffer; `feed` reads the log;
`checkpoint` writes checkpoints; `heartbeat` reports that the process is alive.

Stop, within `run.shutdown_s`: finish the step, publish, save, commit, close the log. A second signal exits
immediately; the last checkpoint stands.
"""

from __future__ import annotations

import contextlib
import gc
import threading
import time
from collections.abc import Iterator, Sequence

import structlog

from streamlearn import __version__
from streamlearn.app.build import build_loop
from streamlearn.app.garbage import short_pauses
from streamlearn.app.log import make_codec, make_topics, open_log
from streamlearn.app.monitor import Monitor, OnStep
from streamlearn.app.ports import expose
from streamlearn.app.startup import (
    check_arrays,
    check_log_reaches,
    check_model,
    check_same_log,
    first_checkpoint,
    of_topics,
    with_new_partitions,
)
from streamlearn.config import Config
from streamlearn.errors import OffsetOutOfRangeError, StateError, StateLockedError
from streamlearn.ledger.store_file import check_whole
from streamlearn.log.base import Log
from streamlearn.loop.loop import TrainingLoop
from streamlearn.metrics import LEARNER_METRICS, Metrics
from streamlearn.records import Offsets
from streamlearn.state import checkpoint as checkpoints
from streamlearn.state import journal as journals
from streamlearn.state.checkpoint import Checkpoint, load_newest
from streamlearn.state.fence import Fence
from streamlearn.state.files import Files, remove_leftovers
from streamlearn.state.journal import read_journal
from streamlearn.state.kill_points import reached
from streamlearn.state.paths import StatePaths, state_lock
from streamlearn.state.publish import PublishedDir, load_arrays

_log = structlog.get_logger(__name__)
_MOST_CLASSES = 20
"""Classes with metrics of their own, where score.classes names none."""


def learn(
    config: Config,
    stopping: threading.Event,
    *,
    until_end: bool = False,
    opened: Log | None = None,
    on_step: OnStep | None = None,
    ask_twin: bool = False,
) -> None:
    """Run the learner until `stopping` is set or, with `until_end`, until everything in the log is learned.

    `opened` is used, and closed, in place of the log that the config names. `on_step` is called after each step, in the
    loop's thread, and must change nothing. With `ask_twin` the twin answers each sample on arrival too, for the scores
    of a simulation.
    """
    paths = StatePaths(config.state.dir)
    try:
        with short_pauses(), state_lock(paths), contextlib.closing(opened or open_log(config)) as log:
            fence = _take_over(paths)
            make_topics(log, config)
            log.append(config.log.dead_letters, [])  # a missing ACL would stop the learner at the first bad record
            checkpoint = load_newest(paths.checkpoints) or first_checkpoint(config, log, paths)
            check_model(config, checkpoint)
            next_offsets = with_new_partitions(config, log, checkpoint.next_offsets)
            journaled = [(step, of_topics(config, ends)) for step, ends in read_journal(paths.journal, checkpoint.step)]
            check_log_reaches(log, config, journaled[-1][1] if journaled else next_offsets)
            if not check_whole(paths.store):
                _log.warning("store_not_walked", path=str(paths.store), why="too large")
            metrics = Metrics(LEARNER_METRICS, version=__version__)
            with _explained_by(fence), contextlib.closing(expose(config, metrics)) as server:
                monitor = Monitor(
                    metrics,
                    paths,
                    metrics_port=server.port,
                    classes=config.score.classes or tuple(config.score.thresholds)[:_MOST_CLASSES],
                    on_step=on_step,
                    fence=fence,
                )
                loop = build_loop(
                    config,
                    log,
                    next_offsets,
                    stopping=stopping,
                    until_end=until_end,
                    fence=fence,
                    observer=monitor,
                    ask_twin=ask_twin,
                )
                with LearnerProcess(config, loop, monitor, fence, stopping) as process:
                    process.restore(checkpoint)
                    check_same_log(log, make_codec(config), loop.ledger.newest_sample(), stopping)
                    process.start()
                    process.replay(journaled)
                    if not stopping.is_set():
                        process.publish_if_behind()
                    gc.freeze()
                    loop.run(stopping, until_end=until_end)
                    process.finish()
    except OSError as error:
        # From the state folder: errors of the log are LogErrors. What was acknowledged is in the log or a checkpoint.
        msg = f"{config.state.dir}: {error}; free space or repair the disk, then start again: nothing is lost"
        raise StateError(msg) from error


def _take_over(paths: StatePaths) -> Fence:
    """Take the next epoch: learners that used this folder before can write nothing more, even if they still run."""
    written = max(checkpoints.newest_epoch(paths.checkpoints), journals.newest_epoch(paths.journal))
    fence = Fence.take(paths.epoch, after=written)
    remove_leftovers(paths.root)
    return fence


@contextlib.contextmanager
def _explained_by(fence: Fence) -> Iterator[None]:
    """If another learner writes to the state folder, that explains any error."""
    try:
        yield
    except Exception:
        fence.check()
        raise


class LearnerProcess(contextlib.AbstractContextManager["LearnerProcess"]):
    """A loop and its monitor, from restore to stop. A context manager that closes both."""

    def __init__(
        self, config: Config, loop: TrainingLoop, monitor: Monitor, fence: Files, stopping: threading.Event
    ) -> None:
        self._config, self._loop, self._monitor = config, loop, monitor
        self._fence, self._stopping = fence, stopping

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        loop = self._loop
        with contextlib.ExitStack() as ends:
            for close in (loop.feed.close, loop.journal.close, self._close_ledger, loop.requests.close):
                ends.callback(close)
            self._monitor.stop("stopped" if error is None else f"failed: {error}")

    def restore(self, checkpoint: Checkpoint) -> None:
        """Restore all state to the checkpoint."""
        reached("restore", "begin")
        check_arrays(self._loop.arrays(), checkpoint)
        self._loop.restore(checkpoint)
        saved = checkpoint.extra["identity"]
        before = len(saved["model"].get("columns", ()))
        if added := [column.name for column in self._loop.schema.columns[before:]]:
            _log.warning("columns_added", columns=added, step=checkpoint.step)
        was, now = saved["method"], self._config.learn.method
        if was != now:
            _log.warning("method_changed", was=was, now=now, step=checkpoint.step)
            self._loop.learner.another_method()
            self._loop.guarding.another_method()
        reached("restore", "end")

    def start(self) -> None:
        """Start to read and to report."""
        loop = self._loop
        self._monitor.start(loop)
        # Before the first save, and after a fallback to an older checkpoint, the log must not trim unread records.
        loop.log.commit(loop.learner.step, loop.batcher.next_offsets)
        loop.feed.start()
        _log.info("learner_started", step=loop.learner.step, **loop.learner.describe())

    def replay(self, journaled: Sequence[tuple[int, Offsets]]) -> None:
        """Repeat the steps after the checkpoint as the journal has them."""
        loop, started_s = self._loop, time.monotonic()
        loop.journal.cut_after(loop.learner.step + len(journaled))
        if not journaled:
            return
        reached("replay", "begin")
        try:
            loop.replay_journal(journaled, self._stopping)
        except OffsetOutOfRangeError as error:
            if self._config.log.on_trimmed == "stop":
                raise
            # Their records are gone, so the steps cannot be repeated. What is left of them forms other steps.
            _log.error("journal_abandoned", step=loop.learner.step, error=str(error))
            loop.journal.cut_after(loop.learner.step)
        else:
            step, duration_s = loop.learner.step, round(time.monotonic() - started_s, 3)
            steps = step + 1 - journaled[0][0]
            _log.info("journal_replayed", steps=steps, of=len(journaled), step=step, duration_s=duration_s)
        reached("replay", "end")

    def publish_if_behind(self) -> None:
        """Publish if servers have an older teacher, or none, because the folder was lost or is corrupt."""
        step = self._loop.learner.step
        try:
            newest = PublishedDir(StatePaths(self._config.state.dir).published).newest()
            if newest is not None:
                load_arrays(newest)
        except StateError as error:
            _log.warning("published_unreadable", error=str(error), step=step)
            newest = None
        if step > 0 and (newest is None or newest.step != step) and self._loop.guarding.may_publish:
            self._loop.publish()

    def finish(self) -> None:
        """Publish and save what is new, durably."""
        loop, timeout_s = self._loop, self._config.run.shutdown_s
        deadline = time.monotonic() + timeout_s
        if not loop.saver.wait(timeout_s):
            msg = f"a checkpoint took longer than run.shutdown_s = {timeout_s}; the one before stands"
            raise StateError(msg)
        loop.close()
        loop.saver.close(max(0.1, deadline - time.monotonic()))
        self._monitor.look("stopped")
        _log.info("learner_stopped", step=loop.learner.step, **loop.accounts.as_dict())

    def _close_ledger(self) -> None:
        try:
            self._loop.ledger.close()
        except StateLockedError as error:  # what was not flushed is lost with this learner, which was fenced off
            _log.error("learner_fenced", epoch=self._fence.epoch, error=str(error))
