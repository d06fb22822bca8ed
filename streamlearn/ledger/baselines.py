"""The majority and the no-change baseline: what they predict from the labels read so far, corrections included.

They know a label as soon as it is read, even before its sample. The counts are a function of the set of labels. The
no-change class is the class of the record that was read last.
"""

from __future__ import annotations

import numpy as np

from streamlearn.ledger.rows import Counters
from streamlearn.ledger.store import Table
from streamlearn.records import UNLABELLED


class Baselines:
    """Labels by class, in the ledger's table `counts`. Majority and no-change class are in its `Counters`."""

    def __init__(self, table: Table[str, bytes], counters: Counters, capacity: int) -> None:
        self._table, self._c = table, counters
        self._class_counts = [0] * capacity  # a list: reading one element of an array takes several times as long

    def load(self) -> None:
        """Read the counts from the table. The schema may have more classes than when they were saved."""
        saved = np.frombuffer(self._table.get("classes") or b"", np.int64).tolist()
        self._class_counts = saved + [0] * (len(self._class_counts) - len(saved))

    def save(self) -> None:
        """Write the counts in the open step."""
        self._table.put("classes", np.array(self._class_counts, np.int64).tobytes())

    def received(self, now: int, *, was: int = UNLABELLED) -> None:
        """The class of a sample changes from `was` to `now`. A negative class is none.

        The majority is the first of the most frequent classes.
        """
        c, counts = self._c, self._class_counts
        if now >= 0:
            counts[now] += 1
            c.last_class = now
        if was >= 0:
            counts[was] -= 1
        if was >= 0 or now < 0 or c.majority_class == UNLABELLED:
            c.majority_class = counts.index(max(counts)) if any(counts) else UNLABELLED
            return
        most = c.majority_class
        if (counts[now], -now) > (counts[most], -most):  # a shortcut: only one class has grown
            c.majority_class = now
