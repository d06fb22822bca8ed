"""The ring buffer: bounded, oldest first, and the same after a restart."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamlearn.judge.window import Window, group_of, joined

COLUMNS = {"class": np.int32, "cost": np.float64}


def filled(size: int, rows: int) -> Window:
    window = Window(size, COLUMNS)
    for n in range(rows):
        window.append(n, n / 2)
    return window


class TestRows:
    def test_the_newest_rows_are_held_oldest_first(self) -> None:
        """A full window drops its oldest row."""
        window = filled(3, rows=5)

        assert len(window) == 3
        assert window.column("class").tolist() == [2, 3, 4]
        assert window.column("cost").tolist() == [1.0, 1.5, 2.0]

    @given(st.integers(1, 5), st.lists(st.integers(0, 12), max_size=6))
    def test_extend_equals_repeated_append(self, size: int, batches: list[int]) -> None:
        """Also for batches that are empty or longer than the window."""
        at_once, one_by_one = Window(size, COLUMNS), Window(size, COLUMNS)
        for count in batches:
            values = np.arange(count) + len(at_once)
            at_once.extend(values, 0.5)
            for value in values.tolist():
                one_by_one.append(value, 0.5)

        assert at_once.column("class").tolist() == one_by_one.column("class").tolist()

    def test_clear_removes_all_rows(self) -> None:
        """Of every column."""
        window = filled(3, rows=5)

        window.clear()

        assert len(window) == len(window.column("class")) == 0


class TestSaving:
    @pytest.mark.parametrize("rows", [0, 2, 3, 7])
    @pytest.mark.parametrize(("size", "held"), [(2, 2), (3, 3), (5, 3)])
    def test_a_loaded_window_has_the_newest_rows(self, rows: int, size: int, held: int) -> None:
        """Whether it is shorter or longer than the saved one."""
        saved, loaded = filled(3, rows), Window(size, COLUMNS)

        loaded.load(saved.state())
        assert loaded.column("class").tolist() == list(range(rows))[-held:]

        loaded.append(9, 0.0)
        assert loaded.column("class")[-1] == 9
        assert len(loaded) == min(min(held, rows) + 1, size)

    def test_the_state_is_a_copy(self) -> None:
        """Another thread writes it while rows arrive."""
        window = filled(2, rows=2)
        state = window.state()

        window.append(9, 0.0)

        assert state["class"].tolist() == [0, 1]

    def test_joined_states_are_separated_again(self) -> None:
        """Names within a part may contain dots."""
        one, other = {"a": np.zeros(1), "b.c": np.ones(2)}, {"a": np.ones(3)}

        state = joined({"one": one, "other": other})

        assert sorted(state) == ["one.a", "one.b.c", "other.a"]
        assert list(group_of(state, "one")) == ["a", "b.c"]
        assert group_of(state, "other")["a"] is other["a"]
