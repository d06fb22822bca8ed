"""The collector's pace while a learner runs."""

from __future__ import annotations

import gc

import pytest

from streamlearn.app.garbage import EVERY_OBJECTS, rare_collections


class Ring:
    """Refers to itself."""

    freed = 0

    def __init__(self) -> None:
        self.me = self

    def __del__(self) -> None:
        Ring.freed += 1


def test_is_as_before_afterwards() -> None:
    """Also after an error."""
    before, during = gc.get_threshold(), []

    def fail() -> None:
        during.append(gc.get_threshold()[0])
        raise KeyError

    with pytest.raises(KeyError), rare_collections():
        fail()
    assert during == [EVERY_OBJECTS]
    assert gc.get_threshold() == before


def test_rings_are_freed_all_the_same() -> None:
    """There are never more than so many."""
    Ring.freed = 0
    with rare_collections():
        for _ in range(2 * EVERY_OBJECTS):
            Ring()
        assert Ring.freed > EVERY_OBJECTS / 2
