"""A damaged store is found before it is used, and the error says how to recover."""

from __future__ import annotations

import os
from contextlib import closing
from pathlib import Path
from random import Random

import pytest

import streamlearn.ledger.store_file
from streamlearn.errors import FROM_SCRATCH, StoreError
from streamlearn.ledger.store import Store
from streamlearn.ledger.store_file import FILE, check_whole
from streamlearn.ledger.store_view import StoreView

PAGE_BYTES = 4096
RECOVERY = f"restore .* from a backup, or {FROM_SCRATCH}"


def open_store(folder: Path) -> Store:
    return Store(folder, numbered=("labels",), rings=("payloads",))


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A closed store of about a hundred pages, a few of them free."""
    folder = tmp_path / "store"
    with closing(open_store(folder)) as store:
        for step in range(1, 21):
            store.begin(step)
            for key in range(100):
                store.tables["labels"].put(key * step, b"%d" % step)
            store.rings["payloads"].append(step, bytes(10_000))
            store.end()
            store.flush()
        store.rings["payloads"].trim(3)
        store.prune(4)
    return folder


def test_the_check_changes_nothing(store: Path) -> None:
    """It only reads."""
    before = (store / FILE).read_bytes()

    assert check_whole(store)

    assert (store / FILE).read_bytes() == before


def test_what_a_killed_writer_left_is_whole(store: Path) -> None:
    """The write-ahead log next to the file is a part of the store."""
    crashed = store.parent / "crashed"
    with closing(open_store(store)) as opened:
        opened.begin(21)
        opened.tables["labels"].put(21, b"21")
        opened.end()
        opened.flush()
        crashed.mkdir()
        for name in (FILE, f"{FILE}-wal"):
            (crashed / name).write_bytes((store / name).read_bytes())

    assert check_whole(crashed)

    with closing(open_store(crashed)) as opened:
        assert (opened.step, opened.tables["labels"].get(21)) == (21, b"21")


def test_there_may_be_no_store_yet(tmp_path: Path) -> None:
    """A new learner has none."""
    assert check_whole(tmp_path / "store")


@pytest.mark.parametrize("seed", range(8))
def test_a_missing_end_is_found(store: Path, seed: int) -> None:
    """Wherever it begins. A server finds it too."""
    size_bytes = (store / FILE).stat().st_size
    os.truncate(store / FILE, Random(seed).randrange(1, size_bytes))

    with pytest.raises(StoreError, match=RECOVERY):
        check_whole(store)
    with pytest.raises(StoreError, match=RECOVERY), StoreView(store).read():
        pass


def test_a_garbage_page_is_found_wherever_it_is_used(store: Path) -> None:
    """Each page in turn: refused, unless it is free or holds a part of a large value; then the rest can be read."""
    file, draw = store / FILE, Random(1)
    content, refused = file.read_bytes(), 0
    pages = len(content) // PAGE_BYTES
    for page in range(pages):
        at = page * PAGE_BYTES
        file.write_bytes(content[:at] + draw.randbytes(PAGE_BYTES) + content[at + PAGE_BYTES :])
        try:
            check_whole(store)
        except StoreError:
            refused += 1
            continue
        with closing(open_store(store)) as opened:
            assert len(opened.tables["labels"].items()) > 100
    assert refused >= pages // 4


def test_a_flipped_bit_is_a_store_error_or_not_noticed(store: Path) -> None:
    """It is found at the start or when it is read. Inside a value it is not found."""
    file, draw = store / FILE, Random(2)
    content, refused = file.read_bytes(), 0
    for _ in range(200):
        at = draw.randrange(len(content))
        file.write_bytes(content[:at] + bytes([content[at] ^ 1 << draw.randrange(8)]) + content[at + 1 :])
        try:
            check_whole(store)
            with closing(open_store(store)) as opened:
                opened.tables["labels"].items()
                opened.rewind(10)
                opened.rings["payloads"].cut(11)
        except StoreError:
            refused += 1
        for name in (f"{FILE}-wal", f"{FILE}-shm"):
            (store / name).unlink(missing_ok=True)
    assert refused >= 5


def test_a_large_store_is_not_checked(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The result says so, so that it can be logged."""
    monkeypatch.setattr(streamlearn.ledger.store_file, "MAX_CHECKED_BYTES", 1000)

    assert not check_whole(store)


def test_an_empty_file_is_a_store_that_was_lost(store: Path) -> None:
    """A full disk leaves an empty file. The check passes, and the rewind to the checkpoint fails."""
    os.truncate(store / FILE, 0)

    assert check_whole(store)

    with closing(open_store(store)) as empty, pytest.raises(StoreError, match=f"it is of another run.*{FROM_SCRATCH}"):
        empty.rewind(5)
