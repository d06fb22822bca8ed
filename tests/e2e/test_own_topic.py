"""A stranger's topics in a real Kafka: `init` writes a config, `check --sample` reads them, and the learner learns all.

One pair of topics is JSON with nested objects; the other is Avro through a real schema registry.
"""

from __future__ import annotations

import io
import json
import logging
import random
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fastavro
import pytest
from harness.registry import Registry, framed
from support import finish, heartbeat
from typer.testing import CliRunner

from streamlearn.cli import app
from streamlearn.config import load_config
from streamlearn.errors import ConfigError, LogUnavailableError
from streamlearn.ledger import LabelState
from streamlearn.ledger.view import LedgerView
from streamlearn.log.kafka import KafkaLog
from streamlearn.log.settings import KafkaConfig
from streamlearn.records import NewRecord
from streamlearn.state.paths import StatePaths

pytestmark = [pytest.mark.kafka, pytest.mark.slow, pytest.mark.timeout(300)]
ROWS, LABELLED = 1500, 300
START_MS, DELAY_MS = 1_772_700_000_000, 2 * 86_400_000
FIELDS: list[dict[str, Any]] = [
    {"name": "transaction_id", "type": "string"},
    {"name": "merchant", "type": "string"},
    {"name": "amount", "type": "double"},
    {"name": "balance", "type": ["null", "double"], "default": None},
    {"name": "card_present", "type": "boolean"},
    {"name": "created_at", "type": {"type": "long", "logicalType": "timestamp-millis"}},
]
ADDED = {"name": "country", "type": ["null", "string"], "default": None}


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    started = Registry(tmp_path_factory.mktemp("registry"))
    try:
        started.start()
    except (ConfigError, LogUnavailableError) as error:
        pytest.skip(f"no schema registry: {error}")
    yield started
    started.stop()


def row(n: int) -> dict[str, Any]:
    rng = random.Random(n)
    return {
        "transaction_id": f"t-{n:06}",
        "merchant": f"m{int(rng.paretovariate(0.9)) % 800}",
        "amount": round(rng.lognormvariate(3, 1), 2),
        "balance": None if rng.random() < 0.2 else round(rng.gauss(2000, 900), 2),
        "card_present": rng.random() < 0.6,
        "created_at": START_MS + n * 60_000,
    }


def is_fraud(n: int) -> bool:
    return row(n)["amount"] > 40.0 or random.Random(-n).random() < 0.1


def labelled() -> list[int]:
    return sorted(random.Random(1).sample(range(ROWS), LABELLED))


def fill(log: KafkaLog, samples: str, labels: str, sample: Any, label: Any) -> None:
    """Samples keyed by customer, labels of some of them two days later, without a key."""
    log.create_topics({samples: 3})
    log.create_topics({labels: 2})
    log.append(
        samples,
        [NewRecord(b"customer-%d" % (n % 70), sample(n), (), START_MS + n * 60_000) for n in range(ROWS)],
        timeout_s=60.0,
    )
    log.append(
        labels,
        [NewRecord(b"%d" % (n % 7), label(n), (), START_MS + n * 60_000 + DELAY_MS) for n in labelled()],
        timeout_s=60.0,
    )


@pytest.fixture(scope="module")
def topics(kafka_broker: str, registry: Registry) -> str:
    """Fill all four; the address of Kafka."""
    log = KafkaLog(KafkaConfig(bootstrap_servers=kafka_broker))
    schemas = [{"type": "record", "name": "Sale", "fields": each} for each in (FIELDS, [*FIELDS, ADDED])]
    numbers = [registry.register("own-avro-value", schema) for schema in schemas]
    parsed = [fastavro.parse_schema(schema) for schema in schemas]

    def avro(n: int) -> bytes:
        body, late = io.BytesIO(), int(n >= ROWS // 2)
        fastavro.schemaless_writer(body, parsed[late], {**row(n), "country": f"c{n % 9}"})
        return framed(numbers[late], body.getvalue())

    def nested(n: int) -> bytes:
        found = row(n)
        money = {name: str(found.pop(name)) if found[name] is not None else "N/A" for name in ("amount", "balance")}
        return json.dumps({**found, "money": money, "currency": "EUR", "tags": ["a"] * (n % 3)}).encode()

    def fraud(n: int) -> bytes:
        return json.dumps({"transaction_id": f"t-{n:06}", "is_fraud": is_fraud(n)}).encode()

    def case(n: int) -> bytes:
        return json.dumps(
            {"ref": f"t-{n:06}", "label": "chargeback" if is_fraud(n) else "fine", "team": n % 4}
        ).encode()

    fill(log, "own-avro", "own-frauds", avro, fraud)
    fill(log, "own-json", "own-cases", nested, case)
    log.close()
    return kafka_broker


@pytest.fixture
def run() -> Iterator[Callable[..., str]]:
    """A command in this process, so that torch is imported once; its stdout."""
    root = logging.getLogger()
    handlers, level, hook = root.handlers[:], root.level, threading.excepthook

    def run_it(*arguments: object) -> str:
        done = CliRunner().invoke(app, [*map(str, arguments)])
        assert done.exit_code == 0, (done.output, done.exception)
        return done.stdout

    yield run_it
    root.handlers[:], threading.excepthook = handlers, hook
    root.setLevel(level)


@pytest.mark.parametrize(
    ("samples", "labels", "columns", "classes"),
    [
        (
            "own-avro", "own-frauds",
            {"merchant": "category", "amount": "number", "balance": "number", "card_present": "boolean",
             "created_at": "timestamp", "country": "category"},
            ("not_fraud", "fraud"),
        ),
        (
            "own-json", "own-cases",
            {"merchant": "category", "card_present": "boolean", "created_at": "timestamp", "money_amount": "number",
             "money_balance": "number"},
            None,
        ),
    ],
    ids=["avro", "json"],
)  # fmt: skip
def test_from_init_to_a_learner_without_an_edit(
    run: Callable[..., str],
    *,
    topics: str,
    registry: Registry,
    tmp_path: Path,
    samples: str,
    labels: str,
    columns: Any,
    classes: Any,
) -> None:
    """The written config decodes all records, all labels join, and nothing is a dead letter."""
    out = tmp_path / "streamlearn.toml"
    settings = ["learn.threads=1", "metrics.port=0", "serve.port=0", "batch.steps=1"]
    settings += [f"state.dir={tmp_path / 'state'}", f"log.dead_letters={samples}-dead-letters"]
    options = [part for each in settings for part in ("-s", each)]
    if samples == "own-avro":
        options += ["--registry", registry.url]
    kafka = ["--bootstrap-servers", topics]

    shown = run("init", "--samples", samples, "--labels", labels, *kafka, "--out", out, *options)

    config = load_config(out, environ={})
    assert {name: column.kind for name, column in config.columns.items()} == columns
    assert classes is None or config.schema_.classes == classes
    assert config.source.samples.id == "transaction_id"
    assert not re.search(r"^error", shown, re.MULTILINE)
    assert "100.0% of them decode" in shown
    assert f"streamlearn check --config {out} --sample 500" in shown

    found = json.loads(run("check", "--config", out, "--sample", 400, "--json"))
    records = found["records"]
    assert not [each for each in found["findings"] if each["verdict"] == "error"]
    assert (records["samples"]["read"], records["samples"]["decoded"]) == (400, 400)
    assert (records["samples"]["held"], records["labels"]["held"]) == (ROWS, LABELLED)
    assert (records["labels"]["read"], records["labels"]["decoded"]) == (LABELLED, LABELLED)
    assert records["join"]["found"] > 20
    assert records["join"]["delay_s"]["50%"] == pytest.approx(DELAY_MS / 1000)
    assert [column["name"] for column in records["columns"]] == [*columns]
    assert records["samples"]["rate"] == pytest.approx(1 / 60, rel=0.01)

    finish("learn", "--until-end", "--config", out, timeout_s=200.0)
    accounts = heartbeat(tmp_path)["accounts"]
    assert (accounts["samples_learned"], accounts["labels_taken"]) == (ROWS, LABELLED)
    assert (accounts["samples_dead_lettered"], accounts["labels_dead_lettered"]) == (0, 0)
    view = LedgerView(StatePaths(config.state.dir).store, config.schema_.build())
    states = {view.get(f"t-{n:06}").state for n in labelled()}  # type: ignore[union-attr]
    view.close()
    assert states <= {LabelState.JOINED, LabelState.TRAINED}

    shown = run("check", "--config", out, "--sample", 300)
    for line in (
        rf"^ok +samples: {samples}: 3 partitions, 1,500 records; 300 read, 100.0% of them decode",
        r"^ok +ids: \d+ of 300 labels belong to the 300 samples read",
        r"^ok +label delay: by the log's time: min 2 d",
        r"^ok +rate: about 0.0167 samples/s",
        r"balance +number +\d+\.\d% +\d+\.\d%",
    ):
        assert re.search(line, shown, re.MULTILINE), (line, shown)
