"""The store: tables that rewind to any kept step, rings, one writer, whole after a crash."""

from __future__ import annotations

import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

import streamlearn.ledger.store
from streamlearn.errors import FROM_SCRATCH, StateLockedError, StoreError
from streamlearn.ledger.store import Store
from streamlearn.ledger.store_file import FILE, FORMAT, check_whole
from streamlearn.ledger.store_view import StoreView


def open_store(path: Path) -> Store:
    return Store(path, tables=("a", "b"), numbered=("n",), rings=("rows",))


def view_once(path: Path) -> None:
    with StoreView(path).read():
        pass


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
        store.rings["rows"].append(row, bytes(4000))
    store.rings["rows"].write()


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

    def test_undoes_a_step_that_was_taken_twice_as_it_went_the_second_time(self, tmp_path):
        """Undo of a step that was rewound is gone: a replay may change other keys in the same step."""
        store = open_store(tmp_path)
        put(store, 1, key="1")
        put(store, 2, key="2")
        store.rewind(0)
        put(store, 1, key="again")
        put(store, 2, other="2")

        store.rewind(1)

        assert content(store) == {"key": "again"}
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

        assert store.file.db.execute("SELECT DISTINCT step FROM undo").fetchall() == [(5,)]
        store.close()

    def test_restores_the_keys_and_values_of_a_numbered_table(self, tmp_path):
        """Row numbers are integers, 0 included; values may be bytes, int or str."""
        store = open_store(tmp_path)
        store.begin(1)
        for key, value in ((0, b"0"), (1, 1), (2, "2")):
            store.tables["n"].insert(key, value)
        store.end()
        store.begin(2)
        store.tables["n"].delete(0)
        store.tables["n"].put(2, "3")
        store.tables["n"].put(1 << 40, b"new")
        store.end()

        store.rewind(1)

        assert store.tables["n"].items() == [(0, b"0"), (1, 1), (2, "2")]
        assert store.tables["n"].first() == (0, b"0")
        store.close()

    def test_value_at_is_what_a_key_held_when_a_step_ended(self, tmp_path):
        """It is read from undo: the value before the first later change."""
        store = open_store(tmp_path)
        put(store, 1, key="1")
        put(store, 2, other="2")
        put(store, 3, key="3")

        assert [store.value_at(step, "a", b"key") for step in (0, 1, 2, 3)] == [None, b"1", b"1", b"3"]
        store.close()


class TestWithinAStep:
    """Changes are written when the step ends; reads see them at once."""

    def test_what_was_changed_is_seen_at_once(self, tmp_path):
        """A key has the last value of the open step, and is absent once it is deleted."""
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
        """`first` reads the file, so it must not miss changes that are not written yet."""
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

    def test_a_change_after_first_is_undone_to_before_the_step(self, tmp_path):
        """`first` writes the first half of a step; undo still has the values from before the step."""
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
        """A label that waits and is joined in one step leaves no undo of the queue."""
        store = open_store(tmp_path)
        put(store, 1, other="1")
        store.begin(2)
        store.tables["a"].insert(b"key", b"2")
        store.tables["a"].delete(b"key")
        store.end()

        assert store.file.db.execute("SELECT name FROM undo WHERE step = 2").fetchall() == [("step",)]
        store.close()

    def test_a_key_that_is_there_cannot_be_inserted(self, tmp_path):
        """An id that is inserted twice would leave a row without a key."""
        store = open_store(tmp_path)
        put(store, 1, key="1")
        store.begin(2)

        with pytest.raises(AssertionError, match="there already"):
            store.tables["a"].insert(b"key", b"2")
        store.close()

    def test_nothing_that_was_looked_up_is_kept_after_it(self, tmp_path):
        """Only the keys of one step are in memory (I6)."""
        store = open_store(tmp_path)
        put(store, 1, key="1")
        store.begin(2)
        table = store.tables["a"]
        table.get(b"key")
        table.put(b"new", b"2")
        during = len(table._now)
        store.end()
        table.get(b"key")

        assert (during, len(table._now)) == (2, 0)
        store.close()


class TestRings:
    def test_trim_and_cut_remove_the_ends(self, tmp_path):
        """`trim` removes rows below a number, `cut` from a number on."""
        store = open_store(tmp_path)
        ring = store.rings["rows"]
        for row in range(10):
            ring.append(row, b"%d" % row)

        ring.trim(3)
        ring.cut(8)

        assert [ring.get(row) for row in (2, 3, 7, 8)] == [None, b"3", b"7", None]
        ring.append(8, b"again")
        store.close()

    def test_all_rows_can_be_trimmed(self, tmp_path):
        """An empty ring is not a special case."""
        store = open_store(tmp_path)
        store.rings["rows"].append(0, b"0")

        for _ in range(2):
            store.rings["rows"].trim(5)
            store.rings["rows"].cut(0)

        assert store.rings["rows"].get(0) is None
        store.close()


class TestDurability:
    def test_a_crash_leaves_the_state_of_the_last_flush(self, tmp_path):
        """Steps after the flush are lost as a whole; the flushed steps are complete."""
        store = open_store(tmp_path)
        put(store, 1, key="1")
        store.flush()
        put(store, 2, key="2")
        store.close(flush=False)

        store = open_store(tmp_path)

        assert (store.step, content(store)) == (1, {"key": "1"})
        store.close()

    def test_a_close_in_an_open_step_loses_it(self, tmp_path):
        """A part of a step never becomes durable."""
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

    def test_a_full_disk_is_reported_and_leaves_the_last_flush_whole(self, tmp_path):
        """The error names the settings that help. With more space, the store continues from the last flush."""
        store = open_store(tmp_path)
        put(store, 1, key="1")
        store.flush()
        store.file.db.execute("PRAGMA max_page_count = 256")
        store.begin(2)

        with pytest.raises(StoreError, match=r"disk is full.*labels\.payload_max_bytes"):
            fill(store)
        store.close()

        store = open_store(tmp_path)
        assert (store.step, content(store), store.rings["rows"].get(0)) == (1, {"key": "1"}, None)
        store.close()

    def test_a_flush_syncs(self, tmp_path):
        """SQLite syncs its write-ahead log at each commit only with synchronous = FULL (2)."""
        store = open_store(tmp_path)

        assert store.file.db.execute("PRAGMA synchronous").fetchone() == (2,)
        assert store.file.db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        store.close()

    def test_changes_outside_a_step_are_refused(self, tmp_path):
        """A change outside a step could not be undone."""
        store = open_store(tmp_path)

        with pytest.raises(AssertionError, match="no step is open"):
            store.tables["a"].put(b"key", b"value")
        store.close()

    def test_a_step_that_does_not_follow_is_refused(self, tmp_path):
        """Steps only increase: the same step twice means a replay without a rewind."""
        store = open_store(tmp_path)
        put(store, 5, key="5")

        with pytest.raises(AssertionError, match="step 5 does not follow 5"):
            store.begin(5)
        store.close()


class TestOpening:
    def test_a_second_writer_is_refused_at_once(self, tmp_path):
        """It does not wait for the first writer to close."""
        store = open_store(tmp_path)

        with pytest.raises(StateLockedError, match="another learner"):
            open_store(tmp_path)
        store.close()

    def test_an_unknown_format_is_refused_by_writer_and_view(self, tmp_path):
        """A store of a later version is not changed."""
        store = open_store(tmp_path)
        store.note("format", (99).to_bytes(8, "big"))
        store.close()

        for check in (open_store, view_once):
            with pytest.raises(StoreError, match=f"format 99, this version reads {FORMAT}: .*{FROM_SCRATCH}"):
                check(tmp_path)

    def test_a_store_of_the_format_before_is_read(self, tmp_path):
        """A view sees no row in a table that is missing; the learner writes the new format at its start."""
        store = open_store(tmp_path)
        store.note("format", (FORMAT - 1).to_bytes(8, "big"))
        store.close()
        with closing(StoreView(tmp_path)) as view, view.read() as get:
            assert get("table_of_a_later_version", 1) is None

        open_store(tmp_path).close()

        with closing(sqlite3.connect(tmp_path / FILE)) as db:
            (note,) = db.execute("SELECT value FROM meta WHERE key = 'format'").fetchone()
        assert int.from_bytes(note, "big") == FORMAT

    def test_a_file_that_is_not_a_store_is_refused(self, tmp_path):
        """The error has its path, and the file is not overwritten."""
        (tmp_path / FILE).write_bytes(b"garbage" * 5000)

        for check in (open_store, view_once, check_whole):
            with pytest.raises(StoreError, match=f"{tmp_path}: the store is damaged .*{FROM_SCRATCH}"):
                check(tmp_path)
        assert (tmp_path / FILE).read_bytes() == b"garbage" * 5000

    def test_a_database_of_something_else_is_refused(self, tmp_path):
        """It is not changed."""
        with closing(sqlite3.connect(tmp_path / FILE)) as db:
            db.execute("CREATE TABLE meta (something INTEGER)")

        for check in (open_store, view_once):
            with pytest.raises(StoreError, match=FROM_SCRATCH):
                check(tmp_path)

    def test_a_writer_that_lost_its_lock_file_still_keeps_others_out(self, tmp_path):
        """SQLite's own lock is in the file: a second writer fails, and the first continues."""
        store = open_store(tmp_path)
        put(store, 1, key="1")
        (tmp_path / "writer.lock").unlink()

        with pytest.raises(StateLockedError, match="another learner"):
            open_store(tmp_path)

        store.close()
        store = open_store(tmp_path)
        assert content(store) == {"key": "1"}
        store.close()

    def test_after_an_error_nothing_more_is_written(self, tmp_path):
        """SQLite may have rolled back what came before the error, so the rest must not be committed."""
        store = open_store(tmp_path)
        put(store, 1, key="1")
        store.flush()
        put(store, 2, key="2")
        rows = store.rings["rows"]
        rows.append(1, b"1")
        rows.write()
        rows.append(1, b"again")
        with pytest.raises(StoreError):
            rows.write()
        store.close()

        store = open_store(tmp_path)
        assert (store.step, content(store)) == (1, {"key": "1"})
        store.close()


class TestView:
    def test_is_empty_until_there_is_a_store_and_follows_a_new_one(self, tmp_path):
        """A server may start before the learner, and outlive a store that an operator removed."""
        view = StoreView(tmp_path / "store")
        seen = []
        for value in ("first", "second"):
            with view.read() as get:
                seen.append(get("a", b"key"))
            store = open_store(tmp_path / "store")
            put(store, 1, key=value)
            store.close()
            with view.read() as get:
                seen.append(get("a", b"key"))
            (tmp_path / "store").rename(tmp_path / value)
        view.close()

        assert seen == [None, b"first", None, b"second"]

    def test_a_file_without_a_first_commit_is_not_a_store_yet(self, tmp_path):
        """The writer creates the file before its first commit. In between a view sees no store, and no error."""
        (tmp_path / FILE).touch()

        with StoreView(tmp_path).read() as get:
            assert get("a", b"key") is None

    def test_a_read_sees_one_snapshot(self, tmp_path):
        """A flush between two lookups of one read does not show in the second."""
        store, view = open_store(tmp_path), StoreView(tmp_path)
        put(store, 1, one="1", other="1")
        store.flush()

        with view.read() as get:
            seen = [get("a", b"one")]
            put(store, 2, one="2", other="2")
            store.flush()
            seen.append(get("a", b"other"))
        with view.read() as get:
            seen.append(get("a", b"other"))

        assert seen == [b"1", b"1", b"2"]
        view.close()
        store.close()

    def test_threads_share_a_view(self, tmp_path):
        """One thread reads at a time, and each sees one snapshot."""
        store, view = open_store(tmp_path), StoreView(tmp_path)

        def look(_):
            with view.read() as get:
                first = get("a", b"key")
                time.sleep(0.001)
                return first, get("a", b"key")

        with ThreadPoolExecutor(4) as pool:
            seen = pool.map(look, range(40))
            for step in range(1, 20):
                put(store, step, key=str(step))
                store.flush()

        assert all(first == second for first, second in seen)
        view.close()
        store.close()


class TestSize:
    """The file and its write-ahead log stay within a bound (I6)."""

    def test_the_file_reuses_the_space_of_removed_rows(self, tmp_path):
        """Ten times what is kept is written. The file is at most 2.5 times as large as after the first part."""
        store, sizes = open_store(tmp_path), []
        for part in range(10):
            store.begin(part + 1)
            for row in range(part * 500, part * 500 + 500):
                store.rings["rows"].append(row, bytes(4000))
                store.tables["n"].insert(row, row)
                if row >= 500:
                    store.tables["n"].delete(row - 500)
            store.end()
            store.rings["rows"].trim(part * 500)
            store.prune(part + 1)
            store.flush()
            store.file.db.execute("COMMIT")
            store.file.db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            store.file.db.execute("BEGIN IMMEDIATE")
            sizes.append((tmp_path / FILE).stat().st_size)
        store.close()

        assert max(sizes) < 2.5 * sizes[0]

    def test_the_write_ahead_log_is_emptied_while_others_read(self, tmp_path, monkeypatch):
        """At any time some reader is in the middle of a short read, as with many servers."""
        monkeypatch.setattr(streamlearn.ledger.store, "WAL_MAX_BYTES", 1 << 20)
        store, view, stop = open_store(tmp_path), StoreView(tmp_path), threading.Event()

        def look():
            while not stop.is_set():
                with view.read() as get:
                    get("a", b"key")
                    time.sleep(0.005)

        readers = [threading.Thread(target=look) for _ in range(4)]
        for reader in readers:
            reader.start()
        sizes = []
        for step in range(1, 41):
            store.begin(step)
            for row in range(step * 100, step * 100 + 100):
                store.rings["rows"].append(row, bytes(4000))
            store.end()
            store.flush()
            sizes.append((tmp_path / f"{FILE}-wal").stat().st_size)
        stop.set()
        for reader in readers:
            reader.join()
        view.close()
        store.close()

        assert max(sizes) <= 4 << 20, "17 MB were written"
