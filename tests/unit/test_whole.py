"""A damaged store is found before anybody trusts it, and what is said names the way out."""

from __future__ import annotations

import os
from contextlib import closing
from pathlib import Path
from random import Random

import pytest

from streamlearn.errors import StoreError
from streamlearn.labels import whole
from streamlearn.labels.store import Store, StoreView, number
from streamlearn.labels.whole import check_whole

PAGE_BYTES = 4096
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
