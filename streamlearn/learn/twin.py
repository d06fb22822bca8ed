"""The label-only twin: does the student gain anything from unlabelled samples?

It is the same network, averaged as the teacher is, and learns from the labelled rows alone, with the same replay,
noise, mixup, optimizer and schedules. A twin without average or noise would flatter the teacher. It shares the
student's normaliser, since input statistics are measured, not learned.
"""

from __future__ import annotations

import torch

from streamlearn.learn.rows import Rows
from streamlearn.learn.step import Trainee, train_step


class Twin:
    """Learns in each step with labelled rows."""

    def __init__(self, trainee: Trainee) -> None:
        assert not trainee.method.parameters(), "the twin's method has no parameters of its own"
        self.trainee = trainee
        self.updates = 0
        """Its own t: only steps that it took."""
        self.averaged_at = 0
        """The update at which its average started."""

    def learn(self, rows: Rows, *, learning_rate: float, alpha: float) -> None:
        """Take one step, if there are labelled rows. A step that is not finite changes nothing."""
        if not rows.labelled_count:
            return
        self.trainee.undo.remember()
        for group in self.trainee.optimizer.param_groups:
            group["lr"] = learning_rate
        outcome = train_step(
            self.trainee,
            rows,
            step=self.updates + 1,
            consistency_weight=0.0,
            alpha=alpha,
            averaged_steps=self.updates + 1 - self.averaged_at,
        )
        if outcome is not None and not (self.trainee.knows_at_once(self.updates + 1) and outcome[1]):
            self.updates += 1

    def copy_to(self, other: Trainee) -> None:
        """Make student, teacher and optimizer of `other` equal to the twin's."""
        _copy(self.trainee, other)

    def copy_from(self, other: Trainee, *, updates: int, averaged_at: int) -> None:
        """Become equal to `other` after `updates` updates: for a twin that did not exist from the start."""
        _copy(other, self.trainee)
        self.updates, self.averaged_at = updates, averaged_at


@torch.no_grad()
def _copy(source: Trainee, target: Trainee) -> None:
    target.student.net.load_state_dict(source.student.net.state_dict())
    target.teacher.net.load_state_dict(source.teacher.net.state_dict())
    for parameter, same in zip(target.student.parameters(), source.student.parameters(), strict=True):
        for name, tensor in target.optimizer.state.get(parameter, {}).items():
            tensor.copy_(source.optimizer.state[same][name])
