"""`evaluate --offline`: epochs over a data set with few labels, as in the papers."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

from streamlearn.config import load_config
from streamlearn.errors import ConfigError
from streamlearn.lab.offline import (
    OfflineEvaluation,
    OfflinePlan,
    choose_labelled,
    evaluate_offline,
    learning_rate_factor,
)


def evaluated(settings: dict[str, Any] | None = None, **changes: Any) -> OfflineEvaluation:
    config = load_config(environ={}, overrides={"learn.threads": 1, "batch.fresh": 20, **(settings or {})})
    plan: dict[str, Any] = {"dataset": "moons", "limit": 200, "labels": 20, "epochs": 2, "points": 2, **changes}
    return evaluate_offline(config, OfflinePlan(**plan), threading.Event())


class TestProtocol:
    def test_the_same_seed_gives_the_same_numbers(self) -> None:
        """Another seed gives others."""
        one, again, other = evaluated(), evaluated(), evaluated(seed=1)

        assert one.as_json() == again.as_json()
        assert one.curve != other.curve

    def test_each_epoch_sees_every_sample_once(self) -> None:
        """10 steps of 20 samples per epoch; `points` scores, the last one at the end."""
        found = evaluated(epochs=3, points=4)

        assert (found.steps, found.complete) == (30, True)
        assert [point.step for point in found.curve] == [8, 15, 22, 30]

    def test_more_labels_give_a_higher_accuracy(self) -> None:
        """2 against 500 labels of two moons."""
        few, many = (evaluated(labels=labels, limit=1000, epochs=4).test.teacher for labels in (2, 500))

        assert few is not None
        assert many is not None
        assert many > few
        assert many > 0.9

    @pytest.mark.parametrize("method", ["supervised", "pi", "temporal_ensembling", "mean_teacher", "ict"])
    def test_every_method_runs(self, method: str) -> None:
        """All but `supervised` have a twin."""
        found = evaluated({"learn.method": method})

        assert (found.test.twin is None) == (method == "supervised")
        assert (found.test.teacher or 0) > 0.5

    def test_it_can_be_stopped(self) -> None:
        """The last point is of the steps until then."""
        config = load_config(environ={}, overrides={"learn.threads": 1, "batch.fresh": 20})
        stopping = threading.Event()

        def progress(_what: str, done: int, _total: int) -> None:
            if done == 3:
                stopping.set()

        plan = OfflinePlan(dataset="moons", limit=200, labels=20)
        found = evaluate_offline(config, plan, stopping, progress=progress)

        assert (found.complete, found.steps, found.test.step) == (False, 3, 3)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"labels": 1}, "labels: wanted 2"),
            ({"labels": 201}, "labels: wanted 2"),
            ({"epochs": 0}, "epochs: wanted"),
            ({"epochs": 10**9}, "epochs: wanted"),
            ({"rampdown": 1.5}, "rampdown: wanted"),
            ({"dataset": "shuttle", "limit": 300}, "no held-out part"),
        ],
    )
    def test_an_invalid_plan_is_refused_with_the_reason(self, changes: dict[str, Any], message: str) -> None:
        """Before anything is learned."""
        with pytest.raises(ConfigError, match=message):
            evaluated(**changes)

    def test_the_replay_buffer_holds_every_label(self) -> None:
        """Even if the config has a smaller one."""
        found = evaluated({"labels.replay_rows": 3}, labels=40)

        assert found.labels == 40
        assert found.config.labels.replay_rows == 40


class TestLabels:
    def test_classes_are_balanced(self) -> None:
        """5 labels of 3 classes are 2, 2 and 1; the share of an exhausted class goes to the others."""
        y = np.repeat(np.arange(3), [50, 30, 2])

        counts = np.bincount(y[choose_labelled(y, 5, 0)])
        more = np.bincount(y[choose_labelled(y, 20, 0)])

        assert sorted(counts) == [1, 2, 2]
        assert more.tolist() == [9, 9, 2]

    def test_no_row_is_chosen_twice(self) -> None:
        """Choosing all rows gives each one once."""
        y = np.arange(60) % 7

        assert sorted(choose_labelled(y, 60, 3)) == list(range(60))


class TestLearningRate:
    @pytest.mark.parametrize(
        ("done", "expected"), [(0, 1.0), (750, 1.0), (875, np.exp(-12.5 / 4)), (1000, np.exp(-12.5))]
    )
    def test_falls_over_the_last_quarter(self, done: int, expected: float) -> None:
        """As exp(-12.5 x^2)."""
        assert learning_rate_factor(done, 1000, share=0.25) == pytest.approx(expected)

    def test_without_a_rampdown_it_is_constant(self) -> None:
        """`share` is 0."""
        assert learning_rate_factor(1000, 1000, share=0.0) == 1.0
