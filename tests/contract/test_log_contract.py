"""The contract of `streamlearn.log.base`, tested on the fake, the embedded log and a real Apache Kafka."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from harness.fakes import ManualClock, MemoryLog
from kafka import KafkaAdminClient
from kafka import TopicPartition as KafkaPartition

from streamlearn.errors import ConfigError, LogError, LogUnavailableError, OffsetOutOfRangeError, WriterFencedError
from streamlearn.log.base import POLL_BYTES, Log, Reader
from streamlearn.log.embedded import EmbeddedLog
from streamlearn.log.kafka import KafkaLog
from streamlearn.log.settings import KafkaConfig
from streamlearn.records import NewRecord, Offsets, Position, Record, TopicPartition

PARTITIONS = 3
MAX_RECORD_BYTES = 2 << 20
MAX_AGE_S = 3600.0
GENEROUS_S = 20.0


class Retention:
    """Makes each log remove its oldest records."""

    def __init__(self) -> None:
        self.ahead = ManualClock(0.0)
        self.servers = ""

    def clock(self) -> float:
        """The real time, plus the simulated time that passed."""
        return time.time() + self.ahead()

    def let_pass(self) -> None:
        """Make every record too old."""
        self.ahead.advance(MAX_AGE_S + 1)

    def take_before(self, log: Log, partition: TopicPartition, beginning: int) -> None:
        """Remove records below `beginning`. The embedded log counts age up to the append before the current one."""
        if isinstance(log, EmbeddedLog):
            log.create_topics({"any": 1})
            self.ahead.advance(MAX_AGE_S / 2)
            log.append("any", [NewRecord(b"k", b"v")])
        elif isinstance(log, MemoryLog):
            log.trim(partition, beginning)
        elif isinstance(log, KafkaLog):
            with KafkaAdminClient(bootstrap_servers=self.servers) as admin:
                admin.delete_records({KafkaPartition(*partition): beginning})


@pytest.fixture
def retention() -> Retention:
    """Retention of the log under test."""
    return Retention()


@pytest.fixture(params=["memory", "embedded", pytest.param("kafka", marks=pytest.mark.kafka)])
def kind(request: pytest.FixtureRequest) -> str:
    """Which log."""
    return str(request.param)


@pytest.fixture
def log(kind: str, request: pytest.FixtureRequest, log_path: Path, retention: Retention) -> Iterator[Log]:
    """The log under test."""
    log: Log
    if kind == "memory":
        log = MemoryLog(max_record_bytes=MAX_RECORD_BYTES)
    elif kind == "embedded":
        log = EmbeddedLog(
            log_path,
            max_age_s=MAX_AGE_S,
            max_bytes=1 << 30,
            max_record_bytes=MAX_RECORD_BYTES,
            clock=retention.clock,
        )
    else:
        retention.servers = request.getfixturevalue("kafka_broker")
        settings = KafkaConfig(bootstrap_servers=retention.servers, group_id=unique("group"))
        log = KafkaLog(settings, max_record_bytes=MAX_RECORD_BYTES)
    yield log
    log.close()


@pytest.fixture
def topic(log: Log) -> str:
    """An empty topic."""
    name = unique("topic")
    log.create_topics({name: PARTITIONS})
    return name


@pytest.fixture
def open_reader(log: Log) -> Iterator[Callable[[Offsets], Reader]]:
    """Open readers; close them after the test."""
    readers: list[Reader] = []

    def open_one(next_offsets: Offsets) -> Reader:
        readers.append(log.reader(next_offsets))
        return readers[-1]

    yield open_one
    for reader in readers:
        reader.close()


def unique(name: str) -> str:
    """A unique name, since tests share a broker."""
    return f"{name}-{uuid.uuid4().hex[:12]}"


def all_of(topic: str, offset: int = 0) -> Offsets:
    """Every partition, at one offset."""
    return {TopicPartition(topic, index): offset for index in range(PARTITIONS)}


def numbered(count: int, *, key: bytes | None = b"one key") -> list[NewRecord]:
    """Records whose values are their order."""
    return [NewRecord(key, str(i).encode()) for i in range(count)]


def take(reader: Reader, partitions: Offsets, count: int) -> list[Record]:
    """Poll until `count` records have arrived."""
    records: list[Record] = []
    deadline = time.monotonic() + GENEROUS_S
    while len(records) < count and time.monotonic() < deadline:
        records += reader.poll(list(partitions), count - len(records), 0.5)
    assert len(records) == count, f"{len(records)} of {count} records in {GENEROUS_S} s"
    return records


def only_partition(positions: list[Position]) -> TopicPartition:
    """The partition of records with one key."""
    (partition,) = {position.topic_partition for position in positions}
    return partition


class TestTopics:
    """Creating and counting."""

    def test_creating_an_existing_topic_changes_nothing(self, log: Log, topic: str) -> None:
        """If the number of partitions is the same."""
        log.append(topic, numbered(1))

        log.create_topics({topic: PARTITIONS})

        assert log.partition_count(topic) == PARTITIONS
        assert sum(log.end_offsets(topic).values()) == 1

    def test_another_number_of_partitions_is_a_configuration_error(self, log: Log, topic: str) -> None:
        """The message names the topic and both numbers."""
        with pytest.raises(ConfigError, match=rf"{topic}.*{PARTITIONS}.*{PARTITIONS + 1}"):
            log.create_topics({topic: PARTITIONS + 1})

    def test_topics_are_listed(self, log: Log, topic: str) -> None:
        """Without those of a broker's own, such as __consumer_offsets."""
        log.commit(log.end_offsets(topic))
        names = log.topics()

        assert topic in names
        assert names == sorted(names)
        assert not any(name.startswith("__") for name in names)

    def test_a_missing_topic_has_no_partitions(self, log: Log) -> None:
        """The question is not an error and creates nothing."""
        name = unique("missing")

        assert log.partition_count(name) == 0
        assert log.partition_count(name) == 0

    def test_appending_to_a_missing_topic_is_refused(self, log: Log) -> None:
        """It is not created implicitly, and a retry would not help."""
        name = unique("missing")

        with pytest.raises(LogError, match=name) as raised:
            log.append(name, numbered(1))

        assert not isinstance(raised.value, LogUnavailableError)
        assert log.partition_count(name) == 0

    def test_asking_for_offsets_of_a_missing_topic_is_refused(self, log: Log) -> None:
        """An empty result would look like an empty topic."""
        with pytest.raises(LogError):
            log.end_offsets(unique("missing"))

    def test_a_missing_partition_is_refused(self, log: Log, topic: str) -> None:
        """A reader of it would wait indefinitely."""
        with pytest.raises(LogError):
            log.reader({TopicPartition(topic, PARTITIONS): 0})


class TestAppend:
    """What an acknowledgement means."""

    def test_returns_the_position_of_each_record_in_order(self, log: Log, topic: str) -> None:
        """Records of one key are in one partition, at offsets from 0 on."""
        positions = log.append(topic, numbered(5))

        partition = only_partition(positions)
        assert [position.offset for position in positions] == [0, 1, 2, 3, 4]
        assert [log.read(partition, position.offset, 1)[0].position for position in positions] == positions

    def test_continues_at_the_end(self, log: Log, topic: str) -> None:
        """A second append leaves no gap."""
        log.append(topic, numbered(2))

        assert [position.offset for position in log.append(topic, numbered(2))] == [2, 3]

    def test_equal_keys_share_a_partition_number_across_topics(self, log: Log, topic: str) -> None:
        """A label goes to its sample's partition: every log uses Kafka's hash."""
        other = unique("other")
        log.create_topics({other: PARTITIONS})
        keys = [f"id-{i}".encode() for i in range(50)]
        records = [NewRecord(key, b"x") for key in keys]

        here = {key: position.partition for key, position in zip(keys, log.append(topic, records), strict=True)}
        there = {key: position.partition for key, position in zip(keys, log.append(other, records), strict=True)}

        assert here == there
        assert set(here.values()) == set(range(PARTITIONS))

    def test_keys_go_to_the_partition_of_every_kafka_client(self, log: Log, topic: str) -> None:
        """Fixed examples, from Kafka's Java client."""
        positions = log.append(topic, [NewRecord(key, b"x") for key in (b"21", b"foobar", b"a-little-bit-long-string")])

        # murmur2, signed: -973932308, -790332482, -985981536
        assert [position.partition for position in positions] == [
            (hash_ & 0x7FFFFFFF) % PARTITIONS for hash_ in (-973932308, -790332482, -985981536)
        ]

    def test_records_without_a_key_use_every_partition(self, log: Log, topic: str) -> None:
        """So that no partition stays empty."""
        positions = log.append(topic, numbered(100, key=None))

        assert {position.partition for position in positions} == set(range(PARTITIONS))

    def test_appending_no_records_returns_no_positions(self, log: Log, topic: str) -> None:
        """An empty batch is valid."""
        assert log.append(topic, []) == []

    def test_a_record_with_neither_key_nor_value_is_refused(self, log: Log, topic: str) -> None:
        """It is meaningless, and kafka-python cannot send it."""
        with pytest.raises(LogError, match="key or a value"):
            log.append(topic, [NewRecord(None, None)])

    def test_a_record_that_is_too_large_is_refused_with_its_size(self, log: Log, topic: str) -> None:
        """A retry would not help, so it is not LogUnavailableError."""
        with pytest.raises(LogError, match=str(MAX_RECORD_BYTES)) as raised:
            log.append(topic, [NewRecord(b"k", bytes(MAX_RECORD_BYTES))])

        assert not isinstance(raised.value, LogUnavailableError)
        assert sum(log.end_offsets(topic).values()) == 0

    def test_threads_that_append_together_lose_nothing(self, log: Log, topic: str) -> None:
        """Each acknowledged position holds that thread's record; all positions differ."""
        found: dict[Position, bytes] = {}

        def work(name: int) -> None:
            for i in range(20):
                value = f"{name}/{i}".encode()
                (position,) = log.append(topic, [NewRecord(value, value)])
                found[position] = value

        threads = [threading.Thread(target=work, args=(name,)) for name in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(GENEROUS_S)

        assert len(found) == 8 * 20
        stored = {r.position: r.value for p in all_of(topic) for r in log.read(p, 0, 1000)}
        assert stored == found

    def test_after_close_raises(self, log: Log, topic: str) -> None:
        """It neither hangs nor loses records silently. Closing twice is allowed."""
        log.close()
        log.close()

        with pytest.raises(LogError, match="closed"):
            log.append(topic, numbered(1))


ROUND_TRIPS = {
    "plain": NewRecord(b"key", b"value"),
    "no key": NewRecord(None, b"value"),
    "no value, a tombstone": NewRecord(b"key", None),
    "empty value": NewRecord(b"key", b""),
    "empty key": NewRecord(b"", b"value"),
    "unicode": NewRecord("Schlüssel-😀".encode(), "значение\x00\n".encode(), (("Überschrift", "値".encode()),)),
    "all bytes": NewRecord(bytes(range(256)), bytes(range(256)), (("bytes", bytes(range(256))),)),
    "headers in order, one twice": NewRecord(b"k", b"v", (("b", b"1"), ("a", b""), ("b", b"2"))),
    "large": NewRecord(b"key", bytes(1_500_000)),
}


class TestRoundTrip:
    """What is appended is read back."""

    @pytest.mark.parametrize("case", ROUND_TRIPS)
    def test_a_record_is_read_back_unchanged(
        self, log: Log, topic: str, open_reader: Callable[[Offsets], Reader], case: str
    ) -> None:
        """By a reader and by position."""
        record = ROUND_TRIPS[case]

        (position,) = log.append(topic, [record])

        (read,) = log.read(position.topic_partition, position.offset, 10)
        (polled,) = take(open_reader(all_of(topic)), all_of(topic), 1)
        assert (read.position, read.key, read.value, read.headers) == (
            position,
            record.key,
            record.value,
            record.headers,
        )
        assert polled == read

    def test_a_given_timestamp_is_kept(self, log: Log, topic: str) -> None:
        """To the millisecond; it may be in the past."""
        stamp_ms = int(time.time() * 1000) - 3_600_001

        (position,) = log.append(topic, [NewRecord(b"k", b"v", timestamp_ms=stamp_ms)])

        assert log.read(position.topic_partition, position.offset, 1)[0].timestamp_ms == stamp_ms

    def test_a_record_without_timestamp_gets_the_current_time(self, log: Log, topic: str) -> None:
        """In milliseconds since the epoch."""
        before = int(time.time() * 1000)

        (position,) = log.append(topic, numbered(1))

        stamp_ms = log.read(position.topic_partition, position.offset, 1)[0].timestamp_ms
        assert before - 5 <= stamp_ms <= time.time() * 1000 + 5


class TestPoll:
    """Reading forward."""

    def test_returns_each_partition_in_order_and_each_record_once(
        self, log: Log, topic: str, open_reader: Callable[[Offsets], Reader]
    ) -> None:
        """For any size of polls."""
        appended = log.append(topic, [NewRecord(str(i).encode(), b"v") for i in range(200)])
        reader = open_reader(all_of(topic))

        records: list[Record] = []
        while len(records) < 200:
            got = reader.poll(list(all_of(topic)), 7, GENEROUS_S)
            assert 1 <= len(got) <= 7
            records += got

        for partition in all_of(topic):
            offsets = [r.position.offset for r in records if r.position.topic_partition == partition]
            assert offsets == list(range(len(offsets)))
        assert {record.position for record in records} == set(appended)

    def test_an_empty_log_answers_within_the_timeout(
        self, topic: str, open_reader: Callable[[Offsets], Reader]
    ) -> None:
        """With an empty list, neither at once nor much later."""
        reader = open_reader(all_of(topic))
        began = time.monotonic()

        assert reader.poll(list(all_of(topic)), 10, 0.3) == []

        assert 0.25 <= time.monotonic() - began <= 3.0

    def test_a_poll_of_no_partitions_waits_and_returns_nothing(
        self, log: Log, topic: str, open_reader: Callable[[Offsets], Reader]
    ) -> None:
        """So that the caller does not spin."""
        log.append(topic, numbered(3))
        reader = open_reader(all_of(topic))
        began = time.monotonic()

        assert reader.poll([], 10, 0.2) == []

        assert time.monotonic() - began >= 0.15
        assert reader.next_offsets() == all_of(topic)

    def test_a_partition_that_is_not_polled_keeps_its_offset(
        self, log: Log, topic: str, open_reader: Callable[[Offsets], Reader]
    ) -> None:
        """None of its records is returned or lost, and it continues there when polled again."""
        positions = log.append(topic, [NewRecord(str(i).encode(), b"v") for i in range(90)])
        first, *others = sorted(all_of(topic))
        reader = open_reader(all_of(topic))
        here = [position for position in positions if position.topic_partition == first]
        head = take(reader, {first: 0}, 2)

        rest = take(reader, dict.fromkeys(others, 0), 90 - len(here))
        tail = take(reader, {first: 0}, len(here) - 2)

        assert {record.position.topic_partition for record in rest} == set(others)
        assert [record.position for record in head + tail] == here

    def test_a_partition_that_is_polled_on_and_off_is_read_to_its_end(
        self, log: Log, topic: str, open_reader: Callable[[Offsets], Reader]
    ) -> None:
        """Backpressure stops and resumes partitions; none may stay silent (as with kafka-python's `pause`)."""
        log.append(topic, [NewRecord(f"key {n}".encode(), b"x" * 800) for n in range(3000)], timeout_s=30.0)
        ends = log.end_offsets(topic)
        reader, held = open_reader(all_of(topic)), dict.fromkeys(ends, 0)
        deadline = time.monotonic() + GENEROUS_S

        while reader.next_offsets() != ends and time.monotonic() < deadline:
            chosen = [partition for partition, count in held.items() if count < 300]
            for record in reader.poll(chosen, 100, 0.05) if chosen else ():
                held[record.position.topic_partition] += 1
            for n, partition in enumerate(sorted(held)):
                held[partition] = max(0, held[partition] - 20 * n - 10)

        assert reader.next_offsets() == ends

    def test_returns_later_records(self, log: Log, topic: str, open_reader: Callable[[Offsets], Reader]) -> None:
        """An append ends a waiting poll, well before its timeout."""
        reader = open_reader(all_of(topic))
        assert reader.poll(list(all_of(topic)), 10, 0.1) == []
        later = threading.Timer(0.2, lambda: log.append(topic, numbered(1)))
        later.start()
        began = time.monotonic()

        (record,) = reader.poll(list(all_of(topic)), 10, GENEROUS_S)

        later.join()
        assert record.value == b"0"
        assert time.monotonic() - began < GENEROUS_S / 2

    def test_next_offsets_follow_the_returned_records(
        self, log: Log, topic: str, open_reader: Callable[[Offsets], Reader]
    ) -> None:
        """Not the records that were fetched ahead."""
        partition = only_partition(log.append(topic, numbered(10)))
        reader = open_reader(all_of(topic))
        assert reader.next_offsets() == all_of(topic)

        take(reader, {partition: 0}, 4)

        assert reader.next_offsets() == all_of(topic) | {partition: 4}

    def test_another_reader_continues_where_the_first_stopped(
        self, log: Log, topic: str, open_reader: Callable[[Offsets], Reader]
    ) -> None:
        """With its saved offsets: no record twice, none missing."""
        log.append(topic, [NewRecord(str(i).encode(), b"v") for i in range(30)])
        first = open_reader(all_of(topic))
        head = take(first, all_of(topic), 11)

        tail = take(open_reader(first.next_offsets()), all_of(topic), 19)

        assert len({record.position for record in head + tail}) == 30

    def test_a_seek_back_returns_the_same_records_again(
        self, log: Log, topic: str, open_reader: Callable[[Offsets], Reader]
    ) -> None:
        """Also if later records were fetched ahead."""
        partition = only_partition(log.append(topic, numbered(10)))
        reader = open_reader(all_of(topic))
        first = take(reader, {partition: 0}, 6)

        reader.seek(partition, 2)

        assert take(reader, {partition: 0}, 8)[:4] == first[2:]

    def test_a_seek_forward_skips(self, log: Log, topic: str, open_reader: Callable[[Offsets], Reader]) -> None:
        """The next record is the one at the new offset."""
        partition = only_partition(log.append(topic, numbered(10)))
        reader = open_reader(all_of(topic))
        take(reader, {partition: 0}, 1)

        reader.seek(partition, 7)

        assert [record.value for record in take(reader, {partition: 0}, 3)] == [b"7", b"8", b"9"]

    def test_end_offsets_are_known_for_every_partition(
        self, log: Log, topic: str, open_reader: Callable[[Offsets], Reader]
    ) -> None:
        """Also for those never polled."""
        partition = only_partition(log.append(topic, numbered(10)))
        reader = open_reader(all_of(topic))

        assert reader.end_offsets() == all_of(topic) | {partition: 10}
        take(reader, {partition: 0}, 4)

        assert reader.end_offsets() == all_of(topic) | {partition: 10}


class TestOffsets:
    """Offsets, and reading by position."""

    def test_an_empty_topic_begins_and_ends_at_zero(self, log: Log, topic: str) -> None:
        """For every partition."""
        assert log.beginning_offsets(topic) == all_of(topic)
        assert log.end_offsets(topic) == all_of(topic)

    def test_the_end_moves_with_each_record(self, log: Log, topic: str) -> None:
        """It is the offset of the next record."""
        partition = only_partition(log.append(topic, numbered(3)))

        assert log.end_offsets(topic) == all_of(topic) | {partition: 3}
        assert log.beginning_offsets(topic) == all_of(topic)

    def test_read_returns_records_from_an_offset_on(self, log: Log, topic: str) -> None:
        """At most `max_records`, fewer at the end."""
        partition = only_partition(log.append(topic, numbered(10)))

        assert [record.value for record in log.read(partition, 3, 4)] == [b"3", b"4", b"5", b"6"]
        assert [record.value for record in log.read(partition, 8, 100)] == [b"8", b"9"]

    def test_read_at_the_end_is_empty(self, log: Log, topic: str) -> None:
        """It does not wait for a record."""
        partition = only_partition(log.append(topic, numbered(3)))
        began = time.monotonic()

        assert log.read(partition, 3, 10) == []

        assert time.monotonic() - began < 5.0

    def test_read_returns_what_was_appended_since_the_last_read(self, log: Log, topic: str) -> None:
        """A known end is not trusted."""
        partition = only_partition(log.append(topic, numbered(1)))
        assert len(log.read(partition, 0, 10)) == 1
        log.append(topic, numbered(1))

        assert len(log.read(partition, 1, 10)) == 1
        assert len(log.read(partition, 0, 10)) == 2

    @pytest.mark.parametrize("offset", [11, 1_000_000])
    def test_reading_past_the_end_raises(
        self, log: Log, topic: str, open_reader: Callable[[Offsets], Reader], offset: int
    ) -> None:
        """A checkpoint ahead of the log means that the log was lost: never wait for it to catch up."""
        partition = only_partition(log.append(topic, numbered(10)))
        reader = open_reader({partition: offset})

        with pytest.raises(OffsetOutOfRangeError):
            log.read(partition, offset, 1)
        with pytest.raises(OffsetOutOfRangeError):
            reader.poll([partition], 10, GENEROUS_S)
        with pytest.raises(OffsetOutOfRangeError):
            reader.poll([partition], 10, GENEROUS_S)

    def test_reading_a_trimmed_offset_raises_and_a_seek_continues(
        self, log: Log, topic: str, open_reader: Callable[[Offsets], Reader], retention: Retention
    ) -> None:
        """It never jumps silently. Reading continues from the new beginning."""
        partition = only_partition(log.append(topic, numbered(6)))
        reader = open_reader({partition: 3})
        retention.let_pass()
        log.append(topic, numbered(4))
        retention.take_before(log, partition, 6)

        with pytest.raises(OffsetOutOfRangeError):
            log.read(partition, 3, 1)
        with pytest.raises(OffsetOutOfRangeError):
            reader.poll([partition], 10, GENEROUS_S)
        assert log.beginning_offsets(topic)[partition] == 6
        reader.seek(partition, 6)

        assert [record.value for record in take(reader, {partition: 0}, 4)] == [b"0", b"1", b"2", b"3"]

    def test_a_poll_is_bounded_by_its_bytes(
        self, log: Log, topic: str, open_reader: Callable[[Offsets], Reader]
    ) -> None:
        """For any `max_records`; later polls return the rest."""
        large = [NewRecord(b"k", bytes([number]) * (MAX_RECORD_BYTES - 1000)) for number in range(12)]
        partition = only_partition([position for record in large for position in log.append(topic, [record])])
        reader, found = open_reader({partition: 0}), []

        while len(found) < len(large):
            records = reader.poll([partition], 100, GENEROUS_S)
            assert 1 <= len(records) <= POLL_BYTES // MAX_RECORD_BYTES + 1
            found += records

        assert [record.value for record in found] == [record.value for record in large]

    def test_a_commit_does_not_affect_reading(
        self, log: Log, topic: str, open_reader: Callable[[Offsets], Reader]
    ) -> None:
        """It is only for dashboards."""
        partition = only_partition(log.append(topic, numbered(3)))

        log.commit({partition: 2})
        log.commit({partition: 3})

        assert len(take(open_reader({partition: 0}), {partition: 0}, 3)) == 3


class TestWriter:
    """Records and offsets in one transaction."""

    def test_records_and_offsets_are_there_together(self, log: Log, topic: str) -> None:
        """The offsets are those of the group: a writer of another instance reads them too."""
        first, second, *_ = sorted(all_of(topic))
        with closing(log.writer("g", 0)) as writer:
            assert writer.next_offsets([first, second]) == {}
            writer.write(topic, numbered(3), {first: 7})
            writer.write(topic, numbered(2), {first: 9, second: 1})

            assert writer.next_offsets([first, second]) == {first: 9, second: 1}
        with closing(log.writer("g", 1)) as other:
            assert other.next_offsets([second]) == {second: 1}
        with closing(log.writer("another", 0)) as foreign:
            assert foreign.next_offsets([first]) == {}
        assert values_in(log, topic, 5) == [b"0", b"1", b"2", b"0", b"1"]

    def test_offsets_move_without_records(self, log: Log, topic: str) -> None:
        """Where nothing that was read is worth writing."""
        partition = TopicPartition(topic, 0)
        with closing(log.writer("g", 0)) as writer:
            writer.write(topic, [], {partition: 5})

            assert writer.next_offsets([partition]) == {partition: 5}

    def test_a_later_writer_fences_an_earlier_one(self, log: Log, topic: str) -> None:
        """A process that was given up for dead, and resumes, writes nothing more. Other instances are not affected."""
        partition = TopicPartition(topic, 0)
        with closing(log.writer("g", 0)) as old, closing(log.writer("g", 1)) as other:
            old.write(topic, numbered(1), {partition: 1})
            with closing(log.writer("g", 0)) as new:
                assert new.next_offsets([partition]) == {partition: 1}

                with pytest.raises(WriterFencedError):
                    old.write(topic, numbered(9), {partition: 9})

                new.write(topic, numbered(1), {partition: 2})
                other.write(topic, numbered(1), {})
                assert new.next_offsets([partition]) == {partition: 2}
        assert values_in(log, topic, 3) == [b"0", b"0", b"0"]

    def test_a_record_that_is_refused_moves_nothing(self, log: Log, topic: str) -> None:
        """Neither the records before it, nor the offsets."""
        partition = TopicPartition(topic, 0)
        with closing(log.writer("g", 0)) as writer:
            too_large = NewRecord(b"k", bytes(MAX_RECORD_BYTES + (1 << 20)))

            with pytest.raises(LogError):
                writer.write(topic, [*numbered(2), too_large], {partition: 3})
        with closing(log.writer("g", 0)) as again:
            assert again.next_offsets([partition]) == {}
        assert values_in(log, topic, 0) == []


def values_in(log: Log, topic: str, count: int) -> list[bytes | None]:
    """What readers of a topic see once `count` records are there; its records have one key."""
    with closing(log.reader(all_of(topic))) as reader:
        records = take(reader, all_of(topic), count)
        return [record.value for record in (*records, *reader.poll(list(all_of(topic)), 100, 0.3))]
