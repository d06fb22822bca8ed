"""A restart equals an uninterrupted run, bit by bit (I3, D4): kill -9 in the middle."""

from __future__ import annotations

import json
import shutil
import signal
import uuid
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support import finish, heartbeat, journaled_steps, newest_checkpoint, start, until, write_config

from streamlearn.app.log import make_codec, open_log
from streamlearn.config import load_config
from streamlearn.log.predictions import encode_prediction
from streamlearn.records import Prediction, TopicPartition

PLAN = ("digits", "--limit", 640, "--passes", 2, "--label-share", 0.2, "--label-delay", "geometric:200", "--seed", 3)
EXACT = {"partitions": 2, "max_age_s": 3600.0, "checkpoint_every_s": 3600.0}
RICH = {
    "BATCH__STEPS": "3",
    "LEARN__OPTIONS__RAMPUP_LABELS": "50",
}
RECIPES = {
    "uneven": {
        "SCORE__THRESHOLDS": '{"3" = 0.3}',
        "LEARN__CLASS_WEIGHTS": "balanced",
        **RICH,
    },
    "ict": {
        "LEARN__METHOD": "ict",
        "LEARN__OPTIONS__ALIGN": "labels",
        "LEARN__OPTIONS__GATE": "softmatch",
        "LEARN__OPTIONS__MIXUP_BETA": "0.5",
        **RICH,
    },
    "temporal": {"LEARN__METHOD": "temporal_ensembling", "LEARN__OPTIONS__ENSEMBLE_SLOTS": "1000", **RICH},
}


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state folder whose embedded log holds the samples and labels."""
    folder = tmp_path_factory.mktemp("simulated")
    finish("simulate", *PLAN, "--config", write_config(folder, **EXACT))
    return folder / "state"


def learn(config: Path, *, kill_at: tuple[int, ...] = ()) -> None:
    """Learn to the end of the log, killed each time that the journal has a number of steps."""
    folder = config.parent
    command = ("learn", "--until-end", "--config", config)
    for steps in kill_at:
        process = start(*command, output=folder / "learner.log")
        until(lambda: journaled_steps(folder) >= steps or process.poll() is not None, f"{steps} steps")  # noqa: B023
        process.kill()
        assert process.wait(20) == -signal.SIGKILL
    finish(*command)


def assert_equal_runs(killed: Path, whole: Path) -> None:
    a, b = newest_checkpoint(killed), newest_checkpoint(whole)
    assert (a.step, a.next_offsets, a.extra) == (b.step, b.next_offsets, b.extra)
    assert a.arrays.keys() == b.arrays.keys()
    different = [name for name in a.arrays if not np.array_equal(a.arrays[name], b.arrays[name], equal_nan=True)]
    assert different == []
    assert a.step >= 40
    assert a.extra["accounts"]["samples_learned"] == 1280


def publish_answers(path: Path) -> tuple[int, int]:
    """Answer each sample at its own time, by its offset; how many labels such an answer meets, and of how many."""
    config = load_config(path)
    codec, names = make_codec(config), config.schema_.build().classes
    with closing(open_log(config)) as log:
        log.create_topics({"predictions": 2})
        samples = {
            record.key: (codec.decode_sample(record), record.timestamp_ms)
            for n in range(2)
            for record in log.read(TopicPartition("samples", n), 0, 10_000)
        }
        classes = {key: sample.position.offset % 10 for key, (sample, _) in samples.items()}
        answers = []
        for key, (sample, at_ms) in samples.items():
            probabilities_C = np.full(10, 0.05, np.float32)
            probabilities_C[classes[key]] = 0.55
            record = encode_prediction(sample, Prediction(classes[key], probabilities_C, 1), names, 0.0)
            answers.append(replace(record, timestamp_ms=at_ms))
        log.append("predictions", answers)
        labels = [
            codec.labels.decode(record) for n in range(2) for record in log.read(TopicPartition("labels", n), 0, 10_000)
        ]
    right = sum(classes[label.sample_id.encode()] == label.class_index for label in labels)
    return right, len(labels)


class TestEmbedded:
    @pytest.mark.parametrize("recipe", RECIPES)
    def test_kill_9_changes_no_bit_of_any_method(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, simulated: Path, recipe: str
    ) -> None:
        """Further steps, tables, moving averages, recent samples, and the served candidate."""
        for key, value in RECIPES[recipe].items():
            monkeypatch.setenv(f"STREAMLEARN_{key}", value)
        killed, whole = self.copies(tmp_path, simulated, checkpoint_every_s=0.2)

        learn(killed, kill_at=(13, 30, 55))
        learn(whole)

        assert_equal_runs(killed.parent, whole.parent)
        assert newest_checkpoint(whole.parent).step >= 120

    @pytest.mark.parametrize("checkpoint_every_s", [3600.0, 0.05])
    def test_kill_9_changes_no_bit(self, tmp_path: Path, simulated: Path, checkpoint_every_s: float) -> None:
        """Three kills at different steps, two partitions, with and without checkpoints in between."""
        killed, whole = self.copies(tmp_path, simulated, checkpoint_every_s=checkpoint_every_s)

        learn(killed, kill_at=(5, 15, 28))
        learn(whole)

        assert_equal_runs(killed.parent, whole.parent)

    def test_kill_9_changes_no_score_of_published_answers(self, tmp_path: Path, simulated: Path) -> None:
        """They are read through the journaled offsets too; the scores are those of the predictions topic."""
        configs = self.copies(tmp_path, simulated, checkpoint_every_s=0.15)
        for config in configs:
            config.write_text(config.read_text().replace("[source]\n", '[source]\npredictions.topic = "predictions"\n'))
            right, of = publish_answers(config)

        learn(configs[0], kill_at=(5, 15, 28))
        learn(configs[1])

        killed, whole = (config.parent for config in configs)
        assert_equal_runs(killed, whole)
        assert newest_checkpoint(whole).extra["accounts"]["predictions_taken"] == 1280
        for folder in (killed, whole):
            assert heartbeat(folder)["ledger"]["scored_published"] == heartbeat(folder)["ledger"]["scored"] == of
            accuracy = json.loads((folder / "state" / "scores.json").read_bytes())["at_arrival"]["cumulative"][
                "accuracy"
            ]
            assert accuracy["teacher"] == right / of

    def copies(self, tmp_path: Path, simulated: Path, **settings: float) -> tuple[Path, Path]:
        """Configs of two runs on the same log."""
        for name in ("killed", "whole"):
            shutil.copytree(simulated, tmp_path / name / "state")
        configs = [write_config(tmp_path / name, **{**EXACT, **settings}) for name in ("killed", "whole")]
        return configs[0], configs[1]


@pytest.mark.kafka
class TestKafka:
    def test_kill_9_changes_no_bit(self, tmp_path: Path, kafka_broker: str) -> None:
        """On a real broker. Both runs read the same topics."""
        settings = {
            **EXACT,
            "kind": "kafka",
            "bootstrap": kafka_broker,
            "prefix": f"restart-{uuid.uuid4().hex[:8]}-",
            "checkpoint_every_s": 0.1,
        }
        killed, whole = (write_config(tmp_path / name, **settings) for name in ("killed", "whole"))
        finish("simulate", *PLAN, "--config", killed)

        learn(killed, kill_at=(6, 20))
        learn(whole)

        assert_equal_runs(killed.parent, whole.parent)
