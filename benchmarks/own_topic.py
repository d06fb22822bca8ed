"""Runs the daemon on somebody else's topic: Avro through a schema registry, and labels that are rows of another team.

Kafka, the registry (Apicurio) and the producer (confluent-kafka, with its Avro serializer and partitioner) are real.
Rows of 12 columns are keyed by customer: 3 categories, one of them with 5,000 values, and 2 nullable numbers. Labels,
`{"transaction_id", "is_fraud"}`, are in a topic with other partitions, two days later by their timestamps. Midway the
producer's schema gets one more nullable field, and categories appear that were not there. The learner is killed with
SIGKILL, and its next start finds the registry away: it waits. What must hold, else the exit code is 1:

    dead_letters            0
    labels_joined           = labels_sent
    bit_equal               a learner that is never killed ends with the same state
    json_against_avro       largest difference between `/predict` with the JSON row and the stored Avro row: <= 1e-6
    accuracy_against_npz    last-window accuracy minus that of the same rows, encoded by hand: >= -0.01

Run: python benchmarks/own_topic.py [--quick]. The last line is JSON.
"""

from __future__ import annotations

import json
import math
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from common import arguments, broker, command, figures, heartbeat, running, tell, wait_ready
from confluent_kafka import Producer
from confluent_kafka.admin import AdminClient, NewTopic
from confluent_kafka.schema_registry import SchemaRegistryClient
from confluent_kafka.schema_registry.avro import AvroSerializer
from confluent_kafka.serialization import MessageField, SerializationContext
from harness.registry import Registry
from harness.verify import differences

from streamlearn.config import load_config

ROWS, QUICK_ROWS = 100_000, 6_000
LABEL_SHARE = 0.2
DAY_MS = 86_400_000
SPAN_DAYS = 8
MERCHANTS, COUNTRIES, CHANNELS = 5_000, 20, 4
NEW_COUNTRIES = 5
"""Categories that appear midway."""
PREDICTED = 64
"""Rows whose answers by both paths are compared."""
FIELDS: list[dict[str, Any]] = [
    {"name": "transaction_id", "type": "string"},
    {"name": "merchant", "type": "string"},
    {"name": "country", "type": "string"},
    {"name": "channel", "type": "string"},
    {"name": "amount", "type": "double"},
    {"name": "balance", "type": ["null", "double"], "default": None},
    {"name": "distance_km", "type": ["null", "float"], "default": None},
    {"name": "age_days", "type": "int"},
    {"name": "purchases_24h", "type": "long"},
    {"name": "velocity", "type": "float"},
    {"name": "score", "type": "double"},
    {"name": "card_present", "type": "boolean"},
    {"name": "created_at", "type": {"type": "long", "logicalType": "timestamp-millis"}},
]
ADDED = {"name": "device_age_days", "type": ["null", "int"], "default": None}

CONFIG = """
[source.samples]
topic = "transactions"
format = "avro"
id = "transaction_id"
time = "created_at"

[source.labels]
topic = "chargebacks"
id = "transaction_id"
label = "is_fraud"

[source.labels.values]
true = "fraud"
false = "legitimate"

[source.registry]
url = "{registry}"

[schema]
classes = ["legitimate", "fraud"]

[columns]
merchant = {{ kind = "category", buckets = 16384 }}
country = {{ kind = "category", buckets = 64 }}
channel = {{ kind = "category", buckets = 16 }}
amount = "number"
balance = "number"
distance_km = "number"
age_days = "number"
purchases_24h = "number"
velocity = "number"
score = "number"
card_present = "boolean"
created_at = {{ kind = "timestamp", unit = "ms" }}
"""
BY_HAND = """
[source.samples]
topic = "by-hand"
format = "raw"

[source.labels]
topic = "by-hand-labels"

[schema]
classes = ["legitimate", "fraud"]
shape = [{width}]
"""
COMMON = """
[log]
kind = "kafka"
partitions = 0

[log.kafka]
bootstrap_servers = "{bootstrap}"

[score]
window = {window}

[state]
dir = "{state}"
checkpoint_every_s = 2.0

[serve]
port = {port}
processes = 1
"""


class Rows:
    """The transactions, the truth about each, and which of them get a label."""

    def __init__(self, count: int, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.count, self.midway = count, count // 2
        now_ms = int(time.time() * 1000)
        self.at_ms = now_ms - (SPAN_DAYS + 3) * DAY_MS + np.arange(count) * (SPAN_DAYS * DAY_MS // count)
        self.customer = rng.integers(count // 20 + 1, size=count)
        self.merchant = (rng.zipf(1.15, size=count) - 1) % MERCHANTS
        self.country = rng.integers(COUNTRIES, size=count)
        self.country[self.midway :] = rng.integers(COUNTRIES + NEW_COUNTRIES, size=count - self.midway)
        self.channel = rng.integers(CHANNELS, size=count)
        self.amount = np.round(rng.lognormal(3.5, 1.2, size=count), 2)
        self.balance = np.where(rng.random(count) < 0.15, np.nan, np.round(rng.normal(2_000, 900, size=count), 2))
        distance = rng.gamma(1.5, 40.0, size=count).astype(np.float32)
        self.distance_km = np.where(rng.random(count) < 0.3, np.float32(np.nan), distance)
        self.age_days = rng.integers(1, 4_000, size=count)
        self.purchases_24h = rng.poisson(3.0, size=count)
        self.velocity = rng.normal(size=count).astype(np.float32)
        self.score = rng.normal(size=count)
        self.card_present = rng.random(count) < 0.6
        self.device_age_days = rng.integers(0, 900, size=count)
        hour = self.at_ms / 3_600_000 % 24
        risk = rng.normal(0.0, 1.6, size=MERCHANTS)[self.merchant]
        risk += rng.normal(size=COUNTRIES + NEW_COUNTRIES)[self.country]
        risk += 0.9 * (np.log(self.amount) - 3.5) + 0.8 * self.velocity - 0.7 * self.card_present
        risk += 0.8 * np.isnan(self.balance) + 0.5 * np.cos((hour - 3) / 24 * 2 * math.pi) + 0.5 * self.score - 0.9
        self.fraud = rng.random(count) < 1.0 / (1.0 + np.exp(-2.0 * risk))
        self.labelled = np.flatnonzero(rng.random(count) < LABEL_SHARE)

    def record(self, row: int) -> dict[str, Any]:
        """The transaction as its producer has it."""
        balance, distance = self.balance[row], self.distance_km[row]
        found = {
            "transaction_id": f"t-{row:07}",
            "merchant": f"m{self.merchant[row]}",
            "country": f"c{self.country[row]}",
            "channel": ("pos", "web", "app", "phone")[self.channel[row]],
            "amount": float(self.amount[row]),
            "balance": None if math.isnan(balance) else float(balance),
            "distance_km": None if math.isnan(distance) else float(distance),
            "age_days": int(self.age_days[row]),
            "purchases_24h": int(self.purchases_24h[row]),
            "velocity": float(self.velocity[row]),
            "score": float(self.score[row]),
            "card_present": bool(self.card_present[row]),
            "created_at": int(self.at_ms[row]),
        }
        if row >= self.midway:
            found["device_age_days"] = int(self.device_age_days[row])
        return found

    def by_hand(self) -> np.ndarray[Any, np.dtype[np.float32]]:
        """(N, F): what a careful engineer would write: one-hot categories, filled gaps with flags, parts of the day."""

        def one_hot(values: Any, size: int) -> Any:
            return np.eye(size, dtype=np.float32)[values % size]

        day = self.at_ms / DAY_MS * 2 * math.pi
        columns = [
            *(np.nan_to_num(v)[:, None] for v in (self.amount, self.balance, self.distance_km)),
            *(v[:, None] for v in (self.velocity, self.score, self.age_days, self.purchases_24h)),
            *(v[:, None] for v in (self.card_present, np.log(self.amount))),
            *(np.isnan(v)[:, None] for v in (self.balance, self.distance_km)),
            *(part[:, None] for part in (np.sin(day), np.cos(day))),
            one_hot(self.country, COUNTRIES + NEW_COUNTRIES),
            one_hot(self.channel, CHANNELS),
            one_hot(self.merchant, 512),
        ]
        return np.concatenate([np.asarray(column, np.float32) for column in columns], axis=1)


def produce(rows: Rows, bootstrap: str, registry: str) -> None:
    """Send all samples and labels with a foreign client, each with its own time."""
    admin = AdminClient({"bootstrap.servers": bootstrap})
    keep = {"retention.ms": "-1"}
    topics = {"transactions": 6, "chargebacks": 4, "by-hand": 2, "by-hand-labels": 2, "dead-letters": 1}
    wanted = [NewTopic(name, size, 1, config=keep) for name, size in topics.items()]
    for created in admin.create_topics(wanted).values():
        created.result()
    client = SchemaRegistryClient({"url": registry})

    def avro(*fields: dict[str, Any]) -> Any:
        schema = {"type": "record", "name": "Transaction", "namespace": "shop", "fields": list(fields)}
        return AvroSerializer(client, json.dumps(schema))

    before, after = avro(*FIELDS), avro(*FIELDS, ADDED)
    context = SerializationContext("transactions", MessageField.VALUE)
    producer = Producer({"bootstrap.servers": bootstrap, "linger.ms": 50, "queue.buffering.max.messages": 500_000})
    encoded = rows.by_hand()
    for row in range(rows.count):
        value = (before if row < rows.midway else after)(rows.record(row), context)
        at_ms = int(rows.at_ms[row])
        producer.produce("transactions", value, f"customer-{rows.customer[row]}", timestamp=at_ms)
        key = f"t-{row:07}"
        producer.produce("by-hand", encoded[row].tobytes(), key, timestamp=at_ms)
        producer.poll(0)
    for row in rows.labelled.tolist():
        at_ms, fraud = int(rows.at_ms[row]) + 2 * DAY_MS, bool(rows.fraud[row])
        label = json.dumps({"transaction_id": f"t-{row:07}", "is_fraud": fraud})
        producer.produce("chargebacks", label, timestamp=at_ms)
        by_hand = json.dumps({"id": f"t-{row:07}", "label": "fraud" if fraud else "legitimate"})
        producer.produce("by-hand-labels", by_hand, f"t-{row:07}", timestamp=at_ms)
        producer.poll(0)
    assert producer.flush(120) == 0


@contextmanager
def learner(config: Path, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A learner that stops at the end of the log; killed if the block leaves it running."""
    with log.open("ab") as file:
        process = subprocess.Popen(command("learn", "--until-end", "--config", config), stdout=file, stderr=file)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def learned(state: Path) -> int:
    """Samples learned so far."""
    return int(heartbeat(state).get("accounts", {}).get("samples_learned", 0))


def wait_until(state: Path, samples: int, process: subprocess.Popen[bytes], timeout_s: float = 600.0) -> None:
    """Wait until the learner has learned that many samples."""
    deadline = time.monotonic() + timeout_s
    while learned(state) < samples:
        assert process.poll() is None, f"the learner ended with {process.returncode}"
        assert time.monotonic() < deadline, f"{learned(state)} of {samples} samples after {timeout_s} s"
        time.sleep(0.05)


def learn_with_faults(config: Path, folder: Path, rows: Rows, registry: Registry) -> dict[str, Any]:
    """Learn all; midway SIGKILL, and a registry that is away when the learner starts again."""
    state, log = folder / "state", folder / "learner.log"
    with learner(config, log) as process:
        wait_until(state, rows.count // 3, process)
        process.send_signal(signal.SIGKILL)
        process.wait()
    registry.stop()
    with learner(config, log) as process:
        deadline = time.monotonic() + 120.0
        while b"registry_unavailable" not in log.read_bytes():
            assert process.poll() is None, "the learner ended while the registry was away"
            assert time.monotonic() < deadline, "the learner did not report that the registry is away"
            time.sleep(0.1)
        stalled_at = learned(state)
        time.sleep(2.0)
        while_away = learned(state) - stalled_at
        registry.start()
        assert process.wait(3600) == 0, log.read_text()[-2000:]
    warnings = log.read_text().count("registry_unavailable")
    return {"learned_while_registry_away": while_away, "registry_warnings": warnings}


def learn_to_end(config: Path, log: Path) -> None:
    """Learn all without faults."""
    with learner(config, log) as process:
        assert process.wait(3600) == 0, log.read_text()[-2000:]


def reference(config: Path, folder: Path, registry: str, **common: Any) -> list[str]:
    """Differences of state to a learner that is never killed and has the same journal."""
    state = folder / "reference"
    shutil.copytree(folder / "state" / "journal", state / "journal")
    second = folder / "reference.toml"
    second.write_text(CONFIG.format(registry=registry) + COMMON.format(**{**common, "state": state}))
    learn_to_end(second, folder / "reference.log")
    return differences(load_config(config), load_config(second))


def ask(url: str, body: object) -> Any:
    """POST JSON; return the reply's."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as reply:
        return json.loads(reply.read())


def json_against_avro(config: Path, folder: Path, rows: Rows, port: int) -> float:
    """Largest difference of a probability between the row as JSON and the stored row, which came as Avro."""
    with running("serve", "--config", config, output=folder / "server.log"):
        url = f"http://127.0.0.1:{port}"
        wait_ready(f"{url}/health/live")
        chosen = range(rows.count - PREDICTED, rows.count)
        sent = ask(f"{url}/predict", {"instances": [rows.record(row) for row in chosen]})["predictions"]
        stored = ask(f"{url}/predict", {"ids": [f"t-{row:07}" for row in chosen]})["predictions"]
    pairs = zip(sent, stored, strict=True)
    return max(float(np.abs(np.subtract(a["probabilities"], b["probabilities"])).max()) for a, b in pairs)


def window_accuracy(state: Path) -> float:
    """Accuracy at arrival of the teacher in the last window of labels."""
    scores = json.loads((state / "scores.json").read_bytes())
    return float(scores["at_arrival"]["windowed"]["accuracy"]["teacher"])


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main() -> int:
    """Print the figures; 1 if one of the conditions does not hold."""
    quick = arguments(__doc__ or "").quick
    rows = Rows(QUICK_ROWS if quick else ROWS)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with broker(folder / "kafka") as bootstrap, Registry(folder / "registry") as registry:
            began = time.monotonic()
            produce(rows, bootstrap, registry.url)
            tell(f"{rows.count} samples and {len(rows.labelled)} labels sent in {time.monotonic() - began:.0f} s")
            port = free_port()
            common = {"bootstrap": bootstrap, "port": port, "window": 500 if quick else 5_000}
            config = folder / "streamlearn.toml"
            config.write_text(CONFIG.format(registry=registry.url) + COMMON.format(**common, state=folder / "state"))
            began = time.monotonic()
            faults = learn_with_faults(config, folder, rows, registry)
            tell(f"learned in {time.monotonic() - began:.0f} s, killed once")
            status = heartbeat(folder / "state")
            different = reference(config, folder, registry.url, **common)
            tell("the learner that was never killed has ended")
            difference = json_against_avro(config, folder, rows, port)
            by_hand = folder / "by-hand.toml"
            width = rows.by_hand().shape[1]
            by_hand.write_text(BY_HAND.format(width=width) + COMMON.format(**common, state=folder / "by-hand"))
            learn_to_end(by_hand, folder / "by-hand.log")
            here, there = window_accuracy(folder / "state"), window_accuracy(folder / "by-hand")
    majority = max(rows.fraud.mean(), 1 - rows.fraud.mean())
    accounts = status["accounts"]
    found = {
        "rows": rows.count,
        "samples_learned": accounts["samples_learned"],
        "dead_letters": accounts["samples_dead_lettered"] + accounts["labels_dead_lettered"],
        "labels_sent": len(rows.labelled),
        "labels_joined": status["ledger"]["joined"],
        "bit_equal": not different,
        "json_against_avro": difference,
        "accuracy": here,
        "accuracy_by_hand": there,
        "accuracy_against_npz": here - there,
        "majority_class": float(majority),
        **faults,
    }
    figures(**found)
    return int(
        bool(found["dead_letters"])
        or found["labels_joined"] != found["labels_sent"]
        or bool(different)
        or difference > 1e-6
        or here - there < -0.01
    )


if __name__ == "__main__":
    sys.exit(main())
