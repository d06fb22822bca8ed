"""Pi model (Laine and Aila, 2017): two noisy views of a sample get the same answer from the same network.

    J(theta) = E || f(x, theta, eta') - f(x, theta, eta) ||^2

The student is its own teacher, dropout included. With squared error, gradient flows into both branches, as in the
paper; with KL the second branch is a target. Both views form one batch, so batch statistics move once.
"""

from __future__ import annotations

import torch

from streamlearn.learn.losses import classification_loss
from streamlearn.learn.methods.settings import PiOptions
from streamlearn.learn.rows import Rows
from streamlearn.learn.step import StepCosts, answer
from streamlearn.learn.targets import TargetMethod
from streamlearn.models.build import Classifier, ModelSpec


class Pi(TargetMethod):
    """Labels where there are any; agreement of the student with itself."""

    def __init__(self, options: PiOptions, spec: ModelSpec, student: Classifier) -> None:
        super().__init__(options, spec, student)
        self._both_branches = options.consistency == "mse"

    def costs(self, student: Classifier, teacher: Classifier, rows: Rows) -> StepCosts:  # noqa: ARG002
        """The classification cost is that of the first view, as in the paper."""
        view = rows.student_view()
        logits_BC = answer(student, torch.cat((view.x_B, rows.view(view.compared))))
        first_BC, second_BC = logits_BC.split((len(view.x_B), view.compared))
        targets_BC, weights_B = self.make_targets(second_BC if self._both_branches else second_BC.detach(), rows)
        return StepCosts(
            classification=classification_loss(first_BC[rows.fresh_count :], view.targets_LC, len(first_BC)),
            consistency=self._distance(first_BC[: view.compared], targets_BC, weights_B),
        )
