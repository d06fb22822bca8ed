"""The API against its own document: schemathesis generates requests from /openapi.json and checks every reply.

Positive data obeys the schema and must be taken; negative data breaks it and must be refused. Besides: no 500, only
documented statuses, content types and shapes, no route without its token, and no method that is not there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, assume, given, seed, settings
from served import RECORD, ROUTES, Served, X, record_codec, store
from sockets import serving
from support import ask

schemathesis = pytest.importorskip("schemathesis", reason="one of the test dependencies")
from schemathesis import GenerationMode  # noqa: E402

TOKENS = {"predict_token": "ask", "label_token": "tell", "admin_token": "rule"}
ADMIN = {"Authorization": "Bearer rule"}
EXAMPLES = 15
TIMES = ("time", "created_at", "judged_at")
NO_FLOATS = ("id", "label", "transaction_id", "is_fraud", "verdict")
"""Where 1.0 is no integer."""
RECORDS = ("/predict", "/sample")
"""Routes that take any value in a column: one that does not fit counts as missing."""


@dataclass(frozen=True)
class Api:
    """The server's OpenAPI document, and its URL."""

    schema: Any
    url: str
    has_records: bool

    def check(self, method: str, path: str, mode: Any) -> None:
        """Generate requests for one route, and check each reply."""

        @seed(20261124)
        @settings(
            max_examples=EXAMPLES,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(self.schema[path][method].as_strategy(generation_mode=mode))
        def run(case: Any) -> None:
            assume(mode is GenerationMode.NEGATIVE or is_sensible(case))
            takes_any = self.has_records and case.path in RECORDS and mode is GenerationMode.NEGATIVE
            excluded = [schemathesis.checks.negative_data_rejection] if takes_any else []
            case.call_and_validate(self.url, headers=ADMIN, excluded_checks=excluded)

        run()


def is_sensible(case: Any) -> bool:
    """Whether a body also obeys rules that JSON Schema cannot express; otherwise it may be refused."""
    body = case.body
    query = case.query or {}
    if {"after", "id", "min_version", "max_age_s"} & query.keys():
        return False  # a topic of this server; ids of a binary body; what does not come in time is a 503
    if "learn" in query and isinstance(body, dict) and (body.keys() == {"ids"} or "verdict" in str(body)):
        return False  # stored samples were learned when they came; a label is not for /predict
    if not isinstance(body, dict):
        return case.media_type is None  # a tensor has its size
    if "version" in body:
        return isinstance(body["version"], int)  # to JSON Schema 1.0 is an integer as well
    instances = body.get("instances") or body.get("samples")
    items = [body, *body.get("labels", ()), *(item for item in instances or () if isinstance(item, dict))]
    ids = body.get("ids")
    inside = [str(item["transaction_id"]) for item in items if item.get("transaction_id") is not None]
    if len(inside) > len(set(inside)) or (inside and ids is not None):
        return False  # ids may not be repeated, and must be the ones inside
    return (
        (ids is None or instances is None or len(ids) == len(set(map(str, ids))) == len(instances))
        and not any(isinstance(item.get(name), str) for item in items for name in TIMES)  # may be before 1970
        and not any(isinstance(item.get(name), float) for item in items for name in NO_FLOATS)
        and not any(isinstance(name, float) for name in ids or ())
        and all(len(text.encode()) <= 256 for item in items for text in item.values() if isinstance(text, str))
    )


@pytest.fixture(scope="module", params=["tensors", "records"])
def api(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """Of a schema without columns, and of one with the user's own records."""
    codec = record_codec() if request.param == "records" else None
    served = Served(tmp_path_factory.mktemp("served"), codec=codec, timeout_s=0.1, max_items=3, **TOKENS)
    served.publish(7)
    x = X if codec is None else codec.rows.encode(RECORD)
    store(served, "invoice-7", x, label=1)  # the id of the examples
    with serving(served.app) as port:
        url = f"http://127.0.0.1:{port}"
        document = schemathesis.openapi.from_dict(ask(f"{url}/openapi.json", headers=ADMIN)[1])
        yield Api(document, url, has_records=codec is not None)


def test_every_route_is_tried(api: Api) -> None:
    """A new route must be added to `served.ROUTES`, with its role."""
    reported = {
        (method.upper(), path) for path, methods in api.schema.raw_schema["paths"].items() for method in methods
    }

    assert reported == {(method, path) for method, path, _ in ROUTES}


@pytest.mark.parametrize(("method", "path"), [route[:2] for route in ROUTES])
def test_valid_requests_are_answered_as_documented(api: Api, method: str, path: str) -> None:
    """All checks of schemathesis, with the admin token; each also tries no token and a wrong one."""
    api.check(method, path, GenerationMode.POSITIVE)


@pytest.mark.parametrize(("method", "path"), [route[:2] for route in ROUTES if route[1] != "/health/live"])
def test_invalid_requests_are_refused_as_documented(api: Api, method: str, path: str) -> None:
    """/health/live has no invalid requests."""
    api.check(method, path, GenerationMode.NEGATIVE)
