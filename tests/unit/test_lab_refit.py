"""`evaluate --against refit`: the rivals see the same stream."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from streamlearn.cli import app
from streamlearn.errors import ConfigError
from streamlearn.lab.datasets import load
from streamlearn.lab.delays import parse_delay
from streamlearn.lab.refit import RivalScores, make_rivals, refit
from streamlearn.lab.stream import StreamPlan
from streamlearn.records import Column

FAST = ("logistic regression", "nearest neighbours", "Hoeffding tree")


def scores(only: tuple[str, ...] = FAST, *, samples: int = 400, **plan: Any) -> dict[str, RivalScores]:
    data = load("moons", limit=samples)
    given = {"label_share": 1.0, "delay": parse_delay("0"), "start_time_ms": 1, "drop_pending": True, **plan}
    stream = StreamPlan(dataset=data, schema=data.schema, **given)
    found = refit(data, stream, data.schema, threading.Event(), rate=1000.0, block=20, only=only)
    return {each.name: each for each in found}


class TestRefit:
    def test_each_rival_learns(self) -> None:
        """Two moons, every label at once."""
        found = scores()

        assert set(found) == set(FAST)
        assert found["nearest neighbours"].last_accuracy > 0.95
        assert found["logistic regression"].last_accuracy > 0.8
        assert all(each.cpu_s > 0.0 and (each.log_loss or 9.0) < 0.6 for each in found.values())

    def test_labels_come_late(self) -> None:
        """With a delay longer than the stream nothing is learned."""
        found = scores(delay=parse_delay("1000"))

        assert all(each.fits == 0 for each in found.values())
        assert all(each.log_loss == pytest.approx(np.log(2)) for each in found.values())

    def test_only_some_have_a_label(self) -> None:
        """The incremental tree learns each label once."""
        found = scores(label_share=0.1)

        assert 20 <= found["Hoeffding tree"].fits <= 60

    def test_a_refit_needs_five_percent_more_labels(self) -> None:
        """Fewer fits than blocks with labels, once there are many."""
        assert scores(samples=2000)["logistic regression"].fits < 60

    @pytest.mark.parametrize("name", sorted(make_rivals(2, 0)))
    def test_every_rival_answers(self, name: str) -> None:
        """Better than chance, with few labels."""
        found = scores((name,), samples=200, label_share=0.5)

        assert found[name].last_accuracy > 0.7
        assert found[name].pr_auc is not None

    def test_the_number_of_neighbours_follows_the_labels(self) -> None:
        """One neighbour while there are few labels, five from ten per class on."""
        rivals, (x, others) = make_rivals(2, 0), np.random.default_rng(0).normal(size=(2, 60, 2))
        labels = np.arange(60) % 2
        made = []
        for count in (10, 60):
            rivals["nearest neighbours"].learn(x[:count], labels[:count], count, x[:0])
            made.append(len(np.unique(rivals["nearest neighbours"].answer(others).max(axis=1).round(6))))

        assert made[0] == 1, "one neighbour is always certain"
        assert made[1] > 1

    def test_a_stopped_run_has_no_scores(self) -> None:
        """A part of the stream compares with nothing."""
        data, stopping = load("moons", limit=50), threading.Event()
        stopping.set()

        assert refit(data, StreamPlan(dataset=data), data.schema, stopping, rate=1000.0, block=20, only=FAST) == []

    def test_categories_are_refused(self) -> None:
        """Their codes are no numbers."""
        data = load("moons", limit=50)
        schema = replace(data.schema, columns=(Column("a", "category", 8, 4), Column("b", "boolean")))

        with pytest.raises(ConfigError, match="categories"):
            refit(data, StreamPlan(dataset=data), schema, threading.Event(), rate=1000.0, block=20)


class TestCommand:
    def test_prints_and_writes_the_comparison(self, tmp_path: Path) -> None:
        """It is one of the rows."""
        options = ["evaluate", "moons", "--limit", "128", "--label-probability", "1", "--no-plot", "--against", "refit"]

        found = CliRunner().invoke(
            app, [*options, "--set", "batch.steps=1", "--out", str(tmp_path)], env={"COLUMNS": "200"}
        )

        assert found.exit_code == 0, found.output
        written = json.loads((tmp_path / "evaluation.json").read_text())["against"]
        assert {"streamlearn", *make_rivals(2, 0)} == {row["name"] for row in written}
        assert all(row["name"] in found.output for row in written)

    @pytest.mark.parametrize("options", [["--against", "me"], ["--against", "refit", "--offline"]])
    def test_another_word_or_no_stream_is_refused(self, options: list[str]) -> None:
        """Before anything runs."""
        assert CliRunner().invoke(app, ["evaluate", "moons", *options]).exit_code == 2
