"""The label-only twin: does the student gain anything from unlabelled samples?

The same network, averaged as the teacher is, learning from the labelled rows alone with the same replay, noise, mixup,
optimizer and schedules. A twin without an average, or without the noise, would flatter the teacher. What inputs look
like is measured and not learned, so it has the student's normaliser.
"""

from __future__ import annotations

import torch

from streamlearn.learn.rows import Rows
from streamlearn.learn.step import Trainee, train_step


class Twin:
    """Learns every n-th step in which there are labelled rows."""

    def __init__(self, trainee: Trainee, *, every: int) -> None:
        assert every >= 1, every
        assert not trainee.method.parameters(), "a twin learns nothing beside its student"
        self.trainee, self._every = trainee, every
        self.updates = 0
        """Its own t: it has counted none of the steps that it did not take."""
        self.averaged_at = 0
        """The update at which its average began anew."""

    def learn(self, rows: Rows, *, step: int, learning_rate: float, alpha: float) -> None:
        """Take part in step `step` where it is this twin's turn. One that is not finite leaves it as it was."""
        if step % self._every or not rows.labelled_count:
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

    def lend_to(self, other: Trainee) -> None:
        """Make student, teacher and optimizer of `other` what the twin's are."""
        _copy(self.trainee, other)

    def begin_as(self, other: Trainee, *, updates: int, averaged_at: int) -> None:
        """Become what `other` is after so many updates: for a twin that was not there from the start."""
        _copy(other, self.trainee)
        self.updates, self.averaged_at = updates, averaged_at


@torch.no_grad()
def _copy(source: Trainee, target: Trainee) -> None:
    target.student.net.load_state_dict(source.student.net.state_dict())
    target.teacher.net.load_state_dict(source.teacher.net.state_dict())
    for parameter, same in zip(target.student.parameters(), source.student.parameters(), strict=True):
        for name, tensor in target.optimizer.state.get(parameter, {}).items():
            tensor.copy_(source.optimizer.state[same][name])
