"""The teacher: the student averaged over its steps. Tarvainen and Valpola (2017), section 2.

It starts as a copy of the student. Parameters and float buffers are averaged (batch statistics belong to the weights
that made them: EMAN, Cai et al., 2021). Integer buffers, and those that hold infinities, such as attention masks, are
copied.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from streamlearn.learn.schedules import buffer_decay, ema_decay

Slot = tuple[nn.Module, str]
"""A module and the name of a buffer in it. It is looked up each time, since a network may replace the tensor."""


def make_teacher(student: nn.Module) -> nn.Module:
    """A copy of the student without gradients."""
    return copy.deepcopy(student).eval().requires_grad_(False)


def buffer_slots(module: nn.Module) -> list[Slot]:
    """The buffers of a network; one that several layers share is listed once."""
    slots = {
        id(buffer): (owner, name) for owner in module.modules() for name, buffer in owner.named_buffers(recurse=False)
    }
    return list(slots.values())


def read_slots(slots: list[Slot]) -> list[Tensor]:
    """Their current tensors."""
    return [getattr(owner, name) for owner, name in slots]


class TeacherAverage:
    """theta'_t = alpha theta'_{t-1} + (1 - alpha) theta_t, in place, for one pair of equal networks."""

    def __init__(self, teacher: nn.Module, student: nn.Module, *, share: float = 1.0) -> None:
        self._share = share
        self._parameters: tuple[list[Tensor], list[Tensor]] = (list(teacher.parameters()), list(student.parameters()))
        assert len(self._parameters[0]) == len(self._parameters[1])
        slots = list(zip(buffer_slots(teacher), buffer_slots(student), strict=True))
        self._averaged = [pair for pair in slots if _can_be_averaged(getattr(*pair[1]))]
        self._copied = [pair for pair in slots if not _can_be_averaged(getattr(*pair[1]))]

    @torch.no_grad()
    def update(self, step: int, *, alpha: float) -> None:
        """Move the teacher towards the student as it is after step t."""
        for teacher, student, decay in self._floats(step, alpha):
            torch._foreach_lerp_(teacher, student, 1.0 - decay)
        self._copy_others()

    @torch.no_grad()
    def update_unless(self, skipped: Tensor, step: int, *, alpha: float) -> None:
        """The same unless `skipped`, a 0-d bool on the device, without making the host wait.

        Lerp takes no weight from the device, so its formula is written out.
        """
        taken = (~skipped).to(torch.float32)
        for teacher, student, decay in self._floats(step, alpha):
            moves = torch._foreach_sub(student, teacher)  # noqa: SLF001
            torch._foreach_mul_(moves, (1.0 - decay) * taken)
            torch._foreach_add_(teacher, moves)
        # After a skipped step the student's buffers are those that the teacher has already.
        self._copy_others()

    def float_buffers(self) -> tuple[list[Tensor], list[Tensor]]:
        """The averaged buffers of teacher and student, which must stay finite."""
        return read_slots([teacher for teacher, _ in self._averaged]), read_slots([of for _, of in self._averaged])

    def _floats(self, step: int, alpha: float) -> list[tuple[list[Tensor], list[Tensor], float]]:
        """Teacher's tensors, the student's, and their decay."""
        teacher_buffers, student_buffers = self.float_buffers()
        teacher_weights, student_weights = self._parameters
        groups = [
            (teacher_weights, student_weights, ema_decay(step, alpha=alpha, share=self._share)),
            (teacher_buffers, student_buffers, buffer_decay(step, alpha=alpha, share=self._share)),
        ]
        return [group for group in groups if group[0]]

    def _copy_others(self) -> None:
        for (teacher, name), (student, same_name) in self._copied:
            getattr(teacher, name).copy_(getattr(student, same_name))


def _can_be_averaged(buffer: Tensor) -> bool:
    return buffer.is_floating_point() and buffer.numel() > 0 and bool(torch.isfinite(buffer).all())
