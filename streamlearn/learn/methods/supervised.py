"""Labels only: the baseline that a semi-supervised method must beat. The teacher still averages the student."""

from __future__ import annotations

from streamlearn.learn.losses import classification_loss
from streamlearn.learn.rows import Rows
from streamlearn.learn.step import Method, StepCosts, answer
from streamlearn.models.build import Classifier


class Supervised(Method):
    """Sees no unlabelled row, not even through batch statistics. Without labelled rows there is nothing to learn."""

    def costs(self, student: Classifier, teacher: Classifier, rows: Rows) -> StepCosts | None:  # noqa: ARG002
        """Cross-entropy of labelled rows over all rows, so that a learning rate means the same for all methods."""
        if rows.labelled_count == 0:
            return None
        view_L, targets_LC = rows.labelled_view()
        loss = classification_loss(answer(student, view_L), targets_LC, len(rows.x_B))
        return StepCosts(classification=loss, consistency=loss.new_zeros(()))
