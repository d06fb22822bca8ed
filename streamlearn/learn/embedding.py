"""The embedding of a classifier: the input of its last linear layer, for methods that need more than logits.

The layer is found by shape and read by a hook, so this works for any network whose logits come from a linear layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from streamlearn.errors import ConfigError
from streamlearn.models.build import FOREIGN_ERRORS, Classifier, ModelSpec

FoundT = TypeVar("FoundT")


class Embedding:
    """Of a student and of its teacher, D wide.

    Raises:
        ConfigError: no linear layer of this network has an output for each class, or it is not run once for all rows.
    """

    def __init__(self, student: Classifier, spec: ModelSpec, *, needed_by: str) -> None:
        net, expected = student.net, f"{needed_by} needs a network that ends with a linear layer"
        linear = [(name, layer) for name, layer in net.named_modules() if isinstance(layer, nn.Linear)]
        linear = [(name, layer) for name, layer in linear if layer.out_features == spec.classes]
        if not linear:
            raise ConfigError(f"{expected} of {spec.classes} outputs, and {type(net).__name__} has none")
        self._name = linear[-1][0]
        self.width = 0
        """D."""
        student.eval()
        with torch.no_grad():
            example = student.prepare(torch.zeros((2, *spec.shape), device=student.device))
        # A network of the user's may run other layers in training, which is the mode of the student.
        for training in (True, False):
            student.train(training)
            seen = self._try(student, example)
            if len(seen) != 1 or len(seen[0]) != len(example):
                raise ConfigError(f"{expected}, and {type(net).__name__} does not run {self._name} once for all rows")
            self.width = seen[0][0].numel()

    def read(self, net: nn.Module, forward: Callable[[], FoundT]) -> tuple[FoundT, Tensor]:
        """What `forward` returns, and the embeddings (B, D) that entered the last layer of `net`, in float32.

        `net` is the student's or the teacher's, and `forward` runs it once.
        """
        found, (embedded_BD,) = self._watch(net, forward)
        return found, torch.flatten(embedded_BD.float(), start_dim=1)

    @torch.no_grad()
    def _try(self, student: Classifier, example: Tensor) -> list[Tensor]:
        """What enters the layer in a pass that changes no buffer."""
        buffers = {name: buffer.clone() for name, buffer in student.net.named_buffers()}
        try:
            return self._watch(student.net, lambda: student.logits(example, buffers))[1]
        except FOREIGN_ERRORS as error:
            raise ConfigError(f"model.factory: {type(student.net).__name__} fails in training: {error}") from error

    def _watch(self, net: nn.Module, forward: Callable[[], FoundT]) -> tuple[FoundT, list[Tensor]]:
        seen: list[Tensor] = []

        def keep(_layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen.append(inputs[0])

        handle = net.get_submodule(self._name).register_forward_pre_hook(keep)
        try:
            return forward(), seen
        finally:
            handle.remove()
