"""The log that the config names: open it, create its topics, decode its records.

Imports no torch: the supervisor needs this and stays small.
"""

from __future__ import annotations

from collections.abc import Collection
from difflib import get_close_matches

import structlog

from streamlearn.config import Config
from streamlearn.errors import ConfigError
from streamlearn.log.base import Log
from streamlearn.log.codec import Codec
from streamlearn.log.embedded import EmbeddedLog
from streamlearn.state.paths import StatePaths

_log = structlog.get_logger(__name__)
MOST_SIMILAR = 5
"""Topics that are named to a user who gave one that does not exist."""


def open_log(config: Config) -> Log:
    """Open the log. The first use connects to Kafka, or creates an embedded log."""
    if config.log.kind == "kafka":
        from streamlearn.log.kafka import KafkaLog  # noqa: PLC0415  importing kafka-python takes 0.2 s

        return KafkaLog(config.log.kafka, fetch_bytes=config.log.max_record_bytes)
    return EmbeddedLog(StatePaths(config.state.dir).log, max_bytes=config.log.max_bytes)


def log_exists(config: Config) -> bool:
    """Whether the log is there, for commands that must not create it: opening an embedded log does."""
    return config.log.kind == "kafka" or StatePaths(config.state.dir).log.exists()


def topics_of(config: Config) -> tuple[str, ...]:
    """Every topic that the config names."""
    return (*config.source.all_topics, config.log.dead_letters)


def make_topics(log: Log, config: Config) -> None:
    """Create missing topics unless `log.partitions` is 0.

    Samples and labels may have different numbers of partitions. A topic that is created here gets as many as the first
    of them that exists.

    Raises:
        ConfigError: a topic is missing.
    """
    counts = {topic: log.partition_count(topic) for topic in topics_of(config)}
    missing = [topic for topic, count in counts.items() if count == 0]
    if missing and config.log.partitions == 0:
        msg = f"topics are missing: {', '.join(missing)}; create them, or set log.partitions to at least 1"
        raise ConfigError(msg)
    if missing:
        for topic in [topic for topic in missing if topic in config.source.topics]:  # others are new at first
            if near := similar_topics(log, topic, topics_of(config)):
                _log.warning("topic_created", topic=topic, similar=near, why="none of this name; is another one meant?")
        partitions = next((counts[topic] for topic in config.source.topics if counts[topic]), config.log.partitions)
        log.create_topics({topic: 1 if topic == config.log.dead_letters else partitions for topic in missing})


def similar_topics(log: Log, wrong: str, others: Collection[str] = ()) -> list[str]:
    """Topics of the log, but for `others`, that may be meant by one that does not exist; the likeliest first."""
    return get_close_matches(wrong, [topic for topic in log.topics() if topic not in others], MOST_SIMILAR)


def make_codec(config: Config) -> Codec:
    """The codec of the schema."""
    return Codec(
        config.schema_.build(),
        config.source,
        columns=config.columns,
        max_record_bytes=config.log.max_record_bytes,
        unknown_class=config.labels.unknown_class,
    )
