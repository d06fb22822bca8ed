"""Copies of teachers that were healthy, to roll back to."""

from __future__ import annotations

import torch
from torch import Tensor

from streamlearn.learn.step import Trainee


class GoodTeachers:
    """At most two copies, the older first: it has been known to be good for longer."""

    def __init__(self, trainee: Trainee) -> None:
        self._trainee = trainee
        self._copies: list[dict[str, Tensor]] = []

    def keep(self) -> None:
        """Add a copy of the teacher and drop all older ones but the last."""
        self._copies = [*self._copies[-1:], self._copy()]

    def roll_back(self) -> bool:
        """Set student and teacher to the older copy, and the optimizer's state to zero. False: there is no copy."""
        if not self._copies:
            return False
        self._copies = self._copies[:1]
        for network in (self._trainee.student, self._trainee.teacher):
            network.net.load_state_dict(self._copies[0])
        with torch.no_grad():
            for state in self._trainee.optimizer.state.values():
                for tensor in state.values():
                    tensor.zero_()
        return True

    def admit(self, classes: int) -> None:
        """Enable the first `classes` outputs of networks with spare classes."""
        for copy in self._copies:
            copy["offset_C"][:classes] = 0.0

    def tensors(self) -> dict[str, Tensor]:
        """Live tensors, by copy and name."""
        return {f"good.{n}.{name}": tensor for n, copy in enumerate(self._copies) for name, tensor in copy.items()}

    def resized(self, count: int) -> GoodTeachers:
        """Another set, of `count` copies of the teacher as it is now: to load saved ones into."""
        other = GoodTeachers(self._trainee)
        other._copies = [self._copy() for _ in range(count)]
        return other

    def _copy(self) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in self._trainee.teacher.net.state_dict().items()}
