"""The outcome of every record that was read (I7). Saved in checkpoints, so a restart continues the counts.

    samples read = learned + shed + duplicate_id + dead_lettered
    labels read  = taken by the ledger + dead_lettered

The ledger has states and an identity of its own for the labels it took and for those inside samples. Records that
retention trimmed from the log before they were read are counted separately.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass

from streamlearn.records import BadRecord, Gap, Item, Label


@dataclass(slots=True)
class Accounts:
    """Totals since the state folder was created. The names are those of the checkpoint format."""

    samples_read: int = 0
    samples_learned: int = 0
    samples_thinned: int = 0
    """Shed under overload: neither predicted nor learned, but known, so that their labels are joined and learned."""
    samples_duplicate_id: int = 0
    samples_dead_lettered: int = 0
    labels_read: int = 0
    labels_taken: int = 0
    labels_dead_lettered: int = 0
    labels_inline: int = 0
    samples_trimmed: int = 0
    labels_trimmed: int = 0

    def add(self, step: Accounts) -> None:
        """Add the records of one step."""
        for name, count in step.as_dict().items():
            setattr(self, name, getattr(self, name) + count)

    def check(self) -> None:
        """Assert the identities. A record without an outcome was lost, which is a bug."""
        outcomes = self.samples_learned + self.samples_thinned + self.samples_duplicate_id + self.samples_dead_lettered
        assert self.samples_read == outcomes, f"samples do not add up: {self}"
        assert self.labels_read == self.labels_taken + self.labels_dead_lettered, f"labels do not add up: {self}"

    def as_dict(self) -> dict[str, int]:
        """For the checkpoint, the heartbeat and `inspect`."""
        return asdict(self)


def accounts_of(
    items: Iterable[Item], sample_topic: str, *, learned: int, thinned: int, duplicate_ids: int
) -> Accounts:
    """The records of one step. The caller decides what becomes of good samples."""
    counts: Counter[str] = Counter()
    for item in items:
        topic = "samples" if item.position.topic == sample_topic else "labels"
        if isinstance(item, Gap):
            counts[f"{topic}_trimmed"] += item.missing
            continue
        counts[f"{topic}_read"] += 1
        if isinstance(item, BadRecord):
            counts[f"{topic}_dead_lettered"] += 1
        elif isinstance(item, Label):
            counts["labels_taken"] += 1
        elif item.label is not None:
            counts["labels_inline"] += 1
    return Accounts(samples_learned=learned, samples_thinned=thinned, samples_duplicate_id=duplicate_ids, **counts)
