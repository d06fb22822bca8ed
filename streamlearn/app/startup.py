"""Before a learner starts: where it starts in the log, and whether state, config and log belong together."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from streamlearn.app.build import identity
from streamlearn.config import Config
from streamlearn.errors import (
    FROM_SCRATCH,
    CheckpointError,
    ConfigError,
    OffsetOutOfRangeError,
    RecordError,
    RecordsUnreadableError,
    StateError,
)
from streamlearn.log.base import Log
from streamlearn.log.codec import Codec
from streamlearn.records import Array, Offsets, Position
from streamlearn.state.checkpoint import Checkpoint, save_checkpoint
from streamlearn.state.paths import StatePaths

_SETTINGS = {
    "model.shape": "schema.shape",
    "model.scale": "schema.scale",
    "model.classes": "schema.max_classes (outputs in all)",
    "model.spare": "schema.max_classes (is there room)",
    "classes": "schema.classes",
    "dtype": "schema.dtype",
    "optimizer": "learn.optimizer",
    "topics": "log.topics (samples, labels)",
}
"""The settings behind the keys of `build.identity`."""
_NOT_THERE = object()
_ALWAYS = ("board.", "guard.", "memory.")
"""Groups of arrays that every checkpoint of this version has, under all settings."""
_ADDED = ("board.calibration.", "board.prequential.ranking.", "board.oracle.ranking.")
"""Groups among them that checkpoints of earlier versions do not have: they start empty."""


def of_both(config: Config, ask: Callable[[str], Offsets]) -> Offsets:
    """What the log answers for samples and labels, such as `log.end_offsets`."""
    return ask(config.log.topics.samples) | ask(config.log.topics.labels)


def first_checkpoint(config: Config, log: Log, paths: StatePaths) -> Checkpoint:
    """Save step 0, so that later starts know where the learner started in the log."""
    next_offsets = of_both(config, log.beginning_offsets if config.log.start == "earliest" else log.end_offsets)
    paths.checkpoints.mkdir(parents=True, exist_ok=True)
    checkpoint = Checkpoint(0, next_offsets, {}, {"identity": identity(config)})
    save_checkpoint(paths.checkpoints, checkpoint)
    return checkpoint


def check_model(config: Config, checkpoint: Checkpoint) -> None:
    """Refuse settings that do not fit the checkpoint, each with both values.

    Raises:
        ConfigError: a setting that the saved state depends on was changed.
    """
    saved, found = checkpoint.extra.get("identity", {}), json.loads(json.dumps(identity(config)))
    found["method"] = saved.get("method")  # another method can use the weights: `Learner.load_state`
    # Spare classes may have got a name: the network is the same.
    if found["classes"][: len(saved.get("classes", ()))] == saved.get("classes"):
        found["classes"] = saved["classes"]
    if changed := list(_differences(saved, found)):
        head = f"the checkpoint of step {checkpoint.step} was made with other settings:"
        raise ConfigError("\n".join([head, *changed, f"set them back; or {FROM_SCRATCH}"]))


def check_arrays(built: Mapping[str, Array], checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint without the arrays that this version needs, before any state is changed.

    Other groups of arrays depend on settings, and may be missing.

    Raises:
        CheckpointError: with the missing arrays, and the way out.
    """
    needed = [name for name in built if name.startswith(_ALWAYS) and not name.startswith(_ADDED)]
    missing = sorted(name for name in needed if name not in checkpoint.arrays)
    if checkpoint.step > 0 and missing:
        shown = ", ".join(missing[:8]) + (", …" if len(missing) > 8 else "")
        msg = f"the checkpoint of step {checkpoint.step} is of another version of streamlearn: it has no {shown}"
        raise CheckpointError(f"{msg}; use the version that saved it, or {FROM_SCRATCH}")


def _differences(saved: Mapping[str, Any], found: Mapping[str, Any], above: str = "") -> Iterator[str]:
    """One line for each value that differs, with its dotted key."""
    for key in dict.fromkeys([*found, *saved]):
        was, now, name = saved.get(key, _NOT_THERE), found.get(key, _NOT_THERE), above + key
        if isinstance(was, dict) and isinstance(now, dict):
            yield from _differences(was, now, f"{name}.")
        elif was != now:
            yield f"  {_SETTINGS.get(name, name)}: checkpoint {_shown(was)} → config {_shown(now)}"


def _shown(value: object) -> str:
    return "not there" if value is _NOT_THERE else json.dumps(value, ensure_ascii=False)


def with_new_partitions(config: Config, log: Log, next_offsets: Offsets) -> Offsets:
    """The checkpoint's offsets, and the beginning of partitions that were created since."""
    return of_both(config, log.beginning_offsets) | next_offsets


def check_same_log(log: Log, codec: Codec, last: tuple[Position, str] | None) -> None:
    """Refuse a log with another sample at the last learned position: a recreated topic, or another cluster.

    Reading would continue at the old offsets, and everything before them would be skipped. `last` has position and id
    of the newest known sample. If it has left the log, or cannot be read, nothing can be checked.

    Raises:
        StateError: with the position.
    """
    if last is None:
        return
    position, sample_id = last
    try:
        records = log.read(position.topic_partition, position.offset, 1)
        found = codec.decode_sample(records[0]).sample_id if records and records[0].position == position else sample_id
    except (OffsetOutOfRangeError, RecordsUnreadableError, RecordError):
        return
    if found != sample_id:
        msg = f"{position} holds the sample {found!r:.80}, and {sample_id!r:.80} was learned from there"
        raise StateError(f"{msg}: this is another log, or its topics were recreated; restore it, or {FROM_SCRATCH}")


def check_log_reaches(log: Log, config: Config, next_offsets: Offsets) -> None:
    """Refuse a log that ends before the records that were learned: it is another log, or it lost records.

    Raises:
        StateError: with the partition.
    """
    ends = of_both(config, log.end_offsets)
    for tp, offset in next_offsets.items():
        if (end := ends.get(tp, 0)) < offset:
            msg = f"{tp.topic}[{tp.partition}] ends at {end}, and {offset} records of it were learned"
            raise StateError(f"{msg}: this is another log, or it lost records; restore it, or {FROM_SCRATCH}")
