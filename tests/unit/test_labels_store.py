"""The store: tables that rewind to any kept step, rings with ends, one writer, whole after a crash."""

from __future__ import annotations

from pathlib import Path

import pytest

from streamlearn.errors import ANEW, StateLockedError, StoreError
from streamlearn.labels.store import FORMAT, Store, StoreView, number


def open_store(path: Path, map_size: int = 1 << 30) -> Store:
    return Store(path, tables=("a", "b"), rings=("rows",), map_size=map_size)


def crash(store: Store) -> None:
    """What kill -9 leaves: nothing that was not flushed, and no lock."""
    store._txn.abort()
    store._env.close()
    store._lock.close()


def put(store: Store, step: int, **values: str) -> None:
    """One step that sets keys of table `a`; an empty value deletes."""
    store.begin(step)
    for key, value in values.items():
        if value:
            store.tables["a"].put(key.encode(), value.encode())
        else:
            store.tables["a"].delete(key.encode())
    store.end()


def fill(store: Store) -> None:
    """Forty megabytes."""
    for row in range(10_000):
        store.rings["rows"].append(number(row), bytes(4000))


def content(store: Store) -> dict[str, str]:
    return {key.decode(): value.decode() for key, value in store.tables["a"].items()}


class TestRewind:
    def test_restores_changed_added_and_deleted_keys(self, tmp_path):
        """Whatever later steps did to a key, it holds again what it held when the step ended."""
        store = open_store(tmp_path)
        put(store, 1, kept="1", changed="1", deleted="1")
        put(store, 2, changed="2", deleted="", added="2")
        put(store, 3, changed="3", added="", deleted="3")

        store.rewind(1)

        assert content(store) == {"kept": "1", "changed": "1", "deleted": "1"}
        assert store.step == 1
        store.close()

    def test_undoes_only_the_first_change_of_a_key_in_a_step(self, tmp_path):
        """A key that a step changes twice goes back to before the step, not to its middle."""
        store = open_store(tmp_path)
        put(store, 1, key="old")
        store.begin(2)
        for value in (b"x", b"y"):
            store.tables["a"].put(b"key", value)
        store.tables["b"].insert(b"key", b"other table")
        store.tables["b"].delete(b"key")
        store.end()

        store.rewind(1)

        assert content(store) == {"key": "old"}
        assert store.tables["b"].get(b"key") is None
        store.close()

    def test_undoes_a_step_that_is_still_open(self, tmp_path):
        """A step that failed in its middle leaves no trace."""
        store = open_store(tmp_path)
        put(store, 1, key="1")
        store.begin(2)
        store.tables["a"].put(b"key", b"2")

        store.rewind(1)

        assert content(store) == {"key": "1"}
        store.close()

    def test_survives_a_reopening(self, tmp_path):
        """Undo is as durable as what it undoes."""
        store = open_store(tmp_path)
        put(store, 1, key="1")
        put(store, 2, key="2")
        store.close()

        store = open_store(tmp_path)
        store.rewind(1)

        assert content(store) == {"key": "1"}
        store.close()

    def test_refuses_a_step_newer_than_the_store(self, tmp_path):
        """A store behind the checkpoint is another run's: learning on would lose labels in silence."""
        store = open_store(tmp_path)
        put(store, 1, key="1")

        with pytest.raises(StoreError, match="ends at step 1, the checkpoint is at 2"):
            store.rewind(2)
        assert content(store) == {"key": "1"}
        store.close()

    def test_refuses_a_step_whose_undo_was_pruned(self, tmp_path):
        """After `prune(2)` step 2 can be reached and step 1 cannot, also after a reopening."""
        store = open_store(tmp_path)
        for step in (1, 2, 3):
            put(store, step, key=str(step))
        store.prune(2)
        store.close()

        store = open_store(tmp_path)
        with pytest.raises(StoreError, match="go back to step 2, not to 1"):
            store.rewind(1)
        store.rewind(2)
        assert content(store) == {"key": "2"}
        store.close()

    def test_of_pruned_undo_nothing_is_left(self, tmp_path):
        """Undo takes room only for the steps that can be rewound to (I6)."""
        store = open_store(tmp_path)
        for step in range(1, 6):
            put(store, step, key=str(step))

        store.prune(4)

        kept = [int.from_bytes(key, "big") for key, _ in store._txn.cursor(store._undo)]
        assert kept == [0, 5], "row 0 says how far was pruned"
        store.close()

    def test_value_at_tells_what_a_key_held_when_a_step_ended(self, tmp_path):
        """The past is read from undo: the value before the first later change."""
        store = open_store(tmp_path)
        put(store, 1, key="1")
        put(store, 2, other="2")
        put(store, 3, key="3")

        assert [store.value_at(step, "a", b"key") for step in (0, 1, 2, 3)] == [None, b"1", b"1", b"3"]
        store.close()


class TestWithinAStep:
    """Changes are held back until the step ends; nobody who asks the table can tell."""

    def test_what_was_changed_is_seen_at_once(self, tmp_path):
        """A key holds what the open step last gave it, and is gone once it deletes it."""
        store = open_store(tmp_path)
        put(store, 1, deleted="1", changed="1")
        table = store.tables["a"]
        store.begin(2)

        table.put(b"changed", b"2")
        table.delete(b"deleted")
        table.insert(b"added", b"2")

        assert [table.get(key) for key in (b"changed", b"deleted", b"added")] == [b"2", None, b"2"]
        store.end()
        assert content(store) == {"added": "2", "changed": "2"}
        store.close()

    def test_the_smallest_key_is_one_that_the_step_has_just_changed(self, tmp_path):
        """`first` walks what is stored, so it must not miss what is held back."""
        store = open_store(tmp_path)
        put(store, 1, b="1", c="1")
        table = store.tables["a"]
        store.begin(2)

        table.insert(b"a", b"2")
        with_added = table.first()
        table.delete(b"a")
        table.delete(b"b")

        assert (with_added, table.first()) == ((b"a", b"2"), (b"c", b"1"))
        store.close()

    def test_a_change_after_a_walk_is_undone_to_before_the_step(self, tmp_path):
        """A walk writes down the first half of a step; undo still starts at the step's beginning."""
        store = open_store(tmp_path)
        put(store, 1, key="old")
        store.begin(2)
        store.tables["a"].put(b"key", b"x")
        store.tables["a"].first()
        store.tables["a"].put(b"key", b"y")
        store.end()

        store.rewind(1)

        assert content(store) == {"key": "old"}
        store.close()

    def test_a_change_that_is_taken_back_leaves_nothing_to_undo(self, tmp_path):
        """A label that waits and is joined in one step passes the queue without a trace."""
        store = open_store(tmp_path)
        put(store, 1, other="1")
        before = store._txn.stat(store._undo)["entries"]
        store.begin(2)
        store.tables["a"].insert(b"key", b"2")
        store.tables["a"].delete(b"key")
        store.end()

        undo = store._txn.get(number(2), db=store._undo)
        assert (b"key" in undo, store._txn.stat(store._undo)["entries"]) == (False, before + 1)
        store.close()

    def test_a_key_that_is_there_cannot_be_inserted(self, tmp_path):
        """An id that comes twice would leave a row that nothing names."""
        store = open_store(tmp_path)
        put(store, 1, key="1")
        store.begin(2)

        with pytest.raises(AssertionError, match="there already"):
            store.tables["a"].insert(b"key", b"2")
        store.close()

    def test_nothing_that_was_looked_up_is_kept_after_it(self, tmp_path):
        """What is held in memory is one step's (I6)."""
        store = open_store(tmp_path)
        put(store, 1, key="1")
        store.begin(2)
        table = store.tables["a"]
        table.get(b"key")
        table.put(b"new", b"2")
        store.end()
        table.get(b"key")

        assert (table._now, table._stored, table._before) == ({}, {}, {})
        store.close()


class TestRings:
    def test_trim_and_cut_remove_the_ends(self, tmp_path):
        """`trim` removes rows below, `cut` from a row on; what is between stays."""
        store = open_store(tmp_path)
        ring = store.rings["rows"]
        for row in range(10):
            ring.append(number(row), b"%d" % row)

        assert ring.trim(3) == 3
        assert ring.cut(8) == 2

        assert [ring.get(number(row)) for row in (2, 3, 7, 8)] == [None, b"3", b"7", None]
        ring.append(number(8), b"again")
        store.close()

    def test_trim_of_all_rows_ends(self, tmp_path):
        """An empty ring is no special case."""
        store = open_store(tmp_path)
        store.rings["rows"].append(number(0), b"0")

        assert store.rings["rows"].trim(5) == 1
        assert store.rings["rows"].trim(5) == 0
        assert store.rings["rows"].cut(0) == 0
        store.close()


class TestDurability:
    def test_a_crash_leaves_the_state_of_the_last_flush(self, tmp_path):
        """Steps after the flush are gone whole; the flushed ones are there whole."""
        store = open_store(tmp_path)
        put(store, 1, key="1")
        store.flush()
        put(store, 2, key="2")
        crash(store)

        store = open_store(tmp_path)

        assert (store.step, content(store)) == (1, {"key": "1"})
        store.close()

    def test_a_close_in_an_open_step_loses_it(self, tmp_path):
        """Half a step is never made durable."""
        store = open_store(tmp_path)
        put(store, 1, key="1")
        store.flush()
        store.begin(2)
        store.tables["a"].put(b"key", b"2")
        store.close()
        store.close()

        store = open_store(tmp_path)

        assert (store.step, content(store)) == (1, {"key": "1"})
        store.close()

    def test_a_full_map_is_told_and_leaves_the_last_flush_whole(self, tmp_path):
        """Running out of room names the settings that help, and can be mended by more room."""
        store = open_store(tmp_path, map_size=1 << 20)
        put(store, 1, key="1")
        store.flush()
        store.begin(2)

        with pytest.raises(StoreError, match=r"labels\.payload_max_bytes"):
            fill(store)
        store.close()

        store = open_store(tmp_path, map_size=1 << 30)
        assert (store.step, content(store), store.rings["rows"].get(number(0))) == (1, {"key": "1"}, None)
        store.close()

    def test_changes_outside_a_step_are_refused(self, tmp_path):
        """A change that no step owns could not be undone."""
        store = open_store(tmp_path)

        with pytest.raises(AssertionError, match="no step is open"):
            store.tables["a"].put(b"key", b"value")
        store.close()

    def test_a_step_that_does_not_follow_is_refused(self, tmp_path):
        """Steps only grow: the same step twice would mean that a replay forgot to rewind."""
        store = open_store(tmp_path)
        put(store, 5, key="5")

        with pytest.raises(AssertionError, match="step 5 does not follow 5"):
            store.begin(5)
        store.close()


class TestOpening:
    def test_a_second_writer_is_refused_at_once(self, tmp_path):
        """LMDB alone would let it wait for ever."""
        store = open_store(tmp_path)

        with pytest.raises(StateLockedError, match="another learner"):
            open_store(tmp_path)
        store.close()

    def test_an_unknown_format_is_refused_by_writer_and_view(self, tmp_path):
        """A store of a later version is left alone."""
        store = open_store(tmp_path)
        store.note("format", number(99))
        store.close()

        with pytest.raises(StoreError, match=f"format 99, this version reads {FORMAT}: .*{ANEW}"):
            open_store(tmp_path)
        with pytest.raises(StoreError, match="format 99"), StoreView(tmp_path).read():
            pass

    def test_a_file_that_is_no_store_is_refused(self, tmp_path):
        """Garbage is named, with its path, and not overwritten."""
        (tmp_path / "data.mdb").write_bytes(b"garbage" * 5000)

        with pytest.raises(StoreError, match="cannot open the store"):
            open_store(tmp_path)
        with pytest.raises(StoreError, match="cannot read the store"), StoreView(tmp_path).read():
            pass


class TestView:
    def test_is_empty_until_there_is_a_store_and_follows_one_made_anew(self, tmp_path):
        """A server may start before the learner, and outlive a store that an operator removed."""
        view = StoreView(tmp_path / "store")
        seen = []
        for value in ("first", "second"):
            with view.read() as get:
                seen.append(get is None)
            store = open_store(tmp_path / "store")
            put(store, 1, key=value)
            store.close()
            with view.read() as get:
                assert get is not None
                seen.append(get("a", b"key"))
            (tmp_path / "store").rename(tmp_path / value)
        view.close()

        assert seen == [True, b"first", True, b"second"]

    def test_a_file_without_a_first_commit_is_no_store_yet(self, tmp_path):
        """The writer makes the file before its first commit; a view that looks between sees nothing, and no error."""
        (tmp_path / "data.mdb").touch()

        with StoreView(tmp_path).read() as get:
            assert get is None
