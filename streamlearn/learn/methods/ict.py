"""Interpolation consistency (Verma et al., 2019): the answer to a mix is the mix of the answers.

    J(theta) = E l( f(Mix(u, u'), theta), Mix(f(u, theta'), f(u', theta')) )        Mix(a, b) = s a + (1 - s) b

s ~ Beta(b, b) is drawn for each row; theta' is the average of theta. This is Mean Teacher with another sample as noise,
so it works for tables as for images. The teacher sees weak views, the student a mix of strong ones, of fresh rows only.
Targets are aligned, gated and sharpened before they are mixed.
"""

from __future__ import annotations

import torch

from streamlearn.learn.losses import classification_loss
from streamlearn.learn.methods.settings import InterpolationOptions
from streamlearn.learn.rows import Rows, draw_mix
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
        fresh = rows.fresh_count
        labelled_L, targets_LC = rows.labelled_view()
        mix = draw_mix(fresh, self._beta, rows.generator)
        logits_BC = answer(student, torch.cat((rows.mixed(rows.strong_view(), mix), labelled_L)))
        targets_FC, weights_F = self._ask(teacher, rows, fresh)
        mixed_F = None if weights_F is None else mix.of(weights_F)
        return StepCosts(
            classification=classification_loss(logits_BC[fresh:], targets_LC, len(logits_BC)),
            consistency=self._distance(logits_BC[:fresh], mix.of(targets_FC), mixed_F),
        )
