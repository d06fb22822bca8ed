"""Limits of what is read, and of what is appended."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from streamlearn.errors import RecordError
from streamlearn.log.codec import Codec
from streamlearn.records import (
    Headers,
    Position,
    Record,
    Schema,
)

POSITION = Position("labels", 3, 1042)
CLASSES = ("cat", "dog", "3", "0")
TABLE = Schema((4,), np.dtype("float32"), CLASSES)
NAMED = Schema((4,), np.dtype("float32"), ("cat", "dog", "owl", "elk"))


def record(value: bytes | None, key: bytes | None = b"a", headers: Headers = ()) -> Record:
    return Record(POSITION, 1_700_000_000_500, key, value, headers)


def reason_of(call: Any, *arguments: Any) -> str:
    with pytest.raises(RecordError) as caught:
        call(*arguments)
    return caught.value.reason


class TestSize:
    @pytest.mark.parametrize(
        "large",
        [
            record(b"[" * 101, None),
            record(b"{}", b"k" * 101),
            record(b"{}", b"", (("x", b"h" * 101),)),
            record(b"{}", b"", (("x" * 101, b""),)),
        ],
    )
    def test_a_record_over_the_limit_is_refused_before_it_is_parsed(self, large: Record) -> None:
        """Key, value and headers count together."""
        codec = Codec(TABLE, max_record_bytes=100)

        assert reason_of(codec.decode_sample, large) == "too_large"
        assert reason_of(codec.labels.decode, large) == "too_large"

    def test_a_record_at_the_limit_is_accepted(self) -> None:
        """One byte more is refused."""
        value = b'{"x":[1,2,3,4]}'

        assert Codec(TABLE, max_record_bytes=len(value) + 1).decode_sample(record(value)).sample_id == "a"
        assert reason_of(Codec(TABLE, max_record_bytes=len(value)).decode_sample, record(value)) == "too_large"

    def test_bodies_and_records_to_write_have_the_same_limit(self) -> None:
        """Above it nothing can be posted or encoded."""
        codec = Codec(TABLE, max_record_bytes=15)

        assert reason_of(codec.decode_payload, bytes(16), "application/octet-stream") == "too_large"
        assert reason_of(codec.encode_sample, "a", np.zeros(4, np.float32)) == "too_large"
