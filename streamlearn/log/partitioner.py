"""The partition of a record, chosen as Kafka's own clients do, so that every log co-partitions in the same way.

murmur2 with Kafka's seed, as in `org.apache.kafka.common.utils.Utils.murmur2`; the partition is its lower 31 bits
modulo the number of partitions. Two topics with the same number of partitions hold a key in the same partition.
"""

from __future__ import annotations

import struct

_SEED = 0x9747B28C
_M = 0x5BD1E995
_WORD = 0xFFFFFFFF


def murmur2(data: bytes) -> int:
    """Return the 32-bit hash, unsigned."""
    length = len(data)
    tail = length & 3
    h = _SEED ^ length
    for word in struct.unpack_from(f"<{length >> 2}I", data):
        k = (word * _M) & _WORD
        k = ((k ^ (k >> 24)) * _M) & _WORD
        h = ((h * _M) & _WORD) ^ k
    if tail:
        h = ((h ^ int.from_bytes(data[length - tail :], "little")) * _M) & _WORD
    h = ((h ^ (h >> 13)) * _M) & _WORD
    return h ^ (h >> 15)


def partition_of(key: bytes, partitions: int) -> int:
    """Return the partition of a keyed record."""
    assert partitions > 0, partitions
    return (murmur2(key) & 0x7FFFFFFF) % partitions
