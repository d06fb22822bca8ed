"""What the API says of itself: request and reply shapes with examples, for OpenAPI only.

Bodies are decoded by hand in `bodies`, replies are written in the routes; nothing passes through these models at run
time. The tests hold real replies to them.
"""

from __future__ import annotations

from typing import Any, Literal, cast

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from streamlearn.log.fields import MAX_ID_BYTES, MAX_TEXT_BYTES, MAX_TIME_S
from streamlearn.records import Schema, is_whole

LARGEST_EXAMPLE = 1024
"""Numbers in an example; a larger sample is shown as a binary body only."""
LARGEST_EXACT = 2**53
"""An integer that every JSON parser reads as it was written; larger ones are taken, and not promised."""
LISTED_CLASSES = 100
"""More of them are not listed by name."""


class _Shape(BaseModel):
    model_config = ConfigDict(use_attribute_docstrings=True, extra="forbid")


class ErrorBody(_Shape):
    """Why a request got no 2xx."""

    code: str = Field(examples=["unknown_class"])
    """Stable; for programs."""
    message: str = Field(examples=["class 'dog' is not one of 10: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9"])
    """A sentence; for people."""
    details: Any = None
    """What belongs to the code, such as the ids that are missing."""
    request_id: str | None = Field(None, examples=["4f1c9c6f3f0e4a0f9a7b1f0f5a1c2d3e"])
    """As in X-Request-ID."""


class Error(_Shape):
    """Every error has this shape."""

    error: ErrorBody


class PositionBody(_Shape):
    """Where a record stands in the log."""

    topic: str = Field(examples=["labels"])
    partition: int = Field(examples=[0])
    offset: int = Field(examples=[1042])


class PredictionBody(_Shape):
    """The answer for one sample."""

    id: str | None = Field(None, examples=["invoice-7"])
    """Where one was given, or made for `learn`."""
    class_: str = Field(alias="class", examples=["3"])
    class_index: int = Field(examples=[3])
    probabilities: list[float] = Field(examples=[[0.01, 0.02, 0.03, 0.94]])
    """In the order of the classes."""
    position: PositionBody | None = None
    """With `learn`: where the sample is durable in the log."""


class PredictReply(_Shape):
    """Answers, all from one whole teacher."""

    predictions: list[PredictionBody]
    model_version: int = Field(examples=[1200])
    """The step of the teacher that answered."""
    published_at: str = Field(examples=["2026-11-24T09:00:00.000+00:00"])
    age_s: float = Field(examples=[0.8])
    """Seconds since it was published."""


class ItemError(_Shape):
    """Why one item of several was refused."""

    code: str
    message: str
    details: Any = None


class AppendedItem(_Shape):
    """One label or sample of a request."""

    id: str | None
    position: PositionBody | None = None
    state: Literal["accepted", "held", "new_class"] | None = None
    """All are durable. held: no class has the name that the label gives, so it is learned once one has.
    new_class: the name takes a spare class when the learner reads it, if there still is one, and is held otherwise;
    `GET /label/{id}` tells. Of a sample this is about the label inside: the sample itself is learned at once."""
    error: ItemError | None = None


class AppendReply(_Shape):
    """Accepted items are durable in the log."""

    items: list[AppendedItem]


class Holder(_Shape):
    """What still holds a copy of an erased sample."""

    holder: str = Field(examples=["checkpoints"])
    until: str = Field(examples=["state.keep_checkpoints newer ones are saved"])


class ErasedReply(_Shape):
    """The order to erase is durable in the log."""

    id: str
    position: PositionBody
    """Of the order, in the labels topic."""
    state: Literal["accepted"] = "accepted"
    sample_position: PositionBody | None = None
    """Where the sample stands in the log; null where it is not known."""
    still_held_by: list[Holder]


class LabelReply(_Shape):
    """The life of one sample's label, as of the learner's last flush."""

    id: str
    state: str = Field(examples=["trained"])
    class_: str | None = Field(None, alias="class")
    class_index: int | None = None
    """Null where the label is held, since no class has its name yet, or retracted."""
    label_position: PositionBody | None = None
    label_time_s: float | None = None
    corrected: bool = False
    implied: bool = False
    """No label came in time: the class is the one that this implies (labels.implied_class)."""
    scored: bool = False
    first_trained_step: int | None = None
    in_served_model: bool = False
    """The teacher that answers now has learned it."""
    sample_position: PositionBody | None = None
    sample_time_s: float | None = None
    predicted_class: str | None = None
    """What the sample was taken for on arrival, before it was learned."""
    model_version: int | None = None
    """Of that prediction."""


class WantedItem(_Shape):
    """One sample that waits for a label. Utility, entropy and disagreement are from 0 to 1."""

    id: str = Field(examples=["invoice-7"])
    predicted_class: str | None = Field(examples=["3"])
    """By the teacher, when the sample came."""
    utility: float = Field(examples=[0.61])
    """Entropy of what teacher and student say together. Chance has a part in the order, so it is not sorted by it."""
    entropy: float = Field(examples=[0.58])
    """Of the teacher's answer."""
    disagreement: float = Field(examples=[0.04])
    """Jensen-Shannon divergence of teacher and student."""
    position: PositionBody
    time_s: float
    """When the sample came, by the stream's time."""
    payload: str = Field(examples=["/sample/invoice-7"])
    """Where to see it, while it is kept."""


class WantedReply(_Shape):
    """Samples to label, the most wanted first; POST their labels to /label."""

    items: list[WantedItem]
    budget_left: int = Field(examples=[990])
    """How many more may be taken within the hour, by all together."""


class SampleReply(_Shape):
    """A stored sample."""

    id: str = Field(examples=["invoice-7"])
    x: list[Any]
    """Numbers nested as the schema's shape."""
    position: PositionBody
    time_s: float
    """When the log took it."""


class ModelReply(_Shape):
    """The teacher that answers, what it takes, and its learner."""

    model_version: int
    published_at: str
    age_s: float
    factory: str = Field(examples=["mlp"])
    classes: list[str]
    shape: list[int]
    dtype: str = Field(examples=["float32"])
    pinned: bool
    """An operator rolled back to this version: it answers until it is promoted, whatever is published."""
    newest_version: int | None
    """The version that was published last."""
    notes: list[str] = Field(examples=[["version 1200 is pinned, the newest is 4800"]])
    """What to know of the choice of the teacher, and what the learner's guard has done."""
    learner: dict[str, Any] | None = None
    """The learner's last heartbeat; null where none was seen."""
    learner_seen_s: float | None = None
    """Seconds since then."""


class VersionBody(_Shape):
    """One published version."""

    version: int = Field(examples=[1200])
    published_at_s: float
    """Seconds since the epoch."""
    age_s: float
    size_bytes: int | None
    scores: dict[str, Any] | None = Field(examples=[{"windowed_accuracy": 0.91, "ssl_gain": 0.02}])
    """Of the learner when it was published; null where it had none."""
    newest: bool
    pinned: bool
    served: bool
    """What servers answer with, if they could load it."""


class VersionsReply(_Shape):
    """All versions that can be rolled back to, newest first."""

    versions: list[VersionBody]


class RollbackBody(_Shape):
    """Which version to serve."""

    version: int = Field(ge=0, lt=2**63, strict=True, examples=[1200])
    """One of GET /models."""


class ServedReply(_Shape):
    """What this server answers with now; its siblings follow within a second."""

    model_version: int = Field(examples=[1200])
    published_at: str
    pinned: bool
    newest_version: int | None
    before: int | None = Field(examples=[4800])
    """The version that this server answered with before."""


class LiveReply(_Shape):
    """The process runs."""

    live: Literal[True]


class ReadyReply(_Shape):
    """Whether predictions can be had, from a model that still learns."""

    ready: bool
    reasons: list[str] = Field(examples=[[]])
    """Why not, or what to know: empty when all is well."""


_HINTS = {
    401: "The token is missing or wrong.",
    403: "The token does not open this route, no admin token is set, or no token at all and Host or Origin is foreign.",
    404: "Unknown id.",
    408: "The body came too slowly.",
    413: "The body, or what its ids stand for, is larger than the server takes.",
    415: "The content type is none that this route takes.",
    422: "The request is understood, and wrong; the message says where.",
    429: "A bounded queue is full; Retry-After says when to come back.",
    500: "The server failed; its log has the cause under the request id.",
    503: "Not now: no model yet, not one as fresh as asked for, or the log is away. Retry-After says when.",
    504: "The model did not answer in time.",
}


def responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """OpenAPI's error replies of a route."""
    return {status: {"model": Error, "description": _HINTS[status]} for status in statuses}


SCORES: dict[str, Any] = {
    "description": "Scores by name. One without data is null.",
    "content": {
        "application/json": {
            "schema": {"type": "object", "additionalProperties": True},
            "example": {
                "time_s": 1795510800.0,
                "age_s": 0.4,
                "step": 1200,
                "at_arrival": {"windowed": {"accuracy": {"teacher": 0.91, "majority": 0.12}, "kappa": 0.9}},
                "at_label": {"teacher": 0.92, "twin": 0.9, "gain": 0.02, "interval": [0.01, 0.03]},
            },
        }
    },
}
"""OpenAPI of GET /score: the learner names its scores, so their set is open."""


def _example(schema: Schema) -> list[Any]:
    example: list[Any] = np.zeros(schema.shape, schema.dtype).tolist()
    return example


def _tensor(schema: Schema) -> dict[str, Any]:
    """Numbers that the dtype holds, nested as the shape is, or flat."""
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
        "description": f"Numbers nested as {schema.shape}, or flat with as many; {schema.dtype} takes them.",
        **forms,
    }


def _list(items: dict[str, Any], least: int, most: int) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": least, "maxItems": most}


def _body(json_schema: dict[str, Any], examples: dict[str, Any], binary: tuple[str, ...] = ()) -> dict[str, Any]:
    shown = {name: {"value": value} for name, value in examples.items()}
    content: dict[str, Any] = {"application/json": {"schema": json_schema, "examples": shown}}
    content |= {kind: {"schema": {"type": "string", "format": "binary"}} for kind in binary}
    return {"requestBody": {"required": True, "content": content}}


def _object(properties: dict[str, Any], required: tuple[str, ...] = ()) -> dict[str, Any]:
    wanted = {"required": list(required)} if required else {}
    return {"type": "object", "properties": properties, "additionalProperties": False, **wanted}


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
    "description": "Seconds since the epoch, or ISO 8601 with a zone. It stays with the record; order, delay and age "
    "go by the time at which the log took it.",
}
_TEXT = {"type": "string", "maxLength": MAX_TEXT_BYTES}


def _class_of(schema: Schema, description: str, *, any_name: bool = False) -> dict[str, Any]:
    """A class by name, or by index where no class is called by a number; names are listed where they are few."""
    name: dict[str, Any] = {"type": "string", "minLength": 1, "maxLength": MAX_TEXT_BYTES}
    if not any_name and len(schema.classes) <= LISTED_CLASSES:
        name = {"type": "string", "enum": list(schema.classes)}
    index: dict[str, Any] = {"type": "integer", "minimum": 0, "maximum": len(schema.classes) - 1}
    if schema.numbered:
        index = {"type": "integer", "enum": [int(name) for name in schema.classes if is_whole(name)]}
        description += " Classes are called by numbers here, so a number is a name and no index."
    return {"anyOf": [name, index], "description": description}


def _binary(schema: Schema) -> tuple[str, ...]:
    image = len(schema.shape) == 3 and schema.shape[0] in (1, 3) and schema.dtype == np.uint8
    return ("application/octet-stream", "application/x-npy", *(("image/*",) if image else ()))


def predict_body(schema: Schema, *, most: int) -> dict[str, Any]:
    """OpenAPI of the body of POST /predict, of at most so many samples."""
    ids = _list(_ID, 1, most)
    forms = [
        _object({"x": _tensor(schema), "id": _ID, "learn": {"type": "boolean"}}, ("x",)),
        _object(
            {"instances": _list(_tensor(schema), 1, most), "ids": ids, "learn": {"type": "boolean"}},
            ("instances",),
        ),
        _object({"ids": ids}, ("ids",)),
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
    """OpenAPI of the body of POST /label, of at most so many; with `any_name`, also of classes that are not known."""
    label = _class_of(schema, "The class by its name or index; null retracts the label.", any_name=any_name)
    label["anyOf"].append({"type": "null"})
    one = _object({"id": _ID, "label": label, "time": _TIME, "source": _TEXT}, ("id", "label"))
    many = _object({"labels": _list(one, 1, most)}, ("labels",))
    first, last = schema.classes[0], schema.classes[-1]
    examples = {
        "one": {"id": "invoice-7", "label": first},
        "several": {"labels": [{"id": "invoice-7", "label": first}, {"id": "invoice-8", "label": last}]},
        "with time and source": {"id": "invoice-7", "label": first, "time": "2026-11-24T09:00:00Z", "source": "audit"},
    }
    return _body({"oneOf": [one, many]}, examples)


def sample_body(schema: Schema, *, most: int, any_name: bool) -> dict[str, Any]:
    """OpenAPI of the body of POST /sample, of at most so many; with `any_name` as in `label_body`."""
    label = _class_of(schema, "The class, where it is known already.", any_name=any_name)
    fields = {"id": _ID, "x": _tensor(schema), "label": label, "time": _TIME, "domain": _TEXT}
    one = _object(fields, ("x",))
    many = _object({"samples": _list(one, 1, most)}, ("samples",))
    examples: dict[str, Any] = {}
    if int(np.prod(schema.shape)) <= LARGEST_EXAMPLE:
        x = _example(schema)
        examples = {"one": {"id": "invoice-7", "x": x}, "several": {"samples": [{"id": "a", "x": x}]}}
    return _body({"oneOf": [one, many]}, examples, _binary(schema))


def rollback_body() -> dict[str, Any]:
    """OpenAPI of the body of POST /model/rollback."""
    version = {"type": "integer", "minimum": 0, "maximum": LARGEST_EXACT, "description": "One of GET /models."}
    return _body(_object({"version": version}, ("version",)), {"one": {"version": 1200}})
