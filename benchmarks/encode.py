"""Measures what decoding and encoding a user's record costs, over parsing it alone.

Twelve columns (six numbers, three categories of which one has 5,000 values, a boolean, a timestamp, and a number that
is often null), 300 bytes of JSON. JSON: `Codec.decode_sample`, from the record of the log to a sample with its row,
against `orjson.loads`. Avro, in the frame of a schema registry: the same against fastavro's `schemaless_reader`. Each
figure is the best of many short turns that alternate, in CPU time, so that other load on the machine counts less.

Run: python benchmarks/encode.py [--quick]. The last line is JSON.
"""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import fastavro
import numpy as np
import orjson
from common import arguments, figures

from streamlearn.log.codec import Codec
from streamlearn.records import Position, Record, Schema
from streamlearn.schema.settings import ColumnConfig, SourceConfig, layout

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from fake_registry import FakeRegistry

COLUMNS = {
    name: ColumnConfig.model_validate(given)
    for name, given in {
        **{f"v{n}": "number" for n in range(6)},
        "limit": "number",
        "merchant": {"kind": "category", "buckets": 8192},
        "country": "category",
        "channel": "category",
        "vip": "boolean",
        "created_at": {"kind": "timestamp", "unit": "ms"},
    }.items()
}
AVRO: Any = {
    "type": "record",
    "name": "Transaction",
    "fields": [
        {"name": "transaction_id", "type": "string"},
        *({"name": f"v{n}", "type": "double"} for n in range(6)),
        {"name": "limit", "type": ["null", "double"]},
        {"name": "merchant", "type": "string"},
        {"name": "country", "type": "string"},
        {"name": "channel", "type": "string"},
        {"name": "vip", "type": "boolean"},
        {"name": "created_at", "type": {"type": "long", "logicalType": "timestamp-millis"}},
    ],
}
_HEADER = b"\0\0\0\0\1"


def transactions(count: int) -> list[dict[str, Any]]:
    """Random records."""
    draw = np.random.default_rng(0)
    return [
        {
            "transaction_id": f"transaction-{n}",
            **{f"v{k}": float(value) for k, value in enumerate(draw.normal(100, 50, 6).round(2))},
            "limit": None if draw.random() < 0.3 else float(draw.integers(1000)),
            "merchant": f"merchant-{draw.integers(5000)}",
            "country": ("DE", "FR", "ES", "IT")[draw.integers(4)],
            "channel": ("web", "shop", "phone")[draw.integers(3)],
            "vip": bool(draw.random() < 0.1),
            "created_at": 1_772_700_000_000 + n * 250,
        }
        for n in range(count)
    ]


def best_s(turns: int, *sides: Callable[[], None]) -> list[float]:
    """The shortest CPU time of each side, in turns."""
    best = [float("inf")] * len(sides)
    for _ in range(turns):
        for number, side in enumerate(sides):
            began_s = time.thread_time()
            side()
            best[number] = min(best[number], time.thread_time() - began_s)
    return best


def over(name: str, decode: Callable[[Record], Any], parse: Callable[[bytes], Any], values: Sequence[bytes],
         turns: int) -> dict[str, float]:  # fmt: skip
    """Print and return the rates of both sides, and the ratio of their times."""
    records = [
        Record(Position("samples", 0, n), 1_772_700_000_000 + n, b"customer-%d" % (n % 1000), value)
        for n, value in enumerate(values)
    ]

    def decoded() -> None:
        for record in records:
            decode(record)

    def parsed() -> None:
        for value in values:
            parse(value)

    decode_s, parse_s = best_s(turns, decoded, parsed)
    found = {
        f"{name}_decoded_per_s": round(len(values) / decode_s),
        f"{name}_parsed_per_s": round(len(values) / parse_s),
        f"{name}_added_us": round((decode_s - parse_s) / len(values) * 1e6, 2),
        f"{name}_ratio": round(decode_s / parse_s, 2),
    }
    print(f"{name}: {found}")
    return found


def main() -> None:
    """Both formats."""
    quick = arguments(__doc__ or "").quick
    given, turns = transactions(1_000), 30 if quick else 300
    schema = Schema((sum(c.width for c in layout(COLUMNS)),), np.dtype(np.float32), ("a", "b"), columns=layout(COLUMNS))
    parsed_schema = fastavro.parse_schema(AVRO)

    def avro(value: dict[str, Any]) -> bytes:
        stream = io.BytesIO()
        at = datetime.fromtimestamp(value["created_at"] / 1000, UTC)
        fastavro.schemaless_writer(stream, parsed_schema, {**value, "created_at": at})
        return _HEADER + stream.getvalue()

    def read_avro(value: bytes) -> object:
        stream = io.BytesIO(value)
        stream.seek(len(_HEADER))
        return fastavro.schemaless_reader(stream, parsed_schema, None)

    with FakeRegistry() as registry:
        registry.add(1, AVRO)
        codecs = {
            name: Codec(
                schema,
                SourceConfig.model_validate(
                    {
                        "samples": {"format": name, "id": "transaction_id", "time": "created_at", "time_unit": "ms"},
                        "registry": {"url": registry.url},
                    }
                ),
                columns=COLUMNS,
            )
            for name in ("json", "avro")
        }
        found = over("json", codecs["json"].decode_sample, orjson.loads, [orjson.dumps(each) for each in given], turns)
        found |= over("avro", codecs["avro"].decode_sample, read_avro, [avro(each) for each in given], turns)
    figures(records=len(given), columns=len(COLUMNS), **found)


if __name__ == "__main__":
    main()
