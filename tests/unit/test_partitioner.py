"""The partitioner: Kafka's hash."""

from __future__ import annotations

import random

import pytest
from kafka.partitioner.default import murmur2 as kafka_murmur2

from streamlearn.log.partitioner import murmur2, partition_of

JAVA = {
    b"21": -973932308,
    b"foobar": -790332482,
    b"a-little-bit-long-string": -985981536,
    b"a-little-bit-longer-string": -1486304829,
    b"lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8": -58897971,
    b"abc": 479470107,
}
"""From the tests of Kafka's Java client."""


@pytest.mark.parametrize("data", JAVA)
def test_the_hash_equals_that_of_the_java_client(data: bytes) -> None:
    """Also for lengths that are not a multiple of four."""
    assert murmur2(data) == JAVA[data] & 0xFFFFFFFF


def test_the_hash_equals_that_of_kafka_python() -> None:
    """For any bytes of any length."""
    source = random.Random(5)
    for length in range(64):
        data = source.randbytes(length)
        assert murmur2(data) == kafka_murmur2(data), (length, data)


def test_a_partition_is_within_range() -> None:
    """The hash's sign bit is dropped before the modulo, as in Java."""
    chosen = {partition_of(str(i).encode(), 5) for i in range(200)}

    assert chosen == {0, 1, 2, 3, 4}
    assert partition_of(b"21", 1000) == (-973932308 & 0x7FFFFFFF) % 1000
