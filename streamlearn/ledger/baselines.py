"""What the baselines know: the class of each label received so far, corrections included.

They are told of a label as soon as it is read, whether its sample has come or not. The counts are a function of the
set of labels; the newest class is that of the record that was read last.
"""

from __future__ import annotations

import numpy as np

from streamlearn.ledger.rows import Counters
from streamlearn.ledger.store import Table
from streamlearn.records import UNLABELLED


class Baselines:
    """Labels by class, in the ledger's table `counts`; majority and newest class are in its `Counters`."""

    def __init__(self, table: Table, capacity: int) -> None:
        self.counters = Counters()
        self.class_counts = [0] * capacity  # a list: one element of an array costs several times as much
        self._table = table
        self._changed = False

    def load(self, counters: Counters) -> None:
        """Take what is kept in memory from the table. There may be room for more classes by now."""
        self.counters = counters
        saved = np.frombuffer(self._table.get(b"classes") or b"", np.int64).tolist()
        self.class_counts = saved + [0] * (len(self.class_counts) - len(saved))
        self._changed = False

    def save(self) -> None:
        """Write down what has changed in the open step."""
        if self._changed:
            self._table.put(b"classes", np.array(self.class_counts, np.int64).tobytes())
            self._changed = False

    def received(self, now: int, *, was: int = UNLABELLED) -> None:
        """A sample has the class `now`, and had `was` before; each may be none (UNLABELLED or RETRACTED).

        Of equally large classes the first is the majority.
        """
        c, counts = self.counters, self.class_counts
        self._changed = True
        if now >= 0:
            counts[now] += 1
            c.last_class = now
        if was >= 0:
            counts[was] -= 1
        if was >= 0 or now < 0 or c.majority_class == UNLABELLED:
            c.majority_class = counts.index(max(counts)) if any(counts) else UNLABELLED
            return
        most = c.majority_class
        if (counts[now], -now) > (counts[most], -most):  # the same, where only one class has grown
            c.majority_class = now
