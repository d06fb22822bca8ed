"""Every page that the embedded log and the store write fails once: a real disk that takes n pages more, for every n.

Once for a moment (room again right after the first error), once for long (none until all is closed, and opened anew).
SQLite writes by itself, so no seam of ours is in its way: a tmpfs is made as small as it has to be, and
the kernel says ENOSPC. `FaultyFiles` fails the n-th operation of checkpoint, journal and publish.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from harness.disk import SmallDisk, may_mount

from streamlearn.app.siblings import registered
from streamlearn.app.wiring import StatePaths
from streamlearn.errors import LogUnavailableError, StoreError
from streamlearn.ledger.store import Store, number
from streamlearn.log.embedded import EmbeddedLog
from streamlearn.records import NewRecord, Position, TopicPartition

TOPIC = "t"
PARTITION = TopicPartition(TOPIC, 0)
MOST_PAGES = 200
BATCHES, IN_BATCH, VALUE_BYTES = 6, 3, 3000
STEPS, ROW_BYTES = 10, 6000
APPEND_S = 0.5


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SmallDisk]:
    """A disk that can be filled."""
    folder = tmp_path_factory.mktemp("full-disk")
    if not may_mount(folder):
        pytest.skip("NOT TESTED: what a full disk does to log and store. Run as root, where a tmpfs may be mounted")
    with SmallDisk(folder / "disk") as disk:
        (disk.folder / "something").write_bytes(b"x")
        yield disk


def open_log(folder: Path) -> EmbeddedLog:
    return EmbeddedLog(folder / "log.sqlite3", max_age_s=1e9, max_bytes=1 << 30)


def open_store(folder: Path) -> Store:
    return Store(folder, tables=("labels",), rings=("payloads",))


class Appends:
    """Batches of records, each acknowledged as a whole or refused."""

    def __init__(self, log: EmbeddedLog) -> None:
        self.log = log
        self.acknowledged: dict[Position, bytes] = {}
        self.refusals: list[str] = []
        self._number = 0

    def one(self) -> bool:
        self._number += 1
        values = [b"%d/%d " % (self._number, n) + bytes(VALUE_BYTES) for n in range(IN_BATCH)]
        try:
            positions = self.log.append(TOPIC, [NewRecord(b"k", value) for value in values], timeout_s=APPEND_S)
        except LogUnavailableError as error:
            self.refusals.append(str(error))
            return False
        self.acknowledged.update(zip(positions, values, strict=True))
        return True

    def check(self, log: EmbeddedLog) -> None:
        """What was acknowledged is there, at its place; what was refused, as a whole or not at all; and no hole."""
        records = log.read(PARTITION, 0, 10_000)
        assert [record.position.offset for record in records] == list(range(len(records)))
        assert len(records) % IN_BATCH == 0
        found = {record.position: record.value for record in records}
        assert {position: found.get(position) for position in self.acknowledged} == self.acknowledged
        assert len(records) <= len(self.acknowledged) + len(self.refusals) * IN_BATCH
        (after,) = log.append(TOPIC, [NewRecord(b"k", b"after")])
        assert after.offset == len(records)


@pytest.mark.parametrize("lasting", [False, True])
def test_the_log_keeps_what_it_acknowledged_whichever_page_fails(disk: SmallDisk, *, lasting: bool) -> None:
    """Each append is written or refused, saying why; and it goes on when there is room."""
    failed = 0
    for pages in range(MOST_PAGES):
        folder = disk.folder / f"log-{lasting}-{pages}"
        with closing(open_log(folder)) as log:
            log.create_topics({TOPIC: 1})
            appends = Appends(log)
            appends.one()
            disk.fill(pages)
            for _ in range(BATCHES):
                if not appends.one() and not lasting:
                    disk.free()
            if not lasting:
                disk.free()
                appends.check(log)
        disk.free()
        with closing(open_log(folder)) as log:
            if lasting:
                appends.check(log)
        assert len(appends.refusals) <= (BATCHES if lasting else 1), "room, and still refused"
        assert all("disk" in refusal for refusal in appends.refusals), appends.refusals
        if not appends.refusals:
            break
        failed += 1
    assert failed > BATCHES * IN_BATCH * VALUE_BYTES // 8192, "each page was refused once"
    assert failed < MOST_PAGES - 1, "and all of them were"


def test_a_log_that_cannot_be_made_says_so_and_is_made_when_there_is_room(disk: SmallDisk) -> None:
    """Whichever page of its making fails."""
    failed = 0
    for pages in range(MOST_PAGES):
        folder = disk.folder / f"new-log-{pages}"
        folder.mkdir()
        disk.fill(pages)
        try:
            with closing(open_log(folder)) as log:
                log.create_topics({TOPIC: 1})
            break
        except LogUnavailableError:
            failed += 1
        finally:
            disk.free()
        with closing(open_log(folder)) as log:
            log.create_topics({TOPIC: 1})
            assert log.append(TOPIC, [NewRecord(b"k", b"v")])[0].offset == 0
    assert 1 < failed < MOST_PAGES - 1


def take_step(store: Store, step: int) -> None:
    store.begin(step)
    store.tables["labels"].put(number(step % 3), b"%d" % step)
    store.rings["payloads"].append(number(step), b"%d " % step + bytes(ROW_BYTES))
    store.end()
    store.flush()


def check_store(store: Store, flushed: int) -> None:
    """All steps that were flushed, and at most the one whose flush failed; none by half; and it can be gone back."""
    assert store.step in (flushed, flushed + 1)
    for step in range(1, store.step + 1):
        row = store.rings["payloads"].get(number(step))
        assert row is not None
        assert row.startswith(b"%d " % step)
    labels = {number(step % 3): b"%d" % step for step in range(1, store.step + 1)}
    assert {key: store.tables["labels"].get(key) for key in labels} == labels
    store.rewind(flushed - 1)
    store.rings["payloads"].cut(flushed)
    before = {number(step % 3): b"%d" % step for step in range(1, flushed)}
    assert {key: store.tables["labels"].get(key) for key in before} == before
    take_step(store, flushed)


@pytest.mark.parametrize("lasting", [False, True])
def test_the_store_keeps_what_it_flushed_whichever_page_fails(disk: SmallDisk, *, lasting: bool) -> None:
    """A failed flush ends the store, saying why; opened again, it is as of the flush before."""
    failed, told = 0, []
    for pages in range(MOST_PAGES):
        folder, flushed = disk.folder / f"store-{lasting}-{pages}", 1
        store = open_store(folder)
        take_step(store, 1)
        disk.fill(pages)
        try:
            for step in range(2, STEPS + 1):
                take_step(store, step)
                flushed = step
        except StoreError as error:
            told.append(str(error))
            failed += 1
            if not lasting:
                disk.free()
        store.close()
        if flushed < STEPS and lasting:
            try:
                open_store(folder).close()  # a supervisor starts it again, with no room yet
            except StoreError as error:
                told.append(str(error))
        disk.free()
        with closing(open_store(folder)) as store:
            check_store(store, flushed)
        if flushed == STEPS:
            break
    assert all("free disk space" in each for each in told), told
    assert failed > STEPS * ROW_BYTES // 8192, "each page was refused once"
    assert failed < MOST_PAGES - 1, "and all of them were"


def test_a_store_that_cannot_be_made_says_so_and_is_made_when_there_is_room(disk: SmallDisk) -> None:
    """Whichever page of its making fails."""
    failed, told = 0, []
    for pages in range(MOST_PAGES):
        folder = disk.folder / f"new-store-{pages}"
        folder.mkdir()
        disk.fill(pages)
        try:
            open_store(folder).close()
            break
        except StoreError as error:
            told.append(str(error))
            failed += 1
        finally:
            disk.free()
        with closing(open_store(folder)) as store:
            take_step(store, 1)
    assert 1 < failed < MOST_PAGES - 1
    assert all("free disk space" in each for each in told), told


def test_a_server_serves_though_its_card_cannot_be_written(disk: SmallDisk) -> None:
    """Others cannot scrape it; that is no reason to answer nobody."""
    paths = StatePaths(disk.folder)
    disk.fill()
    try:
        with registered(paths, "server-0", 9):
            assert not list(paths.processes.glob("*"))
    finally:
        disk.free()

    with registered(paths, "server-0", 9):
        assert [path.name for path in paths.processes.glob("*")] == ["server-0.json"]
