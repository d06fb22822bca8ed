"""Temporal Ensembling (Laine and Aila, 2017): the student agrees with the average of its own earlier answers.

    Z <- a Z + (1 - a) z        target = Z / sum of Z over classes        z = the student's probabilities, noise and all

An unbounded stream cannot keep an answer for each sample, so there is a table of N slots, indexed by the sample's key.
A sample that hits the slot of another takes it over. Samples that come again are those of the replay buffer and, with
several steps per micro-batch, recent ones. Rows differ in how often they came, so the target is divided by its sum, as
in the authors' sparse mode, and not by 1 - a^t. A row without history has weight 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from streamlearn.learn.losses import DISTANCES, classification_loss
from streamlearn.learn.methods.settings import TemporalEnsemblingOptions
from streamlearn.learn.rows import Rows
from streamlearn.learn.step import Method, StepCosts, answer
from streamlearn.models.build import Classifier, ModelSpec

_NO_KEY = -1


class TemporalEnsembling(Method):
    """Labels where there are any; agreement with past answers on rows that have any. The teacher is not asked."""

    def __init__(self, options: TemporalEnsemblingOptions, spec: ModelSpec, student: Classifier) -> None:
        self._distance, self._momentum = DISTANCES[options.consistency], options.ensemble_momentum
        device = student.device
        self._sums_NC = torch.zeros((options.ensemble_slots, spec.classes), device=device)
        self._keys_N = torch.full((options.ensemble_slots,), _NO_KEY, dtype=torch.int64, device=device)
        self._answered: tuple[Tensor, Tensor, Tensor] | None = None

    def costs(self, student: Classifier, teacher: Classifier, rows: Rows) -> StepCosts:  # noqa: ARG002
        """One forward."""
        assert rows.keys_B is not None, "temporal ensembling needs the keys of its rows"
        view = rows.student_view()
        logits_BC = answer(student, view.x_B)
        compared_BC, keys_B = logits_BC[: view.compared], rows.keys_B[: view.compared]
        slots_B = keys_B % len(self._keys_N)
        known_B = self._keys_N[slots_B] == keys_B
        sums_BC = torch.where(known_B[:, None], self._sums_NC[slots_B], 0.0)
        targets_BC = sums_BC / sums_BC.sum(dim=1, keepdim=True).clamp_min(1e-8)
        answers_BC = compared_BC.detach().softmax(dim=1)
        self._answered = (slots_B, keys_B, torch.lerp(answers_BC, sums_BC, self._momentum))
        return StepCosts(
            classification=classification_loss(logits_BC[rows.fresh_count :], view.targets_LC, len(logits_BC)),
            consistency=self._distance(compared_BC, targets_BC, known_B.to(torch.float32)),
        )

    @torch.no_grad()
    def settle(self, skipped: Tensor) -> None:
        """Store this step's answers. Of rows that share a slot, the last one wins."""
        if self._answered is None:
            return
        slots_B, keys_B, sums_BC = self._answered
        last_B = _last_of_each(slots_B)
        self._keys_N[slots_B] = torch.where(skipped, self._keys_N[slots_B], keys_B[last_B])
        self._sums_NC[slots_B] = torch.where(skipped, self._sums_NC[slots_B], sums_BC[last_B])
        self._answered = None

    def forget(self) -> None:
        """Clear the table."""
        self._sums_NC.zero_()
        self._keys_N.fill_(_NO_KEY)

    def tensors(self) -> dict[str, Tensor]:
        """The table: sums (N, C), keys (N,)."""
        return {"sums_NC": self._sums_NC, "keys_N": self._keys_N}


def _last_of_each(slots_B: Tensor) -> Tensor:
    """For each row, the last row with the same slot.

    Concurrent writes have no order on a GPU, so rows of one slot must write the same values. Selecting rows instead
    would make the host wait for their number.
    """
    if not len(slots_B):
        return slots_B
    places_B = torch.arange(len(slots_B), device=slots_B.device)
    same_BB = slots_B[:, None] == slots_B[None, :]
    return torch.where(same_BB, places_B[None, :], -1).amax(dim=1)
