"""`streamlearn check`: each verdict, in bounded time; nothing is changed."""

from __future__ import annotations

import shutil
import threading
import time
from pathlib import Path

import pytest
import torch

from streamlearn.app.build import identity
from streamlearn.app.check import check
from streamlearn.app.findings import Finding
from streamlearn.app.learner import learn
from streamlearn.app.log import open_log
from streamlearn.app.ports import listen
from streamlearn.config import Config, load_config
from streamlearn.log import kafka_clients
from streamlearn.log.base import Log
from streamlearn.records import NewRecord, TopicPartition
from streamlearn.state.checkpoint import Checkpoint, path_of, save_checkpoint
from streamlearn.state.journal import Journal
from streamlearn.state.paths import StatePaths

S, L = TopicPartition("samples", 0), TopicPartition("labels", 0)


def config_in(folder: Path, **overrides: object) -> Config:
    settings = {
        "state.dir": str(folder / "state"),
        "schema.shape": [4],
        "schema.classes": 3,
        "model.options": {"hidden": [8]},
        "serve.port": 0,
        "learn.device": "cpu",
    }
    return load_config(environ={}, overrides={**settings, **overrides})


def found(config: Config) -> dict[str, Finding]:
    return {finding.subject: finding for finding in check(config)}


def with_topics(config: Config, **partitions: int) -> Log:
    log = open_log(config)
    log.create_topics({"samples": 1, "labels": 1, "dead-letters": 1} | partitions)
    return log


def save(config: Config, step: int, next_offset: int) -> Path:
    folder = StatePaths(config.state.dir).checkpoints
    folder.mkdir(parents=True, exist_ok=True)
    save_checkpoint(folder, Checkpoint(step, {S: next_offset, L: 0}, {}, {"identity": identity(config)}))
    return path_of(folder, step)


class TestEmpty:
    def test_a_new_folder_is_ok_and_is_not_created(self, tmp_path: Path) -> None:
        """Nothing is changed."""
        config = config_in(tmp_path)

        findings = found(config)

        assert {finding.verdict for subject, finding in findings.items() if subject != "disk"} == {"ok"}
        assert set(findings) >= {"model", "device", "log", "disk", "port"}
        assert list(tmp_path.iterdir()) == []


class TestModel:
    def test_is_built_and_counted(self, tmp_path: Path) -> None:
        """Factory, shape and classes: 4, and their squares, to 8 to 3, with biases."""
        text = found(config_in(tmp_path, **{"model.normalise": False}))["model"].text

        assert text == f"mlp: 4 to 3 classes, {2 * 4 * 8 + 8 + 8 * 3 + 3} parameters"

    @pytest.mark.parametrize("factory", ["perceptron", "no.such.module:factory", "json:dumps"])
    def test_one_that_cannot_be_built_is_an_error(self, tmp_path: Path, factory: str) -> None:
        """The rest is checked nevertheless."""
        findings = found(config_in(tmp_path, **{"model.factory": factory, "model.options": {}}))

        assert findings["model"].verdict == "error"
        assert factory.partition(":")[0] in findings["model"].text
        assert findings["port"].verdict == "ok"

    def test_a_missing_device_is_an_error(self, tmp_path: Path) -> None:
        """On a machine without CUDA."""
        finding = found(config_in(tmp_path, **{"learn.device": "cuda"}))["device"]

        assert finding.verdict == ("ok" if torch.cuda.is_available() else "error")

    @pytest.mark.parametrize(
        ("settings", "expected"),
        [
            ({"learn.noise": "no.such:thing"}, "no.such"),
            ({"learn.method": "dsne", "learn.options.source_path": "nowhere.npz"}, "nowhere.npz"),
        ],
    )
    def test_what_the_method_needs_is_checked(self, tmp_path: Path, settings: dict[str, object], expected: str) -> None:
        """Else the learner would fail at its start."""
        finding = found(config_in(tmp_path, **settings))["method"]

        assert finding.verdict == "error"
        assert expected in finding.text


class TestLog:
    def test_topics_are_listed(self, tmp_path: Path) -> None:
        """With their partitions and records."""
        config = config_in(tmp_path)
        log = with_topics(config, samples=2, labels=2)
        log.append("samples", [NewRecord(b"%d" % n, b"x") for n in range(1234)])
        log.close()

        findings = found(config)

        assert findings["topic samples"] == Finding("ok", "topic samples", "2 partitions, 1,234 records")
        assert findings["topic dead-letters"].text == "1 partitions, 0 records"

    @pytest.mark.parametrize(("partitions", "verdict"), [(1, "ok"), (0, "error")])
    def test_a_missing_topic_is_an_error_if_none_may_be_created(
        self, tmp_path: Path, partitions: int, verdict: str
    ) -> None:
        """Otherwise it will be created."""
        config = config_in(tmp_path, **{"log.partitions": partitions})
        log = open_log(config)
        log.create_topics({"samples": 1, "labels": 1})
        log.close()

        findings = found(config)

        assert findings["topic dead-letters"].verdict == verdict
        assert findings["topic samples"].verdict == "ok"

    def test_a_missing_topic_may_be_a_misspelt_one(self, tmp_path: Path) -> None:
        """It would be created, and stay empty."""
        config = config_in(tmp_path, **{"source.samples.topic": "payment"})
        log = open_log(config)
        log.create_topics({"payments": 1, "labels": 1})
        log.close()

        finding = found(config)["topic payment"]

        assert (finding.verdict, finding.text) == ("warning", "missing; will be created; did you mean payments?")

    def test_a_file_that_is_no_log_is_an_error(self, tmp_path: Path) -> None:
        """The file is left unchanged."""
        config = config_in(tmp_path)
        path = StatePaths(config.state.dir).log
        path.parent.mkdir(parents=True)
        path.write_bytes(b"something else " * 100)

        finding = found(config)["log"]

        assert finding.verdict == "error"
        assert str(path) in finding.text
        assert path.read_bytes() == b"something else " * 100

    @pytest.mark.slow
    def test_an_unavailable_broker_is_an_error_in_bounded_time(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """With its address. Folder and port are checked nevertheless."""
        monkeypatch.setattr(kafka_clients, "CONNECT_TIMEOUT_S", 1.0)
        servers = "127.0.0.1:1"
        config = config_in(tmp_path, **{"log.kind": "kafka", "log.kafka.bootstrap_servers": servers})

        began_s = time.monotonic()
        findings = found(config)

        assert time.monotonic() - began_s < 9.0
        assert findings["log"].verdict == "error"
        assert servers in findings["log"].text
        assert findings["port"].verdict == "ok"

    def test_a_retention_below_the_label_horizon_is_a_warning(self, tmp_path: Path) -> None:
        """It follows from the settings, so no log is needed."""
        findings = found(config_in(tmp_path, **{"labels.horizon_s": 40 * 86400.0}))

        assert findings["retention"].verdict == "warning"
        assert "keeps 30 days, labels are awaited for 40" in findings["retention"].text


class TestCheckpoint:
    @pytest.mark.parametrize(("payload", "verdict"), [("raw", "error"), ("json", "warning")])
    def test_a_sample_that_is_larger_than_a_record_is_reported(
        self, tmp_path: Path, payload: str, verdict: str
    ) -> None:
        """Every sample would be refused."""
        report = found(
            config_in(tmp_path, **{"source.samples.format": payload, "log.max_record_bytes": 64, "schema.shape": [17]})
        )

        assert report["record size"].verdict == verdict
        assert "log.max_record_bytes = 64" in report["record size"].text

    def test_a_valid_one_within_the_log_is_ok(self, tmp_path: Path) -> None:
        """With its step and the number of checkpoints."""
        config = config_in(tmp_path)
        with_topics(config).close()
        save(config, 5, 0)
        save(config, 7, 0)

        assert found(config)["checkpoint"] == Finding("ok", "checkpoint", "step 7, 2 kept, digest matches")

    def test_what_the_learner_would_miss_is_an_error(self, tmp_path: Path) -> None:
        """A folder in which something was deleted: log, store, or a part of the journal. With the way out."""
        config = config_in(tmp_path, **{"log.kind": "embedded"})
        learn(config, threading.Event(), until_end=True)
        paths = StatePaths(config.state.dir)
        whole = found(config)
        assert [whole[name].verdict for name in ("journal", "store")] == ["ok", "ok"]

        save(config, 5, 0)
        assert found(config)["store"].text.startswith("the store ends at step 0, the checkpoint is at 5")
        steps = Journal(paths.journal)
        steps.append(7, {S: 0, L: 0})
        steps.close()
        assert "expected step 6, found 7: steps are missing" in found(config)["journal"].text
        shutil.rmtree(paths.log.parent)
        assert "step 5 was learned from it; restore it, or" in found(config)["log"].text
        errors = {finding.subject for finding in check(config) if finding.verdict == "error"}
        assert errors == {"log"}

    def test_a_corrupt_newest_is_an_error_and_is_kept(self, tmp_path: Path) -> None:
        """The learner would fall back to the one before. Here nothing is set aside."""
        config = config_in(tmp_path)
        with_topics(config).close()
        save(config, 5, 0)
        newest = save(config, 7, 0)
        newest.write_bytes(newest.read_bytes()[:-1])

        finding = found(config)["checkpoint"]

        assert finding.verdict == "error"
        assert "torn or corrupt" in finding.text
        assert newest.exists()

    def test_another_log_is_an_error(self, tmp_path: Path) -> None:
        """It ends before the records that were learned."""
        config = config_in(tmp_path)
        with_topics(config).close()
        save(config, 5, 3)

        finding = found(config)["checkpoint"]

        assert finding.verdict == "error"
        assert "samples[0] ends at 0, and 3 records of it were learned" in finding.text

    @pytest.mark.parametrize(("policy", "verdict"), [("stop", "error"), ("skip", "warning")])
    def test_records_trimmed_after_it_are_reported(self, tmp_path: Path, policy: str, verdict: str) -> None:
        """By partition. It is an error if the learner would stop."""
        config = config_in(tmp_path, **{"log.max_bytes": 1 << 20, "log.on_trimmed": policy})
        log = with_topics(config)
        for _ in range(30):
            log.append("samples", [NewRecord(b"k", bytes(100_000))])
        (beginning,) = log.beginning_offsets("samples").values()
        log.close()
        save(config, 5, 3)

        finding = found(config)["retention"]

        assert beginning > 3
        assert finding.verdict == verdict
        assert f"samples[0]: {beginning - 3} records after the checkpoint were trimmed" in finding.text

    def test_one_that_starts_where_the_log_starts_misses_nothing(self, tmp_path: Path) -> None:
        """The boundary."""
        config = config_in(tmp_path, **{"log.max_bytes": 1 << 20})
        log = with_topics(config)
        for _ in range(30):
            log.append("samples", [NewRecord(b"k", bytes(100_000))])
        (beginning,) = log.beginning_offsets("samples").values()
        log.close()
        save(config, 5, beginning)

        assert "retention" not in found(config)


class TestMachine:
    def test_an_impossible_state_folder_is_an_error(self, tmp_path: Path) -> None:
        """There is a file of its name."""
        (tmp_path / "state").write_text("")

        finding = found(config_in(tmp_path))["state"]

        assert finding.verdict == "error"
        assert str(tmp_path / "state") in finding.text

    def test_bounds_above_the_free_disk_space_are_a_warning(self, tmp_path: Path) -> None:
        """Long before the disk is full."""
        bounds = {"labels.payload_max_bytes": 1 << 60}

        assert found(config_in(tmp_path, **bounds))["disk"].verdict == "warning"
        small = {
            "labels.payload_max_bytes": 1 << 16,
            "log.max_bytes": 1 << 20,
        }
        assert found(config_in(tmp_path, **small))["disk"].verdict == "ok"

    def test_a_taken_port_is_a_warning(self, tmp_path: Path) -> None:
        """The daemon itself may be running."""
        with listen(config_in(tmp_path)) as taken:
            port = taken.getsockname()[1]

            finding = found(config_in(tmp_path, **{"serve.port": port}))["port"]

        assert finding.verdict == "warning"
        assert f"serve.port = {port}" in finding.text

    def test_one_port_for_both_is_an_error(self, tmp_path: Path) -> None:
        """Although the port is free."""
        assert found(config_in(tmp_path, **{"serve.port": 19999, "metrics.port": 19999}))["port"].verdict == "error"

    def test_a_taken_port_of_the_learners_metrics_is_a_warning(self, tmp_path: Path) -> None:
        """The learner would fail at its start, and the servers would be stopped."""
        with listen(config_in(tmp_path)) as taken:
            port = taken.getsockname()[1]

            findings = found(config_in(tmp_path, **{"metrics.port": port}))

        assert findings["metrics port"].verdict == "warning"
        assert f"metrics.port = {port}" in findings["metrics port"].text

    def test_a_token_is_mentioned(self, tmp_path: Path) -> None:
        """Its value is not shown."""
        guarded = found(config_in(tmp_path, **{"serve.token": "sesame"}))["port"]

        assert guarded.text.endswith("is free, with a token")
        assert "sesame" not in guarded.text
        assert found(config_in(tmp_path))["port"].text.endswith("without a token")


class TestMemory:
    def test_each_part_is_listed(self, tmp_path: Path) -> None:
        """With the number of rows, if their bytes are the bound."""
        config = config_in(tmp_path, **{"schema.shape": [3, 224, 224], "schema.dtype": "float32"})

        assert "replay buffer (891 of 5,000 rows) 0.50" in found(config)["learner memory"].text
        assert "Python and torch 0." in found(config)["server memory"].text

    def test_scorers_are_counted_where_they_run(self, tmp_path: Path) -> None:
        """Their topic is reported too."""
        findings = found(config_in(tmp_path, **{"source.predictions.topic": "answers"}))

        assert "Python and torch 0." in findings["scorer memory"].text
        assert "servers and 1 scorers" in findings["memory"].text
        assert "scorer memory" not in found(config_in(tmp_path))

    def test_more_memory_than_installed_is_a_warning(self, tmp_path: Path) -> None:
        """Before the kernel kills the process."""
        config = config_in(tmp_path, **{"schema.shape": [3, 256, 256], "batch.fresh": 65536})

        assert found(config)["memory"].verdict == "warning"
        assert found(config_in(tmp_path))["memory"].verdict == "ok"
