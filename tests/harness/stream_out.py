"""Predictions as a stream under faults: a steady stream, and learner, scorers and broker killed with SIGKILL.

Real parts: Apache Kafka, `streamlearn run` with two scorers, and a foreign client, confluent-kafka, that produces the
samples and reads the predictions as committed. Each sample must be answered exactly once, with a version. Latency is
measured at the foreign consumer: from the sample's timestamp until its prediction is read.

`tests/e2e/test_score.py` runs it for half a minute, `benchmarks/score.py` for ten.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import confluent_kafka

from streamlearn.lab.broker import SHORT_LIVED, Broker
from streamlearn.log.kafka import KafkaLog
from streamlearn.log.settings import KafkaConfig
from streamlearn.state.status import read_status

PARTITIONS = 4
LATE_S, GAP_S, MOST_RECOVERY_S = 1.0, 2.0, 60.0
"""A fault lasts as long as samples are late, with gaps of at most `GAP_S`. What is late later is no fault's."""
SETTINGS = """
[schema]
shape = [8]
classes = ["a", "b", "c"]
[model]
options = {{ hidden = [32] }}
[learn]
threads = 1
[source]
predictions = {{ topic = "predictions", scorers = 2 }}
[log]
kind = "kafka"
kafka.bootstrap_servers = "{bootstrap}"
[state]
dir = "{folder}/state"
checkpoint_every_s = 5.0
[serve]
port = 0
processes = 1
[metrics]
port = 0
"""
Say = Callable[[str], None]


@dataclass
class Report:
    """What was sent, and what a foreign client read."""

    sent: int = 0
    read: int = 0
    distinct: int = 0
    foreign: int = 0
    """Predictions of samples that were not sent."""
    without_version: int = 0
    kills: Counter[str] = field(default_factory=Counter)
    versions: int = 0
    recoveries_s: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    """By what was killed: time from the kill to the arrival of the first sample that is answered in time again."""
    latencies_s: list[float] = field(default_factory=list)
    """Outside faults."""
    worst_s: float = 0.0
    """Of all, faults included."""

    @property
    def lost(self) -> int:
        """Samples without a prediction."""
        return self.sent - self.distinct + self.foreign

    @property
    def duplicates(self) -> int:
        """Further predictions of a sample."""
        return self.read - self.distinct

    def quantile_s(self, q: float) -> float | None:
        """A quantile of the latency outside faults."""
        ordered = sorted(self.latencies_s)
        return ordered[min(len(ordered) - 1, int(q * len(ordered)))] if ordered else None


class Consumer:
    """Reads the predictions in a thread, as committed."""

    def __init__(self, bootstrap: str) -> None:
        self.found: list[tuple[str, int, float, float]] = []
        """Id, version, when the sample arrived, and when its prediction was read."""
        self._stopping = threading.Event()
        self._client = confluent_kafka.Consumer(
            {
                "bootstrap.servers": bootstrap,
                "group.id": "reader",
                "isolation.level": "read_committed",
                "auto.offset.reset": "earliest",
                "enable.auto.commit": False,
                "reconnect.backoff.max.ms": 500,
                "log_level": 0,
            }
        )
        beginning = confluent_kafka.OFFSET_BEGINNING
        self._client.assign([confluent_kafka.TopicPartition("predictions", n, beginning) for n in range(PARTITIONS)])
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        while not self._stopping.is_set():
            for message in self._client.consume(500, 0.05):
                if message.error() is None:
                    record = json.loads(message.value() or b"")
                    assert (message.key() or b"").decode() == record["id"], record
                    self.found.append((record["id"], record["model_version"], record["time"], time.time()))

    def close(self) -> None:
        """Stop reading."""
        self._stopping.set()
        self._thread.join(20.0)
        self._client.close()


class Producer:
    """Sends samples at a steady rate in a thread, until it is stopped."""

    def __init__(self, bootstrap: str, rate: float, seed: int) -> None:
        self.sent = 0
        self._rate, self._random = rate, random.Random(seed)
        self._stopping = threading.Event()
        settings = {
            "bootstrap.servers": bootstrap,
            "enable.idempotence": True,
            "linger.ms": 5,
            "message.timeout.ms": 300_000,
            "reconnect.backoff.max.ms": 500,
            "log_level": 0,
        }
        self._client = confluent_kafka.Producer(settings)
        self._thread = threading.Thread(target=self._send, daemon=True)
        self._thread.start()

    def _send(self) -> None:
        began = time.monotonic()
        while not self._stopping.is_set():
            while self.sent < (time.monotonic() - began) * self._rate:
                label = self._random.randrange(3)
                x = [self._random.gauss(label if n < 3 else 0, 1) for n in range(8)]
                value: dict[str, Any] = {"id": f"s{self.sent}", "x": [round(number, 3) for number in x]}
                if self._random.random() < 0.1:
                    value["label"] = "abc"[label]
                self._client.produce("samples", json.dumps(value).encode(), f"s{self.sent}".encode())
                self.sent += 1
            self._client.poll(0.005)
        assert self._client.flush(120.0) == 0, "samples could not be sent"

    def close(self) -> None:
        """Stop, once all is acknowledged."""
        self._stopping.set()
        self._thread.join(150.0)


def run(
    folder: Path,
    kills: Sequence[str],
    *,
    seconds: float,
    rate: float,
    seed: int = 1,
    short: bool = False,
    say: Say = lambda _: None,
) -> Report:
    """Stream for `seconds`, with `kills` (scorer, learner, broker) spread evenly over them.

    `short`: for a run of seconds, in which Java need not become fast.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng, report, faults = random.Random(seed), Report(), list[tuple[float, str]]()
    java_options = SHORT_LIVED if short else ()
    with Broker(folder / "kafka", java_options=java_options) as broker, contextlib.ExitStack() as ends:
        bootstrap = broker.bootstrap_servers
        with contextlib.closing(KafkaLog(KafkaConfig(bootstrap_servers=bootstrap))) as log:
            log.create_topics({"samples": PARTITIONS, "labels": 1, "predictions": PARTITIONS, "dead-letters": 1})
        config = folder / "streamlearn.toml"
        config.write_text(SETTINGS.format(bootstrap=bootstrap, folder=folder))
        ends.enter_context(_daemon(config, folder / "run.log"))
        consumer = Consumer(bootstrap)
        ends.callback(consumer.close)
        producer = Producer(bootstrap, rate, seed)
        ends.callback(producer.close)
        # The start is no fault, but samples wait for a first teacher, and then for their turn.
        _until(lambda: len(consumer.found) > max(0.0, producer.sent - rate), "predictions of all samples", 300.0)
        began = time.monotonic()
        streaming_s = time.time()
        say(f"scorers have caught up with {producer.sent} samples")
        for number, what in enumerate(kills):
            _sleep_until(began + (number + 0.5) * seconds / len(kills))
            faults.append((time.time(), what))
            _kill(what, broker, folder / "state", rng)
            report.kills[what] += 1
            sent, read = producer.sent, len(consumer.found)
            say(f"{time.monotonic() - began:6.1f} s: killed the {what}; sent {sent}, read {read}")
        _sleep_until(began + seconds)
        producer.close()
        report.sent = producer.sent
        with contextlib.suppress(TimeoutError):
            _until(lambda: len({found[0] for found in consumer.found}) >= report.sent, "all predictions", 120.0)
        time.sleep(2.0)  # for duplicates
        consumer.close()
    return _summary(report, consumer.found, faults, streaming_s)


def _summary(
    report: Report,
    found: Sequence[tuple[str, int, float, float]],
    faults: Sequence[tuple[float, str]],
    streaming_s: float,
) -> Report:
    """`streaming_s` is when the scorers had caught up for the first time; latencies before that do not count."""
    expected = {f"s{n}" for n in range(report.sent)}
    ids = {sample_id for sample_id, *_ in found}
    report.read, report.distinct, report.foreign = len(found), len(ids), len(ids - expected)
    report.without_version = sum(version < 0 for _, version, *_ in found)
    report.versions = len({version for _, version, *_ in found})
    times = sorted((arrived_s, read_s - arrived_s) for _, _, arrived_s, read_s in found if arrived_s >= streaming_s)
    windows = []
    for killed_s, what in faults:
        end_s = killed_s
        for arrived_s, latency_s in times:
            if arrived_s > min(end_s + GAP_S, killed_s + MOST_RECOVERY_S):
                break
            if arrived_s >= killed_s - LATE_S and latency_s > LATE_S:
                end_s = max(end_s, arrived_s)
        windows.append((killed_s - LATE_S, end_s))
        report.recoveries_s[what].append(end_s - killed_s)
    report.worst_s = max(latency_s for _, latency_s in times)
    report.latencies_s = [
        latency_s
        for arrived_s, latency_s in times
        if not any(begin_s <= arrived_s <= end_s for begin_s, end_s in windows)
    ]
    return report


def _kill(what: str, broker: Broker, state: Path, rng: random.Random) -> None:
    if what == "broker":
        broker.kill()
        time.sleep(1.0)
        broker.start()
        return
    card = state / ("learner.json" if what == "learner" else f"processes/scorer-{rng.randrange(2)}.json")
    status = read_status(card)
    if status is not None:
        with contextlib.suppress(ProcessLookupError):  # it was killed just now, and is not back yet
            os.kill(status["pid"], signal.SIGKILL)


@contextlib.contextmanager
def _daemon(config: Path, output: Path) -> Iterator[None]:
    with output.open("ab") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "streamlearn", "run", "--config", str(config)], stdout=file, stderr=file
        )
    try:
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60.0)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _sleep_until(deadline: float) -> None:
    time.sleep(max(0.0, deadline - time.monotonic()))


def _until(done: Callable[[], Any], what: str, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not done():
        if time.monotonic() > deadline:
            raise TimeoutError(what)
        time.sleep(0.1)
