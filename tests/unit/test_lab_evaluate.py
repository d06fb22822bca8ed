"""The evaluation: the protocol, what it fills in, and that the same seed gives the same curves."""

from __future__ import annotations

import tempfile
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from streamlearn.config import Config, load_config
from streamlearn.errors import ConfigError, StreamlearnError
from streamlearn.judge.selection_bias import Quantiles
from streamlearn.lab.datasets import load
from streamlearn.lab.evaluate import Evaluation, EvaluationPlan, evaluate, settings_for

torch.set_num_threads(1)


def config_of(**overrides: Any) -> Config:
    return load_config(environ={}, overrides={"learn.threads": 1, "batch.fresh": 10, **overrides})


def evaluated(*, settings: dict[str, Any] | None = None, keep_state: Path | None = None, **changes: Any) -> Evaluation:
    plan = {"dataset": "moons", "limit": 200, "window": 50, "label_probability": 1.0, "delay": "100"}
    return evaluate(
        config_of(**settings or {}), EvaluationPlan(**{**plan, **changes}), threading.Event(), keep_state=keep_state
    )


@pytest.fixture(scope="module")
def found() -> Evaluation:
    """200 samples, a label for each, 100 samples late; a point for every 50."""
    return evaluated()


def stopping_when(what: str) -> Evaluation:
    stopping = threading.Event()

    def progress(doing: str, done: int, _: int) -> None:
        if doing == what and done >= 50:
            stopping.set()

    return evaluate(config_of(), EvaluationPlan(dataset="moons", limit=2000), stopping, progress=progress)


class TestReproducible:
    def test_the_same_seed_gives_the_same_numbers_bit_for_bit(self) -> None:
        """Of convolutions, replay and noise too, and with settings that leave all to chance."""
        plan: dict[str, Any] = {"dataset": "digits", "label_probability": 0.3, "delay": "geometric:20", "limit": 100}

        first, second = evaluated(**plan), evaluated(**plan)

        assert first.as_json() == second.as_json()

    def test_another_seed_gives_others(self) -> None:
        """Of the order, and of which samples get a label."""
        first, second = (evaluated(label_probability=0.3, seed=seed) for seed in (1, 2))

        assert first.curves != second.curves


class TestProtocol:
    def test_every_sample_is_scored_by_the_oracle_and_only_labelled_ones_are_observed(self, found: Evaluation) -> None:
        """The labels of the first half come, the others are dropped."""
        assert (found.samples, found.labels, found.counts.labels_pending) == (200, 100, 100)
        assert found.scores.oracle is not None
        assert found.scores.oracle.cumulative.count == 200
        assert found.scores.at_arrival.cumulative.count == 100

    def test_a_label_comes_exactly_as_late_as_said(self) -> None:
        """In the stream's own time, of which the rate says how long a sample takes."""
        found = evaluated(delay="2s", rate=50.0)

        assert found.scores.traffic.delay_s == Quantiles(2.0, 2.0, 2.0, 2.0)
        assert found.labels == 100

    def test_the_curves_have_a_point_for_each_window_and_one_for_the_end(self) -> None:
        """At the end of the step in which the window was full; the label that came with its last sample is after it."""
        found = evaluated(window=70)

        assert [point["samples"] for point in found.curves] == [70, 140, 200]
        assert [point["labels"] for point in found.curves] == [0, 39, 100]
        assert [point["labelled_share"] for point in found.curves] == [0.0, 39 / 70, 61 / 60]

    def test_a_point_before_any_label_has_the_oracle_alone(self, found: Evaluation) -> None:
        """What is not known is None, and not a number."""
        point = found.curves[0]

        assert isinstance(point["oracle"], float)
        unknown = ("observed", "observed_since", "majority", "no_change", "at_label_teacher", "at_label_twin")
        assert {point[name] for name in (*unknown, "ssl_gain", "ssl_gain_low")} == {None}

    def test_what_was_observed_since_the_last_point_adds_up_to_all_of_it(self, found: Evaluation) -> None:
        """Right answers over labels, point by point, with the label that comes after the very last sample."""
        right = sum((point["observed_since"] or 0) * (point["scored_since"] or 0) for point in found.curves)
        assert right / 100 == pytest.approx(found.scores.at_arrival.cumulative.accuracy["teacher"])

    def test_the_oracle_asks_the_twin_about_every_sample_too(self) -> None:
        """With labels for all it is neither at chance nor the teacher itself."""
        found = evaluated(limit=1000, window=200, delay="0")

        oracle = found.scores.oracle
        assert oracle is not None
        assert oracle.twin is not None
        twin = oracle.twin.cumulative
        assert twin.paired == 1000
        assert twin.teacher == oracle.cumulative.accuracy["teacher"]
        assert twin.twin is not None
        assert 0.7 < twin.twin < 1.0
        assert twin.twin != twin.teacher
        assert found.curves[-1]["oracle_twin_cumulative"] == twin.twin
        assert found.curves[-1]["oracle_twin"] > 0.85  # type: ignore[operator]

    def test_a_learner_of_labels_alone_has_no_twin_to_ask(self) -> None:
        """It is the twin."""
        found = evaluated(settings={"learn.method": "supervised"})

        assert found.scores.oracle is not None
        assert found.scores.oracle.twin is None
        assert found.curves[-1]["oracle_twin"] is None

    def test_it_learns(self) -> None:
        """A sanity check of the whole: two moons, all labels at once."""
        found = evaluated(limit=1000, window=200, delay="0")

        assert found.curves[-1]["oracle"] > 0.85  # type: ignore[operator]


class TestHeldOut:
    def test_every_network_is_asked(self) -> None:
        """Teacher, student and twin, on all of the part that was held out."""
        test = evaluated(limit=600, delay="0").test

        assert test is not None
        assert test["count"] == 2000
        assert all(0.8 < (test[network] or 0) <= 1.0 for network in ("teacher", "student", "twin"))

    def test_it_is_shown_as_the_world_was_at_the_end(self) -> None:
        """Who has learned that the classes are exchanged is right to say so."""
        test = evaluated(limit=600, delay="0", drift="permute-labels").test

        assert test is not None
        assert (test["teacher"] or 0) > 0.8

    def test_its_classes_come_as_often_as_at_the_end(self) -> None:
        """Where one class is a million times the other, whoever says so is right of nearly all."""
        test = evaluated(limit=600, delay="0", drift="prior:1000000").test

        assert test is not None
        assert (test["teacher"] or 0) > 0.99

    def test_there_is_none_where_the_data_set_has_none(self, tmp_path: Path) -> None:
        """A file of x and y alone."""
        np.savez(tmp_path / "mine.npz", x=np.eye(4, dtype=np.float32)[np.arange(80) % 4], y=np.arange(80) % 4)

        found = evaluated(dataset=str(tmp_path / "mine.npz"))

        assert found.test is None
        assert found.samples == 80


class TestSettings:
    def test_what_the_config_does_not_say_is_the_data_sets_own(self, tmp_path: Path) -> None:
        """Shape, dtype, classes, scale and model; the seed is the stream's."""
        settings = settings_for(config_of(), load("digits"), EvaluationPlan(dataset="digits", seed=7), tmp_path)

        assert (settings.schema_.shape, settings.schema_.dtype, settings.schema_.scale) == ((1, 8, 8), "uint8", 1 / 16)
        assert (settings.model.factory, settings.model.normalise, settings.learn.seed) == ("convnet", False, 7)

    def test_what_the_config_says_stands(self, tmp_path: Path) -> None:
        """And a shape or a factory of its own brings its own scale and normalisation."""
        said = {"schema.shape": [64], "model.factory": "mlp", "learn.seed": 3, "guard.on": False}

        settings = settings_for(config_of(**said), load("digits"), EvaluationPlan(dataset="digits"), tmp_path)

        assert (settings.schema_.shape, settings.schema_.dtype, settings.schema_.scale) == ((64,), "uint8", 1.0)
        assert (settings.model.factory, settings.model.normalise, settings.learn.seed) == ("mlp", True, 3)
        assert not settings.guard.on

    def test_the_log_is_its_own_whatever_the_config_says(self, tmp_path: Path) -> None:
        """Nobody's Kafka gets a simulation by mistake."""
        settings = settings_for(
            config_of(**{"log.kind": "kafka"}), load("moons"), EvaluationPlan(dataset="moons"), tmp_path
        )

        assert settings.log.kind == "embedded"
        assert settings.state.dir == tmp_path

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"delay": "soon"}, "soon"),
            ({"drift": "rotate:x"}, "rotate:x"),
            ({"order": "random"}, "order: wanted"),
            ({"dataset": "mnist"}, "'mnist': wanted one of"),
            ({"delay": "10s", "rate": 0.0}, "rate: wanted"),
            ({"settings": {"schema.shape": [3]}}, "moons has shape"),
            ({"limit": None, "passes": 40_000}, "MiB"),
            ({"limit": None, "passes": 10**9}, "passes: wanted"),
        ],
    )
    def test_what_cannot_be_run_is_refused_with_the_reason(self, changes: dict[str, Any], message: str) -> None:
        """Before anything is learned."""
        with pytest.raises(ConfigError, match=message):
            evaluated(**changes)


class TestStateFolder:
    def test_nothing_is_left_behind(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The log, the store and the checkpoints go with the run."""
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

        evaluated()

        assert list(tmp_path.iterdir()) == []

    def test_it_is_kept_where_that_is_wanted(self, tmp_path: Path) -> None:
        """With the log, so that a server or `inspect` may be started on it."""
        evaluated(keep_state=tmp_path / "kept")

        assert {"checkpoints", "log", "published", "store"} <= {path.name for path in (tmp_path / "kept").iterdir()}

    def test_a_folder_in_use_is_refused(self, tmp_path: Path) -> None:
        """It would be gone on with, rather than begun."""
        (tmp_path / "something").touch()

        with pytest.raises(ConfigError, match="not empty"):
            evaluated(keep_state=tmp_path)


class TestStop:
    def test_what_was_learned_until_then_is_told(self) -> None:
        """And that it is not all."""
        found = stopping_when("learning")

        assert not found.complete
        assert 50 <= found.samples < 2000
        assert found.curves[-1]["samples"] == found.samples

    def test_before_the_first_step_there_is_nothing_to_tell(self) -> None:
        """Said as an error, not as an empty table."""
        with pytest.raises(StreamlearnError, match="before the first step"):
            stopping_when("writing the stream")
