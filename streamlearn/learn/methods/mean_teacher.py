"""Mean Teacher (Tarvainen and Valpola, 2017): the student agrees with the average of itself under other noise.

    J(theta) = E || f(x, theta', eta') - f(x, theta, eta) ||^2        theta' = the average of theta

eta and eta' are independent noise of the input. For the mode in which the teacher answers see `learn/targets.py`.

With a contrast weight the student sees the fresh rows a second time, mixed, and must recognise them by their
embeddings: `learn/contrast.py`. Mixed rows are not compared with the teacher's classes, which costs accuracy on tables.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from streamlearn.learn.contrast import Contrast, make_contrast
from streamlearn.learn.losses import classification_loss
from streamlearn.learn.methods.settings import MeanTeacherOptions
from streamlearn.learn.rows import MIX_BLOCK, Rows, draw_mix
from streamlearn.learn.step import StepCosts, answer
from streamlearn.learn.targets import TeacherMethod
from streamlearn.models.build import Classifier, ModelSpec

_CONTRAST_BETA = 0.5
"""Rows to be recognised are mixed with shares from Beta(b, b)."""


class MeanTeacher(TeacherMethod):
    """Labels where there are any; agreement on every row that the student sees unmixed."""

    def costs(self, student: Classifier, teacher: Classifier, rows: Rows) -> StepCosts:
        """Both networks see the same rows, the student under eta, the teacher under eta'."""
        view = rows.student_view()
        logits_BC = answer(student, view.x_B)
        asked = self._ask(teacher, rows, view.compared)
        return self._compare(logits_BC[rows.fresh_count :], view.targets_LC, logits_BC[: view.compared], asked, rows)

    def _compare(
        self,
        logits_LC: Tensor,
        targets_LC: Tensor,
        compared_BC: Tensor,
        asked: tuple[Tensor, Tensor | None],
        rows: Rows,
    ) -> StepCosts:
        """`asked`: targets, and weights of a gate, for the rows of `compared_BC`."""
        return StepCosts(
            classification=classification_loss(logits_LC, targets_LC, len(rows.x_B)),
            consistency=self._distance(compared_BC, *asked),
        )


class MeanTeacherWithContrast(MeanTeacher):
    """The same, and the fresh rows must be recognised in mixes."""

    def __init__(self, options: MeanTeacherOptions, spec: ModelSpec, student: Classifier, contrast: Contrast) -> None:
        super().__init__(options, spec, student)
        self._contrast = contrast

    def costs(self, student: Classifier, teacher: Classifier, rows: Rows) -> StepCosts:
        """One forward of all rows and of the mixes; one of the teacher. Of a large micro-batch, a block is mixed."""
        fresh, count, read = rows.fresh_count, len(rows.x_B), self._contrast.embedding.read
        mixed = min(fresh, MIX_BLOCK)
        view, mix = rows.student_view(), draw_mix(mixed, _CONTRAST_BETA, rows.generator)
        view_B = torch.cat((view.x_B, rows.mixed(rows.strong_view()[:mixed], mix)))
        logits_BC, embedded_BD = read(student.net, lambda: answer(student, view_B))
        asked, teacher_BD = read(teacher.net, lambda: self._ask(teacher, rows, view.compared))
        costs = self._compare(logits_BC[fresh:count], view.targets_LC, logits_BC[: view.compared], asked, rows)
        of_mixed = embedded_BD[count:], teacher_BD[:mixed], asked[0][:mixed]
        return replace(costs, auxiliary=self._contrast.cost(*of_mixed, mix, labels=rows.labels_so_far))

    def parameters(self) -> dict[str, nn.Parameter]:
        """The projector's."""
        return self._contrast.parameters()


def make_mean_teacher(options: MeanTeacherOptions, spec: ModelSpec, student: Classifier) -> MeanTeacher:
    """With contrast if that has a weight.

    Raises:
        ConfigError: contrast was set, and this network has no embedding.
    """
    contrast = make_contrast(options, spec, student)
    if contrast is None:
        return MeanTeacher(options, spec, student)
    return MeanTeacherWithContrast(options, spec, student, contrast)
