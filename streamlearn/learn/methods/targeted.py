"""What methods share that hold the student against targets: a distance, and how the targets are made.

A teacher answers in eval mode with averaged batch statistics, where those of the papers are in train mode: so the
target is the very network that is served, one row is enough for it, and the statistics of a correlated batch do not
enter it. Dropout is then noise of the student alone. With `Targets.teacher_mode` "train" it is as in the papers: the
teacher's dropout is on, its batch statistics are those of the rows that it is asked about, and it keeps none of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from streamlearn.learn.losses import Distance
from streamlearn.learn.rows import Rows
from streamlearn.learn.step import Method, answer_apart
from streamlearn.learn.targets import Targets
from streamlearn.models.build import Classifier


class TargetedMethod(Method):
    """Remembers the averages of its targets, and nothing else."""

    def __init__(self, distance: Distance, targets: Targets) -> None:
        self._distance, self._targets = distance, targets

    @torch.no_grad()
    def _ask(self, teacher: Classifier, rows: Rows, count: int) -> tuple[Tensor, Tensor | None]:
        """Targets (count, C) by what the teacher says of weak views of the first rows; weights (count,) of a gate."""
        view_B = rows.view(count)
        if self._targets.teacher_mode == "eval":
            logits_BC = teacher.net(view_B)
        else:
            logits_BC = answer_apart(teacher, view_B)
            teacher.eval()
        return self._targets.make(logits_BC, rows)

    def settle(self, skipped: Tensor) -> None:
        """Keep the averages of the targets."""
        self._targets.settle(skipped)

    def forget(self) -> None:
        """Averages anew."""
        self._targets.forget()

    def tensors(self) -> dict[str, Tensor]:
        """The averages of the targets."""
        return self._targets.tensors()
