"""The learner's state as named arrays: how tensors are named, compared with saved arrays, and written to."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from streamlearn.errors import CheckpointError
from streamlearn.learn.step import Trainee
from streamlearn.models.mlp import SQUARES
from streamlearn.models.normalise import RunningNorm
from streamlearn.models.table import EMBEDDINGS, FIRST_WEIGHT
from streamlearn.records import Array

OPTIONAL = ("twin.", "method.", "inputs.", "bank.", "prior.")
"""Prefixes of arrays that may be saved and not used. Earlier versions saved a bank of averages."""
_OF_COLUMNS = (".normalise.", "inputs.", FIRST_WEIGHT, SQUARES)
"""In the names of arrays with a place for each column, or for each place of a row."""


def trainee_tensors(trainee: Trainee) -> dict[str, Tensor]:
    """Live tensors of student, teacher and optimizer, by name."""
    named = {f"student.{name}": tensor for name, tensor in trainee.student.state_dict().items()}
    named |= {f"teacher.{name}": tensor for name, tensor in trainee.teacher.state_dict().items()}
    for name, parameter in trainee.student.named_parameters():
        for key, tensor in trainee.optimizer.state.get(parameter, {}).items():
            named[f"optimizer.{name}.{key}"] = tensor
    return named


def twin_tensors(twin: Trainee) -> dict[str, Tensor]:
    """The same of the twin, without the normaliser, which is the student's."""
    return {f"twin.{name}": tensor for name, tensor in trainee_tensors(twin).items() if ".normalise." not in name}


def method_tensors(trainee: Trainee) -> dict[str, Tensor]:
    """What the method keeps from step to step, its own parameters, and the optimizer's state of those."""
    method, optimizer = trainee.method, trainee.optimizer
    named = {f"method.{name}": tensor for name, tensor in method.tensors().items()}
    for name, parameter in method.parameters().items():
        named[f"method.learned.{name}"] = parameter
        for key, tensor in optimizer.state.get(parameter, {}).items():
            named[f"method.optimizer.{name}.{key}"] = tensor
    return named


def input_tensors(normalise: nn.Module) -> dict[str, Tensor]:
    """The sample of inputs that the normaliser's statistics are of."""
    kept = normalise.sample.tensors() if isinstance(normalise, RunningNorm) else {}
    return {f"inputs.{name}": tensor for name, tensor in kept.items()}


def good_tensors(copies: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Copies of good teachers, the older first."""
    return {f"good.{n}.{name}": tensor for n, copy in enumerate(copies) for name, tensor in copy.items()}


def to_array(tensor: Tensor) -> Array:
    """A copy on the host."""
    copied: Array = np.array(tensor.detach().cpu().numpy(), order="C", copy=True)
    return copied


def twin_as_student(arrays: Mapping[str, Array]) -> Mapping[str, Array]:
    """The saved twin, if there is one, as student and teacher: `supervised` is what the twin has been all along."""
    twin = {name.removeprefix("twin."): array for name, array in arrays.items() if name.startswith("twin.")}
    if not twin:
        return arrays
    others = {name: array for name, array in arrays.items() if not name.startswith(("twin.", "bank.", "method."))}
    updates, averaged_at = arrays["learner.twin_updates"], arrays["learner.twin_averaged_at"]
    # The ramp of a later method starts here: it is counted in updates, and these are the twin's.
    counts = {"updates": updates, "averaged_at": averaged_at, "ramped_at": updates}
    counts |= {"ramped_at_label": arrays["learner.labels"], "served": np.array(0, dtype=np.int64)}
    return others | twin | {f"learner.{name}": array for name, array in counts.items()}


def with_added_columns(arrays: Mapping[str, Array], tensors: Mapping[str, Tensor]) -> Mapping[str, Array]:
    """Arrays that were saved with fewer columns, completed to those of `tensors`, which are as built.

    The inputs of added columns get weights of zero, so no answer changes. Their embeddings and statistics are as built.
    """
    completed = dict(arrays)
    for name, tensor in tensors.items():
        saved = arrays.get(name)
        if saved is None and EMBEDDINGS in name and _sibling(name) in arrays:
            completed[name] = to_array(tensor)
        elif saved is not None and any(part in name for part in _OF_COLUMNS) and _is_wider(tensor, saved):
            array = completed[name] = to_array(tensor)
            if FIRST_WEIGHT in name or SQUARES in name:
                array[...] = 0
            array[tuple(slice(size) for size in saved.shape)] = saved
    return completed


def _sibling(name: str) -> str:
    """The array of the first weight that is saved wherever an embedding of this name is."""
    before, _, after = name.partition(EMBEDDINGS)
    _, _, key = after.partition(".weight")
    return f"{before}{FIRST_WEIGHT}{key}"


def _is_wider(tensor: Tensor, saved: Array) -> bool:
    """Whether the tensor has another size than the saved array in the dimension of places or columns, and a larger one.

    It is the second one, or the only one.
    """
    if tensor.dim() == 0 or tensor.dim() != saved.ndim:
        return False
    place = min(1, tensor.dim() - 1)
    wanted = [*saved.shape]
    if tensor.shape[place] <= wanted[place]:
        return False
    wanted[place] = tensor.shape[place]
    return list(tensor.shape) == wanted


def fits(arrays: Mapping[str, Array], tensors: Mapping[str, Tensor], prefix: str) -> bool:
    """Whether the saved arrays of this prefix are those of `tensors`."""
    return _signatures(tensors) == _signatures({name: a for name, a in arrays.items() if name.startswith(prefix)})


def restore(arrays: Mapping[str, Array], tensors: Mapping[str, Tensor], counts: Collection[str]) -> dict[str, int]:
    """Copy saved arrays into all of the tensors; the counts of these names, saved as `learner.*`.

    Raises:
        CheckpointError: names, shapes or dtypes differ, other than by optional arrays. No tensor was changed.
    """
    used = {name: array for name, array in arrays.items() if name in tensors or not name.startswith(OPTIONAL)}
    expected = _signatures(tensors) | {f"learner.{name}": "int64[]" for name in counts}
    if expected != (found := _signatures(used)):
        raise CheckpointError(f"learner state does not fit: {_difference(expected, found)}")
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(torch.from_numpy(np.require(used[name], requirements=["C", "W"])))
    return {name: int(used[f"learner.{name}"]) for name in counts}


def _signatures(named: Mapping[str, Array | Tensor]) -> dict[str, str]:
    return {name: f"{str(each.dtype).removeprefix('torch.')}{list(each.shape)}" for name, each in named.items()}


def _difference(expected: Mapping[str, str], found: Mapping[str, str]) -> str:
    """The first names that differ, as `name: expected …, found …`."""
    names = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    shown = [f"{name}: expected {expected.get(name, 'nothing')}, found {found.get(name, 'nothing')}" for name in names]
    return "; ".join(shown[:8]) + (f"; and {len(names) - 8} more" if len(names) > 8 else "")
