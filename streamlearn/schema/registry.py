"""A client of a schema registry: schemas by id, from a bounded cache, over Confluent's HTTP API.

Only one answer is about the record: the registry's own error 40403, no such schema. Everything else that is not a
schema (no connection, a timeout, 401, 403, 5xx, another 404, HTML of a proxy) means that the registry is away: the
caller waits, and refuses no record.
"""

from __future__ import annotations

import base64
import http.client
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeVar
from urllib.parse import quote, urlsplit

import orjson
import structlog

from streamlearn.errors import ConfigError, RecordError, RegistryUnavailableError
from streamlearn.schema.settings import RegistryConfig

MAX_SCHEMAS: Final = 1000
"""Cached schemas; the oldest is forgotten first."""
MAX_SCHEMA_BYTES: Final = 4 << 20
WARN_EVERY_S: Final = 10.0
_RETRY_S = (0.1, 5.0)
"""First and longest wait between two attempts."""
_NO_SUCH_SCHEMA = 40403
_REFUSED = (http.HTTPStatus.CONFLICT, http.HTTPStatus.UNPROCESSABLE_ENTITY)
_CONTENT_TYPE = "application/vnd.schemaregistry.v1+json"
_ACCEPT = "application/vnd.schemaregistry.v1+json, application/json"
Result = TypeVar("Result")
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Reference:
    """Another schema that a schema uses."""

    subject: str
    version: int


@dataclass(frozen=True, slots=True)
class RegisteredSchema:
    """A schema as the registry has it."""

    kind: str
    """AVRO, JSON or PROTOBUF."""
    text: str
    references: tuple[Reference, ...] = ()


class SchemaRegistry:
    """Used by any thread. It asks once; `until_available` waits."""

    def __init__(self, config: RegistryConfig, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Connects to nothing yet.

        Raises:
            ConfigError: a certificate cannot be read.
        """
        assert config.url is not None
        url = urlsplit(config.url)
        self.url = config.url
        self.failures = 0
        """Failed requests since the process started."""
        self.down_since_s: float | None = None
        """When the first failed request of the current outage was made, since the epoch; None while it answers."""
        self._host, self._timeout_s, self._clock = url.netloc, config.timeout_s, clock
        self._root = url.path.rstrip("/")
        self._headers = {"Accept": _ACCEPT, **_authorization(config)}
        self._context = _context(config) if url.scheme == "https" else None
        self._cache: dict[str, RegisteredSchema] = {}
        self._lock = threading.Lock()
        self._warned_at_s = float("-inf")

    def schema(self, schema_id: int) -> RegisteredSchema:
        """Return a schema by its id.

        Raises:
            RecordError: `unknown_schema`: the registry answers that there is no such schema.
            RegistryUnavailableError: it did not answer so; ask again.
        """
        return self._get(f"/schemas/ids/{schema_id}", f"schema {schema_id}")

    def reference(self, reference: Reference) -> RegisteredSchema:
        """Return a schema that another one uses. Raises as `schema`."""
        path = f"/subjects/{quote(reference.subject, safe='')}/versions/{reference.version}"
        return self._get(path, f"schema {reference.subject} {reference.version}")

    def register(self, subject: str, text: str) -> int:
        """Add an Avro schema as the next version of a subject, unless it is there; its id.

        Raises:
            ConfigError: the registry refuses it, for example as incompatible with an earlier version.
            RegistryUnavailableError: it did not answer; ask again.
        """

        def id_in(status: int, body: bytes) -> int:
            if status in _REFUSED:
                raise ConfigError(f"the schema registry {self.url} refuses the schema of {subject}: {body[:500]!r}")
            answer = orjson.loads(body) if status == http.HTTPStatus.OK else None
            if not isinstance(answer, dict) or type(answer.get("id")) is not int:
                msg = f"expected the id of a schema as JSON, got status {status} and {body[:200]!r}"
                raise ValueError(msg)
            return int(answer["id"])

        content = orjson.dumps({"schema": text, "schemaType": "AVRO"})
        return self._ask(f"/subjects/{quote(subject, safe='')}/versions", subject, id_in, content)

    def _get(self, path: str, name: str) -> RegisteredSchema:
        found = self._cache.get(path)
        if found is not None:
            return found
        found = self._ask(path, name, lambda status, body: _schema_of(status, body, name))
        with self._lock:
            if len(self._cache) >= MAX_SCHEMAS:
                del self._cache[next(iter(self._cache))]
            self._cache[path] = found
        return found

    def _ask(self, path: str, name: str, read: Callable[[int, bytes], Result], content: bytes | None = None) -> Result:
        """Return what `read` makes of an answer: to a POST of `content`, else to a GET."""
        try:
            found = read(*self._request(path, content))
        except (OSError, http.client.HTTPException, ValueError) as error:
            self._failed(error)
            msg = f"the schema registry {self.url} is away: {name}: {error}"
            raise RegistryUnavailableError(msg) from error
        except (ConfigError, RecordError):
            self._answered()
            raise
        self._answered()
        return found

    def _request(self, path: str, content: bytes | None) -> tuple[int, bytes]:
        """Return status and body. Raises OSError, HTTPException or ValueError."""
        kind = http.client.HTTPConnection if self._context is None else http.client.HTTPSConnection
        options: dict[str, Any] = {} if self._context is None else {"context": self._context}
        connection = kind(self._host, timeout=self._timeout_s, **options)
        deadline_s = self._clock() + self._timeout_s
        try:
            headers = self._headers if content is None else {**self._headers, "Content-Type": _CONTENT_TYPE}
            connection.request("GET" if content is None else "POST", self._root + path, content, headers)
            response = connection.getresponse()
            chunks: list[bytes] = []
            size = 0
            while chunk := response.read1(1 << 16):
                chunks.append(chunk)
                size += len(chunk)
                if size > MAX_SCHEMA_BYTES:
                    msg = f"expected a schema of at most {MAX_SCHEMA_BYTES} bytes"
                    raise ValueError(msg)
                if self._clock() > deadline_s:
                    msg = f"no whole answer within {self._timeout_s:g} s"
                    raise TimeoutError(msg)
            return response.status, b"".join(chunks)
        finally:
            connection.close()

    def _failed(self, error: Exception) -> None:
        with self._lock:
            self.failures += 1
            if self.down_since_s is None:
                self.down_since_s = time.time()
            now_s = self._clock()
            if now_s - self._warned_at_s < WARN_EVERY_S:
                return
            self._warned_at_s = now_s
            down_s = round(time.time() - self.down_since_s, 1)
        _log.warning("registry_unavailable", url=self.url, error=str(error)[:300], down_s=down_s)

    def _answered(self) -> None:
        with self._lock:
            since_s, self.down_since_s = self.down_since_s, None
            self._warned_at_s = float("-inf")
        if since_s is not None:
            _log.info("registry_available", url=self.url, after_s=round(time.time() - since_s, 1))


def until_available(call: Callable[[], Result], stopping: threading.Event) -> Result:
    """Repeat a call while the registry is away, until `stopping` is set.

    Raises:
        RegistryUnavailableError: `stopping` is set, and the registry is still away.
    """
    wait_s = _RETRY_S[0]
    while True:
        try:
            return call()
        except RegistryUnavailableError:
            if stopping.wait(wait_s):
                raise
        wait_s = min(2 * wait_s, _RETRY_S[1])


def _schema_of(status: int, body: bytes, name: str) -> RegisteredSchema:
    """Read an answer.

    Raises:
        RecordError: `unknown_schema`.
        ValueError: it is no answer about a schema.
    """
    try:
        answer = orjson.loads(body)
    except orjson.JSONDecodeError:
        answer = None
    if status == http.HTTPStatus.NOT_FOUND and isinstance(answer, dict) and answer.get("error_code") == _NO_SUCH_SCHEMA:
        raise RecordError("unknown_schema", f"{name}: the registry has no such schema")
    if status != http.HTTPStatus.OK or not isinstance(answer, dict) or not isinstance(answer.get("schema"), str):
        msg = f"expected a schema as JSON, got status {status} and {body[:200]!r}"
        raise ValueError(msg)
    kind, given = answer.get("schemaType"), answer.get("references")
    references = given if isinstance(given, list) else []
    return RegisteredSchema(
        kind=kind.upper() if isinstance(kind, str) else "AVRO",
        text=answer["schema"],
        references=tuple(_reference(each) for each in references),
    )


def _reference(given: object) -> Reference:
    match given:
        case {"subject": str(subject), "version": int(version)}:
            return Reference(subject, version)
    msg = f"expected a reference with a subject and a version, got {given!r:.200}"
    raise ValueError(msg)


def _authorization(config: RegistryConfig) -> Mapping[str, str]:
    if config.user is None or config.password is None:
        return {}
    given = base64.b64encode(f"{config.user}:{config.password.get_secret_value()}".encode()).decode()
    return {"Authorization": f"Basic {given}"}


def _context(config: RegistryConfig) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=config.ca_file)
        if config.cert_file is not None:
            context.load_cert_chain(config.cert_file, config.key_file)
    except OSError as error:  # ssl.SSLError too
        msg = f"source.registry: ca_file, cert_file or key_file cannot be used: {error}"
        raise ConfigError(msg) from error
    return context
