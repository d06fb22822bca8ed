"""`evaluate`: the protocol, the settings that it completes, reproducibility."""

from __future__ import annotations

import tempfile
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from streamlearn.app.build import make_learner
from streamlearn.config import Config, load_config
from streamlearn.errors import ConfigError, StreamlearnError
from streamlearn.judge.selection_bias import Quantiles
from streamlearn.lab.datasets import load
from streamlearn.lab.evaluate import Evaluation, EvaluationPlan, evaluate, settings_for
from streamlearn.lab.held_out import score_held_out


def config_of(**overrides: Any) -> Config:
    return load_config(environ={}, overrides={"learn.threads": 1, "batch.fresh": 10, "batch.steps": 4, **overrides})


def evaluated(*, settings: dict[str, Any] | None = None, keep_state: Path | None = None, **changes: Any) -> Evaluation:
    plan = {"dataset": "moons", "limit": 200, "window": 50, "label_probability": 1.0, "delay": "100"}
    return evaluate(
        config_of(**settings or {}), EvaluationPlan(**{**plan, **changes}), threading.Event(), keep_state=keep_state
    )


@pytest.fixture(scope="module")
def found() -> Evaluation:
    """200 labelled samples, labels 100 samples late, a point every 50 samples."""
    return evaluated()


def stopped_while(what: str) -> Evaluation:
    stopping = threading.Event()

    def progress(task: str, done: int, _: int) -> None:
        if task == what and done >= 50:
            stopping.set()

    return evaluate(config_of(), EvaluationPlan(dataset="moons", limit=2000), stopping, progress=progress)


class TestReproducible:
    def test_the_same_seed_gives_the_same_numbers_bit_for_bit(self) -> None:
        """Including convolutions, replay and noise, with random labels and delays."""
        plan: dict[str, Any] = {"dataset": "digits", "label_probability": 0.3, "delay": "geometric:20", "limit": 100}

        first, second = evaluated(**plan), evaluated(**plan)

        assert first.as_json() == second.as_json()

    @pytest.mark.parametrize(("rate", "expected"), [(1e7, 1), (0.001, 4)])
    def test_a_rate_decides_how_many_steps_fit(self, rate: float, expected: int) -> None:
        """As many as there is time for on this machine: at least one, at most `batch.steps`."""
        found = evaluated(rate=rate)

        assert found.config.batch.steps == expected
        assert found.steps >= expected * 20

    def test_a_rate_fits_every_method(self) -> None:
        """One of them wants keys of the rows whose step is timed."""
        found = evaluated(rate=1e7, settings={"learn.method": "temporal_ensembling"}, limit=50)

        assert found.config.batch.steps == 1

    def test_another_seed_gives_other_curves(self) -> None:
        """The seed determines order and labels."""
        first, second = (evaluated(label_probability=0.3, seed=seed) for seed in (1, 2))

        assert first.curves != second.curves


class TestProtocol:
    def test_every_sample_is_scored_by_the_oracle_and_only_labelled_ones_are_observed(self, found: Evaluation) -> None:
        """Labels of the second half are not due in time and are dropped."""
        assert (found.samples, found.labels, found.counts.labels_pending) == (200, 100, 100)
        assert found.scores.oracle is not None
        assert found.scores.oracle.cumulative.count == 200
        assert found.scores.at_arrival.cumulative.count == 100

    def test_a_delay_in_time_is_event_time(self) -> None:
        """The rate determines the event time of each sample."""
        found = evaluated(delay="2s", rate=50.0)

        assert found.scores.traffic.delay_s == Quantiles(2.0, 2.0, 2.0, 2.0)
        assert found.labels == 100

    def test_the_curves_have_a_point_for_each_window_and_one_for_the_end(self) -> None:
        """A point is taken after the step that fills the window; a label of its last sample comes later."""
        found = evaluated(window=70)

        assert [point.samples for point in found.curves] == [70, 140, 200]
        assert [point.labels for point in found.curves] == [0, 39, 100]
        assert [point.labelled_share for point in found.curves] == [0.0, 39 / 70, 61 / 60]

    def test_a_point_before_any_label_has_only_oracle_scores(self, found: Evaluation) -> None:
        """Undefined scores are None."""
        point = found.curves[0]

        assert isinstance(point.oracle, float)
        unknown = ("observed", "observed_since", "majority", "no_change", "at_label_teacher", "at_label_twin")
        assert {getattr(point, name) for name in (*unknown, "ssl_gain", "ssl_gain_low")} == {None}

    def test_observed_since_adds_up_to_the_cumulative_score(self, found: Evaluation) -> None:
        """Including the label that comes after the last sample."""
        right = sum((point.observed_since or 0) * point.scored_since for point in found.curves)
        assert right / 100 == pytest.approx(found.scores.at_arrival.cumulative.accuracy["teacher"])

    def test_the_oracle_scores_the_twin_on_every_sample(self) -> None:
        """The twin is neither at chance nor equal to the teacher. Uncorrected, as both are compared."""
        found = evaluated(limit=1000, window=200, delay="0", settings={"learn.correct_prior": False})

        oracle = found.scores.oracle
        assert oracle is not None
        assert oracle.twin is not None
        twin = oracle.twin.cumulative
        assert twin.paired == 1000
        assert twin.teacher == oracle.cumulative.accuracy["teacher"]
        assert twin.twin is not None
        assert 0.7 < twin.twin < 1.0
        assert twin.twin != twin.teacher
        assert found.curves[-1].oracle_twin_cumulative == twin.twin
        assert (found.curves[-1].oracle_twin or 0.0) > 0.85

    def test_a_supervised_learner_has_no_twin(self) -> None:
        """It learns from labels only, as a twin does."""
        found = evaluated(settings={"learn.method": "supervised"})

        assert found.scores.oracle is not None
        assert found.scores.oracle.twin is None
        assert found.curves[-1].oracle_twin is None

    def test_it_learns(self) -> None:
        """Two moons with all labels and no delay."""
        found = evaluated(limit=1000, window=200, delay="0")

        assert (found.curves[-1].oracle or 0.0) > 0.85


class TestHeldOut:
    def test_every_network_is_scored(self) -> None:
        """Teacher, student and twin, on the whole held-out part."""
        test = evaluated(limit=600, delay="0").test

        assert test is not None
        assert test.count == 2000
        assert all(0.8 < (accuracy or 0) <= 1.0 for accuracy in (test.teacher, test.student, test.twin))

    def test_the_drift_at_the_end_applies_to_it(self) -> None:
        """Permuted classes are permuted in the held-out part too."""
        test = evaluated(limit=600, delay="0", drift="permute-labels").test

        assert test is not None
        assert (test.teacher or 0) > 0.8

    def test_the_class_prior_at_the_end_applies_to_it(self) -> None:
        """With nearly one class only, the teacher is nearly always right."""
        test = evaluated(limit=600, delay="0", drift="prior:1000000").test

        assert test is not None
        assert (test.teacher or 0) > 0.99

    def test_the_teacher_is_corrected_as_its_answers_are(self, tmp_path: Path) -> None:
        """Offsets that leave one class: its share of the held-out part."""
        moons = load("moons")
        settings = settings_for(config_of(), moons, EvaluationPlan(dataset="moons"), tmp_path)
        learner = make_learner(settings)
        learner.prior.log_offsets = np.array([-60.0, 60.0], np.float32)

        found = score_held_out(learner, moons.fit(settings.schema_.build()), (), ended_at=0, seed=0)

        assert found is not None
        assert moons.test_y is not None
        assert found.teacher == float((moons.test_y == 1).mean())
        assert found.student != found.teacher

    def test_a_data_set_may_have_none(self, tmp_path: Path) -> None:
        """A .npz file with x and y only."""
        np.savez(tmp_path / "mine.npz", x=np.eye(4, dtype=np.float32)[np.arange(80) % 4], y=np.arange(80) % 4)

        found = evaluated(dataset=str(tmp_path / "mine.npz"))

        assert found.test is None
        assert found.samples == 80


class TestSettings:
    def test_the_data_set_completes_the_config(self, tmp_path: Path) -> None:
        """Shape, dtype, classes, scale and model; the seed of the stream becomes learn.seed."""
        settings = settings_for(config_of(), load("digits"), EvaluationPlan(dataset="digits", seed=7), tmp_path)

        assert (settings.schema_.shape, settings.schema_.dtype, settings.schema_.scale) == ((1, 8, 8), "uint8", 1 / 16)
        assert (settings.model.factory, settings.model.normalise, settings.learn.seed) == ("convnet", False, 7)

    def test_the_config_takes_precedence(self, tmp_path: Path) -> None:
        """With a shape or a factory of the config, scale and normalisation are not suggested."""
        given = {"schema.shape": [64], "model.factory": "mlp", "learn.seed": 3, "guard.on": False}

        settings = settings_for(config_of(**given), load("digits"), EvaluationPlan(dataset="digits"), tmp_path)

        assert (settings.schema_.shape, settings.schema_.dtype, settings.schema_.scale) == ((64,), "uint8", 1.0)
        assert (settings.model.factory, settings.model.normalise, settings.learn.seed) == ("mlp", True, 3)
        assert not settings.guard.on

    def test_the_log_is_always_a_new_embedded_one(self, tmp_path: Path) -> None:
        """A simulation never reaches the Kafka of the config."""
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
    def test_an_invalid_plan_is_refused_with_the_reason(self, changes: dict[str, Any], message: str) -> None:
        """Before anything is learned."""
        with pytest.raises(ConfigError, match=message):
            evaluated(**changes)


class TestStateFolder:
    def test_it_is_removed_by_default(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """With log, store and checkpoints."""
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

        evaluated()

        assert list(tmp_path.iterdir()) == []

    def test_keep_state_keeps_it(self, tmp_path: Path) -> None:
        """With the log, so that a server or `inspect` can use it."""
        evaluated(keep_state=tmp_path / "kept")

        assert {"checkpoints", "log", "published", "store"} <= {path.name for path in (tmp_path / "kept").iterdir()}

    def test_a_folder_that_is_not_empty_is_refused(self, tmp_path: Path) -> None:
        """A learner would resume from it."""
        (tmp_path / "something").touch()

        with pytest.raises(ConfigError, match="not empty"):
            evaluated(keep_state=tmp_path)


class TestStop:
    def test_the_scores_until_then_are_reported(self) -> None:
        """`complete` is false."""
        found = stopped_while("learning")

        assert not found.complete
        assert 50 <= found.samples < 2000
        assert found.curves[-1].samples == found.samples

    def test_a_stop_before_the_first_step_is_an_error(self) -> None:
        """There are no scores."""
        with pytest.raises(StreamlearnError, match="before the first step"):
            stopped_while("writing the stream")
