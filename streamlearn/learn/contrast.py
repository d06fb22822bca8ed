"""A cost for features that needs no labels: the student must recognise a sample among the others of its micro-batch.

Instance discrimination (Wu et al., 2018; InfoNCE of van den Oord et al., 2018) of mixed samples (MixCo, Kim et al.,
2020; i-Mix, Lee et al., 2021), between the two networks as in MoCo (He et al., 2020). With z_i the student's projected
embedding of a mix s u_i + (1 - s) u_j, and k_j the teacher's of u_j, both of length 1,

    L = - 1/F sum_ij  t_ij log softmax_j (z_i . k_j / T)        t = Mix(r)

where r_ij is how similar samples i and j should be. Without labels r is the identity: every sample is a class of its
own. That pushes apart samples of one class, so with n labels so far

    r = (1 - w) identity + w q      w = n / (n + h)      q_ij ~ p_i . p_j, each row with sum 1

with the teacher's targets p: the probability that both are of one class, as in the graph of CoMatch (Li, Xiong and Hoi,
2021). The projector is the student's; the teacher's embeddings go through it without a gradient, and are those that
its targets come from, so neither network makes another pass.

Letters: F fresh rows, at most `MIX_BLOCK`, C classes, D embedding, K projection.
"""

from __future__ import annotations

import structlog
import torch
from torch import Tensor, nn

from streamlearn.errors import ConfigError
from streamlearn.learn.embedding import Embedding
from streamlearn.learn.methods.settings import ContrastOptions
from streamlearn.learn.rows import MIX_BLOCK, Mix
from streamlearn.models.build import Classifier, ModelSpec

_log = structlog.get_logger(__name__)

HIDDEN, PROJECTION = 64, 32
"""Widths of the projector, and K."""
TEMPERATURE = 0.5
"""T. Lower ones gain as much on digits and lose on Fashion-MNIST."""
HALF_KNOWN_LABELS = 20
"""h: number of labels at which the classes count as much as the samples."""


class Contrast:
    """The projector of one student, and the cost."""

    def __init__(self, embedding: Embedding, device: torch.device, weight: float) -> None:
        self.embedding, self._weight = embedding, weight
        self._projector = nn.Sequential(
            nn.Linear(embedding.width, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, PROJECTION)
        ).to(device)

    def parameters(self) -> dict[str, nn.Parameter]:
        """The projector's, by name."""
        return {f"projector_{name.replace('.', '_')}": value for name, value in self._projector.named_parameters()}

    def cost(self, mixed_FD: Tensor, teacher_FD: Tensor, targets_FC: Tensor, mix: Mix, *, labels: int) -> Tensor:
        """L times its weight, 0-d; 0 without rows. `mixed_FD` are the student's embeddings of the mixes."""
        if not len(mixed_FD):
            return mixed_FD.new_zeros(())
        assert len(mixed_FD) <= MIX_BLOCK, len(mixed_FD)  # the cost grows with the square
        w = labels / (labels + HALF_KNOWN_LABELS)
        z_FK = nn.functional.normalize(self._projector(mixed_FD), dim=1)
        with torch.no_grad():
            k_FK = nn.functional.normalize(self._projector(teacher_FD), dim=1) / TEMPERATURE
            alike_FF = targets_FC @ targets_FC.T
            alike_FF *= w / alike_FF.sum(dim=1, keepdim=True)
            alike_FF.diagonal().add_(1.0 - w)
            targets_FF = mix.of(alike_FF)
        return self._weight * nn.functional.cross_entropy(z_FK @ k_FK.T, targets_FF)


def make_contrast(options: ContrastOptions, spec: ModelSpec, student: Classifier) -> Contrast | None:
    """None without a weight. A recipe's weight is dropped for a network that has no embedding.

    Raises:
        ConfigError: the weight was set, and this network has no embedding.
    """
    if not options.contrast_weight:
        return None
    try:
        embedding = Embedding(student, spec, needed_by="learn.options.contrast_weight")
    except ConfigError as error:
        if "contrast_weight" in options.model_fields_set:
            raise
        _log.warning("network_without_contrast", error=str(error))
        return None
    return Contrast(embedding, student.device, options.contrast_weight)
