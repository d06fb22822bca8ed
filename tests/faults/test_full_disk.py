"""A full disk: the embedded log and the store on a disk with room for n more pages, for every n.

Each n is tested twice: with space again right after the first error, and with none until log or store is reopened.
SQLite writes its files itself, so the disk is a tmpfs of the right size, and the kernel answers ENOSPC. `FaultyFiles`
fails the n-th operation of checkpoint, journal and publish.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from harness.disk import SmallDisk, may_mount

from streamlearn.app.siblings import registered
from streamlearn.errors import LogUnavailableError, StoreError
from streamlearn.ledger.store import Store
from streamlearn.log.embedded import EmbeddedLog
from streamlearn.records import NewRecord, Position, TopicPartition
from streamlearn.state.paths import StatePaths

TOPIC = "t"
PARTITION = TopicPartition(TOPIC, 0)
MOST_PAGES = 200
BATCHES, IN_BATCH, VALUE_BYTES = 6, 3, 3000
STEPS, ROW_BYTES = 10, 6000
APPEND_S = 0.5


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SmallDisk]:
    """A small disk that a test can fill."""
    folder = tmp_path_factory.mktemp("full-disk")
    if not may_mount(folder):
        pytest.skip("NOT TESTED: log and store on a full disk. Run as root, so that a tmpfs can be mounted")
    with SmallDisk(folder / "disk") as disk:
        (disk.folder / "something").write_bytes(b"x")
        yield disk


def open_log(folder: Path) -> EmbeddedLog:
    return EmbeddedLog(folder / "log.sqlite3", max_age_s=1e9, max_bytes=1 << 30)


def open_store(folder: Path) -> Store:
    return Store(folder, numbered=("labels",), rings=("payloads",))


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
        """Acknowledged batches are there, at their positions. Refused ones are there as a whole or not. No gaps."""
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
    """Each append is written, or refused with the reason. The log continues when there is space."""
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
        assert len(appends.refusals) <= (BATCHES if lasting else 1), "refused although there is space"
        assert all("disk" in refusal for refusal in appends.refusals), appends.refusals
        if not appends.refusals:
            break
        failed += 1
    assert failed > BATCHES * IN_BATCH * VALUE_BYTES // 8192, "each page failed once"
    assert failed < MOST_PAGES - 1, "the last run had no failure"


def test_a_log_that_cannot_be_created_is_an_error_and_is_created_with_more_space(disk: SmallDisk) -> None:
    """Whichever of its first pages fails."""
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
    store.tables["labels"].put(step % 3, b"%d" % step)
    store.rings["payloads"].append(step, b"%d " % step + bytes(ROW_BYTES))
    store.end()
    store.flush()


def check_store(store: Store, flushed: int) -> None:
    """All flushed steps are there, and at most the one whose flush failed, each complete. A rewind works."""
    assert store.step in (flushed, flushed + 1)
    for step in range(1, store.step + 1):
        row = store.rings["payloads"].get(step)
        assert row is not None
        assert row.startswith(b"%d " % step)
    labels = {step % 3: b"%d" % step for step in range(1, store.step + 1)}
    assert {key: store.tables["labels"].get(key) for key in labels} == labels
    store.rewind(flushed - 1)
    store.rings["payloads"].cut(flushed)
    before = {step % 3: b"%d" % step for step in range(1, flushed)}
    assert {key: store.tables["labels"].get(key) for key in before} == before
    take_step(store, flushed)


@pytest.mark.parametrize("lasting", [False, True])
def test_the_store_keeps_what_it_flushed_whichever_page_fails(disk: SmallDisk, *, lasting: bool) -> None:
    """A failed flush ends the store, with the reason. Reopened, it has the state of the flush before."""
    failed, errors = 0, []
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
            errors.append(str(error))
            failed += 1
            if not lasting:
                disk.free()
        store.close()
        if flushed < STEPS and lasting:
            try:
                open_store(folder).close()  # a supervisor restarts it, with no space yet
            except StoreError as error:
                errors.append(str(error))
        disk.free()
        with closing(open_store(folder)) as store:
            check_store(store, flushed)
        if flushed == STEPS:
            break
    assert all("free disk space" in each for each in errors), errors
    assert failed > STEPS * ROW_BYTES // 8192, "each page failed once"
    assert failed < MOST_PAGES - 1, "the last run had no failure"


def test_a_store_that_cannot_be_created_is_an_error_and_is_created_with_more_space(disk: SmallDisk) -> None:
    """Whichever of its first pages fails."""
    failed, errors = 0, []
    for pages in range(MOST_PAGES):
        folder = disk.folder / f"new-store-{pages}"
        folder.mkdir()
        disk.fill(pages)
        try:
            open_store(folder).close()
            break
        except StoreError as error:
            errors.append(str(error))
            failed += 1
        finally:
            disk.free()
        with closing(open_store(folder)) as store:
            take_step(store, 1)
    assert 1 < failed < MOST_PAGES - 1
    assert all("free disk space" in each for each in errors), errors


def test_a_server_serves_although_it_cannot_register(disk: SmallDisk) -> None:
    """Its metrics cannot be scraped, but it answers predictions."""
    paths = StatePaths(disk.folder)
    disk.fill()
    try:
        with registered(paths, "server-0", 9):
            assert not list(paths.processes.glob("*"))
    finally:
        disk.free()

    with registered(paths, "server-0", 9):
        assert [path.name for path in paths.processes.glob("*")] == ["server-0.json"]
