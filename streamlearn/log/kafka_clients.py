"""Clients of kafka-python: how they are configured, opened and closed, and what their errors become.

What callers rely on (durability, offsets, isolation) is set here, and a user may not override it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer
from kafka import errors as kafka_errors

from streamlearn.errors import (
    ConfigError,
    LogError,
    LogUnavailableError,
    OffsetOutOfRangeError,
    WriterFencedError,
)
from streamlearn.log.base import POLL_BYTES
from streamlearn.log.kafka_security import Connections, TokenSource, hint, open_connections, security_options
from streamlearn.log.settings import KafkaConfig

FRAMING_BYTES = 64 << 10
"""Room for what Kafka adds to a record of the largest size."""
BATCH_BYTES = 256 << 10
LINGER_MS = 0
"""Callers append in groups (`serve/appender.py`), so waiting for more records only adds latency."""
CONNECT_TIMEOUT_S = 10.0
REQUEST_TIMEOUT_MS = 10_000
DELIVERY_TIMEOUT_MS = 20_000
"""An append that timed out must not reach the log minutes later."""
CONTACT_TIMEOUT_MS = 3000
TRANSACTION_TIMEOUT_MS = 15_000
"""The broker aborts a transaction that is open for longer: until then readers of its topic wait."""
CLOSE_TIMEOUT_S = 5.0
MAX_BLOCK_MS = 5000

_PRODUCER = {"acks": "all", "enable_idempotence": True, "allow_auto_create_topics": False}
_CONSUMER = {
    "group_id": None,
    "enable_auto_commit": False,
    "auto_offset_reset": "none",
    "isolation_level": "read_committed",
    "allow_auto_create_topics": False,
}
_RESERVED = {
    *_PRODUCER,
    *_CONSUMER,
    "bootstrap_servers",
    "bootstrap_timeout_ms",
    "group_instance_id",
    "kafka_client",
    "key_deserializer",
    "key_serializer",
    "partitioner",
    "transactional_id",
    "value_deserializer",
    "value_serializer",
}
"""What a user may not set: the guarantees of the log depend on it."""

UNREADABLE = (kafka_errors.CorruptRecordError, kafka_errors.UnsupportedCodecError)
"""Read errors after which a consumer must not be used again: kafka-python 3.0.12 would never return another record,
since it retries the batch that it could not decode."""
FENCED = (kafka_errors.ProducerFencedError, kafka_errors.InvalidProducerEpochError)
"""A newer producer has the transactional id."""
_TOO_LARGE = (kafka_errors.MessageSizeTooLargeError, kafka_errors.RecordListTooLargeError)
_PERMANENT = (
    kafka_errors.AuthorizationError,
    kafka_errors.InvalidRecordError,
    kafka_errors.InvalidTimestampError,
    kafka_errors.InvalidTopicError,
    kafka_errors.KafkaConfigurationError,
    kafka_errors.PolicyViolationError,
    kafka_errors.UnknownTopicOrPartitionError,
    kafka_errors.UnsupportedVersionError,
)
"""Errors that a retry does not fix."""

ClientT = TypeVar("ClientT")


def to_log_error(error: kafka_errors.KafkaError, doing: str) -> LogError:
    """Return the error of this package for one of kafka-python: LogUnavailableError if a retry may succeed."""
    if isinstance(error, (kafka_errors.OffsetOutOfRangeError, kafka_errors.LogTruncationError)):
        return OffsetOutOfRangeError(f"{doing}: {error!r}: trimmed by retention, or never written")
    if isinstance(error, FENCED):
        why = "another process writes under the same name, or the broker aborted a transaction that took too long"
        return WriterFencedError(f"{doing}: {error!r}: {why}")
    if isinstance(error, _TOO_LARGE):
        return LogError(f"{doing}: {error!r}; raise the topic's max.message.bytes and log.max_record_bytes")
    advice = hint(error)
    if isinstance(error, _PERMANENT):
        return LogError(f"{doing}: {error!r}" + (f"; {advice}" if advice else ""))
    advice = advice or "is the broker up, and are log.kafka.bootstrap_servers, tls and username correct?"
    return LogUnavailableError(f"{doing}: {error!r}; {advice}")


@contextmanager
def translated(doing: str) -> Iterator[None]:
    """Turn errors of kafka-python into errors of this package."""
    try:
        yield
    except kafka_errors.KafkaError as error:
        raise to_log_error(error, doing) from error


class KafkaClients:
    """Opens the clients of one cluster. Each method connects, within `timeout_s`.

    The methods raise LogUnavailableError if the cluster is away, and ConfigError if kafka-python rejects an option.
    """

    def __init__(self, settings: KafkaConfig, *, max_record_bytes: int, fetch_bytes: int) -> None:
        """At most `fetch_bytes` of a partition are fetched at once, or one record that is larger.

        Raises:
            ConfigError: an option is unknown or reserved, or the checksum module is missing.
        """
        _check_crc32c()
        _check_options(settings.options)
        self.servers = [server.strip() for server in settings.bootstrap_servers.split(",") if server.strip()]
        self._settings = settings
        self._tokens = TokenSource(settings) if settings.oauth_token_url else None
        self._accepted = False
        """Whether the cluster has accepted a client. A refusal after that may pass, as during a rotation of keys."""
        self._max_request_bytes = max_record_bytes + FRAMING_BYTES
        self._fetch_bytes = max(1 << 20, fetch_bytes + FRAMING_BYTES)

    def producer(self, timeout_s: float, *, transactional_id: str | None = None) -> KafkaProducer:
        """Open an idempotent producer that waits for all replicas. Threads may share it.

        With `transactional_id` it writes transactions only, and belongs to one thread.
        """
        return self._connect(
            KafkaProducer,
            timeout_s,
            **_PRODUCER,
            transactional_id=transactional_id,
            transaction_timeout_ms=TRANSACTION_TIMEOUT_MS,
            linger_ms=LINGER_MS,
            batch_size=BATCH_BYTES,
            max_block_ms=MAX_BLOCK_MS,
            delivery_timeout_ms=DELIVERY_TIMEOUT_MS,
            max_request_size=self._max_request_bytes,
        )

    def admin(self, timeout_s: float) -> KafkaAdminClient:
        """Open an admin client. Threads may share it."""
        # Most of its calls take no timeout, so an unanswered one lasts this long, also a commit while stopping.
        return self._connect(KafkaAdminClient, timeout_s, request_timeout_ms=CONTACT_TIMEOUT_MS)

    def consumer(self, fetch_wait_ms: int, timeout_s: float, *, group_id: str | None = None) -> KafkaConsumer:
        """Open a consumer that joins no group. One thread at a time may use it.

        With `group_id` it can look up the group's offsets, and waits for open transactions that move them.
        """
        return self._connect(
            KafkaConsumer,
            timeout_s,
            **{**_CONSUMER, "group_id": group_id},
            fetch_max_wait_ms=fetch_wait_ms,
            max_partition_fetch_bytes=self._fetch_bytes,
            fetch_max_bytes=max(POLL_BYTES, self._fetch_bytes),
        )

    def _connect(self, kind: Callable[..., ClientT], timeout_s: float, **settings: Any) -> ClientT:
        """Open a client. If it cannot connect, its threads and sockets are closed."""
        known = getattr(kind, "DEFAULT_CONFIG")  # noqa: B009 - kafka-python has no types
        opened: list[tuple[Any, Connections]] = []

        def open_net(**configs: Any) -> Any:
            opened.append(open_connections(self._settings, self._tokens, **configs))
            return opened[-1][0]

        try:
            merged = {
                "bootstrap_timeout_ms": int(min(timeout_s, CONNECT_TIMEOUT_S) * 1000),
                "request_timeout_ms": REQUEST_TIMEOUT_MS,
                "reconnect_backoff_max_ms": 2000,
                **settings,
                **security_options(self._settings, self._tokens),
                **{name: value for name, value in self._settings.options.items() if name in known},
            }
            client = kind(bootstrap_servers=self.servers, kafka_client=open_net, **merged)
        except (kafka_errors.KafkaError, ConfigError, ValueError, TypeError, OSError) as error:
            failure: Exception = error
            for net, manager in opened:
                failure = manager.failure or error
                net.close()
            raise self._refusal(failure) from error
        self._accepted = True
        return client

    def _refusal(self, error: Exception) -> LogError | ConfigError:
        """The error of a client that could not be opened."""
        if not isinstance(error, kafka_errors.KafkaError | ConfigError):
            return ConfigError(f"log.kafka: {error}")  # an option that kafka-python rejects
        found: LogError | ConfigError
        if isinstance(error, ConfigError):
            found = error
        else:
            found = to_log_error(error, f"connect to {','.join(self.servers)}")
            if isinstance(error, kafka_errors.SaslAuthenticationFailedError):
                found = LogError(str(found))
        return LogUnavailableError(str(found)) if self._accepted else found


def end_producer(producer: KafkaProducer) -> None:
    """Close it at once; an append that still waits fails.

    `close` alone flushes first. If that times out, kafka-python 3.0.12 leaves its thread and sockets behind. It also
    loses its producer id when a record that was sent runs out of its delivery time, and never asks for another: it then
    sends nothing and keeps every record. So a producer is closed, and replaced, once an append was not acknowledged.
    """
    sender = producer._sender  # noqa: SLF001 - the public methods cannot end a producer that hangs
    sender.force_close()
    sender.join(CLOSE_TIMEOUT_S)
    with suppress(kafka_errors.KafkaTimeoutError):
        producer.close(timeout=0)


def end_consumer(consumer: KafkaConsumer) -> None:
    """Close it within `CLOSE_TIMEOUT_S`."""
    consumer.close(autocommit=False, timeout_ms=int(CLOSE_TIMEOUT_S * 1000))


def _check_crc32c() -> None:
    """Without crc32c, kafka-python computes checksums in Python: it reads 20 times slower and does not report it."""
    try:
        import crc32c  # noqa: F401, PLC0415 - only whether it is installed
    except ImportError as error:
        raise ConfigError("the module crc32c is missing: pip install 'kafka-python[crc32c]'") from error


def _check_options(options: Mapping[str, Any]) -> None:
    known = {*KafkaConsumer.DEFAULT_CONFIG, *KafkaProducer.DEFAULT_CONFIG, *KafkaAdminClient.DEFAULT_CONFIG}
    for name in options:
        if name in _RESERVED:
            raise ConfigError(f"log.kafka.options.{name}: reserved; streamlearn sets it")
        if name not in known:
            raise ConfigError(f"log.kafka.options.{name}: kafka-python has no such option")
