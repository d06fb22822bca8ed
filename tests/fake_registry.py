"""A schema registry in this process, whose answers a test chooses. The real one is in harness/registry.py."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self


class FakeRegistry:
    """Serves `schemas` by id. While `broken` is set, every request gets that status and body."""

    def __init__(self) -> None:
        self.schemas: dict[int, dict[str, Any]] = {}
        self.subjects: dict[tuple[str, int], dict[str, Any]] = {}
        self.broken: tuple[int, bytes] | None = None
        self.requests: list[tuple[str, dict[str, str]]] = []
        """Path and headers of each GET."""
        self.registered: list[tuple[str, dict[str, Any]]] = []
        """Path and body of each POST. All get the id 7."""
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                fake.requests.append((self.path, dict(self.headers)))
                status, body = fake.broken or fake.answer(self.path)
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                fake.registered.append((self.path.removeprefix("/apis/ccompat/v7"), json.loads(body)))
                status, answer = fake.broken or (200, b'{"id": 7}')
                self.send_response(status)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *_: object) -> None:
                """Print nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        """For `source.registry.url`."""
        return f"http://127.0.0.1:{self._server.server_address[1]}/apis/ccompat/v7"

    def add(self, schema_id: int, schema: Any, *, kind: str | None = None, references: Any = ()) -> None:
        """Serve a schema, given as an object or as text."""
        text = schema if isinstance(schema, str) else json.dumps(schema)
        self.schemas[schema_id] = {"schema": text, "references": list(references)}
        if kind is not None:  # the registry leaves out AVRO
            self.schemas[schema_id]["schemaType"] = kind

    def answer(self, path: str) -> tuple[int, bytes]:
        """Status and body of a request."""
        parts = path.removeprefix("/apis/ccompat/v7/").split("/")
        found = None
        if parts[:2] == ["schemas", "ids"]:
            found = self.schemas.get(int(parts[2]))
        elif parts[0] == "subjects":
            found = self.subjects.get((parts[1], int(parts[3])))
        if found is None:
            return 404, b'{"error_code": 40403, "message": "Schema not found"}'
        return 200, json.dumps(found).encode()
