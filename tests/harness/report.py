"""What a soak did, and what came of it: its last line."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from harness.verify import Verdict


@dataclass
class Report:
    """What was done, and what came of it."""

    seed: int
    kills: int = 0
    """Processes ended by SIGKILL, of all kinds."""
    startup_kills: int = 0
    """Of these, processes that were started as a user starts them, and killed while they started."""
    refusals: list[str] = field(default_factory=list)
    """Of processes that did not come up though nothing was wrong, or of servers that could not read the store."""
    by: Counter[str] = field(default_factory=Counter)
    """Faults by victim and kind."""
    points: Counter[str] = field(default_factory=Counter)
    """Kills at named places."""
    recovery_s: list[float] = field(default_factory=list)
    """From the death of a learner to the next step of the one that is forked then."""
    cold_recovery_s: list[float] = field(default_factory=list)
    """The same where Python and torch were loaded first."""
    lost: int = 0
    """Records that retention took before they were learned: counted by the learner, and by us."""
    verdict: Verdict = field(default_factory=Verdict)
    different: list[str] = field(default_factory=list)
    formed_otherwise: int = 0
    """Steps whose teacher was published, and that a restart cut in another way, though no disk had failed."""
    steps: int = 0
    duration_s: float = 0.0

    @property
    def good(self) -> bool:
        """The promise was kept."""
        return self.verdict.good and not (self.different or self.formed_otherwise or self.refusals)

    def as_dict(self) -> dict[str, Any]:
        """For the last line."""
        verdict = self.verdict
        return {
            "kills": self.kills,
            "startup_kills": self.startup_kills,
            "labels_lost": verdict.labels_lost,
            "learned_twice": verdict.learned_twice,
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
            "samples_lost": verdict.samples_lost,
            "dead_letters_lost": verdict.dead_letters_lost,
            "dead_letters_twice": verdict.dead_letters_twice,
            "acknowledged": verdict.acknowledged,
            "steps": self.steps,
            "by": dict(sorted(self.by.items())),
            "points": dict(sorted(self.points.items())),
            "told": self.refusals + verdict.told + self.different,
            "duration_s": round(self.duration_s, 1),
        }


def _quantile(values: list[float], share: float) -> float | None:
    return round(float(np.quantile(values, share)), 3) if values else None
