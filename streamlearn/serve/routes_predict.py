"""POST /predict. It changes no state of the learner (I8); with `learn` it also appends the sample to the log."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import orjson
from fastapi import APIRouter, Query, Request
from pydantic import Field
from starlette.responses import Response

from streamlearn.errors import StreamlearnError
from streamlearn.records import Array, NewRecord, Position, Prediction, Probabilities
from streamlearn.serve.bodies import PredictBody, new_id
from streamlearn.serve.failures import RequestError, from_domain, retry_later
from streamlearn.serve.parts import Parts
from streamlearn.serve.predictor import LoadedModel
from streamlearn.serve.replies import JsonReply, iso
from streamlearn.serve.request_schemas import predict_body
from streamlearn.serve.schemas import BinaryParameters, PredictReply, described
from streamlearn.serve.waiting import Waiters

_POSITION = re.compile(r"([A-Za-z0-9._-]{1,249}):([0-9]{1,9}):([0-9]{1,18})")


class PredictParameters(BinaryParameters):
    """Parameters of POST /predict."""

    learn: bool = False
    """Also append the samples to the log, with the answers."""
    min_version: int | None = Field(None, ge=0)
    """Wait for this version or a later one; 503 if none comes in time."""
    max_age_s: float | None = Field(None, ge=0, allow_inf_nan=False)
    """Wait for a model that is at most this old."""
    after: list[str] = Field(default_factory=list, examples=[["labels:0:1042"]])
    """Wait for a model that has learned all labels up to this position, as POST /label returned it:
    topic:partition:offset, or the object as JSON. Repeatable. 503 if none comes in time."""


@dataclass(frozen=True, slots=True)
class Freshness:
    """What a client requires of the teacher; None requires nothing."""

    min_version: int | None
    max_age_s: float | None
    after: Mapping[str, int]
    """By "topic:partition": the offset of a label that it must have learned."""

    def missing(self, model: LoadedModel, now_s: float) -> str | None:
        """What the teacher lacks, as a sentence; None if it is fresh enough."""
        age_s = now_s - model.published_at_s
        if self.min_version is not None and model.step < self.min_version:
            return f"model_version is {model.step}, requested was {self.min_version}"
        if self.max_age_s is not None and age_s > self.max_age_s:
            return f"the model is {age_s:.3f} s old, requested was at most {self.max_age_s:g} s"
        if self.after and model.learned_offsets is None:
            return f"version {model.step} does not list the labels it has learned; an older streamlearn published it"
        for partition, offset in self.after.items():
            next_offset = (model.learned_offsets or {}).get(partition, 0)
            if next_offset <= offset:
                return f"version {model.step} has learned {partition} before {next_offset}, requested was {offset}"
        return None


def after_of(values: Sequence[str], topics: Sequence[str], *, most: int) -> dict[str, int]:
    """The largest offset by "topic:partition"; a position is topic:partition:offset, or the object of a reply as JSON.

    Raises:
        RequestError: 422, a value is not a position in one of `topics`, or there are more than `most`.
    """
    if len(values) > most:
        raise _bad_after(f"expected at most {most} positions, got {len(values)}")
    found: dict[str, int] = {}
    for value in values:
        match = _POSITION.fullmatch(_position_text(value))
        if match is None:
            example = f"{topics[0]}:0:1042"
            raise _bad_after(f'expected a position such as {example} or the reply\'s "position", got {value[:100]!r}')
        topic, partition, offset = match[1], int(match[2]), int(match[3])
        if topic not in topics:
            raise _bad_after(f"expected a position in {' or '.join(topics)}, got one in {topic}")
        key = f"{topic}:{partition}"
        found[key] = max(offset, found.get(key, 0))
    return found


def _position_text(value: str) -> str:
    """A position object of a reply as topic:partition:offset; any other text unchanged."""
    if not value.startswith("{"):
        return value
    try:
        fields = orjson.loads(value)
    except orjson.JSONDecodeError:
        return value
    return f"{fields.get('topic')}:{fields.get('partition')}:{fields.get('offset')}"


def _bad_after(message: str) -> RequestError:
    return RequestError(422, "invalid_parameter", f"after: {message}.")


class PredictFlow:
    """The steps of one request, from its body to its reply."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._waiters = Waiters(parts.metrics, "a fresher model", most=parts.queue)

    async def answer(self, body: PredictBody, freshness: Freshness) -> Response:
        """Predict the samples of a body by one teacher, and append them if they are to be learned."""
        await self._wait_for(freshness)
        # Make rows after the wait: a few bytes of ids or fields may stand for megabytes.
        made = len(body.records or body.ids or ()) if body.x is None else 0
        made_bytes = made * self._parts.codec.schema.nbytes
        with self._parts.bodies.held.room(made_bytes):
            x, invalid = await self._parts.bodies.held.decoded(made_bytes, lambda: self._rows(body))
            probs_BC, model = await self._parts.batcher.predict(x, self._parts.settings.timeout_s)
        self._check(freshness, model, probs_BC)
        chosen_B = self._parts.thresholds.choose(probs_BC).tolist()
        answers = [Prediction(winner, probs_C, model.step) for winner, probs_C in zip(chosen_B, probs_BC, strict=True)]
        ids, positions = body.ids, None
        if body.learn:
            ids = learned = [sample_id or new_id() for sample_id in body.ids or [None] * len(x)]
            positions = await self._append(learned, body.records, x, answers)
        return self._reply(ids, answers, model, positions, invalid)

    def _rows(self, body: PredictBody) -> tuple[Array, list[list[str]] | None]:
        """The rows (n, *shape) of a body, and for records the columns whose value is invalid."""
        if body.x is not None:
            return body.x, None
        if body.records is not None:
            return self._parts.bodies.encode(body.records)
        return self._stored([sample_id for sample_id in body.ids or () if sample_id is not None]), None

    def _stored(self, ids: list[str]) -> Array:
        """The payloads (n, *shape) of stored samples."""
        payloads = [self._parts.ledger.payload(sample_id) for sample_id in ids]
        found = [x for x in payloads if x is not None]
        if len(found) < len(ids):
            missing = [sample_id for sample_id, x in zip(ids, payloads, strict=True) if x is None]
            message = f"{len(missing)} of {len(ids)} samples are not in the store, or no longer."
            raise RequestError(404, "unknown_sample", message, details={"missing": missing})
        return np.stack(found)

    async def _wait_for(self, freshness: Freshness) -> None:
        """Wait until the teacher is fresh enough, at most the timeout."""

        def is_fresh() -> bool:
            return freshness.missing(self._parts.predictor.current(), self._parts.clock()) is None

        await self._waiters.until(is_fresh, self._parts.settings.timeout_s)
        model = self._parts.predictor.current()
        if missing := freshness.missing(model, self._parts.clock()):
            self._parts.metrics.rejected("timeout")
            raise _stale(model, missing)

    def _check(self, freshness: Freshness, model: LoadedModel, probs_BC: Probabilities) -> None:
        """Check the teacher that answered, since a rollback may have come between, and that its answers are finite."""
        if missing := freshness.missing(model, self._parts.clock()):
            raise _stale(model, missing)
        bad = np.flatnonzero(~np.isfinite(probs_BC).all(axis=1))
        if len(bad):
            message = f"The model has no finite answer for instance {bad[0]}; its values are too extreme."
            raise RequestError(422, "not_finite", message, details={"instances": bad.tolist()})

    async def _append(
        self, ids: list[str], users: list[dict[str, Any]] | None, x: Array, answers: list[Prediction]
    ) -> list[Position]:
        """Append the samples, each with its answer: the user's records if there are any, else the rows."""
        if users is None:
            encode = self._parts.codec.encode_sample
            rows = zip(ids, x, answers, strict=True)
            records = [encode(sample_id, row, answer=answer) for sample_id, row, answer in rows]
        else:
            records = await self._parts.bodies.held.decoded(x.nbytes, lambda: self._users_records(ids, users, answers))
        try:
            return await self._parts.appender.append("samples", self._parts.samples_topic, records)
        except StreamlearnError as error:
            failure = from_domain(error)
            failure.details = {"ids": ids}  # including those made here: a retry with them learns nothing twice
            raise failure from error

    def _users_records(self, ids: list[str], users: list[dict[str, Any]], answers: list[Prediction]) -> list[NewRecord]:
        """The records to append. None may have a label: a token that predicts gives no ground truth."""
        records, labelled = [], []
        for sample_id, fields, answer in zip(ids, users, answers, strict=True):
            record, sample = self._parts.codec.encode_record(sample_id, fields, answer=answer)
            records.append(record)
            if sample.label is not None:
                labelled.append(sample_id)
        if labelled:
            message = "learn: expected records without a label; POST /sample takes them. Nothing was learned."
            raise RequestError(422, "label_not_allowed", message, details={"ids": labelled})
        return records

    def _reply(
        self,
        ids: Sequence[str | None] | None,
        answers: list[Prediction],
        model: LoadedModel,
        positions: list[Position] | None,
        invalid: list[list[str]] | None,
    ) -> Response:
        """The answers; their teacher is named in body and headers."""
        classes = model.classes
        predictions: list[dict[str, Any]] = []
        for row, (winner, probs_C, _) in enumerate(answers):
            answer: dict[str, Any] = {} if ids is None else {"id": ids[row]}
            answer |= {"class": classes[winner], "class_index": winner, "probabilities": probs_C[: len(classes)]}
            if positions is not None:
                answer["position"] = positions[row]
            if invalid is not None and invalid[row]:
                answer["invalid"] = invalid[row]
            predictions.append(answer)
        age_s = max(0.0, self._parts.clock() - model.published_at_s)
        reply = {
            "predictions": predictions,
            "model_version": model.step,
            "published_at": iso(model.published_at_s),
            "age_s": round(age_s, 3),
        }
        return JsonReply(reply, headers={"x-model-version": str(model.step), "x-model-age-s": f"{age_s:.3f}"})


def _stale(model: LoadedModel, missing: str) -> RequestError:
    if model.pinned:
        missing += f"; version {model.step} is pinned, so no newer one answers until it is promoted"
    return retry_later(503, "model_not_fresh", f"{missing[0].upper()}{missing[1:]}; none came in time.")


def add_predict_route(router: APIRouter, parts: Parts) -> None:
    """Add the route."""
    flow, bodies = PredictFlow(parts), parts.bodies
    topics = (parts.labels_topic, parts.samples_topic)

    @router.post(
        "/predict",
        summary="Predict samples",
        openapi_extra=predict_body(parts.codec, most=parts.max_items),
        **described("predict", PredictReply, 404, 408, 413, 415, 422, 429, 500, 503, 504),
    )
    async def predict(request: Request, query: Annotated[PredictParameters, Query()]) -> Response:
        """Class and probabilities of each sample, and the one teacher that answered."""
        parts.predictor.current()
        after = after_of(query.after, topics, most=parts.max_items)
        decode = functools.partial(bodies.predict, names=query.id, learn=query.learn)
        async with bodies.read_as(request, decode) as body:
            return await flow.answer(body, Freshness(query.min_version, query.max_age_s, after))
