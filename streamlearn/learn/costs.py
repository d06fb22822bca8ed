"""Costs of the steps since the last reading, summed on the device, so that no step waits for the host."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from streamlearn.learn.step import StepCosts


@dataclass(frozen=True, slots=True)
class Costs:
    """Means over the steps since the last reading; skipped steps are in no mean."""

    classification: float
    consistency: float
    """Before its weight."""
    auxiliary: float
    """Other costs that the method has, weighted; 0 if there are none."""
    consistency_weight: float
    """w(t) of the last step."""
    learning_rate: float
    """Of the last step."""
    steps: int
    """All steps, skipped and empty ones included."""
    skipped_steps: int
    """Steps that were not finite."""
    skipped_rows: int
    """Rows of skipped steps, fresh and labelled. Accounts and label states count them as learned, since a step must
    not wait to know. Labelled rows stay in the replay buffer and are drawn again; fresh rows are lost."""


class CostSums:
    """Sums over steps: six numbers in one tensor, read with one copy."""

    def __init__(self, device: torch.device, *, skipped_in_a_row: int = 0) -> None:
        self._sums = torch.zeros(6, device=device)
        self.skipped_in_a_row = torch.full((), float(skipped_in_a_row), device=device)
        """Steps up to now that were not finite, 0-d on the device."""

    def add(self, costs: StepCosts, skipped: Tensor, rows: int) -> None:
        """Count one step; `skipped` is a 0-d bool on the device."""
        one = torch.ones((), device=self._sums.device)
        auxiliary = torch.zeros_like(one) if costs.auxiliary is None else costs.auxiliary.detach()
        values = torch.stack((costs.classification.detach(), costs.consistency.detach(), auxiliary, one))
        self._sums[:4] += torch.where(skipped, 0.0, values)
        self._sums[4] += skipped
        self._sums[5] += skipped * rows
        self.skipped_in_a_row = torch.where(skipped, self.skipped_in_a_row + 1.0, 0.0)

    def read(self, *, steps: int, consistency_weight: float, learning_rate: float) -> Costs:
        """Means since the last reading. Waits for the device."""
        classification, consistency, auxiliary, taken, skipped, skipped_rows = self._sums.tolist()
        self._sums.zero_()
        return Costs(
            classification=classification / max(taken, 1.0),
            consistency=consistency / max(taken, 1.0),
            auxiliary=auxiliary / max(taken, 1.0),
            consistency_weight=consistency_weight,
            learning_rate=learning_rate,
            steps=steps,
            skipped_steps=round(skipped),
            skipped_rows=round(skipped_rows),
        )
