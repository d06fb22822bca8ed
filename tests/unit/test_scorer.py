"""The scorer: each sample answered once, by the published teacher, in one transaction with its offsets."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from harness.fakes import MemoryLog, lost_acknowledgement
from structlog.testing import capture_logs
from support import until
from torch import Tensor, nn

from streamlearn.app import scorer as process
from streamlearn.app.log import make_topics, open_log
from streamlearn.config import load_config
from streamlearn.errors import ConfigError, LogUnavailableError, RegistryUnavailableError, WriterFencedError
from streamlearn.log.base import Log
from streamlearn.log.codec import Codec
from streamlearn.log.embedded import EmbeddedLog
from streamlearn.metrics import ScorerMetrics
from streamlearn.models.answer import Thresholds
from streamlearn.models.build import ModelSpec, build
from streamlearn.records import NewRecord, Record, Schema, TopicPartition
from streamlearn.serve.predictor import Predictor
from streamlearn.serve.scorer import GROUP, Scorer, share_of
from streamlearn.state.publish import PublishedDir, Publisher
from streamlearn.state.status import read_status

SCHEMA = Schema((4,), np.dtype(np.float32), ("cat", "dog", "owl"))
SPEC = ModelSpec("mlp", {"hidden": (5,)}, (4,), 3, normalise=True, scale=1.0)
IN, OUT = TopicPartition("samples", 0), TopicPartition("predictions", 0)


class Overflows(nn.Module):
    """A network without a finite answer for some inputs."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x[:, :1] > 5, torch.nan, x[:, :3])


class Stage:
    """A log with its topics, a published folder, and scorers that run in threads."""

    def __init__(self, folder: Path, log: Log) -> None:
        self.log, self.codec = log, Codec(SCHEMA)
        log.create_topics({"samples": 1, "predictions": 1})
        self.publisher = Publisher(folder / "published")
        self.folder = folder
        self.sent = 0

    def publish(self, step: int, *, scale: float = 1.0) -> None:
        arrays = {
            name: tensor.numpy() * np.float32(scale) for name, tensor in build(SPEC, seed=step).state_dict().items()
        }
        self.publisher.publish(step, arrays, {"model_spec": SPEC.to_json()})

    def send(self, count: int) -> None:
        rng = np.random.default_rng(self.sent)
        rows = rng.normal(size=(count, 4)).astype(np.float32)
        self.log.append("samples", [self.codec.encode_sample(f"s{self.sent + n}", x) for n, x in enumerate(rows)])
        self.sent += count

    def scorer(self, **options: Any) -> Scorer:
        predictor = Predictor(PublishedDir(self.folder / "published"), SCHEMA, ScorerMetrics(version="1"))
        predictor.refresh()
        self.predictor = predictor
        self.metrics = ScorerMetrics(version="1")
        options = {"thresholds": Thresholds(self.codec.schema, {}), "every_s": 0.0, **options}
        return Scorer(self.log, self.codec, predictor, self.metrics, topic="predictions", **options)

    @contextmanager
    def running(self, scorer: Scorer | None = None) -> Iterator[Scorer]:
        scorer = scorer or self.scorer()
        stopping, errors = threading.Event(), []

        def run() -> None:
            try:
                scorer.run(stopping)
            except Exception as error:
                errors.append(error)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        try:
            yield scorer
        finally:
            stopping.set()
            thread.join(20.0)
        if errors:
            raise errors[0]
        assert not thread.is_alive(), "the scorer did not stop"

    def predictions(self) -> list[Record]:
        records: list[Record] = []
        while found := self.log.read(OUT, len(records), 1000):
            records += found
        return records

    def ids(self) -> list[str]:
        return [json.loads(record.value or b"")["id"] for record in self.predictions()]

    def answered(self, count: int) -> None:
        until(lambda: len(self.predictions()) >= count, f"{count} predictions, got {len(self.predictions())}")


@pytest.fixture(params=["memory", "embedded"])
def stage(request: pytest.FixtureRequest, tmp_path: Path, log_path: Path) -> Iterator[Stage]:
    """On both logs of one machine."""
    log = MemoryLog() if request.param == "memory" else EmbeddedLog(log_path, max_bytes=1 << 30)
    yield Stage(tmp_path, log)
    log.close()


@pytest.fixture
def faulty(tmp_path: Path) -> Iterator[tuple[Stage, MemoryLog]]:
    """A stage whose log can fail."""
    log = MemoryLog()
    yield Stage(tmp_path, log), log
    log.close()


class TestAnswers:
    def test_a_class_with_a_threshold_is_answered_where_it_is_reached(self, tmp_path: Path) -> None:
        """As `/predict` does, whatever class is the most probable."""
        log = MemoryLog()
        stage = Stage(tmp_path, log)
        stage.publish(7)
        stage.send(20)
        name = SCHEMA.classes[-1]

        with stage.running(stage.scorer(thresholds=Thresholds(SCHEMA, {name: 0.001}))):
            stage.answered(20)

        assert {json.loads(record.value or b"")["class"] for record in stage.predictions()} == {name}
        log.close()

    def test_each_sample_gets_the_answer_of_the_published_teacher(self, stage: Stage) -> None:
        """With version, position and time, under the sample's id as key; as the teacher itself answers."""
        stage.publish(7)
        stage.send(40)

        with stage.running():
            stage.answered(40)

        records = stage.predictions()
        assert stage.ids() == [f"s{n}" for n in range(40)]
        samples = stage.log.read(IN, 0, 40)
        expected = stage.predictor.current().probabilities(np.stack([stage.codec.decode_sample(r).x for r in samples]))
        for n, record in enumerate(records):
            found = json.loads(record.value or b"")
            assert (record.key, dict(record.headers)) == (f"s{n}".encode(), {"content-type": b"application/json"})
            np.testing.assert_allclose(found["probabilities"], expected[n], atol=1e-6)
            assert found["class_index"] == int(expected[n].argmax())
            assert found["class"] == SCHEMA.classes[found["class_index"]]
            assert found["model_version"] == 7
            assert found["position"] == {"topic": "samples", "partition": 0, "offset": n}
            assert found["time"] == samples[n].timestamp_ms / 1000
            assert found["predicted_at"] == pytest.approx(time.time(), abs=60)

    def test_it_waits_for_a_first_teacher(self, stage: Stage) -> None:
        """Samples stay in the log meanwhile."""
        stage.send(3)
        scorer = stage.scorer()

        with capture_logs() as lines, stage.running(scorer):
            until(lambda: scorer.status()["state"] == "waiting for a teacher", "the state")
            assert stage.predictions() == []
            stage.publish(1)
            stage.predictor.refresh()
            stage.answered(3)

        assert [line["event"] for line in lines].count("scorer_waits") == 1

    def test_in_avro_it_waits_until_the_schema_is_registered(self, stage: Stage) -> None:
        """Then each answer has the frame of the schema."""
        asked = []

        def register() -> int:
            asked.append(stage.predictions())
            if len(asked) < 3:
                raise RegistryUnavailableError("away")
            return 258

        stage.publish(1)
        stage.send(3)
        with stage.running(stage.scorer(register=register)):
            stage.answered(3)

        values = [record.value or b"" for record in stage.predictions()]
        assert [value[:5] for value in values] == [b"\0\0\0\1\2"] * 3
        assert asked == [[], [], []], "it was asked until it answered, before anything was written"

    def test_a_stop_ends_the_wait_for_the_registry(self, stage: Stage) -> None:
        """Without an error."""

        def register() -> int:
            raise RegistryUnavailableError("away")

        with stage.running(stage.scorer(register=register)) as scorer:
            until(lambda: scorer.status()["state"] == "registry unavailable", "the wait")

    def test_a_newer_teacher_answers_later_samples(self, stage: Stage) -> None:
        """Each answer names its own version."""
        stage.publish(1)
        with stage.running():
            stage.send(5)
            stage.answered(5)
            stage.publish(2)
            stage.predictor.refresh()
            stage.send(5)
            stage.answered(10)

        versions = [json.loads(record.value or b"")["model_version"] for record in stage.predictions()]
        assert versions == [1] * 5 + [2] * 5

    def test_what_cannot_be_decoded_is_skipped_and_counted(self, stage: Stage) -> None:
        """Its dead letter is the learner's."""
        stage.publish(1)
        stage.send(2)
        stage.log.append("samples", [NewRecord(b"bad", b"{"), NewRecord(b"worse", b'{"id": 3}')])
        stage.send(2)
        scorer = stage.scorer()

        with stage.running(scorer):
            stage.answered(4)
            until(lambda: scorer.status()["records"].get("undecodable") == 2, "the count")

        assert stage.ids() == ["s0", "s1", "s2", "s3"]
        assert 'streamlearn_scored_records_total{outcome="undecodable"} 2.0' in stage.metrics.text()
        assert 'streamlearn_scored_records_total{outcome="scored"} 4.0' in stage.metrics.text()

    def test_answers_that_are_not_finite_are_not_written(self, stage: Stage) -> None:
        """As a server refuses them."""
        stage.publish(1)
        scorer = stage.scorer()
        assert stage.predictor.model is not None
        stage.predictor.model = replace(stage.predictor.model, network=Overflows())
        rows = np.float32([[1, 0, 0, 0], [9, 0, 0, 0], [2, 0, 0, 0]])
        stage.log.append("samples", [stage.codec.encode_sample(f"s{n}", x) for n, x in enumerate(rows)])

        with stage.running(scorer):
            until(lambda: sum(scorer.status()["records"].values()) == 3, "all records")

        assert stage.ids() == ["s0", "s2"]
        assert scorer.status()["records"]["not_finite"] == 1


class TestOnce:
    def test_a_restart_continues_where_the_last_one_stopped(self, stage: Stage) -> None:
        """No sample twice, none missing."""
        stage.publish(1)
        for count in (10, 20, 30):
            stage.send(10)
            with stage.running():
                stage.answered(count)

        assert stage.ids() == [f"s{n}" for n in range(30)]

    def test_from_the_latest_on_a_restart_skips_nothing(self, stage: Stage) -> None:
        """The first offsets are durable before anything is answered."""
        stage.send(5)
        scorer = stage.scorer(start="latest")
        with stage.running(scorer):
            until(lambda: scorer.status()["state"] == "waiting for a teacher", "the state")
        stage.send(5)
        stage.publish(1)
        with stage.running(stage.scorer(start="latest")):
            stage.answered(5)

        assert stage.ids() == [f"s{n}" for n in range(5, 10)]

    @pytest.mark.parametrize("applied", [False, True])
    def test_a_write_with_an_unknown_outcome_is_neither_lost_nor_repeated(
        self, faulty: tuple[Stage, MemoryLog], applied: bool
    ) -> None:
        """It continues at the offsets that are in the log."""
        stage, log = faulty
        stage.publish(1)
        stage.send(20)
        log.fail("write", lost_acknowledgement(), after=1, applied=applied)

        with stage.running():
            stage.answered(20)
            stage.send(5)
            stage.answered(25)

        assert stage.ids() == [f"s{n}" for n in range(25)]

    def test_a_log_that_is_away_is_waited_for(self, faulty: tuple[Stage, MemoryLog]) -> None:
        """At each call."""
        stage, log = faulty
        stage.publish(1)
        stage.send(3)
        log.fail("writer", LogUnavailableError("away"), times=2)
        log.fail("beginning_offsets", LogUnavailableError("away"))
        log.fail("poll", LogUnavailableError("away"))

        with capture_logs() as lines, stage.running():
            stage.answered(3)

        assert {line["event"] for line in lines} == {"log_unavailable"}
        assert stage.ids() == ["s0", "s1", "s2"]

    def test_a_scorer_that_was_replaced_ends(self, stage: Stage) -> None:
        """It writes nothing more."""
        stage.publish(1)
        scorer = stage.scorer()
        stage.send(1)
        running = stage.running(scorer)
        running.__enter__()
        stage.answered(1)
        stage.log.writer(GROUP, 0)
        stage.send(1)
        time.sleep(0.5)

        with pytest.raises(WriterFencedError):
            running.__exit__(None, None, None)

        assert stage.ids() == ["s0"]


class TestShares:
    def test_each_partition_has_one_instance(self) -> None:
        """Also when others are added."""
        few, many = [[TopicPartition(t, n) for t in ("a", "b") for n in range(k)] for k in (3, 8)]

        for of in (1, 2, 3, 5):
            shares = [share_of(many, instance, of) for instance in range(of)]
            assert sorted(tp for share in shares for tp in share) == sorted(many)
            assert all(set(share_of(few, n, of)) <= set(shares[n]) for n in range(of))

    def test_an_instance_without_partitions_waits(self, faulty: tuple[Stage, MemoryLog]) -> None:
        """It reports that it is idle."""
        stage, _ = faulty
        stage.publish(1)
        stage.send(2)
        (idle,) = (n for n in range(2) if not share_of([IN], n, 2))
        scorer = stage.scorer(instance=idle, of=2)

        with capture_logs() as lines, stage.running(scorer):
            until(lambda: scorer.status()["state"] == "scoring", "the state")

        assert "scorer_idle" in {line["event"] for line in lines}
        assert stage.predictions() == []


class TestProcess:
    """`app/scorer.py`: config to scorer, and its heartbeat."""

    SETTINGS: ClassVar[dict[str, Any]] = {
        "schema.shape": [4],
        "schema.classes": ["cat", "dog", "owl"],
        "source.predictions.topic": "predictions",
        "model.options": {"hidden": [5]},
    }

    def test_it_scores_the_log_of_the_config(self, tmp_path: Path) -> None:
        """And leaves a heartbeat."""
        config = load_config(environ={}, overrides={**self.SETTINGS, "state.dir": str(tmp_path)})
        log = open_log(config)
        make_topics(log, config)
        stage = Stage(tmp_path, log)
        stage.publish(3)
        stage.send(4)
        stopping = threading.Event()
        thread = threading.Thread(target=lambda: process.score(config, stopping))
        thread.start()
        card = tmp_path / "processes" / "scorer-0.json"

        stage.answered(4)
        until(lambda: (read_status(card) or {}).get("records", {}).get("scored") == 4, "the heartbeat")
        stopping.set()
        thread.join(20.0)

        status = read_status(card)
        assert status is not None
        assert (status["state"], status["model_version"], status["lag_records"]) == ("stopped", 3, 0)
        log.close()

    @pytest.mark.parametrize(
        ("settings", "options", "message"),
        [
            ({"source.predictions.topic": None}, {}, "topic is not set"),
            ({}, {"instance": 1}, "from 0 to 0"),
            ({}, {"of": 2}, "embedded log has one"),
        ],
    )
    def test_what_cannot_run_is_an_error(
        self, tmp_path: Path, settings: dict[str, Any], options: dict[str, Any], message: str
    ) -> None:
        """Before anything is opened."""
        config = load_config(environ={}, overrides={**self.SETTINGS, **settings, "state.dir": str(tmp_path)})

        with pytest.raises(ConfigError, match=message):
            process.score(config, threading.Event(), **options)
