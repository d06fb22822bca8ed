"""The settings of [log]: which log, and its bounds."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from streamlearn.schema.settings import Topic
from streamlearn.section import Section


class KafkaConfig(Section):
    """[log.kafka]: how to reach Kafka."""

    bootstrap_servers: str = "127.0.0.1:9092"
    """Comma-separated host:port."""
    group_id: str = Field("streamlearn", min_length=1)
    """Offsets are committed to this group for lag dashboards only; no group is joined."""
    replication_factor: int = Field(1, ge=1, le=10)
    """Of topics created here."""
    options: dict[str, Any] = Field(default_factory=dict, repr=False)
    """Passed to kafka-python unchanged: security_protocol, sasl_mechanism, sasl_plain_username, ssl_cafile, …"""


class LogConfig(Section):
    """[log]: where records come from."""

    kind: Literal["embedded", "kafka"] = "embedded"
    """A log on this disk, or Kafka."""
    kafka: KafkaConfig = KafkaConfig()
    dead_letters: Topic = "dead-letters"
    """Topic of records that could not be decoded, with the reason in their headers."""
    partitions: int = Field(1, ge=0, le=1024)
    """Of a topic that is created here. 0: create no topics; a missing topic is an error."""
    start: Literal["earliest", "latest"] = "earliest"
    """Where a learner without a checkpoint starts."""
    on_trimmed: Literal["stop", "skip"] = "stop"
    """If retention removed records before they were read: stop, or continue at the oldest record and count the gap."""
    shed_above_records: int | None = Field(None, ge=1)
    """Load shedding: while more samples than this wait in the log, only some of those without a label are learned,
    evenly spaced. Labels are never shed. Not set: all samples wait."""
    max_bytes: int = Field(4 << 30, ge=1 << 20)
    """Embedded log: above this size the oldest records of a topic are removed, those already learned first."""
    max_record_bytes: int = Field(4 << 20, ge=64, le=64 << 20)
    """A larger record goes to the dead letters (over HTTP: 413)."""
