"""Kafka's transactions: records of a topic and offsets of a group become visible together.

The transactional id is group and instance. Opening a writer makes the broker abort what an earlier producer of this id
left open, and refuse its later requests. No group is joined: partitions are assigned manually, so the offsets in a
transaction are checked by the producer's epoch alone.

kafka-python 3.0.12 was tested for this against Apache Kafka 4.3: kill -9 in transactions, zombies that resume after
their successor started, and a killed broker (`tests/e2e/test_score.py`, `benchmarks/score.py`).
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from typing import Any

from kafka import KafkaProducer, OffsetAndMetadata
from kafka import TopicPartition as KafkaPartition
from kafka import errors as kafka_errors

from streamlearn.log.kafka_clients import (
    CONNECT_TIMEOUT_S,
    FENCED,
    KafkaClients,
    end_consumer,
    end_producer,
    to_log_error,
    translated,
)
from streamlearn.records import NewRecord, Offsets, TopicPartition

FETCH_WAIT_MS = 100
OPEN_TIMEOUT_S = 20.0
"""A broker that has just started loads its transactions first."""
OFFSETS_TIMEOUT_S = 20.0
"""Longer than the broker keeps a transaction of a dead process open."""


class KafkaWriter:
    """`Writer` of a Kafka log, on a producer of its own."""

    def __init__(self, clients: KafkaClients, group_id: str, instance: int) -> None:
        """Open it.

        Raises:
            LogUnavailableError: no answer in time.
        """
        self._clients, self._group_id = clients, group_id
        self._id = f"{group_id}-{instance}"
        self._producer: KafkaProducer | None = clients.producer(CONNECT_TIMEOUT_S, transactional_id=self._id)
        try:
            with translated(f"open transactions of {self._id}"):
                _init(self._producer)
        except BaseException:
            self.close()
            raise

    def next_offsets(self, partitions: Collection[TopicPartition]) -> Offsets:
        """See `Writer.next_offsets`.

        A commit is acknowledged before its offsets are in place, so a plain look-up may return earlier ones. That of a
        consumer that reads committed records waits while a transaction with offsets of the partition is open.
        """
        deadline = time.monotonic() + OFFSETS_TIMEOUT_S
        consumer = self._clients.consumer(FETCH_WAIT_MS, CONNECT_TIMEOUT_S, group_id=self._group_id)
        try:
            with translated(f"look up offsets of group {self._group_id}"):
                found = {
                    partition: consumer.committed(
                        KafkaPartition(*partition), timeout_ms=max(1.0, deadline - time.monotonic()) * 1000
                    )
                    for partition in partitions
                }
        finally:
            end_consumer(consumer)
        return {partition: int(offset) for partition, offset in found.items() if offset is not None and offset >= 0}

    def write(self, topic: str, records: Sequence[NewRecord], next_offsets: Offsets, timeout_s: float = 10.0) -> None:
        """See `Writer.write`."""
        deadline = time.monotonic() + timeout_s
        producer = self._producer
        assert producer is not None, "closed"
        offsets = {
            KafkaPartition(*partition): OffsetAndMetadata(offset, "", -1) for partition, offset in next_offsets.items()
        }
        manager = producer._transaction_manager  # noqa: SLF001
        try:
            producer.begin_transaction()
            futures = [
                producer.send(
                    topic, record.value, record.key, headers=list(record.headers), timestamp_ms=record.timestamp_ms
                )
                for record in records
            ]
            for future in futures:
                future.get(max(0.0, deadline - time.monotonic()))
            # The public methods wait without a bound while the broker is away.
            self._wait(manager.send_offsets_to_transaction(offsets, self._group_id), deadline)
            self._wait(manager.begin_commit(), deadline)
        except kafka_errors.KafkaError as error:
            self.close()
            # Once a request was fenced, later ones fail with other errors.
            first = manager.last_error
            raise to_log_error(first if isinstance(first, FENCED) else error, f"write to {topic}") from error
        except BaseException:
            self.close()
            raise

    def _wait(self, result: Any, deadline: float) -> None:
        """Wait for the broker's answer to a request of the transaction."""
        assert self._producer is not None
        self._producer._sender.wakeup()  # noqa: SLF001 - as the public methods do
        if not result.wait(timeout_ms=max(0.0, deadline - time.monotonic()) * 1000):
            raise kafka_errors.KafkaTimeoutError("the transaction was not acknowledged in time")

    def close(self) -> None:
        """See `Writer.close`. An open transaction is left to the next writer, which aborts it."""
        producer, self._producer = self._producer, None
        if producer is not None:
            end_producer(producer)


def _init(producer: KafkaProducer) -> None:
    """Abort what an earlier producer left open. A call that timed out is continued by the next one."""
    deadline = time.monotonic() + OPEN_TIMEOUT_S
    while True:
        try:
            producer.init_transactions()
        except kafka_errors.KafkaTimeoutError:
            if time.monotonic() > deadline:
                raise
        else:
            return
