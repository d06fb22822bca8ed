"""Three real Kafka brokers are frozen, killed, cut off and trimmed under a real learner, server and clients.

In each test clients post samples and labels, one at a time, during a fault of the brokers. After any fault:

    each answer was 202 or 503, within `serve.timeout_s`
    an acknowledged label is in the log exactly once, at the position of the answer; a label answered with 503 and sent
    again is in the log at most as often as it was sent, and is learned once
    the learner is still the same process, and its lag returns to 0

As root the brokers run in a network namespace of their own, so that their network can be cut. STREAMLEARN_LONG_FAULTS=1
(`make soak`) makes the faults realistically long; figures are printed to stdout (pytest -s).
"""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from harness.damage import last_step
from harness.fork_server import ForkServer
from harness.site import write_config
from harness.verify import read_log, verify
from kafka import KafkaAdminClient
from kafka import TopicPartition as KafkaPartition
from support import forks, until

from streamlearn.app.log import make_topics, open_log
from streamlearn.config import load_config
from streamlearn.errors import ConfigError, LogUnavailableError
from streamlearn.lab.broker import LOOPBACK, Cluster, free_port, java_command
from streamlearn.log import kafka_clients
from streamlearn.log.kafka import KafkaLog
from streamlearn.log.settings import KafkaConfig
from streamlearn.records import NewRecord, TopicPartition
from streamlearn.state.checkpoint import load_newest
from streamlearn.state.paths import StatePaths
from streamlearn.state.status import read_status

LONG = os.environ.get("STREAMLEARN_LONG_FAULTS") == "1"
PAUSE_S, CUT_S = (60.0, 20.0) if LONG else (3.0, 3.0)
TIMEOUT_S = 10.0 if LONG else 1.0
"""serve.timeout_s; its default is 10 s."""
SLACK_S = 1.5
"""Allowance for an overloaded machine."""
RESUME_S = 120.0
CLIENTS = 4
MOST_TRIES = 3
TRIMMED_TAIL = 5
LONGEST_S = 900.0 if LONG else 400.0

pytestmark = [
    pytest.mark.kafka,
    pytest.mark.slow,
    pytest.mark.timeout(LONGEST_S),
]


class Answer(NamedTuple):
    """The answer to one request of a client."""

    role: str
    sample_id: str
    class_index: int
    status: int
    at_s: float
    took_s: float
    position: tuple[str, int, int] | None


# -- brokers and network


class Cable:
    """A pair of virtual network interfaces; the far one is in a network namespace of its own."""

    def __init__(self) -> None:
        pid = os.getpid()
        self.namespace, self._near, self._far = f"sl{pid}", f"sln{pid}", f"slf{pid}"
        self.near_host, self.far_host = (f"198.18.{pid % 256}.{n}" for n in (1, 2))  # addresses of RFC 2544, for tests

    def __enter__(self) -> Cable:
        _ip("netns", "add", self.namespace)
        try:
            _ip("link", "add", self._near, "type", "veth", "peer", "name", self._far, "netns", self.namespace)
            _ip("addr", "add", f"{self.near_host}/30", "dev", self._near)
            _ip("link", "set", self._near, "up")
            _ip("-n", self.namespace, "addr", "add", f"{self.far_host}/30", "dev", self._far)
            _ip("-n", self.namespace, "link", "set", "lo", "up")
            self.plug()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        _ip("netns", "del", self.namespace)

    def pull(self) -> None:
        """Drop all packets silently, in both directions."""
        _ip("-n", self.namespace, "link", "set", self._far, "down")

    def plug(self) -> None:
        _ip("-n", self.namespace, "link", "set", self._far, "up")


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, timeout=20.0, check=False)
    if done.returncode != 0:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


@pytest.fixture(scope="module")
def cable() -> Iterator[Cable | str]:
    """A cable, or the reason why there is none."""
    try:
        with Cable() as cable:
            yield cable
    except OSError as error:
        yield f"{error} (needs root, iproute2 and network namespaces)"


@pytest.fixture(scope="module")
def all_brokers(cable: Cable | str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three brokers, started while the fork server imports its modules."""
    assert forks()
    try:
        java_command()
    except (ConfigError, LogUnavailableError) as error:
        pytest.skip(f"NO KAFKA, its faults are not tested: {error}")
    place: dict[str, Any] = {}
    if isinstance(cable, Cable):
        place = {"host": cable.far_host, "launch": ["ip", "netns", "exec", cable.namespace]}
    with Cluster(tmp_path_factory.mktemp("cluster"), **place) as cluster:
        yield cluster


@pytest.fixture
def cluster(all_brokers: Cluster) -> Cluster:
    """All brokers running, whatever the previous test did to them."""
    for broker in all_brokers.brokers.values():
        if broker.running:
            broker.resume()
    all_brokers.start()
    with KafkaAdminClient(bootstrap_servers=all_brokers.bootstrap_servers) as admin:
        until(lambda: len(admin.describe_cluster()["brokers"]) == 3, "three connected brokers", RESUME_S)
    return all_brokers


# -- clients


class Client(threading.Thread):
    """Posts samples and their labels until stopped; records all answers."""

    def __init__(self, port: int, name: str, notes: Path) -> None:
        super().__init__(name=name, daemon=True)
        self._port, self._notes = port, notes
        self._connection: http.client.HTTPConnection | None = None
        self.answers: list[Answer] = []
        self.stopping = threading.Event()
        self.error: BaseException | None = None

    def run(self) -> None:
        rng, number = np.random.default_rng(), 0
        try:
            with closing(self._notes.open("a", buffering=1)) as notes:
                while not self.stopping.is_set():
                    sample_id, truth = f"{self.name}-{number}", number % 4
                    x = [round(float(value), 3) for value in rng.normal(size=8)]
                    for role, body in (("sample", {"x": x}), ("label", {"label": truth})):
                        self._send(role, {"id": sample_id, **body}, truth, notes)
                    number += 1
                    self.stopping.wait(0.05)
        except BaseException as error:
            self.error = error
        finally:
            if self._connection is not None:
                self._connection.close()

    def _send(self, role: str, body: dict[str, Any], truth: int, notes: Any) -> None:
        for _ in range(MOST_TRIES):
            answer = self._post(role, body, truth)
            self.answers.append(answer)
            if answer.position is not None:
                noted = truth if role == "label" else -1
                notes.write(" ".join(map(str, (*answer.position, answer.sample_id, noted))) + "\n")
                return

    def _post(self, role: str, body: dict[str, Any], truth: int) -> Answer:
        began_s = time.monotonic()
        if self._connection is None:
            self._connection = http.client.HTTPConnection(LOOPBACK, self._port, timeout=TIMEOUT_S + 20.0)
        self._connection.request("POST", f"/{role}", json.dumps(body), {"content-type": "application/json"})
        with self._connection.getresponse() as reply:
            content = json.loads(reply.read())
            status = reply.status
        now_s, place = time.monotonic(), None
        if status == 202:
            position = content["items"][0]["position"]
            place = (position["topic"], position["partition"], position["offset"])
        else:
            assert (status, content["error"]["code"]) == (503, "log_unavailable"), content
        return Answer(role, body["id"], truth, status, now_s, now_s - began_s, place)


# -- learner, server, clients


class Site:
    """A learner and a server on their own topics, and the answers of clients."""

    def __init__(self, folder: Path, forks: ForkServer, cluster: Cluster, name: str) -> None:
        self._folder, self._forks = folder, forks
        self._port = free_port(LOOPBACK)
        self._settings: dict[str, Any] = {
            "log.kafka.replication_factor": 3,
            "source.samples.topic": f"{name}-samples",
            "source.labels.topic": f"{name}-labels",
            "log.dead_letters": f"{name}-dead-letters",
            "serve.timeout_s": TIMEOUT_S,
            "log.on_trimmed": "skip",
            "state.checkpoint_every_s": 1.0,
            "state.publish_every_s": 0.5,
        }
        self.path = write_config(folder, "site", port=self._port, bootstrap=cluster.bootstrap_servers)
        self.config = load_config(self.path, overrides=self._settings, environ={})
        self.paths = StatePaths(self.config.state.dir)
        with closing(open_log(self.config)) as log:
            make_topics(log, self.config)
        self.server = self._start("serve")
        self.learner = self.start_learner()
        self.clients: list[Client] = []
        until(self._serves, "a server", RESUME_S)

    def _start(self, command: str) -> int:
        flags = [part for key, value in self._settings.items() for part in ("--set", f"{key}={value}")]
        return self._forks.start([command, "--config", str(self.path), *flags], self._folder / f"{command}.log")

    def start_learner(self) -> int:
        self.learner = self._start("learn")
        return self.learner

    def _serves(self) -> bool:
        with suppress(OSError), closing(http.client.HTTPConnection(LOOPBACK, self._port, timeout=5.0)) as connection:
            connection.request("GET", "/health/live")
            return connection.getresponse().status == 200
        return False

    def code(self, pid: int) -> int | None:
        """Exit code of a process, or None."""
        return self._forks.poll(pid)

    @property
    def learner_log(self) -> str:
        return (self._folder / "learn.log").read_text(errors="replace")

    @property
    def heartbeat(self) -> dict[str, Any]:
        return read_status(self.paths.heartbeat) or {}

    def start_clients(self) -> None:
        """Start clients; wait until labels are acknowledged and the learner takes steps."""
        generation = len(self.clients)
        started = [
            Client(self._port, f"c{n}", self._folder / f"notes-{n}") for n in range(generation, generation + CLIENTS)
        ]
        self.clients += started
        for client in started:
            client.start()
        until(lambda: all(len(client.answers) > 20 for client in started), "answers", RESUME_S)
        self.wait_for_a_step()

    def stop_clients(self) -> None:
        for client in self.clients:
            client.stopping.set()
        for client in self.clients:
            client.join(2 * MOST_TRIES * (TIMEOUT_S + 20.0))
            assert not client.is_alive()
            assert client.error is None, client.error

    def wait_for_a_step(self) -> None:
        before = last_step(self.paths.journal)
        until(lambda: last_step(self.paths.journal) > before + 2, "steps", RESUME_S)

    @property
    def answers(self) -> list[Answer]:
        return [answer for client in self.clients for answer in list(client.answers)]

    def wait_for_all_acknowledged(self, since_s: float, timeout_s: float = RESUME_S) -> float:
        """Wait until each client has a 202 for a request sent after `since_s`; the time of the first."""

        def first() -> float | None:
            times = [
                min((a.at_s for a in list(c.answers) if a.status == 202 and a.at_s - a.took_s > since_s), default=None)
                for c in self.clients
                if c.is_alive()
            ]
            return None if None in times or not times else min(time for time in times if time is not None)

        found: float = until(first, "acknowledgements", timeout_s)
        return found

    def drained(self) -> bool:
        """Whether the learner has read everything, in the same process."""
        assert self.code(self.learner) is None, self.learner_log[-3000:]
        topics, said = self.config.source.topics, self.heartbeat
        if said.get("lag_records") != 0:
            return False
        with closing(open_log(self.config)) as log:
            ends = [sum(log.end_offsets(topic).values()) for topic in topics]
        accounts = said.get("accounts", {})
        read = [accounts.get(f"{role}_read", 0) + accounts.get(f"{role}_trimmed", 0) for role in ("samples", "labels")]
        return read == ends and said["pid"] == self.learner

    def stop_learner(self) -> None:
        """SIGTERM; its state is saved."""
        os.kill(self.learner, signal.SIGTERM)
        until(lambda: self.code(self.learner) is not None, "the exit of the learner", RESUME_S)
        assert self.code(self.learner) == 0, self.learner_log[-3000:]

    def stop(self) -> None:
        for pid in (self.server, self.learner):
            if self.code(pid) is None:
                os.kill(pid, signal.SIGKILL)
                until(lambda pid=pid: self.code(pid) is not None, "the exit of a process", RESUME_S)


@pytest.fixture
def site(tmp_path: Path, cluster: Cluster, request: pytest.FixtureRequest) -> Iterator[Site]:
    """Clients post and the learner takes steps."""
    site = Site(tmp_path, forks(), cluster, f"faults-{re.sub(r'[^a-z0-9]+', '-', request.node.name)}-{os.getpid()}")
    try:
        site.start_clients()
        yield site
    finally:
        for client in site.clients:
            client.stopping.set()
        site.stop()


@dataclass
class Fault:
    """A fault, for the figures."""

    name: str
    began_s: float
    ended_s: float


def report(**figures: Any) -> dict[str, Any]:
    """Print one line of JSON, for docs/research/soak.md."""
    rounded = {name: round(value, 2) if isinstance(value, float) else value for name, value in figures.items()}
    print(json.dumps(rounded), flush=True)  # noqa: T201 - shown with -s
    return rounded


def finish(site: Site, fault: Fault, **more: float) -> dict[str, Any]:
    """After the fault: clients are acknowledged again, everything is learned, all answers were true."""
    acknowledged_s = site.wait_for_all_acknowledged(fault.ended_s)
    site.wait_for_a_step()
    site.stop_clients()
    stopped_s = time.monotonic()
    until(site.drained, f"a lag of 0: {site.heartbeat}", RESUME_S)
    drained_s = time.monotonic()
    site.stop_learner()

    answers = site.answers
    refused = [answer.took_s for answer in answers if answer.status == 503]
    audit = verify(site.config, sorted(site.path.parent.glob("notes-*")))
    assert audit.problems == []
    assert audit.acknowledged == sum(answer.status == 202 for answer in answers) > 100
    assert_counts_match_answers(site, answers)
    figures = report(
        fault=fault.name,
        lasted_s=fault.ended_s - fault.began_s,
        acknowledged=audit.acknowledged,
        refused=len(refused),
        refused_longest_s=max(refused, default=0.0),
        longest_s=max(answer.took_s for answer in answers),
        acknowledges_again_after_s=acknowledged_s - fault.ended_s,
        drained_after_s=drained_s - stopped_s,
        timeout_s=TIMEOUT_S,
        **more,
    )
    assert max(answer.took_s for answer in answers) < TIMEOUT_S + SLACK_S, figures
    return figures


def assert_counts_match_answers(site: Site, answers: list[Answer]) -> None:
    """A label is in the log once per 202, and at most once per 503."""
    there = Counter(label.sample_id for labels in read_log(site.config).labels.values() for label in labels)
    labels = [answer for answer in answers if answer.role == "label"]
    acknowledged = Counter(answer.sample_id for answer in labels if answer.status == 202)
    refused = Counter(answer.sample_id for answer in labels if answer.status == 503)
    assert there.keys() <= acknowledged.keys() | refused.keys()
    wrong = {
        name: (there[name], acknowledged[name], refused[name])
        for name in acknowledged.keys() | refused.keys()
        if not acknowledged[name] <= there[name] <= acknowledged[name] + refused[name]
    }
    assert wrong == {}, "in the log, acknowledged, refused"


# -- tests


def test_a_new_topic_is_visible_to_the_next_request(cluster: Cluster) -> None:
    """Another node than the one that created it may answer, and nodes learn of it later."""
    settings = KafkaConfig(bootstrap_servers=cluster.bootstrap_servers, replication_factor=3)
    with closing(KafkaLog(settings, max_record_bytes=1)) as log:
        for number in range(20):
            topic = f"new-{number}"
            log.create_topics({topic: 2})
            assert set(log.end_offsets(topic).values()) == {0}


def test_a_producer_that_fell_silent_is_replaced(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """A record that is sent but not acknowledged within the delivery timeout breaks kafka-python's producer."""
    monkeypatch.setattr(kafka_clients, "REQUEST_TIMEOUT_MS", 1000)
    monkeypatch.setattr(kafka_clients, "DELIVERY_TIMEOUT_MS", 2000)
    settings = KafkaConfig(bootstrap_servers=cluster.bootstrap_servers, replication_factor=3)
    with closing(KafkaLog(settings, max_record_bytes=9)) as log:
        log.create_topics({"silent": 1})

        def acknowledged() -> bool:
            with suppress(LogUnavailableError):
                return bool(log.append("silent", [NewRecord(b"k", b"v")], timeout_s=0.5))
            return False

        until(acknowledged, "the first acknowledgement", RESUME_S)
        with frozen(cluster):
            frozen_until_s = time.monotonic() + 4.0
            while time.monotonic() < frozen_until_s:
                assert not acknowledged()
        until(acknowledged, "acknowledgements again", RESUME_S)
        threads = [thread.name for thread in threading.enumerate() if "producer" in thread.name]
    assert len(threads) == 1, threads


@contextmanager
def frozen(cluster: Cluster) -> Iterator[None]:
    for broker in cluster.brokers.values():
        broker.pause()
    try:
        yield
    finally:
        for broker in cluster.brokers.values():
            broker.resume()


def outlast(site: Site, fault_s: float) -> None:
    """Wait for `fault_s`, and until each client was refused meanwhile."""
    began_s = time.monotonic()
    until(
        lambda: all(any(a.status == 503 and a.at_s > began_s for a in list(c.answers)) for c in site.clients),
        "a 503 for each client",
        max(fault_s, 2 * (TIMEOUT_S + SLACK_S)) + 20.0,
    )
    time.sleep(max(0.0, began_s + fault_s - time.monotonic()))


def test_frozen_brokers_are_tolerated(site: Site, cluster: Cluster) -> None:
    """SIGSTOP to all, so sockets stay open without answers; then SIGCONT."""
    began_s = time.monotonic()
    with frozen(cluster):
        outlast(site, PAUSE_S)

    figures = finish(site, Fault("all brokers frozen", began_s, time.monotonic()))

    assert figures["refused"] >= CLIENTS


def test_learner_and_server_stop_in_time_while_brokers_are_frozen(site: Site, cluster: Cluster) -> None:
    """SIGTERM during the fault: exit code 0, before the supervisor would kill them."""
    with frozen(cluster):
        outlast(site, 0.0)
        began_s, limit_s = time.monotonic(), site.config.run.shutdown_s + 5.0
        stopped_s = {}
        for pid in (site.learner, site.server):
            os.kill(pid, signal.SIGTERM)
        for name, pid in (("learner", site.learner), ("server", site.server)):
            until(lambda pid=pid: site.code(pid) is not None, f"the exit of the {name}", limit_s)
            stopped_s[f"{name}_stopped_after_s"] = time.monotonic() - began_s
            assert site.code(pid) == 0, site.learner_log[-3000:]
    report(fault="SIGTERM while all brokers are frozen", **stopped_s)


def leader_of(topic: str, servers: list[str]) -> tuple[int, int]:
    """Leader and leader epoch of the topic's first partition."""
    with KafkaAdminClient(bootstrap_servers=servers) as admin:
        (description,) = admin.describe_topics([topic])
    (first,) = (each for each in description["partitions"] if each["partition_index"] == 0)
    return first["leader_id"], first["leader_epoch"]


@pytest.mark.parametrize("how", ["killed", *(["frozen"] if LONG else [])])
def test_a_new_leader_replaces_a_lost_one(site: Site, cluster: Cluster, how: str) -> None:
    """Labels are acknowledged before the old leader returns, as a follower."""
    topic = site.config.source.labels.topic
    leader, epoch = leader_of(topic, cluster.bootstrap_servers.split(","))
    victim = cluster.brokers[leader]
    others = [broker.bootstrap_servers for broker in cluster.brokers.values() if broker is not victim]

    began_s = time.monotonic()
    victim.kill() if how == "killed" else victim.pause()
    again_s = site.wait_for_all_acknowledged(began_s + 0.5)
    site.wait_for_a_step()
    new_leader, new_epoch = leader_of(topic, others)
    assert new_leader != leader
    assert new_epoch > epoch
    if how == "killed":
        victim.start()
    else:
        time.sleep(max(0.0, began_s + PAUSE_S - time.monotonic()))
        victim.resume()

    finish(site, Fault(f"leader {how}", began_s, time.monotonic()), acknowledged_by_another_after_s=again_s - began_s)


@pytest.mark.parametrize("count", [2, *([3] if LONG else [])])
def test_too_few_brokers_acknowledge_nothing(site: Site, cluster: Cluster, count: int) -> None:
    """SIGKILL to two of three, or all: too few in-sync replicas, so 503; after their restart the lag drains."""
    began_s = time.monotonic()
    victims = list(cluster.brokers.values())[:count]
    for broker in victims:
        broker.kill()
    outlast(site, 0.0)
    cut_s = time.monotonic()
    assert [answer for answer in site.answers if answer.status == 202 and answer.at_s - answer.took_s > cut_s] == []
    cluster.start()

    figures = finish(site, Fault(f"{count} of 3 killed", began_s, time.monotonic()))

    assert figures["refused"] >= CLIENTS


def test_a_cut_network_is_tolerated(site: Site, cable: Cable | str) -> None:
    """Packets are lost silently, for longer than a request may take."""
    if isinstance(cable, str):
        pytest.skip(f"NO NETWORK NAMESPACE, a cut network is not tested: {cable}")
    began_s = time.monotonic()
    cable.pull()
    try:
        outlast(site, CUT_S)
    finally:
        cable.plug()

    figures = finish(site, Fault("network cut", began_s, time.monotonic()))

    assert figures["refused"] >= CLIENTS


def test_records_trimmed_unread_are_counted_and_skipped(site: Site, cluster: Cluster) -> None:
    """DeleteRecords past the checkpoint and past journaled steps, while the learner is dead."""
    until(lambda: 2 <= steps_since_checkpoint(site) <= 10, "steps after the checkpoint", RESUME_S)
    os.kill(site.learner, signal.SIGKILL)
    until(lambda: site.code(site.learner) is not None, "its exit", RESUME_S)
    before = len(site.answers)
    until(lambda: len(site.answers) > before + 100, "unread records", RESUME_S)
    site.stop_clients()
    checkpoint = load_newest(site.paths.checkpoints)
    beginnings = trim(site, cluster)
    trimmed = {tp: beginnings[tp] - offset for tp, offset in checkpoint.next_offsets.items()}
    assert min(trimmed.values()) > 0
    assert last_step(site.paths.journal) > checkpoint.step

    began_s = time.monotonic()
    site.start_learner()
    until(site.drained, f"a lag of 0: {site.heartbeat}", RESUME_S)
    drained_s = time.monotonic() - began_s
    site.start_clients()
    site.stop_clients()
    until(site.drained, "a lag of 0", RESUME_S)
    site.stop_learner()

    accounts = load_newest(site.paths.checkpoints).extra["accounts"]
    for role in ("samples", "labels"):
        topic = getattr(site.config.source, role).topic
        assert accounts[f"{role}_trimmed"] == sum(n for tp, n in trimmed.items() if tp.topic == topic)
    said = [json.loads(line) for line in site.learner_log.splitlines() if '"records_trimmed"' in line]
    assert {(line["topic"], line["partition"]): line["end"] - line["begin"] for line in said} == trimmed
    assert '"journal_abandoned"' in site.learner_log
    report(fault="trimmed unread", trimmed=sum(trimmed.values()), started_and_drained_in_s=drained_s)


def steps_since_checkpoint(site: Site) -> int:
    """Steps since the last checkpoint; 0 before the first."""
    saved = load_newest(site.paths.checkpoints)
    return last_step(site.paths.journal) - saved.step if saved and saved.step else 0


def trim(site: Site, cluster: Cluster) -> dict[TopicPartition, int]:
    """Trim all but the last records of each partition; returns the new beginnings."""
    topics = site.config.source.topics
    with closing(open_log(site.config)) as log:
        ends = {tp: end for topic in topics for tp, end in log.end_offsets(topic).items()}
        beginnings = {tp: end - TRIMMED_TAIL for tp, end in ends.items()}
        with KafkaAdminClient(bootstrap_servers=cluster.bootstrap_servers) as admin:
            admin.delete_records({KafkaPartition(*tp): offset for tp, offset in beginnings.items()})
        found = {tp: at for topic in topics for tp, at in log.beginning_offsets(topic).items()}
    assert found == beginnings
    return found
