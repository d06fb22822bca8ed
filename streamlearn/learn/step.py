"""One step t of training: costs, gradient, student, teacher.

A loss, gradient or buffer that is not finite leaves student, teacher, optimizer and all buffers untouched (I4). On a
CPU the host checks and undoes. On a GPU the host would have to wait, so there everything downstream takes the answer as
a tensor: the fused optimizer by its `found_inf`, the teacher by a zero weight, buffers by `where`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from streamlearn.learn.progress import Updates
from streamlearn.learn.rows import Rows
from streamlearn.learn.teacher import TeacherAverage, buffer_slots, read_slots
from streamlearn.models.build import Classifier
from streamlearn.models.normalise import BatchNormWarmup

FIRST_STEPS = 100
"""On a GPU the host waits to know whether one of the first steps was skipped; later ones count as taken."""


@dataclass(frozen=True, slots=True)
class StepCosts:
    """0-d tensors on the device, still with their graph."""

    classification: Tensor
    """Already weighted, as `auxiliary` is."""
    consistency: Tensor
    """Before its weight."""
    auxiliary: Tensor | None = None
    """Other costs that a method has."""


class Method(Protocol):
    """What is predicted and compared. The step, its schedules and its safety are the same for every method.

    A method may use both networks and draw any number of views. It changes neither network, except for the student's
    batch statistics. It changes its own state in `settle` only.
    """

    def costs(self, student: Classifier, teacher: Classifier, rows: Rows) -> StepCosts | None:
        """The costs of these rows; None if there is nothing to learn from them."""
        ...

    def settle(self, skipped: Tensor) -> None:  # noqa: ARG002
        """End the step of the last costs. If `skipped` (0-d bool on the device), leave its state as it was."""
        return

    def forget(self) -> None:
        """Reset its state: the weights or the data that it came from are gone."""
        return

    def tensors(self) -> dict[str, Tensor]:
        """Its state between steps as live tensors, by name: part of the checkpoint."""
        return {}

    def parameters(self) -> dict[str, nn.Parameter]:
        """Its own parameters, by name."""
        return {}


def answer(student: Classifier, view_B: Tensor) -> Tensor:
    """Student's logits (B, C) in train mode.

    A single row has no batch statistics, so it is answered in eval mode: learned, without dropout.
    """
    set_training(student, len(view_B) >= 2)
    return student.logits(view_B)


def answer_apart(network: Classifier, view_B: Tensor) -> Tensor:
    """The same for either network, without a change of its buffers. Its mode changes.

    For rows that must not enter the running statistics. A second domain has batch statistics of its own, and those that
    are kept must be of the data that the teacher is asked about (French et al., 2018).
    """
    set_training(network, len(view_B) >= 2)
    discarded = {name: buffer.clone() for name, buffer in network.net.named_buffers()}
    return network.logits(view_B, discarded)


def set_training(module: nn.Module, training: bool) -> None:
    """`module.train(training)`, which walks over all layers only if the mode changes."""
    if module.training != training:
        module.train(training)


class Undo:
    """Restores the buffers of a network after a skipped step: batch statistics move in the forward pass."""

    def __init__(self, network: nn.Module) -> None:
        self._slots = buffer_slots(network)
        self._saved: list[Tensor] = []

    @torch.no_grad()
    def remember(self) -> None:
        """Copy the buffers."""
        self._saved = [buffer.clone() for buffer in read_slots(self._slots)]

    @torch.no_grad()
    def restore(self) -> None:
        """Write the copies back."""
        for buffer, saved in zip(read_slots(self._slots), self._saved, strict=True):
            buffer.copy_(saved)

    @torch.no_grad()
    def restore_where(self, skipped: Tensor) -> None:
        """The same if `skipped`, a 0-d bool on the device, is true."""
        for buffer, saved in zip(read_slots(self._slots), self._saved, strict=True):
            buffer.copy_(torch.where(skipped, saved, buffer))


@dataclass(frozen=True, slots=True)
class Trainee:
    """Everything that a step changes."""

    method: Method
    student: Classifier
    teacher: Classifier
    """Shares the student's normaliser: input statistics are measured, not learned, so they are not averaged."""
    optimizer: torch.optim.Optimizer
    """A fused one, which has `found_inf`."""
    average: TeacherAverage
    warmup: BatchNormWarmup
    undo: Undo
    """Holds the buffers as they must be after a skipped step."""
    host_may_ask: bool
    """Whether the host may read values from the device in a step: on a CPU it need not wait."""

    def knows_at_once(self, step: int) -> bool:
        """Whether the host may wait for the device in step t: in the first steps averages must start exactly."""
        return self.host_may_ask or step <= FIRST_STEPS

    @torch.no_grad()
    def copy_from(self, source: Trainee) -> None:
        """Make student, teacher and optimizer equal to those of `source`, which has the same network."""
        self.student.net.load_state_dict(source.student.net.state_dict())
        self.teacher.net.load_state_dict(source.teacher.net.state_dict())
        for parameter, same in zip(self.student.parameters(), source.student.parameters(), strict=True):
            for name, tensor in self.optimizer.state.get(parameter, {}).items():
                tensor.copy_(source.optimizer.state[same][name])


def train_step(
    trainee: Trainee,
    rows: Rows,
    *,
    step: int,
    consistency_weight: float,
    alpha: float,
    averaged_steps: int | None = None,
) -> tuple[StepCosts, Tensor] | None:
    """Run step t: predict, compare, one gradient update, one teacher average.

    `averaged_steps` is the t of the average, if that was restarted. Returns the costs and whether the step was skipped,
    a 0-d bool on the device; None if the method found nothing to learn, and nothing but buffers changed.
    """
    trainee.warmup.set(ask=trainee.knows_at_once(step))
    averaged_steps = averaged_steps or step

    # 1. Labels where there are any; agreement everywhere.
    costs = trainee.method.costs(trainee.student, trainee.teacher, rows)
    if costs is None:
        return None
    loss = costs.classification + consistency_weight * costs.consistency
    if costs.auxiliary is not None:
        loss = loss + costs.auxiliary

    # 2. The gradient, looked at before it is used.
    parameters = [parameter for group in trainee.optimizer.param_groups for parameter in group["params"]]
    for parameter in parameters:
        parameter.grad = None
    loss.backward()
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    skipped = _not_finite(loss, gradients, trainee.average.float_buffers()[1])

    # 3. The gradient moves the student.  4. The average moves the teacher.
    if trainee.host_may_ask:
        if skipped:
            trainee.undo.restore()
        else:
            trainee.optimizer.step()
            trainee.average.update(averaged_steps, alpha=alpha)
    else:
        trainee.undo.restore_where(skipped)
        trainee.optimizer.found_inf = skipped.to(torch.float32)  # type: ignore[attr-defined]
        trainee.optimizer.step()
        trainee.average.update_unless(skipped, averaged_steps, alpha=alpha)
    trainee.method.settle(skipped)
    return costs, skipped


def take_step(
    trainee: Trainee,
    rows: Rows,
    counts: Updates,
    *,
    learning_rate: float,
    consistency_weight: float,
    alpha: float,
) -> tuple[StepCosts, Tensor] | None:
    """Run the next step, and count it if it changed the weights as far as the host may know. As `train_step`."""
    t = counts.updates + 1
    for group in trainee.optimizer.param_groups:
        group["lr"] = learning_rate
    outcome = train_step(
        trainee,
        rows,
        step=t,
        consistency_weight=consistency_weight,
        alpha=alpha,
        averaged_steps=t - counts.averaged_at,
    )
    if outcome is not None and not (trainee.knows_at_once(t) and outcome[1]):
        counts.updates = t
    return outcome


@torch.no_grad()
def _not_finite(loss: Tensor, gradients: list[Tensor], buffers: list[Tensor]) -> Tensor:
    """Whether the loss, the norm of the whole gradient or a buffer is not finite in float32; a 0-d bool on the device.

    The norm overflows before AdamW's squares do, and those would stay infinite. Batch statistics can overflow although
    the loss of the same batch is finite.
    """
    total = loss + nn.utils.get_total_norm(gradients)
    if buffers:
        total = total + nn.utils.get_total_norm(buffers, norm_type=math.inf)
    return ~torch.isfinite(total)
