"""Many hostile records: each becomes a sample, a label, or bad for a known reason. More: `benchmarks/fuzz.py`."""

from __future__ import annotations

import contextlib
import faulthandler
import io
import random
import struct
import time
import tracemalloc
import zlib
from collections import Counter

import numpy as np
import pytest
from fuzzing import COLOUR, GREY, MAX_RECORD_BYTES, TABLE, damaged, outcome_of, record
from PIL import Image
from support import in_format

from streamlearn.errors import REASONS, RecordError
from streamlearn.log.codec import Codec
from streamlearn.records import Position, Record, Schema

SEED, COUNT = 20261124, 4000
MOST_CPU_S = 0.5
"""For one record of at most 20 kB. The slowest of a million took 1 % of it."""
POSITION = Position("samples", 0, 0)


def sample_record(value: bytes, content_type: bytes) -> Record:
    return Record(POSITION, 0, b"a", value, (("content-type", content_type),))


def png_of(size: tuple[int, int], rows: bytes) -> bytes:
    """A grey PNG with `size` in its header and these bytes as its rows."""
    file = b"\x89PNG\r\n\x1a\n"
    header = struct.pack(">IIBBBBB", *size, 8, 0, 0, 0, 0)
    for name, content in ((b"IHDR", header), (b"IDAT", zlib.compress(rows, 9)), (b"IEND", b"")):
        file += struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
    return file


def jpeg_of_scans(scans: int, size: int) -> bytes:
    """A progressive JPEG that repeats its last scan: few bytes each, and a pass over all pixels."""
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (size, size), np.uint8)
    Image.fromarray(noise).save(file, "JPEG", progressive=True, quality=5)
    whole = file.getvalue()
    first = whole.index(b"\xff\xda")
    # An empty refinement of one coefficient: an end-of-band run covers all blocks.
    scan = b"\xff\xda\x00\x08\x01\x01\x00\x01\x3f\x00" + b"\x00" * 4
    assert first > 0
    return whole[:-2] + scan * scans + b"\xff\xd9"


@pytest.fixture(scope="module")
def outcomes() -> Counter[str]:
    """The outcomes of all records. If one hangs, the process ends with the stacks of all threads."""
    faulthandler.dump_traceback_later(100, exit=True)
    found: Counter[str] = Counter()
    for number in range(COUNT):
        codec, kind, given = record(SEED, number)
        started = time.thread_time()
        try:
            found[outcome_of(codec, kind, given)] += 1
        except Exception as error:
            error.add_note(f"record({SEED}, {number})")
            raise
        assert time.thread_time() - started < MOST_CPU_S, f"record({SEED}, {number}) takes too long"
    faulthandler.cancel_dump_traceback_later()
    return found


def test_every_record_has_a_known_outcome(outcomes: Counter[str]) -> None:
    """No other exception, none that takes long, no byte lost in a dead letter, none uncounted."""
    assert sum(outcomes.values()) == COUNT
    assert outcomes.keys() <= {"sample", "label", *REASONS}


NOT_JSON = {"not_avro", "not_protobuf", "unknown_schema"}
"""Reasons of formats that test_formats.py fuzzes."""


def test_the_fuzzer_reaches_every_outcome(outcomes: Counter[str]) -> None:
    """Otherwise it would prove little."""
    assert {"sample", "label", *REASONS} - outcomes.keys() <= NOT_JSON | {"not_finite"}  # one in five thousand


def test_the_same_seed_makes_the_same_records() -> None:
    """A record that fails elsewhere can be reproduced here."""
    assert record(1, 7)[1:] == record(1, 7)[1:]
    assert record(1, 7)[2] != record(2, 7)[2]


class TestBombs:
    """Small inputs that could take much memory or time."""

    @pytest.mark.parametrize("size", [(6, 4), (30_000, 30_000)])
    def test_a_png_that_inflates_to_gigabytes_costs_no_memory(self, size: tuple[int, int]) -> None:
        """With a true or a false header: 64 MB of rows in 64 kB, where 24 bytes are expected."""
        bomb = png_of(size, bytes(64 << 20))
        codec = Codec(GREY, in_format("image"))
        tracemalloc.start()

        with contextlib.suppress(RecordError):
            codec.decode_sample(sample_record(bomb, b"image/png"))
        _, peak_bytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()

        assert peak_bytes < 4 << 20

    def test_a_jpeg_of_many_scans_is_refused_before_it_is_decoded(self) -> None:
        """Each scan of 14 bytes is a pass over all pixels; a camera's file has about ten scans."""
        schema = Schema((1, 1024, 1024), np.dtype("uint8"), ("cat", "dog"))
        bomb = jpeg_of_scans(20_000, 1024)
        started = time.thread_time()

        with pytest.raises(RecordError, match="scans") as caught:
            Codec(schema, in_format("image")).decode_sample(sample_record(bomb, b"image/jpeg"))

        assert caught.value.reason == "bad_image"
        assert time.thread_time() - started < MOST_CPU_S

    def test_a_usual_progressive_jpeg_is_accepted(self) -> None:
        """The bound does not affect what encoders write."""
        schema = Schema((1, 64, 64), np.dtype("uint8"), ("cat", "dog"))

        sample = Codec(schema, in_format("image")).decode_sample(sample_record(jpeg_of_scans(0, 64), b"image/jpeg"))

        assert sample.x.shape == (1, 64, 64)

    @pytest.mark.parametrize("value", [b"[" * 4_000_000, b'{"x":' * 800_000, b'{"x":' + b"[" * 4_000_000])
    def test_deep_nesting_is_refused(self, value: bytes) -> None:
        """It exhausts neither the stack nor the time."""
        started = time.thread_time()

        with pytest.raises(RecordError) as caught:
            Codec(TABLE).decode_sample(sample_record(value, b"application/json"))

        assert caught.value.reason == "not_json"
        assert time.thread_time() - started < MOST_CPU_S

    def test_a_header_of_a_huge_tensor_allocates_nothing(self) -> None:
        """A .npy file of a few bytes can name any shape."""
        header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (3, 900000000, 900000000), }"
        value = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header

        with pytest.raises(RecordError) as caught:
            Codec(COLOUR).decode_sample(sample_record(value, b"application/x-npy"))

        assert caught.value.reason == "bad_shape"

    def test_many_headers_count_as_bytes(self) -> None:
        """A record with a small value can be large."""
        given = Record(POSITION, 0, b"a", b"{}", tuple(("x", b"y" * 10) for _ in range(MAX_RECORD_BYTES // 10)))

        with pytest.raises(RecordError) as caught:
            Codec(TABLE, max_record_bytes=MAX_RECORD_BYTES).decode_sample(given)

        assert caught.value.reason == "too_large"

    def test_json_costs_at_most_forty_times_its_bytes(self) -> None:
        """Empty lists cost the most; docs/security.md uses this figure."""
        value = b'{"x":[' + b"[]," * 100_000 + b"[]]}"
        codec = Codec(TABLE)
        tracemalloc.start()

        with pytest.raises(RecordError):
            codec.decode_sample(sample_record(value, b"application/json"))
        _, peak_bytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()

        assert peak_bytes < 40 * len(value)


def test_damage_changes_what_it_damages() -> None:
    """A fuzzer that changes nothing finds nothing."""
    rng = random.Random(1)
    whole = b'{"id":"a","x":[1,2,3,4]}'

    assert sum(damaged(rng, whole) == whole for _ in range(200)) < 20
