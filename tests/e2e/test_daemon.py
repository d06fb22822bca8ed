"""The whole daemon as processes: learner, servers, producers. On both logs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families
from support import Forked, ask, finish, heartbeat, start, stop, until, write_config

from streamlearn.lab.broker import free_port
from streamlearn.lab.datasets import load

JSON = {"content-type": "application/json"}


@dataclass
class Running:
    """A running daemon."""

    folder: Path
    config: Path
    url: str
    process: Forked
    prefix: str
    bootstrap: str

    def heartbeat(self) -> dict[str, Any]:
        return heartbeat(self.folder)

    def accounts(self) -> dict[str, int]:
        found: dict[str, int] = self.heartbeat().get("accounts", {})
        return found

    def learned(self, samples: int) -> bool:
        status = self.heartbeat()
        return status.get("accounts", {}).get("samples_read", 0) >= samples and status.get("lag_records") == 0


@pytest.fixture(params=["embedded", pytest.param("kafka", marks=pytest.mark.kafka)])
def daemon(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Running]:
    """`streamlearn run` on an empty log."""
    bootstrap = request.getfixturevalue("kafka_broker") if request.param == "kafka" else "127.0.0.1:1"
    prefix, port = f"daemon-{uuid.uuid4().hex[:8]}-", free_port("127.0.0.1")
    settings = {"kind": request.param, "bootstrap": bootstrap, "prefix": prefix, "partitions": 2, "port": port}
    config = write_config(tmp_path, **settings)
    process = start("run", "--config", config, output=tmp_path / "run.log")
    url = f"http://127.0.0.1:{port}"
    try:
        until(lambda: reachable(url) or process.poll() is not None, "a server", 60.0)
        yield Running(tmp_path, config, url, process, prefix, bootstrap)
    finally:
        code = stop(process)
    assert code == 0, (tmp_path / "run.log").read_text()[-3000:]


def reachable(url: str) -> bool:
    try:
        return ask(f"{url}/health/live")[0] == 200
    except OSError:
        return False


def metric(url: str, name: str, **labels: str) -> float:
    """The value of one series in /metrics."""
    _, text = ask(f"{url}/metrics")
    for family in text_string_to_metric_families(text):
        for series in family.samples:
            if series.name == name and labels.items() <= series.labels.items():
                return float(series.value)
    raise AssertionError(f"{name} {labels} is not in /metrics")


def test_a_daemon_learns_serves_takes_labels_and_accounts_for_all_records(daemon: Running) -> None:
    """From an empty log to the metrics.

    503 before the first teacher; answers and versions change while it learns; labels sent by HTTP are learned, also for
    a sample of /predict; an invalid sample is refused; /metrics agrees with the accounts.
    """
    status, body = ask(f"{daemon.url}/predict", {"instances": [[0] * 64]})
    assert (status, body["error"]["code"]) == (503, "not_published")

    plan = ("digits", "--limit", 640, "--label-share", 0.3, "--label-delay", "geometric:50")
    finish("simulate", *plan, "--config", daemon.config)
    until(lambda: daemon.learned(640), "the stream to be learned")
    until(lambda: ask(f"{daemon.url}/health/ready")[0] == 200, "a served teacher")

    # The answer and its version change while it learns.
    x = load("digits").test_x
    assert x is not None
    status, first = ask(f"{daemon.url}/predict", {"instances": [x[0].ravel().tolist()]})
    assert status == 200
    assert sum(first["predictions"][0]["probabilities"]) == pytest.approx(1.0, abs=1e-3)
    finish("simulate", *plan, "--seed", 5, "--id-prefix", "digits-", "--config", daemon.config, "--passes", 2)
    until(lambda: daemon.learned(640 + 640), "duplicates to be read")

    def served() -> Any:
        return ask(f"{daemon.url}/predict", {"instances": [x[0].ravel().tolist()]})[1]

    until(lambda: served()["model_version"] > first["model_version"], "a newer teacher")
    assert served()["predictions"][0]["probabilities"] != first["predictions"][0]["probabilities"]

    # A sample predicted and learned in one call, then labelled.
    status, answer = ask(f"{daemon.url}/predict", {"id": "mine", "x": x[1].ravel().tolist(), "learn": True})
    assert status == 200, answer
    status, labelled = ask(f"{daemon.url}/label", {"id": "mine", "label": "3"})
    assert status == 202, labelled

    def label_status() -> Any:
        return ask(f"{daemon.url}/label/mine")

    until(lambda: label_status()[0] == 200 and label_status()[1].get("first_trained_step"), "the label to be learned")
    assert label_status()[1]["predicted_class"] in (
        answer["predictions"][0]["class"],
        answer["predictions"][0]["class_index"],
    )

    # Stored samples by id; raw bodies.
    status, by_id = ask(f"{daemon.url}/predict", {"ids": ["mine", "digits-7"]})
    assert (status, len(by_id["predictions"])) == (200, 2)
    status, raw = ask(f"{daemon.url}/predict", x[:3].tobytes(), {"content-type": "application/octet-stream"})
    assert (status, len(raw["predictions"])) == (200, 3)

    # An invalid sample is refused.
    accounts = until(lambda: (a := daemon.accounts())["samples_read"] == 1920 + 1 and a, "the last sample")
    status, _ = ask(f"{daemon.url}/sample", {"id": "bad", "x": [1, 2, 3]})
    assert status == 422
    counted = {"process": "learner", "topic": "samples", "outcome": "learned"}
    assert accounts["samples_learned"] == 1280 + 1, "both passes, and one from /predict"
    assert metric(daemon.url, "streamlearn_records_total", **counted) == accounts["samples_learned"]
    assert metric(daemon.url, "streamlearn_published_step", process="learner") > 0
    assert metric(daemon.url, "streamlearn_model_version", process="server-0") > 0
    read = accounts["samples_read"]
    assert read == accounts["samples_learned"] + accounts["samples_duplicate_id"] + accounts["samples_dead_lettered"]


def test_a_killed_learner_leaves_serving_up_and_loses_no_acknowledged_label(daemon: Running) -> None:
    """SIGKILL to the learner while labels are posted: serving continues, it is restarted, every label is joined."""
    finish("simulate", "digits", "--limit", 320, "--label-share", 0, "--config", daemon.config)
    until(lambda: daemon.learned(320), "the stream to be learned")
    until(lambda: ask(f"{daemon.url}/health/ready")[0] == 200, "a served teacher")
    pid = daemon.heartbeat()["pid"]

    for n in range(20):
        if n == 10:
            os.kill(pid, signal.SIGKILL)
        status, _ = ask(f"{daemon.url}/label", {"labels": [{"id": f"digits-{n}", "label": n % 10}]})
        assert status == 202
        assert ask(f"{daemon.url}/predict", {"instances": [[0] * 64]})[0] == 200

    until(lambda: daemon.heartbeat().get("pid") != pid, "a new learner")
    until(lambda: daemon.heartbeat().get("ledger", {}).get("joined") == 20, "all labels joined")
    for n in range(20):
        assert ask(f"{daemon.url}/label/digits-{n}")[1]["class_index"] == n % 10


def test_a_server_starts_and_predicts_without_the_log(tmp_path: Path) -> None:
    """A label is refused with 503."""
    port = free_port("127.0.0.1")
    unreachable = write_config(tmp_path, kind="kafka", bootstrap=f"127.0.0.1:{free_port('127.0.0.1')}", port=port)
    here = write_config(tmp_path / "here", kind="embedded")
    finish("simulate", "digits", "--limit", 64, "--label-share", 0, "--config", here)
    finish("learn", "--until-end", "--config", here)
    shutil.copytree(tmp_path / "here" / "state", tmp_path / "state")
    server = start("serve", "--config", unreachable, "-s", "serve.timeout_s=1", output=tmp_path / "server.log")
    try:
        url = f"http://127.0.0.1:{port}"
        until(lambda: reachable(url), "a server", 60.0)
        assert ask(f"{url}/predict", {"instances": [[0] * 64]})[0] == 200
        status, body = ask(f"{url}/label", {"id": "digits-1", "label": 1})
        assert (status, body["error"]["code"]) == (503, "log_unavailable")
    finally:
        assert stop(server) == 0


@pytest.mark.kafka
def test_records_of_a_foreign_client_are_read(kafka_broker: str, tmp_path: Path) -> None:
    """JSON samples and plain labels from kcat: valid ones are learned, invalid ones dead letters, a new class held."""
    if shutil.which("kcat") is None:
        pytest.skip("kcat is not installed: apt-get install kcat")
    prefix = f"kcat-{uuid.uuid4().hex[:8]}-"
    config = write_config(tmp_path, kind="kafka", bootstrap=kafka_broker, prefix=prefix, partitions=2)
    finish("simulate", "digits", "--limit", 32, "--label-share", 0, "--config", config)
    rng = np.random.default_rng(0)
    samples = [
        f"kcat-{n}\t" + json.dumps({"x": rng.integers(0, 17, 63 if n % 10 == 0 else 64).tolist()}) for n in range(100)
    ]
    labels = [f"kcat-{n}\t{n % 10}" for n in range(1, 10)] + ["kcat-11\tzebra"]
    for topic, lines in (("samples", samples), ("labels", labels)):
        flags = ["-P", "-b", kafka_broker, "-t", prefix + topic, "-K", "\t", "-X", "topic.partitioner=murmur2_random"]
        subprocess.run(["kcat", *flags], input="\n".join(lines).encode(), check=True)

    finish("learn", "--until-end", "--config", config)
    status = heartbeat(tmp_path)
    letters = [
        json.loads(line)
        for line in finish("inspect", f"{prefix}dead-letters", "-c", config, "--count", 50).splitlines()
    ]

    assert status["accounts"]["samples_learned"] == 32 + 90
    assert status["accounts"]["samples_dead_lettered"] == 10
    assert (status["accounts"]["labels_read"], status["ledger"]["joined"]) == (10, 9)
    assert status["held_classes"] == {"zebra": 1}
    assert [letter["reason"] for letter in letters] == ["bad_shape"] * 10
