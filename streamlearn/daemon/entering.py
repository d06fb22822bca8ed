"""Before a learner begins: where the stream is entered, and whether state, config and log belong together."""

from __future__ import annotations

import json
from typing import Any

from streamlearn.config import Config
from streamlearn.daemon.wiring import StatePaths, model_spec
from streamlearn.errors import ConfigError, StateError
from streamlearn.log.base import Log
from streamlearn.records import Offsets
from streamlearn.state.checkpoint import Checkpoint, save_checkpoint


def identity(config: Config) -> dict[str, Any]:
    """What a checkpoint must agree with the config on, since weights and offsets mean nothing without it."""
    topics, model = config.log.topics, json.loads(model_spec(config).to_json())
    model["spare"] = model["spare"] is not None  # how many is no matter: fewer when a class gets its name
    return {
        "model": model,
        "classes": list(config.schema_.build().classes),
        "dtype": config.schema_.dtype,
        "method": config.learn.method,
        "optimizer": config.learn.optimizer,
        "topics": [topics.samples, topics.labels],
    }


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
    saved, wanted = checkpoint.extra["identity"], json.loads(json.dumps(identity(config)))
    # Classes may be named at the end, in the room that was left for them: the network is the same then.
    wanted["classes"] = wanted["classes"][: len(saved["classes"])]
    changed = [
        f"  {key}: saved {saved.get(key)!r}, configured {wanted[key]!r}"
        for key in wanted
        if saved.get(key) != wanted[key]
    ]
    if changed:
        way_out = "set it back, or begin anew in another state.dir"
        msg = "\n".join(
            [f"the checkpoint of step {checkpoint.step} was made with other settings; {way_out}:", *changed]
        )
        raise ConfigError(msg)


def with_new_partitions(config: Config, log: Log, next_offsets: Offsets) -> Offsets:
    """The checkpoint's offsets, and the beginning of partitions that did not exist then."""
    found: Offsets = {}
    for topic in (config.log.topics.samples, config.log.topics.labels):
        found.update(log.beginning_offsets(topic))
    return found | next_offsets


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
                    "learned: this is another log, or it lost records; restore it, or begin anew in another state.dir"
                )
                raise StateError(msg)
