"""Many hostile requests, in process and over a socket: each is answered as documented, and all are counted."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from pathlib import Path

import pytest
from fuzzing import Reply, Request, ask, request
from served import FLOATS, IMAGES, Served, X, record_codec, store

from streamlearn.records import Schema
from streamlearn.serve import schemas

SEED, COUNT = 20261124, 1500
TOKENS = {"predict_token": "ask", "label_token": "tell", "admin_token": "rule"}
MOST_S = 5.0
"""For one request, waits included: the server's timeout is 0.05 s."""


class Attacked:
    """A server with all that its routes need, and its answers."""

    def __init__(self, folder: Path, schema: Schema | None) -> None:
        """Without a schema: of the user's own records."""
        codec = record_codec() if schema is None else None
        self.served = Served(folder, schema, codec=codec, timeout_s=0.05, **TOKENS)
        self.served.publish(7)
        if schema is FLOATS:
            store(self.served, "sample-1", X, label=1)
        self.documented = self._documented()
        self.answers: Counter[tuple[str, int]] = Counter()
        self.appended = 0

    def _documented(self) -> dict[tuple[str, str], set[int]]:
        paths = self.served.app.openapi()["paths"]
        return {
            (method.upper(), path): {int(status) for status in operation["responses"]}
            for path, operations in paths.items()
            for method, operation in operations.items()
        }

    def statuses(self, sent: Request) -> set[int]:
        """The documented statuses of a route; for other paths, those of an unknown path or a missing token."""
        path = sent.path
        for prefix in ("/label/", "/sample/"):
            if path.startswith(prefix) and path not in ("/label/requests", "/label/wanted"):
                path = prefix + "{sample_id}"
        found = self.documented.get((sent.method, path))
        return found if found is not None else {200, 401, 403, 404, 405}

    def check(self, sent: Request, reply: Reply) -> None:
        """Check one answer."""
        assert reply.status in self.statuses(sent), reply
        assert reply.status != 500, reply
        assert reply.headers.get("x-request-id")
        if reply.status >= 400 and not sent.path.startswith("/health/ready"):
            assert reply.headers["content-type"] == "application/json"
            if sent.method != "HEAD":
                reported = schemas.Error.model_validate_json(reply.body).error
                assert reported.request_id == reply.headers["x-request-id"]
        self.answers[sent.method, reply.status] += 1
        if reply.status == 202 and sent.method == "DELETE":
            schemas.ErasedReply.model_validate_json(reply.body)
            self.appended += 1
        elif reply.status == 202:
            items = schemas.AppendReply.model_validate_json(reply.body).items
            self.appended += sum(item.position is not None for item in items)
        if reply.status == 200 and sent.path == "/predict":
            reported = schemas.PredictReply.model_validate_json(reply.body)
            self.appended += sum(one.position is not None for one in reported.predictions)

    async def attack(self, seed: int, count: int) -> None:
        """Send `count` requests, one after the other."""
        async with self.served.app.router.lifespan_context(self.served.app):
            for number in range(count):
                sent = request(seed, number, self.served.codec)
                started = time.monotonic()
                try:
                    self.check(sent, await asyncio.wait_for(ask(self.served.app, sent), MOST_S))
                except BaseException as error:
                    error.add_note(f"request({seed}, {number}): {sent.method} {sent.path!r} {sent.query[:200]!r}")
                    raise
                assert time.monotonic() - started < MOST_S


@pytest.fixture(scope="module", params=[FLOATS, IMAGES, None], ids=["floats", "images", "records"])
def attacked(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Attacked:
    """After all requests."""
    found = Attacked(tmp_path_factory.mktemp("attacked"), request.param)
    asyncio.run(found.attack(SEED, COUNT))
    return found


def test_every_request_is_answered_as_documented(attacked: Attacked) -> None:
    """In the one error shape, with its id, never 500, in bounded time."""
    assert sum(attacked.answers.values()) == COUNT


def test_the_fuzzer_gets_both_successes_and_errors(attacked: Attacked) -> None:
    """Otherwise it would prove little."""
    statuses = {status for _, status in attacked.answers}

    assert {200, 202, 401, 403, 404, 405, 413, 415, 422, 503} <= statuses


def test_the_log_has_exactly_the_acknowledged_records(attacked: Attacked) -> None:
    """One record for each position of a reply."""
    records = [record for topic in ("clicks", "truths") for record in attacked.served.records(topic)]

    assert len(records) == attacked.appended > 0


def test_acknowledged_records_can_be_decoded(attacked: Attacked) -> None:
    """No record accepted over HTTP becomes a dead letter."""
    for record in attacked.served.records("clicks"):
        attacked.served.codec.decode_sample(record)
    for record in attacked.served.records("truths"):
        attacked.served.codec.labels.decode(record)


def test_every_request_is_counted(attacked: Attacked) -> None:
    """By method and status; no route label comes from a client."""
    reported: Counter[str] = Counter()
    for line in attacked.served.metrics.text().splitlines():
        if line.startswith("streamlearn_http_request_duration_seconds_count"):
            labels, count = line.split("} ")
            reported[labels.partition('status="')[2].partition('"')[0]] += int(float(count))
            assert labels.count('"') == 6, line

    sent: Counter[str] = Counter()
    for (_, status), count in attacked.answers.items():
        sent[str(status)] += count
    assert reported == sent
