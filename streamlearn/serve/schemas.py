"""Shapes of replies, with examples, for OpenAPI only. The tests validate real replies against them.

Also parameters in path and query.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import Path
from pydantic import BaseModel, ConfigDict, Field, model_validator

from streamlearn.serve.failures import RequestError

LARGEST_EXACT = 2**53
"""Integers up to here are read exactly by every JSON parser."""
SampleId = Annotated[str, Path(description="The sample's id, percent-encoded.", examples=["invoice-7"])]


class Parameters(BaseModel):
    """Parameters in the query. Unknown ones are refused: with `?lern=true` a sample would be answered, not learned."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _check_names(cls, given: dict[str, Any]) -> dict[str, Any]:
        if unknown := sorted(given.keys() - cls.model_fields.keys()):
            message = f"unknown parameter {unknown[0]:.80}: expected {', '.join(sorted(cls.model_fields))}."
            raise RequestError(422, "invalid_parameter", message)
        return given


class BinaryParameters(Parameters):
    """Parameters of a body that may be binary."""

    id: list[str] = Field(default_factory=list)
    """Of the samples of a binary body, or of your own records, one for each."""


class _Shape(BaseModel):
    model_config = ConfigDict(use_attribute_docstrings=True, extra="forbid")


class _Reason(_Shape):
    code: str = Field(examples=["unknown_class"])
    """Stable; for programs."""
    message: str = Field(examples=["class 'dog' is none of 10: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9"])
    """A sentence; for people."""
    details: Any = None
    """Data that belongs to the code, such as the missing ids."""


class ErrorBody(_Reason):
    """Why a request failed."""

    request_id: str | None = Field(None, examples=["4f1c9c6f3f0e4a0f9a7b1f0f5a1c2d3e"])
    """As in the X-Request-ID header."""


class Error(_Shape):
    """Every error has this shape."""

    error: ErrorBody


class PositionBody(_Shape):
    """The position of a record in the log."""

    topic: str = Field(examples=["labels"])
    partition: int = Field(examples=[0])
    offset: int = Field(examples=[1042])


class PredictionBody(_Shape):
    """The answer for one sample."""

    id: str | None = Field(None, examples=["invoice-7"])
    """If one was given, or made for `learn`."""
    class_: str = Field(alias="class", examples=["3"])
    class_index: int = Field(examples=[3])
    probabilities: list[float] = Field(examples=[[0.01, 0.02, 0.03, 0.94]])
    """In the order of the classes."""
    position: PositionBody | None = None
    """With `learn`: the position of the sample, which is durable in the log."""
    invalid: list[str] | None = Field(None, examples=[["amount"]])
    """Columns that cannot take the value in the record: they count as missing."""


class PredictReply(_Shape):
    """Answers, all from one whole teacher."""

    predictions: list[PredictionBody]
    model_version: int = Field(examples=[1200])
    """The step of the teacher that answered."""
    published_at: str = Field(examples=["2026-11-24T09:00:00.000+00:00"])
    age_s: float = Field(examples=[0.8])
    """Seconds since it was published."""


class ItemError(_Reason):
    """Why one item of several was refused."""


class AppendedItem(_Shape):
    """One label or sample of a request."""

    id: str | None
    position: PositionBody | None = None
    state: Literal["accepted", "held", "new_class"] | None = None
    """All are durable. held: the label names an unknown class, and is learned once the schema has it.
    new_class: the name takes a spare class when the learner reads it, if one is left, and is held otherwise;
    `GET /label/{id}` reports which. For a sample, this is about its label: the sample itself is learned at once."""
    error: ItemError | None = None


class AppendReply(_Shape):
    """Accepted items are durable in the log."""

    items: list[AppendedItem]


class Holder(_Shape):
    """A place that still holds a copy of an erased sample."""

    holder: str = Field(examples=["checkpoints"])
    until: str = Field(examples=["state.keep_checkpoints newer ones are saved"])


class ErasedReply(_Shape):
    """The erasure is durable in the log."""

    id: str
    position: PositionBody
    """Of the erasure, in the labels topic."""
    state: Literal["accepted"] = "accepted"
    sample_position: PositionBody | None = None
    """The position of the sample in the log; null if it is not known."""
    still_held_by: list[Holder]


class LabelReply(_Shape):
    """The life of one sample's label, as of the learner's last flush."""

    id: str
    state: str = Field(examples=["trained"])
    class_: str | None = Field(None, alias="class")
    class_index: int | None = None
    """Null if the label is held, since its class is unknown, or retracted."""
    label_position: PositionBody | None = None
    label_time_s: float | None = None
    corrected: bool = False
    implied: bool = False
    """No label came in time: the class is labels.implied_class."""
    scored: bool = False
    first_trained_step: int | None = None
    in_served_model: bool = False
    """The teacher that answers now has learned it."""
    sample_position: PositionBody | None = None
    sample_time_s: float | None = None
    predicted_class: str | None = None
    """The class predicted on arrival, before the sample was learned."""
    model_version: int | None = None
    """The teacher of that prediction."""


class LabelRequestBody(_Shape):
    """One sample to label. Utility, entropy and disagreement are from 0 to 1."""

    id: str = Field(examples=["invoice-7"])
    predicted_class: str | None = Field(examples=["3"])
    """By the teacher, when the sample came."""
    utility: float = Field(examples=[0.61])
    """Entropy of the mean of teacher and student. The order is partly random, so items are not sorted by it."""
    entropy: float = Field(examples=[0.58])
    """Of the teacher's answer."""
    disagreement: float = Field(examples=[0.04])
    """Jensen-Shannon divergence of teacher and student."""
    position: PositionBody
    time_s: float
    """When the sample arrived, by event time."""
    payload: str = Field(examples=["/sample/invoice-7"])
    """Route that shows the sample, while it is kept."""


class RequestsReply(_Shape):
    """Samples to label, the most useful first; POST their labels to /label."""

    items: list[LabelRequestBody]
    budget_left: int = Field(examples=[990])
    """Samples that all clients together may still take within the hour."""


class SampleReply(_Shape):
    """A stored sample."""

    id: str = Field(examples=["invoice-7"])
    x: list[Any]
    """Numbers nested as the schema's shape."""
    fields: dict[str, Any] | None = Field(None, examples=[{"amount": 12.5, "merchant": 4711, "vip": None}])
    """Of a schema with columns: what its row shows by column, null where missing. A category shows its bucket;
    timestamps and texts cannot be read back. The record itself is in the log, at `position`."""
    position: PositionBody
    time_s: float
    """When it was appended to the log."""


class ModelReply(_Shape):
    """The teacher that answers, its input, and its learner."""

    model_version: int
    published_at: str
    age_s: float
    factory: str = Field(examples=["mlp"])
    classes: list[str]
    shape: list[int]
    dtype: str = Field(examples=["float32"])
    pinned: bool
    """An operator rolled back to this version: it answers until the newest is promoted."""
    newest_version: int | None
    """The version that was published last."""
    notes: list[str] = Field(examples=[["version 1200 is pinned, the newest is 4800"]])
    """Remarks on the choice of the teacher, and on what the learner's guard has done."""
    learner: dict[str, Any] | None = None
    """The learner's last heartbeat; null before the first."""
    learner_seen_s: float | None = None
    """Seconds since then."""
    scorers: dict[str, dict[str, Any] | None]
    """The last heartbeat of each scorer by name, with the seconds since then in `seen_s`; null before the first. Empty
    without source.predictions.topic."""


class ColumnBody(_Shape):
    """One column of a record."""

    name: str = Field(examples=["amount"])
    kind: str = Field(examples=["number"])
    path: str = Field(examples=["after.amount"])
    """Where its value is in the record."""
    options: dict[str, Any] = Field(examples=[{"buckets": 1024, "embedding": 8}])
    """Buckets and dimensions of a category, unit of a timestamp, size of a vector or a text."""


class SourceBody(_Shape):
    """A topic of records, and where they have what."""

    topic: str | list[str] = Field(examples=["transactions"])
    format: str = Field(examples=["avro"])
    """Of a record from a producer; appends over HTTP are JSON."""
    id: str | None = Field(examples=["transaction_id"])
    """A path into the record, `key`, `key.…` or `header:NAME`; null is "id" in the record, or else the key."""
    time: str | None = None
    time_unit: str = Field(examples=["s"])
    label: str | None = None
    domain: str | None = None
    values: dict[str, str] | None = Field(None, examples=[{"true": "fraud", "false": "legitimate"}])
    """Of labels: class names by value."""


class SchemaReply(_Shape):
    """What a sample and a label look like here."""

    columns: list[ColumnBody]
    """Of a record; empty if a sample is a tensor."""
    shape: list[int]
    dtype: str = Field(examples=["float32"])
    """Of the tensor, or of the row that a record becomes."""
    classes: list[str]
    samples: SourceBody
    labels: SourceBody
    sample_schema: dict[str, Any]
    """JSON Schema of one sample in POST /sample; with columns also in POST /predict."""
    sample_example: dict[str, Any] | None
    """Null if it is too large to show."""
    label_example: dict[str, Any]
    """A label in POST /label, with this server's own mapping."""


class VersionBody(_Shape):
    """One published version."""

    version: int = Field(examples=[1200])
    published_at_s: float
    """Seconds since the epoch."""
    age_s: float
    size_bytes: int | None
    scores: dict[str, Any] | None = Field(examples=[{"windowed_accuracy": 0.91, "ssl_gain": 0.02}])
    """The learner's scores when the version was published; null if it had none."""
    newest: bool
    pinned: bool
    served: bool
    """The version that servers answer with, if they can load it."""


class VersionsReply(_Shape):
    """All versions that can be served, newest first."""

    versions: list[VersionBody]


class RollbackBody(_Shape):
    """Which version to serve."""

    version: int = Field(ge=0, le=LARGEST_EXACT, strict=True, examples=[1200])
    """A version that GET /models lists."""


class ServedReply(_Shape):
    """The version that this server answers with now; the other servers follow within a second."""

    model_version: int = Field(examples=[1200])
    published_at: str
    pinned: bool
    newest_version: int | None
    before: int | None = Field(examples=[4800])
    """The version that answered before."""


class LiveReply(_Shape):
    """The process runs."""

    live: Literal[True]


class ReadyReply(_Shape):
    """Whether predictions are available, from a model that still learns."""

    ready: bool
    reasons: list[str] = Field(examples=[[]])
    """Why not, and remarks; empty if there are none."""


_HINTS = {
    401: "The token is missing or wrong.",
    403: "The token does not grant this route, or no admin token is set; without a token, a foreign Host or Origin.",
    404: "Unknown id.",
    408: "The body arrived too slowly.",
    413: "The body, or the samples that its ids name, are larger than the maximum.",
    415: "This route does not accept the content type.",
    422: "The request is invalid; the message has the place.",
    429: "A bounded queue is full; Retry-After has the time to wait.",
    500: "The server failed; its log has the cause under the request id.",
    503: "Not now: no model yet, none fresh enough, or the log is unavailable. Retry-After has the time to wait.",
    504: "The model did not answer in time.",
}


def responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The error replies of a route, for OpenAPI."""
    return {status: {"model": Error, "description": _HINTS[status]} for status in statuses}


def described(tag: str, reply: type[BaseModel], *errors: int) -> dict[str, Any]:
    """What OpenAPI shows of a route: its tag, its reply, and its errors."""
    return {"tags": [tag], "response_model": reply, "responses": responses(*errors)}


SCORES: dict[str, Any] = {
    "description": "Scores by name; null without data.",
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
"""OpenAPI of GET /score. The learner names its scores, so their set is open."""
