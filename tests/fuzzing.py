"""Hostile records and requests, each a function of a seed and a number, so that one that fails can be had again.

Most begin as something valid and are then damaged: what is wrong in one place goes deeper than noise, which the first
check refuses. Used by the tests of the codec and of the API, and by `benchmarks/fuzz.py`, which makes many more.
"""

from __future__ import annotations

import io
import itertools
import random
import string
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal
from urllib.parse import quote_from_bytes

import numpy as np
import orjson
from PIL import Image
from served import RECORD, ROUTES
from support import in_format

from streamlearn.errors import REASONS, RecordError
from streamlearn.log.codec import Codec
from streamlearn.log.dead_letters import dead_letter, read_dead_letter
from streamlearn.records import UNLABELLED, Headers, NewRecord, Position, Prediction, Record, Schema

Kind = Literal["sample", "label"]
CLASSES = ("cat", "dog", "3", "0")
TABLE = Schema((4,), np.dtype("float32"), CLASSES)
GREY = Schema((1, 4, 6), np.dtype("uint8"), CLASSES)
COLOUR = Schema((3, 5, 7), np.dtype("uint8"), CLASSES, spare=2)
CUBE = Schema((2, 3, 2), np.dtype("int16"), CLASSES)
MAX_RECORD_BYTES = 20_000
CODECS = tuple(
    Codec(schema, in_format(payload), max_record_bytes=MAX_RECORD_BYTES, unknown_class=unknown)  # type: ignore[arg-type]
    for schema, payload, unknown in (
        (TABLE, "json", "hold"),
        (TABLE, "npy", "refuse"),
        (GREY, "image", "hold"),
        (COLOUR, "image", "refuse"),
        (CUBE, "raw", "grow"),
        (Schema((3,), np.dtype("float16"), CLASSES), "json", "refuse"),
        (Schema((2, 2), np.dtype("float64"), CLASSES), "raw", "hold"),
    )
)

NUMBERS = (
    *("0", "-0", "-0.0", "1", "3", "-1", "00", "0x10", "1_000", "+", "-", ".", "e", "0.1e1"),
    *("1e308", "1e999", "-1e999", "1e-400", "NaN", "Infinity", "-Infinity", "65504", "65520"),
    *("9223372036854775807", "9223372036854775808", "18446744073709551616", "99999999999999999999999999999"),
    *("1700000000", "1700000000000"),
)
TEXTS = (
    "",
    " ",
    "cat",
    "CAT",
    "3",
    "٣",
    "²",
    "nan",
    "\x00",
    "\u202egnp",
    "é",
    "é" * 300,
    "a" * 513,
    "💥" * 128,
    "../../x",
    "%2e%2e/",
    "a\r\nb: c",
    "true",
    "null",
    "{}",
    "__class__",
    "2026-11-24T09:00:00Z",
    "2026-11-24",
    "0001-01-01T00:00:00+14:00",
    "9999-12-31T23:59:59-14:00",
    "2026-11-24T24:00:00Z",
    "2026-W48-2T09Z",
    "1700000000",
)
TOKENS = (
    b"NaN",
    b"1e999",
    b"\\ud800",
    b"\\u0000",
    b"null",
    b"[" * 1100,
    b'{"x":' * 600,
    b"[]," * 50,
    b'"id":"b",',
    b'"x":0,',
    b'"label":"cat",',
    b"\x00",
    b"\xff\xfe",
    b"\xed\xa0\x80",
    b"\xef\xbb\xbf",
    b"/*",
    b"//",
    b"\x93NUMPY",
    b"(99999999999999999999,)",
    b"'descr': 'O'",
    b"'|O'",
    b"__import__('os').abort()",
    b"cos\nsystem\n(S'true'\ntR.",
    b"\x80\x04\x95",
    b"\xff\xda",
    b"\xff\xd8",
    b"IDAT",
    b"IHDR\xff\xff\xff\xff\xff\xff\xff\xff",
    b"9" * 400,
)
CONTENT_TYPES = (
    "application/json",
    "application/json; charset=utf-16",
    "APPLICATION/OCTET-STREAM",
    "application/octet-stream",
    "application/x-npy",
    "application/x-npy;",
    "image/png",
    "image/svg+xml",
    "image/",
    "text/plain",
    "application/x-python-pickle",
    "multipart/form-data; boundary=x",
    "",
    ";",
    "é",
    "application/json, image/png",
    "x" * 9000,
)
FIELDS = ("id", "x", "label", "class", "time", "domain", "source", "true_label", "answer", "instances", "ids", "learn")
HEADERS = ("content-type", "Content-Type", "label", "time", "domain", "true-label", "answer", "traceparent", "", "é")


def pick(rng: random.Random, options: Any) -> Any:
    """One of them."""
    return options[rng.randrange(len(options))]


# Damage


def _flip(rng: random.Random, data: bytearray) -> None:
    for _ in range(rng.randrange(1, 9)):
        if data:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def _cut(rng: random.Random, data: bytearray) -> None:
    del data[rng.randrange(len(data) + 1) :]


def _cut_inside(rng: random.Random, data: bytearray) -> None:
    start = rng.randrange(len(data) + 1)
    del data[start : start + rng.randrange(1, 20)]


def _insert_token(rng: random.Random, data: bytearray) -> None:
    at = rng.randrange(len(data) + 1)
    data[at:at] = pick(rng, TOKENS)


def _insert_noise(rng: random.Random, data: bytearray) -> None:
    at = rng.randrange(len(data) + 1)
    data[at:at] = rng.randbytes(rng.randrange(1, 40))


def _repeat(rng: random.Random, data: bytearray) -> None:
    start = rng.randrange(len(data) + 1)
    piece = data[start : start + rng.randrange(1, 30)]
    data[start:start] = piece * rng.randrange(1, 300 if rng.random() < 0.05 else 5)


def _replace_number(rng: random.Random, data: bytearray) -> None:
    digits = [at for at, byte in enumerate(data[:2000]) if 48 <= byte <= 57]
    if digits:
        at = pick(rng, digits)
        data[at : at + 1] = pick(rng, NUMBERS).encode()


DAMAGES: tuple[Callable[[random.Random, bytearray], None], ...] = (
    _flip,
    _cut,
    _cut_inside,
    _insert_token,
    _insert_noise,
    _repeat,
    _replace_number,
)


def damaged(rng: random.Random, data: bytes) -> bytes:
    """The bytes with one to three places damaged."""
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        pick(rng, DAMAGES)(rng, found)
    return bytes(found)


# JSON by hand: what no encoder would write


def json_value(rng: random.Random, depth: int = 0) -> str:
    """Some JSON, or nearly."""
    roll = rng.random()
    if roll < 0.3:
        return str(pick(rng, NUMBERS))
    if roll < 0.55:
        return orjson.dumps(pick(rng, TEXTS)).decode()
    if roll < 0.65:
        return str(pick(rng, ("true", "false", "null", '"\\ud800"', '"\\u0000"', "'a'", "")))
    if depth > 3 or roll < 0.7:
        return "[" * rng.randrange(1, 5) + "]" * rng.randrange(1, 5)
    values = [json_value(rng, depth + 1) for _ in range(rng.randrange(5))]
    if roll < 0.9:
        return "[" + ",".join(values) + "]"
    return "{" + ",".join(f'"{pick(rng, FIELDS)}":{value}' for value in values) + "}"


def json_fields(rng: random.Random, schema: Schema) -> bytes:
    """An object with fields that mean something, some of them twice, few of them right."""
    names = [pick(rng, FIELDS) for _ in range(rng.randrange(6))]
    values = {name: json_value(rng) for name in names}
    if rng.random() < 0.6:
        values["x"] = orjson.dumps(tensor(rng, schema).tolist()).decode()
        names.append("x")
    if rng.random() < 0.6:
        values["id"], values["label"] = '"a"', '"cat"'
        names += ["id", "label"]
    return ("{" + ",".join(f'"{name}":{values[name]}' for name in names) + "}").encode("utf-8", "surrogatepass")


# What is right, to be damaged


def tensor(rng: random.Random, schema: Schema) -> Any:
    """A payload of the schema."""
    count = int(np.prod(schema.shape))
    if schema.dtype.kind == "f":
        return np.array([rng.uniform(-4, 4) for _ in range(count)], schema.dtype).reshape(schema.shape)
    bounds = np.iinfo(schema.dtype)
    return np.array([rng.randint(bounds.min, bounds.max) for _ in range(count)], schema.dtype).reshape(schema.shape)


def image(rng: random.Random, schema: Schema) -> bytes:
    """A PNG, JPEG or WebP of the schema's size, with the modes and chunks that decoders differ in."""
    channels, height, width = schema.shape
    size = (width, height) if rng.random() < 0.9 else (rng.randrange(1, 50), rng.randrange(1, 50))
    picture = Image.frombytes("RGB", size, rng.randbytes(size[0] * size[1] * 3))
    kind = rng.choice(("PNG", "PNG", "JPEG", "WEBP"))
    modes = {"PNG": ("L", "RGB", "RGBA", "P", "LA", "1", "I;16"), "JPEG": ("L", "RGB", "CMYK"), "WEBP": ("RGB", "RGBA")}
    mode = rng.choice((*modes[kind], "L" if channels == 1 else "RGB"))
    picture = Image.new("I;16", size, rng.randrange(65_536)) if mode == "I;16" else picture.convert(mode)
    options: dict[str, Any] = {"PNG": {}, "JPEG": {"progressive": rng.random() < 0.5}, "WEBP": {"lossless": True}}[kind]
    file = io.BytesIO()
    picture.save(file, kind, **options)
    data = file.getvalue()
    if kind == "PNG" and rng.random() < 0.3:
        name = rng.choice((b"zTXt", b"iTXt", b"iCCP", b"tRNS", b"gAMA", b"pHYs", b"acTL", b"fdAT", b"eXIf"))
        chunk = b"a\0\0" + zlib.compress(bytes(rng.randrange(1 << 16))) if rng.random() < 0.5 else rng.randbytes(20)
        crc = struct.pack(">I", zlib.crc32(name + chunk))
        data = data[:33] + struct.pack(">I", len(chunk)) + name + chunk + crc + data[33:]
    return data


def valid_sample(rng: random.Random, codec: Codec) -> NewRecord:
    """A sample that decodes under this codec, with any of its optional fields."""
    schema = codec.schema
    shares = np.array([rng.random() + 0.1 for _ in range(schema.capacity)], np.float32)
    answer = Prediction(rng.randrange(schema.capacity), shares / shares.sum(), rng.randrange(2**63))
    payload = rng.choice(("json", "raw", "npy"))
    some = [rng.random() < 0.3 for _ in range(5)]
    return codec.encode_sample(
        f"sample-{rng.randrange(1000)}",
        tensor(rng, schema),
        payload=payload,
        label=rng.randrange(len(schema.classes)) if some[0] else None,
        event_time_s=rng.uniform(0, 2e9) if some[1] else None,
        domain="web" if some[2] else None,
        true_label=rng.randrange(len(schema.classes)) if some[3] else None,
        answer=answer if some[4] else None,
    )


def valid_label(rng: random.Random, codec: Codec) -> NewRecord:
    """A label that decodes under this codec."""
    source = "audit" if rng.random() < 0.3 else None
    return codec.labels.encode(
        f"sample-{rng.randrange(1000)}", rng.randrange(len(codec.schema.classes)), event_time_s=1e9, source=source
    )


# Records


def hostile_headers(rng: random.Random, headers: Headers) -> Headers:
    """The headers with some damaged, doubled, added or gone."""
    found = list(headers)
    if found and rng.random() < 0.3:
        at = rng.randrange(len(found))
        found[at] = (found[at][0], damaged(rng, found[at][1])[:MAX_RECORD_BYTES])
    for _ in range(rng.choice((0, 1, 1, 2))):
        content = rng.choice((pick(rng, TEXTS), pick(rng, NUMBERS), pick(rng, CONTENT_TYPES))).encode()
        found.insert(rng.randrange(len(found) + 1), (pick(rng, HEADERS), content))
    if rng.random() < 0.02:
        found += [("x" * rng.randrange(100), bytes(rng.randrange(100))) for _ in range(rng.randrange(2000))]
    if rng.random() < 0.05:
        found = []
    return tuple(found)


def hostile_key(rng: random.Random, key: bytes | None) -> bytes | None:
    """The key, or another, or none."""
    if rng.random() < 0.7:
        return key
    return rng.choice((None, b"", b"\xff", b"a" * 600, damaged(rng, key or b"a"), pick(rng, TEXTS).encode()))


def record(seed: int, number: int) -> tuple[Codec, Kind, Record]:
    """The record of this number, what it is meant to be, and the codec that is to read it."""
    rng = random.Random(f"{seed}:{number}")
    codec, kind = pick(rng, CODECS), rng.choice(("sample", "sample", "label"))
    new = valid_sample(rng, codec) if kind == "sample" else valid_label(rng, codec)
    headers, value = new.headers, new.value
    assert value is not None
    roll = rng.random()
    if roll < 0.1 and kind == "sample" and len(codec.schema.shape) == 3:
        value = image(rng, codec.schema) if rng.random() < 0.3 else damaged(rng, image(rng, codec.schema))
        headers = (("content-type", b"image/png"), *headers[1:])
    elif roll < 0.6:
        value = damaged(rng, value)
    elif roll < 0.8:
        value, headers = json_fields(rng, codec.schema), (("content-type", b"application/json"),)
    elif roll < 0.84:
        value = rng.choice((b"", rng.randbytes(rng.randrange(60)), b" " * rng.randrange(MAX_RECORD_BYTES + 100)))
    elif roll < 0.9:
        value = rng.choice((pick(rng, TEXTS), pick(rng, NUMBERS), json_value(rng))).encode("utf-8", "surrogatepass")
    if rng.random() < 0.3:
        headers = hostile_headers(rng, headers)
    position = Position("samples" if kind == "sample" else "labels", rng.randrange(4), number)
    return (
        codec,
        kind,
        Record(
            position, rng.randrange(2**41), hostile_key(rng, new.key), value if rng.random() < 0.99 else None, headers
        ),
    )


def outcome_of(codec: Codec, kind: Kind, given: Record) -> str:
    """What became of a record: its kind where it could be decoded, else the reason it is bad for.

    Raises:
        AssertionError: what was decoded is not as the schema says, or a dead letter does not hold all of the record.
        Exception: anything else that the codec lets out, which is never right.
    """
    try:
        if kind == "sample":
            check_sample(codec, given)
        else:
            check_label(codec, given)
    except RecordError as error:
        check_refusal(given, error)
        return error.reason
    return kind


def check_refusal(given: Record, error: RecordError) -> None:
    """The reason is known, the message says where and is short, and the dead letter holds the record whole."""
    assert error.reason in REASONS, error.reason
    assert str(error).startswith(str(given.position)), error
    assert len(str(error)) < 2000, len(str(error))
    kept = dead_letter(given, error)
    again = Record(Position("dead-letters", 0, 0), 0, kept.key, kept.value, kept.headers)
    found = read_dead_letter(again)
    if given.key is None and given.value is None:  # Kafka has such records, and takes none like it from us
        given = replace(given, value=b"")
    assert (found.reason, found.record) == (error.reason, given), "a dead letter lost bytes"


def check_sample(codec: Codec, given: Record) -> None:
    """Decode a sample, and hold it to the schema; what is good can be written and read again."""
    sample, schema = codec.decode_sample(given), codec.schema
    assert sample.x.shape == schema.shape
    assert sample.x.dtype == schema.dtype
    assert np.isfinite(sample.x.astype(np.float64)).all()
    assert 1 <= len(sample.sample_id.encode()) <= 512
    assert (sample.label == UNLABELLED) == (sample.class_name is not None)
    assert sample.label is None or sample.label < len(schema.classes)
    new = codec.encode_sample(
        sample.sample_id,
        sample.x,
        label=sample.label,
        class_name=sample.class_name,
        event_time_s=sample.event_time_s,
        domain=sample.domain,
        true_label=sample.true_label,
        answer=sample.answer,
    )
    again = codec.decode_sample(Record(given.position, given.timestamp_ms, new.key, new.value, new.headers))
    assert again.x.tobytes() == sample.x.tobytes()
    same = ("sample_id", "label", "class_name", "event_time_s", "domain", "true_label")
    assert [getattr(again, name) for name in same] == [getattr(sample, name) for name in same]


def check_label(codec: Codec, given: Record) -> None:
    """The same for a label."""
    label = codec.labels.decode(given)
    assert 1 <= len(label.sample_id.encode()) <= 512
    assert (label.class_index == UNLABELLED) == (label.class_name is not None)
    assert label.class_index < len(codec.schema.classes)
    new = codec.labels.encode(
        label.sample_id,
        label.class_index,
        class_name=label.class_name,
        event_time_s=label.event_time_s,
        source=label.source,
    )
    again = codec.labels.decode(Record(given.position, given.timestamp_ms, new.key, new.value, new.headers))
    assert replace_position(again) == replace_position(label)


def replace_position(label: Any) -> Any:
    """A label without what is the log's, to be compared."""
    return replace(label, position=Position("", 0, 0), timestamp_s=0.0)


@dataclass(frozen=True)
class Request:
    """One HTTP request, as an ASGI server would hand it over."""

    method: str
    path: str
    query: bytes
    headers: list[tuple[bytes, bytes]]
    chunks: list[bytes]


FURTHER = [("GET", "/openapi.json"), ("GET", "/")]
HEAVY = {"/predict": 8, "/label": 6, "/sample": 6}
"""Routes that take bodies are tried more often."""
PATHS = (
    "/nowhere",
    "//",
    "/../etc/passwd",
    "/label",
    "/predict/",
    "/model/../models",
    "/docs/x",
    "/\x00",
    "/é",
    "*",
    "",
)
QUERIES = (
    "id",
    "learn",
    "min_version",
    "max_age_s",
    "after",
    "wait_s",
    "n",
    "peek",
    "require_learner",
    "",
    "é",
    "token",
)
GOOD_QUERIES = (
    b"min_version=99",
    b"max_age_s=1e-9",
    b"wait_s=0.01",
    b"learn=1",
    b"peek=1&n=3",
    b"after=truths:0:1",
    b"id=a",
)
AFTERS = (
    "truths:0:1",
    '{"topic":"truths","partition":0,"offset":1}',
    "{",
    "{}",
    "truths:0:99999999999999999999",
    "x:0:1",
)
TOKENS_SENT = (
    "Bearer rule",
    "Bearer ask",
    "bearer tell",
    "Bearer",
    "Bearer rulE",
    "Basic cnVsZQ==",
    "é",
    "Bearer " + "x" * 9000,
)


def _encoded(text: str) -> bytes:
    return b"".join(b"%%%02X" % byte for byte in text.encode("utf-8", "surrogatepass"))


def _query(rng: random.Random) -> bytes:
    if rng.random() < 0.2:
        return pick(rng, GOOD_QUERIES)  # type: ignore[no-any-return]
    pairs = []
    for _ in range(rng.choice((0, 0, 0, 1, 1, 2, 4, 30) if rng.random() < 0.99 else (3000,))):
        value = rng.choice((pick(rng, NUMBERS), pick(rng, TEXTS), pick(rng, AFTERS), "true", "0.01"))
        pairs.append(_encoded(pick(rng, QUERIES)) + (b"=" if rng.random() < 0.95 else b"") + _encoded(value))
    query = b"&".join(pairs)
    return damaged(rng, query).replace(b"\n", b"") if rng.random() < 0.1 else query


def json_record(rng: random.Random) -> bytes:
    """One record of `served.RECORD`'s fields, or several, or labels of it: any field may be odd, doubled or gone."""

    def one(sample_id: int) -> str:
        fields = {name: orjson.dumps(value).decode() for name, value in RECORD.items() if rng.random() < 0.8}
        fields["transaction_id"] = f'"t{sample_id}"'
        if rng.random() < 0.2:
            fields = {"transaction_id": f'"t{sample_id}"', "is_fraud": pick(rng, ("true", "false", "null", '"fraud"'))}
        if rng.random() < 0.5:
            fields[pick(rng, (*RECORD, "verdict", "is_fraud", "judged_at", *FIELDS))] = json_value(rng)
        return "{" + ",".join(f'"{name}":{value}' for name, value in fields.items()) + "}"

    records = [one(rng.randrange(99)) for _ in range(rng.randrange(1, 10))]
    name = pick(rng, ("instances", "samples", "labels"))
    several = f'{{"{name}":[{",".join(records)}]' + pick(rng, ("", ',"ids":["a"]', ',"learn":true')) + "}"
    return pick(rng, (records[0], several)).encode("utf-8", "surrogatepass")


def _body(rng: random.Random, codec: Codec) -> tuple[str, bytes]:
    """A body and the content type that it is sent with, mostly of the same kind."""
    schema, roll = codec.schema, rng.random()
    if codec.rows is not None and roll < 0.8:
        content_type, body = rng.choice((*["application/json"] * 9, "application/x-npy")), json_record(rng)
    elif roll < 0.3 and codec.rows is None:
        new = valid_sample(rng, codec)
        assert new.value is not None
        content_type, body = new.headers[0][1].decode(), new.value * rng.choice((1, 1, 2, 8, 9))
    elif roll < 0.6:
        rows = [tensor(rng, schema).tolist() for _ in range(rng.randrange(1, 10))]
        ids = [pick(rng, TEXTS) for _ in rows]
        fields = rng.choice(
            (
                {"instances": rows, "learn": rng.random() < 0.3},
                {"instances": rows, "ids": ids, "learn": True},
                {"x": rows[0], "id": ids[0]},
                {"ids": ids},
                {
                    "samples": [
                        {"id": name, "x": x, "domain": pick(rng, TEXTS)} for name, x in zip(ids, rows, strict=True)
                    ]
                },
                {"labels": [{"id": name, "label": pick(rng, TEXTS), "time": 1e9} for name in ids]},
                {"labels": [{"id": name, "label": "cat", "source": pick(rng, TEXTS)} for name in ids]},
                {"id": ids[0], "label": "dog", "time": pick(rng, TEXTS)},
                {"version": 7},
            )
        )
        content_type, body = "application/json", orjson.dumps(fields)
    elif roll < 0.9:
        content_type, body = "application/json", json_fields(rng, schema)
    else:
        content_type, body = "application/json", rng.randbytes(rng.randrange(6000))
    if rng.random() < 0.5:
        body = damaged(rng, body)
    return (content_type if rng.random() < 0.9 else pick(rng, CONTENT_TYPES)), body


def _request_headers(rng: random.Random, content_type: str, body: bytes) -> list[tuple[bytes, bytes]]:
    sent = [(b"host", b"localhost"), (b"content-type", content_type.encode())]
    if rng.random() < 0.8:
        token = "Bearer rule" if rng.random() < 0.8 else pick(rng, TOKENS_SENT)
        sent.append((b"authorization", token.encode()))
    if rng.random() < 0.5:
        length = str(len(body)) if rng.random() < 0.9 else pick(rng, (*NUMBERS, "٣", "9" * 5000))
        sent.append((b"content-length", length.encode()))
    if rng.random() < 0.2:
        names = ("x-request-id", "accept", "origin", "content-encoding", "transfer-encoding", "cookie", "authorization")
        sent += [(pick(rng, names).encode(), pick(rng, TEXTS).encode()) for _ in range(rng.randrange(4))]
    if rng.random() < 0.01:
        sent += [(b"x-%d" % at, b"y" * 100) for at in range(rng.randrange(2000))]
    return sent


def request(seed: int, number: int, codec: Codec) -> Request:
    """The request of this number, for a server of the codec's schema."""
    rng = random.Random(f"{seed}:{number}")
    routes = [*(route[:2] for route in ROUTES), *FURTHER]
    method, path = rng.choices(routes, [HEAVY.get(path, 1) for _, path in routes])[0]
    name = rng.choice((f"sample-{rng.randrange(99)}", pick(rng, TEXTS), "a/b/../c", "requests"))
    path = path.replace("{sample_id}", name)
    if rng.random() < 0.03:
        path = pick(rng, PATHS)
    if rng.random() < 0.03:
        method = rng.choice(("GET", "HEAD", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "PURGE", "post"))
    content_type, body = _body(rng, codec) if method != "GET" or rng.random() < 0.1 else ("", b"")
    cuts = sorted(rng.randrange(len(body) + 1) for _ in range(rng.choice((0, 0, 1, 5))))
    edges = [0, *cuts, len(body)]
    chunks = [body[start:end] for start, end in itertools.pairwise(edges)]
    return Request(method, path, _query(rng), _request_headers(rng, content_type, body), chunks)


@dataclass(frozen=True)
class Reply:
    """What an application answered."""

    status: int
    headers: dict[str, str]
    body: bytes


async def ask(app: Any, sent: Request) -> Reply:
    """Hand one request to an ASGI application; its reply, whole.

    Raises:
        Exception: what the application lets out, which is never right.
    """
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": sent.method,
        "scheme": "http",
        "path": sent.path,
        "raw_path": sent.path.encode("utf-8", "surrogatepass"),
        "root_path": "",
        "query_string": quote_from_bytes(sent.query, safe=string.printable).encode(),  # httptools refuses others
        "headers": sent.headers,
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2),
        "state": {},
    }
    left, got = list(sent.chunks), []

    async def receive() -> dict[str, Any]:
        if not left:
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": left.pop(0), "more_body": bool(left)}

    async def send(message: dict[str, Any]) -> None:
        got.append(message)

    await app(scope, receive, send)
    start, *rest = got
    assert start["type"] == "http.response.start", got
    assert not rest[-1].get("more_body", False), "the reply has no end"
    headers = {name.decode("latin-1"): content.decode("latin-1") for name, content in start["headers"]}
    return Reply(start["status"], headers, b"".join(message.get("body", b"") for message in rest))
