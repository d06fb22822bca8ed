"""The label-only twin: does the student gain anything from unlabelled samples?

It is the same network, averaged as the teacher is, and learns from the labelled rows alone, with the same replay,
noise, mixup, optimizer and schedules. A twin without average or noise would flatter the teacher. It shares the
student's normaliser, since input statistics are measured, not learned.
"""

from __future__ import annotations

import torch

from streamlearn.learn.build import make_trainee
from streamlearn.learn.methods.settings import SupervisedOptions
from streamlearn.learn.settings import LearnConfig
from streamlearn.learn.step import Trainee
from streamlearn.models.build import ModelSpec


def make_twin(spec: ModelSpec, config: LearnConfig, trainee: Trainee) -> Trainee | None:
    """None where it is off, and where the student itself learns from labels only."""
    if not config.twin or config.method == "supervised":
        return None
    labels_only = config.model_copy(update={"method": "supervised", "options": SupervisedOptions()})
    twin = make_trainee(spec, labels_only, trainee.student.device, host_may_ask=trainee.host_may_ask)
    for network in (twin.student, twin.teacher):
        network.normalise = trainee.student.normalise
    return twin


@torch.no_grad()
def copy_weights(source: Trainee, target: Trainee) -> None:
    """Make student, teacher and optimizer of `target` equal to those of `source`."""
    target.student.net.load_state_dict(source.student.net.state_dict())
    target.teacher.net.load_state_dict(source.teacher.net.state_dict())
    for parameter, same in zip(target.student.parameters(), source.student.parameters(), strict=True):
        for name, tensor in target.optimizer.state.get(parameter, {}).items():
            tensor.copy_(source.optimizer.state[same][name])
