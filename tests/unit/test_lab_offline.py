"""Epochs over a data set of which a few samples are labelled: the papers' protocol, on the learner of the stream."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from streamlearn.config import load_config
from streamlearn.errors import ConfigError
from streamlearn.lab.offline import (
    OfflineEvaluation,
    OfflinePlan,
    choose_labelled,
    evaluate_offline,
    learning_rate_factor,
)

torch.set_num_threads(1)


def evaluated(settings: dict[str, Any] | None = None, **changes: Any) -> OfflineEvaluation:
    config = load_config(environ={}, overrides={"learn.threads": 1, "batch.fresh": 20, **(settings or {})})
    plan: dict[str, Any] = {"dataset": "moons", "limit": 200, "labels": 20, "epochs": 2, "points": 2, **changes}
    return evaluate_offline(config, OfflinePlan(**plan), threading.Event())


class TestProtocol:
    def test_the_same_seed_gives_the_same_numbers(self) -> None:
        """And another one others."""
        one, again, other = evaluated(), evaluated(), evaluated(seed=1)

        assert one.as_json() == again.as_json()
        assert one.curve != other.curve

    def test_each_epoch_sees_every_sample_once(self) -> None:
        """Ten steps of 20 for each; the held-out part is asked as often as wanted, and at the end."""
        found = evaluated(epochs=3, points=4)

        assert (found.steps, found.complete) == (30, True)
        assert [point["step"] for point in found.curve] == [8, 15, 22, 30]

    def test_it_learns_from_labels_and_more_of_them_teach_more(self) -> None:
        """A sanity check of the whole."""
        few, many = (evaluated(labels=labels, limit=1000, epochs=4).test["teacher"] for labels in (2, 500))

        assert few is not None
        assert many is not None
        assert many > few
        assert many > 0.9

    @pytest.mark.parametrize("method", ["supervised", "pi", "temporal_ensembling", "mean_teacher", "ict"])
    def test_every_method_can_be_asked(self, method: str) -> None:
        """Twin and all; a learner of labels alone is its own twin."""
        found = evaluated({"learn.method": method})

        assert (found.test["twin"] is None) == (method == "supervised")
        assert (found.test["teacher"] or 0) > 0.5

    def test_it_can_be_stopped(self) -> None:
        """With what was learned until then."""
        config = load_config(environ={}, overrides={"learn.threads": 1, "batch.fresh": 20})
        stopping = threading.Event()

        def progress(_what: str, done: int, _total: int) -> None:
            if done == 3:
                stopping.set()

        plan = OfflinePlan(dataset="moons", limit=200, labels=20)
        found = evaluate_offline(config, plan, stopping, progress=progress)

        assert (found.complete, found.steps, found.test["step"]) == (False, 3, 3)

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
    def test_what_cannot_be_run_is_refused_with_the_reason(self, changes: dict[str, Any], message: str) -> None:
        """Before anything is learned."""
        with pytest.raises(ConfigError, match=message):
            evaluated(**changes)

    def test_no_label_leaves_the_memory(self, tmp_path: Path) -> None:
        """However small it is on a stream."""
        found = evaluated({"labels.replay_rows": 3}, labels=40)

        assert found.labels == 40
        assert found.config.labels.replay_rows == 40


class TestLabels:
    def test_classes_are_as_even_as_can_be(self) -> None:
        """5 of 3 classes are 2, 2 and 1; a class that runs out leaves its share to the others."""
        y = np.repeat(np.arange(3), [50, 30, 2])

        counts = np.bincount(y[choose_labelled(y, 5, 0)])
        more = np.bincount(y[choose_labelled(y, 20, 0)])

        assert sorted(counts) == [1, 2, 2]
        assert more.tolist() == [9, 9, 2]

    def test_none_is_chosen_twice(self) -> None:
        """All of them are all."""
        y = np.arange(60) % 7

        assert sorted(choose_labelled(y, 60, 3)) == list(range(60))


class TestLearningRate:
    @pytest.mark.parametrize(
        ("done", "wanted"), [(0, 1.0), (750, 1.0), (875, np.exp(-12.5 / 4)), (1000, np.exp(-12.5))]
    )
    def test_falls_over_the_last_quarter(self, done: int, wanted: float) -> None:
        """As a half bell."""
        assert learning_rate_factor(done, 1000, share=0.25) == pytest.approx(wanted)

    def test_of_no_ramp_is_one(self) -> None:
        """A stream has none."""
        assert learning_rate_factor(1000, 1000, share=0.0) == 1.0
