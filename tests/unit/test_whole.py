"""A damaged store is found before it is used, and the error says what to do. A file that is only short is no damage."""

from __future__ import annotations

import os
import shutil
import signal
from contextlib import closing
from pathlib import Path
from random import Random

import lmdb
import pytest
from support import until

from streamlearn.errors import StoreError
from streamlearn.labels import whole
from streamlearn.labels.store import Store, StoreView, number
from streamlearn.labels.whole import Check, check_whole

PAGE_BYTES = 4096
LARGE = b"L" * 10_000
WAY_OUT = "restore .* from a backup, or begin anew"


def open_store(folder: Path) -> Store:
    return Store(folder, tables=("labels",), rings=("payloads",), map_size=1 << 28)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A closed store of some hundred pages, a few of them free."""
    folder = tmp_path / "store"
    with closing(open_store(folder)) as store:
        for step in range(1, 21):
            store.begin(step)
            for key in range(100):
                store.tables["labels"].put(number(key * step), b"%d" % step)
            store.rings["payloads"].append(number(step), bytes(10_000))
            store.end()
            store.flush()
    return folder


def unwritten_pages(folder: Path) -> int:
    """Pages with a number, and no place in the file."""
    with lmdb.open(str(folder), readonly=True, lock=False) as env:
        numbered = env.info()["last_pgno"] + 1
    return int(numbered - (folder / "data.mdb").stat().st_size // PAGE_BYTES)


@pytest.fixture
def short(tmp_path: Path) -> Path:
    """A closed store whose last transaction allocated and freed its last pages, which LMDB therefore never wrote."""
    folder = tmp_path / "short"
    with closing(open_store(folder)) as store:
        for step in (1, 2):
            store.begin(step)
            for key in range(300):
                store.tables["labels"].put(number(key), bytes([step]) * 200)
            store.end()
            store.flush()
        store.rings["payloads"].append(number(1), LARGE)
    with lmdb.open(str(folder), map_size=1 << 28, max_dbs=16) as env:
        payloads = env.open_db(b"payloads")
        with env.begin(write=True, db=payloads) as txn:
            for row in range(2, 2000):
                txn.put(number(row), bytes(500))
            for row in reversed(range(200, 2000)):
                txn.delete(number(row))
    assert unwritten_pages(folder) > 10
    return folder


class TestAShortFile:
    """Its length says nothing: a page is missing only where it is in use."""

    def test_is_good_where_no_page_in_use_is_missing(self, short: Path) -> None:
        """For the check, for a server, and for the next learner, which reads and goes on."""
        assert check_whole(short)

        with closing(StoreView(short)) as view, view.read() as get:
            assert get is not None
            assert get("labels", number(299)) == b"\2" * 200
            assert get("payloads", number(1)) == LARGE
            assert [get("payloads", number(row)) for row in (199, 200)] == [bytes(500), None]
        with closing(open_store(short)) as store:
            store.rewind(1)
            assert {value for _, value in store.tables["labels"].items()} == {b"\1" * 200}

    @pytest.mark.parametrize("seed", range(4))
    def test_is_refused_where_a_page_in_use_is_missing(self, short: Path, seed: int) -> None:
        """As a store is that was cut by a copy."""
        pages = (short / "data.mdb").stat().st_size // PAGE_BYTES
        os.truncate(short / "data.mdb", Random(seed).randrange(2, pages // 2) * PAGE_BYTES)

        with pytest.raises(StoreError, match=f"its end is missing.*{WAY_OUT}"):
            check_whole(short)
        with pytest.raises(StoreError, match=WAY_OUT), StoreView(short).read():
            pass

    @pytest.mark.parametrize("missing_bytes", [1, PAGE_BYTES, PAGE_BYTES + 1])
    def test_is_refused_where_the_end_of_a_large_value_is_missing(self, tmp_path: Path, missing_bytes: int) -> None:
        """Only its first page has a header; the check must read the others too."""
        with closing(open_store(tmp_path)) as store:
            for row in range(5):  # until there are free pages for everything else
                store.rings["payloads"].append(number(row), b"L" * 100 * PAGE_BYTES)
                store.flush()
        size_bytes = (tmp_path / "data.mdb").stat().st_size
        assert (tmp_path / "data.mdb").read_bytes()[-PAGE_BYTES:].startswith(b"LLLL"), "the value is not at the end"
        os.truncate(tmp_path / "data.mdb", size_bytes - missing_bytes)

        for _ in range(2):  # servers first, since the learner's check removes a partial page
            with pytest.raises(StoreError, match=WAY_OUT), StoreView(tmp_path).read():
                pass
            with pytest.raises(StoreError, match=WAY_OUT):
                check_whole(tmp_path)

    def test_may_end_in_a_partial_page_that_is_not_in_use(self, short: Path) -> None:
        """A write that a full disk cut short."""
        with (short / "data.mdb").open("ab") as file:
            file.write(b"?" * 1000)

        assert check_whole(short)

        assert (short / "data.mdb").stat().st_size % PAGE_BYTES == 0

    def test_is_checked_however_large_it_is(self, short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Trusting it might end each learner by a signal."""
        monkeypatch.setattr(whole, "MOST_BYTES", 1000)

        assert check_whole(short)

        os.truncate(short / "data.mdb", 20 * PAGE_BYTES)
        with pytest.raises(StoreError, match=WAY_OUT):
            check_whole(short)

    def test_a_server_answers_while_it_is_checked(self, short: Path) -> None:
        """With an error at once; a later call finds it good."""
        with closing(StoreView(short, wait_s=0.0)) as view:
            with pytest.raises(StoreError, match="is being checked"), view.read():
                pass

            until(lambda: reads(view), "the store can be read")

    def test_a_server_checks_a_damaged_one_once_and_a_restored_one_again(
        self, short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Each request would cost a process."""
        checks: list[Path] = []
        start = Check.__init__
        monkeypatch.setattr(
            Check, "__init__", lambda self, path, **live: checks.append(path) or start(self, path, **live)
        )
        shutil.copyfile(short / "data.mdb", tmp_path / "backup")
        os.truncate(short / "data.mdb", 20 * PAGE_BYTES)

        with closing(StoreView(short)) as view:
            for _ in range(3):
                with pytest.raises(StoreError, match=WAY_OUT), view.read():
                    pass
            assert len(checks) == 1

            shutil.copyfile(tmp_path / "backup", short / "data.mdb")
            assert reads(view)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
def test_a_check_that_is_stopped_from_outside_finds_no_damage(store: Path, number: signal.Signals) -> None:
    """A shutdown or the kernel's memory killer may do so."""
    with Check(store, live=False) as check:
        os.kill(check.pid, signal.SIGSTOP)
        os.kill(check.pid, number)
        os.kill(check.pid, signal.SIGCONT)

        assert check.result(60.0) is False


def reads(view: StoreView) -> bool:
    """Whether the store can be read now."""
    try:
        with view.read() as get:
            return get is not None
    except StoreError:
        return False


def test_a_whole_store_is_left_as_it_is(store: Path) -> None:
    """Walked, and nothing else."""
    before = (store / "data.mdb").read_bytes()

    assert check_whole(store)

    assert (store / "data.mdb").read_bytes() == before


def test_there_may_be_no_store_yet(tmp_path: Path) -> None:
    """A new learner has none."""
    assert check_whole(tmp_path / "store")


@pytest.mark.parametrize("seed", range(8))
def test_a_missing_end_is_found(store: Path, seed: int) -> None:
    """Wherever it begins; a server finds it too, and is not ended by a signal."""
    size_bytes = (store / "data.mdb").stat().st_size
    os.truncate(store / "data.mdb", Random(seed).randrange(2 * PAGE_BYTES, size_bytes))

    with pytest.raises(StoreError, match=WAY_OUT):
        check_whole(store)
    with pytest.raises(StoreError, match=WAY_OUT), StoreView(store).read():
        pass


def test_a_page_that_is_none_is_found_wherever_it_is_used(store: Path) -> None:
    """Each page in turn: refused, or it is free or a page of a large value, and then the rest can be read."""
    data, draw = store / "data.mdb", Random(1)
    content, refused = data.read_bytes(), 0
    pages = len(content) // PAGE_BYTES
    for page in range(0, pages, 7):
        at = page * PAGE_BYTES
        data.write_bytes(content[:at] + draw.randbytes(PAGE_BYTES) + content[at + PAGE_BYTES :])
        try:
            check_whole(store)
        except StoreError:
            refused += 1
            continue
        with closing(open_store(store)) as opened:
            assert len(opened.tables["labels"].items()) > 100
    assert refused >= 2


def test_a_pointer_that_would_end_the_process_ends_another(store: Path) -> None:
    """Bits of page headers flip: no signal reaches us."""
    data, draw = store / "data.mdb", Random(2)
    content, refused = data.read_bytes(), 0
    for _ in range(12):
        at = draw.randrange(2, len(content) // PAGE_BYTES) * PAGE_BYTES + draw.randrange(16, 24)
        data.write_bytes(content[:at] + bytes([content[at] ^ 0x55]) + content[at + 1 :])
        try:
            check_whole(store)
        except StoreError as error:
            refused += "restore" in str(error)
    assert refused >= 1


def test_what_is_too_large_is_not_walked(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And that is said, so that it can be logged."""
    monkeypatch.setattr(whole, "MOST_BYTES", 1000)

    assert not check_whole(store)


def test_a_stump_is_no_store(store: Path) -> None:
    """What a full disk leaves of a store that was never made; one that was lost so is missed by the checkpoint."""
    os.truncate(store / "data.mdb", PAGE_BYTES)

    assert check_whole(store)

    with closing(open_store(store)) as empty, pytest.raises(StoreError, match=r"it is of another run.*begin anew"):
        empty.rewind(5)
