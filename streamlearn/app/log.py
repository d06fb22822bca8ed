"""The log that the config names: open it, create its topics, decode its records.

Imports no torch: the supervisor needs this and stays small.
"""

from __future__ import annotations

from streamlearn.config import Config
from streamlearn.errors import ConfigError
from streamlearn.log.base import Log
from streamlearn.log.codec import Codec
from streamlearn.log.embedded import EmbeddedLog
from streamlearn.state.paths import StatePaths


def open_log(config: Config) -> Log:
    """Open the log. The first use connects to Kafka, or creates an embedded log."""
    if config.log.kind == "kafka":
        from streamlearn.log.kafka import KafkaLog  # noqa: PLC0415  importing kafka-python takes 0.2 s

        return KafkaLog(config.log.kafka, fetch_bytes=config.log.max_record_bytes)
    return EmbeddedLog(StatePaths(config.state.dir).log, max_bytes=config.log.max_bytes)


def log_exists(config: Config) -> bool:
    """Whether the log is there, for commands that must not create it: opening an embedded log does."""
    return config.log.kind == "kafka" or StatePaths(config.state.dir).log.exists()


def make_topics(log: Log, config: Config) -> None:
    """Create missing topics unless `log.partitions` is 0, and check the others.

    Raises:
        ConfigError: a topic is missing, or samples and labels are not co-partitioned.
    """
    topics = config.log.topics
    partitions = {topics.samples: config.log.partitions, topics.labels: config.log.partitions, topics.dead_letters: 1}
    missing = {topic: count for topic, count in partitions.items() if log.partition_count(topic) == 0}
    if missing and config.log.partitions == 0:
        msg = f"topics are missing: {', '.join(missing)}; create them, or set log.partitions to at least 1"
        raise ConfigError(msg)
    if missing:
        existing = {topics.samples, topics.labels} - missing.keys()
        for topic in missing.keys() & {topics.samples, topics.labels}:
            missing[topic] = log.partition_count(existing.copy().pop()) if existing else missing[topic]
        log.create_topics(missing)
    samples, labels = log.partition_count(topics.samples), log.partition_count(topics.labels)
    if samples != labels:
        msg = (
            f"{topics.samples} has {samples} partitions and {topics.labels} has {labels}: a label must be in the same "
            "partition as its sample; recreate one of them with as many"
        )
        raise ConfigError(msg)


def make_codec(config: Config) -> Codec:
    """The codec of the schema."""
    return Codec(
        config.schema_.build(),
        payload=config.schema_.payload,
        max_record_bytes=config.log.max_record_bytes,
        unknown_class=config.labels.unknown_class,
    )
