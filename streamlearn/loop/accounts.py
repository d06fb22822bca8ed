"""The outcome of every record that was read (I7). Saved in checkpoints, so a restart continues the counts.

    samples read = learned + shed + duplicate_id + dead_lettered
    labels read  = taken by the ledger + dead_lettered

The ledger has states and an identity of its own for the labels it took and for those inside samples. Records that
retention trimmed from the log before they were read are counted separately.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from streamlearn.loop.report import StepReport


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

    def add(self, report: StepReport, sample_topic: str) -> None:
        """Count the records of one step."""
        bad_samples = sum(bad.position.topic == sample_topic for bad in report.bad)
        bad_labels = len(report.bad) - bad_samples
        self.samples_read += report.samples
        self.samples_learned += report.fresh
        self.samples_thinned += report.shed
        self.samples_duplicate_id += report.duplicates
        self.samples_dead_lettered += bad_samples
        self.labels_read += report.labels
        self.labels_dead_lettered += bad_labels
        self.labels_taken += report.labels - bad_labels
        self.labels_inline += report.inline_labels
        for gap in report.gaps:
            if gap.position.topic == sample_topic:
                self.samples_trimmed += gap.missing
            else:
                self.labels_trimmed += gap.missing

    def check(self) -> None:
        """Assert the identities. A record without an outcome was lost, which is a bug."""
        outcomes = self.samples_learned + self.samples_thinned + self.samples_duplicate_id + self.samples_dead_lettered
        assert self.samples_read == outcomes, f"samples do not add up: {self}"
        assert self.labels_read == self.labels_taken + self.labels_dead_lettered, f"labels do not add up: {self}"

    def as_dict(self) -> dict[str, int]:
        """For the checkpoint, the heartbeat and `inspect`."""
        return asdict(self)
