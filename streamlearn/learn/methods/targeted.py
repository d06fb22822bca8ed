"""What methods share that hold the student against targets: a distance, and the averages that make the targets."""

from __future__ import annotations

from torch import Tensor

from streamlearn.learn.losses import Distance
from streamlearn.learn.step import Method
from streamlearn.learn.targets import Targets


class TargetedMethod(Method):
    """Remembers the averages of its targets, and nothing else."""

    def __init__(self, distance: Distance, targets: Targets) -> None:
        self._distance, self._targets = distance, targets

    def settle(self, skipped: Tensor) -> None:
        """Keep the averages of the targets."""
        self._targets.settle(skipped)

    def forget(self) -> None:
        """Averages anew."""
        self._targets.forget()

    def tensors(self) -> dict[str, Tensor]:
        """The averages of the targets."""
        return self._targets.tensors()
