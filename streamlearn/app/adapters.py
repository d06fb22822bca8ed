"""What the pipeline asks for, made of what there is: checkpoints, teachers, dead letters, payloads from the log.

The protocols stand in `pipeline`; here they meet the saver, the publisher and the log, which know nothing of it.
"""

from __future__ import annotations

import functools
import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import structlog

from streamlearn import __version__
from streamlearn.app.monitor import Watch
from streamlearn.app.network import model_spec
from streamlearn.app.wiring import StatePaths
from streamlearn.config import Config
from streamlearn.errors import LogError, LogUnavailableError, OffsetOutOfRangeError, RecordError, RecordsUnreadableError
from streamlearn.log.base import Log
from streamlearn.log.codec import Codec
from streamlearn.log.dead_letters import dead_letter
from streamlearn.records import Array, BadRecord, NewRecord, Offsets, Position
from streamlearn.state.checkpoint import Checkpoint, Saver, steps_in
from streamlearn.state.fence import Fence
from streamlearn.state.kill_points import reached
from streamlearn.state.publish import Publisher

_log = structlog.get_logger(__name__)
TRIES_S = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0)
"""Waits between tries, while the loop cannot go on without the log."""
Answer = TypeVar("Answer")


class Checkpoints:
    """The pipeline's view of the saver; adds what identifies the model."""

    def __init__(self, saver: Saver, paths: StatePaths, identity: Mapping[str, Any]) -> None:
        self._saver, self._paths, self._identity = saver, paths, identity

    @property
    def busy(self) -> bool:
        """See `pipeline.Checkpoints.busy`."""
        return self._saver.busy

    def save(self, step: int, next_offsets: Offsets, arrays: Mapping[str, Array], extra: Mapping[str, Any]) -> bool:
        """See `pipeline.Checkpoints.save`."""
        return self._saver.submit(Checkpoint(step, next_offsets, arrays, {**extra, "identity": self._identity}))

    def oldest_step(self) -> int:
        """See `pipeline.Checkpoints.oldest_step`."""
        return min(steps_in(self._paths.checkpoints), default=0)


class Teachers:
    """The pipeline's view of the publisher; adds what servers need to rebuild the network."""

    def __init__(self, config: Config, paths: StatePaths, watch: Watch, fence: Fence) -> None:
        self._publisher = Publisher(
            paths.published,
            keep=config.state.keep_published,
            keep_history=config.state.keep_history,
            clock=time.time,
            fence=fence,
        )
        self._metadata = {
            "model_spec": model_spec(config).to_json(),
            "dtype": config.schema_.dtype,
            "streamlearn": __version__,
        }
        self._watch = watch

    def publish(self, step: int, arrays: Mapping[str, Array], told: Mapping[str, Any]) -> None:
        """See `pipeline.Teachers.publish`."""
        header = {name: json.dumps(value) for name, value in told.items()}
        self._publisher.publish(step, arrays, self._metadata | header)
        self._watch.published(step)


class DeadLetters:
    """Writes bad records aside; tries for a minute, then stops the learner rather than lose one.

    One that the log refuses is written without its contents, with the reason and where it stands: else it would end
    the learner at every start.
    """

    def __init__(self, log: Log, topic: str, patience: Patience) -> None:
        self._log, self._topic, self._patience = log, topic, patience

    def __call__(self, bad: Sequence[BadRecord]) -> None:
        """See `pipeline.DeadLetters`."""
        reached("dead-letters", "begin")
        try:
            self._write(bad)
        except LogUnavailableError as error:
            msg = f"{len(bad)} dead letters cannot be written, and will not be dropped: {error}"
            raise LogError(msg) from error
        reached("dead-letters", "end")

    def _write(self, bad: Sequence[BadRecord]) -> None:
        letters = [dead_letter(item.record, item.error) for item in bad]
        try:
            self._append(letters)
        except LogUnavailableError:
            raise
        except LogError:
            if len(bad) > 1:
                for item in bad:
                    self._write([item])
                return
            (item,) = bad
            self._append([dead_letter(replace(item.record, key=None, value=None, headers=()), item.error)])
            _log.error("dead_letter_cut", position=str(item.record.position), reason=item.error.reason)

    def _append(self, letters: Sequence[NewRecord]) -> None:
        self._patience.ask("dead_letters", lambda: self._log.append(self._topic, letters))


def read_back_from(log: Log, codec: Codec, patience: Patience) -> Callable[[Position, str], Array | None]:
    """The payload of a sample by its position in the log and its id; None once it has left the log.

    Another sample may stand there by now, where a topic was made anew: its payload is not for this one's label.
    """

    def read_back(position: Position, sample_id: str) -> Array | None:
        try:
            ask = functools.partial(log.read, position.topic_partition, position.offset, 1)
            records = patience.ask("read_back", ask)
            if not records or records[0].position != position:
                return None
            sample = codec.decode_sample(records[0])
        except (OffsetOutOfRangeError, RecordsUnreadableError, RecordError):
            return None
        return sample.x if sample.sample_id == sample_id else None

    return read_back


class Patience:
    """Asks a log that may be away again and again, for some minutes, or until we are told to stop."""

    def __init__(self, stopping: threading.Event) -> None:
        self._stopping = stopping

    def ask(self, what: str, ask: Callable[[], Answer]) -> Answer:
        """The answer.

        Raises:
            LogUnavailableError: it stayed away. The learner stops; a supervisor starts it again.
        """
        for wait_s in TRIES_S:
            try:
                return ask()
            except LogUnavailableError as error:
                if self._stopping.is_set():
                    raise
                _log.warning("log_unavailable", during=what, retry_s=wait_s, error=str(error))
                self._stopping.wait(wait_s)
        return ask()
