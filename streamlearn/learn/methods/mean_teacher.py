"""Mean Teacher (Tarvainen and Valpola, 2017): the student agrees with the average of itself under other noise.

The teacher answers in eval mode with averaged batch statistics, where the paper's is in train mode. So the target
is the very network that is served, one row is enough for it, and the statistics of a correlated batch do not enter it.
Dropout is then noise of the student alone; eta and eta' of the input are sampled apart as in the paper.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from streamlearn.learn.losses import classification_loss
from streamlearn.learn.step import Rows, StepCosts, answer
from streamlearn.models.build import Classifier


class MeanTeacher:
    """Labels where there are any; agreement on every row, labelled ones too."""

    def __init__(self, distance: Callable[[Tensor, Tensor], Tensor]) -> None:
        self._distance = distance

    def costs(self, student: Classifier, teacher: Classifier, rows: Rows) -> StepCosts:
        """Both networks see the same rows, the student under eta, the teacher under eta'."""
        student_logits_BC = answer(student, rows.view())
        with torch.no_grad():
            teacher_logits_BC: Tensor = teacher.net(rows.view())

        return StepCosts(
            classification=classification_loss(student_logits_BC, rows.labels_B),
            consistency=self._distance(student_logits_BC, teacher_logits_BC),
        )
