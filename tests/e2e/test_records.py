"""The daemon on the user's own records over HTTP: predicted, learned, labelled and scored, as processes."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from support import ask, heartbeat, start, stop, until

from streamlearn.lab.broker import free_port

CONFIG = """
[source.samples]
topic = "transactions"
id = "transaction_id"
time = "created_at"
time_unit = "ms"

[source.labels]
id = "transaction_id"
label = "is_fraud"
values = {{ true = "fraud", false = "legitimate" }}

[columns]
amount = "number"
merchant = {{ kind = "category", buckets = 64 }}
created_at = {{ kind = "timestamp", unit = "ms" }}
country = {{ kind = "category", from = "place.country", buckets = 16 }}

[schema]
classes = ["fraud", "legitimate"]

[model]
options = {{ hidden = [16] }}

[learn]
threads = 1

[batch]
fresh = 16
labelled = 16
max_age_s = 0.1

[log]
kind = "embedded"

[state]
dir = "{folder}/state"
publish_every_s = 0.2

[serve]
port = {port}
processes = 1

[metrics]
port = 0
"""
SAMPLES = 64


def transaction(number: int) -> dict[str, Any]:
    chosen = random.Random(number)
    return {
        "transaction_id": f"t{number}",
        "amount": "N/A" if number % 16 == 0 else chosen.uniform(1, 100),
        "merchant": chosen.choice("abc"),
        "created_at": 1_772_700_000_000 + number,
        "place": {"country": chosen.choice(("DE", "FR"))},
        "channel": "web",
    }


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    """Of `streamlearn run` on an empty log."""
    port = free_port("127.0.0.1")
    config = tmp_path / "streamlearn.toml"
    config.write_text(CONFIG.format(folder=tmp_path, port=port))
    process = start("run", "--config", config, output=tmp_path / "run.log")
    found = f"http://127.0.0.1:{port}"
    try:
        until(lambda: answers(found) or process.poll() is not None, "a server", 60.0)
        yield found
    finally:
        code = stop(process)
    assert code == 0, (tmp_path / "run.log").read_text()[-3000:]


def answers(url: str) -> bool:
    try:
        return ask(f"{url}/health/live")[0] == 200
    except OSError:
        return False


def metric(url: str, name: str, **labels: str) -> float:
    families = text_string_to_metric_families(ask(f"{url}/metrics")[1])
    samples = [sample for family in families for sample in family.samples if sample.name == f"streamlearn_{name}"]
    return sum(sample.value for sample in samples if labels.items() <= sample.labels.items())


def test_records_are_predicted_learned_labelled_and_scored(url: str, tmp_path: Path) -> None:
    """The id that a record has inside joins its label; the answer that a client got is the one that is scored."""
    records = [transaction(number) for number in range(SAMPLES)]

    sent = ask(f"{url}/sample", {"samples": records[SAMPLES // 2 :]})
    until(lambda: ask(f"{url}/health/ready")[0] == 200, "a first model")
    learned = [ask(f"{url}/predict?learn=1", record) for record in records[: SAMPLES // 2]]
    labels = [{"transaction_id": one["transaction_id"], "is_fraud": one["merchant"] == "a"} for one in records]
    labelled = ask(f"{url}/label", {"labels": labels})

    assert {status for status, _ in learned} == {200}
    assert [reply["predictions"][0].get("invalid") for _, reply in learned[:2]] == [["amount"], None]
    assert (sent[0], labelled[0]) == (202, 202)
    assert not any("error" in item for item in sent[1]["items"] + labelled[1]["items"])
    until(lambda: heartbeat(tmp_path).get("ledger", {}).get("trained") == SAMPLES, "all labels trained")
    status = heartbeat(tmp_path)
    assert status["accounts"]["samples_dead_lettered"] == status["accounts"]["labels_dead_lettered"] == 0
    state = ask(f"{url}/label/t1")[1]
    assert state["predicted_class"] == learned[1][1]["predictions"][0]["class"]
    assert state["model_version"] == learned[1][1]["model_version"]
    assert metric(url, "column_values_total", column="amount", outcome="invalid") == SAMPLES // 16
    assert metric(url, "unknown_fields_total") == SAMPLES
    stored = ask(f"{url}/sample/t1")[1]
    assert stored["fields"]["amount"] == pytest.approx(records[1]["amount"])
    assert ask(f"{url}/predict", {"ids": ["t1"]})[0] == 200
    assert ask(f"{url}/schema")[1]["samples"]["topic"] == "transactions"
