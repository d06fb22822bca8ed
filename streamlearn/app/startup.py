"""Before a learner begins: where the stream is entered, and whether state, config and log belong together."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from streamlearn.app.build import identity
from streamlearn.config import Config
from streamlearn.errors import (
    ANEW,
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
"""What the operator calls what `identity` names."""
_NOT_THERE = object()
_ALWAYS = ("board.", "guard.", "memory.")
"""Groups of arrays that every checkpoint of this version has, whatever the settings."""


def first_checkpoint(config: Config, log: Log, paths: StatePaths) -> Checkpoint:
    """Save step 0, so that where the stream was entered is known for ever."""
    topics = (config.log.topics.samples, config.log.topics.labels)
    ask = log.beginning_offsets if config.log.start == "earliest" else log.end_offsets
    next_offsets = {partition: offset for topic in topics for partition, offset in ask(topic).items()}
    paths.checkpoints.mkdir(parents=True, exist_ok=True)
    checkpoint = Checkpoint(0, next_offsets, {}, {"identity": identity(config)})
    save_checkpoint(paths.checkpoints, checkpoint)
    return checkpoint


def check_model(config: Config, checkpoint: Checkpoint) -> None:
    """Refuse to go on with another model than the checkpoint's, and say what differs.

    Raises:
        ConfigError: a setting that the saved state depends on was changed.
    """
    saved, wanted = checkpoint.extra.get("identity", {}), json.loads(json.dumps(identity(config)))
    wanted["method"] = saved.get("method")  # the weights are of use to another one too: `Learner.load_state`
    # Classes may be named at the end, in the room that was left for them: the network is the same then.
    if wanted["classes"][: len(saved.get("classes", ()))] == saved.get("classes"):
        wanted["classes"] = saved["classes"]
    if changed := list(_differences(saved, wanted)):
        head = f"the checkpoint of step {checkpoint.step} was made with other settings:"
        raise ConfigError("\n".join([head, *changed, f"set them back; or {ANEW}"]))


def check_arrays(built: Mapping[str, Array], checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint that lacks what the parts of this version want to go on with, before any is changed.

    Of the others, settings decide whether they are there, and a checkpoint without them is gone on from.

    Raises:
        CheckpointError: naming what is lacking, and the way out.
    """
    lacking = sorted(name for name in built if name.startswith(_ALWAYS) and name not in checkpoint.arrays)
    if checkpoint.step > 0 and lacking:
        shown = ", ".join(lacking[:8]) + (", …" if len(lacking) > 8 else "")
        msg = f"the checkpoint of step {checkpoint.step} is of another version of streamlearn: it has no {shown}"
        raise CheckpointError(f"{msg}; go on with the version that saved it, or {ANEW}")


def _differences(saved: Mapping[str, Any], wanted: Mapping[str, Any], above: str = "") -> Iterator[str]:
    """One line for each value that differs, tables within tables by their dotted keys."""
    for key in dict.fromkeys([*wanted, *saved]):
        was, now, name = saved.get(key, _NOT_THERE), wanted.get(key, _NOT_THERE), above + key
        if isinstance(was, dict) and isinstance(now, dict):
            yield from _differences(was, now, f"{name}.")
        elif was != now:
            yield f"  {_SETTINGS.get(name, name)}: checkpoint {_shown(was)} → config {_shown(now)}"


def _shown(value: object) -> str:
    return "not there" if value is _NOT_THERE else json.dumps(value, ensure_ascii=False)


def with_new_partitions(config: Config, log: Log, next_offsets: Offsets) -> Offsets:
    """The checkpoint's offsets, and the beginning of partitions that did not exist then."""
    found: Offsets = {}
    for topic in (config.log.topics.samples, config.log.topics.labels):
        found.update(log.beginning_offsets(topic))
    return found | next_offsets


def check_same_log(log: Log, codec: Codec, last: tuple[Position, str] | None) -> None:
    """Refuse a log that has another sample where the last one stood: a topic made anew, or of another cluster.

    It would be gone on from where the old one was left, and all before that passed by. `last`: position and id of a
    sample that was learned; where it has left the log, or nobody can read it, nothing is known.

    Raises:
        StateError: naming the position.
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
        raise StateError(f"{msg}: this is another log, or its topics were made anew; restore it, or {ANEW}")


def check_log_reaches(log: Log, config: Config, next_offsets: Offsets) -> None:
    """Refuse a log that ends before what was learned from it: it is another log, or it lost records.

    Raises:
        StateError: naming the partition.
    """
    for topic in (config.log.topics.samples, config.log.topics.labels):
        ends = log.end_offsets(topic)
        for partition, offset in next_offsets.items():
            if partition.topic == topic and ends.get(partition, 0) < offset:
                msg = (
                    f"{topic}[{partition.partition}] ends at {ends.get(partition, 0)}, and {offset} records of it were "
                    f"learned: this is another log, or it lost records; restore it, or {ANEW}"
                )
                raise StateError(msg)
