"""The codec: which bytes become a sample or a label, and which are refused for which reason."""

from __future__ import annotations

import io
import zlib
from typing import Any, Literal, cast

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from support import in_format

from streamlearn.errors import REASONS, RecordError
from streamlearn.log.codec import Codec
from streamlearn.log.dead_letters import dead_letter, read_dead_letter
from streamlearn.records import (
    UNLABELLED,
    Array,
    Headers,
    Label,
    NewRecord,
    Position,
    Prediction,
    Record,
    Sample,
    Schema,
)

POSITION = Position("samples", 3, 1042)
CLASSES = ("cat", "dog", "3", "0")
DTYPES = ("uint8", "int8", "int16", "int32", "float16", "float32", "float64")
EXIF = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x0f\x01\x02\0\x04\0\0\0abc\0\0\0\0\0"
FUZZ = settings(max_examples=300, deadline=None, database=None, print_blob=True)

TABLE = Schema((4,), np.dtype("float32"), CLASSES)
NAMED = Schema((4,), np.dtype("float32"), ("cat", "dog", "owl", "elk"))
GREY = Schema((1, 5, 7), np.dtype("uint8"), CLASSES)
COLOUR = Schema((3, 5, 7), np.dtype("uint8"), CLASSES)
GREY_CODEC = Codec(GREY, in_format("image"))
ANY_CODECS = tuple(Codec(schema, in_format(payload)) for schema in (TABLE, GREY) for payload in ("json", "raw", "npy"))


def record(value: bytes | None, key: bytes | None = b"a", headers: Headers = ()) -> Record:
    return Record(POSITION, 1_700_000_000_500, key, value, headers)


def as_read(new: NewRecord) -> Record:
    return Record(POSITION, 1_700_000_000_500, new.key, new.value, new.headers)


def json_record(**fields: Any) -> Record:
    return record(orjson.dumps(fields), key=None)


def image_bytes(mode: str = "L", size: tuple[int, int] = (7, 5), kind: str = "PNG", **options: Any) -> bytes:
    rng = np.random.default_rng(0)
    image = Image.frombytes("RGB", size, rng.integers(0, 256, size[0] * size[1] * 3, np.uint8).tobytes()).convert(mode)
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def npy_bytes(x: Array, version: tuple[int, int] | None = None) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, x, version=version, allow_pickle=False)
    return file.getvalue()


def reason_of(call: Any, *arguments: Any) -> str:
    with pytest.raises(RecordError) as caught:
        call(*arguments)
    return caught.value.reason


@st.composite
def samples(draw: st.DrawFn) -> tuple[Codec, dict[str, Any]]:
    """A codec of a random schema, and the arguments of a matching sample."""
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=4)))
    dtype = np.dtype(draw(st.sampled_from(DTYPES)))
    if dtype.kind == "f":
        width: Literal[16, 32, 64] = {2: 16, 4: 32, 8: 64}[dtype.itemsize]  # type: ignore[assignment]
        bound = min(2.0**63, float(np.finfo(cast(Any, dtype)).max))
        numbers: st.SearchStrategy[Any] = st.floats(-bound, bound, width=width)
    else:
        numbers = st.integers(int(np.iinfo(dtype).min), int(np.iinfo(dtype).max))
    count = int(np.prod(shape))
    x = np.array(draw(st.lists(numbers, min_size=count, max_size=count)), dtype).reshape(shape)
    weights = np.array(draw(st.lists(st.integers(1, 100), min_size=4, max_size=4)), np.float32)
    answer = Prediction(draw(st.integers(0, 3)), weights / weights.sum(), draw(st.integers(0, 2**63 - 1)))
    optional_class = st.none() | st.integers(0, 3)
    arguments = {
        "sample_id": draw(st.text(st.characters(codec="utf-8"), min_size=1, max_size=100)),
        "x": x,
        "payload": draw(st.sampled_from(("json", "raw", "npy"))),
        "label": draw(optional_class),
        "event_time_s": draw(st.none() | st.floats(0, 1e11, exclude_max=True)),
        "domain": draw(st.none() | st.text(st.characters(codec="utf-8"), min_size=1, max_size=60)),
        "true_label": draw(optional_class),
        "answer": draw(st.sampled_from((None, answer))),
    }
    configured = draw(st.sampled_from(("json", "raw", "npy", "image")))
    return Codec(Schema(shape, dtype, CLASSES), in_format(configured)), arguments


JSON_FIELDS = ("id", "x", "label", "class", "time", "domain", "source", "true_label", "answer")
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
header_names = st.sampled_from(("content-type", "Content-Type", "label", "time", "domain", "true-label", "answer", "z"))
content_types = st.sampled_from(
    (
        b"application/json",
        b"application/octet-stream",
        b"application/x-npy",
        b"image/png",
        b"Image/WebP; q=1",
        b"text/x",
    )
)
header_lists = st.lists(st.tuples(header_names, content_types | st.binary(max_size=30)), max_size=4).map(tuple)


class TestRoundTrip:
    @given(samples())
    @FUZZ
    def test_a_sample_decodes_to_what_was_encoded(self, drawn: tuple[Codec, dict[str, Any]]) -> None:
        """Every field of a sample survives each payload bit for bit, for any payload configured in the reader."""
        codec, arguments = drawn

        sample = codec.decode_sample(as_read(codec.encode_sample(**arguments)))

        answer = arguments.pop("answer")
        x = arguments.pop("x")
        del arguments["payload"]
        assert {name: getattr(sample, name) for name in arguments} == arguments
        assert sample.x.dtype == x.dtype
        assert np.array_equal(sample.x, x)
        assert (sample.position, sample.timestamp_s) == (POSITION, 1_700_000_000.5)
        assert (sample.answer is None) == (answer is None)
        if answer is not None and sample.answer is not None:
            assert (sample.answer.class_index, sample.answer.model_version) == (
                answer.class_index,
                answer.model_version,
            )
            assert np.array_equal(sample.answer.probabilities_C, answer.probabilities_C)

    @given(
        st.text(st.characters(codec="utf-8"), min_size=1, max_size=100),
        st.integers(0, 3),
        st.none() | st.floats(0, 1e11, exclude_max=True),
        st.none() | st.text(st.characters(codec="utf-8"), min_size=1, max_size=60),
    )
    @FUZZ
    def test_a_label_decodes_to_what_was_encoded(
        self, sample_id: str, index: int, time: float | None, source: str | None
    ):
        """Every field of a label survives; a class named "0" that is not the first keeps its index."""
        codec = ANY_CODECS[0]

        label = codec.labels.decode(as_read(codec.labels.encode(sample_id, index, event_time_s=time, source=source)))

        assert (label.sample_id, label.class_index, label.event_time_s, label.source) == (
            sample_id,
            index,
            time,
            source,
        )

    def test_a_time_of_minus_zero_is_written_as_zero(self) -> None:
        """A header would lose its sign."""
        written = as_read(ANY_CODECS[0].encode_sample("a", np.zeros(4, np.float32), event_time_s=-0.0))

        assert ANY_CODECS[0].decode_sample(written).event_time_s == 0.0

    def test_the_key_is_the_id_and_the_timestamp_is_kept(self) -> None:
        """Samples and labels of one id share a key, so they go to the same partition number."""
        codec = ANY_CODECS[0]

        sample = codec.encode_sample("ä1", np.zeros(4, np.float32), timestamp_ms=7)
        label = codec.labels.encode("ä1", 0, timestamp_ms=8)

        assert (sample.key, sample.timestamp_ms, label.key, label.timestamp_ms) == ("ä1".encode(), 7, "ä1".encode(), 8)

    @pytest.mark.parametrize(
        ("arguments", "reason"),
        [
            ({"sample_id": ""}, "no_id"),
            ({"sample_id": "\ud800"}, "no_id"),
            ({"sample_id": "é" * 257}, "no_id"),
            ({"x": np.zeros(5, np.float32)}, "bad_shape"),
            ({"x": np.zeros(4, np.float64)}, "bad_dtype"),
            ({"x": np.full(4, np.nan, np.float32)}, "not_finite"),
            ({"label": 4}, "unknown_class"),
            ({"true_label": -1}, "unknown_class"),
            ({"event_time_s": -1.0}, "bad_time"),
            ({"domain": "d" * 257}, "too_large"),
            ({"answer": Prediction(0, np.ones(3, np.float32) / 3, 1)}, "bad_shape"),
        ],
    )
    def test_nothing_is_encoded_that_could_not_be_decoded(self, arguments: dict[str, Any], reason: str) -> None:
        """Encoding refuses what decoding would refuse, with the same reason."""
        whole = {"sample_id": "a", "x": np.zeros(4, np.float32)} | arguments

        assert reason_of(lambda: ANY_CODECS[0].encode_sample(**whole)) == reason

    @pytest.mark.parametrize("payload", ["json", "raw", "npy"])
    def test_a_label_inside_of_an_unknown_class_keeps_its_name_if_held(self, payload: str) -> None:
        """The sample is not lost with its label; if such labels are refused, it is a bad record."""
        held, refused = (Codec(TABLE, unknown_class=policy) for policy in ("hold", "refuse"))
        written = held.encode_sample(
            "a", np.zeros(4, np.float32), payload=payload, label=UNLABELLED, class_name="glühbirne"
        )

        sample = held.decode_sample(as_read(written))

        assert (sample.label, sample.class_name, sample.x.tolist()) == (UNLABELLED, "glühbirne", [0.0] * 4)
        assert sample.inside is not None
        assert (sample.inside.position, sample.inside.class_name) == (sample.position, "glühbirne")
        assert reason_of(refused.decode_sample, as_read(written)) == "unknown_class"


class TestJsonSample:
    def test_reads_every_field(self) -> None:
        """Unknown fields are ignored."""
        answer = {"class_index": 1, "probabilities": [0.25, 0.75, 0, 0], "model_version": 9}
        fields = {"id": "a", "x": [1, 2.5, True, 0], "label": "dog", "time": "2024-01-01T01:00:00+01:00", "domain": "d"}

        sample = Codec(TABLE).decode_sample(json_record(**fields, true_label=3, answer=answer, more=1))

        assert sample.x.tolist() == [1.0, 2.5, 1.0, 0.0]
        assert (sample.sample_id, sample.label, sample.domain, sample.true_label) == ("a", 1, "d", 2)
        assert sample.event_time_s == 1_704_067_200.0
        assert sample.answer is not None
        assert (sample.answer.class_index, sample.answer.model_version) == (1, 9)
        assert sample.answer.probabilities_C.dtype == np.float32

    @pytest.mark.parametrize(
        ("key", "field", "expected"),
        [(b"a", None, "a"), (None, "a", "a"), (b"", "a", "a"), (b"a", "a", "a"), (b"17", 17, "17"), (None, 17, "17")],
    )
    def test_takes_the_id_from_field_or_key(self, key: bytes | None, field: object, expected: str) -> None:
        """One of the two is enough; an integer is an id by its digits."""
        value = orjson.dumps({"id": field, "x": [1, 2, 3, 4]})

        assert Codec(TABLE).decode_sample(record(value, key)).sample_id == expected

    @pytest.mark.parametrize(
        ("key", "field"),
        [
            (None, None),
            (b"", None),
            (b"b", "a"),
            (b"\xff", "a"),
            (b"\xff", None),
            (None, ""),
            (None, True),
            (None, 1.0),
            (None, []),
            (None, "a" * 513),
            (b"a" * 513, None),
            (None, "é" * 257),
        ],
    )
    def test_refuses_ids_that_are_missing_wrong_or_differ_from_the_key(self, key: bytes | None, field: object) -> None:
        """If the id differed from the key, its label would go to another partition."""
        value = orjson.dumps({"id": field, "x": [1, 2, 3, 4]})

        assert reason_of(Codec(TABLE).decode_sample, record(value, key)) == "no_id"

    @pytest.mark.parametrize(
        ("value", "reason"),
        [
            (None, "no_value"),
            (b"", "not_json"),
            (b"{", "not_json"),
            (b"[1,2,3,4]", "not_json"),
            (b'{"x": [1, 2, 3, NaN]}', "bad_dtype"),
            (b'{"x": [1, 2, 3, NaN}', "not_json"),
            (b'{"x": [1, 2, 3, 1e999]}', "not_json"),
            (b"\xff\xfe", "not_json"),
            (b'{"id": "a"}', "no_value"),
            (b'{"x": 1}', "bad_shape"),
            (b'{"x": {"0": 1}}', "bad_shape"),
            (b'{"x": [1, 2, 3, 4], "label": "cow"}', "unknown_class"),
            (b'{"x": [1, 2, 3, 4], "label": 4}', "unknown_class"),
            (b'{"x": [1, 2, 3, 4], "label": true}', "unknown_class"),
            (b'{"x": [1, 2, 3, 4], "label": 1.0}', "unknown_class"),
            (b'{"x": [1, 2, 3, 4], "true_label": []}', "unknown_class"),
            (b'{"x": [1, 2, 3, 4], "domain": []}', "bad_dtype"),
            (b'{"x": [1, 2, 3, 4], "time": []}', "bad_time"),
        ],
    )
    def test_names_what_is_wrong(self, value: bytes | None, reason: str) -> None:
        """Each kind of bad record has its reason."""
        assert reason_of(Codec(TABLE).decode_sample, record(value)) == reason

    def test_the_message_has_the_position_what_was_found_and_what_was_expected(self) -> None:
        """The position comes first, so that a dead letter can be found by it."""
        with pytest.raises(RecordError) as caught:
            Codec(Schema((16,), np.dtype("float32"), CLASSES)).decode_sample(json_record(id="a", x=[0] * 15))

        assert str(caught.value) == "samples[3]@1042: expected shape (16,), got (15,)"

    @pytest.mark.parametrize("field", ["id", "x", "label", "time", "domain", "answer"])
    @pytest.mark.parametrize("depth", [500, 1000, 100_000])
    def test_deep_nesting_is_refused_without_recursion(self, field: str, depth: int) -> None:
        """A thousand brackets, which the parser accepts, make a bad record in any field."""
        good = {"id": "a", "x": [1, 2, 3, 4], field: "DEEP"}
        value = orjson.dumps(good).replace(b'"DEEP"', b"[" * depth + b"]" * depth)

        assert reason_of(Codec(TABLE).decode_sample, record(value, None)) in REASONS


class TestJsonPayload:
    @pytest.mark.parametrize("nested", [True, False])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_flat_and_nested_lists_are_the_same_tensor(self, dtype: str, nested: bool) -> None:
        """A flat list of the right length is in C order."""
        x = np.arange(12).reshape(1, 3, 4).astype(dtype)
        value = x.tolist() if nested else x.ravel().tolist()

        read = Codec(Schema((1, 3, 4), np.dtype(dtype), CLASSES)).tensors.from_json(value)

        assert read.dtype == x.dtype
        assert np.array_equal(read, x)

    @pytest.mark.parametrize(
        "value",
        [
            [],
            [[]],
            [1, 2, 3],
            [[1, 2], [3, 4], [5, 6]],
            [[1, 2, 3], [4]],
            [[1, 2], 3],
            [1, [2], 3, 4],
            [[[1], [2]], [[3], [4]]],
            [[1, 2], {"3": 4}],
            "1234",
            4,
            None,
        ],
    )
    def test_another_shape_is_refused(self, value: object) -> None:
        """Ragged, short, deep and missing levels differ, even if the count of numbers is right."""
        assert reason_of(Codec(Schema((2, 2), np.dtype("int16"), CLASSES)).tensors.from_json, value) == "bad_shape"

    @pytest.mark.parametrize(
        ("dtype", "number"),
        [
            ("uint8", 300),
            ("uint8", -1),
            ("uint8", 1.5),
            ("uint8", "7"),
            ("uint8", {}),
            ("uint8", float("nan")),
            ("int8", 128),
            ("int8", float("inf")),
            ("int16", 40_000),
            ("int32", 2**31),
            ("int32", 2**64 - 1),
            ("int32", 10**400),
            ("float32", "7"),
            ("float32", 10**400),
            ("float64", None),
        ],
    )
    def test_a_number_that_the_dtype_cannot_hold_is_refused(self, dtype: str, number: object) -> None:
        """Nothing wraps around, is truncated, or is parsed from text."""
        codec = Codec(Schema((2,), np.dtype(dtype), CLASSES))

        assert reason_of(codec.tensors.from_json, [1, number]) == "bad_dtype"

    @pytest.mark.parametrize(
        ("dtype", "number"),
        [("float16", 70_000), ("float32", 1e39), ("float64", float("nan")), ("float32", float("-inf"))],
    )
    def test_a_float_that_is_or_becomes_infinite_is_refused(self, dtype: str, number: float) -> None:
        """A number above the range of a narrow float is not finite; there is no warning."""
        codec = Codec(Schema((2,), np.dtype(dtype), CLASSES))

        assert reason_of(codec.tensors.from_json, [0.5, number]) == "not_finite"

    def test_long_text_among_many_numbers_costs_no_memory(self) -> None:
        """An array of fixed-width text would need the product of their lengths."""
        codec = Codec(Schema((100_001,), np.dtype("float32"), CLASSES))

        assert reason_of(codec.tensors.from_json, ["x" * 1_000_000, *[0] * 100_000]) == "bad_dtype"


class TestBinarySample:
    def test_an_empty_header_is_no_label(self) -> None:
        """As empty text in a field."""
        codec = Codec(TABLE, in_format("raw"))

        assert codec.decode_sample(record(bytes(16), b"a", (("label", b""),))).label is None

    def test_reads_every_header(self) -> None:
        """The id is the key; the other fields are headers, in any case."""
        x = np.arange(4, dtype=np.float32)
        answer = b'{"class_index": 0, "probabilities": [1, 0, 0, 0], "model_version": 2}'
        headers = (("Content-Type", b"application/octet-stream; v=1"), ("Label", b"dog"), ("time", b"12.5"))
        headers += (("domain", b"d"), ("true-label", b"dog"), ("answer", answer), ("trace", b"\xff"))

        sample = Codec(TABLE).decode_sample(record(x.tobytes(), b"a", headers))

        assert sample.x.tolist() == [0, 1, 2, 3]
        assert (sample.sample_id, sample.label, sample.true_label, sample.domain) == ("a", 1, 1, "d")
        assert sample.event_time_s == 12.5
        assert sample.answer is not None
        assert sample.answer.model_version == 2

    def test_raw_floats_are_little_endian_and_not_copied(self) -> None:
        """The tensor is a view of the record's bytes."""
        value = bytes.fromhex("0000803f000000400000404000008040")

        x = Codec(TABLE, in_format("raw")).decode_sample(record(value)).x

        assert x.tolist() == [1, 2, 3, 4]
        assert not x.flags.owndata

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    @pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
    @pytest.mark.parametrize("payload", ["raw", "npy"])
    def test_floats_that_are_not_finite_are_refused(self, payload: str, dtype: str, bad: float) -> None:
        """NaN and both infinities, in every float dtype, raw or .npy."""
        x = np.array([0, bad, 1, 2], dtype)
        value = x.tobytes() if payload == "raw" else npy_bytes(x)
        codec = Codec(Schema((4,), x.dtype, CLASSES), in_format(payload))

        assert reason_of(codec.decode_sample, record(value)) == "not_finite"

    @pytest.mark.parametrize("dtype", ["float32", "float64"])
    @pytest.mark.parametrize("payload", ["raw", "npy", "json"])
    @pytest.mark.parametrize("sign", [1.0, -1.0])
    def test_floats_whose_square_is_infinite_in_the_network_are_refused(
        self, payload: str, dtype: str, sign: float
    ) -> None:
        """One of them makes the variance of its batch infinite. The largest with a finite square is accepted."""
        codec = Codec(Schema((4,), np.dtype(dtype), CLASSES), in_format(payload))
        outcomes = []
        for largest in (1.8e19, 1.9e19, 1e30):
            x = np.array([0, sign * largest, 1, 2], dtype)
            json_x = orjson.dumps({"x": x.tolist()})
            value = {"raw": x.tobytes(), "npy": npy_bytes(x), "json": json_x}[payload]
            outcomes.append(reason_of(codec.decode_sample, record(value)) if largest > 1.8e19 else None)
            if largest == 1.8e19:
                assert np.isfinite(np.square(codec.decode_sample(record(value)).x.astype(np.float32))).all()

        assert outcomes == [None, "not_finite", "not_finite"]

    @pytest.mark.parametrize(("scale", "taken"), [(1e-3, 1.8e22), (-10.0, 1.8e18)])
    def test_the_bound_of_floats_applies_after_the_scale(self, scale: float, taken: float) -> None:
        """As the network sees them; the message has the bound and the number."""
        codec = Codec(Schema((2,), np.dtype("float32"), CLASSES, scale=scale))

        assert codec.tensors.from_json([0.0, taken]).tolist()[1] == pytest.approx(taken)
        with pytest.raises(RecordError, match=r"up to 1.8e\+\d\d, whose square is finite in float32, got -2e\+\d\d"):
            codec.tensors.from_json([0.0, -taken / 0.9])

    def test_a_float_that_is_too_large_is_not_encoded(self) -> None:
        """It would become a dead letter."""
        codec = Codec(TABLE)

        assert reason_of(codec.encode_sample, "a", np.array([0, 1e30, 0, 0], np.float32)) == "not_finite"

    @pytest.mark.parametrize("length", [0, 1, 15, 17, 32])
    def test_raw_of_another_length_is_refused(self, length: int) -> None:
        """Only the byte count tells the shape."""
        assert reason_of(Codec(TABLE, in_format("raw")).decode_sample, record(bytes(length))) == "bad_shape"

    @pytest.mark.parametrize(
        ("header", "reason"),
        [
            (("content-type", b"text/csv"), "bad_content_type"),
            (("content-type", b""), "bad_content_type"),
            (("content-type", b"\xff"), "bad_content_type"),
            (("label", b"cow"), "unknown_class"),
            (("label", b"\xff"), "bad_dtype"),
            (("true-label", b"9"), "unknown_class"),
            (("time", b"yesterday"), "bad_time"),
            (("time", b"nan"), "bad_time"),
            (("time", b"1_0"), "bad_time"),
            (("time", b"-1"), "bad_time"),
            (("time", b"\xff"), "bad_time"),
            (("domain", b"\xff"), "bad_dtype"),
            (("answer", b"{"), "not_json"),
            (("answer", b"1"), "not_json"),
        ],
    )
    def test_names_the_bad_header(self, header: tuple[str, bytes], reason: str) -> None:
        """An invalid header makes the record bad; it is not ignored."""
        assert reason_of(Codec(TABLE, in_format("raw")).decode_sample, record(bytes(16), b"a", (header,))) == reason

    def test_without_a_key_has_no_id(self) -> None:
        """A binary sample has no other place for its id."""
        assert reason_of(Codec(TABLE, in_format("raw")).decode_sample, record(bytes(16), None)) == "no_id"

    def test_content_type_overrides_the_configured_payload(self) -> None:
        """A topic may mix payloads."""
        value = b'{"x": [1, 2, 3, 4]}'
        headers = (("CONTENT-TYPE", b"Application/JSON;charset=utf-8"),)

        assert Codec(TABLE, in_format("raw")).decode_sample(record(value, b"a", headers)).x.tolist() == [1, 2, 3, 4]


class TestAnswer:
    GOOD: dict[str, Any] = {"class_index": 1, "probabilities": [0.1, 0.9, 0, 0], "model_version": 3}  # noqa: RUF012

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            ({"class_index": 4}, "unknown_class"),
            ({"class_index": -1}, "unknown_class"),
            ({"class_index": True}, "unknown_class"),
            ({"class_index": "cat"}, "unknown_class"),
            ({"model_version": -1}, "bad_dtype"),
            ({"model_version": 2**63}, "bad_dtype"),
            ({"model_version": 1.0}, "bad_dtype"),
            ({"probabilities": [0.5, 0.5]}, "bad_shape"),
            ({"probabilities": None}, "bad_shape"),
            ({"probabilities": ["1", 0, 0, 0]}, "bad_dtype"),
            ({"probabilities": [[1], 0, 0, 0]}, "bad_dtype"),
            ({"probabilities": [0.5, 0.6, 0, 0]}, "bad_dtype"),
            ({"probabilities": [0.2, 0.2, 0.2, 0.2]}, "bad_dtype"),
            ({"probabilities": [-0.5, 1, 0.5, 0]}, "bad_dtype"),
        ],
    )
    def test_a_forged_or_malformed_answer_is_a_bad_record(self, change: dict[str, Any], reason: str) -> None:
        """It would be scored like an answer of the model."""
        bad = json_record(id="a", x=[1, 2, 3, 4], answer=self.GOOD | change)

        assert reason_of(Codec(TABLE).decode_sample, bad) == reason

    def test_probabilities_rounded_by_a_client_are_accepted(self) -> None:
        """Their sum may differ from one by 0.01."""
        answer = self.GOOD | {"probabilities": [0.333, 0.333, 0.333, 0]}

        assert Codec(TABLE).decode_sample(json_record(id="a", x=[1, 2, 3, 4], answer=answer)).answer is not None


class TestNpy:
    @pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
    @pytest.mark.parametrize("order", ["C", "F"])
    @pytest.mark.parametrize("byte_order", ["<", ">"])
    def test_reads_each_version_layout_and_byte_order(
        self, version: tuple[int, int], order: Any, byte_order: Any
    ) -> None:
        """A file written by NumPy becomes a native C-order tensor with the same numbers."""
        x = np.arange(24).reshape(2, 3, 4).astype(np.dtype("int32").newbyteorder(byte_order))
        value = npy_bytes(np.asarray(x, order=order), version)

        read = Codec(Schema((2, 3, 4), np.dtype("int32"), CLASSES)).decode_payload(value, "application/x-npy")

        assert read.dtype == np.dtype("int32")
        assert read.flags.c_contiguous
        assert np.array_equal(read, x)

    @pytest.mark.parametrize(
        ("x", "reason"),
        [
            (np.zeros(4, np.float64), "bad_dtype"),
            (np.zeros(4, np.int32), "bad_dtype"),
            (np.zeros(4, "U1"), "bad_dtype"),
            (np.zeros(4, [("a", "f4")]), "bad_dtype"),
            (np.zeros(5, np.float32), "bad_shape"),
            (np.zeros((2, 2), np.float32), "bad_shape"),
            (np.zeros((), np.float32), "bad_shape"),
        ],
    )
    def test_another_dtype_or_shape_is_refused(self, x: Array, reason: str) -> None:
        """The file must match the schema, not only be convertible to it."""
        assert reason_of(Codec(TABLE).decode_payload, npy_bytes(x), "application/x-npy") == reason

    @pytest.mark.parametrize("change", [lambda b: b[:-1], lambda b: b + b"\0", lambda b: b[:64], lambda b: b[:9]])
    def test_a_truncated_or_extended_file_is_refused(self, change: Any) -> None:
        """Header and data must fill the file exactly."""
        value = change(npy_bytes(np.zeros(4, np.float32)))

        assert reason_of(Codec(TABLE).decode_payload, value, "application/x-npy") in ("bad_shape", "bad_dtype")

    def test_an_object_array_is_never_unpickled(self) -> None:
        """A dtype that needs pickle is not among the dtypes that are matched."""
        file = io.BytesIO()
        np.lib.format.write_array(file, np.array([print] * 4, object), allow_pickle=True)

        assert reason_of(Codec(TABLE).decode_payload, file.getvalue(), "application/x-npy") == "bad_dtype"

    def test_a_header_of_gigabytes_allocates_nothing(self) -> None:
        """The length of the header is checked before it is read, and the shape before the data."""
        value = b"\x93NUMPY\x02\x00" + (2**32 - 1).to_bytes(4, "little") + b"x" * 50

        assert reason_of(Codec(TABLE).decode_payload, value, "application/x-npy") == "bad_dtype"


class TestImage:
    @pytest.mark.parametrize("kind", ["PNG", "WEBP"])
    @pytest.mark.parametrize("schema", [GREY, COLOUR])
    def test_lossless_pixels_arrive_channels_first(self, kind: str, schema: Schema) -> None:
        """uint8 (C, H, W), converted to the schema's number of channels."""
        value = image_bytes("RGB", kind=kind, **({"lossless": True} if kind == "WEBP" else {}))
        image = Image.open(io.BytesIO(value)).convert("L" if schema is GREY else "RGB")

        x = Codec(schema).decode_payload(value, "image/*")

        assert (x.dtype, x.shape, x.flags.c_contiguous) == (np.uint8, schema.shape, True)
        assert all(np.array_equal(x[c], np.asarray(image).reshape(5, 7, -1)[:, :, c]) for c in range(schema.shape[0]))

    @pytest.mark.parametrize("schema", [GREY, COLOUR])
    @pytest.mark.parametrize(
        ("mode", "kind"),
        [
            ("1", "PNG"),
            ("L", "PNG"),
            ("LA", "PNG"),
            ("P", "PNG"),
            ("RGBA", "PNG"),
            ("L", "JPEG"),
            ("RGB", "JPEG"),
            ("CMYK", "JPEG"),
            ("RGB", "WEBP"),
            ("RGBA", "WEBP"),
        ],
    )
    def test_every_mode_of_eight_bits_is_converted(self, mode: str, kind: str, schema: Schema) -> None:
        """Palettes, alpha and CMYK become grey or colour, without a warning."""
        x = Codec(schema).decode_payload(image_bytes(mode, kind=kind), f"image/{kind.lower()}")

        assert x.shape == schema.shape

    def test_a_palette_with_transparency_is_converted(self) -> None:
        """Pillow would warn about it."""
        value = image_bytes("P", transparency=bytes(range(256)))

        assert Codec(COLOUR).decode_payload(value, "image/png").shape == (3, 5, 7)

    def test_sixteen_bits_are_refused(self) -> None:
        """Their conversion clips: a silent loss."""
        file = io.BytesIO()
        Image.fromarray(np.full((5, 7), 40_000, np.uint16)).save(file, "PNG")

        assert reason_of(Codec(GREY).decode_payload, file.getvalue(), "image/png") == "bad_image"

    @pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
    def test_another_size_is_refused(self, kind: str) -> None:
        """Nothing is resized: the schema has width and height."""
        value = image_bytes("RGB", (5, 7), kind)

        assert reason_of(Codec(COLOUR).decode_payload, value, "image/png") == "bad_shape"

    @pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "PPM", "ICO", "TGA"])
    def test_other_formats_are_refused(self, kind: str) -> None:
        """Only three decoders can be reached, for any content type."""
        assert reason_of(Codec(COLOUR).decode_payload, image_bytes("RGB", kind=kind), "image/png") == "bad_image"

    def test_a_decompression_bomb_is_refused_by_its_header(self) -> None:
        """A PNG of four gigabytes is refused after its first bytes, without a warning."""
        small = image_bytes("L")
        ihdr = b"IHDR" + (65_535).to_bytes(4, "big") * 2 + small[24:29]
        value = small[:12] + ihdr + zlib.crc32(ihdr).to_bytes(4, "big") + small[33:]

        assert reason_of(Codec(GREY).decode_payload, value, "image/png") == "bad_shape"

    def test_a_webp_canvas_is_checked_before_the_decoder_allocates_it(self) -> None:
        """A canvas of 16384 by 16384 in the extended header is refused, although the frame in it fits."""
        value = bytearray(image_bytes("RGBA", kind="WEBP", exif=EXIF))
        assert value[12:16] == b"VP8X"
        value[24:30] = b"\xff\x3f\x00" * 2

        with pytest.raises(RecordError, match="got 16384 by 16384"):
            Codec(COLOUR).decode_payload(bytes(value), "image/webp")

    @pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
    def test_a_truncated_file_is_refused(self, kind: str) -> None:
        """Missing pixels are not filled in."""
        value = image_bytes("RGB", kind=kind)

        assert reason_of(Codec(COLOUR).decode_payload, value[: len(value) * 2 // 3], "image/png") == "bad_image"

    def test_a_table_accepts_no_image(self) -> None:
        """Images need a schema of uint8 (1 or 3, height, width)."""
        assert reason_of(Codec(TABLE).decode_payload, image_bytes(), "image/png") == "bad_content_type"


@pytest.mark.parametrize(
    ("value", "reason", "message"),
    [
        (b'{"id": "a", "x": [1, NaN, 3, 4]}', "bad_dtype", "got null: replace missing values"),
        (b'{"id": "a", "x": [1, null, 3, 4]}', "bad_dtype", "got null: replace missing values"),
    ],
)
def test_a_missing_value_in_json_gets_a_hint(value: bytes, reason: str, message: str) -> None:
    """It is the most common error in tables."""
    with pytest.raises(RecordError, match=message) as caught:
        Codec(TABLE).decode_sample(record(value))

    assert caught.value.reason == reason


def test_a_missing_value_in_a_tensor_is_named_by_its_place() -> None:
    """Row and feature."""
    x = np.zeros((3, 4), np.float32)
    x[1, 2] = np.nan

    with pytest.raises(RecordError, match=r"NaN or infinity at \[1, 2\]: replace missing values"):
        Codec(Schema((3, 4), np.dtype("float32"), CLASSES)).decode_payload(x.tobytes(), "application/octet-stream")


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


class TestPayloadType:
    @pytest.mark.parametrize("content_type", ["application/json", "text/plain", "", "image", "é"])
    def test_a_body_that_is_not_a_tensor_is_refused(self, content_type: str) -> None:
        """JSON bodies go through `tensors.from_json`."""
        assert reason_of(Codec(GREY).decode_payload, bytes(35), content_type) == "bad_content_type"


class TestHostileBytes:
    @given(st.sampled_from(ANY_CODECS), st.binary(max_size=80), st.none() | st.binary(max_size=8), header_lists)
    @FUZZ
    def test_any_bytes_decode_or_are_a_bad_record(
        self, codec: Codec, value: bytes, key: bytes | None, headers: Headers
    ) -> None:
        """Random value, key and headers: the only error is RecordError, for samples and for labels."""
        for decode in (codec.decode_sample, codec.labels.decode):
            try:
                decode(record(value, key, headers))
            except RecordError as error:
                message = str(error)
            else:
                continue
            assert message.startswith("samples[3]@1042: ")

    @given(
        st.fixed_dictionaries(
            {},
            optional=dict.fromkeys(JSON_FIELDS, json_values),
        ),
        st.booleans(),
    )
    @FUZZ
    def test_any_json_object_decodes_or_is_a_bad_record(self, fields: dict[str, Any], sound: bool) -> None:
        """Fields of any JSON type in any place. With a valid payload and id, later fields are reached too."""
        value = orjson.dumps({"id": "a", "x": [1, 2, 3, 4], "label": 0} | fields if sound else fields)
        for decode, kind in ((Codec(TABLE).decode_sample, Sample), (Codec(TABLE).labels.decode, Label)):
            try:
                decoded = decode(record(value, None))
            except RecordError:
                continue
            assert isinstance(decoded, kind)
            assert decoded.sample_id

    @given(
        st.sampled_from(
            [
                image_bytes("L"),
                image_bytes("P", transparency=bytes(range(256))),
                image_bytes("L", save_all=True, append_images=[Image.new("L", (7, 5), 9)]),
                image_bytes("RGB", kind="JPEG"),
                image_bytes("RGB", kind="JPEG", exif=EXIF),
                image_bytes("RGB", kind="WEBP"),
                image_bytes("RGBA", kind="WEBP", lossless=True, exif=EXIF),
            ]
        ),
        st.lists(st.tuples(st.integers(0, 2000), st.binary(min_size=0, max_size=4)), min_size=1, max_size=4),
        st.integers(0, 2000),
    )
    @settings(FUZZ, max_examples=600)
    def test_any_damage_to_an_image_decodes_or_is_a_bad_record(
        self, value: bytes, patches: list[tuple[int, bytes]], cut: int
    ) -> None:
        """Bytes changed, inserted, removed or truncated in PNG (animated too), JPEG (with EXIF) and WebP."""
        damaged = bytearray(value)
        for at, patch in patches:
            damaged[at % len(value) : at % len(value) + max(1, len(patch))] = patch
        if cut < len(damaged) // 2:
            del damaged[-cut - 1 :]

        try:
            x = GREY_CODEC.decode_payload(bytes(damaged), "image/png")
        except RecordError:
            return
        assert x.shape == GREY.shape

    @given(st.integers(0, 200), st.binary(min_size=1, max_size=6), st.booleans())
    @FUZZ
    def test_any_damage_to_a_npy_decodes_or_is_a_bad_record(self, at: int, patch: bytes, insert: bool) -> None:
        """A producer controls the whole header."""
        damaged = bytearray(npy_bytes(np.zeros(4, np.float32)))
        at %= len(damaged)
        damaged[at : at if insert else at + len(patch)] = patch

        try:
            x = Codec(TABLE).decode_payload(bytes(damaged), "application/x-npy")
        except RecordError:
            return
        assert (x.shape, x.dtype) == (TABLE.shape, TABLE.dtype)


class TestDeadLetter:
    def test_a_record_without_key_and_value_gets_an_empty_value(self) -> None:
        """Kafka accepts such a record from others; our log would refuse its dead letter on every retry."""
        letter = dead_letter(record(None, None), RecordError("no_value", "samples[3]@1042"))

        assert (letter.key, letter.value) == (None, b"")

    def test_keeps_the_bytes_and_adds_reason_and_position(self) -> None:
        """Key, value and headers are unchanged; six headers follow, and the log sets a new timestamp."""
        bad = record(b"\x00\xff", b"k\xff", (("content-type", b"x"),))

        letter = dead_letter(bad, RecordError("not_json", "samples[3]@1042: ü"))

        assert (letter.key, letter.value, letter.timestamp_ms) == (b"k\xff", b"\x00\xff", None)
        assert letter.headers == (
            ("content-type", b"x"),
            ("dead-letter-reason", b"not_json"),
            ("dead-letter-message", "samples[3]@1042: ü".encode()),
            ("dead-letter-topic", b"samples"),
            ("dead-letter-partition", b"3"),
            ("dead-letter-offset", b"1042"),
            ("dead-letter-timestamp-ms", b"1700000000500"),
        )

    @given(st.none() | st.binary(max_size=20), st.none() | st.binary(max_size=20), header_lists, st.text())
    @FUZZ
    def test_reads_back_as_the_record_that_it_was(
        self, value: bytes | None, key: bytes | None, headers: Headers, message: str
    ) -> None:
        """Position, time and all bytes return, so that it can be sent again; a missing value becomes an empty one."""
        bad = record(b"" if value is None and key is None else value, key, headers)
        letter = dead_letter(bad, RecordError("bad_shape", message))

        read = read_dead_letter(Record(Position("dead-letters", 0, 7), 9, letter.key, letter.value, letter.headers))

        assert (read.reason, read.record) == ("bad_shape", bad)

    def test_a_dead_letter_of_a_dead_letter_is_read_one_step_at_a_time(self) -> None:
        """The last six headers belong to the last one."""
        bad = record(b"v")
        once = as_read(dead_letter(bad, RecordError("no_id", "first")))

        twice = read_dead_letter(as_read(dead_letter(once, RecordError("no_class", "second"))))

        assert (twice.reason, twice.record) == ("no_class", once)
        assert read_dead_letter(twice.record).record == bad

    @pytest.mark.parametrize("place", [2, 3, 5])
    def test_other_records_of_the_topic_are_refused(self, place: int) -> None:
        """Without the headers, or with invalid numbers in them, a record is not a dead letter."""
        headers = list(dead_letter(record(b"v"), RecordError("no_id", "m")).headers)
        headers[place] = (headers[place][0] + ("" if place > 2 else "x"), b"12x")

        assert reason_of(read_dead_letter, record(b"v", b"a", ())) == "no_value"
        assert reason_of(read_dead_letter, record(b"v", b"a", tuple(headers))) in ("no_value", "bad_dtype")

    def test_a_long_message_is_truncated(self) -> None:
        """A dead letter is about as large as the record in it."""
        letter = dead_letter(record(b"v"), RecordError("no_id", "m" * 100_000))

        assert sum(len(content) for _, content in letter.headers) < 1200
