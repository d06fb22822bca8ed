"""Predictions as a stream, with real processes: exactly once through SIGKILL of scorer, learner and broker."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from harness.stream_out import run
from support import finish, start, stop, until, write_config

from streamlearn.app.log import open_log
from streamlearn.config import load_config
from streamlearn.records import TopicPartition
from streamlearn.state.status import read_status


@pytest.mark.kafka
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_sample_is_answered_once_while_everything_is_killed(tmp_path: Path) -> None:
    """As a foreign client reads it: all ids, none twice, each with the version of a published teacher."""
    report = run(tmp_path, ["scorer", "broker", "learner"], seconds=12.0, rate=100.0)

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
