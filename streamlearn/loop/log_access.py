"""The log as a step needs it: dead letters and payloads to read back, retried while the log is unavailable."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import structlog

from streamlearn.errors import LogError, LogUnavailableError, OffsetOutOfRangeError, RecordError, RecordsUnreadableError
from streamlearn.log.base import Log
from streamlearn.log.codec import Codec
from streamlearn.log.dead_letters import dead_letter
from streamlearn.records import Array, BadRecord, NewRecord, Offsets, Position
from streamlearn.state.kill_points import reached

RETRY_S = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0)
"""Waits between the attempts of one call."""
Result = TypeVar("Result")
_log = structlog.get_logger(__name__)


class LogAccess:
    """Used by the learner's thread only, except `commit`.

    Raises:
        LogUnavailableError: after the last attempt, or the first one once `stopping` is set; `commit` raises nothing.
    """

    def __init__(
        self,
        log: Log,
        codec: Codec,
        *,
        dead_letters: str,
        stopping: threading.Event,
        retry_s: Sequence[float] = RETRY_S,
    ) -> None:
        """`dead_letters` is the topic of bad records."""
        self._log, self._codec, self._topic = log, codec, dead_letters
        self._stopping, self._retry_s = stopping, retry_s

    def dead_letter(self, bad: Sequence[BadRecord]) -> None:
        """Append bad records to the dead-letter topic, with reason and original bytes.

        A letter that the log refuses is appended without its content: else every start would fail at it.

        Raises:
            LogError: they could not be written. The learner stops, so that none is lost.
        """
        if not bad:
            return
        reached("dead-letters", "begin")
        try:
            self._append(bad)
        except LogUnavailableError as error:
            msg = f"{len(bad)} dead letters cannot be written, and will not be dropped: {error}"
            raise LogError(msg) from error
        reached("dead-letters", "end")

    def read_back(self, position: Position, sample_id: str) -> Array | None:
        """The payload of a sample by its position; None once it has left the log.

        Also None where another sample is found there, because the topic was recreated.
        """
        try:
            records = self._retry("read_back", lambda: self._log.read(position.topic_partition, position.offset, 1))
            if not records or records[0].position != position:
                return None
            sample = self._codec.decode_sample(records[0])
        except (OffsetOutOfRangeError, RecordsUnreadableError, RecordError):
            return None
        return sample.x if sample.sample_id == sample_id else None

    def commit(self, step: int, next_offsets: Offsets) -> None:
        """Record what is read and saved. A failure is logged: only lag dashboards and trimming depend on it."""
        try:
            self._log.commit(next_offsets)
        except LogError as error:
            _log.warning("offsets_not_committed", step=step, error=str(error))

    def _append(self, bad: Sequence[BadRecord]) -> None:
        try:
            self._append_letters([dead_letter(item.record, item.error) for item in bad])
        except LogUnavailableError:
            raise
        except LogError:
            if len(bad) > 1:
                for item in bad:
                    self._append([item])
                return
            (item,) = bad
            without_content = replace(item.record, key=None, value=None, headers=())
            self._append_letters([dead_letter(without_content, item.error)])
            _log.error("dead_letter_cut", position=str(item.record.position), reason=item.error.reason)

    def _append_letters(self, letters: Sequence[NewRecord]) -> None:
        self._retry("dead_letters", lambda: self._log.append(self._topic, letters))

    def _retry(self, during: str, call: Callable[[], Result]) -> Result:
        for wait_s in self._retry_s:
            try:
                return call()
            except LogUnavailableError as error:
                if self._stopping.is_set():
                    raise
                _log.warning("log_unavailable", during=during, retry_s=wait_s, error=str(error))
                self._stopping.wait(wait_s)
        return call()
