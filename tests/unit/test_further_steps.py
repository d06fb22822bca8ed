"""Steps without records: how many are allowed, and when."""

from __future__ import annotations

import pytest

from streamlearn.loop.further_steps import IDLE_S, MOST_BATCHES, FurtherSteps


def steps(steps: int = 9, *, cpu_share: float = 1.0) -> FurtherSteps:
    return FurtherSteps(steps, fresh=8, cpu_share=cpu_share)


def after(further: FurtherSteps, samples: int, labels: int = 0, *, began_s: float = 0.0, now_s: float = 0.0) -> float:
    """Allowed steps after a step with these records."""
    further.step_done(samples, labels, began_s=began_s, now_s=now_s)
    return further.allowed


class TestHowMany:
    @pytest.mark.parametrize(
        ("samples", "labels", "expected"),
        [(8, 0, 8.0), (4, 0, 4.0), (1, 0, 1.0), (16, 0, 16.0), (0, 4, 8.0), (0, 1, 2.0), (0, 100, 8.0), (4, 1, 4.0)],
    )
    def test_new_records_allow_them(self, samples: int, labels: int, expected: float) -> None:
        """A micro-batch of eight samples allows eight beside its own, as do four labels."""
        assert after(steps(), samples, labels) == expected

    def test_each_one_taken_is_one_less(self) -> None:
        """Down to none."""
        further = steps(3)
        after(further, 8)

        assert [after(further, 0) for _ in range(3)] == [1.0, 0.0, 0.0]

    def test_parts_add_up(self) -> None:
        """Of four small micro-batches."""
        further = steps(2)

        assert [after(further, 2) for _ in range(4)] == [0.25, 0.5, 0.75, 1.0]
        assert further.any

    def test_what_is_kept_for_later_has_a_bound(self) -> None:
        """A backlog allows no hours of further steps."""
        further = steps(9)
        for _ in range(100):
            after(further, 8)

        assert further.allowed == MOST_BATCHES * 8

    def test_those_of_other_settings_are_bounded_too(self) -> None:
        """As restored from a checkpoint."""
        further = steps(1)

        further.allow(900.0)

        assert not further.any


class TestWhen:
    def test_at_once_with_all_of_the_time(self) -> None:
        """cpu_share = 1."""
        further = steps(cpu_share=1.0)
        after(further, 8, began_s=0.0, now_s=1.0)

        assert further.wait_s(1.0) == 0.0

    def test_a_share_of_the_time(self) -> None:
        """A step of 1 s at a quarter of the time is followed by 3 s without one."""
        further = steps(cpu_share=0.25)
        after(further, 8, began_s=0.0, now_s=1.0)

        assert further.wait_s(1.0) == 3.0
        assert further.wait_s(3.5) == 0.5
        assert further.wait_s(4.0) == 0.0

    def test_not_long_after_the_last_record(self) -> None:
        """A sleeping stream costs nothing, however slow its steps are."""
        further = steps()
        after(further, 8, now_s=1.0)
        after(further, 0, now_s=IDLE_S)

        assert further.any
        assert further.wait_s(1.0 + IDLE_S) == 0.0
        assert further.wait_s(1.1 + IDLE_S) is None

    def test_not_before_a_record(self) -> None:
        """None is allowed."""
        assert steps().wait_s(0.0) is None

    def test_those_left_at_a_stop_are_taken_after_the_start(self) -> None:
        """The records may be long ago by then."""
        further = steps()
        further.allow(3.0)
        further.start(1000.0)

        assert further.wait_s(1000.0) == 0.0
