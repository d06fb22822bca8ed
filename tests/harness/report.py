"""The report of a soak, printed as its last line."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from harness.verify import Audit


@dataclass
class SoakReport:
    """The faults that a soak injected, and the problems that it found."""

    seed: int
    kills: int = 0
    """Processes ended by SIGKILL."""
    startup_kills: int = 0
    """Kills of processes that were started with the real command line, during their start."""
    refusals: list[str] = field(default_factory=list)
    """Processes that failed to start on healthy state, and servers that could not read a healthy store."""
    by: Counter[str] = field(default_factory=Counter)
    """Faults by victim and kind."""
    points: Counter[str] = field(default_factory=Counter)
    """Kills by kill point."""
    recovery_s: list[float] = field(default_factory=list)
    """From the death of a learner to the next step of its forked successor."""
    cold_recovery_s: list[float] = field(default_factory=list)
    """The same for a successor that imports Python and torch first."""
    lost: int = 0
    """Records that retention trimmed before they were learned, and that the learner counted as trimmed."""
    audit: Audit = field(default_factory=Audit)
    different: list[str] = field(default_factory=list)
    formed_otherwise: int = 0
    """Steps with a published teacher that a restart formed from other records, although no disk had failed."""
    steps: int = 0
    duration_s: float = 0.0

    @property
    def good(self) -> bool:
        """Nothing was lost, nothing was learned twice, no bit differs, every process started."""
        return self.audit.good and not (self.different or self.formed_otherwise or self.refusals)

    def as_dict(self) -> dict[str, Any]:
        """The JSON of the last line."""
        audit = self.audit
        return {
            "kills": self.kills,
            "startup_kills": self.startup_kills,
            "labels_lost": audit.labels_lost,
            "learned_twice": audit.learned_twice,
            "refused_starts": len(self.refusals),
            "weights_equal": not (self.different or self.refusals),
            "formed_otherwise": self.formed_otherwise,
            "seed": self.seed,
            "recovery_p50_s": _quantile(self.recovery_s, 0.5),
            "recovery_p99_s": _quantile(self.recovery_s, 0.99),
            "recovery_max_s": _quantile(self.recovery_s, 1.0),
            "cold_recovery_p50_s": _quantile(self.cold_recovery_s, 0.5),
            "cold_recovery_max_s": _quantile(self.cold_recovery_s, 1.0),
            "trimmed_unlearned": self.lost,
            "samples_lost": audit.samples_lost,
            "dead_letters_lost": audit.dead_letters_lost,
            "dead_letters_twice": audit.dead_letters_twice,
            "acknowledged": audit.acknowledged,
            "steps": self.steps,
            "by": dict(sorted(self.by.items())),
            "points": dict(sorted(self.points.items())),
            "problems": self.refusals + audit.problems + self.different,
            "duration_s": round(self.duration_s, 1),
        }


def _quantile(values: list[float], share: float) -> float | None:
    return round(float(np.quantile(values, share)), 3) if values else None
