"""The outcome of every record that was read (I7). Saved in checkpoints, so a restart continues the counts.

    samples read     = learned + shed + duplicate_id + dead_lettered + tombstone
    labels read      = taken by the ledger + dead_lettered + tombstone
    predictions read = taken by the ledger + late + unknown + skipped

The ledger has states and an identity of its own for the labels it took and for those inside samples. Records that
retention trimmed from the log before they were read are counted separately.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, fields

from streamlearn.records import BadRecord, Gap, Item, Label, Sample, Skipped


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
    samples_tombstone: int = 0
    """Skipped, because they have nothing to learn: null values, and rows that were deleted. Likewise of labels."""
    labels_tombstone: int = 0
    predictions_read: int = 0
    """Of the predictions topic."""
    predictions_taken: int = 0
    """Scored in place of the learner's own prediction, once their label comes."""
    predictions_late: int = 0
    """The sample was scored or erased before, or had an answer."""
    predictions_unknown: int = 0
    """The sample is not known, or expired."""
    predictions_skipped: int = 0
    """Unreadable."""
    predictions_trimmed: int = 0

    def add(self, step: Accounts) -> None:
        """Add the records of one step."""
        for name in _NAMES:
            setattr(self, name, getattr(self, name) + getattr(step, name))

    def check(self) -> None:
        """Assert the identities. A record without an outcome was lost, which is a bug."""
        learned_or_known = self.samples_learned + self.samples_thinned + self.samples_duplicate_id
        samples = learned_or_known + self.samples_dead_lettered + self.samples_tombstone
        labels = self.labels_taken + self.labels_dead_lettered + self.labels_tombstone
        assert self.samples_read == samples, f"samples do not add up: {self}"
        assert self.labels_read == labels, f"labels do not add up: {self}"
        answers = self.predictions_taken + self.predictions_late + self.predictions_unknown
        predictions = answers + self.predictions_skipped
        assert self.predictions_read == predictions, f"predictions do not add up: {self}"

    def as_dict(self) -> dict[str, int]:
        """For the checkpoint, the heartbeat and `inspect`."""
        return {name: getattr(self, name) for name in _NAMES}


_NAMES = tuple(field.name for field in fields(Accounts))


def accounts_of(
    items: Iterable[Item], sample_topics: Collection[str], *, learned: int, thinned: int, duplicate_ids: int
) -> Accounts:
    """The records of one step. The caller decides what becomes of good samples."""
    counts: Counter[str] = Counter()
    for item in items:
        topic = "samples" if item.position.topic in sample_topics else "labels"
        if isinstance(item, Gap):
            counts[f"{topic}_trimmed"] += item.missing
            continue
        counts[f"{topic}_read"] += 1
        if isinstance(item, BadRecord):
            counts[f"{topic}_dead_lettered"] += 1
        elif isinstance(item, Skipped):
            counts[f"{topic}_tombstone"] += 1
        elif isinstance(item, Label):
            counts["labels_taken"] += 1
        elif isinstance(item, Sample) and item.label is not None:
            counts["labels_inline"] += 1
    return Accounts(samples_learned=learned, samples_thinned=thinned, samples_duplicate_id=duplicate_ids, **counts)


def accounts_of_predictions(items: Iterable[Item], outcomes: Mapping[str, int]) -> Accounts:
    """The records of one step that are of the predictions topic. `outcomes`: what became of the answers."""
    counts = Counter({f"predictions_{outcome}": count for outcome, count in outcomes.items()})
    for item in items:
        if isinstance(item, Gap):
            counts["predictions_trimmed"] += item.missing
        else:
            counts["predictions_read"] += 1
            counts["predictions_skipped"] += isinstance(item, Skipped)
    return Accounts(**counts)
