"""Group commit: threads that append at one moment share one transaction and one sync.

There is no thread of its own. Whoever finds nobody writing takes all that waits, in order of arrival, and writes for
all; the others wait for it. A group shares the deadline of the thread that writes it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from streamlearn.errors import LogError, LogUnavailableError
from streamlearn.records import NewRecord, Position

GROUP_MAX_RECORDS = 4096
GROUP_MAX_BYTES = 16 << 20


@dataclass(slots=True, eq=False)
class Ticket:
    """One thread's append, waiting for its group."""

    topic: str
    records: list[tuple[int, NewRecord]] = field(default_factory=list)
    """(partition, record)."""
    size_bytes: int = 0
    positions: list[Position] = field(default_factory=list)
    error: LogError | None = None
    done: bool = False

    def has_room(self, size_bytes: int) -> bool:
        """Whether one more record of this size may be added."""
        return len(self.records) < GROUP_MAX_RECORDS and self.size_bytes + size_bytes <= GROUP_MAX_BYTES


class GroupCommit:
    """Lets one thread write for all that wait. `write` gets a group and fills in positions, or raises a LogError."""

    def __init__(self, write: Callable[[list[Ticket], float], None]) -> None:
        """`write` also gets the deadline, on the monotonic clock."""
        self._write = write
        self._changed = threading.Condition()
        self._waiting: list[Ticket] = []
        self._writing = False

    def submit(self, ticket: Ticket, deadline: float) -> None:
        """Wait until the ticket is written, by this thread or another.

        Raises:
            LogUnavailableError: not written in time.
            LogError: whatever `write` raised for the group.
        """
        with self._changed:
            self._waiting.append(ticket)
            while not ticket.done:
                if not self._writing:
                    self._lead(deadline)
                elif not self._changed.wait(deadline - time.monotonic()) and not ticket.done:
                    in_flight = ticket not in self._waiting
                    if not in_flight:
                        self._waiting.remove(ticket)
                    fate = "may be in the log all the same" if in_flight else "was not written"
                    msg = f"{ticket.topic}: no room to write in time, others were before it; it {fate}"
                    raise LogUnavailableError(msg)
        if ticket.error is not None:
            raise ticket.error

    @contextmanager
    def nobody_writing(self, timeout_s: float) -> Iterator[None]:
        """Keep everyone from writing, once the writer of now is done or the timeout is over."""
        with self._changed:
            self._changed.wait_for(lambda: not self._writing, timeout_s)
            yield

    def _lead(self, deadline: float) -> None:
        group = self._take()
        self._writing = True
        self._changed.release()
        error: LogError | None = LogUnavailableError("the thread that wrote was interrupted; nothing is known")
        try:
            self._write(group, deadline)
            error = None
        except LogError as caught:
            error = caught
        finally:
            self._changed.acquire()
            self._writing = False
            for ticket in group:
                ticket.error, ticket.done = error, True
            self._changed.notify_all()

    def _take(self) -> list[Ticket]:
        """At least one ticket, and as many as fit in a group."""
        records = size_bytes = taken = 0
        for ticket in self._waiting:
            records += len(ticket.records)
            size_bytes += ticket.size_bytes
            if taken and (records > GROUP_MAX_RECORDS or size_bytes > GROUP_MAX_BYTES):
                break
            taken += 1
        group, self._waiting = self._waiting[:taken], self._waiting[taken:]
        return group
