"""Approximate memory of a learner, its servers and scorers, part by part, and the store on disk, for `check`.

Bounded buffers are counted as full. Cached pages of files (store, log) are not counted: the kernel reclaims them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from streamlearn.app.build import model_spec, recent_rows, replay_rows, wide_rows
from streamlearn.config import Config
from streamlearn.learn.learner import Learner
from streamlearn.learn.recent import RECENT_ROWS
from streamlearn.ledger.ledger import UNFLUSHED_BYTES
from streamlearn.log.base import POLL_BYTES
from streamlearn.log.feed import PREFETCH_BYTES, PREFETCH_RECORDS
from streamlearn.models.build import build
from streamlearn.serve.batcher import BATCH_ROWS
from streamlearn.serve.held_bytes import BODIES_IN_FLIGHT
from streamlearn.serve.scorer import FORWARD_ROWS, WRITE_BYTES

_LEARNER_BYTES = 480 << 20
"""Python, torch and other imports, without a network. Measured on Linux, with torch for the CPU."""
_SERVER_BYTES = 400 << 20
_GOOD_TEACHERS = 3
"""Two copies to roll back to, and briefly a third."""
_SAVED_COPIES = 2
"""Of everything that is saved: the arrays and the bytes of the file."""
_BATCH_COPIES = 4
"""Of the rows of a step: decoded, as a batch, and as prepared for student and teacher."""
_SERVED_TEACHERS = 3
"""The one in use, the next one, and its file."""
ID_BYTES = 1024
"""Approximate size of one known sample in the store, with its history."""


class Part(NamedTuple):
    """One part of a process's memory."""

    name: str
    size_bytes: int


def learner_parts(config: Config, learner: Learner) -> list[Part]:
    """Parts of the learner. Memory on a GPU is included."""
    schema, batch = config.schema_.build(), config.batch
    networks = {name: array.nbytes for name, array in learner.state().items()}
    student, teacher = (_starting_with(networks, name) for name in ("student.", "teacher."))
    gradients = student + _starting_with(networks, "twin.student.") + _starting_with(networks, "method.learned.")
    rows = batch.fresh + batch.labelled
    replay, recent, partitions = replay_rows(config), recent_rows(config), max(1, config.log.partitions)
    queued = schema.rows_within(PREFETCH_RECORDS, PREFETCH_BYTES // partitions)
    waiting = wide_rows(config) if config.log.shed_above_records else 0
    saved = sum(networks.values()) + 2 * teacher + (replay + recent) * schema.nbytes
    return [
        Part("Python and torch", _LEARNER_BYTES),
        Part("networks, averages, optimizer, gradients", sum(networks.values()) + gradients),
        Part("good teachers of the guard", _GOOD_TEACHERS * teacher),
        Part("activations", 2 * rows * activation_bytes(config)),
        Part(_of("replay buffer", replay, config.labels.replay_rows), replay * schema.nbytes),
        Part(_of("recent samples", recent, RECENT_ROWS), recent * schema.nbytes),
        Part(_of("read ahead", queued, PREFETCH_RECORDS), partitions * queued * schema.nbytes + POLL_BYTES),
        Part("micro-batch", (waiting + _BATCH_COPIES * rows) * schema.nbytes),
        Part("store", UNFLUSHED_BYTES),
        Part("checkpoint being saved", _SAVED_COPIES * saved),
    ]


def server_parts(config: Config, learner: Learner) -> list[Part]:
    """Parts of one server process."""
    schema, networks = config.schema_.build(), learner.state()
    teacher = _starting_with({name: array.nbytes for name, array in networks.items()}, "teacher.")
    return [
        Part("Python and torch", _SERVER_BYTES),
        Part("teachers", _SERVED_TEACHERS * teacher),
        Part("activations", BATCH_ROWS * activation_bytes(config)),
        Part("requests", BODIES_IN_FLIGHT * config.serve.max_body_bytes + 2 * BATCH_ROWS * schema.nbytes),
    ]


def horizon_parts(config: Config, samples: float) -> list[Part]:
    """Parts of the store on disk, with this many samples within `labels.horizon_s`. Memory does not depend on them."""
    kept = int(min(samples, config.labels.max_ids))
    payloads = min(kept * config.schema_.build().nbytes, config.labels.payload_max_bytes)
    return [Part("ids and their history", kept * ID_BYTES), Part("payloads", payloads)]


def scorer_parts(config: Config, learner: Learner) -> list[Part]:
    """Parts of one scorer process."""
    schema, of_server = config.schema_.build(), server_parts(config, learner)
    partitions = max(1, config.log.partitions)
    queued = schema.rows_within(PREFETCH_RECORDS, PREFETCH_BYTES // partitions)
    return [
        *of_server[:2],
        Part("activations", FORWARD_ROWS * activation_bytes(config)),
        Part(_of("read ahead", queued, PREFETCH_RECORDS), partitions * queued * schema.nbytes + POLL_BYTES),
        Part("answers", 3 * WRITE_BYTES),
    ]


def activation_bytes(config: Config) -> int:
    """Bytes of the outputs of all layers for one row."""
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
    """The name; with the number of rows that fit, if their bytes are the bound."""
    return name if rows in (0, setting) else f"{name} ({rows:,} of {setting:,} rows)"


def _starting_with(sizes: dict[str, int], prefix: str) -> int:
    return sum(size for name, size in sizes.items() if name.startswith(prefix))
