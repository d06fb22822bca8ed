"""A restart equals an uninterrupted run, bit by bit (I3, D4): kill -9 in the middle."""

from __future__ import annotations

import shutil
import signal
import uuid
from pathlib import Path

import numpy as np
import pytest
from support import finish, journaled_steps, newest_checkpoint, start, until, write_config

PLAN = ("digits", "--limit", 1280, "--passes", 2, "--label-share", 0.2, "--label-delay", "geometric:200", "--seed", 3)
EXACT = {"partitions": 2, "max_age_s": 3600.0, "checkpoint_every_s": 3600.0}


def learn_with_kills(folder: Path, config: Path, kill_at: tuple[int, ...]) -> int:
    """Learn to the end of the log, killed once the journal has each number of steps; how often it was killed."""
    kills = 0
    for steps in kill_at:
        process = start("learn", "--until-end", "--config", config, output=folder / "learner.log")
        until(lambda: journaled_steps(folder) >= steps or process.poll() is not None, f"{steps} steps")  # noqa: B023
        process.send_signal(signal.SIGKILL)
        kills += process.wait(20) == -signal.SIGKILL
    finish("learn", "--until-end", "--config", config)
    return kills


def assert_equal_runs(killed: Path, whole: Path) -> None:
    a, b = newest_checkpoint(killed), newest_checkpoint(whole)
    assert (a.step, a.next_offsets, a.extra) == (b.step, b.next_offsets, b.extra)
    assert a.arrays.keys() == b.arrays.keys()
    different = [name for name in a.arrays if not np.array_equal(a.arrays[name], b.arrays[name], equal_nan=True)]
    assert different == []
    assert a.step >= 80
    assert a.extra["accounts"]["samples_learned"] == 2560


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


class TestEmbedded:
    @pytest.mark.parametrize("recipe", RECIPES)
    def test_kill_9_changes_no_bit_of_any_method(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str
    ) -> None:
        """Further steps, tables, moving averages, recent samples, and the served candidate."""
        for key, value in RECIPES[recipe].items():
            monkeypatch.setenv(f"STREAMLEARN_{key}", value)
        settings = {**EXACT, "checkpoint_every_s": 0.5}
        killed, whole = tmp_path / "killed", tmp_path / "whole"
        configs = [write_config(folder, **settings) for folder in (killed, whole)]
        finish("simulate", *PLAN, "--config", configs[0])
        shutil.copytree(killed / "state", whole / "state")

        kills = learn_with_kills(killed, configs[0], (26, 61, 111))
        finish("learn", "--until-end", "--config", configs[1])

        assert kills == 3
        assert_equal_runs(killed, whole)
        assert newest_checkpoint(whole).step >= 240

    @pytest.mark.parametrize("checkpoint_every_s", [3600.0, 0.1])
    def test_kill_9_changes_no_bit(self, tmp_path: Path, checkpoint_every_s: float) -> None:
        """Three kills at different steps, two partitions, with and without checkpoints in between."""
        settings = {**EXACT, "checkpoint_every_s": checkpoint_every_s}
        killed, whole = tmp_path / "killed", tmp_path / "whole"
        configs = [write_config(folder, **settings) for folder in (killed, whole)]
        finish("simulate", *PLAN, "--config", configs[0])
        shutil.copytree(killed / "state", whole / "state")

        kills = learn_with_kills(killed, configs[0], (10, 30, 55))
        finish("learn", "--until-end", "--config", configs[1])

        assert kills == 3
        assert_equal_runs(killed, whole)


@pytest.mark.kafka
class TestKafka:
    def test_kill_9_changes_no_bit(self, tmp_path: Path, kafka_broker: str) -> None:
        """On a real broker. Both runs read the same topics."""
        settings = {
            **EXACT,
            "kind": "kafka",
            "bootstrap": kafka_broker,
            "prefix": f"restart-{uuid.uuid4().hex[:8]}-",
            "checkpoint_every_s": 0.2,
        }
        killed, whole = tmp_path / "killed", tmp_path / "whole"
        configs = [write_config(folder, **settings) for folder in (killed, whole)]
        finish("simulate", *PLAN, "--config", configs[0])

        kills = learn_with_kills(killed, configs[0], (12, 40))
        finish("learn", "--until-end", "--config", configs[1])

        assert kills == 2
        assert_equal_runs(killed, whole)
