"""When publishing, flushing and saving are due."""

from __future__ import annotations

from streamlearn.loop.interval import Interval


def test_is_due_after_a_new_step_and_enough_time() -> None:
    """Either alone is not enough."""
    interval = Interval(10.0, last_s=100.0, last_step=5)

    assert not interval.due(5, 200.0)
    assert not interval.due(6, 109.9)
    assert interval.due(6, 110.0)


def test_may_be_due_after_a_share_of_the_time() -> None:
    """But there must be a new step."""
    interval = Interval(10.0, last_s=100.0, last_step=5)

    assert interval.due(6, 102.5, share=0.25)
    assert not interval.due(6, 102.4, share=0.25)
    assert interval.due(6, 100.0, share=0.0)
    assert not interval.due(5, 200.0, share=0.0)


def test_starts_over_when_the_action_is_done() -> None:
    """With the step and the time of the action."""
    interval = Interval(10.0, last_s=0.0, last_step=0)

    interval.done(6, 110.0)

    assert not interval.due(6, 200.0)
    assert not interval.due(7, 119.9)
    assert interval.due(7, 120.0)
