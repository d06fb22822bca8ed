"""Kafka as a log, through kafka-python; the only module that imports it.

Partitions are assigned by hand and read from offsets that we keep: no group is joined, and nothing read back from the
broker decides what is read. `commit` writes to a group all the same, so that lag dashboards and scalers can see us.

A partition is read with reset policy "none" and isolation "read_committed": an offset that retention has removed raises
instead of jumping, and records of aborted transactions are never seen. Offsets may therefore have holes, so the next
offset always comes from the client's position, which moves over control records, and never from a record.

Clients connect on first use, so that a process may start while the broker is away; until it is there every call raises
LogUnavailableError. Consumers of kafka-python belong to one thread at a time, hence the locks; its producer and its
admin client may be used by all.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import structlog
from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer, OffsetAndMetadata
from kafka import TopicPartition as KafkaPartition
from kafka import errors as kafka_errors
from kafka.admin import OffsetSpec

from streamlearn.errors import (
    ConfigError,
    LogError,
    LogUnavailableError,
    OffsetOutOfRangeError,
    RecordsUnreadableError,
)
from streamlearn.log.base import POLL_BYTES
from streamlearn.log.lazy import LazyClient
from streamlearn.records import NewRecord, Offsets, Position, Record, TopicPartition

FRAMING_BYTES = 64 << 10
"""Room for what Kafka puts around a record of the largest size."""
BATCH_BYTES = 256 << 10
LINGER_MS = 5
FETCH_WAIT_MS = 100
"""The broker's longest wait. A partition that is wanted again waits for the fetch under way, so it must be short."""
READ_FETCH_WAIT_MS = 20
CONNECT_TIMEOUT_S = 10.0
ASK_TIMEOUT_S = 10.0
REQUEST_TIMEOUT_MS = 10_000
DELIVERY_TIMEOUT_MS = 20_000
"""An append that was given up must not turn up in the log minutes later.

Nor does a producer live on that has acknowledged nothing for so long. kafka-python 3.0.12, where a record that was sent
runs out of this time, forgets its producer id and never asks for another: it sends nothing any more, and keeps all that
it is given.
"""
CLOSE_TIMEOUT_S = 5.0
MAX_BLOCK_MS = 5000
COMMIT_TIMEOUT_S = 3.0
RETRY_S = 0.1
CONTACT_TIMEOUT_MS = 3000
CONTACT_CHECK_S = 5.0
"""A reader that got nothing for so long asks whether the broker is there at all."""
COMMIT_METADATA = "streamlearn checkpoint"

_OWN_OPTIONS = frozenset(
    {
        "acks",
        "allow_auto_create_topics",
        "auto_offset_reset",
        "bootstrap_servers",
        "bootstrap_timeout_ms",
        "enable_auto_commit",
        "enable_idempotence",
        "group_id",
        "group_instance_id",
        "isolation_level",
        "kafka_client",
        "key_deserializer",
        "key_serializer",
        "partitioner",
        "transactional_id",
        "value_deserializer",
        "value_serializer",
    }
)
"""What a user may not set: the promises of this module rest on them."""

_TOO_LARGE = (kafka_errors.MessageSizeTooLargeError, kafka_errors.RecordListTooLargeError)
_UNREADABLE = (kafka_errors.CorruptRecordError, kafka_errors.UnsupportedCodecError)
"""Errors of reading, after which the consumer must not be asked again: kafka-python 3.0.12 would never answer, since it
goes on with the batch that it could not decode."""
_REFUSED = (
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
"""Errors that asking again does not cure."""
_PRODUCER_BROKEN = (
    kafka_errors.IllegalStateError,
    kafka_errors.InvalidProducerEpochError,
    kafka_errors.InvalidProducerIdMappingError,
    kafka_errors.OutOfOrderSequenceNumberError,
    kafka_errors.ProducerFencedError,
    kafka_errors.UnknownProducerIdError,
)
"""Errors after which an idempotent producer is of no more use."""

log = structlog.get_logger(__name__)
ClientT = TypeVar("ClientT")
AnswerT = TypeVar("AnswerT")


def _translate(error: kafka_errors.KafkaError, doing: str) -> LogError:
    if isinstance(error, (kafka_errors.OffsetOutOfRangeError, kafka_errors.LogTruncationError)):
        return OffsetOutOfRangeError(f"{doing}: {error!r}: trimmed by retention, or never written")
    if isinstance(error, _TOO_LARGE):
        return LogError(f"{doing}: {error!r}; raise the topic's max.message.bytes and log.max_record_bytes")
    if isinstance(error, _REFUSED):
        return LogError(f"{doing}: {error!r}")
    return LogUnavailableError(f"{doing}: {error!r}; is the broker up, and log.kafka.bootstrap_servers right?")


@contextmanager
def _translated(doing: str) -> Iterator[None]:
    try:
        yield
    except kafka_errors.KafkaError as error:
        raise _translate(error, doing) from error


def _to_kafka(partitions: Iterable[TopicPartition]) -> list[KafkaPartition]:
    return [KafkaPartition(*partition) for partition in partitions]


def _to_record(record: Any) -> Record:
    headers = tuple((name, value if value is not None else b"") for name, value in record.headers)
    position = Position(record.topic, record.partition, record.offset)
    return Record(position, record.timestamp, record.key, record.value, headers)


class KafkaLog:
    """`Log` on an Apache Kafka cluster."""

    def __init__(
        self,
        bootstrap_servers: str,
        *,
        group_id: str,
        replication_factor: int = 1,
        options: Mapping[str, Any] | None = None,
        max_record_bytes: int,
        fetch_bytes: int = 1 << 20,
    ) -> None:
        """Connects to nothing yet. At most `fetch_bytes` of a partition come at once, or one record that is larger.

        `options` go to kafka-python as they are, to each client that knows them.

        Raises:
            ConfigError: an option is unknown or not the user's to set, or the checksum module is missing.
        """
        _check_crc32c()
        self._options = dict(options or {})
        _check_options(self._options)
        self._servers = [server.strip() for server in bootstrap_servers.split(",") if server.strip()]
        self._group_id = group_id
        self._replication_factor = replication_factor
        self._max_record_bytes = max_record_bytes
        self._fetch_bytes = max(1 << 20, fetch_bytes + FRAMING_BYTES)
        self._counts: dict[str, int] = {}
        self._producer = LazyClient(self._make_producer, _end_producer)
        self._failing: tuple[KafkaProducer, float, int] | None = None
        """The producer that failed, when the first of its appends began that did, and how many did with none
        acknowledged between."""
        self._admin = LazyClient(self._make_admin, KafkaAdminClient.close)
        self._by_position = LazyClient(
            lambda timeout_s: self._make_consumer(READ_FETCH_WAIT_MS, timeout_s), _end_consumer
        )

    # -- clients

    def _connect(self, kind: Callable[..., ClientT], timeout_s: float, **settings: Any) -> ClientT:
        """Make a client; one that could not connect is closed, threads and all."""
        known = getattr(kind, "DEFAULT_CONFIG")  # noqa: B009 - kafka-python has no types
        nets: list[Any] = []

        def remember(**configs: Any) -> Any:
            nets.append(known["kafka_client"](**configs))
            return nets[-1]

        merged = {
            "bootstrap_timeout_ms": int(min(timeout_s, CONNECT_TIMEOUT_S) * 1000),
            "request_timeout_ms": REQUEST_TIMEOUT_MS,
            "reconnect_backoff_max_ms": 2000,
            **settings,
            **{name: value for name, value in self._options.items() if name in known},
        }
        try:
            return kind(bootstrap_servers=self._servers, kafka_client=remember, **merged)
        except kafka_errors.KafkaError as error:
            for net in nets:
                net.close()
            raise _translate(error, f"connect to {','.join(self._servers)}") from error
        except (ValueError, TypeError, OSError) as error:
            for net in nets:
                net.close()
            msg = f"log.kafka: {error}"
            raise ConfigError(msg) from error

    def _make_producer(self, timeout_s: float) -> KafkaProducer:
        return self._connect(
            KafkaProducer,
            timeout_s,
            acks="all",
            enable_idempotence=True,
            linger_ms=LINGER_MS,
            batch_size=BATCH_BYTES,
            max_block_ms=MAX_BLOCK_MS,
            delivery_timeout_ms=DELIVERY_TIMEOUT_MS,
            max_request_size=self._max_record_bytes + FRAMING_BYTES,
            allow_auto_create_topics=False,
        )

    def _make_admin(self, timeout_s: float) -> KafkaAdminClient:
        # Most of its calls take no timeout, so one that nobody answers lasts this long, a commit during a stop too.
        return self._connect(KafkaAdminClient, timeout_s, request_timeout_ms=CONTACT_TIMEOUT_MS)

    def _make_consumer(self, fetch_wait_ms: int, timeout_s: float) -> KafkaConsumer:
        return self._connect(
            KafkaConsumer,
            timeout_s,
            group_id=None,
            enable_auto_commit=False,
            auto_offset_reset="none",
            isolation_level="read_committed",
            allow_auto_create_topics=False,
            fetch_max_wait_ms=fetch_wait_ms,
            max_partition_fetch_bytes=self._fetch_bytes,
            fetch_max_bytes=max(POLL_BYTES, self._fetch_bytes),
        )

    def _ask(self, doing: str, call: Callable[[KafkaAdminClient], AnswerT], timeout_s: float) -> AnswerT:
        """Ask by the admin client; what may pass (a leader moves, a node knows no new topic yet) is asked again."""
        deadline = time.monotonic() + timeout_s
        with _translated(doing):
            while True:
                try:
                    return call(self._admin.get(max(0.0, deadline - time.monotonic())))
                except kafka_errors.RetriableError:
                    if time.monotonic() + RETRY_S > deadline:
                        raise
                    time.sleep(RETRY_S)

    # -- topics

    def create_topics(self, partitions: Mapping[str, int]) -> None:
        """See `Log.create_topics`. A topic made here takes records as large as the settings allow."""
        for topic, wanted in partitions.items():
            if not self.partition_count(topic):
                self._create(topic, wanted)
            count = self.partition_count(topic)
            if count != wanted:
                msg = f"topic {topic} has {count} partitions, wanted {wanted}: change log.partitions or the topic"
                raise ConfigError(msg)

    def _create(self, topic: str, partitions: int) -> None:
        wanted = {
            "num_partitions": partitions,
            "replication_factor": self._replication_factor,
            "configs": {"max.message.bytes": str(self._max_record_bytes + FRAMING_BYTES)},
        }

        def call(admin: KafkaAdminClient) -> None:
            with suppress(kafka_errors.TopicAlreadyExistsError):  # another process was faster
                admin.create_topics({topic: wanted}, timeout_ms=REQUEST_TIMEOUT_MS)

        doing = f"create topic {topic}"
        self._ask(doing, call, ASK_TIMEOUT_S)
        deadline = time.monotonic() + ASK_TIMEOUT_S
        while not self.partition_count(topic):  # each node learns of it in its own time, and any of them is asked
            if time.monotonic() > deadline:
                msg = f"{doing}: not seen for {ASK_TIMEOUT_S:g} s; are all brokers up?"
                raise LogUnavailableError(msg)
            time.sleep(RETRY_S)

    def partition_count(self, topic: str) -> int:
        """See `Log.partition_count`."""
        return self._count(topic, ASK_TIMEOUT_S)

    def _count(self, topic: str, timeout_s: float) -> int:
        def call(admin: KafkaAdminClient) -> int:
            (found,) = admin.describe_topics([topic])
            error = kafka_errors.for_code(found["error_code"])
            if error is kafka_errors.UnknownTopicOrPartitionError:
                return 0
            if error is not kafka_errors.NoError:
                raise error(topic)
            return len(found["partitions"])

        if topic not in self._counts:
            count = self._ask(f"look up topic {topic}", call, timeout_s)
            if count == 0:
                return 0
            self._counts[topic] = count
        return self._counts[topic]

    def _check_topic(self, topic: str, timeout_s: float = ASK_TIMEOUT_S) -> int:
        partitions = self._count(topic, timeout_s)
        if not partitions:
            msg = f"no topic {topic} at {','.join(self._servers)}: create it, or set log.partitions"
            raise LogError(msg)
        return partitions

    # -- appending

    def append(self, topic: str, records: Sequence[NewRecord], timeout_s: float = 10.0) -> list[Position]:
        """See `Log.append`."""
        began_s = time.monotonic()
        deadline = began_s + timeout_s
        for record in records:
            self._check_record(topic, record)
        self._check_topic(topic, timeout_s)
        producer = self._working_producer(deadline)
        try:
            futures = [
                producer.send(
                    topic, record.value, record.key, headers=list(record.headers), timestamp_ms=record.timestamp_ms
                )
                for record in records
            ]
            acknowledged = [future.get(max(0.0, deadline - time.monotonic())) for future in futures]
        except kafka_errors.KafkaError as error:
            failure = _translate(error, f"append to {topic}")
            if isinstance(error, _PRODUCER_BROKEN):
                self._producer.drop(producer)
            elif isinstance(failure, LogUnavailableError):
                self._note_failure(producer, began_s)
            raise failure from error
        self._failing = None
        positions = [Position(topic, done.partition, done.offset) for done in acknowledged]
        assert all(position.offset >= 0 for position in positions), positions
        return positions

    def _working_producer(self, deadline: float) -> KafkaProducer:
        producer = self._producer.get(deadline - time.monotonic())
        failing, since_s, failures = self._failing or (None, 0.0, 0)  # read once: other threads write it
        silent_s = time.monotonic() - since_s
        if failing is not producer or failures < 2 or silent_s < DELIVERY_TIMEOUT_MS / 1000:
            return producer
        log.warning("producer_given_up", silent_s=round(silent_s, 1))
        self._producer.drop(producer)
        return self._producer.get(deadline - time.monotonic())

    def _note_failure(self, producer: KafkaProducer, began_s: float) -> None:
        failing, since_s, failures = self._failing or (None, 0.0, 0)
        # One failure is none: there may have been nothing to append since, for hours.
        self._failing = (producer, since_s, failures + 1) if failing is producer else (producer, began_s, 1)

    def _check_record(self, topic: str, record: NewRecord) -> None:
        if record.key is None and record.value is None:
            msg = f"{topic}: a record needs a key or a value"
            raise LogError(msg)
        headers = sum(len(name) + len(value) for name, value in record.headers)
        size_bytes = len(record.key or b"") + len(record.value or b"") + headers
        if size_bytes > self._max_record_bytes:
            msg = f"{topic}: a record of {size_bytes} bytes, at most {self._max_record_bytes} are taken"
            raise LogError(msg)

    # -- reading

    def reader(self, next_offsets: Offsets) -> KafkaReader:
        """See `Log.reader`."""
        for partition in next_offsets:
            self._check_partition(partition)
        return KafkaReader(self._make_consumer(FETCH_WAIT_MS, CONNECT_TIMEOUT_S), next_offsets)

    def _check_partition(self, partition: TopicPartition) -> None:
        partitions = self._check_topic(partition.topic)
        if not 0 <= partition.partition < partitions:
            msg = f"{partition.topic} has no partition {partition.partition}, only {partitions}"
            raise LogError(msg)

    def read(self, partition: TopicPartition, offset: int, max_records: int, timeout_s: float = 10.0) -> list[Record]:
        """See `Log.read`. On a consumer of its own, that all callers share."""
        deadline = time.monotonic() + timeout_s
        self._check_partition(partition)
        doing = f"read {Position(*partition, offset)}"
        if offset < 0:
            raise OffsetOutOfRangeError(doing)
        there = KafkaPartition(*partition)
        records: list[Record] = []
        with self._by_position.alone(timeout_s) as consumer, _translated(doing):
            consumer.assign([there])
            consumer.seek(there, offset)
            while (left := max_records - len(records)) > 0:
                wait_ms = max(0.0, deadline - time.monotonic()) * 1000
                try:
                    got = consumer.poll(min(wait_ms, 10 * READ_FETCH_WAIT_MS), max_records=left).get(there, [])
                except _UNREADABLE as error:
                    self._by_position.spoilt()
                    raise RecordsUnreadableError(f"{doing}: {error!r}") from error
                records += map(_to_record, got)
                end = consumer.highwater(there)
                if end is not None and consumer.position(there, timeout_ms=wait_ms) >= end:
                    break
                if time.monotonic() > deadline:
                    if records:
                        break
                    msg = f"{doing}: no answer in {timeout_s} s; is the broker up?"
                    raise LogUnavailableError(msg)
        return records

    def beginning_offsets(self, topic: str) -> Offsets:
        """See `Log.beginning_offsets`."""
        return self._offsets(topic, OffsetSpec.EARLIEST)

    def end_offsets(self, topic: str) -> Offsets:
        """See `Log.end_offsets`."""
        return self._offsets(topic, OffsetSpec.LATEST)

    def _offsets(self, topic: str, which: OffsetSpec) -> Offsets:
        partitions = [KafkaPartition(topic, index) for index in range(self._check_topic(topic))]
        found = self._ask(
            f"ask for offsets of {topic}",
            lambda admin: admin.list_partition_offsets(dict.fromkeys(partitions, which), timeout_ms=REQUEST_TIMEOUT_MS),
            ASK_TIMEOUT_S,
        )
        return {TopicPartition(*there): int(offset.offset) for there, offset in sorted(found.items())}

    def commit(self, next_offsets: Offsets) -> None:
        """See `Log.commit`. A failure is logged and not raised: only lag displays miss it."""
        wanted = {
            KafkaPartition(*partition): OffsetAndMetadata(offset, COMMIT_METADATA, -1)
            for partition, offset in next_offsets.items()
        }

        def call(admin: KafkaAdminClient) -> None:
            for there, error in admin.alter_group_offsets(self._group_id, wanted).items():
                if error is not kafka_errors.NoError:
                    raise error(there)

        try:
            self._ask("commit", call, COMMIT_TIMEOUT_S)
        except LogError as error:
            if isinstance(error.__cause__, kafka_errors.KafkaError) or isinstance(error, LogUnavailableError):
                log.warning("offsets_not_committed", group_id=self._group_id, error=str(error))
                return
            raise

    def close(self) -> None:
        """See `Log.close`."""
        for client in (self._producer, self._by_position, self._admin):
            client.close()


class KafkaReader:
    """`Reader` of a Kafka log, on a consumer of its own.

    Partitions that are not wanted are unassigned, never paused: kafka-python 3.0.12 keeps what it had fetched of a
    paused partition, and after `resume` neither hands it out nor fetches anew, if nothing else comes in meanwhile (its
    fetcher asks whether the in-line slot `is None` where it may hold a drained, falsy object).
    """

    def __init__(self, consumer: KafkaConsumer, next_offsets: Offsets) -> None:
        self._consumer = consumer
        self._next_offsets = dict(next_offsets)
        """Of partitions that are not assigned now; the consumer knows the others better."""
        self._ends: Offsets = {}
        self._assigned: set[TopicPartition] = set()
        self._heard_s = time.monotonic()

    def poll(self, wanted: Collection[TopicPartition], max_records: int, timeout_s: float) -> list[Record]:
        """See `Reader.poll`."""
        doing = f"read {', '.join(f'{topic}[{index}]' for topic, index in sorted(wanted))}"
        with _translated(doing):
            self._assign(set(wanted))
            try:
                got = self._consumer.poll(timeout_s * 1000, max_records=max_records)
            except _UNREADABLE as error:
                asked = ", ".join(str(Position(*tp, offset)) for tp, offset in sorted(self.next_offsets().items()))
                raise RecordsUnreadableError(f"{doing}: {error!r}; next to be read: {asked}") from error
        now_s = time.monotonic()
        if got:
            self._heard_s = now_s
        elif now_s - self._heard_s > CONTACT_CHECK_S:
            self._ask(self._next_offsets)  # the client is silent about a broker that is away
        return [_to_record(record) for records in got.values() for record in records]

    def _assign(self, wanted: set[TopicPartition]) -> None:
        if wanted == self._assigned:
            return
        assert wanted <= self._next_offsets.keys(), wanted
        self._next_offsets = self.next_offsets()
        self._ends = self._known_ends()
        self._consumer.assign(_to_kafka(wanted))
        for partition in wanted - self._assigned:
            self._consumer.seek(KafkaPartition(*partition), self._next_offsets[partition])
        self._assigned = wanted

    def seek(self, partition: TopicPartition, offset: int) -> None:
        """See `Reader.seek`."""
        self._next_offsets[partition] = offset
        if partition in self._assigned:
            self._consumer.seek(KafkaPartition(*partition), offset)

    def next_offsets(self) -> Offsets:
        """See `Reader.next_offsets`."""
        with _translated("ask for positions"):
            return self._next_offsets | {
                partition: int(self._consumer.position(KafkaPartition(*partition), timeout_ms=REQUEST_TIMEOUT_MS))
                for partition in self._assigned
            }

    def end_offsets(self) -> Offsets:
        """See `Reader.end_offsets`. A partition that was never fetched is asked for once."""
        ends = self._known_ends()
        unknown = self._next_offsets.keys() - ends.keys()
        if unknown:
            self._ask(unknown)
        self._ends |= ends
        return dict(self._ends)

    def _known_ends(self) -> Offsets:
        marks = {partition: self._consumer.highwater(KafkaPartition(*partition)) for partition in self._assigned}
        return self._ends | {partition: int(mark) for partition, mark in marks.items() if mark is not None}

    def _ask(self, partitions: Iterable[TopicPartition]) -> None:
        with _translated("ask for end offsets"):
            found = self._consumer.end_offsets(_to_kafka(partitions), timeout_ms=CONTACT_TIMEOUT_MS)
        self._ends |= {TopicPartition(*there): int(end) for there, end in found.items()}
        self._heard_s = time.monotonic()

    def close(self) -> None:
        """See `Reader.close`."""
        _end_consumer(self._consumer)


def _end_producer(producer: KafkaProducer) -> None:
    """End it at once; an append that is still waited for fails.

    `close` alone flushes first; where that runs out of time kafka-python 3.0.12 leaves its thread and sockets behind.
    """
    sender = producer._sender  # noqa: SLF001 - what is public cannot end a producer that is stuck
    sender.force_close()
    sender.join(CLOSE_TIMEOUT_S)
    with suppress(kafka_errors.KafkaTimeoutError):
        producer.close(timeout=0)


def _end_consumer(consumer: KafkaConsumer) -> None:
    consumer.close(autocommit=False, timeout_ms=int(CLOSE_TIMEOUT_S * 1000))


def _check_crc32c() -> None:
    """Without it kafka-python computes checksums in Python, and nobody is told that it reads 20 times slower."""
    try:
        import crc32c  # noqa: F401, PLC0415 - only whether it is there
    except ImportError as error:
        msg = "the module crc32c is missing: pip install 'kafka-python[crc32c]'"
        raise ConfigError(msg) from error


def _check_options(options: Mapping[str, Any]) -> None:
    known = {*KafkaConsumer.DEFAULT_CONFIG, *KafkaProducer.DEFAULT_CONFIG, *KafkaAdminClient.DEFAULT_CONFIG}
    for name in options:
        if name in _OWN_OPTIONS:
            msg = f"log.kafka.options.{name}: not to be set, streamlearn sets it itself"
            raise ConfigError(msg)
        if name not in known:
            msg = f"log.kafka.options.{name}: kafka-python knows no such option"
            raise ConfigError(msg)
