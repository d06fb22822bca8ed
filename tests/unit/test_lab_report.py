"""The output of `streamlearn evaluate`."""

from __future__ import annotations

import json
import re
import sys
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs
from support import finish
from typer.testing import CliRunner

from streamlearn.cli import app
from streamlearn.config import load_config
from streamlearn.errors import ConfigError
from streamlearn.lab.evaluate import Evaluation, EvaluationPlan
from streamlearn.lab.offline import OfflinePlan
from streamlearn.lab.report import run_evaluation, run_offline


def run(out: Path | None, stopping: threading.Event | None = None, *, plot: bool = False, **changes: Any) -> Evaluation:
    config = load_config(environ={}, overrides={"learn.threads": 1, "batch.fresh": 10, "batch.steps": 4})
    plan = {"dataset": "moons", "limit": 200, "window": 50, "label_probability": 1.0, "delay": "100"}
    with capture_logs():  # logging is not configured here
        return run_evaluation(
            config, EvaluationPlan(**{**plan, **changes}), stopping or threading.Event(), out=out, plot=plot
        )


def row(shown: str, name: str) -> list[str]:
    (line,) = [line for line in shown.splitlines() if name in line]
    return [cell.strip() for cell in re.split("[│┃]", line)[2:-1]]


class TestOffline:
    def test_shows_every_point_and_writes_them(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """One row per point."""
        config = load_config(environ={}, overrides={"learn.threads": 1, "batch.fresh": 20})
        plan = OfflinePlan(dataset="moons", limit=100, labels=10, epochs=2, points=2)

        found = run_offline(config, plan, threading.Event(), out=tmp_path / "new")

        shown = capsys.readouterr().out
        assert "moons: 10 labels, 2 epochs, mean_teacher" in shown
        assert f"│ 10   │ {found.test.teacher:.4f}" in shown
        written = json.loads((tmp_path / "new" / "evaluation.json").read_text())
        assert written["curve"] == [asdict(point) for point in found.curve]

    def test_is_an_option_of_the_command(self, tmp_path: Path) -> None:
        """With --labels and --epochs."""
        options = ["evaluate", "moons", "--offline", "--labels", "10", "--epochs", "1", "--limit", "64"]

        found = CliRunner().invoke(app, [*options, "--set", "learn.threads=1", "--out", str(tmp_path)])

        assert found.exit_code == 0, found.output
        assert json.loads((tmp_path / "evaluation.json").read_text())["protocol"]["labels"] == 10


class TestTable:
    def test_has_the_oracle_scores_next_to_the_observed_ones(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Over the last window and the whole stream, on stdout; the bars are on stderr."""
        scores = run(tmp_path).scores
        shown = capsys.readouterr()

        assert scores.oracle is not None
        spans = [getattr(of, span) for of in (scores.oracle, scores.at_arrival) for span in ("windowed", "cumulative")]
        assert row(shown.out, "accuracy, teacher") == [f"{span.accuracy['teacher']:.4f}" for span in spans]
        assert row(shown.out, "kappa ") == [f"{span.kappa:.4f}" for span in spans]
        assert row(shown.out, "ECE ") == [f"{span.ece:.4f}" for span in spans]
        assert row(shown.out, "log loss") == [f"{span.log_loss:.4f}" for span in spans]
        assert row(shown.out, "PR-AUC, mean") == [f"{spans[0].pr_auc:.4f}", "", f"{spans[2].pr_auc:.4f}", ""]
        assert row(shown.out, "samples  ") == ["50", "200", "50", "100"]
        assert "learning" in shown.err

    def test_has_twin_gain_and_held_out_test(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """With the interval of the gain and the number of samples."""
        found = run(tmp_path)
        shown, at_label, test = capsys.readouterr().out, found.scores.at_label, found.test

        assert at_label.interval is not None
        low, high = at_label.interval
        assert test is not None
        assert found.scores.oracle is not None
        twin = found.scores.oracle.twin
        assert twin is not None
        assert row(shown, "oracle: label-only twin") == [f"{twin.twin:.4f}", "50"]
        assert row(shown, "label comes: label-only twin") == [f"{at_label.twin:.4f}", "50"]
        assert row(shown, "ssl_gain") == [f"{at_label.gain:+.4f} [{low:+.4f}, {high:+.4f}]", "50"]
        assert row(shown, "ECE, network") == [f"{found.scores.calibration.network.ece:.4f}", "50"]
        assert row(shown, "ECE, corrected") == [f"{found.scores.calibration.corrected.ece:.4f}", "50"]
        assert row(shown, "test: teacher") == [f"{test.teacher:.4f}", "2000"]

    def test_begins_with_the_counts(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """Samples, labels and their share, labels not due, steps."""
        run(tmp_path)

        assert capsys.readouterr().out.startswith(
            "moons: 200 samples, 100 labels (50.0 %), 100 not due, 81 steps (4 per micro-batch)"
        )

    def test_shows_undefined_scores_as_a_dash(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """Without labels only the oracle scores are defined."""
        run(tmp_path, label_probability=0.0)
        shown = capsys.readouterr().out

        assert row(shown, "accuracy, teacher")[2:] == ["–", "–"]
        assert row(shown, "ssl_gain") == ["–", "0"]


class TestFiles:
    def test_the_json_has_the_curves_and_everything_else(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """The output names the file."""
        found = run(tmp_path / "new" / "folder")
        path = tmp_path / "new" / "folder" / "evaluation.json"
        read = json.loads(path.read_bytes())

        assert read["curves"] == [asdict(point) for point in found.curves]
        assert read["protocol"]["label_probability"] == 1.0
        assert read["settings"]["batch"]["fresh"] == 10
        assert f"curves and scores: {path}" in capsys.readouterr().out

    def test_the_plot_is_in_the_same_folder(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """With `plot=True`."""
        run(tmp_path, plot=True)

        assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
        assert f"plot: {tmp_path / 'curves.png'}" in capsys.readouterr().out

    def test_the_folder_is_named_after_the_data_set_by_default(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """In the current folder."""
        monkeypatch.chdir(tmp_path)

        run(None)

        assert [path.name for path in tmp_path.iterdir()] == ["evaluation-moons"]

    def test_a_folder_that_cannot_be_created_is_refused(self, tmp_path: Path) -> None:
        """Before the run."""
        (tmp_path / "file").touch()

        with pytest.raises(ConfigError, match="--out"):
            run(tmp_path / "file" / "below")

    def test_an_invalid_plan_leaves_no_folder(self, tmp_path: Path) -> None:
        """The new folder is removed again."""
        with pytest.raises(ConfigError, match="soon"):
            run(tmp_path / "out", delay="soon")

        assert list(tmp_path.iterdir()) == []


def test_without_matplotlib_nothing_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error comes before the run."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)

    with pytest.raises(ConfigError, match="matplotlib"):
        run(tmp_path / "out", plot=True)

    assert list(tmp_path.iterdir()) == []


def test_the_help_has_examples_and_all_options() -> None:
    """With the terms of the protocol."""
    shown = CliRunner().invoke(app, ["evaluate", "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"}).output

    assert "streamlearn evaluate digits --label-probability 0.05 --delay 500" in shown
    for option in ("--window", "--passes", "--drift", "--seed", "--out", "--keep-state", "--no-plot"):
        assert option in shown


def test_the_command_runs_from_a_shell(tmp_path: Path) -> None:
    """With overridden settings; stdout has no log lines."""
    options = ("--limit", 100, "--window", 50, "--delay", 10, "--label-probability", 0.5, "--no-plot")

    shown = finish("evaluate", "moons", *options, "-s", "batch.fresh=10", "--out", tmp_path)

    assert shown.startswith("moons: 100 samples, ")
    assert json.loads((tmp_path / "evaluation.json").read_bytes())["settings"]["batch"]["fresh"] == 10
