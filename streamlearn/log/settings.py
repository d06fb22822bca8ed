"""The settings of [log]: which log, and its bounds."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from streamlearn.schema.settings import Topic
from streamlearn.section import Secret, Section


class KafkaConfig(Section):
    """[log.kafka]: how to reach Kafka."""

    bootstrap_servers: str = "127.0.0.1:9092"
    """Comma-separated host:port."""
    group_id: str = Field("streamlearn", min_length=1)
    """Offsets are committed to this group for lag dashboards only; no group is joined."""
    replication_factor: int = Field(1, ge=1, le=10)
    """Of topics created here."""
    tls: bool | None = None
    """Encrypt connections. Not set: if a user or a file below is set."""
    ca_file: Path | None = None
    """PEM certificates of the authorities that may sign the broker's. Not set: those that the system trusts."""
    cert_file: Path | None = None
    """PEM certificate of this client, for mTLS. Files are read at each connection."""
    key_file: Path | None = None
    """Its private key. Not set: it is in cert_file."""
    username: str | None = Field(None, min_length=1)
    """User of SASL. With OAUTHBEARER the client id."""
    password: Secret = None
    """Password of SASL, or file:PATH, which is read at each connection. With OAUTHBEARER the client secret."""
    mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", "OAUTHBEARER"] = "SCRAM-SHA-512"
    """How username and password are used."""
    oauth_token_url: str | None = Field(None, pattern=r"^https?://[^\s@/?#]+[^\s@]*$")
    """OAUTHBEARER: where tokens are requested, by client credentials."""
    oauth_scope: str | None = Field(None, min_length=1)
    """OAUTHBEARER: the scope to request. Not set: none."""
    options: dict[str, Any] = Field(default_factory=dict, repr=False)
    """Passed to kafka-python unchanged, for what has no setting: ssl_check_hostname, sasl_kerberos_service_name, …"""

    @property
    def uses_tls(self) -> bool:
        """Whether connections are encrypted."""
        given = self.username or self.ca_file or self.cert_file
        return bool(given) if self.tls is None else self.tls

    @model_validator(mode="after")
    def _check(self) -> KafkaConfig:
        oauth = self.mechanism == "OAUTHBEARER"
        if (self.username is None) != (self.password is None):
            msg = "username and password must be set together"
        elif oauth and not (self.username and self.oauth_token_url):
            msg = 'mechanism = "OAUTHBEARER" needs oauth_token_url, username (client id) and password (client secret)'
        elif not oauth and (self.oauth_token_url or self.oauth_scope):
            msg = f'oauth_token_url and oauth_scope need mechanism = "OAUTHBEARER", not {self.mechanism!r}'
        elif self.key_file and not self.cert_file:
            msg = "key_file needs cert_file, the certificate of that key"
        elif self.tls is False and (self.ca_file or self.cert_file):
            msg = "ca_file and cert_file need TLS: remove tls = false, or the files"
        else:
            return self
        raise ValueError(msg)


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
