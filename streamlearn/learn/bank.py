"""Several averages of one student, beside the teacher that it learns from: short horizons and long ones.

Which horizon is best depends on how far the stream has come and on how fast it changes: one of a thousand steps is far
behind after two thousand, and better after a hundred thousand. So a few are kept, each costs one pass over the weights
a step, and labels say which of them is served (`judge/election.py`). The student's targets stay those of the teacher.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from streamlearn.learn.step import Trainee
from streamlearn.learn.teacher import TeacherAverage
from streamlearn.models.build import Classifier
from streamlearn.records import UNLABELLED


class Bank:
    """One average for each decay."""

    def __init__(self, decays: Sequence[float], trainee: Trainee, *, share: float) -> None:
        self._decays, self._trainee = tuple(decays), trainee
        teacher = trainee.teacher
        self.members = [
            Classifier(copy.deepcopy(teacher.net), normalise=teacher.normalise, scale=teacher.scale).eval()
            for _ in decays
        ]
        """They share the student's normaliser."""
        self._averages = [TeacherAverage(member.net, trainee.student.net, share=share) for member in self.members]

    def update(self, skipped: Tensor, step: int) -> None:
        """Move all members towards the student as it is after step t of the average, unless that was `skipped`."""
        for decay, average in zip(self._decays, self._averages, strict=True):
            if not self._trainee.host_may_ask:
                average.update_unless(skipped, step, alpha=decay)
            elif not skipped:
                average.update(step, alpha=decay)

    def begin_anew(self) -> None:
        """Become what the teacher is now."""
        for member in self.members:
            member.net.load_state_dict(self._trainee.teacher.net.state_dict())

    def tensors(self) -> dict[str, Tensor]:
        """Weights and buffers, live, by decay and name."""
        return {
            f"{decay:g}.{name}": tensor
            for decay, member in zip(self._decays, self.members, strict=True)
            for name, tensor in member.net.state_dict().items()
        }


@torch.no_grad()
def answers(candidates: Sequence[Classifier], prepared: Tensor) -> Tensor:
    """The classes that each candidate gives to prepared samples, (K, B); UNLABELLED where its answer is not finite."""
    logits_KBC = torch.stack([candidate.net(prepared) for candidate in candidates])
    return torch.where(torch.isfinite(logits_KBC).all(dim=2), logits_KBC.argmax(dim=2), UNLABELLED)
