"""Group commit: one thread writes for all that wait."""

from __future__ import annotations

import threading
import time

import pytest

from streamlearn.errors import LogError, LogUnavailableError
from streamlearn.log.group_commit import GROUP_MAX_BYTES, GROUP_MAX_RECORDS, GroupCommit, Ticket
from streamlearn.records import NewRecord, Position
from streamlearn.testing import InjectedCrash


class Disk:
    """A writer that stands still until it is let go, and keeps what it was given."""

    def __init__(self) -> None:
        self.groups: list[list[Ticket]] = []
        self.entered = threading.Semaphore(0)
        self.go = threading.Semaphore(0)
        self.error: BaseException | None = None

    def write(self, group: list[Ticket], _deadline: float) -> None:
        self.groups.append(group)
        self.entered.release()
        assert self.go.acquire(timeout=10.0)
        if self.error is not None:
            raise self.error
        for ticket in group:
            ticket.positions = [Position(ticket.topic, 0, len(self.groups))]


class Submission(threading.Thread):
    """One thread's append, and what came of it."""

    def __init__(self, grouping: GroupCommit, ticket: Ticket, timeout_s: float = 10.0) -> None:
        super().__init__()
        self.grouping, self.ticket, self.timeout_s = grouping, ticket, timeout_s
        self.raised: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self.grouping.submit(self.ticket, time.monotonic() + self.timeout_s)
        except (LogError, InjectedCrash) as error:
            self.raised = error


def ticket(size_bytes: int = 10, records: int = 1) -> Ticket:
    """An append of so many records."""
    return Ticket("t", [(0, NewRecord(b"k", b"v"))] * records, size_bytes)


def wait_for(grouping: GroupCommit, count: int) -> None:
    """Until so many tickets wait."""
    deadline = time.monotonic() + 10.0
    while len(grouping._waiting) < count:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def started(disk: Disk, tickets: list[Ticket], timeout_s: float = 10.0) -> tuple[GroupCommit, list[Submission]]:
    """The first ticket being written, the others waiting."""
    grouping = GroupCommit(disk.write)
    submissions = [Submission(grouping, tickets[0])]
    assert disk.entered.acquire(timeout=10.0)
    for number, one in enumerate(tickets[1:], start=1):
        submissions.append(Submission(grouping, one, timeout_s))
        wait_for(grouping, number)
    return grouping, submissions


def finish(submissions: list[Submission]) -> None:
    for submission in submissions:
        submission.join(10.0)
        assert not submission.is_alive()


def test_what_waits_is_written_as_one_group_in_order() -> None:
    """While one write is under way three come, and the next write takes all three."""
    disk = Disk()
    tickets = [ticket() for _ in range(4)]
    _, submissions = started(disk, tickets)

    disk.go.release(2)
    finish(submissions)

    assert disk.groups == [tickets[:1], tickets[1:]]
    assert [submission.raised for submission in submissions] == [None] * 4


@pytest.mark.parametrize(
    "large", [ticket(size_bytes=GROUP_MAX_BYTES + 1), ticket(records=GROUP_MAX_RECORDS)], ids=["bytes", "records"]
)
def test_a_group_is_bounded(large: Ticket) -> None:
    """What does not fit any more goes into the next group; a ticket that fills one goes alone."""
    disk = Disk()
    tickets = [ticket(), ticket(), large, ticket()]
    _, submissions = started(disk, tickets)

    disk.go.release(4)
    finish(submissions)

    assert disk.groups == [tickets[:1], tickets[1:2], tickets[2:3], tickets[3:]]


def test_a_failure_is_the_failure_of_the_whole_group_and_of_no_other() -> None:
    """Nobody is acknowledged by a write that failed."""
    disk = Disk()
    _, submissions = started(disk, [ticket(), ticket(), ticket()])
    disk.go.release()
    assert disk.entered.acquire(timeout=10.0)

    disk.error = LogUnavailableError("full")
    disk.go.release()
    finish(submissions)

    assert [type(submission.raised) for submission in submissions] == [type(None), *[LogUnavailableError] * 2]


def test_a_writer_that_dies_leaves_nobody_acknowledged() -> None:
    """An interrupt in the thread that writes for two is an error for the other, and goes to the top in its own."""
    disk = Disk()
    _, submissions = started(disk, [ticket(), ticket(), ticket()])
    disk.go.release()
    assert disk.entered.acquire(timeout=10.0)

    disk.error = InjectedCrash()
    disk.go.release()
    finish(submissions)

    kinds = {type(submission.raised) for submission in submissions[1:]}
    assert kinds == {InjectedCrash, LogUnavailableError}


def test_a_ticket_that_waits_too_long_is_not_written_later() -> None:
    """It says so, and leaves the queue."""
    disk = Disk()
    tickets = [ticket(), ticket()]
    grouping, submissions = started(disk, tickets, timeout_s=0.05)

    submissions[1].join(10.0)
    disk.go.release()
    finish(submissions)

    assert "was not written" in str(submissions[1].raised)
    assert disk.groups == [tickets[:1]]
    assert grouping._waiting == []


def test_nobody_writing_waits_for_the_writer_of_now() -> None:
    """So that what it uses can be closed."""
    disk = Disk()
    grouping, submissions = started(disk, [ticket()])
    threading.Timer(0.05, disk.go.release).start()

    with grouping.nobody_writing(10.0):
        assert submissions[0].ticket.done
    finish(submissions)
