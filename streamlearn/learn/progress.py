"""How far learning has come, in updates and in labels: what the consistency weight and the average depend on."""

from __future__ import annotations

from dataclasses import dataclass

from streamlearn.learn import schedules
from streamlearn.learn.methods.settings import ConsistencyOptions, MethodOptions


@dataclass(slots=True)
class Updates:
    """What a student counts by itself, saved with a checkpoint.

    Schedules count updates, not steps: where labels come late, a method that learns from labels only takes many empty
    steps first, and its average must start at the first update.
    """

    updates: int = 0
    """Steps that changed the weights."""
    averaged_at: int = 0
    """The update at which the average started."""


@dataclass(slots=True)
class Progress(Updates):
    """Counts of the learner, all saved with a checkpoint."""

    step: int = 0
    """The last step taken, skipped and empty ones included."""
    ramped_at: int = 0
    """The update at which the ramp of the consistency weight started."""
    labels: int = 0
    """Labels learned for the first time."""
    ramped_at_label: int = 0
    """`labels` when the ramp started."""

    def count_labels(self, count: int, options: MethodOptions) -> None:
        """Count new labels. The first one restarts average and ramp: students without a label are no teacher."""
        if self.labels == 0 and count:
            self.averaged_at = self.updates
            if isinstance(options, ConsistencyOptions) and options.rampup_labels:
                self.ramped_at = self.updates
        self.labels += count

    def consistency_weight(self, update: int, options: MethodOptions) -> float:
        """W of one update: the lower of the ramps by steps and by labels, then fading with labels."""
        if not isinstance(options, ConsistencyOptions):
            return 0.0
        if self.labels == 0 and options.rampup_labels:
            return 0.0  # before the first label the teacher knows nothing
        labels, peak = self.labels - self.ramped_at_label, options.consistency_weight
        by_steps = schedules.consistency_weight(update - self.ramped_at, peak=peak, rampup_steps=options.rampup_steps)
        by_labels = schedules.consistency_weight(labels, peak=peak, rampup_steps=options.rampup_labels)
        return min(by_steps, by_labels) * schedules.label_fading(labels, fade_labels=options.fade_labels)
