"""Labels only: the control that a semi-supervised method must beat. The teacher averages the student all the same."""

from __future__ import annotations

from streamlearn.learn.losses import classification_loss
from streamlearn.learn.rows import Rows
from streamlearn.learn.step import Method, StepCosts, answer
from streamlearn.models.build import Classifier


class Supervised(Method):
    """Sees nothing of unlabelled rows, not even through batch statistics; no labelled rows, nothing to learn."""

    def costs(self, student: Classifier, teacher: Classifier, rows: Rows) -> StepCosts | None:  # noqa: ARG002
        """Cross-entropy of the labelled rows, over all rows: one learning rate means the same for every method."""
        if rows.labelled_count == 0:
            return None
        view_L, targets_LC = rows.labelled_view()
        loss = classification_loss(answer(student, view_L), targets_LC, len(rows.x_B))
        return StepCosts(classification=loss, consistency=loss.new_zeros(()))
