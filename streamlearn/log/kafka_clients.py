"""Clients of kafka-python: how they are configured, opened and closed, and what their errors become.

Only this module and `kafka` import kafka-python. What callers rely on (durability, offsets, isolation) is set here, and
a user may not override it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, suppress
from typing import Any, TypeVar

from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer
from kafka import errors as kafka_errors

from streamlearn.errors import ConfigError, LogError, LogUnavailableError, OffsetOutOfRangeError
from streamlearn.log.base import POLL_BYTES
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
_TOO_LARGE = (kafka_errors.MessageSizeTooLargeError, kafka_errors.RecordListTooLargeError)
_PERMANENT = (
    kafka_errors.AuthorizationError,
    kafka_errors.InvalidRecordError,
    kafka_errors.InvalidTimestampError,
    kafka_errors.InvalidTopicError,
    kafka_errors.KafkaConfigurationError,
    kafka_errors.PolicyViolationError,
    kafka_errors.SaslAuthenticationFailedError,
    kafka_errors.UnknownTopicOrPartitionError,
    kafka_errors.UnsupportedVersionError,
)
"""Errors that a retry does not fix."""

ClientT = TypeVar("ClientT")


@contextmanager
def translated(doing: str) -> Iterator[None]:
    """Turn errors of kafka-python into errors of this package: LogUnavailableError if a retry may succeed."""
    try:
        yield
    except (kafka_errors.OffsetOutOfRangeError, kafka_errors.LogTruncationError) as error:
        raise OffsetOutOfRangeError(f"{doing}: {error!r}: trimmed by retention, or never written") from error
    except _TOO_LARGE as error:
        advice = "raise the topic's max.message.bytes and log.max_record_bytes"
        raise LogError(f"{doing}: {error!r}; {advice}") from error
    except _PERMANENT as error:
        raise LogError(f"{doing}: {error!r}") from error
    except kafka_errors.KafkaError as error:
        advice = "is the broker up, and log.kafka.bootstrap_servers correct?"
        raise LogUnavailableError(f"{doing}: {error!r}; {advice}") from error


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
        self._options = settings.options
        self._max_request_bytes = max_record_bytes + FRAMING_BYTES
        self._fetch_bytes = max(1 << 20, fetch_bytes + FRAMING_BYTES)

    def producer(self, timeout_s: float) -> KafkaProducer:
        """Open an idempotent producer that waits for all replicas. Threads may share it."""
        return self._connect(
            KafkaProducer,
            timeout_s,
            **_PRODUCER,
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

    def consumer(self, fetch_wait_ms: int, timeout_s: float) -> KafkaConsumer:
        """Open a consumer without a group. One thread at a time may use it."""
        return self._connect(
            KafkaConsumer,
            timeout_s,
            **_CONSUMER,
            fetch_max_wait_ms=fetch_wait_ms,
            max_partition_fetch_bytes=self._fetch_bytes,
            fetch_max_bytes=max(POLL_BYTES, self._fetch_bytes),
        )

    def _connect(self, kind: Callable[..., ClientT], timeout_s: float, **settings: Any) -> ClientT:
        """Open a client. If it cannot connect, its threads and sockets are closed."""
        known = getattr(kind, "DEFAULT_CONFIG")  # noqa: B009 - kafka-python has no types
        merged = {
            "bootstrap_timeout_ms": int(min(timeout_s, CONNECT_TIMEOUT_S) * 1000),
            "request_timeout_ms": REQUEST_TIMEOUT_MS,
            "reconnect_backoff_max_ms": 2000,
            **settings,
            **{name: value for name, value in self._options.items() if name in known},
        }
        with translated(f"connect to {','.join(self.servers)}"), ExitStack() as opened:

            def open_net(**configs: Any) -> Any:
                return opened.enter_context(closing(known["kafka_client"](**configs)))

            try:
                client = kind(bootstrap_servers=self.servers, kafka_client=open_net, **merged)
            except (ValueError, TypeError, OSError) as error:
                raise ConfigError(f"log.kafka: {error}") from error
            opened.pop_all()
            return client


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
