"""Whether weights are finite, how far teacher and student are apart, and which rows break a step."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from streamlearn.learn.step import Trainee, set_training
from streamlearn.models.build import Classifier


@dataclass(frozen=True, slots=True)
class Health:
    """State of the weights."""

    updates: int
    """Steps that changed the weights."""
    skipped_in_a_row: int
    """Latest steps that were not finite."""
    distance: float
    """||theta' - theta|| / ||theta||, over all parameters of teacher and student."""
    finite: bool
    """Whether the teacher's parameters and float buffers are finite."""


@torch.no_grad()
def measure_health(trainee: Trainee, *, updates: int, skipped_in_a_row: Tensor) -> Health:
    """Measure it. Waits for the device."""
    student: list[Tensor] = list(trainee.student.net.parameters())
    teacher: list[Tensor] = list(trainee.teacher.net.parameters())
    moved = nn.utils.get_total_norm(torch._foreach_sub(teacher, student))  # noqa: SLF001
    distance = moved / nn.utils.get_total_norm(student).clamp_min(1e-12)
    buffers, _ = trainee.average.float_buffers()
    largest = nn.utils.get_total_norm([*teacher, *buffers], norm_type=math.inf)
    skipped, relative, largest_value = torch.stack((skipped_in_a_row, distance, largest)).tolist()
    return Health(updates, round(skipped), relative, math.isfinite(largest_value))


def breaking_rows(student: Classifier, raw_B: Tensor, labels_B: Tensor) -> list[int]:
    """Rows that, each alone, have a loss or gradient that is not finite. Changes nothing.

    Empty if all rows do: then the weights are the cause.
    """
    with torch.no_grad():
        x_B = student.prepare(raw_B)
    parameters = [parameter for parameter in student.net.parameters() if parameter.requires_grad]
    set_training(student, training=False)
    found = []
    for row in range(len(x_B)):
        loss = nn.functional.cross_entropy(student.net(x_B[row : row + 1]), labels_B[row : row + 1])
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        norm = nn.utils.get_total_norm([gradient for gradient in gradients if gradient is not None])
        if not torch.isfinite(loss + norm):
            found.append(row)
    return found if len(found) < len(x_B) else []
