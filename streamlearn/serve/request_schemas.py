"""OpenAPI of request bodies, for one schema, with examples. `bodies` decodes them by hand."""

from __future__ import annotations

from typing import Any, cast

import numpy as np

from streamlearn.records import Schema, is_whole
from streamlearn.schema.fields import MAX_ID_BYTES, MAX_TEXT_BYTES, MAX_TIME_S
from streamlearn.serve.schemas import LARGEST_EXACT, RollbackBody

LARGEST_EXAMPLE = 1024
"""Numbers in an example; larger samples have binary bodies only."""
LISTED_CLASSES = 100
"""Schemas with more classes are described without their names."""


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


_ID = {
    "anyOf": [
        {"type": "string", "minLength": 1, "maxLength": MAX_ID_BYTES},
        {"type": "integer", "minimum": -LARGEST_EXACT, "maximum": LARGEST_EXACT},
    ],
    "description": f"Text of 1 to {MAX_ID_BYTES} bytes, or an integer.",
}
_TIME = {
    "anyOf": [
        {"type": "number", "minimum": 0, "exclusiveMaximum": MAX_TIME_S},
        {"type": "string", "format": "date-time"},
    ],
    "description": "Seconds since the epoch, or ISO 8601 with a zone. It is kept with the record; order, delay and age "
    "use the time of the append to the log.",
}
_TEXT = {"type": "string", "maxLength": MAX_TEXT_BYTES}


def _class_of(schema: Schema, description: str, *, any_name: bool = False) -> dict[str, Any]:
    """A class by name, or by index if no class name is a number; names are listed if they are few."""
    name: dict[str, Any] = {"type": "string", "minLength": 1, "maxLength": MAX_TEXT_BYTES}
    if not any_name and len(schema.classes) <= LISTED_CLASSES:
        name = {"type": "string", "enum": list(schema.classes)}
    index: dict[str, Any] = {"type": "integer", "minimum": 0, "maximum": len(schema.classes) - 1}
    if schema.numbered:
        index = {"type": "integer", "enum": [int(name) for name in schema.classes if is_whole(name)]}
        description += " Class names are numbers here, so a number is a name, not an index."
    return {"anyOf": [name, index], "description": description}


def _binary(schema: Schema) -> tuple[str, ...]:
    image = len(schema.shape) == 3 and schema.shape[0] in (1, 3) and schema.dtype == np.uint8
    return ("application/octet-stream", "application/x-npy", *(("image/*",) if image else ()))


def predict_body(schema: Schema, *, most: int) -> dict[str, Any]:
    """OpenAPI of the body of POST /predict, with at most `most` samples."""
    ids = _list(_ID, 1, most)
    forms = [
        _object({"x": _tensor(schema), "id": _ID, "learn": {"type": "boolean"}}, "x"),
        _object(
            {"instances": _list(_tensor(schema), 1, most), "ids": ids, "learn": {"type": "boolean"}},
            "instances",
        ),
        _object({"ids": ids}, "ids"),
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


def label_body(schema: Schema, *, most: int, any_name: bool) -> dict[str, Any]:
    """OpenAPI of the body of POST /label, with at most `most` labels. `any_name` allows unknown classes."""
    label = _class_of(schema, "The class by name or index; null retracts the label.", any_name=any_name)
    label["anyOf"].append({"type": "null"})
    one = _object({"id": _ID, "label": label, "time": _TIME, "source": _TEXT}, "id", "label")
    many = _object({"labels": _list(one, 1, most)}, "labels")
    first, last = schema.classes[0], schema.classes[-1]
    examples = {
        "one": {"id": "invoice-7", "label": first},
        "several": {"labels": [{"id": "invoice-7", "label": first}, {"id": "invoice-8", "label": last}]},
        "with time and source": {"id": "invoice-7", "label": first, "time": "2026-11-24T09:00:00Z", "source": "audit"},
    }
    return _body({"oneOf": [one, many]}, examples)


def sample_body(schema: Schema, *, most: int, any_name: bool) -> dict[str, Any]:
    """OpenAPI of the body of POST /sample, with at most `most` samples. `any_name` as in `label_body`."""
    label = _class_of(schema, "The class, if it is already known.", any_name=any_name)
    fields = {"id": _ID, "x": _tensor(schema), "label": label, "time": _TIME, "domain": _TEXT}
    one = _object(fields, "x")
    many = _object({"samples": _list(one, 1, most)}, "samples")
    examples: dict[str, Any] = {}
    if int(np.prod(schema.shape)) <= LARGEST_EXAMPLE:
        x = _example(schema)
        examples = {"one": {"id": "invoice-7", "x": x}, "several": {"samples": [{"id": "a", "x": x}]}}
    return _body({"oneOf": [one, many]}, examples, _binary(schema))


def rollback_body() -> dict[str, Any]:
    """OpenAPI of the body of POST /model/rollback."""
    return _body(RollbackBody.model_json_schema(), {"one": {"version": 1200}})
