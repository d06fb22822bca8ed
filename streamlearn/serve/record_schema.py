"""JSON Schema and examples of the user's own records and labels, as [source] and [columns] describe them.

A record may have more fields, and a value that its column cannot take counts as missing: the schema has the types that
a column is meant for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from streamlearn.log.codec import Codec
from streamlearn.records import ColumnKind, Schema, is_whole
from streamlearn.schema.columns import LARGEST_NUMBER
from streamlearn.schema.fields import MAX_ID_BYTES, MAX_TEXT_BYTES, MAX_TIME_S, UNITS_PER_SECOND
from streamlearn.schema.paths import Path
from streamlearn.schema.settings import ColumnConfig, LabelSource, SampleSource
from streamlearn.serve.schemas import LARGEST_EXACT

LISTED_CLASSES = 100
"""Schemas with more classes are described without their names."""
EXAMPLE_ID = "invoice-7"
_EXAMPLE_TIME_S = 1_795_510_800
_NUMBER = {"minimum": -LARGEST_NUMBER, "maximum": LARGEST_NUMBER}

Json = dict[str, Any]

ID: Json = {
    "anyOf": [
        {"type": "string", "minLength": 1, "maxLength": MAX_ID_BYTES},
        {"type": "integer", "minimum": -LARGEST_EXACT, "maximum": LARGEST_EXACT},
    ],
    "description": f"Text of 1 to {MAX_ID_BYTES} bytes, or an integer.",
}
TEXT: Json = {"type": "string", "maxLength": MAX_TEXT_BYTES}


def class_schema(schema: Schema, description: str, *, any_name: bool, values: Iterable[str] = ()) -> Json:
    """A class by name, or by index if no class name is a number; names are listed if they are few.

    `values` are those of `source.labels.values`, which name classes too.
    """
    name: Json = {"type": "string", "minLength": 1, "maxLength": MAX_TEXT_BYTES}
    if not any_name and len(schema.classes) <= LISTED_CLASSES:
        name = {"type": "string", "enum": list(schema.classes)}
    index: Json = {"type": "integer", "minimum": 0, "maximum": len(schema.classes) - 1}
    if schema.numbered:
        index = {"type": "integer", "enum": [int(name) for name in schema.classes if is_whole(name)]}
        description += " Class names are numbers here, so a number is a name, not an index."
    given = [_parsed(text) for text in values]
    return {"anyOf": [name, index, *([{"enum": given}] if given else [])], "description": description}


def sample_schema(codec: Codec) -> Json:
    """JSON Schema of a sample's record: at least one of its columns is there."""
    source, columns = codec.source.samples, codec.columns
    paths = {name: config.path(name) for name, config in columns.items()}
    leaves = [(paths[name], _column(config)) for name, config in columns.items()]
    id_path = Path.parse(source.id or "id")
    leaves.append((id_path, {**ID, "description": "The sample's id. Without it, or null, it gets one."}))
    if source.time:
        leaves.append((Path.parse(source.time), _time(source)))
    if source.domain:
        leaves.append((Path.parse(source.domain), {**TEXT, "description": "The sample's domain."}))
    if source.label:
        label = _class(codec, "The class, if it is already known; for POST /sample only.")
        leaves.append((Path.parse(source.label), label))
    return {**_nested(leaves), "anyOf": [_required(path) for path in paths.values()]}


def sample_example(codec: Codec) -> Json:
    """A record with a value in each column."""
    source = codec.source.samples
    found: Json = {}
    _put(found, Path.parse(source.id or "id"), EXAMPLE_ID)
    for name, config in codec.columns.items():
        _put(found, config.path(name), _EXAMPLES[config.kind](config))
    if source.time:
        _put(found, Path.parse(source.time), _EXAMPLE_TIME_S * int(UNITS_PER_SECOND[source.time_unit]))
    if source.domain:
        _put(found, Path.parse(source.domain), "web")
    return found


def label_schema(codec: Codec) -> Json:
    """JSON Schema of a label's record: its id and its class are there. An id in the key or a header is "id" here."""
    source = codec.source.labels
    id_path, label_path = _label_paths(source)
    leaves = [(id_path, ID), (label_path, _class(codec, "The class; null retracts the label.", null=True))]
    if source.time:
        leaves.append((Path.parse(source.time), _time(source)))
    return {**_nested(leaves), "allOf": [_required(id_path), _required(label_path)]}


def label_example(codec: Codec) -> Json:
    """A label's record with the first value, or the first class."""
    source = codec.source.labels
    id_path, label_path = _label_paths(source)
    found: Json = {}
    _put(found, id_path, EXAMPLE_ID)
    _put(found, label_path, next((_parsed(text) for text in source.values), codec.schema.classes[0]))
    return found


def _label_paths(source: LabelSource) -> tuple[Path, Path]:
    """Where id and class are over HTTP."""
    paths = (Path.parse(source.id or "id"), Path.parse(source.label or "label"))
    id_path, label_path = (
        path if path.root == "value" else Path.in_value(name) for path, name in zip(paths, ("id", "label"), strict=True)
    )
    return id_path, label_path


def _class(codec: Codec, description: str, *, null: bool = False) -> Json:
    found = class_schema(codec.schema, description, any_name=codec.takes_any_name, values=codec.source.labels.values)
    if null:
        found["anyOf"].append({"type": "null"})
    return found


def _parsed(text: str) -> object:
    """The JSON value that `source.labels.values` names by its text."""
    return {"true": True, "false": False}.get(text, int(text) if is_whole(text) and str(int(text)) == text else text)


def _time(source: SampleSource | LabelSource) -> Json:
    largest = MAX_TIME_S * UNITS_PER_SECOND[source.time_unit]
    return {
        "anyOf": [
            {"type": "number", "minimum": 0, "exclusiveMaximum": largest},
            {"type": "string", "format": "date-time"},
            {"type": "null"},
        ],
        "description": f"Event time: a number of {source.time_unit} since 1970, or ISO 8601.",
    }


def _column(config: ColumnConfig) -> Json:
    found: Json = dict(_TYPES[config.kind])
    if config.kind == "vector":
        found |= {"minItems": config.size, "maxItems": config.size}
    if config.kind == "timestamp":
        found["description"] = f"timestamp: a number of {config.unit} since 1970, or ISO 8601."
    return {"description": f"{config.kind}{_ALSO.get(config.kind, '')}", **found}


_ALSO: Mapping[ColumnKind, str] = {"number": ", also as text", "boolean": ", also 0, 1, yes or no, also as text"}
_TYPES: Mapping[ColumnKind, Json] = {
    "number": {"type": ["number", "string", "null"], **_NUMBER},
    "boolean": {"type": ["boolean", "integer", "string", "null"], "minimum": 0, "maximum": 1},
    "category": {"type": ["string", "integer", "boolean", "null"]},
    "timestamp": {"type": ["number", "string", "null"]},
    "vector": {"type": ["array", "null"], "items": {"type": "number", **_NUMBER}},
    "text": {"type": ["string", "null"]},
}
_EXAMPLES: Mapping[ColumnKind, Callable[[ColumnConfig], Any]] = {
    "number": lambda _: 12.5,
    "boolean": lambda _: True,
    "category": lambda _: "a",
    "timestamp": lambda config: _EXAMPLE_TIME_S * int(UNITS_PER_SECOND[config.unit]),
    "vector": lambda config: [0.0] * config.size,
    "text": lambda _: "some text",
}


def _nested(leaves: Iterable[tuple[Path, Json]]) -> Json:
    """An object with a schema at each path into the record; the later wins."""
    found: Json = {"type": "object", "properties": {}}
    for path, leaf in leaves:
        if path.root != "value":
            continue
        node = found
        for part in path.parts[:-1]:
            node = node.setdefault("properties", {}).setdefault(part, {"type": "object", "properties": {}})
        node.setdefault("properties", {})[path.parts[-1]] = leaf
    return found


def _required(path: Path) -> Json:
    """Demands that there is something at a path."""
    found: Json = {"required": [path.parts[-1]]}
    for part in reversed(path.parts[:-1]):
        found = {"required": [part], "properties": {part: found}}
    return found


def _put(fields: Json, path: Path, value: object) -> None:
    """Put a value at a path into the record, unless one of the fields on the way has another."""
    if path.root != "value":
        return
    node: object = fields
    for part in path.parts[:-1]:
        node = node.setdefault(part, {}) if isinstance(node, dict) else node
    if isinstance(node, dict):
        node[path.parts[-1]] = value
