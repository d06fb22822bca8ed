"""How often Python looks for objects that refer to each other in a ring, which reference counts alone never free."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

EVERY_OBJECTS = 50_000
"""So many more made than freed, and the collector looks. Python's own 700 are a hundred labels: it would go through
those of one large step many times over (with 50,000 a join takes .91 of the processor time that it takes with 700)."""


@contextlib.contextmanager
def rare_collections() -> Iterator[None]:
    """Look seldom while a learner runs. Its steps leave no rings behind: none in 200 steps with the collector off."""
    before = gc.get_threshold()
    gc.set_threshold(EVERY_OBJECTS, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)
