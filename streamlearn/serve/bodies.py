"""Request bodies, decoded by hand into tensors and log records.

Float lists do not pass through pydantic, which would cost more than the model itself. Items of a list are accepted or
refused one by one. What a client may send is declared in `schemas`.
"""

from __future__ import annotations

import functools
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, TypeVar

import numpy as np
import orjson
from starlette.requests import Request

from streamlearn.errors import RecordError
from streamlearn.log.codec import Codec
from streamlearn.log.payload import npy_shape
from streamlearn.metrics import ServerMetrics
from streamlearn.records import Array, NewRecord
from streamlearn.schema.fields import checked_id, unquoted
from streamlearn.schema.formats import hint_of_json, parse_json
from streamlearn.schema.paths import Path
from streamlearn.schema.settings import LabelSource, SampleSource
from streamlearn.serve.failures import RequestError, from_domain
from streamlearn.serve.held_bytes import HeldBytes

JSON = "application/json"
MAX_ITEMS = 1024
"""Samples or labels in one request."""

_NPY_HEADER_BYTES = 512
"""The shape of a .npy body is looked for in these first bytes."""

T = TypeVar("T")
Encode: TypeAlias = Callable[[Mapping[str, Any]], tuple[NewRecord, str | None]]
"""From one item to its record, and the name of its label if the schema has no such class."""


@dataclass(frozen=True, slots=True)
class PredictBody:
    """Samples to predict: rows (n, *shape) or the user's records, and their ids if given; or ids of stored samples."""

    x: Array | None
    ids: Sequence[str | None] | None
    """None in it is a record without an id."""
    learn: bool
    records: list[dict[str, Any]] | None = None
    """For a schema with columns, instead of `x`."""


@dataclass(frozen=True, slots=True)
class Item:
    """One label or sample of a request: a record to append, or the error."""

    sample_id: str | None
    record: NewRecord | None
    error: RequestError | None = None
    class_name: str | None = None
    """The name that its label gives, if the schema has no such class."""


class Bodies:
    """Reads and decodes bodies for one schema."""

    def __init__(
        self, codec: Codec, metrics: ServerMetrics, *, max_bytes: int, timeout_s: float, max_items: int = MAX_ITEMS
    ) -> None:
        self._max_items = max_items
        self._codec, self._schema, self._max_bytes = codec, codec.schema, max_bytes
        self.held = HeldBytes(metrics, max_bytes=max_bytes, timeout_s=timeout_s)
        self._sample_ids, self._label_ids = _id_paths(codec.source.samples), _id_paths(codec.source.labels)

    @asynccontextmanager
    async def read_as(self, request: Request, decode: Callable[[bytes, str], T]) -> AsyncIterator[T]:
        """What a function makes of the body and its content type. The body is held as by `HeldBytes.read`."""
        content_type = request.headers.get("content-type", "")
        async with self.held.read(request) as body:
            size_bytes = len(body)
            if self._codec.rows is not None:  # each record may become a row
                size_bytes = max(size_bytes, body.count(b"{") * self._schema.nbytes)
            yield await self.held.decoded(size_bytes, lambda: decode(body, content_type))

    # POST /predict

    def predict(self, body: bytes, content_type: str, names: Sequence[str], *, learn: bool = False) -> PredictBody:
        """Decode a /predict body; `names` are the ids in the query, for binary bodies.

        Raises:
            RequestError: 415 or 422, with the place of the error.
            RecordError: a payload is invalid.
        """
        if self._codec.rows is not None:
            decoded = self._predict_records(_json_only(body, content_type), names, learn=learn)
        elif _essence(content_type) == JSON:
            decoded = self._predict_json(_json_of(body, names), learn=learn)
        else:
            x = self._rows(body, content_type)
            if names and len(names) != len(x):
                raise _invalid(f"id: expected one for each of {len(x)} samples, got {len(names)}.")
            decoded = PredictBody(x, [checked_id(name) for name in names] or None, learn)
        if decoded.learn and decoded.x is None and decoded.records is None:
            raise _invalid("learn: stored samples are in the log already; only new ones can be learned.")
        given = [sample_id for sample_id in decoded.ids or () if sample_id is not None]
        if decoded.learn and len(set(given)) < len(given):
            raise _invalid("learn: each id may occur once in a request.", "duplicate_id")
        return decoded

    def _predict_records(self, fields: dict[str, Any], names: Sequence[str], *, learn: bool) -> PredictBody:
        if self._are_stored(fields):
            _only(fields, ("ids",))
            return PredictBody(None, [checked_id(value) for value in self._list(fields["ids"], "ids")], learn)
        records, given = self._records(fields, "instances", names)
        ids: list[str | None] = []
        for index, (record, name) in enumerate(zip(records, given, strict=True)):
            if not isinstance(record, dict):
                raise _invalid(f"instances[{index}]: expected a record, which is a JSON object.")
            ids.append(self._codec.id_in(record, name))
        return PredictBody(None, ids if any(ids) else None, learn, records)

    def _records(self, fields: dict[str, Any], name: str, names: Sequence[str]) -> tuple[list[Any], list[Any]]:
        """The user's records of a body, and what is given as the id of each; None for none.

        The body is one record, or `{name: [record, …], "ids": [id, …]}`. A record may have a field of that name: the
        body is a record if a column begins at one of its fields, unless it is a list of objects, which no column
        takes, and all that there is. `names` are the ids in the query.
        """
        listed = fields.get(name)
        is_list = isinstance(listed, list) and all(isinstance(record, dict) for record in listed)
        if self._begins_a_record(fields) and not (is_list and fields.keys() <= {name, "ids"}):
            records: list[Any] = [fields]
        elif name not in fields:
            _refuse_another_list(fields, name)
            records = [fields]
        else:
            _only(fields, (name, "ids"))
            records = self._list(fields[name], name)
            if "ids" in fields:
                if names:
                    raise _invalid('expected ids in the query or in "ids", got both.')
                names = self._list(fields["ids"], "ids")
        if names and len(names) != len(records):
            raise _invalid(f"ids: expected one for each of {len(records)} records, got {len(names)}.")
        return records, list(names) or [None] * len(records)

    def _are_stored(self, fields: Mapping[str, Any]) -> bool:
        """Whether a body asks for stored samples by ids. Of columns of that name only a vector takes a list."""
        if "ids" not in fields or "instances" in fields:
            return False
        if not self._begins_a_record(fields):
            return True
        listed, column = fields["ids"], self._codec.columns.get("ids")
        return len(fields) == 1 and isinstance(listed, list) and (column is None or column.kind != "vector")

    def _begins_a_record(self, fields: Mapping[str, Any]) -> bool:
        return self._codec.rows is not None and self._codec.rows.reads_any(fields)

    def encode(self, records: Sequence[Mapping[str, Any]]) -> tuple[Array, list[list[str]]]:
        """The rows (n, width) of records, and of each the columns that cannot take its value.

        Raises:
            RecordError: `no_value`, none of the columns is in a record.
        """
        rows = self._codec.rows
        assert rows is not None, "no columns"
        x, invalid = np.empty((len(records), rows.width), np.float32), [list[str]() for _ in records]
        for index, record in enumerate(records):
            try:
                x[index] = rows.encode(record, invalid=invalid[index])
            except RecordError as error:
                place = f"instances[{index}]: " if len(records) > 1 else ""
                raise RecordError(error.reason, f"{place}{error}") from None
        return x, invalid

    def _predict_json(self, fields: Mapping[str, Any], *, learn: bool) -> PredictBody:
        _only(fields, ("x", "id", "instances", "ids", "learn"))
        given = {name: value for name, value in fields.items() if value is not None}
        if not isinstance(given.get("learn", False), bool):
            raise _invalid("learn: expected true or false.")
        learn = learn or given.get("learn", False)
        if "x" in given:
            if "instances" in given or "ids" in given:
                raise _invalid('expected "x" and "id" for one sample or "instances" and "ids" for several, got both.')
            one = [checked_id(given["id"])] if "id" in given else None
            return PredictBody(self._codec.tensors.from_json(given["x"])[np.newaxis], one, learn)
        listed = self._list(given["instances"], "instances") if "instances" in given else None
        ids: list[str | None] | None = None
        if "ids" in given:
            ids = [checked_id(value) for value in self._list(given["ids"], "ids")]
            if listed and isinstance(listed[0], dict):
                raise _invalid('instances[0]: expected the payload only, as "ids" has the ids.')
        elif listed is not None and any(isinstance(each, dict) for each in listed):
            ids = [self._id_in_instance(each, index) for index, each in enumerate(listed)]
            listed = [each["x"] for each in listed]
        if listed is None and (ids is None or "id" in given):
            raise _invalid('expected "x" for one sample, "instances" for several, or "ids" of stored ones.')
        if listed is not None and ("id" in given or (ids is not None and len(ids) != len(listed))):
            raise _invalid(f"ids: expected one for each of {len(listed)} instances.")
        return PredictBody(None if listed is None else self._instances(listed), ids, learn)

    def _id_in_instance(self, instance: object, index: int) -> str | None:
        """The id of `{"x", "id"?}`, as in /sample."""
        if not isinstance(instance, dict) or "x" not in instance or not instance.keys() <= {"x", "id"}:
            raise _invalid(f'instances[{index}]: expected payloads only, or objects with "x" and "id" only.')
        return None if instance.get("id") is None else checked_id(instance["id"])

    def _instances(self, rows: list[Any]) -> Array:
        x = np.empty((len(rows), *self._schema.shape), dtype=self._schema.dtype)
        for index, row in enumerate(rows):
            try:
                x[index] = self._codec.tensors.from_json(row)
            except RecordError as error:
                raise RecordError(error.reason, f"instances[{index}]: {error}") from None
        return x

    def _rows(self, body: bytes, content_type: str) -> Array:
        """The samples (n, *shape) of a binary body: one, or several stacked."""
        count = self._stacked(body, content_type)
        if count is None:
            return self._codec.decode_payload(body, content_type)[np.newaxis]
        if not 1 <= count <= self._max_items:
            raise _invalid(f"expected 1 to {self._max_items} samples in the body, got {count}.")
        stacked = replace(self._schema, shape=(count, *self._schema.shape))
        return Codec(stacked, max_record_bytes=self._max_bytes).decode_payload(body, content_type)

    def _stacked(self, body: bytes, content_type: str) -> int | None:
        """The number of stacked samples; None for a single sample, or a body that cannot be counted."""
        essence = _essence(content_type)
        if essence == "application/octet-stream":
            count, rest = divmod(len(body), self._schema.nbytes)
            return count if rest == 0 and count != 1 and body else None
        if essence == "application/x-npy" and (shape := npy_shape(body[:_NPY_HEADER_BYTES])):
            return shape[0] if shape[1:] == self._schema.shape else None
        return None

    # POST /label and POST /sample

    def labels(self, body: bytes, content_type: str) -> list[Item]:
        """The labels of a /label body, each with its record or its error.

        Raises:
            RequestError: 415 or 422, the body cannot be split into items.
        """
        fields = _json_only(body, content_type)
        is_users = fields.keys() != {"labels"} and not self._codec.labels.is_own(fields)
        items = [fields] if is_users else self._items(fields, "labels")
        return [self._item(fields, self._label, self._label_ids) for fields in items]

    def _label(self, fields: Mapping[str, Any]) -> tuple[NewRecord, str | None]:
        if not self._codec.labels.is_own(fields):
            users_record, label = self._codec.labels.encode_users(fields)
            return users_record, label.class_name
        _only(fields, ("id", "label", "class", "time", "source"))
        class_index, class_name = self._codec.classes.of_label(fields)
        # It checks id, time and source as when it reads a record.
        record = self._codec.labels.encode(
            fields.get("id", ""),
            class_index,
            class_name=class_name,
            event_time_s=fields.get("time"),
            source=fields.get("source"),
        )
        return record, class_name

    def samples(self, body: bytes, content_type: str, names: Sequence[str]) -> list[Item]:
        """The samples of a /sample body, each with its record or its error; `names` as in `predict`.

        Raises:
            RequestError: 415 or 422, the body cannot be split into items.
            RecordError: the payload of a binary body is invalid.
        """
        if self._codec.rows is not None:
            records, given = self._records(_json_only(body, content_type), "samples", names)
            items = [
                self._item(record, functools.partial(self._record, name=name), self._sample_ids)
                for record, name in zip(records, given, strict=True)
            ]
        elif _essence(content_type) == JSON:
            listed = self._items(_json_of(body, names), "samples")
            items = [self._item(fields, self._sample, self._sample_ids) for fields in listed]
        else:
            decoded = self.predict(body, content_type, names)
            assert decoded.x is not None
            ids = [sample_id or new_id() for sample_id in decoded.ids or [None] * len(decoded.x)]
            items = [Item(name, self._codec.encode_sample(name, x)) for name, x in zip(ids, decoded.x, strict=True)]
        return _refuse_repeated(items)

    def _sample(self, fields: Mapping[str, Any]) -> tuple[NewRecord, str | None]:
        _only(fields, ("id", "x", "label", "time", "domain"))
        if fields.get("x") is None:
            raise RecordError("no_value", 'expected the payload in "x", got none')
        x = self._codec.tensors.from_json(fields["x"])
        given = fields.get("label")
        label, class_name = (None, None) if self._codec.classes.is_none(given) else self._codec.classes.of_value(given)
        record = self._codec.encode_sample(
            new_id() if fields.get("id") is None else fields["id"],
            x,
            label=label,
            class_name=class_name,
            event_time_s=fields.get("time"),
            domain=fields.get("domain"),
        )
        return record, class_name

    def _record(self, fields: Mapping[str, Any], *, name: object) -> tuple[NewRecord, str | None]:
        """The user's record as a sample, with its id or the one given next to it, or else a new one."""
        record, sample = self._codec.encode_record(self._codec.id_in(fields, name) or new_id(), fields)
        return record, sample.class_name

    def _items(self, fields: Mapping[str, Any], name: str) -> list[Any]:
        if name not in fields:
            _refuse_another_list(fields, name)
            return [fields]
        _only(fields, (name,))
        return self._list(fields[name], name)

    def _item(self, fields: object, encode: Encode, id_paths: Sequence[Path]) -> Item:
        """One item. An error names the id that is at one of the paths."""
        if not isinstance(fields, dict):
            return Item(None, None, _invalid("expected a JSON object for each item."))
        try:
            record, class_name = encode(fields)
        except (RecordError, RequestError) as error:
            found = [path.find(fields) for path in id_paths]
            given = next((value for value in found if isinstance(value, str | int)), None)
            return Item(None if given is None else str(given)[:80], None, from_domain(error))
        assert record.key is not None
        return Item(unquoted(record.key), record, None, class_name)

    def _list(self, value: object, name: str) -> list[Any]:
        if not isinstance(value, list) or not 1 <= len(value) <= self._max_items:
            got = f"a list of {len(value)}" if isinstance(value, list) else "no list"
            raise _invalid(f"{name}: expected a list of 1 to {self._max_items}, got {got}.")
        return value


def new_id() -> str:
    """An id for a sample that came without one."""
    return uuid.uuid4().hex


def _id_paths(source: SampleSource | LabelSource) -> list[Path]:
    """Where an item may have its id."""
    paths = [Path.parse(text) for text in (source.id, "id") if text is not None]
    return [path for path in paths if path.root == "value"]


def _refuse_repeated(items: list[Item]) -> list[Item]:
    """Replace all but the first sample of an id by an error: the learner uses a sample id once."""
    seen: set[str | None] = set()
    for index, item in enumerate(items):
        if item.record is not None and item.sample_id in seen:
            items[index] = Item(item.sample_id, None, _invalid("the id occurs twice in this request.", "duplicate_id"))
        elif item.record is not None:
            seen.add(item.sample_id)
    return items


def _refuse_another_list(fields: Mapping[str, Any], name: str) -> None:
    """Raise RequestError if several items are in another field than `name`, as in the body of another route."""
    for other, value in fields.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            raise _invalid(f"unknown field {other}: expected several items in {name}, or one without a list.")


def _essence(content_type: str) -> str:
    return content_type.partition(";")[0].strip().lower()


def _invalid(message: str, code: str = "invalid_body") -> RequestError:
    return RequestError(422, code, message)


def _json_only(body: bytes, content_type: str) -> dict[str, Any]:
    """The JSON of a body that cannot be binary: a label, or a record of a schema with columns."""
    if _essence(content_type) != JSON:
        raise RequestError(415, "bad_content_type", f"Content-Type {content_type[:80]!r}: expected {JSON}.")
    return _json_of(body)


def _json_of(body: bytes, names: Sequence[str] = ()) -> dict[str, Any]:
    if names:
        raise _invalid("id: of a JSON body, put ids into the body.")
    try:
        fields = parse_json(body)
    except orjson.JSONDecodeError as error:  # also lone surrogates, and nesting that would exhaust the stack
        raise _invalid(f"The body is not JSON: {error}{hint_of_json(body)}.", "not_json") from None
    if not isinstance(fields, dict):
        raise _invalid("The body is JSON, but not an object. GET /docs shows how to send several.", "not_json")
    return fields


def _only(fields: Mapping[str, Any], names: Sequence[str]) -> None:
    if unknown := [name for name in fields if name not in names]:
        shown = ", ".join(name[:40] for name in unknown[:5])
        raise _invalid(f"unknown field {shown}: expected {', '.join(names)}.")
