"""The outcome of every record that was read (I7). Saved in checkpoints, so a restart continues the counts.

    samples read = learned + shed + duplicate_id + dead_lettered + tombstones
    labels read  = taken by the ledger + dead_lettered + tombstones

The ledger has states and an identity of its own for the labels it took and for those inside samples. Records that
retention trimmed from the log before they were read are counted separately.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass

from streamlearn.loop.report import StepReport
from streamlearn.records import Gap


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
    samples_tombstones: int = 0
    """Skipped, because they have nothing to learn: null values, and rows that were deleted. Likewise of labels."""
    labels_tombstones: int = 0

    def add(self, report: StepReport, sample_topics: Collection[str]) -> None:
        """Count the records of one step."""
        bad_samples = sum(bad.position.topic in sample_topics for bad in report.bad)
        bad_labels = len(report.bad) - bad_samples
        skipped_samples = sum(skipped.position.topic in sample_topics for skipped in report.skipped)
        skipped_labels = len(report.skipped) - skipped_samples
        self.samples_read += report.samples
        self.samples_learned += report.fresh
        self.samples_thinned += report.shed
        self.samples_duplicate_id += report.duplicates
        self.samples_dead_lettered += bad_samples
        self.labels_read += report.labels
        self.labels_dead_lettered += bad_labels
        self.labels_taken += report.labels - bad_labels - skipped_labels
        self.samples_tombstones += skipped_samples
        self.labels_tombstones += skipped_labels
        self.labels_inline += report.inline_labels
        for gap in report.gaps:
            self._add_gap(gap, sample_topics)

    def check(self) -> None:
        """Assert the identities. A record without an outcome was lost, which is a bug."""
        learned_or_known = self.samples_learned + self.samples_thinned + self.samples_duplicate_id
        samples = learned_or_known + self.samples_dead_lettered + self.samples_tombstones
        labels = self.labels_taken + self.labels_dead_lettered + self.labels_tombstones
        assert self.samples_read == samples, f"samples do not add up: {self}"
        assert self.labels_read == labels, f"labels do not add up: {self}"

    def as_dict(self) -> dict[str, int]:
        """For the checkpoint, the heartbeat and `inspect`."""
        return asdict(self)

    def _add_gap(self, gap: Gap, sample_topics: Collection[str]) -> None:
        if gap.position.topic in sample_topics:
            self.samples_trimmed += gap.missing
        else:
            self.labels_trimmed += gap.missing
