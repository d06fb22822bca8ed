"""Before a learner starts: where it starts in the log, and whether state, config and log belong together."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
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
    RegistryUnavailableError,
    StateError,
)
from streamlearn.log.base import Log
from streamlearn.log.codec import Codec
from streamlearn.records import Array, Offsets, Position
from streamlearn.schema.registry import until_available
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
    "topics": "source.samples.topic, source.labels.topic",
}
"""The settings behind the keys of `build.identity`."""
_NOT_THERE = object()
_COLUMNS = (
    "  columns can be added after the others, but not changed, moved or removed: leave the column of a field that no "
    "longer comes, which is missing from then on; a changed one is a new column with another name, at the end"
)
_ALWAYS = ("board.", "guard.", "memory.")
"""Groups of arrays that every checkpoint of this version has, under all settings."""
_ADDED = ("board.calibration.", "board.prequential.ranking.", "board.oracle.ranking.")
"""Groups among them that checkpoints of earlier versions do not have: they start empty."""


def of_all(topics: Iterable[str], ask: Callable[[str], Offsets]) -> Offsets:
    """What the log answers for all of these topics, such as `log.end_offsets`."""
    return {partition: offset for topic in topics for partition, offset in ask(topic).items()}


def of_topics(config: Config, next_offsets: Offsets) -> Offsets:
    """Offsets without those of a predictions topic that is not set any more."""
    return {tp: offset for tp, offset in next_offsets.items() if tp.topic in config.source.all_topics}


def first_checkpoint(config: Config, log: Log, paths: StatePaths) -> Checkpoint:
    """Save step 0, so that later starts know where the learner started in the log."""
    ask = log.beginning_offsets if config.log.start == "earliest" else log.end_offsets
    next_offsets = of_all(config.source.all_topics, ask)
    paths.checkpoints.mkdir(parents=True, exist_ok=True)
    checkpoint = Checkpoint(0, next_offsets, {}, {"identity": identity(config)})
    save_checkpoint(paths.checkpoints, checkpoint)
    return checkpoint


def check_model(config: Config, checkpoint: Checkpoint) -> None:
    """Refuse settings that do not fit the checkpoint, each with both values.

    Raises:
        ConfigError: a setting that the saved state depends on was changed.
    """
    saved, found = (json.loads(json.dumps(one)) for one in (checkpoint.extra.get("identity", {}), identity(config)))
    changed = _take_columns(saved.get("model", {}), found["model"])
    found["method"] = saved.get("method")  # another method can use the weights: `Learner.load_state`
    # Spare classes may have got a name: the network is the same.
    if found["classes"][: len(saved.get("classes", ()))] == saved.get("classes"):
        found["classes"] = saved["classes"]
    classes, learned = config.schema_.build().classes, checkpoint.extra.get("class_names", ())
    changed += [
        f"  schema.classes: class {index} was learned as {_shown(name)} → config {_shown(now)}; give it this name"
        for index, (name, now) in enumerate(zip(learned, classes, strict=False))
        if name != now and index >= len(saved.get("classes", ()))
    ]
    if changed := [*_differences(saved, found), *changed]:
        head = f"the checkpoint of step {checkpoint.step} was made with other settings:"
        raise ConfigError("\n".join([head, *changed, f"set them back; or {FROM_SCRATCH}"]))


def _take_columns(saved: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """Remove `columns`, and `shape`, which follows from them, from two specs; lines for what does not fit.

    Columns may be added at the end, if the network is `table`.
    """
    was, now = ({column.pop("name"): column for column in spec.pop("columns", [])} for spec in (saved, found))
    if not was and not now:
        return []
    for spec in (saved, found):
        spec.pop("shape", None)
    lines = [
        f"  columns.{name}: checkpoint {_shown(column)} → config {_shown(now.get(name, _NOT_THERE))}"
        for name, column in was.items()
        if column != now.get(name)
    ]
    if not lines and list(now)[: len(was)] != list(was):
        lines = [f"  columns: checkpoint {_shown(list(was))} → config {_shown(list(now))}"]
    if not lines and (not was or (len(now) > len(was) and found["factory"] != "table")):
        lines = [f"  columns added: {', '.join(list(now)[len(was) :])}, which only a network `table` can take"]
    return [*lines, _COLUMNS] if lines else []


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
    return of_all(config.source.all_topics, log.beginning_offsets) | of_topics(config, next_offsets)


def check_same_log(log: Log, codec: Codec, last: tuple[Position, str] | None, stopping: threading.Event) -> None:
    """Refuse a log with another sample at the last learned position: a recreated topic, or another cluster.

    Reading would continue at the old offsets, and everything before them would be skipped. `last` has position and id
    of the newest known sample. If it has left the log, or cannot be read, nothing can be checked. While the schema
    registry is away this waits, until `stopping` is set.

    Raises:
        StateError: with the position.
    """
    if last is None:
        return
    position, sample_id = last
    try:
        records = log.read(position.topic_partition, position.offset, 1)
        if not records or records[0].position != position:
            return
        found = until_available(lambda: codec.decode_sample(records[0]).sample_id, stopping)
    except (OffsetOutOfRangeError, RecordsUnreadableError, RecordError, RegistryUnavailableError):
        return
    if found != sample_id:
        msg = f"{position} holds the sample {found!r:.80}, and {sample_id!r:.80} was learned from there"
        raise StateError(f"{msg}: this is another log, or its topics were recreated; restore it, or {FROM_SCRATCH}")


def check_log_reaches(log: Log, config: Config, next_offsets: Offsets) -> None:
    """Refuse a log that ends before the records that were learned: it is another log, or it lost records.

    Raises:
        StateError: with the partition.
    """
    ends = of_all(config.source.topics, log.end_offsets)
    for tp, offset in next_offsets.items():
        if tp.topic in config.source.topics and (end := ends.get(tp, 0)) < offset:
            msg = f"{tp.topic}[{tp.partition}] ends at {end}, and {offset} records of it were learned"
            raise StateError(f"{msg}: this is another log, or it lost records; restore it, or {FROM_SCRATCH}")
