"""What methods share that hold the student against targets: a distance, and how the targets are made.

The papers' teachers answer in train mode, ours in eval mode with averaged batch statistics. So the target is the
network that is served, one row is enough for it, and the statistics of a correlated batch do not enter it. Dropout is
then noise of the student alone. With `teacher_mode = "train"` it is as in the papers: the teacher's dropout is on, its
batch statistics are those of the rows it is asked about, and it keeps none of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from streamlearn.learn.losses import distance
from streamlearn.learn.methods.settings import TargetOptions, TeacherOptions
from streamlearn.learn.rows import Rows
from streamlearn.learn.step import Method, answer_apart
from streamlearn.learn.targets import Targets
from streamlearn.models.build import Classifier


class TargetedMethod(Method):
    """Keeps the averages of its targets, and nothing else."""

    def __init__(self, options: TargetOptions, targets: Targets) -> None:
        self._distance, self._targets = distance(options.consistency), targets

    def settle(self, skipped: Tensor) -> None:
        """Keep the averages of the targets."""
        self._targets.settle(skipped)

    def forget(self) -> None:
        """Reset the averages."""
        self._targets.forget()

    def tensors(self) -> dict[str, Tensor]:
        """The averages of the targets."""
        return self._targets.tensors()


class TeacherMethod(TargetedMethod):
    """Asks the teacher for its targets."""

    def __init__(self, options: TeacherOptions, targets: Targets) -> None:
        super().__init__(options, targets)
        self._teacher_mode = options.teacher_mode

    @torch.no_grad()
    def _ask(self, teacher: Classifier, rows: Rows, count: int) -> tuple[Tensor, Tensor | None]:
        """Targets (count, C) from the teacher's answers to weak views of the first rows; weights (count,) of a gate."""
        view_B = rows.view(count)
        if self._teacher_mode == "eval":
            logits_BC = teacher.net(view_B)
        else:
            logits_BC = answer_apart(teacher, view_B)
            teacher.eval()
        return self._targets.make(logits_BC, rows)
