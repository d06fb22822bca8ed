"""Labels only: the control that a semi-supervised method must beat. The teacher averages the student all the same."""

from __future__ import annotations

from streamlearn.learn.losses import classification_loss
from streamlearn.learn.step import Rows, StepCosts, answer
from streamlearn.models.build import Classifier


class Supervised:
    """Sees nothing of unlabelled rows, not even through batch statistics; no labelled rows, nothing to learn."""

    def costs(self, student: Classifier, teacher: Classifier, rows: Rows) -> StepCosts | None:  # noqa: ARG002
        """Cross-entropy of the labelled rows, which stand last.

        Divided by all rows, so that one learning rate means the same with and without consistency.
        """
        if rows.labelled_count == 0:
            return None
        logits_LC = answer(student, rows.labelled_view())
        loss = classification_loss(logits_LC, rows.labels_B[-rows.labelled_count :])
        share = rows.labelled_count / len(rows.labels_B)
        return StepCosts(classification=loss * share, consistency=loss.new_zeros(()))
