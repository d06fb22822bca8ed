"""Measures the throughput of the whole daemon relative to a bare loop of the same work, and to one written by hand.

Two streams: Fashion-MNIST through the shipped conv net, and records of 12 columns as JSON through the network `table`.
One step per micro-batch of 64 samples, 1 % labels.

Bare loop: answers the samples, answers those whose label came, learns with the twin, on arrays in memory, in a process
with nothing next to it. Daemon: reads the same samples from a full log, decodes, joins labels, maintains store, ledger
and journal, publishes every second, saves checkpoints and exports metrics, next to a server process.

Written by hand: what a user would have instead. A kafka-python consumer parses the same topics and keeps labels in a
dict. Its step is that of the Mean Teacher papers: one noisy view for each network, mean squared error of the
probabilities, a teacher averaged parameter by parameter. No scores, no twin, nothing durable.

Behind: the table stream again, but the learner may let its micro-batches grow, as it does by default while many samples
wait.

All ratios are samples per second of the daemon over those of the other, in the same run.

Run: python benchmarks/pipeline.py [--quick]. The last line is JSON.
"""

from __future__ import annotations

import contextlib
import copy
import json
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import torch
from common import arguments, broker, command, figures, finish, heartbeat, running, tell, write_config
from encode import COLUMNS, transactions
from kafka import KafkaConsumer
from kafka.structs import TopicPartition
from torch import nn
from torch.nn import functional

from streamlearn.app.build import model_spec
from streamlearn.app.log import make_topics, open_log
from streamlearn.config import Config, load_config
from streamlearn.lab.datasets import load
from streamlearn.learn.learner import Learner
from streamlearn.models.build import build
from streamlearn.records import Array, MicroBatch, NewRecord
from streamlearn.schema.columns import RowEncoder

WARM_UP = 20
LABEL_SHARE, LABEL_DELAY = 0.01, 2000
GAP_MS = 50
"""Between two records of the table, by their times."""
TABLE = """
[source.samples]
id = "transaction_id"
topic = "samples"

[source.labels]
id = "transaction_id"
label = "label"

[schema]
classes = ["fraud", "legitimate"]

[columns]
{columns}

[batch]
max_age_s = 1.0
steps = 1

[log]
kind = "{kind}"
partitions = 2

[log.kafka]
bootstrap_servers = "{bootstrap}"

[state]
dir = "{state}"

[serve]
port = 0
processes = 2

[metrics]
port = 0
"""


def write_table_config(path: Path, *, kind: str, bootstrap: str = "127.0.0.1:1") -> Path:
    """A config for the records of 12 columns."""
    given = {name: column.model_dump(mode="json", exclude_unset=True) for name, column in COLUMNS.items()}
    lines = (
        f"{name} = {{ {', '.join(f'{key} = {json.dumps(value)}' for key, value in options.items())} }}"
        for name, options in given.items()
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    state = path.parent / "state"
    path.write_text(TABLE.format(columns="\n".join(lines), kind=kind, bootstrap=bootstrap, state=state))
    return path


def send_records(config: Config, count: int) -> None:
    """Fill the log of this config with records, and with the labels of 1 %, in the order of their times."""
    rng = np.random.default_rng(0)
    due = np.where(rng.random(count) < LABEL_SHARE, np.arange(count) + rng.geometric(1 / LABEL_DELAY, count), count)
    labels_at: dict[int, list[int]] = {}
    for n in np.flatnonzero(due < count).tolist():
        labels_at.setdefault(int(due[n]), []).append(n)
    given, began_ms = transactions(count), int(time.time() * 1000) - count * GAP_MS
    with contextlib.closing(open_log(config)) as log:
        make_topics(log, config)
        for start in range(0, count, 500):
            numbers = range(start, min(start + 500, count))
            at_ms = {n: began_ms + n * GAP_MS for n in numbers}
            samples = [_record(given[n], given[n]["transaction_id"], at_ms[n]) for n in numbers]
            answers = [
                _record(
                    {"transaction_id": given[told]["transaction_id"], "label": _class_of(given[told])}, "", at_ms[n]
                )
                for n in numbers
                for told in labels_at.get(n, [])
            ]
            log.append(config.source.samples.topics[0], samples)
            log.append(config.source.labels.topic, answers)


def _record(value: dict[str, Any], key: str, at_ms: int) -> NewRecord:
    return NewRecord(key.encode() or None, orjson.dumps(value), timestamp_ms=at_ms)


def _class_of(record: dict[str, Any]) -> str:
    return "fraud" if record["v0"] + record["v1"] - 2 * record["v2"] > 40.0 else "legitimate"


def arrays(config: Config, count: int) -> tuple[Array, Array]:
    """Rows and classes of the stream of this config."""
    if not config.columns:
        data = load("fashion-mnist", limit=count)
        return data.x, data.y
    encoder = RowEncoder(config.columns)
    x = np.stack([encoder.encode(record) for record in transactions(count)])
    return x, np.random.default_rng(0).integers(2, size=count)


def bare(config: Config, steps: int) -> float:
    """Samples per second of the loop's work, on arrays in memory."""
    x, y = arrays(config, 20_000)
    learner = Learner(model_spec(config), config.learn)
    rng = np.random.default_rng(0)
    fresh, labelled = config.batch.fresh, config.batch.labelled
    spent_s = 0.0
    for step in range(WARM_UP + steps):
        rows, known = rng.integers(len(y), size=fresh), rng.integers(600, size=labelled)
        batch = MicroBatch(x[rows], fresh, x[known], y[known].astype(np.int64), labelled)
        arrived = rng.random() < 0.01 * fresh
        started_s = time.perf_counter()
        learner.predict(batch.fresh_x)
        if arrived:
            learner.classify(x[known[:1]])
        learner.learn(batch)
        if step >= WARM_UP:
            spent_s += time.perf_counter() - started_s
    return steps * fresh / spent_s


def by_hand(config: Config, samples: int) -> float:
    """Samples per second of a consumer with a Mean Teacher step, from the first to the last micro-batch."""
    spec = model_spec(config)
    if config.learn.threads:
        torch.set_num_threads(config.learn.threads)
    student = build(spec, seed=0).net.train()
    teacher = copy.deepcopy(student).requires_grad_(False)
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3, weight_decay=1e-4)
    topics = (config.source.samples.topics[0], config.source.labels.topic)
    consumer = KafkaConsumer(bootstrap_servers=config.log.kafka.bootstrap_servers, enable_auto_commit=False)
    consumer.assign(
        [TopicPartition(topic, number) for topic in topics for number in consumer.partitions_for_topic(topic)]
    )
    consumer.seek_to_beginning()
    decode = _columns if config.columns else _pixels(spec.shape)
    names = config.schema_.build().classes
    rows: dict[str, Array] = {}
    labels: dict[str, int] = {}
    pending: dict[str, int] = {}
    fresh: list[Array] = []
    step, learned, started_s = 0, 0, 0.0
    rng = np.random.default_rng(0)
    while learned < samples - config.batch.fresh:
        for partition, records in consumer.poll(200, max_records=500).items():
            for record in records:
                if partition.topic == topics[0]:
                    key, row = decode(record)
                    rows[key] = row
                    fresh.append(row)
                else:
                    told = orjson.loads(record.value)
                    pending[str(told.get("transaction_id", told.get("id")))] = names.index(str(told["label"]))
        for key in [key for key in pending if key in rows]:
            labels[key] = pending.pop(key)
        known = list(labels)
        while len(fresh) >= config.batch.fresh:
            batch, fresh = fresh[: config.batch.fresh], fresh[config.batch.fresh :]
            drawn = [known[n] for n in rng.integers(len(known), size=config.batch.labelled)] if known else []
            x_B = torch.from_numpy(np.stack([*batch, *(rows[key] for key in drawn)]).astype(np.float32))
            y_L = torch.tensor([labels[key] for key in drawn], dtype=torch.int64)
            _mean_teacher_step((student, teacher), optimizer, (x_B, y_L), step)
            step, learned = step + 1, learned + len(batch)
            if step == WARM_UP:
                started_s, before = time.perf_counter(), learned
    consumer.close()
    return (learned - before) / (time.perf_counter() - started_s)


def _mean_teacher_step(
    networks: tuple[nn.Module, nn.Module],
    optimizer: torch.optim.Optimizer,
    batch: tuple[torch.Tensor, torch.Tensor],
    t: int,
) -> None:
    """As in Tarvainen and Valpola (2017), written plainly."""
    (student, teacher), (x_B, y_L) = networks, batch
    logits = student(_noisy(x_B))
    with torch.no_grad():
        targets = teacher(_noisy(x_B)).softmax(dim=1)
    loss = 10.0 * functional.mse_loss(logits.softmax(dim=1), targets)
    if len(y_L):
        loss = loss + functional.cross_entropy(logits[-len(y_L) :], y_L)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    alpha = min(1 - 1 / (t + 1), 0.995)
    with torch.no_grad():
        for mean, value in zip(teacher.parameters(), student.parameters(), strict=True):
            mean.mul_(alpha).add_(value, alpha=1 - alpha)


def _noisy(x_B: torch.Tensor) -> torch.Tensor:
    """Gaussian noise; pictures are also mirrored."""
    if x_B.dim() == 4:
        mirrored = torch.rand(len(x_B)) < 0.5
        x_B = torch.where(mirrored[:, None, None, None], x_B.flip(3), x_B)
        return x_B + 0.1 * torch.randn_like(x_B)
    return x_B


def _pixels(shape: tuple[int, ...]) -> Callable[[Any], tuple[str, Array]]:
    def decode(record: Any) -> tuple[str, Array]:
        return record.key.decode(), np.frombuffer(record.value, np.uint8).reshape(shape).astype(np.float32) / 255

    return decode


def _columns(record: Any) -> tuple[str, Array]:
    """The row that the network `table` wants, by a loop over the fields."""
    told = orjson.loads(record.value)
    row: list[float] = []
    for name, column in COLUMNS.items():
        value = told.get(name)
        if column.kind == "number":
            row += [0.0, 0.0] if value is None else [(value - 100.0) / 50.0, 1.0]
        elif column.kind == "category":
            row.append(0.0 if value is None else 1.0 + zlib.crc32(value.encode()) % column.buckets)
        elif column.kind == "boolean":
            row.append(0.0 if value is None else 2.0 * value - 1.0)
        else:
            day = value / 86_400_000 * 2 * np.pi
            row += [np.sin(day), np.cos(day)]
    return told["transaction_id"], np.array(row, np.float32)


def alone(kind: str, config_path: Path, count: int) -> float:
    """Run `bare` or `by_hand` in a process of its own."""
    given = [sys.executable, __file__, "--side", kind, str(config_path), str(count)]
    return float(subprocess.run(given, check=True, capture_output=True).stdout.splitlines()[-1])


def daemon(config_path: Path) -> float:
    """Samples per second of a learner on a full log, from its first to its last step, with equal micro-batches."""
    folder = config_path.parent
    output = folder / "server.log"
    with running("serve", "--config", config_path, output=output), (folder / "learner.log").open("ab") as file:
        subprocess.run(command("learn", "--until-end", "--config", config_path), check=True, stderr=file)
    return _rate(heartbeat(folder / "state"))


def catching_up(config_path: Path, samples: int) -> tuple[float, float]:
    """The same for a learner whose micro-batches grow with the backlog; also its accuracy."""
    folder = config_path.parent
    with (
        running("serve", "--config", config_path, output=folder / "server.log"),
        running("learn", "--config", config_path, output=folder / "learner.log") as learner,
    ):
        while _learned(status := heartbeat(folder / "state")) < samples:
            assert learner.poll() is None, (folder / "learner.log").read_text()[-2000:]
            time.sleep(0.2)
    return _rate(status), accuracy(folder / "state")


def accuracy(state: Path) -> float:
    """Of first predictions, over all labels."""
    scores = json.loads((state / "scores.json").read_bytes())
    return float(scores["at_arrival"]["cumulative"]["accuracy"]["teacher"])


def _learned(status: dict[str, Any]) -> int:
    return int(status.get("accounts", {}).get("samples_learned", 0))


def _rate(status: dict[str, Any]) -> float:
    return _learned(status) / float(status["last_step_at_s"] - status["first_step_at_s"])


def measure(name: str, folder: Path, samples: int, *, table: bool) -> dict[str, float]:
    """All ratios of one stream."""

    def written(where: str, **given: Any) -> Path:
        path = folder / f"{name}-{where}" / "streamlearn.toml"
        return write_table_config(path, **given) if table else write_config(path, steps=1, **given)

    def fill(path: Path) -> None:
        if table:
            send_records(load_config(path), samples)
        else:
            plan = ("--label-share", LABEL_SHARE, "--label-delay", f"geometric:{LABEL_DELAY}")
            finish("simulate", "fashion-mnist", "--limit", samples, *plan, "--config", path)

    embedded = written("embedded", kind="embedded")
    bares = [alone("bare", embedded, samples // 128)]
    tell(f"{name}: bare loop {bares[0]:.0f} samples/s")
    fill(embedded)
    behind = folder / f"{name}-behind" / "streamlearn.toml"
    if table:
        shutil.copytree(embedded.parent, behind.parent)
        behind.write_text(embedded.read_text().replace(str(embedded.parent), str(behind.parent)))
    on_embedded = daemon(embedded)
    tell(f"{name}: daemon on the embedded log {on_embedded:.0f} samples/s")
    found: dict[str, float] = {}
    if table:
        rate, grown_accuracy = catching_up(behind, samples)
        tell(f"{name}: the same with a backlog {rate:.0f} samples/s")
        found = {
            "backlog_samples_per_s": round(rate),
            "backlog_over_equal_batches": round(rate / on_embedded, 3),
            "backlog_accuracy": round(grown_accuracy, 4),
            "accuracy": round(accuracy(embedded.parent / "state"), 4),
        }
    with broker(folder / f"{name}-broker") as bootstrap:
        kafka = written("kafka", kind="kafka", bootstrap=bootstrap)
        fill(kafka)
        on_kafka = daemon(kafka)
        tell(f"{name}: daemon on Kafka {on_kafka:.0f} samples/s")
        hand = alone("by_hand", kafka, samples)
        tell(f"{name}: written by hand {hand:.0f} samples/s")
    bares.append(alone("bare", embedded, samples // 128))
    tell(f"{name}: bare loop again {bares[1]:.0f} samples/s")
    same = float(np.mean(bares))
    return {
        "daemon_over_same_work": round(on_kafka / same, 3),
        "daemon_over_same_work_embedded": round(on_embedded / same, 3),
        "daemon_over_handwritten": round(on_kafka / hand, 3),
        "bare_samples_per_s": round(same),
        **found,
    }


def main() -> None:
    """Print the ratios."""
    if "--side" in sys.argv:
        kind, path, count = sys.argv[-3:]
        print({"bare": bare, "by_hand": by_hand}[kind](load_config(Path(path)), int(count)))
        return
    quick = arguments(__doc__ or "").quick
    images, records = (6_400, 16_000) if quick else (30_000, 100_000)
    with tempfile.TemporaryDirectory() as name:
        image = measure("image", Path(name), images, table=False)
        table = measure("table", Path(name), records, table=True)
    figures(**image, **{f"table_{key}": value for key, value in table.items()}, images=images, records=records)


if __name__ == "__main__":
    main()
