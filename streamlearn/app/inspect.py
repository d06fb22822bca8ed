"""`streamlearn inspect`: the content of state folder and log, also of a running daemon. Changes nothing."""

from __future__ import annotations

import base64
import codecs
import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from streamlearn.app.log import log_exists, open_log, topics_of
from streamlearn.config import Config
from streamlearn.errors import ConfigError, RecordError, StateError
from streamlearn.log.dead_letters import read_dead_letter
from streamlearn.records import Record, TopicPartition
from streamlearn.state.checkpoint import load_checkpoint, path_of, steps_in
from streamlearn.state.paths import StatePaths
from streamlearn.state.publish import PublishedDir, PublishedModel
from streamlearn.state.status import read_status

_SHOWN_BYTES = 200
"""Of a value or header, unless the whole record is requested."""


def state(config: Config) -> dict[str, Any]:
    """Heartbeat, checkpoints and published teacher as plain values."""
    paths = StatePaths(config.state.dir)
    folder = PublishedDir(paths.published)
    return {
        "state_dir": str(paths.root),
        "learner": read_status(paths.heartbeat),
        "published": _published(folder.newest),
        "pinned": _published(folder.pinned),
        "checkpoints": [_checkpoint(paths, step) for step in steps_in(paths.checkpoints)],
    }


def _published(read: Callable[[], PublishedModel | None]) -> dict[str, Any] | None:
    try:
        model = read()
    except (StateError, OSError) as error:
        return {"error": str(error)}
    return None if model is None else {"step": model.step, "published_at_s": model.published_at_s}


def _checkpoint(paths: StatePaths, step: int) -> dict[str, Any]:
    path = path_of(paths.checkpoints, step)
    try:
        checkpoint, size_bytes = load_checkpoint(path), path.stat().st_size
    except (StateError, OSError) as error:  # a running learner may have just removed it
        return {"step": step, "error": str(error)}
    return {
        "step": step,
        "size_bytes": size_bytes,
        "next_offsets": {f"{tp.topic}[{tp.partition}]": offset for tp, offset in checkpoint.next_offsets.items()},
        "accounts": checkpoint.extra.get("accounts"),
    }


def records(config: Config, topic: str, *, partition: int, offset: int | None, count: int) -> Iterator[Record]:
    """Up to `count` records of one partition, from `offset` on; the last ones without an offset.

    Raises:
        ConfigError: the topic or partition does not exist.
    """
    if not log_exists(config):
        msg = f"{StatePaths(config.state.dir).log}: there is no log yet"
        raise ConfigError(msg)
    with contextlib.closing(open_log(config)) as log:
        tp = TopicPartition(topic, partition)
        ends = log.end_offsets(topic) if log.partition_count(topic) else {}
        if tp not in ends:
            names = ", ".join(topics_of(config))
            msg = f"no {topic}[{partition}] in the log; topics are {names}"
            raise ConfigError(msg)
        begin = max(log.beginning_offsets(topic)[tp], ends[tp] - count)
        yield from log.read(tp, begin if offset is None else offset, count)


def described(config: Config, record: Record, *, whole: bool = False) -> dict[str, Any]:
    """One record as plain values; a dead letter with its reason. Long values are cut unless `whole` is set.

    Bytes that are not UTF-8 become `{"base64": …}`.
    """
    value = record.value
    shown: dict[str, Any] = {
        "position": str(record.position),
        "timestamp_ms": record.timestamp_ms,
        "key": None if record.key is None else _readable(record.key),
        "value_bytes": None if value is None else len(value),
        "value": None if value is None else _readable(value, whole=whole),
        "headers": {name: _readable(content, whole=whole) for name, content in record.headers},
    }
    if value is not None and len(value) > _SHOWN_BYTES and not whole:
        shown["value_shown_bytes"] = _SHOWN_BYTES
    if record.position.topic == config.log.dead_letters:
        with contextlib.suppress(RecordError):  # another client's record is shown unchanged
            letter = read_dead_letter(record)
            shown |= {"reason": letter.reason, "message": letter.message, "was": str(letter.record.position)}
    return shown


def _readable(data: bytes, *, whole: bool = True) -> str | dict[str, str]:
    """As text if it is UTF-8; the last character may be cut."""
    shown = data if whole else data[:_SHOWN_BYTES]
    try:
        return codecs.getincrementaldecoder("utf-8")().decode(shown, final=len(shown) == len(data))
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(shown).decode()}
