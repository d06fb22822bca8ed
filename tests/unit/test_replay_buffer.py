"""The labelled memory: bounded, balanced, corrected in place, and drawn from as a function of seed and step."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamlearn.ledger.replay_buffer import ReplayBuffer
from streamlearn.records import Example, Schema

SCHEMA = Schema((2,), np.dtype(np.int16), ("ant", "bee", "cat"))
_label_times = itertools.count()


def example(sample_id: str, class_index: int, value: int = 0, at_s: float | None = None) -> Example:
    """Its label is given now, after those of all examples before, unless a time is said."""
    labelled_at_s = float(next(_label_times)) if at_s is None else at_s
    return Example(sample_id, np.full(SCHEMA.shape, value, np.int16), class_index, labelled_at_s)


def memory_of(*classes: int, capacity: int = 1000, seed: int = 7) -> ReplayBuffer:
    """Rows s0, s1, … of these classes; the payload of row i is i."""
    memory = ReplayBuffer(capacity, SCHEMA, seed)
    for i, class_index in enumerate(classes):
        memory.add(example(f"s{i}", class_index, i))
    return memory


def old(memory: ReplayBuffer) -> ReplayBuffer:
    """The same memory once every row was drawn for the first time."""
    memory.draw_into(np.empty((len(memory), 2), np.int16), np.empty(len(memory), np.int64), 0)
    return memory


def draw(memory: ReplayBuffer, n: int, step: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Rows of a step, and whose they are: payload i is that of s<i>."""
    x_L, y_L = np.empty((n, 2), np.int16), np.empty(n, np.int64)
    memory.draw_into(x_L, y_L, step)
    rows_drawn = n if len(memory) else 0
    return x_L[:rows_drawn], y_L[:rows_drawn], [f"s{value}" for value in x_L[:rows_drawn, 0].tolist()]


def rows(memory: ReplayBuffer) -> dict[str, tuple[int, int]]:
    """Class and payload value of each id, oldest first."""
    state = memory.state()
    ends = state["id_offsets"].tolist()
    ids = [state["ids"].tobytes()[a:b].decode() for a, b in itertools.pairwise(ends)]
    return dict(zip(ids, zip(state["y"].tolist(), state["x"][:, 0].tolist(), strict=True), strict=True))


class TestHolding:
    def test_a_full_memory_drops_the_oldest_of_the_largest_class(self):
        """The class that has most gives way, so that a rare class keeps what it has."""
        memory = memory_of(1, 0, 0, 0, 2, capacity=5)

        memory.add(example("new", 2, 9))

        assert list(rows(memory)) == ["s0", "s2", "s3", "s4", "new"]

    def test_a_class_that_would_be_largest_drops_its_own_oldest(self):
        """A flood of one class pushes out that class alone."""
        memory = memory_of(0, 1, 2, capacity=3)

        for i in range(10):
            memory.add(example(f"flood{i}", 1))

        assert list(rows(memory)) == ["s0", "s2", "flood9"]

    def test_of_equal_classes_the_one_with_the_oldest_row_gives_way(self):
        """Room for a first row of a new class is made by age."""
        memory = memory_of(2, 0, capacity=2)

        memory.add(example("new", 1))

        assert list(rows(memory)) == ["s1", "new"]

    def test_the_same_sample_again_replaces_its_row(self):
        """A correction changes class and payload, and takes no second place."""
        memory = memory_of(0, 0, 1)

        memory.add(example("s0", 2, 42))

        assert rows(memory) == {"s1": (0, 1), "s2": (1, 2), "s0": (2, 42)}
        assert len(memory) == 3

    def test_remove_drops_the_row_of_a_sample(self):
        """It is neither drawn nor saved any more, and was the new one of its class."""
        memory = memory_of(0, 1, 1)

        assert memory.remove("s1")
        assert not memory.remove("s1")
        assert not memory.remove("unknown")

        assert rows(memory) == {"s0": (0, 0), "s2": (1, 2)}
        assert memory.new_count == 2
        assert set(draw(memory, 8, 1)[2]) == {"s0", "s2"}

    def test_relabel_corrects_a_row_that_is_held(self):
        """Without a payload from elsewhere the memory's own is kept."""
        memory = memory_of(0, 0, 1)

        assert memory.relabel("s1", 2)
        assert not memory.relabel("unknown", 2)

        assert rows(memory) == {"s0": (0, 0), "s2": (1, 2), "s1": (2, 1)}
        assert set(draw(memory, 3, 1)[1].tolist()) == {0, 1, 2}

    def test_rows_are_as_old_as_their_labels(self):
        """What came in last may be the oldest; of labels of one time the ids decide."""
        memory = ReplayBuffer(10, SCHEMA, 0)
        for name, at_s in (("c", 5.0), ("b", 7.0), ("a", 7.0), ("late", 1.0)):
            memory.add(example(name, 0, at_s=at_s))

        assert list(rows(memory)) == ["late", "c", "a", "b"]

    def test_a_newer_label_of_the_same_class_makes_a_row_newer_and_no_more(self):
        """It is not learned anew."""
        memory = old(memory_of(0, 0))

        memory.relabel("s0", 0, 1e9)

        assert list(rows(memory)) == ["s1", "s0"]
        assert memory.new_count == 0

    def test_a_label_that_is_read_late_is_learned_once_before_it_gives_way(self):
        """Its time is older than all others', yet a row that was drawn goes first."""
        memory = old(memory_of(0, 0, capacity=3))
        memory.add(example("late", 0, at_s=-1.0))

        memory.add(example("new", 0))

        assert list(rows(memory)) == ["late", "s1", "new"]

    def test_rows_are_allocated_as_they_are_needed(self):
        """A large capacity costs nothing while it is empty."""
        memory = ReplayBuffer(10_000_000, SCHEMA, 0)
        for i in range(600):
            memory.add(example(f"s{i}", i % 3, i))

        assert len(memory._x) == 1024
        assert rows(memory)["s599"] == (599 % 3, 599)

    def test_a_long_stream_of_labels_takes_no_more_room(self):
        """What evicted rows leave behind is given back (I6)."""
        memory = memory_of(*[0] * 1000, capacity=5)

        assert len(memory._rows_C[0]._slots) <= 10
        assert len(memory._ids) == len(memory._x) == 5

    def test_it_copies_what_it_is_given(self):
        """The caller may reuse its array."""
        given_example = example("s", 0, 5)
        memory = ReplayBuffer(3, SCHEMA, 0)
        memory.add(given_example)

        given_example.x[:] = 0

        assert rows(memory) == {"s": (0, 5)}


class TestNewRows:
    def test_come_first_and_once(self):
        """A label that has just arrived is learned in the next step, whatever the balance; oldest first."""
        memory = old(memory_of(*[0, 1, 2] * 3))
        for i in (40, 41, 42):
            memory.add(example(f"s{i}", 0, i))
        x_L, y_L = np.empty((2, 2), np.int16), np.empty(2, np.int64)

        told = [memory.draw_into(x_L, y_L, step) for step in (1, 2, 3)]

        assert told == [["s40", "s41"], ["s42"], []]

    def test_leave_the_other_rows_balanced(self):
        """The rest of the draw is replay as ever."""
        memory = old(memory_of(*[0] * 20, *[1] * 3))
        memory.add(example("s50", 0, 50))

        _, y_L, ids = draw(memory, 7, 1)

        assert ids[0] == "s50"
        assert sorted(y_L[1:].tolist()) == [0, 0, 0, 1, 1, 1]

    def test_a_correction_is_new_again(self):
        """The class that counts has to be learned, not only held."""
        memory = old(memory_of(0, 1, 2))

        memory.relabel("s1", 2)
        memory.add(example("s0", 1, 0))

        assert draw(memory, 2, 1)[2] == ["s1", "s0"]

    def test_an_evicted_row_is_forgotten(self):
        """A row that left before its turn is never told as learned."""
        memory = memory_of(*[0] * 5, capacity=2)
        x_L, y_L = np.empty((4, 2), np.int16), np.empty(4, np.int64)

        assert memory.draw_into(x_L, y_L, 1) == ["s3", "s4"]

    def test_are_still_new_after_a_restart(self):
        """In the order in which they would have been drawn."""
        memory, other = old(memory_of(0, 1, 2)), ReplayBuffer(1000, SCHEMA, 7)
        memory.add(example("s7", 0, 7))
        memory.relabel("s1", 2)

        other.load(memory.state())

        assert draw(other, 2, 1)[2] == draw(memory, 2, 1)[2] == ["s7", "s1"]


class TestDrawing:
    def test_gives_as_many_rows_of_each_class_as_can_be(self):
        """Classes of 50, 5 and 2 rows come alike; what does not divide goes by chance."""
        memory = old(memory_of(*[0] * 50, *[1] * 5, *[2] * 2))

        extra = Counter()
        for step in range(300):
            counts = Counter(draw(memory, 10, step)[1].tolist())
            assert sorted(counts.values()) == [3, 3, 4]
            extra[max(counts, key=counts.__getitem__)] += 1

        assert all(60 < extra[c] < 140 for c in range(3)), extra

    def test_repeats_no_row_while_its_class_has_others(self):
        """Within one draw each row of a class comes before any comes twice."""
        memory = old(memory_of(*[0] * 50, *[1] * 5, *[2] * 2))

        for step in range(100):
            times = Counter(draw(memory, 18, step)[2])
            assert max(times[f"s{i}"] for i in range(50)) == 1
            assert sorted(times[f"s{i}"] for i in range(50, 55)) == [1, 1, 1, 1, 2]
            assert [times["s55"], times["s56"]] == [3, 3]

    def test_gives_every_row_of_a_class_the_same_chance(self):
        """Old and new alike, also where the share does not divide the rows."""
        memory = old(memory_of(*[0] * 7))
        times = Counter(i for step in range(7000) for i in draw(memory, 3, step)[2])

        assert all(2800 < times[f"s{i}"] < 3200 for i in range(7)), times

    def test_is_a_function_of_content_seed_and_step(self):
        """Drawing changes nothing, so a replay draws the same; another step or seed draws otherwise."""
        memory, other = old(memory_of(*[0, 1, 2] * 30)), old(memory_of(*[0, 1, 2] * 30, seed=8))

        first = draw(memory, 20, 5)[2]

        assert draw(memory, 20, 5)[2] == first
        assert draw(memory, 20, 6)[2] != first
        assert draw(other, 20, 5)[2] != first

    def test_returns_payload_label_and_id_of_one_row_together(self):
        """Row by row, the three belong to each other."""
        memory = old(memory_of(*[0, 1, 2] * 30))

        x_L, y_L, ids = draw(memory, 40, 1)

        numbers = [int(sample_id[1:]) for sample_id in ids]
        assert x_L[:, 0].tolist() == numbers
        assert y_L.tolist() == [number % 3 for number in numbers]

    def test_into_the_callers_rows_gives_the_same_and_touches_no_other(self):
        """A slice of a batch is filled in place."""
        memory = old(memory_of(0, 1, 2, 0))
        x_L, y_L = np.full((6, 2), -1, np.int16), np.full(6, -1, np.int64)

        memory.draw_into(x_L[:4], y_L[:4], 3)

        wanted_x, wanted_y, _ = draw(memory, 4, 3)
        np.testing.assert_array_equal(x_L[:4], wanted_x)
        np.testing.assert_array_equal(y_L[:4], wanted_y)
        assert (x_L[4:] == -1).all()
        assert (y_L[4:] == -1).all()

    def test_from_an_empty_memory_gives_no_rows(self):
        """No label yet is the usual beginning, not an error."""
        x_L, y_L, ids = draw(ReplayBuffer(5, SCHEMA, 0), 4, 1)

        assert (x_L.shape, y_L.shape, ids) == ((0, 2), (0,), [])

    def test_of_fewer_rows_than_classes_gives_each_class_its_turn(self):
        """One row a step still shows every class."""
        memory = old(memory_of(0, 1, 2))

        assert {draw(memory, 1, step)[2][0] for step in range(50)} == {"s0", "s1", "s2"}


class TestSaving:
    def test_a_loaded_memory_draws_and_evicts_as_the_saved_one(self):
        """Ids of any length and script, holes from evictions and corrections: the future is the same."""
        memory = memory_of(*[0, 1, 1, 2, 1] * 5, capacity=12)
        memory.add(example("ключ-é", 1, 3))
        memory.add(example("", 0, 4))
        memory.relabel("s23", 0)
        other = ReplayBuffer(12, SCHEMA, 7)

        other.load(memory.state())

        for step in range(20):
            for one in (memory, other):
                one.add(example(f"n{step}", step % 3, step))
            assert draw(other, 8, step)[2] == draw(memory, 8, step)[2]
        assert rows(other) == rows(memory)

    def test_the_state_is_a_copy_without_objects(self):
        """It is written by another thread while learning goes on, and without pickle."""
        memory = memory_of(0, 1)
        state = memory.state()
        memory.add(example("s0", 2, 99))

        assert state["x"][:, 0].tolist() == [0, 1]
        assert not any(array.dtype.hasobject for array in state.values())

    def test_an_empty_memory_can_be_saved_and_loaded(self):
        """A checkpoint before the first label is a checkpoint like any other."""
        memory = memory_of(0, 1)

        memory.load(ReplayBuffer(5, SCHEMA, 0).state())

        assert len(memory) == 0
        assert draw(memory, 3, 1)[2] == []

    def test_less_capacity_keeps_a_balanced_choice_of_the_newest(self):
        """A smaller setting after a restart drops rows as they would have been dropped."""
        small = ReplayBuffer(4, SCHEMA, 7)

        small.load(memory_of(*[0] * 6, *[1] * 2).state())

        assert list(rows(small)) == ["s4", "s5", "s6", "s7"]


@given(
    operations=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 2), st.booleans()), max_size=60),
    capacity=st.integers(1, 6),
)
@settings(max_examples=150, deadline=None)
def test_any_history_keeps_to_capacity_and_holds_the_newest_word_on_each_id(operations, capacity):
    """Adds, corrections and relabels in any order: bounded, the newest row always held, each with its last class."""
    memory, last = ReplayBuffer(capacity, SCHEMA, 0), {}
    for value, (name, class_index, relabel) in enumerate(operations):
        if relabel and f"s{name}" in memory:
            memory.relabel(f"s{name}", class_index)
            last[f"s{name}"] = (class_index, last[f"s{name}"][1])
        else:
            memory.add(example(f"s{name}", class_index, value))
            last[f"s{name}"] = (class_index, value)
        assert f"s{name}" in memory

    held = rows(memory)
    assert len(held) == len(memory) <= capacity
    assert held == {name: last[name] for name in held}
    drawn = draw(memory, 3 * capacity, 1)[1].tolist()
    assert set(drawn) == {class_index for class_index, _ in held.values()}


@given(
    said=st.dictionaries(st.integers(0, 9), st.tuples(st.integers(0, 2), st.integers(0, 3)), max_size=10),
    order=st.randoms(use_true_random=False),
)
@settings(max_examples=100, deadline=None)
def test_what_is_held_and_drawn_does_not_depend_on_the_order_in_which_it_was_told(said, order):
    """Classes and times of each id, told in two orders, other words before: once all were drawn, draws are equal."""
    memories = [ReplayBuffer(20, SCHEMA, 3) for _ in range(2)]
    for memory in memories:
        names = list(said)
        order.shuffle(names)
        for name in names:
            class_index, at_s = said[name]
            memory.add(example(f"s{name}", order.randint(0, 2), name, at_s=9.0))
            memory.relabel(f"s{name}", class_index, float(at_s))
        old(memory)

    first, second = memories
    assert list(rows(first).items()) == list(rows(second).items())
    assert all(draw(first, 7, step)[2] == draw(second, 7, step)[2] for step in range(1, 4))


def test_a_class_that_is_none_is_refused():
    """A wrong index would otherwise count from the end."""
    with pytest.raises(AssertionError):
        memory_of(-1)
