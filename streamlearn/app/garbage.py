"""Python's cycle collector in a process that runs for months.

A full pass visits every object that was ever imported: with torch, some 300,000, which stops the process for 0.1 to
0.2 s. Such passes came every two to four seconds under load. So what is alive after the start is left out of them by
`gc.freeze`; it is still freed once nothing refers to it.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

THRESHOLD = 50_000
"""Allocations between two passes over young objects. The default of 700 is reached every hundred labels, so a large
step would start many passes. With 50,000 a join takes .91 of the processor time."""


@contextlib.contextmanager
def short_pauses() -> Iterator[None]:
    """Raise the threshold meanwhile; at the end passes are again as they were. Call `gc.freeze` once all is loaded.

    Steps create no reference cycles: none in 200 steps without passes.
    """
    before = gc.get_threshold()
    gc.set_threshold(THRESHOLD, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()
