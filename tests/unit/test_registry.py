"""The client of the schema registry: what is an answer, and what means that it is away."""

from __future__ import annotations

import base64
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_registry import FakeRegistry
from harness.fakes import ManualClock
from pydantic import ValidationError
from structlog.testing import capture_logs

from streamlearn.errors import ConfigError, RecordError, RegistryUnavailableError
from streamlearn.schema.registry import (
    MAX_SCHEMA_BYTES,
    MAX_SCHEMAS,
    Reference,
    RegisteredSchema,
    SchemaRegistry,
    until_available,
)
from streamlearn.schema.settings import RegistryConfig


@pytest.fixture
def fake() -> Iterator[FakeRegistry]:
    with FakeRegistry() as started:
        yield started


def client(fake: FakeRegistry, clock: ManualClock | None = None, **settings: Any) -> SchemaRegistry:
    config = RegistryConfig(**{"url": fake.url, "timeout_s": 2.0, **settings})
    return SchemaRegistry(config) if clock is None else SchemaRegistry(config, clock=clock)


class TestAnswers:
    def test_a_schema_is_asked_for_once(self, fake: FakeRegistry) -> None:
        """An id always means the same schema."""
        fake.add(7, "text", kind="JSON", references=[{"name": "n", "subject": "s", "version": 3}])
        registry = client(fake)

        found = [registry.schema(7) for _ in range(3)]

        assert found == [RegisteredSchema("JSON", "text", (Reference("s", 3),))] * 3
        assert [path for path, _ in fake.requests] == ["/apis/ccompat/v7/schemas/ids/7"]

    def test_without_a_type_it_is_avro(self, fake: FakeRegistry) -> None:
        """The API leaves it out."""
        fake.add(7, "text")

        assert client(fake).schema(7).kind == "AVRO"

    def test_an_unknown_schema_is_the_fault_of_the_record(self, fake: FakeRegistry) -> None:
        """The registry says so, by its own code. It is asked again, since the schema may be registered later."""
        registry = client(fake)

        with pytest.raises(RecordError) as caught:
            registry.schema(7)
        fake.add(7, "text")

        assert caught.value.reason == "unknown_schema"
        assert registry.failures == 0
        assert registry.schema(7).text == "text"

    def test_a_reference_is_asked_for_by_subject_and_version(self, fake: FakeRegistry) -> None:
        """The subject is quoted."""
        fake.subjects["a%2Fb", 2] = {"schema": "text"}

        assert client(fake).reference(Reference("a/b", 2)).text == "text"

    def test_the_cache_is_bounded(self, fake: FakeRegistry) -> None:
        """A producer may send any id."""
        for number in range(MAX_SCHEMAS + 5):
            fake.add(number, "text")
        registry = client(fake)
        for number in range(MAX_SCHEMAS + 5):
            registry.schema(number)

        assert len(registry._cache) == MAX_SCHEMAS


class TestRegister:
    def test_a_schema_is_posted_to_its_subject(self, fake: FakeRegistry) -> None:
        """Its id is in the answer."""
        assert client(fake).register("shop/answers-value", '{"type": "int"}') == 7

        assert fake.registered == [
            ("/subjects/shop%2Fanswers-value/versions", {"schema": '{"type": "int"}', "schemaType": "AVRO"})
        ]

    @pytest.mark.parametrize("status", [409, 422])
    def test_a_refused_schema_is_an_error_with_the_answer(self, fake: FakeRegistry, status: int) -> None:
        """To ask again would not help."""
        fake.broken = (status, b'{"error_code": 409, "message": "incompatible"}')

        with pytest.raises(ConfigError, match=r"refuses the schema of answers.*incompatible"):
            client(fake).register("answers", "{}")

    @pytest.mark.parametrize("broken", [(500, b""), (200, b"{}"), (200, b"x"), (200, b'{"id": "7"}')])
    def test_any_other_answer_means_away(self, fake: FakeRegistry, broken: tuple[int, bytes]) -> None:
        """So the scorer waits."""
        fake.broken = broken
        registry = client(fake)

        with pytest.raises(RegistryUnavailableError):
            registry.register("answers", "{}")
        assert registry.failures == 1


class TestAway:
    @pytest.mark.parametrize(
        "broken",
        [
            (401, b'{"error_code": 40101}'),
            (403, b"{}"),
            (404, b"<html>no such page</html>"),
            (404, b'{"error_code": 40401}'),
            (404, b"[40403]"),
            (500, b'{"error_code": 40403}'),
            (503, b""),
            (200, b"<html>log in</html>"),
            (200, b'{"schema": 3}'),
            (200, b'{"schema": "x", "references": [{"subject": 3}]}'),
            (200, b'"' + b"x" * (MAX_SCHEMA_BYTES + 1) + b'"'),
            (302, b""),
        ],
    )
    def test_any_other_answer_means_away(self, fake: FakeRegistry, broken: tuple[int, bytes]) -> None:
        """A proxy, a wrong password, another service: no record is refused for it."""
        fake.add(7, "text")
        fake.broken = broken
        registry = client(fake)

        with pytest.raises(RegistryUnavailableError, match="schema 7"):
            registry.schema(7)
        assert registry.down_since_s is not None
        fake.broken = None

        assert registry.schema(7).text == "text"
        assert (registry.failures, registry.down_since_s) == (1, None)

    def test_no_connection_means_away(self) -> None:
        """Nobody listens."""
        with socket.socket() as bound:
            bound.bind(("127.0.0.1", 0))
            registry = SchemaRegistry(RegistryConfig(url=f"http://127.0.0.1:{bound.getsockname()[1]}"))

            with pytest.raises(RegistryUnavailableError, match="away"):
                registry.schema(7)

    def test_no_answer_in_time_means_away(self) -> None:
        """A connection that hangs."""
        with socket.create_server(("127.0.0.1", 0)) as silent:
            url = f"http://127.0.0.1:{silent.getsockname()[1]}"
            registry = SchemaRegistry(RegistryConfig(url=url, timeout_s=0.05))

            with pytest.raises(RegistryUnavailableError, match="timed out"):
                registry.schema(7)

    def test_it_warns_at_once_and_then_every_ten_seconds(self, fake: FakeRegistry, clock: ManualClock) -> None:
        """Not at each attempt. The end of an outage is logged too."""
        registry = client(fake, clock)
        fake.add(7, "text")
        fake.broken = (503, b"")
        with capture_logs() as logs:
            for _ in range(25):
                with pytest.raises(RegistryUnavailableError):
                    registry.schema(7)
                clock.advance(1.0)
            fake.broken = None
            registry.schema(7)

        assert [entry["event"] for entry in logs] == ["registry_unavailable"] * 3 + ["registry_available"]
        assert registry.failures == 25


class TestWaiting:
    def test_a_call_is_repeated_until_it_answers(self) -> None:
        """With growing waits."""
        calls = []

        def call() -> str:
            calls.append(1)
            if len(calls) < 3:
                raise RegistryUnavailableError
            return "found"

        assert until_available(call, threading.Event()) == "found"
        assert len(calls) == 3

    def test_it_ends_when_the_process_stops(self) -> None:
        """With the error of the last attempt."""
        stopping = threading.Event()
        stopping.set()

        def call() -> str:
            raise RegistryUnavailableError("away")

        with pytest.raises(RegistryUnavailableError, match="away"):
            until_available(call, stopping)


class TestSettings:
    def test_user_and_password_are_sent(self, fake: FakeRegistry, tmp_path: Path) -> None:
        """The password by its value or from a file."""
        secret = tmp_path / "password"
        secret.write_text("word\n")
        fake.add(7, "text")
        for given in ("word", f"file:{secret}"):
            client(fake, user="ann", password=given).schema(7)

        sent = {headers["Authorization"] for _, headers in fake.requests}

        assert sent == {"Basic " + base64.b64encode(b"ann:word").decode()}

    @pytest.mark.parametrize(
        ("settings", "expected"),
        [
            ({"user": "ann"}, "set both or neither"),
            ({"url": "registry:8081"}, "pattern"),
            ({"url": "http://ann:word@registry:8081"}, "pattern"),
            ({"key_file": "key.pem"}, "set cert_file too"),
            ({"user": "ann", "password": "file:/no/such/file"}, "no such file"),
        ],
    )
    def test_that_do_not_fit_are_errors(self, settings: Any, expected: str) -> None:
        """Before anything is asked."""
        with pytest.raises(ValidationError, match=expected):
            RegistryConfig(**{"url": "http://registry", **settings})

    @pytest.mark.parametrize("settings", [{"ca_file": "/no/such/file"}, {"cert_file": __file__}])
    def test_files_that_cannot_be_read_are_errors_at_once(self, settings: Any) -> None:
        """They name the setting."""
        with pytest.raises(ConfigError, match=r"source\.registry"):
            SchemaRegistry(RegistryConfig(url="https://registry", **settings))
