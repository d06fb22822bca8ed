"""How often Python looks for objects that refer to each other in a ring, which reference counts alone never free."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

EVERY_OBJECTS = 50_000
"""So many more made than freed, and the collector looks. Python's own 700 are a hundred labels: it would go through
those of one step ten times over (a join takes .91 of the processor time without). Ten steps at most."""


@contextlib.contextmanager
def rare_collections() -> Iterator[None]:
    """Look seldom while a learner runs: a step leaves no rings behind, only what is rare does (an error, a request)."""
    before = gc.get_threshold()
    gc.set_threshold(EVERY_OBJECTS, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)
