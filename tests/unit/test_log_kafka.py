"""What the Kafka log does beyond the contract: options, transactions, lag, and a broker that stops."""

from __future__ import annotations

import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from kafka import KafkaAdminClient, KafkaProducer
from kafka import errors as kafka_errors
from structlog.testing import capture_logs

from streamlearn.errors import (
    ConfigError,
    LogError,
    LogUnavailableError,
    OffsetOutOfRangeError,
    RecordsUnreadableError,
)
from streamlearn.lab.broker import SHORT_LIVED, Broker, java_command
from streamlearn.log import kafka as kafka_log
from streamlearn.log.kafka import KafkaLog
from streamlearn.log.kafka_clients import translated
from streamlearn.log.settings import KafkaConfig
from streamlearn.records import NewRecord, Position, Record, TopicPartition


def nowhere(**settings: Any) -> KafkaLog:
    """A log at an address without a broker."""
    return KafkaLog(KafkaConfig(bootstrap_servers="127.0.0.1:1", **settings))


@pytest.fixture
def open_log(kafka_broker: str) -> Iterator[Callable[..., KafkaLog]]:
    """Open logs on the shared broker; close them after the test."""
    logs: list[KafkaLog] = []

    def open_one(*, max_record_bytes: int = 1 << 20, **settings: Any) -> KafkaLog:
        settings = {"bootstrap_servers": kafka_broker, "group_id": unique("group"), **settings}
        logs.append(KafkaLog(KafkaConfig(**settings), max_record_bytes=max_record_bytes))
        return logs[-1]

    yield open_one
    for log in logs:
        log.close()


def unique(name: str) -> str:
    return f"{name}-{uuid.uuid4().hex[:12]}"


def topic_of(log: KafkaLog, partitions: int = 1) -> str:
    """A new topic."""
    name = unique("topic")
    log.create_topics({name: partitions})
    return name


class TestConstruction:
    """What is checked before anything connects."""

    def test_a_missing_checksum_module_is_an_error_that_names_the_fix(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Without it kafka-python reads 20 times slower, silently."""
        monkeypatch.setitem(sys.modules, "crc32c", None)

        with pytest.raises(ConfigError, match=r"pip install 'kafka-python\[crc32c\]'"):
            nowhere()

    @pytest.mark.parametrize("name", ["acks", "auto_offset_reset", "enable_auto_commit", "group_id", "isolation_level"])
    def test_options_that_guarantees_depend_on_are_reserved(self, name: str) -> None:
        """They are refused, not ignored."""
        with pytest.raises(ConfigError, match=rf"options\.{name}: reserved"):
            nowhere(options={name: "x"})

    def test_an_unknown_option_is_named(self) -> None:
        """A misspelt `security_protocol` must not mean plain text."""
        with pytest.raises(ConfigError, match="security_protokoll: kafka-python has no such option"):
            nowhere(options={"security_protokoll": "SSL"})

    def test_nothing_connects_before_the_first_use(self) -> None:
        """So that a process can start while the broker is away."""
        before = threading.active_count()

        log = nowhere()

        assert threading.active_count() == before
        log.close()

    def test_a_missing_broker_is_unavailable_in_time_and_leaves_no_thread(self) -> None:
        """Each call ends within its timeout, and the next tries again."""
        before = threading.active_count()
        log = nowhere()
        began = time.monotonic()

        for _ in range(2):
            with pytest.raises(LogUnavailableError, match=r"127\.0\.0\.1:1.*bootstrap_servers"):
                log.append("t", [NewRecord(b"k", b"v")], timeout_s=0.5)

        assert time.monotonic() - began < 5.0
        log.close()
        assert threading.active_count() == before


@pytest.mark.parametrize(
    ("error", "becomes"),
    [
        (kafka_errors.OffsetOutOfRangeError(), OffsetOutOfRangeError),
        (kafka_errors.KafkaTimeoutError(), LogUnavailableError),
        (kafka_errors.KafkaConnectionError(), LogUnavailableError),
        (kafka_errors.NotEnoughReplicasError(), LogUnavailableError),
        (kafka_errors.MessageSizeTooLargeError(), LogError),
        (kafka_errors.TopicAuthorizationFailedError(), LogError),
        (kafka_errors.SaslAuthenticationFailedError(), LogUnavailableError),
        (kafka_errors.UnknownTopicOrPartitionError(), LogError),
    ],
)
def test_errors_of_kafka_python_become_log_errors(error: kafka_errors.KafkaError, becomes: type[LogError]) -> None:
    """LogUnavailableError only if a retry may succeed."""
    with pytest.raises(LogError) as raised, translated("append"):
        raise error

    assert type(raised.value) is becomes


@pytest.mark.kafka
class TestBroker:
    """Against the shared broker."""

    @pytest.mark.parametrize("codec", ["gzip", "lz4", "snappy", "zstd"])
    def test_an_option_goes_to_the_clients_that_have_it(self, open_log: Callable[..., KafkaLog], codec: str) -> None:
        """Only the producer has `compression_type`; the consumer reads every codec."""
        log = open_log(options={"compression_type": codec, "client_id": "streamlearn-test"})
        topic = topic_of(log)

        (position,) = log.append(topic, [NewRecord(b"k", bytes(100_000))])

        assert log.read(position.topic_partition, 0, 1)[0].value == bytes(100_000)

    def test_an_option_of_the_wrong_kind_is_a_configuration_error(self, open_log: Callable[..., KafkaLog]) -> None:
        """Raised on first use, with the message of kafka-python."""
        log = open_log(options={"compression_type": "rar"})
        topic = topic_of(log)

        with pytest.raises(ConfigError, match="rar"):
            log.append(topic, [NewRecord(b"k", b"v")])

    def test_a_topic_created_here_accepts_records_of_the_largest_size(self, open_log: Callable[..., KafkaLog]) -> None:
        """Kafka's own default is 1 MiB."""
        log = open_log(max_record_bytes=4 << 20)
        topic = topic_of(log)

        (position,) = log.append(topic, [NewRecord(b"", bytes(4 << 20))])

        assert len(log.read(position.topic_partition, 0, 1)[0].value or b"") == 4 << 20

    def test_a_record_too_large_for_the_topic_is_refused_permanently(self, open_log: Callable[..., KafkaLog]) -> None:
        """The message names both limits."""
        topic = topic_of(open_log())

        with pytest.raises(LogError, match=r"max\.message\.bytes") as raised:
            open_log(max_record_bytes=4 << 20).append(topic, [NewRecord(b"", bytes(3 << 20))])

        assert not isinstance(raised.value, LogUnavailableError)

    def test_records_of_aborted_transactions_are_skipped(
        self, open_log: Callable[..., KafkaLog], kafka_broker: str
    ) -> None:
        """Control records too; the next offset is past them, so nothing is read twice."""
        log = open_log()
        topic = topic_of(log)
        partition = TopicPartition(topic, 0)
        producer = KafkaProducer(bootstrap_servers=kafka_broker, transactional_id=unique("tx"))
        producer.init_transactions()
        for value, end in ((b"kept", "commit"), (b"aborted", "abort"), (b"also kept", "commit")):
            producer.begin_transaction()
            producer.send(topic, value).get(timeout=20)
            getattr(producer, f"{end}_transaction")()
        producer.close()
        reader = log.reader({partition: 0})

        records = poll_until(lambda: reader.poll([partition], 10, 0.5), 2)
        while reader.next_offsets() != {partition: 6}:
            assert reader.poll([partition], 10, 0.2) == []

        assert [record.value for record in records] == [b"kept", b"also kept"]
        assert [record.position.offset for record in records] == [0, 4]
        assert [record.value for record in log.read(partition, 0, 10)] == [b"kept", b"also kept"]
        assert log.read(partition, 5, 10) == []
        reader.close()

    def test_a_commit_is_seen_by_lag_tools(self, open_log: Callable[..., KafkaLog], kafka_broker: str) -> None:
        """Under the group's name, with metadata that names the writer."""
        group = unique("group")
        log = open_log(group_id=group)
        topic = topic_of(log)
        log.append(topic, [NewRecord(b"k", b"v")] * 5)

        with capture_logs() as lines:
            log.commit({TopicPartition(topic, 0): 3})

        assert lines == []
        with KafkaAdminClient(bootstrap_servers=kafka_broker) as admin:
            (committed,) = admin.list_group_offsets(group)[group].values()
        assert committed.offset == 3
        assert committed.metadata == kafka_log.COMMIT_METADATA

    def test_a_commit_that_fails_is_logged_not_raised(
        self, open_log: Callable[..., KafkaLog], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Here because the topic is missing."""
        monkeypatch.setattr(kafka_log, "COMMIT_TIMEOUT_S", 0.5)

        with capture_logs() as lines:
            open_log().commit({TopicPartition(unique("missing"), 0): 3})

        assert [(line["event"], line["log_level"]) for line in lines] == [("offsets_not_committed", "warning")]

    def test_a_record_of_another_client_is_read_whole(
        self, open_log: Callable[..., KafkaLog], kafka_broker: str
    ) -> None:
        """With whatever fields it left out."""
        log = open_log()
        topic = topic_of(log)
        with KafkaProducer(bootstrap_servers=kafka_broker) as producer:
            producer.send(topic, b"value", headers=[("a", b"1")], timestamp_ms=1234).get(timeout=20)

        (record,) = log.read(TopicPartition(topic, 0), 0, 10)

        assert record == Record(Position(topic, 0, 0), 1234, None, b"value", (("a", b"1"),))

    def test_a_record_that_cannot_be_decoded_raises_and_does_not_hang(
        self, open_log: Callable[..., KafkaLog], kafka_broker: str
    ) -> None:
        """Kafka accepts a header whose name is not text; kafka-python never recovers that consumer."""

        class Latin1(str):
            __slots__ = ()

            def encode(self, *_: object) -> bytes:
                return b"gr\xf6\xdfe"

        log = open_log()
        bad, good = topic_of(log), topic_of(log)
        with KafkaProducer(bootstrap_servers=kafka_broker) as producer:
            producer.send(bad, b"value", headers=[(Latin1("x"), b"1")]).get(timeout=20)
        log.append(good, [NewRecord(b"k", b"v")])
        there = TopicPartition(bad, 0)

        with closing(log.reader({there: 0})) as reader, pytest.raises(RecordsUnreadableError, match=rf"{bad}\[0\]@0"):
            poll_until(lambda: reader.poll([there], 10, 1.0), 1)
        for _ in range(2):
            with pytest.raises(RecordsUnreadableError):
                log.read(there, 0, 1)

        assert log.read(TopicPartition(good, 0), 0, 1)[0].value == b"v"


def poll_until(poll: Callable[[], list[Record]], count: int) -> list[Record]:
    records: list[Record] = []
    deadline = time.monotonic() + 30.0
    while len(records) < count:
        assert time.monotonic() < deadline
        records += poll()
    return records


@pytest.mark.kafka
@pytest.mark.timeout(180)
@pytest.mark.slow
def test_a_log_recovers_when_its_broker_is_back(
    kafka_broker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until then each call raises LogUnavailableError in time; the same log and reader continue and lose nothing."""
    assert kafka_broker
    try:
        java_command()
    except (ConfigError, LogUnavailableError) as error:
        pytest.skip(f"no broker can be started: {error}")
    monkeypatch.setattr(kafka_log, "ASK_TIMEOUT_S", 1.0)
    monkeypatch.setattr(kafka_log, "CONTACT_CHECK_S", 0.5)
    with (
        Broker(tmp_path / "kafka", java_options=SHORT_LIVED) as broker,
        closing(KafkaLog(KafkaConfig(bootstrap_servers=broker.bootstrap_servers))) as log,
    ):
        log.create_topics({"t": 1})
        partition = TopicPartition("t", 0)
        acknowledged = [log.append("t", [NewRecord(b"k", b"before")])[0].offset]
        with closing(log.reader({partition: 0})) as reader:
            records = poll_until(lambda: reader.poll([partition], 10, 0.5), 1)
            broker.kill()

            began = time.monotonic()
            with pytest.raises(LogUnavailableError):
                log.append("t", [NewRecord(b"k", b"lost")], timeout_s=0.5)
            with pytest.raises(LogUnavailableError):
                log.end_offsets("t")
            with pytest.raises(LogUnavailableError):
                log.read(partition, 0, 10, timeout_s=1.0)
            with pytest.raises(LogUnavailableError):
                poll_until(lambda: reader.poll([partition], 10, 0.5), 1)
            assert time.monotonic() - began < 20.0
            assert reader.next_offsets() == {partition: 1}

            broker.start()
            acknowledged.append(append_until(log, b"after")[0].offset)
            end = end_until(log, partition)
            records += poll_until(lambda: retry(lambda: reader.poll([partition], 10, 0.5)), end - 1)

    assert [record.position.offset for record in records] == list(range(end))
    by_offset = {record.position.offset: record.value for record in records}
    assert [by_offset[offset] for offset in acknowledged] == [b"before", b"after"]


def end_until(log: KafkaLog, partition: TopicPartition) -> int:
    """The end of a partition, once the admin client has reconnected."""
    deadline = time.monotonic() + 30.0
    while True:
        try:
            return log.end_offsets(partition.topic)[partition]
        except LogUnavailableError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def retry(call: Callable[[], list[Record]]) -> list[Record]:
    try:
        return call()
    except LogUnavailableError:
        return []


def append_until(log: KafkaLog, value: bytes) -> list[Position]:
    """As a caller does that must not lose it."""
    deadline = time.monotonic() + 60.0
    while True:
        try:
            return log.append("t", [NewRecord(b"k", value)], timeout_s=5.0)
        except LogUnavailableError:
            assert time.monotonic() < deadline
