"""POST /predict. Pure: it changes nothing; with `learn` it also appends the sample to the log, as /sample would."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import orjson
from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from streamlearn.errors import StreamlearnError
from streamlearn.records import Array, Position, Prediction, Probabilities
from streamlearn.serve.appender import Appender
from streamlearn.serve.batcher import Batcher
from streamlearn.serve.bodies import Bodies, new_id
from streamlearn.serve.failures import RequestError, from_domain, retry_later
from streamlearn.serve.parts import ServerParts, ServeSettings
from streamlearn.serve.predictor import LoadedModel
from streamlearn.serve.replies import JsonReply, iso
from streamlearn.serve.schemas import PredictReply, predict_body, responses
from streamlearn.serve.waiting import Waiters

_POSITION = re.compile(r"([A-Za-z0-9._-]{1,249}):([0-9]{1,9}):([0-9]{1,18})")


@dataclass(frozen=True, slots=True)
class Freshness:
    """What a client asks of the teacher; None asks nothing."""

    min_version: int | None
    max_age_s: float | None
    after: Mapping[str, int]
    """By "topic:partition": the offset of a label that it must have learned."""

    def missing(self, model: LoadedModel, now_s: float) -> str | None:
        """What the teacher lacks, as a sentence; None where it will do."""
        missing = self._missing(model, now_s)
        if missing is not None and model.pinned:
            return f"{missing}; version {model.step} is pinned, so no newer one answers until it is promoted"
        return missing

    def _missing(self, model: LoadedModel, now_s: float) -> str | None:
        age_s = now_s - model.published_at_s
        if self.min_version is not None and model.step < self.min_version:
            return f"model_version is {model.step}, asked for was {self.min_version}"
        if self.max_age_s is not None and age_s > self.max_age_s:
            return f"the model is {age_s:.3f} s old, asked for was at most {self.max_age_s:g} s"
        if self.after and model.learned_offsets is None:
            return f"version {model.step} does not say which labels it has learned; an older streamlearn published it"
        for partition, offset in self.after.items():
            next_offset = (model.learned_offsets or {}).get(partition, 0)
            if next_offset <= offset:
                return f"version {model.step} has learned {partition} before {next_offset}, asked for was {offset}"
        return None


def after_of(values: Sequence[str], topics: Sequence[str], *, most: int) -> dict[str, int]:
    """The largest offset by "topic:partition", of positions written topic:partition:offset or as the replies have them.

    Raises:
        RequestError: 422, a value is no position in one of `topics`, or there are more than `most`.
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
    """A position object of a reply as topic:partition:offset; anything else as it is."""
    if not value.startswith("{"):
        return value
    try:
        told = orjson.loads(value)
    except orjson.JSONDecodeError:
        return value
    return f"{told.get('topic')}:{told.get('partition')}:{told.get('offset')}"


def _bad_after(message: str) -> RequestError:
    return RequestError(422, "invalid_parameter", f"after: {message}.")


def add_predict_route(
    router: APIRouter,
    parts: ServerParts,
    settings: ServeSettings,
    *,
    bodies: Bodies,
    batcher: Batcher[LoadedModel],
    inlet: Appender,
) -> None:
    """Add the route, with its own bound on how many requests may wait for a fresher teacher."""
    topics = (settings.labels_topic, settings.samples_topic)
    flow = _Flow(parts, settings, batcher, inlet)

    @router.post(
        "/predict",
        summary="Predict samples",
        response_model=PredictReply,
        responses=responses(404, 408, 413, 415, 422, 429, 500, 503, 504),
        openapi_extra=predict_body(parts.schema, most=settings.max_instances),
        tags=["predict"],
    )
    async def predict(
        request: Request,
        *,
        learn: Annotated[bool, Query(description="Also append the samples to the log, with the answers.")] = False,
        name: Annotated[
            list[str] | None, Query(alias="id", description="Of a binary body's samples, one for each.")
        ] = None,
        min_version: Annotated[
            int | None, Query(ge=0, description="Wait for this version or a later one; 503 where none comes in time.")
        ] = None,
        max_age_s: Annotated[
            float | None, Query(ge=0, allow_inf_nan=False, description="Wait for a model no older than this.")
        ] = None,
        after: Annotated[
            list[str] | None,
            Query(
                description="Wait for a model that has learned all labels up to this position, as POST /label returned "
                "it: topic:partition:offset, or the object as JSON. Repeatable. 503 where none comes in time.",
                examples=[["labels:0:1042"]],
            ),
        ] = None,
    ) -> Response:
        """Class, probabilities, and the one teacher that gave them all."""
        parts.predictor.current()
        learned = after_of(after or [], topics, most=settings.max_instances)
        async with bodies.read(request) as body:
            content_type = request.headers.get("content-type", "")
            asked = await bodies.decoded(len(body), lambda: bodies.predict(body, content_type, name or [], learn=learn))
            freshness = Freshness(min_version, max_age_s, learned)
            await flow.wait_for(freshness)
            # After the wait: a few bytes of ids may stand for megabytes, which nothing that waits should hold.
            stored = asked.ids or [] if asked.x is None else []
            stored_bytes = len(stored) * parts.codec.schema.nbytes
            with bodies.room(stored_bytes):
                x = await bodies.decoded(stored_bytes, lambda: flow.stored(stored)) if asked.x is None else asked.x
                probs_BC, model = await batcher.predict(x, settings.timeout_s)
            flow.check(freshness, model, probs_BC)
            if not asked.learn:
                return flow.reply(asked.ids, probs_BC, model)
            ids = asked.ids or [new_id() for _ in x]
            return flow.reply(ids, probs_BC, model, await flow.learn(ids, x, probs_BC, model))


class _Flow:
    """The steps of one prediction, from ids to the reply."""

    def __init__(
        self, parts: ServerParts, settings: ServeSettings, batcher: Batcher[LoadedModel], inlet: Appender
    ) -> None:
        self._parts, self._settings, self._batcher, self._inlet = parts, settings, batcher, inlet
        self._waiters = Waiters(parts.metrics, "a fresher model", most=settings.queue)

    def stored(self, ids: list[str]) -> Array:
        """The payloads (n, *shape) of stored samples."""
        found = [self._parts.ledger.payload(sample_id) for sample_id in ids]
        there = [x for x in found if x is not None]
        if len(there) < len(ids):
            missing = [sample_id for sample_id, x in zip(ids, found, strict=True) if x is None]
            message = f"{len(missing)} of {len(ids)} samples are not in the store, or not any more."
            raise RequestError(404, "unknown_sample", message, details={"missing": missing})
        return np.stack(there)

    async def wait_for(self, freshness: Freshness) -> None:
        """Wait, within the timeout, until the teacher is as fresh as asked for."""
        predictor, clock = self._parts.predictor, self._parts.clock

        def is_fresh() -> bool:
            return freshness.missing(predictor.current(), clock()) is None

        await self._waiters.until(is_fresh, self._settings.timeout_s)
        if missing := freshness.missing(predictor.current(), clock()):
            self._parts.metrics.rejected("timeout")
            raise _stale(missing)

    def check(self, freshness: Freshness, model: LoadedModel, probs_BC: Probabilities) -> None:
        """Hold the answer to what was asked: a rollback may have come between."""
        if missing := freshness.missing(model, self._parts.clock()):
            raise _stale(missing)
        bad = np.flatnonzero(~np.isfinite(probs_BC).all(axis=1))
        if len(bad):
            message = f"The model has no finite answer for instance {bad[0]}; its values are too extreme."
            raise RequestError(422, "not_finite", message, details={"instances": bad.tolist()})

    async def learn(self, ids: list[str], x: Array, probs_BC: Probabilities, model: LoadedModel) -> list[Position]:
        """Append the samples, each with the answer that is about to be given."""
        records = [
            self._parts.codec.encode_sample(
                sample_id, row, answer=Prediction(int(probs_C.argmax()), probs_C, model.step)
            )
            for sample_id, row, probs_C in zip(ids, x, probs_BC, strict=True)
        ]
        try:
            return await self._inlet.append("samples", self._settings.samples_topic, records)
        except StreamlearnError as error:
            told = from_domain(error)
            told.details = {"ids": ids}  # also those made here: sent again with them, nothing is learned twice
            raise told from error

    def reply(
        self,
        ids: list[str] | None,
        probs_BC: Probabilities,
        model: LoadedModel,
        positions: list[Position] | None = None,
    ) -> Response:
        """The answers, and their teacher in body and headers."""
        classes = model.classes
        predictions: list[dict[str, Any]] = []
        for row, (probs_C, winner) in enumerate(zip(probs_BC, probs_BC.argmax(axis=1).tolist(), strict=True)):
            answer: dict[str, Any] = {} if ids is None else {"id": ids[row]}
            answer |= {"class": classes[winner], "class_index": winner, "probabilities": probs_C[: len(classes)]}
            if positions is not None:
                answer["position"] = positions[row]._asdict()
            predictions.append(answer)
        age_s = max(0.0, self._parts.clock() - model.published_at_s)
        told = {
            "predictions": predictions,
            "model_version": model.step,
            "published_at": iso(model.published_at_s),
            "age_s": round(age_s, 3),
        }
        return JsonReply(told, headers={"x-model-version": str(model.step), "x-model-age-s": f"{age_s:.3f}"})


def _stale(missing: str) -> RequestError:
    return retry_later(503, "model_not_fresh", f"{missing[0].upper()}{missing[1:]}; none came in time.")
