"""Interpolation consistency (Verma et al., 2019): the answer to a mix is the mix of the answers.

    J(theta) = E l( f(Mix(u, u'), theta), Mix(f(u, theta'), f(u', theta')) )        Mix(a, b) = s a + (1 - s) b

s ~ Beta(b, b) is drawn for each row; theta' is the average of theta. This is Mean Teacher with another sample as noise,
so it works for tables as for images. The teacher sees weak views, the student a mix of strong ones, of fresh rows only.
Targets are aligned, gated and sharpened before they are mixed. The same passes can teach features without labels:
`learn/contrast.py`.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from streamlearn.learn.contrast import Contrast, make_contrast
from streamlearn.learn.losses import classification_loss
from streamlearn.learn.methods.settings import InterpolationOptions
from streamlearn.learn.rows import MIX_BLOCK, Mix, Rows, draw_mix
from streamlearn.learn.step import StepCosts, answer
from streamlearn.learn.targets import TeacherMethod
from streamlearn.models.build import Classifier, ModelSpec


class InterpolationConsistency(TeacherMethod):
    """Labels where there are any; on fresh rows, answers that are linear between samples."""

    def __init__(self, options: InterpolationOptions, spec: ModelSpec, student: Classifier) -> None:
        super().__init__(options, spec, student)
        self._beta = options.interpolation_beta

    def costs(self, student: Classifier, teacher: Classifier, rows: Rows) -> StepCosts:
        """One forward of mixed fresh rows and labelled rows; one of the teacher on the fresh rows."""
        view_B, targets_LC, mix = self._view(rows)
        return self._compare(answer(student, view_B), targets_LC, self._ask(teacher, rows, rows.fresh_count), mix)

    def _view(self, rows: Rows) -> tuple[Tensor, Tensor, Mix]:
        """What the student sees (B, *shape), what labels say of the labelled rows (L, C), and the fresh rows' mix."""
        labelled_L, targets_LC = rows.labelled_view()
        mix = draw_mix(rows.fresh_count, self._beta, rows.generator)
        return torch.cat((rows.mixed(rows.strong_view(), mix), labelled_L)), targets_LC, mix

    def _compare(
        self, logits_BC: Tensor, targets_LC: Tensor, asked: tuple[Tensor, Tensor | None], mix: Mix
    ) -> StepCosts:
        fresh, (targets_FC, weights_F) = len(mix.share_B), asked
        mixed_F = None if weights_F is None else mix.of(weights_F)
        return StepCosts(
            classification=classification_loss(logits_BC[fresh:], targets_LC, len(logits_BC)),
            consistency=self._distance(logits_BC[:fresh], mix.of(targets_FC), mixed_F),
        )


class InterpolationWithContrast(InterpolationConsistency):
    """The same, and the mixed rows must be recognised by their embeddings. Neither network makes another pass."""

    def __init__(self, options: InterpolationOptions, spec: ModelSpec, student: Classifier, contrast: Contrast) -> None:
        super().__init__(options, spec, student)
        self._contrast = contrast

    def costs(self, student: Classifier, teacher: Classifier, rows: Rows) -> StepCosts:
        """The cost of the features has no ramp: it needs no teacher that knows the classes."""
        fresh, read = rows.fresh_count, self._contrast.embedding.read
        view_B, targets_LC, mix = self._view(rows)
        logits_BC, embedded_BD = read(student.net, lambda: answer(student, view_B))
        asked, teacher_FD = read(teacher.net, lambda: self._ask(teacher, rows, fresh))
        count = min(fresh, MIX_BLOCK)
        of_block = embedded_BD[:count], teacher_FD[:count], asked[0][:count], mix.first_block()
        features = self._contrast.cost(*of_block, labels=rows.labels_so_far)
        return replace(self._compare(logits_BC, targets_LC, asked, mix), auxiliary=features)

    def parameters(self) -> dict[str, nn.Parameter]:
        """The projector's."""
        return self._contrast.parameters()


def make_ict(options: InterpolationOptions, spec: ModelSpec, student: Classifier) -> InterpolationConsistency:
    """With contrast where that has a weight.

    Raises:
        ConfigError: as `make_contrast`.
    """
    contrast = make_contrast(options, spec, student)
    if contrast is None:
        return InterpolationConsistency(options, spec, student)
    return InterpolationWithContrast(options, spec, student, contrast)
