"""Predictions as a stream, with real processes: exactly once through SIGKILL of scorer, learner and broker."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from harness.stream_out import run
from support import finish, heartbeat, start, stop, until, write_config

from streamlearn.app.log import make_codec, open_log
from streamlearn.config import load_config
from streamlearn.records import Record, TopicPartition
from streamlearn.state.status import read_status


@pytest.mark.kafka
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_sample_is_answered_once_while_everything_is_killed(tmp_path: Path) -> None:
    """As a foreign client reads it: all ids, none twice, each with the version of a published teacher."""
    report = run(tmp_path, ["scorer", "broker", "learner"], seconds=12.0, rate=100.0, short=True)

    assert (report.lost, report.duplicates, report.without_version, report.foreign) == (0, 0, 0, 0)
    assert sum(report.kills.values()) == 3
    assert report.sent >= 1200
    assert report.versions >= 2


class TestEmbedded:
    def test_a_scorer_next_to_the_daemon_and_alone(self, tmp_path: Path) -> None:
        """`run` starts it; `score` alone answers from the last teacher, without a learner."""
        config = write_config(tmp_path)
        config.write_text(config.read_text().replace("[source]\n", '[source]\npredictions.topic = "predictions"\n'))
        log, card = open_log(load_config(config)), tmp_path / "state" / "processes" / "scorer-0.json"

        def ids() -> list[str]:
            read = log.read(TopicPartition("predictions", 0), 0, 10_000) if log.partition_count("predictions") else []
            return [json.loads(record.value or b"")["id"] for record in read]

        plan = ("simulate", "digits", "--label-share", 0.1, "--config", config)
        daemon = start("run", "--config", config, output=tmp_path / "run.log")
        try:
            finish(*plan, "--limit", 300)
            until(lambda: len(ids()) >= 300, "predictions", 60.0)
            until(lambda: (read_status(card) or {}).get("state") == "scoring", "a heartbeat")
        finally:
            assert stop(daemon) == 0
        finish(*plan, "--limit", 200, "--id-prefix", "later")
        alone = start("score", "--config", config, output=tmp_path / "score.log")
        try:
            until(lambda: len(ids()) >= 500, "predictions without a learner", 60.0)
        finally:
            assert stop(alone) == 0

        assert (read_status(card) or {})["state"] == "stopped"
        assert len(ids()) == len(set(ids())) == 500
        log.close()

    def test_the_learner_scores_what_was_published(self, tmp_path: Path) -> None:
        """On the embedded log."""
        assert_scores_what_was_published(tmp_path, write_config(tmp_path), "")


def assert_scores_what_was_published(folder: Path, config: Path, prefix: str) -> None:
    """The accuracy of the learner is that of the predictions topic, where answers came before labels."""
    settings = config.read_text().replace("[source]\n", f'[source]\npredictions.topic = "{prefix}predictions"\n')
    config.write_text(settings + "[score]\nwindow = 200\n")
    loaded = load_config(config)
    codec, log = make_codec(loaded), open_log(loaded)

    def read(topic: str) -> list[Record]:
        partitions = range(log.partition_count(prefix + topic))
        return [record for n in partitions for record in log.read(TopicPartition(prefix + topic, n), 0, 10_000)]

    finish("simulate", "digits", "--limit", 200, "--label-share", 1.0, "--config", config)
    finish("learn", "--until-end", "--config", config)
    finish("simulate", "digits", "--limit", 200, "--label-share", 0.0, "--id-prefix", "new", "--config", config)
    scorer, card = start("score", "--config", config, output=folder / "score.log"), folder / "state" / "processes"
    try:
        until(
            lambda: (read_status(card / "scorer-0.json") or {}).get("records", {}).get("scored") == 400, "answers", 60.0
        )
    finally:
        assert stop(scorer) == 0
    samples = [codec.decode_sample(record) for record in read("samples")]
    new = {sample.sample_id: sample.true_label for sample in samples if sample.sample_id.startswith("new")}
    log.append(
        f"{prefix}labels", [codec.labels.encode(name, label) for name, label in new.items() if label is not None]
    )
    finish("learn", "--until-end", "--config", config)

    answers = [json.loads(record.value or b"") for record in read("predictions")]
    right = sum(answer["class_index"] == new.get(answer["id"]) for answer in answers)
    found = heartbeat(folder)
    assert (found["ledger"]["scored"], found["ledger"]["scored_published"]) == (400, 200)
    assert (found["accounts"]["predictions_taken"], found["accounts"]["predictions_late"]) == (200, 200)
    scores = json.loads((folder / "state" / "scores.json").read_bytes())
    assert scores["at_arrival"]["windowed"]["accuracy"]["teacher"] == right / 200
    log.close()


@pytest.mark.kafka
def test_the_learner_scores_what_was_published_to_kafka(tmp_path: Path, kafka_broker: str) -> None:
    """Control records of transactions are in the predictions topic."""
    prefix = f"{tmp_path.name}-"
    settings = {"kind": "kafka", "bootstrap": kafka_broker, "prefix": prefix, "partitions": 2}
    assert_scores_what_was_published(tmp_path, write_config(tmp_path, **settings), prefix)


@pytest.mark.kafka
def test_kcat_reads_predictions(tmp_path: Path, kafka_broker: str) -> None:
    """Id as key, JSON as value."""
    if shutil.which("kcat") is None:
        pytest.skip("kcat is not installed: apt-get install kcat")
    config = write_config(tmp_path, kind="kafka", bootstrap=kafka_broker, prefix=f"{tmp_path.name}-", partitions=2)
    topic = f"{tmp_path.name}-predictions"
    config.write_text(config.read_text().replace("[source]\n", f'[source]\npredictions.topic = "{topic}"\n'))
    finish("simulate", "digits", "--limit", 100, "--config", config)
    finish("learn", "--until-end", "--config", config)
    scorer = start("score", "--config", config, output=tmp_path / "score.log")
    card = tmp_path / "state" / "processes" / "scorer-0.json"
    try:
        until(lambda: (read_status(card) or {}).get("records", {}).get("scored") == 100, "predictions", 60.0)
    finally:
        assert stop(scorer) == 0

    flags = ["kcat", "-C", "-q", "-e", "-b", kafka_broker, "-t", topic, "-f", "%k\t%s\n"]
    lines = subprocess.run(flags, capture_output=True, check=True, timeout=60).stdout.decode().splitlines()
    found = dict(line.split("\t") for line in lines)
    assert len(lines) == len(found) == 100
    for sample_id, value in found.items():
        record = json.loads(value)
        assert (record["id"], len(record["probabilities"])) == (sample_id, 10)
        assert record["model_version"] >= 1
