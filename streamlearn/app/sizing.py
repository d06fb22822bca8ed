"""About how much memory a learner and its servers take, part by part: for `streamlearn check`.

What is bounded by a setting or a constant is computed from it, as if it were full. Pages of files (the store's map, the
log's) are not counted: the kernel takes them back when it needs memory.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from streamlearn.app.build import memory_rows, recent_rows
from streamlearn.app.network import model_spec
from streamlearn.config import Config
from streamlearn.learn.learner import Learner
from streamlearn.ledger.ledger import UNFLUSHED_BYTES
from streamlearn.log.base import POLL_BYTES
from streamlearn.log.feed import PREFETCH_BYTES
from streamlearn.models.build import build
from streamlearn.serve.batcher import BATCH_ROWS
from streamlearn.serve.bodies import BODIES_IN_FLIGHT

_LEARNER_BYTES = 480 << 20
"""Python, torch and all that is imported, before there is a network; measured on Linux, torch for the CPU."""
_SERVER_BYTES = 400 << 20
_GOOD_TEACHERS = 3
"""Two copies to roll back to, and for a moment a third."""
_SAVED_COPIES = 2
"""Of everything that is saved: the arrays, and the bytes of the file."""
_BATCH_COPIES = 4
"""Of the rows of a step: as decoded, as a batch, as seen by the student and by the teacher."""
_SERVED_TEACHERS = 3
"""The one that answers, the one that is loaded next, and its file."""


class Part(NamedTuple):
    """One part of a process's memory."""

    name: str
    size_bytes: int


def learner_parts(config: Config, learner: Learner) -> list[Part]:
    """Parts of the learner; what is on a GPU there is not told apart."""
    schema, batch = config.schema_.build(), config.batch
    networks = {name: array.nbytes for name, array in learner.state().items()}
    student, teacher = (_starting_with(networks, name) for name in ("student.", "teacher."))
    gradients = student + _starting_with(networks, "twin.student.")
    rows = batch.fresh + batch.labelled
    memory, recent, partitions = memory_rows(config), recent_rows(config), config.log.partitions
    queued = schema.rows_within(batch.prefetch_records, PREFETCH_BYTES // partitions)
    waiting = schema.rows_within(batch.prefetch_records, PREFETCH_BYTES) if config.log.overload == "thin" else 0
    saved = sum(networks.values()) + 2 * teacher + (memory + recent) * schema.nbytes
    return [
        Part("Python and torch", _LEARNER_BYTES),
        Part("networks, averages, optimizer, gradients", sum(networks.values()) + gradients),
        Part("good teachers of the guard", _GOOD_TEACHERS * teacher),
        Part("activations", 2 * rows * activation_bytes(config)),
        Part(_of("replay buffer", memory, config.labels.memory_rows), memory * schema.nbytes),
        Part(_of("recent samples", recent, batch.recent_rows), recent * schema.nbytes),
        Part(_of("read ahead", queued, batch.prefetch_records), partitions * queued * schema.nbytes + POLL_BYTES),
        Part("micro-batch", (waiting + _BATCH_COPIES * rows) * schema.nbytes),
        Part("store", UNFLUSHED_BYTES),
        Part("checkpoint being saved", _SAVED_COPIES * saved),
    ]


def server_parts(config: Config, learner: Learner) -> list[Part]:
    """Parts of one server process."""
    schema, networks = config.schema_.build(), learner.state()
    teacher = _starting_with({name: array.nbytes for name, array in networks.items()}, "teacher.")
    rows = BATCH_ROWS
    return [
        Part("Python and torch", _SERVER_BYTES),
        Part("teachers", _SERVED_TEACHERS * teacher),
        Part("activations", rows * activation_bytes(config)),
        Part("requests", BODIES_IN_FLIGHT * config.serve.max_body_bytes + 2 * rows * schema.nbytes),
    ]


def activation_bytes(config: Config) -> int:
    """What all layers of the network put out for one row."""
    sizes: list[int] = []

    def note(_module: nn.Module, _inputs: object, output: object) -> None:
        if isinstance(output, Tensor):
            sizes.append(output.nbytes)

    network = build(model_spec(config), seed=config.learn.seed).eval()
    hooks = [module.register_forward_hook(note) for module in network.modules() if not [*module.children()]]
    try:
        with torch.no_grad():
            network(torch.zeros(2, *config.schema_.shape))
    finally:
        for hook in hooks:
            hook.remove()
    return sum(sizes) // 2


def _of(name: str, rows: int, setting: int) -> str:
    """The name; where rows are so large that their bytes are the bound, with how many there are room for."""
    return name if rows in (0, setting) else f"{name} ({rows:,} of {setting:,} rows)"


def _starting_with(sizes: dict[str, int], prefix: str) -> int:
    return sum(size for name, size in sizes.items() if name.startswith(prefix))
