"""A real schema registry that restarts while a learner reads Avro: it stalls, and then goes on; nothing is refused."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fastavro
import pytest
from harness.fakes import MemoryLog
from harness.registry import Registry, framed
from structlog.testing import capture_logs

from streamlearn.app import learner as learning
from streamlearn.config import Config, load_config
from streamlearn.errors import ConfigError, LogUnavailableError, RecordError, RegistryUnavailableError
from streamlearn.records import NewRecord
from streamlearn.schema.registry import SchemaRegistry
from streamlearn.schema.settings import RegistryConfig
from streamlearn.state.checkpoint import load_newest
from streamlearn.state.paths import StatePaths
from streamlearn.state.status import read_status

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
FIELDS: list[dict[str, Any]] = [
    {"name": "id", "type": "string"},
    {"name": "amount", "type": "double"},
    {"name": "merchant", "type": "string"},
]
COUNTRY = {"name": "country", "type": ["null", "string"], "default": None}


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    started = Registry(tmp_path_factory.mktemp("registry"))
    try:
        started.start()
    except (ConfigError, LogUnavailableError) as error:
        pytest.skip(f"no schema registry: {error}")
    yield started
    started.stop()


def schema_of(name: str, fields: list[dict[str, Any]]) -> dict[str, Any]:
    return {"type": "record", "name": name, "fields": fields}


def encoded(schema_id: int, schema: dict[str, Any], value: dict[str, Any]) -> bytes:
    stream = io.BytesIO()
    fastavro.schemaless_writer(stream, fastavro.parse_schema(schema), value)
    return framed(schema_id, stream.getvalue())


def config_in(folder: Path, registry: Registry) -> Config:
    settings = {
        "state.dir": str(folder),
        "source.samples": {"format": "avro", "id": "id"},
        "source.registry": {"url": registry.url, "timeout_s": 1.0},
        "columns": {
            "amount": "number",
            "merchant": {"kind": "category", "buckets": 64},
            "country": {"kind": "category", "buckets": 64},
        },
        "schema.classes": ["fraud", "legitimate"],
        "model.options": {"hidden": [8]},
        "batch.fresh": 8,
        "batch.max_age_s": 0.2,
        "learn.threads": 1,
        "metrics.port": 0,
    }
    return load_config(environ={}, overrides=settings)


def until(done: Any, what: str, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not done():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def test_the_client_reads_what_the_registry_has(registry: Registry) -> None:
    """Avro, JSON Schema and Protobuf; a schema with a reference; and its own answer for an unknown id."""
    client = SchemaRegistry(RegistryConfig(url=registry.url))
    place = schema_of("shop.Place", [{"name": "country", "type": "string"}])
    registry.register("place", place)
    trip = schema_of("Trip", [{"name": "start", "type": "shop.Place"}])
    references = [{"name": "shop.Place", "subject": "place", "version": 1}]
    trip_id = registry.register("trip-value", trip, references=references)
    of_json = {"$schema": "http://json-schema.org/draft-07/schema#", "type": "object", "properties": {}}
    json_id = registry.register("json-value", of_json, kind="JSON")
    proto_id = registry.register("proto-value", 'syntax = "proto3"; message M { string a = 1; }', kind="PROTOBUF")

    kinds = [client.schema(number).kind for number in (trip_id, json_id, proto_id)]
    (reference,) = client.schema(trip_id).references

    assert kinds == ["AVRO", "JSON", "PROTOBUF"]
    assert (reference.subject, reference.version) == ("place", 1)
    assert '"country"' in client.reference(reference).text
    with pytest.raises(RecordError) as caught:
        client.schema(999_999)
    assert caught.value.reason == "unknown_schema"


def test_a_wrong_path_or_a_dead_process_means_away(registry: Registry, tmp_path: Path) -> None:
    """Its 404 for a path that it does not serve is no answer about a schema."""
    wrong = SchemaRegistry(RegistryConfig(url=registry.url.replace("ccompat", "nothing")))
    stopped = Registry(tmp_path)

    with pytest.raises(RegistryUnavailableError, match="404"):
        wrong.schema(1)
    with pytest.raises(RegistryUnavailableError, match="refused"):
        SchemaRegistry(RegistryConfig(url=stopped.url)).schema(1)


def test_a_learner_stalls_while_the_registry_restarts(registry: Registry, tmp_path: Path) -> None:
    """A new schema appears while the registry is away: records of known schemas are learned, then reading waits.

    Once the registry is back, everything is learned and nothing is a dead letter.
    """
    config, log, stopping = config_in(tmp_path, registry), MemoryLog(), threading.Event()
    log.create_topics({"samples": 1, "labels": 1, "dead-letters": 1})
    old, new = schema_of("Old", FIELDS), schema_of("New", [*FIELDS, COUNTRY])
    old_id, new_id = registry.register("old-value", old), registry.register("new-value", new)
    learner = threading.Thread(target=learning.learn, args=(config, stopping), kwargs={"opened": log.reopen()})

    def status() -> dict[str, Any]:
        return read_status(StatePaths(tmp_path).heartbeat) or {}

    def learned() -> int:
        return int(status().get("accounts", {}).get("samples_learned", 0))

    def send(schema_id: int, schema: dict[str, Any], numbers: range) -> None:
        for n in numbers:
            value = {"id": f"s{n}", "amount": n / 2, "merchant": f"m{n % 5}", "country": "DE"}
            log.append("samples", [NewRecord(b"customer-%d" % (n % 3), encoded(schema_id, schema, value))])

    with capture_logs() as logs:
        learner.start()
        try:
            send(old_id, old, range(32))
            until(lambda: learned() == 32, "the first schema")
            registry.kill()
            send(old_id, old, range(32, 48))
            until(lambda: learned() == 48, "a cached schema needs no registry")
            send(new_id, new, range(48, 64))
            send(old_id, old, range(64, 72))
            until(lambda: (status().get("registry") or {}).get("failures", 0) > 2, "the stall is reported")
            assert learned() == 48
            assert status()["registry"]["down_since_s"] > 0
            registry.start()
            until(lambda: learned() == 72, "everything after the restart")
        finally:
            stopping.set()
            learner.join(60.0)

    checkpoint = load_newest(StatePaths(tmp_path).checkpoints)
    assert checkpoint is not None
    accounts = checkpoint.extra["accounts"]
    assert (accounts["samples_learned"], accounts["samples_dead_lettered"]) == (72, 0)
    assert log.records("dead-letters") == []
    events = [entry["event"] for entry in logs]
    assert "registry_unavailable" in events
    assert "registry_available" in events
