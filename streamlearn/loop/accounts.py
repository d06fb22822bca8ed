"""What became of every record that was read (I7): counted as state, so that a restart goes on where it was.

    samples read = learned + thinned + duplicate_id + dead_lettered
    labels read  = taken by the ledger + dead_lettered

What the ledger took, and the labels that came inside samples, have a state there, and an identity of their own.
Records trimmed from the log before they were read are
counted beside these: they were never read. A thinned sample was shed (`log.shed_above_records`): neither
predicted nor learned, but known, so that its label is joined and learned when it comes.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(slots=True)
class Accounts:
    """Totals since the state folder was new."""

    samples_read: int = 0
    samples_learned: int = 0
    samples_thinned: int = 0
    samples_duplicate_id: int = 0
    samples_dead_lettered: int = 0
    labels_read: int = 0
    labels_taken: int = 0
    labels_dead_lettered: int = 0
    labels_inline: int = 0
    samples_trimmed: int = 0
    labels_trimmed: int = 0

    def check(self) -> None:
        """Assert the identities: a record that is in no class was lost, and that is a bug."""
        told = self.samples_learned + self.samples_thinned
        outcomes = told + self.samples_duplicate_id + self.samples_dead_lettered
        assert self.samples_read == outcomes, f"samples do not add up: {self}"
        assert self.labels_read == self.labels_taken + self.labels_dead_lettered, f"labels do not add up: {self}"

    def as_dict(self) -> dict[str, int]:
        """For the checkpoint, the heartbeat and `inspect`."""
        return asdict(self)
