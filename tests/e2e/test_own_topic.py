"""A stranger's topics in a real Kafka: `init` writes a config, `check --sample` reads them, and the learner learns all.

One pair of topics is JSON with nested objects; the other is Avro through a real schema registry.
"""

from __future__ import annotations

import io
import json
import logging
import random
import re
import shlex
import socket
import socketserver
import ssl
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fastavro
import pytest
from harness.registry import Registry, framed
from harness.secured import Authority
from support import ask, finish, start, stop, until
from typer.testing import CliRunner

from streamlearn.cli import app
from streamlearn.config import Config, load_config
from streamlearn.errors import ConfigError, LogError, LogUnavailableError, RegistryUnavailableError
from streamlearn.ledger import LabelState
from streamlearn.ledger.view import LedgerView
from streamlearn.log.kafka import KafkaLog
from streamlearn.log.settings import KafkaConfig
from streamlearn.records import NewRecord
from streamlearn.schema.registry import SchemaRegistry
from streamlearn.schema.settings import RegistryConfig
from streamlearn.state.paths import StatePaths

pytestmark = [pytest.mark.kafka, pytest.mark.slow, pytest.mark.timeout(300)]
ROWS, LABELLED = 1500, 300
DELAY_MS = 2 * 86_400_000
START_MS = int(time.time()) * 1000 - 4 * 86_400_000
"""Kafka's retention removes what is older than seven days, also by the producer's times."""
README = (Path(__file__).parent.parent.parent / "README.md").read_text()
QUIET = {"learn.threads": 1, "metrics.port": 0, "serve.port": 0, "batch.steps": 1}
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
    fill(log, "transactions", "chargebacks", nested, case)
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


def test_from_init_to_a_learner_without_an_edit(
    run: Callable[..., str], topics: str, registry: Registry, tmp_path: Path
) -> None:
    """Avro: the written config decodes all records, all labels join, and nothing is a dead letter."""
    out = tmp_path / "streamlearn.toml"
    settings = {**QUIET, "state.dir": tmp_path / "state", "log.dead_letters": "own-dead-letters"}
    options = [part for name, value in settings.items() for part in ("-s", f"{name}={value}")]
    kafka = ["--bootstrap-servers", topics, "--registry", registry.url]

    shown = run("init", "--samples", "own-avro", "--labels", "own-frauds", *kafka, "--out", out, *options)

    config = load_config(out, environ={})
    assert {name: column.kind for name, column in config.columns.items()} == {
        "merchant": "category", "amount": "number", "balance": "number", "card_present": "boolean",
        "created_at": "timestamp", "country": "category",
    }  # fmt: skip
    assert config.schema_.classes == ("not_fraud", "fraud")
    assert config.source.samples.id == config.source.labels.id == "transaction_id"
    assert not re.search(r"^(error|warning)", shown, re.MULTILINE)
    assert f"streamlearn check --config {out} --sample 500" in shown

    found = json.loads(run("check", "--config", out, "--sample", 400, "--json"))
    records = found["records"]
    assert not [each for each in found["findings"] if each["verdict"] == "error"]
    assert (records["samples"]["read"], records["samples"]["decoded"]) == (400, 400)
    assert (records["samples"]["held"], records["labels"]["held"]) == (ROWS, LABELLED)
    assert (records["labels"]["read"], records["labels"]["decoded"]) == (LABELLED, LABELLED)
    assert records["join"]["found"] > 20
    assert records["join"]["delay_s"]["50%"] == pytest.approx(DELAY_MS / 1000)
    assert [column["name"] for column in records["columns"]] == [*config.columns]
    assert records["samples"]["rate"] == pytest.approx(1 / 60, rel=0.01)

    finish("learn", "--until-end", "--config", out, timeout_s=200.0)
    check_learned(tmp_path / "state", config)
    check_answers_in_avro(out, topics, registry, tmp_path)


def check_answers_in_avro(config: Path, bootstrap: str, registry: Registry, folder: Path) -> None:
    """A scorer writes one record per sample; a foreign reader gets its schema from the registry."""
    options = {"source.predictions.topic": "own-answers", "source.predictions.format": "avro"}
    given = [part for name, value in options.items() for part in ("-s", f"{name}={value}")]
    log = KafkaLog(KafkaConfig(bootstrap_servers=bootstrap))
    scorer = start("score", "--config", config, *given, output=folder / "score.log")
    try:
        until(lambda: answers_held(log) >= ROWS, "an answer to each sample", 120.0)
    finally:
        assert stop(scorer) == 0, (folder / "score.log").read_text()
    values = [
        record.value or b""
        for partition in log.beginning_offsets("own-answers")
        for record in log.read(partition, 0, 2 * ROWS)
    ]
    log.close()
    (number,) = {int.from_bytes(value[1:5], "big") for value in values}
    with urllib.request.urlopen(f"{registry.url}/schemas/ids/{number}", timeout=10) as reply:
        schema = fastavro.parse_schema(json.loads(json.loads(reply.read())["schema"]))
    found = [fastavro.schemaless_reader(io.BytesIO(value[5:]), schema, None) for value in values]
    assert sorted(answer["id"] for answer in found) == [f"t-{n:06}" for n in range(ROWS)]
    assert {answer["class"] for answer in found} <= {"fraud", "not_fraud"}


def answers_held(log: KafkaLog) -> int:
    try:
        return sum(log.end_offsets("own-answers").values())
    except LogError:
        return 0


def test_the_readmes_commands(
    run: Callable[..., str], topics: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """JSON: `init`, `check`, `run` and `curl` as the README has them, but for addresses."""
    init, check, serve, curl = re.findall(
        r"^(?:\.venv/bin/streamlearn (?:init|check|run) .*|curl .*merchant.*)$", README, re.MULTILINE
    )
    monkeypatch.chdir(tmp_path)
    for name, value in {**QUIET, "serve.processes": 1, "log.kafka.bootstrap_servers": topics}.items():
        monkeypatch.setenv("STREAMLEARN_" + name.upper().replace(".", "__"), str(value))

    shown = run(*shlex.split(init.replace("127.0.0.1:9092", topics))[1:])
    config = load_config(Path("streamlearn.toml"))
    table = run(*shlex.split(check)[1:])
    daemon = start(*shlex.split(serve)[1:], output=tmp_path / "run.log")
    try:
        status = tmp_path / "streamlearn-state" / "learner.json"
        until(lambda: status.exists() and learned(status) == (ROWS, LABELLED), "all to be learned", 120.0)
        (address,) = re.findall(r"serving on (http://\S+)", (tmp_path / "run.log").read_text())
        until(lambda: ask(f"{address}/health/ready")[0] == 200, "a served teacher", 60.0)
        line = curl.replace("http://127.0.0.1:8080", address)
        answer = json.loads(subprocess.run(["bash", "-c", line], capture_output=True, check=True, timeout=60).stdout)
    finally:
        assert stop(daemon) == 0, (tmp_path / "run.log").read_text()

    assert {name: column.kind for name, column in config.columns.items()} == {
        "merchant": "category", "card_present": "boolean", "created_at": "timestamp", "money_amount": "number",
        "money_balance": "number",
    }  # fmt: skip
    assert (config.source.samples.id, config.source.labels.id) == ("transaction_id", "ref")
    assert set(config.schema_.classes) == {"chargeback", "fine"}
    assert "currency (always EUR)" in shown
    for expected in (
        r"^ok +samples: transactions: 3 partitions, 1,500 records; 500 read, 100.0% of them decode",
        r"^ok +ids: \d+ of 300 labels belong to the 500 samples read",
        r"^ok +label delay: by the log's time: min 2 d",
        r"^ok +rate: about 0.0167 samples/s",
        r"money_balance +number +0\.0% +\d+\.\d% +",
    ):
        assert re.search(expected, table, re.MULTILINE), (expected, table)
    assert answer["predictions"][0]["class"] in config.schema_.classes
    check_learned(tmp_path / "streamlearn-state", config)


def learned(status: Path) -> tuple[int, int]:
    accounts = json.loads(status.read_bytes()).get("accounts", {})
    return accounts.get("samples_learned", 0), accounts.get("labels_taken", 0)


def check_learned(state: Path, config: Config) -> None:
    """All samples were learned, all labels joined, and there are no dead letters."""
    accounts = json.loads((state / "learner.json").read_bytes())["accounts"]
    assert (accounts["samples_learned"], accounts["labels_taken"]) == (ROWS, LABELLED)
    assert (accounts["samples_dead_lettered"], accounts["labels_dead_lettered"]) == (0, 0)
    view = LedgerView(StatePaths(state).store, config.schema_.build())
    states = {view.get(f"t-{n:06}").state for n in labelled()}  # type: ignore[union-attr]
    view.close()
    assert states <= {LabelState.JOINED, LabelState.SCORED, LabelState.TRAINED}


class TlsProxy:
    """Ends TLS in front of a server, and asks clients for a certificate, as an ingress does. A context manager."""

    def __init__(self, target_port: int, authority: Authority) -> None:
        cert_file, key_file = authority.issue("registry")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(cert_file, key_file)
        context.load_verify_locations(authority.ca_file)
        context.verify_mode = ssl.CERT_REQUIRED

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                try:
                    with (
                        context.wrap_socket(self.request, server_side=True) as client,
                        socket.create_connection(("127.0.0.1", target_port)) as server,
                    ):
                        server.sendall(client.recv(65536))  # a GET is one segment
                        while data := server.recv(65536):
                            client.sendall(data)
                except OSError:
                    return  # the client has no certificate, or is gone

        self._server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]

    def __enter__(self) -> TlsProxy:
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def test_a_registry_behind_mutual_tls(registry: Registry, tmp_path: Path) -> None:
    """A real registry and a proxy that requires a client's certificate; without it the registry counts as away."""
    number = registry.register("tls-value", {"type": "record", "name": "Sale", "fields": FIELDS})
    ours, others = Authority(tmp_path / "ours"), Authority(tmp_path / "others")
    cert_file, key_file = ours.issue("learner")
    with TlsProxy(registry.port, ours) as proxy:
        given = {"url": f"https://127.0.0.1:{proxy.port}/apis/ccompat/v7", "ca_file": ours.ca_file}
        trusted = SchemaRegistry(RegistryConfig(**given, cert_file=cert_file, key_file=key_file))
        without = SchemaRegistry(RegistryConfig(**given))
        of_others = SchemaRegistry(
            RegistryConfig(**{**given, "ca_file": others.ca_file}, cert_file=cert_file, key_file=key_file)
        )

        assert json.loads(trusted.schema(number).text)["name"] == "Sale"
        with pytest.raises(RegistryUnavailableError):
            without.schema(number)
        with pytest.raises(RegistryUnavailableError, match="certificate verify failed"):
            of_others.schema(number)
