"""The GC threshold while a learner runs."""

from __future__ import annotations

import gc

import pytest

from streamlearn.app.learner import GC_THRESHOLD, gc_threshold


class Cycle:
    """Refers to itself."""

    freed = 0

    def __init__(self) -> None:
        self.me = self

    def __del__(self) -> None:
        Cycle.freed += 1


def test_the_threshold_is_restored() -> None:
    """Even after an error."""
    before, during = gc.get_threshold(), []

    def fail() -> None:
        during.append(gc.get_threshold()[0])
        raise KeyError

    with pytest.raises(KeyError), gc_threshold():
        fail()
    assert during == [GC_THRESHOLD]
    assert gc.get_threshold() == before


def test_cycles_are_freed() -> None:
    """There are never more than the threshold."""
    Cycle.freed = 0
    with gc_threshold():
        for _ in range(2 * GC_THRESHOLD):
            Cycle()
        assert Cycle.freed > GC_THRESHOLD / 2
