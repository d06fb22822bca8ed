"""What the Kafka log does beyond the contract: options, transactions, lag, and a broker that goes away."""

from __future__ import annotations

import gc
import logging
import sys
import threading
import time
import uuid
import warnings
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
from streamlearn.lab.broker import Broker, java_command
from streamlearn.log import kafka as kafka_log
from streamlearn.log.kafka import DELIVERY_TIMEOUT_MS, KafkaLog
from streamlearn.log.lazy import LazyClient
from streamlearn.records import NewRecord, Position, Record, TopicPartition

NOWHERE = "127.0.0.1:1"


@pytest.fixture
def refused_sockets(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Collects, within the test, the sockets of refused connections, which kafka-python leaves to the collector."""
    caplog.set_level(logging.CRITICAL, logger="kafka")  # a log record with a traceback would keep them
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


@pytest.fixture
def open_log(kafka_broker: str) -> Iterator[Callable[..., KafkaLog]]:
    """Opens logs on the shared broker, and closes them after the test."""
    logs: list[KafkaLog] = []

    def open_one(**settings: Any) -> KafkaLog:
        logs.append(KafkaLog(kafka_broker, **{"group_id": unique("group"), "max_record_bytes": 1 << 20, **settings}))
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
    """What is checked before anything is connected."""

    def test_a_missing_checksum_module_is_an_error_and_names_the_cure(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Without it reading is 20 times slower, and kafka-python does not say so."""
        monkeypatch.setitem(sys.modules, "crc32c", None)

        with pytest.raises(ConfigError, match=r"pip install 'kafka-python\[crc32c\]'"):
            KafkaLog(NOWHERE, group_id="g", max_record_bytes=1 << 20)

    @pytest.mark.parametrize("name", ["acks", "auto_offset_reset", "enable_auto_commit", "group_id", "isolation_level"])
    def test_what_the_promises_rest_on_cannot_be_set(self, name: str) -> None:
        """An option that would break a promise is refused, not ignored."""
        with pytest.raises(ConfigError, match=rf"options\.{name}: not to be set"):
            KafkaLog(NOWHERE, group_id="g", max_record_bytes=1 << 20, options={name: "x"})

    def test_an_unknown_option_is_named(self) -> None:
        """A misspelt `security_protocol` must not mean plain text."""
        with pytest.raises(ConfigError, match="security_protokoll: kafka-python knows no such option"):
            KafkaLog(NOWHERE, group_id="g", max_record_bytes=1 << 20, options={"security_protokoll": "SSL"})

    def test_nothing_is_connected_before_it_is_used(self) -> None:
        """So that a process may start while the broker is away."""
        before = threading.active_count()

        log = KafkaLog(NOWHERE, group_id="g", max_record_bytes=1 << 20)

        assert threading.active_count() == before
        log.close()

    @pytest.mark.usefixtures("refused_sockets")
    @pytest.mark.filterwarnings("ignore::ResourceWarning")
    def test_a_broker_that_is_not_there_is_unavailable_in_time_and_leaves_no_thread(self) -> None:
        """Each try ends within its timeout, and the next is free to try again."""
        before = threading.active_count()
        log = KafkaLog(NOWHERE, group_id="g", max_record_bytes=1 << 20)
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
        (kafka_errors.SaslAuthenticationFailedError(), LogError),
        (kafka_errors.UnknownTopicOrPartitionError(), LogError),
    ],
)
def test_errors_become_ours(error: kafka_errors.KafkaError, becomes: type[LogError]) -> None:
    """What may pass is `unavailable`; what asking again does not cure is not."""
    assert type(kafka_log._translate(error, "append")) is becomes


@pytest.mark.parametrize("pause_s", [1.0, 60.0, 3600.0])
def test_a_producer_is_given_up_for_failures_in_a_row_alone(monkeypatch: pytest.MonkeyPatch, pause_s: float) -> None:
    """One failure, and nothing to append for an hour, is no producer that is silent for an hour; a second one is."""
    log = KafkaLog(NOWHERE, group_id="g", max_record_bytes=1 << 20)
    made = LazyClient[Any](lambda _timeout_s: object(), lambda _: None)
    monkeypatch.setattr(log, "_producer", made)
    now_s = 1e6
    monkeypatch.setattr(kafka_log.time, "monotonic", lambda: now_s)
    producer = log._working_producer(now_s + 10.0)

    log._note_failure(producer, now_s)
    now_s += 3600.0
    assert log._working_producer(now_s + 10.0) is producer
    log._failing = None  # it was acknowledged
    failures = 0
    with capture_logs() as lines:
        while log._working_producer(now_s + 10.0) is producer:
            log._note_failure(producer, now_s)
            failures += 1
            now_s += pause_s

    assert failures == max(2, DELIVERY_TIMEOUT_MS / 1000 / pause_s)
    assert [line["event"] for line in lines] == ["producer_given_up"]


@pytest.mark.kafka
class TestBroker:
    """Against the shared broker."""

    @pytest.mark.parametrize("codec", ["gzip", "lz4", "snappy", "zstd"])
    def test_an_option_goes_to_the_clients_that_know_it(self, open_log: Callable[..., KafkaLog], codec: str) -> None:
        """`compression_type` is the producer's alone; the consumer reads it all the same, whichever others use."""
        log = open_log(options={"compression_type": codec, "client_id": "streamlearn-test"})
        topic = topic_of(log)

        (position,) = log.append(topic, [NewRecord(b"k", bytes(100_000))])

        assert log.read(position.topic_partition, 0, 1)[0].value == bytes(100_000)

    def test_an_option_of_the_wrong_kind_is_a_configuration_error(self, open_log: Callable[..., KafkaLog]) -> None:
        """Told at the first use, by what kafka-python says of it."""
        log = open_log(options={"compression_type": "rar"})
        topic = topic_of(log)

        with pytest.raises(ConfigError, match="rar"):
            log.append(topic, [NewRecord(b"k", b"v")])

    def test_a_topic_made_here_takes_records_as_large_as_the_settings_allow(
        self, open_log: Callable[..., KafkaLog]
    ) -> None:
        """Kafka's own default is 1 MiB."""
        log = open_log(max_record_bytes=4 << 20)
        topic = topic_of(log)

        (position,) = log.append(topic, [NewRecord(b"", bytes(4 << 20))])

        assert len(log.read(position.topic_partition, 0, 1)[0].value or b"") == 4 << 20

    def test_a_record_that_the_topic_does_not_take_is_refused_for_good(self, open_log: Callable[..., KafkaLog]) -> None:
        """The message names both limits."""
        topic = topic_of(open_log())

        with pytest.raises(LogError, match=r"max\.message\.bytes") as raised:
            open_log(max_record_bytes=4 << 20).append(topic, [NewRecord(b"", bytes(3 << 20))])

        assert not isinstance(raised.value, LogUnavailableError)

    def test_records_of_aborted_transactions_are_never_seen_and_offsets_pass_over_them(
        self, open_log: Callable[..., KafkaLog], kafka_broker: str
    ) -> None:
        """Nor are control records; the next offset is behind them, so that nothing is read twice."""
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
        """Under the group's name, with a word on who wrote it."""
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

    def test_a_commit_that_fails_is_said_and_does_not_stop_the_learner(
        self, open_log: Callable[..., KafkaLog], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Here, for a topic that is not there."""
        monkeypatch.setattr(kafka_log, "COMMIT_TIMEOUT_S", 0.5)

        with capture_logs() as lines:
            open_log().commit({TopicPartition(unique("missing"), 0): 3})

        assert [(line["event"], line["log_level"]) for line in lines] == [("offsets_not_committed", "warning")]

    def test_a_record_of_a_foreign_client_is_read_whole(
        self, open_log: Callable[..., KafkaLog], kafka_broker: str
    ) -> None:
        """Whatever it left out."""
        log = open_log()
        topic = topic_of(log)
        with KafkaProducer(bootstrap_servers=kafka_broker) as producer:
            producer.send(topic, b"value", headers=[("a", b"1")], timestamp_ms=1234).get(timeout=20)

        (record,) = log.read(TopicPartition(topic, 0), 0, 10)

        assert record == Record(Position(topic, 0, 0), 1234, None, b"value", (("a", b"1"),))

    def test_a_record_that_nobody_can_decode_is_said_and_hangs_nothing(
        self, open_log: Callable[..., KafkaLog], kafka_broker: str
    ) -> None:
        """Kafka takes a header whose name is no text; kafka-python would never answer that consumer again."""

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
@pytest.mark.usefixtures("refused_sockets")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_broker_that_goes_away_is_said_and_all_goes_on_when_it_is_back(
    kafka_broker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every call is `unavailable` within its time; later the same log and reader go on, and nothing is lost."""
    assert kafka_broker
    try:
        java_command()
    except (ConfigError, LogUnavailableError) as error:
        pytest.skip(f"no broker can be started: {error}")
    monkeypatch.setattr(kafka_log, "ASK_TIMEOUT_S", 1.0)
    monkeypatch.setattr(kafka_log, "CONTACT_CHECK_S", 0.5)
    with (
        Broker(tmp_path / "kafka") as broker,
        closing(KafkaLog(broker.bootstrap_servers, group_id="g", max_record_bytes=1 << 20)) as log,
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
    """The end of a partition, once the admin client has found the broker again."""
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
    """As a caller does who must not lose it."""
    deadline = time.monotonic() + 60.0
    while True:
        try:
            return log.append("t", [NewRecord(b"k", value)], timeout_s=5.0)
        except LogUnavailableError:
            assert time.monotonic() < deadline
