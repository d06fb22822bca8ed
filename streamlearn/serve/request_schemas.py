"""OpenAPI of request bodies, for one schema, with examples. `bodies` decodes them by hand."""

from __future__ import annotations

from typing import Any, cast

import numpy as np

from streamlearn.log.codec import Codec
from streamlearn.records import Schema
from streamlearn.schema.fields import MAX_TIME_S
from streamlearn.serve.record_schema import (
    ID,
    TEXT,
    class_schema,
    label_example,
    label_schema,
    sample_example,
    sample_schema,
)
from streamlearn.serve.schemas import RollbackBody

LARGEST_EXAMPLE = 1024
"""Numbers in an example; larger samples have binary bodies only."""


def _example(schema: Schema) -> list[Any]:
    example: list[Any] = np.zeros(schema.shape, schema.dtype).tolist()
    return example


def _tensor(schema: Schema) -> dict[str, Any]:
    """Numbers in the range of the dtype, nested by shape or flat."""
    if schema.dtype.kind == "f":
        largest = min(float(np.finfo(cast(Any, schema.dtype)).max), schema.largest_float)
        number = {"type": "number", "minimum": -largest, "maximum": largest}
    else:
        integers = np.iinfo(cast(Any, schema.dtype))
        number = {"type": "integer", "minimum": int(integers.min), "maximum": int(integers.max)}
    nested = number
    for size in reversed(schema.shape):
        nested = _list(nested, size, size)
    count = int(np.prod(schema.shape))
    forms = {"anyOf": [nested, _list(number, count, count)]} if len(schema.shape) > 1 else nested
    return {
        "description": f"Numbers nested as {schema.shape}, or a flat list of them, in the range of {schema.dtype}.",
        **forms,
    }


def _list(items: dict[str, Any], least: int, most: int) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": least, "maxItems": most}


def _body(json_schema: dict[str, Any], examples: dict[str, Any], binary: tuple[str, ...] = ()) -> dict[str, Any]:
    shown = {name: {"value": value} for name, value in examples.items()}
    content: dict[str, Any] = {"application/json": {"schema": json_schema, "examples": shown}}
    content |= {kind: {"schema": {"type": "string", "format": "binary"}} for kind in binary}
    return {"requestBody": {"required": True, "content": content}}


def _object(properties: dict[str, Any], *required: str) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "additionalProperties": False, "required": list(required)}


_TIME = {
    "anyOf": [
        {"type": "number", "minimum": 0, "exclusiveMaximum": MAX_TIME_S},
        {"type": "string", "format": "date-time"},
    ],
    "description": "Seconds since the epoch, or ISO 8601 with a zone. It is kept with the record; order, delay and age "
    "use the time of the append to the log.",
}


def _binary(schema: Schema) -> tuple[str, ...]:
    image = len(schema.shape) == 3 and schema.shape[0] in (1, 3) and schema.dtype == np.uint8
    return ("application/octet-stream", "application/x-npy", *(("image/*",) if image else ()))


def predict_body(codec: Codec, *, most: int) -> dict[str, Any]:
    """OpenAPI of the body of POST /predict, with at most `most` samples."""
    schema, ids = codec.schema, _list(ID, 1, most)
    stored = _object({"ids": ids}, "ids")
    if codec.rows is not None:
        return _records(codec, "instances", {"stored samples": {"ids": ["invoice-7"]}}, stored, most=most)
    forms = [
        _object({"x": _tensor(schema), "id": ID, "learn": {"type": "boolean"}}, "x"),
        _object(
            {"instances": _list(_tensor(schema), 1, most), "ids": ids, "learn": {"type": "boolean"}},
            "instances",
        ),
        _object(
            {"instances": _list(_object({"x": _tensor(schema), "id": ID}, "x"), 1, most), "learn": {"type": "boolean"}},
            "instances",
        ),
        stored,
    ]
    examples: dict[str, Any] = {"stored samples": {"ids": ["invoice-7"]}}
    if int(np.prod(schema.shape)) <= LARGEST_EXAMPLE:
        x = _example(schema)
        examples = {
            "one": {"x": x},
            "several": {"instances": [x, x]},
            "predict and learn": {"x": x, "id": "invoice-7", "learn": True},
            **examples,
        }
    return _body({"oneOf": forms}, examples, _binary(schema))


def _records(codec: Codec, name: str, examples: dict[str, Any], *others: dict[str, Any], most: int) -> dict[str, Any]:
    """OpenAPI of a body with the user's records: one, or a list of this name with ids next to it."""
    one, example = sample_schema(codec), sample_example(codec)
    many = _object({name: _list(one, 1, most), "ids": _list(ID, 1, most)}, name)
    examples = {"one": example, "several": {name: [example]}, **examples}
    return _body({"anyOf": [one, many, *others]}, examples)


def label_body(codec: Codec, *, most: int) -> dict[str, Any]:
    """OpenAPI of the body of POST /label, with at most `most` labels."""
    schema, any_name = codec.schema, codec.takes_any_name
    label = class_schema(schema, "The class by name or index; null retracts the label.", any_name=any_name)
    label["anyOf"].append({"type": "null"})
    one = _object({"id": ID, "label": label, "time": _TIME, "source": TEXT}, "id", "label")
    first, last = schema.classes[0], schema.classes[-1]
    examples = {
        "one": {"id": "invoice-7", "label": first},
        "several": {"labels": [{"id": "invoice-7", "label": first}, {"id": "invoice-8", "label": last}]},
        "with time and source": {"id": "invoice-7", "label": first, "time": "2026-11-24T09:00:00Z", "source": "audit"},
    }
    forms = [one]
    users = label_example(codec)
    if not codec.labels.is_own(users):
        forms.append(label_schema(codec))
        examples = {"one of your own": users, **examples}
    many = _object({"labels": _list({"anyOf": forms}, 1, most)}, "labels")
    return _body({"anyOf": [*forms, many]}, examples)


def sample_body(codec: Codec, *, most: int) -> dict[str, Any]:
    """OpenAPI of the body of POST /sample, with at most `most` samples."""
    if codec.rows is not None:
        return _records(codec, "samples", {}, most=most)
    schema, one = codec.schema, tensor_sample(codec)
    many = _object({"samples": _list(one, 1, most)}, "samples")
    examples: dict[str, Any] = {}
    if (x := tensor_example(schema)) is not None:
        examples = {"one": x, "several": {"samples": [x]}}
    return _body({"oneOf": [one, many]}, examples, _binary(schema))


def tensor_sample(codec: Codec) -> dict[str, Any]:
    """JSON Schema of a sample without columns."""
    label = class_schema(codec.schema, "The class, if it is already known.", any_name=codec.takes_any_name)
    return _object({"id": ID, "x": _tensor(codec.schema), "label": label, "time": _TIME, "domain": TEXT}, "x")


def tensor_example(schema: Schema) -> dict[str, Any] | None:
    """Such a sample; None if it is too large to show."""
    return {"id": "invoice-7", "x": _example(schema)} if int(np.prod(schema.shape)) <= LARGEST_EXAMPLE else None


def rollback_body() -> dict[str, Any]:
    """OpenAPI of the body of POST /model/rollback."""
    return _body(RollbackBody.model_json_schema(), {"one": {"version": 1200}})
