"""The replay buffer: bounded, balanced, corrected in place; draws are a function of content, seed and step."""

from __future__ import annotations

import itertools
import pickle
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamlearn.ledger.replay_buffer import ReplayBuffer
from streamlearn.records import Column, Example, Schema

SCHEMA = Schema((2,), np.dtype(np.int16), ("ant", "bee", "cat"))
_label_times = itertools.count()


def example(sample_id: str, class_index: int, value: int = 0, at_s: float | None = None) -> Example:
    """An example whose label is newer than all before, unless a time is given."""
    labelled_at_s = float(next(_label_times)) if at_s is None else at_s
    return Example(sample_id, np.full(SCHEMA.shape, value, np.int16), class_index, labelled_at_s)


def buffer_of(*classes: int, capacity: int = 1000, seed: int = 7) -> ReplayBuffer:
    """Rows s0, s1, … of these classes; the payload of row i is i."""
    buffer = ReplayBuffer(capacity, SCHEMA, seed)
    for i, class_index in enumerate(classes):
        buffer.add(example(f"s{i}", class_index, i))
    return buffer


def old(buffer: ReplayBuffer) -> ReplayBuffer:
    """The same buffer, after every row was drawn for the first time."""
    buffer.draw_into(np.empty((len(buffer), 2), np.int16), np.empty(len(buffer), np.int64), 0)
    return buffer


def draw(buffer: ReplayBuffer, n: int, step: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Rows of a step, and their ids: payload i belongs to s<i>."""
    x_L, y_L = np.empty((n, 2), np.int16), np.empty(n, np.int64)
    buffer.draw_into(x_L, y_L, step)
    rows_drawn = n if len(buffer) else 0
    return x_L[:rows_drawn], y_L[:rows_drawn], [f"s{value}" for value in x_L[:rows_drawn, 0].tolist()]


def rows(buffer: ReplayBuffer) -> dict[str, tuple[int, int]]:
    """Class and payload value of each id, oldest first."""
    state = buffer.state()
    ends = state["id_offsets"].tolist()
    ids = [state["ids"].tobytes()[a:b].decode() for a, b in itertools.pairwise(ends)]
    return dict(zip(ids, zip(state["y"].tolist(), state["x"][:, 0].tolist(), strict=True), strict=True))


class TestHolding:
    def test_a_full_buffer_drops_the_oldest_of_the_largest_class(self):
        """The largest class loses a row, so that a rare class keeps its rows."""
        buffer = buffer_of(1, 0, 0, 0, 2, capacity=5)

        buffer.add(example("new", 2, 9))

        assert list(rows(buffer)) == ["s0", "s2", "s3", "s4", "new"]

    def test_a_class_that_would_be_largest_drops_its_own_oldest(self):
        """A flood of one class evicts that class alone."""
        buffer = buffer_of(0, 1, 2, capacity=3)

        for i in range(10):
            buffer.add(example(f"flood{i}", 1))

        assert list(rows(buffer)) == ["s0", "s2", "flood9"]

    def test_of_equal_classes_the_one_with_the_oldest_row_loses_it(self):
        """The first row of a new class replaces the oldest row."""
        buffer = buffer_of(2, 0, capacity=2)

        buffer.add(example("new", 1))

        assert list(rows(buffer)) == ["s1", "new"]

    def test_the_same_sample_again_replaces_its_row(self):
        """A correction changes class and payload, and does not add a row."""
        buffer = buffer_of(0, 0, 1)

        buffer.add(example("s0", 2, 42))

        assert rows(buffer) == {"s1": (0, 1), "s2": (1, 2), "s0": (2, 42)}
        assert len(buffer) == 3

    def test_remove_drops_the_row_of_a_sample(self):
        """It is neither drawn nor saved after that."""
        buffer = buffer_of(0, 1, 1)

        assert buffer.remove("s1")
        assert not buffer.remove("s1")
        assert not buffer.remove("unknown")

        assert rows(buffer) == {"s0": (0, 0), "s2": (1, 2)}
        assert buffer.new_count == 2
        assert set(draw(buffer, 8, 1)[2]) == {"s0", "s2"}

    def test_relabel_corrects_a_row_that_is_held(self):
        """The row keeps its payload."""
        buffer = buffer_of(0, 0, 1)

        assert buffer.relabel("s1", 2)
        assert not buffer.relabel("unknown", 2)

        assert rows(buffer) == {"s0": (0, 0), "s2": (1, 2), "s1": (2, 1)}
        assert set(draw(buffer, 3, 1)[1].tolist()) == {0, 1, 2}

    def test_rows_are_as_old_as_their_labels(self):
        """The last row to arrive may be the oldest. Equal times are ordered by id."""
        buffer = ReplayBuffer(10, SCHEMA, 0)
        for name, at_s in (("c", 5.0), ("b", 7.0), ("a", 7.0), ("late", 1.0)):
            buffer.add(example(name, 0, at_s=at_s))

        assert list(rows(buffer)) == ["late", "c", "a", "b"]

    def test_a_newer_label_of_the_same_class_only_makes_the_row_newer(self):
        """It is not learned again as a new row."""
        buffer = old(buffer_of(0, 0))

        buffer.relabel("s0", 0, 1e9)

        assert list(rows(buffer)) == ["s1", "s0"]
        assert buffer.new_count == 0

    def test_a_label_that_is_read_late_is_learned_once_before_it_is_evicted(self):
        """Its time is the oldest, but a row that was drawn is evicted first."""
        buffer = old(buffer_of(0, 0, capacity=3))
        buffer.add(example("late", 0, at_s=-1.0))

        buffer.add(example("new", 0))

        assert list(rows(buffer)) == ["late", "s1", "new"]

    def test_rows_are_allocated_as_they_are_needed(self):
        """A large capacity takes no memory while the buffer is empty."""
        buffer = ReplayBuffer(10_000_000, SCHEMA, 0)
        for i in range(600):
            buffer.add(example(f"s{i}", i % 3, i))

        assert len(pickle.dumps(buffer)) < 100_000
        assert rows(buffer)["s599"] == (599 % 3, 599)

    def test_a_long_stream_of_labels_takes_no_more_memory(self):
        """The slots of evicted rows are reused (I6)."""
        sizes = [len(pickle.dumps(buffer_of(*[0] * count, capacity=5))) for count in (20, 2000)]

        assert sizes[1] < 1.2 * sizes[0]

    def test_examples_are_copied(self):
        """The caller may reuse its array."""
        given_example = example("s", 0, 5)
        buffer = ReplayBuffer(3, SCHEMA, 0)
        buffer.add(given_example)

        given_example.x[:] = 0

        assert rows(buffer) == {"s": (0, 5)}


class TestNewRows:
    def test_come_first_and_once(self):
        """New labels are learned in the next steps, oldest first, whatever the balance."""
        buffer = old(buffer_of(*[0, 1, 2] * 3))
        for i in (40, 41, 42):
            buffer.add(example(f"s{i}", 0, i))
        x_L, y_L = np.empty((2, 2), np.int16), np.empty(2, np.int64)

        drawn = [buffer.draw_into(x_L, y_L, step) for step in (1, 2, 3)]

        assert drawn == [["s40", "s41"], ["s42"], []]

    def test_leave_the_other_rows_balanced(self):
        """The rest of the draw is balanced."""
        buffer = old(buffer_of(*[0] * 20, *[1] * 3))
        buffer.add(example("s50", 0, 50))

        _, y_L, ids = draw(buffer, 7, 1)

        assert ids[0] == "s50"
        assert sorted(y_L[1:].tolist()) == [0, 0, 0, 1, 1, 1]

    def test_a_correction_is_new_again(self):
        """The corrected class must be learned too."""
        buffer = old(buffer_of(0, 1, 2))

        buffer.relabel("s1", 2)
        buffer.add(example("s0", 1, 0))

        assert draw(buffer, 2, 1)[2] == ["s1", "s0"]

    def test_an_evicted_row_is_not_drawn(self):
        """A row that was evicted before its first draw is never reported as learned."""
        buffer = buffer_of(*[0] * 5, capacity=2)
        x_L, y_L = np.empty((4, 2), np.int16), np.empty(4, np.int64)

        assert buffer.draw_into(x_L, y_L, 1) == ["s3", "s4"]

    def test_are_still_new_after_a_restart(self):
        """The order of draws is kept."""
        buffer, other = old(buffer_of(0, 1, 2)), ReplayBuffer(1000, SCHEMA, 7)
        buffer.add(example("s7", 0, 7))
        buffer.relabel("s1", 2)

        other.load(buffer.state())

        assert draw(other, 2, 1)[2] == draw(buffer, 2, 1)[2] == ["s7", "s1"]


class TestDrawing:
    def test_gives_each_class_an_equal_share(self):
        """Classes of 50, 5 and 2 rows have equal shares. A remainder is random."""
        buffer = old(buffer_of(*[0] * 50, *[1] * 5, *[2] * 2))

        extra = Counter()
        for step in range(300):
            counts = Counter(draw(buffer, 10, step)[1].tolist())
            assert sorted(counts.values()) == [3, 3, 4]
            extra[max(counts, key=counts.__getitem__)] += 1

        assert all(60 < extra[c] < 140 for c in range(3)), extra

    def test_repeats_no_row_while_its_class_has_others(self):
        """Within one draw, no row comes twice before each row of its class came once."""
        buffer = old(buffer_of(*[0] * 50, *[1] * 5, *[2] * 2))

        for step in range(100):
            times = Counter(draw(buffer, 18, step)[2])
            assert max(times[f"s{i}"] for i in range(50)) == 1
            assert sorted(times[f"s{i}"] for i in range(50, 55)) == [1, 1, 1, 1, 2]
            assert [times["s55"], times["s56"]] == [3, 3]

    def test_gives_every_row_of_a_class_the_same_chance(self):
        """Also if the number of rows is not a multiple of the share."""
        buffer = old(buffer_of(*[0] * 7))
        times = Counter(i for step in range(7000) for i in draw(buffer, 3, step)[2])

        assert all(2800 < times[f"s{i}"] < 3200 for i in range(7)), times

    def test_is_a_function_of_content_seed_and_step(self):
        """A replay draws the same rows. Another step or seed draws others."""
        buffer, other = old(buffer_of(*[0, 1, 2] * 30)), old(buffer_of(*[0, 1, 2] * 30, seed=8))

        first = draw(buffer, 20, 5)[2]

        assert draw(buffer, 20, 5)[2] == first
        assert draw(buffer, 20, 6)[2] != first
        assert draw(other, 20, 5)[2] != first

    def test_returns_payload_label_and_id_of_one_row_together(self):
        """All three are of the same row."""
        buffer = old(buffer_of(*[0, 1, 2] * 30))

        x_L, y_L, ids = draw(buffer, 40, 1)

        numbers = [int(sample_id[1:]) for sample_id in ids]
        assert x_L[:, 0].tolist() == numbers
        assert y_L.tolist() == [number % 3 for number in numbers]

    def test_fills_a_slice_of_the_callers_batch_and_no_other_row(self):
        """In place."""
        buffer = old(buffer_of(0, 1, 2, 0))
        x_L, y_L = np.full((6, 2), -1, np.int16), np.full(6, -1, np.int64)

        buffer.draw_into(x_L[:4], y_L[:4], 3)

        expected_x, expected_y, _ = draw(buffer, 4, 3)
        np.testing.assert_array_equal(x_L[:4], expected_x)
        np.testing.assert_array_equal(y_L[:4], expected_y)
        assert (x_L[4:] == -1).all()
        assert (y_L[4:] == -1).all()

    def test_from_an_empty_memory_gives_no_rows(self):
        """A stream starts without labels."""
        x_L, y_L, ids = draw(ReplayBuffer(5, SCHEMA, 0), 4, 1)

        assert (x_L.shape, y_L.shape, ids) == ((0, 2), (0,), [])

    def test_of_fewer_rows_than_classes_draws_every_class_over_time(self):
        """One row per step is enough."""
        buffer = old(buffer_of(0, 1, 2))

        assert {draw(buffer, 1, step)[2][0] for step in range(50)} == {"s0", "s1", "s2"}


class TestSaving:
    def test_a_loaded_memory_draws_and_evicts_as_the_saved_one(self):
        """With ids of any length and script, and slots freed by evictions and corrections."""
        buffer = buffer_of(*[0, 1, 1, 2, 1] * 5, capacity=12)
        buffer.add(example("ключ-é", 1, 3))
        buffer.add(example("", 0, 4))
        buffer.relabel("s23", 0)
        other = ReplayBuffer(12, SCHEMA, 7)

        other.load(buffer.state())

        for step in range(20):
            for one in (buffer, other):
                one.add(example(f"n{step}", step % 3, step))
            assert draw(other, 8, step)[2] == draw(buffer, 8, step)[2]
        assert rows(other) == rows(buffer)

    def test_the_state_is_a_copy_without_objects(self):
        """Another thread writes it while learning continues, without pickle."""
        buffer = buffer_of(0, 1)
        state = buffer.state()
        buffer.add(example("s0", 2, 99))

        assert state["x"][:, 0].tolist() == [0, 1]
        assert not any(array.dtype.hasobject for array in state.values())

    def test_an_empty_memory_can_be_saved_and_loaded(self):
        """A checkpoint before the first label works like any other."""
        buffer = buffer_of(0, 1)

        buffer.load(ReplayBuffer(5, SCHEMA, 0).state())

        assert len(buffer) == 0
        assert draw(buffer, 3, 1)[2] == []

    def test_less_capacity_keeps_a_balanced_choice_of_the_newest(self):
        """A smaller setting after a restart evicts rows by the same rule."""
        small = ReplayBuffer(4, SCHEMA, 7)

        small.load(buffer_of(*[0] * 6, *[1] * 2).state())

        assert list(rows(small)) == ["s4", "s5", "s6", "s7"]


@given(
    operations=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 2), st.booleans()), max_size=60),
    capacity=st.integers(1, 6),
)
@settings(max_examples=150, deadline=None)
def test_any_history_is_bounded_and_keeps_the_last_class_of_each_id(operations, capacity):
    """Adds, corrections and relabels in any order. The newest row is always held."""
    buffer, last = ReplayBuffer(capacity, SCHEMA, 0), {}
    for value, (name, class_index, relabel) in enumerate(operations):
        if relabel and f"s{name}" in buffer:
            buffer.relabel(f"s{name}", class_index)
            last[f"s{name}"] = (class_index, last[f"s{name}"][1])
        else:
            buffer.add(example(f"s{name}", class_index, value))
            last[f"s{name}"] = (class_index, value)
        assert f"s{name}" in buffer

    held = rows(buffer)
    assert len(held) == len(buffer) <= capacity
    assert held == {name: last[name] for name in held}
    drawn = draw(buffer, 3 * capacity, 1)[1].tolist()
    assert set(drawn) == {class_index for class_index, _ in held.values()}


@given(
    labels=st.dictionaries(st.integers(0, 9), st.tuples(st.integers(0, 2), st.integers(0, 3)), max_size=10),
    order=st.randoms(use_true_random=False),
)
@settings(max_examples=100, deadline=None)
def test_content_and_draws_do_not_depend_on_the_order_of_arrival(labels, order):
    """Two orders of arrival, each id with another class before: once all rows were drawn, draws are equal."""
    buffers = [ReplayBuffer(20, SCHEMA, 3) for _ in range(2)]
    for buffer in buffers:
        names = list(labels)
        order.shuffle(names)
        for name in names:
            class_index, at_s = labels[name]
            buffer.add(example(f"s{name}", order.randint(0, 2), name, at_s=9.0))
            buffer.relabel(f"s{name}", class_index, float(at_s))
        old(buffer)

    first, second = buffers
    assert list(rows(first).items()) == list(rows(second).items())
    assert all(draw(first, 7, step)[2] == draw(second, 7, step)[2] for step in range(1, 4))


def test_a_negative_class_is_refused():
    """It would be an index from the end."""
    with pytest.raises(AssertionError):
        buffer_of(-1)


def test_rows_of_fewer_columns_are_completed():
    """Added columns are missing in what was saved before."""
    columns = Column("a", "number"), Column("b", "category", 5)
    old, new = (
        ReplayBuffer(10, Schema((width,), np.dtype(np.float32), ("ant", "bee"), columns=columns[:n]), 1)
        for n, width in ((1, 2), (2, 3))
    )
    for n in range(3):
        old.add(Example(f"s{n}", np.array([n, 1.0], np.float32), n % 2, float(n)))

    new.load(old.state())
    new.add(Example("s3", np.array([3.0, 1.0, 5.0], np.float32), 0, 3.0))

    assert new.state()["x"].tolist() == [[0.0, 1.0, 0.0], [1.0, 1.0, 0.0], [2.0, 1.0, 0.0], [3.0, 1.0, 5.0]]
    assert new.new_count == 4
