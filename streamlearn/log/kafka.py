"""Kafka as a log, through kafka-python.

Partitions are assigned manually and read from the learner's own offsets: no group is joined, and no offset of the
broker decides what is read. `commit` still writes to a group, for lag dashboards and autoscalers.

A partition is read with reset policy "none" and isolation "read_committed": an offset that retention removed raises an
error instead of jumping, and records of aborted transactions are never returned. Offsets may therefore have gaps, so
the next offset always comes from the consumer's position, which moves past control records, never from a record.

Clients connect on first use, so a process can start while the broker is away; until then every call raises
LogUnavailableError. A consumer of kafka-python belongs to one thread at a time; threads may share the producer and the
admin client.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import structlog
from kafka import KafkaAdminClient, KafkaConsumer, OffsetAndMetadata
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
from streamlearn.log.base import MAX_RECORD_BYTES, check_partition, check_record
from streamlearn.log.kafka_clients import (
    CONNECT_TIMEOUT_S,
    CONTACT_TIMEOUT_MS,
    FRAMING_BYTES,
    REQUEST_TIMEOUT_MS,
    UNREADABLE,
    KafkaClients,
    end_consumer,
    end_producer,
    translated,
)
from streamlearn.log.kafka_writer import KafkaWriter
from streamlearn.log.lazy import LazyClient
from streamlearn.log.settings import KafkaConfig
from streamlearn.records import NewRecord, Offsets, Position, Record, TopicPartition

FETCH_WAIT_MS = 100
"""The broker's longest wait. Assigning a partition waits for the running fetch, so it must be short."""
READ_FETCH_WAIT_MS = 20
ASK_TIMEOUT_S = 10.0
COMMIT_TIMEOUT_S = 3.0
RETRY_S = 0.1
CONTACT_CHECK_S = 5.0
"""A reader that has received nothing for this long checks whether the broker answers."""
COMMIT_METADATA = "streamlearn checkpoint"

log = structlog.get_logger(__name__)
AnswerT = TypeVar("AnswerT")


class KafkaLog:
    """`Log` on an Apache Kafka cluster."""

    def __init__(
        self, settings: KafkaConfig, *, max_record_bytes: int = MAX_RECORD_BYTES, fetch_bytes: int = 1 << 20
    ) -> None:
        """At most `fetch_bytes` of a partition are fetched at once, or one record that is larger.

        Raises:
            ConfigError: an option is unknown or reserved, or the checksum module is missing.
        """
        self._clients = KafkaClients(settings, max_record_bytes=max_record_bytes, fetch_bytes=fetch_bytes)
        self._settings = settings
        self._max_record_bytes = max_record_bytes
        self._counts: dict[str, int] = {}
        self._producer = LazyClient(self._clients.producer, end_producer)
        self._admin = LazyClient(self._clients.admin, KafkaAdminClient.close)
        self._by_position = LazyClient(
            lambda timeout_s: self._clients.consumer(READ_FETCH_WAIT_MS, timeout_s), end_consumer
        )

    def _ask(self, doing: str, call: Callable[[KafkaAdminClient], AnswerT], timeout_s: float) -> AnswerT:
        """Call the admin client; retry what may go away (a leader moves, a node does not know a new topic yet)."""
        deadline = time.monotonic() + timeout_s
        with translated(doing):
            while True:
                try:
                    return call(self._admin.get(max(0.0, deadline - time.monotonic())))
                except kafka_errors.RetriableError:
                    if time.monotonic() + RETRY_S > deadline:
                        raise
                    time.sleep(RETRY_S)

    # -- topics

    def create_topics(self, partitions: Mapping[str, int]) -> None:
        """See `Log.create_topics`. A topic created here accepts records as large as `max_record_bytes`."""
        for topic, partition_count in partitions.items():
            if not self.partition_count(topic):
                self._create(topic, partition_count)
            found = self.partition_count(topic)
            if found != partition_count:
                msg = f"topic {topic} has {found} partitions, not {partition_count}: change log.partitions or the topic"
                raise ConfigError(msg)

    def _create(self, topic: str, partitions: int) -> None:
        new_topic = {
            "num_partitions": partitions,
            "replication_factor": self._settings.replication_factor,
            "configs": {"max.message.bytes": str(self._max_record_bytes + FRAMING_BYTES)},
        }

        def call(admin: KafkaAdminClient) -> None:
            with suppress(kafka_errors.TopicAlreadyExistsError):  # by another process, or by the attempt before
                admin.create_topics({topic: new_topic}, timeout_ms=REQUEST_TIMEOUT_MS)
            if not self.partition_count(topic):  # any node may answer, and some learn of a new topic later
                raise kafka_errors.KafkaTimeoutError("not visible yet; are all brokers up?")

        self._ask(f"create topic {topic}", call, ASK_TIMEOUT_S)

    def partition_count(self, topic: str, timeout_s: float = ASK_TIMEOUT_S) -> int:
        """See `Log.partition_count`."""
        count = self._counts.get(topic, 0)
        if not count:
            count = self._ask(f"look up topic {topic}", lambda admin: _count_partitions(admin, topic), timeout_s)
            self._counts[topic] = count
        return count

    def topics(self) -> list[str]:
        """See `Log.topics`."""
        names: list[str] = self._ask("list topics", lambda admin: admin.list_topics(), ASK_TIMEOUT_S)
        return sorted(name for name in names if not name.startswith("__"))

    def _check_topic(self, topic: str, timeout_s: float = ASK_TIMEOUT_S) -> int:
        partitions = self.partition_count(topic, timeout_s)
        if not partitions:
            raise LogError(f"no topic {topic} at {','.join(self._clients.servers)}: create it, or set log.partitions")
        return partitions

    def _check_access(self, topic: str, operation: str) -> None:
        """Raise LogError if the ACLs of the user do not allow an operation. Without an authorizer all are allowed."""
        doing = f"look up topic {topic}"
        (found,) = self._ask(doing, lambda admin: admin.describe_topics([topic]), ASK_TIMEOUT_S)
        allowed = found.get("authorized_operations")
        if allowed and operation not in allowed:
            has = ", ".join(sorted(allowed))
            raise LogError(f"topic {topic}: the user lacks an ACL for {operation}; the broker allows {has}")

    # -- appending

    def append(self, topic: str, records: Sequence[NewRecord], timeout_s: float = 10.0) -> list[Position]:
        """See `Appends.append`."""
        deadline = time.monotonic() + timeout_s
        for record in records:
            check_record(topic, record, record.size_bytes, self._max_record_bytes)
        self._check_topic(topic, timeout_s)
        if not records:
            self._check_access(topic, "WRITE")
            return []
        producer = self._producer.get(deadline - time.monotonic())
        try:
            with translated(f"append to {topic}"):
                futures = [
                    producer.send(
                        topic, record.value, record.key, headers=list(record.headers), timestamp_ms=record.timestamp_ms
                    )
                    for record in records
                ]
                acknowledged = [future.get(max(0.0, deadline - time.monotonic())) for future in futures]
        except LogUnavailableError:  # kafka-python 3.0.12 may never send again: see `end_producer`
            self._producer.drop(producer)
            raise
        positions = [Position(topic, done.partition, done.offset) for done in acknowledged]
        assert all(position.offset >= 0 for position in positions), positions
        return positions

    # -- reading

    def writer(self, group: str, instance: int) -> KafkaWriter:
        """See `Log.writer`. The group at the broker is `log.kafka.group_id` and the name."""
        group_id = f"{self._settings.group_id}-{group}"
        return KafkaWriter(self._clients, group_id, instance)

    def reader(self, next_offsets: Offsets) -> KafkaReader:
        """See `Log.reader`."""
        for partition in next_offsets:
            check_partition(partition, self._check_topic(partition.topic))
        for topic in {partition.topic for partition in next_offsets}:
            self._check_access(topic, "READ")
        return KafkaReader(self._clients.consumer(FETCH_WAIT_MS, CONNECT_TIMEOUT_S), next_offsets)

    def read(self, partition: TopicPartition, offset: int, max_records: int, timeout_s: float = 10.0) -> list[Record]:
        """See `Log.read`. All callers share one consumer, apart from those of readers."""
        deadline = time.monotonic() + timeout_s
        check_partition(partition, self._check_topic(partition.topic))
        doing = f"read {Position(*partition, offset)}"
        if offset < 0:
            raise OffsetOutOfRangeError(doing)
        there = KafkaPartition(*partition)
        records: list[Record] = []
        with self._by_position.alone(timeout_s) as consumer, translated(doing):
            consumer.assign([there])
            consumer.seek(there, offset)
            while (left := max_records - len(records)) > 0:
                wait_ms = max(0.0, deadline - time.monotonic()) * 1000
                try:
                    got = consumer.poll(min(wait_ms, 10 * READ_FETCH_WAIT_MS), max_records=left).get(there, [])
                except UNREADABLE as error:
                    self._by_position.drop(consumer)
                    raise RecordsUnreadableError(f"{doing}: {error!r}") from error
                records += map(_to_record, got)
                end = consumer.highwater(there)
                if end is not None and consumer.position(there, timeout_ms=wait_ms) >= end:
                    break
                if time.monotonic() > deadline:
                    if records:
                        break
                    raise LogUnavailableError(f"{doing}: no answer in {timeout_s} s; is the broker up?")
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
            f"look up offsets of {topic}",
            lambda admin: admin.list_partition_offsets(dict.fromkeys(partitions, which), timeout_ms=REQUEST_TIMEOUT_MS),
            ASK_TIMEOUT_S,
        )
        return {TopicPartition(*there): int(offset.offset) for there, offset in sorted(found.items())}

    def commit(self, next_offsets: Offsets) -> None:
        """See `Log.commit`."""
        group_id = self._settings.group_id
        offsets = {
            KafkaPartition(*partition): OffsetAndMetadata(offset, COMMIT_METADATA, -1)
            for partition, offset in next_offsets.items()
        }

        def call(admin: KafkaAdminClient) -> None:
            for there, error in admin.alter_group_offsets(group_id, offsets).items():
                if error is not kafka_errors.NoError:
                    raise error(there)

        try:
            self._ask("commit", call, COMMIT_TIMEOUT_S)
        except LogError as error:
            if isinstance(error.__cause__, kafka_errors.KafkaError) or isinstance(error, LogUnavailableError):
                log.warning("offsets_not_committed", group_id=group_id, error=str(error))
                return
            raise

    def close(self) -> None:
        """See `Log.close`."""
        for client in (self._producer, self._by_position, self._admin):
            client.close()


class KafkaReader:
    """`Reader` of a Kafka log, on a consumer of its own.

    Partitions that a poll does not name are unassigned, never paused. kafka-python 3.0.12 keeps what it fetched of a
    paused partition; after `resume` it may neither return it nor fetch again while nothing else arrives (its fetcher
    tests a slot with `is None` that may hold a drained, falsy object).
    """

    def __init__(self, consumer: KafkaConsumer, next_offsets: Offsets) -> None:
        self._consumer = consumer
        self._next_offsets = dict(next_offsets)
        """Of the unassigned partitions; for the others the consumer's position is newer."""
        self._ends: Offsets = {}
        self._assigned: set[TopicPartition] = set()
        self._heard_s = time.monotonic()

    def poll(self, partitions: Collection[TopicPartition], max_records: int, timeout_s: float) -> list[Record]:
        """See `Reader.poll`."""
        doing = f"read {', '.join(f'{topic}[{index}]' for topic, index in sorted(partitions))}"
        with translated(doing):
            self._assign(set(partitions))
            try:
                got = self._consumer.poll(timeout_s * 1000, max_records=max_records)
            except UNREADABLE as error:
                offsets = ", ".join(str(Position(*tp, offset)) for tp, offset in sorted(self.next_offsets().items()))
                raise RecordsUnreadableError(f"{doing}: {error!r}; next offsets: {offsets}") from error
        now_s = time.monotonic()
        if got:
            self._heard_s = now_s
        elif now_s - self._heard_s > CONTACT_CHECK_S:
            self._look_up_ends(self._next_offsets)  # poll does not report a broker that is away
        return [_to_record(record) for records in got.values() for record in records]

    def _assign(self, partitions: set[TopicPartition]) -> None:
        if partitions == self._assigned:
            return
        assert partitions <= self._next_offsets.keys(), partitions
        self._next_offsets = self.next_offsets()
        self._ends = self._known_ends()
        self._consumer.assign(_to_kafka(partitions))
        for partition in partitions - self._assigned:
            self._consumer.seek(KafkaPartition(*partition), self._next_offsets[partition])
        self._assigned = partitions

    def seek(self, partition: TopicPartition, offset: int) -> None:
        """See `Reader.seek`."""
        self._next_offsets[partition] = offset
        if partition in self._assigned:
            self._consumer.seek(KafkaPartition(*partition), offset)

    def next_offsets(self) -> Offsets:
        """See `Reader.next_offsets`."""
        with translated("look up positions"):
            return self._next_offsets | {
                partition: int(self._consumer.position(KafkaPartition(*partition), timeout_ms=REQUEST_TIMEOUT_MS))
                for partition in self._assigned
            }

    def end_offsets(self) -> Offsets:
        """See `Reader.end_offsets`. The end of a partition that was never fetched is looked up once."""
        ends = self._known_ends()
        unknown = self._next_offsets.keys() - ends.keys()
        if unknown:
            self._look_up_ends(unknown)
        self._ends |= ends
        return dict(self._ends)

    def _known_ends(self) -> Offsets:
        marks = {partition: self._consumer.highwater(KafkaPartition(*partition)) for partition in self._assigned}
        return self._ends | {partition: int(mark) for partition, mark in marks.items() if mark is not None}

    def _look_up_ends(self, partitions: Iterable[TopicPartition]) -> None:
        with translated("look up end offsets"):
            found = self._consumer.end_offsets(_to_kafka(partitions), timeout_ms=CONTACT_TIMEOUT_MS)
        self._ends |= {TopicPartition(*there): int(end) for there, end in found.items()}
        self._heard_s = time.monotonic()

    def close(self) -> None:
        """See `Reader.close`."""
        end_consumer(self._consumer)


def _count_partitions(admin: KafkaAdminClient, topic: str) -> int:
    (found,) = admin.describe_topics([topic])
    error = kafka_errors.for_code(found["error_code"])
    if error is kafka_errors.UnknownTopicOrPartitionError:
        return 0
    if error is not kafka_errors.NoError:
        raise error(topic)
    return len(found["partitions"])


def _to_kafka(partitions: Iterable[TopicPartition]) -> list[KafkaPartition]:
    return [KafkaPartition(*partition) for partition in partitions]


def _to_record(record: Any) -> Record:
    headers = tuple((name, value if value is not None else b"") for name, value in record.headers)
    position = Position(record.topic, record.partition, record.offset)
    return Record(position, record.timestamp, record.key, record.value, headers)
