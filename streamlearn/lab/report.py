"""Output of `streamlearn evaluate`: progress bars, tables, evaluation.json, and curves.png."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import orjson
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from streamlearn.app.bars import Bars
from streamlearn.config import Config
from streamlearn.errors import ConfigError
from streamlearn.judge.prequential import Network, SpanScores
from streamlearn.judge.scoreboard import ScoreReport
from streamlearn.lab.drift import parse_drift
from streamlearn.lab.evaluate import Evaluation, EvaluationPlan, evaluate
from streamlearn.lab.held_out import Accuracy
from streamlearn.lab.offline import OfflineEvaluation, OfflinePlan, evaluate_offline
from streamlearn.lab.plots import check_can_plot, draw
from streamlearn.lab.refit import RivalScores
from streamlearn.loop.guarding import GuardingReport
from streamlearn.state.files import write_whole

_ACCURACIES: tuple[tuple[str, Network], ...] = (
    ("accuracy, teacher", "teacher"),
    ("accuracy, student", "student"),
    ("accuracy, majority", "majority"),
    ("accuracy, no change", "no_change"),
)
_SCORES = (
    ("balanced accuracy", "balanced_accuracy"),
    ("kappa", "kappa"),
    ("kappa-M", "kappa_m"),
    ("kappa-T", "kappa_t"),
    ("log loss (nats)", "log_loss"),
    ("Brier score", "brier"),
    ("ECE", "ece"),
)
_WINDOW_SCORES = (("PR-AUC, mean of classes", "pr_auc"),)
"""Only over the window."""
_NETWORKS = {"teacher": "teacher", "student": "student", "twin": "label-only twin"}
JSON_NAME, PLOT_NAME = "evaluation.json", "curves.png"


def run_evaluation(
    config: Config,
    plan: EvaluationPlan,
    stopping: threading.Event,
    *,
    out: Path | None = None,
    keep_state: Path | None = None,
    plot: bool = True,
    against_refit: bool = False,
) -> Evaluation:
    """Evaluate with progress bars on stderr, print the tables, write the files.

    `against_refit`: also run `lab.refit.refit` on the same stream, and compare.

    `out`: folder of the files, created if missing; default: `evaluation-` and the name of the data set. Files of an
    earlier evaluation are replaced.

    Raises:
        ConfigError: see `evaluate`; or the folder cannot be created, or matplotlib is missing. Raised before the run.
    """
    if plot:
        check_can_plot()
    folder = out if out is not None else Path(f"evaluation-{Path(plan.dataset).stem}")
    started = time.monotonic()
    with _output_folder(folder), Bars() as bars:
        evaluation = evaluate(config, plan, stopping, keep_state=keep_state, progress=bars, report=bars.say)
        duration_s = max(time.monotonic() - started, 1e-9)
        rivals = evaluation.rivals(stopping, progress=bars) if against_refit else []
    against = [evaluation.against(), *rivals] if rivals else []
    written = {"curves and scores": folder / JSON_NAME}
    content = evaluation.as_json() | ({"against": [asdict(scores) for scores in against]} if against else {})
    write_whole(folder / JSON_NAME, [orjson.dumps(content, option=orjson.OPT_INDENT_2)])
    if plot:
        written["plot"] = folder / PLOT_NAME
        write_whole(folder / PLOT_NAME, [picture(evaluation)])
    if keep_state is not None:
        written["state"] = keep_state
    console = Console(highlight=False, soft_wrap=True)
    console.print(*tables(evaluation), *_events(evaluation.guarding), sep="\n")
    if against:
        console.print(comparison(against))
    elif against_refit:
        console.print("[yellow]stopped early: no comparison with rivals[/]")
    if not evaluation.complete:
        console.print("[yellow]stopped early: all figures are of the beginning of the stream[/]")
    console.print(
        f"{evaluation.samples} samples in {duration_s:.1f} s: {evaluation.samples / duration_s:.0f} per second"
    )
    for what, path in written.items():
        console.print(f"{what}: {escape(str(path))}")
    return evaluation


def run_offline(
    config: Config, plan: OfflinePlan, stopping: threading.Event, *, out: Path | None = None
) -> OfflineEvaluation:
    """The same for `--offline`: progress bar, table of test accuracies by step, evaluation.json.

    Raises:
        ConfigError: see `evaluate_offline`; or the folder cannot be created.
    """
    folder = out if out is not None else Path(f"evaluation-{Path(plan.dataset).stem}")
    with _output_folder(folder), Bars() as bars:
        evaluation = evaluate_offline(config, plan, stopping, progress=bars)
        write_whole(folder / JSON_NAME, [orjson.dumps(evaluation.as_json(), option=orjson.OPT_INDENT_2)])
    title = f"{escape(plan.dataset)}: {evaluation.labels} labels, {plan.epochs} epochs, {config.learn.method}"
    shown = Table("step", *_NETWORKS.values(), title=title, title_justify="left", title_style="bold")
    for point in evaluation.curve:
        shown.add_row(str(point.step), *(_number(getattr(point, name)) for name in _NETWORKS))
    console = Console(highlight=False, soft_wrap=True)
    console.print(shown)
    if not evaluation.complete:
        console.print("[yellow]stopped early[/]")
    console.print(f"test accuracy by step: {escape(str(folder / JSON_NAME))}")
    return evaluation


@contextlib.contextmanager
def _output_folder(folder: Path) -> Iterator[None]:
    """Create the folder before the run; remove a new one again if the run fails."""
    new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {folder}: {error.strerror or error}; choose another folder") from error
    try:
        yield
    except BaseException:
        if new:
            folder.rmdir()
        raise


def tables(evaluation: Evaluation) -> tuple[Table, Table]:
    """Scores of the first predictions, oracle next to observed; and accuracies that are single numbers."""
    window = evaluation.plan.window
    first = Table(
        title=_headline(evaluation),
        title_justify="left",
        title_style="bold",
        caption="oracle: all samples, known only in a simulation; observed: labelled samples",
        caption_justify="left",
    )
    first.add_column("first predictions", no_wrap=True)
    for whose in ("oracle", "observed"):
        for span in (f"last {window}", "whole stream"):
            first.add_column(f"{whose},\n{span}", justify="right", no_wrap=True)
    oracle, observed = evaluation.scores.oracle, evaluation.scores.at_arrival
    assert oracle is not None, "every sample of the stream has its true label"
    spans: list[SpanScores] = [oracle.windowed, oracle.cumulative, observed.windowed, observed.cumulative]
    for title, network in _ACCURACIES:
        first.add_row(title, *(_number(span.accuracy[network]) for span in spans))
    for title, name in _SCORES:
        first.add_row(title, *(_number(getattr(span, name)) for span in spans))
    for title, name in _WINDOW_SCORES:
        windowed = (_number(getattr(span.windowed, name)) for span in (oracle, observed))
        first.add_row(title, *(cell for value in windowed for cell in (value, "")))
    first.add_row("samples", *(str(span.count) for span in spans))

    second = Table("accuracy and calibration", "", "of")
    second.columns[1].justify = second.columns[2].justify = "right"
    scores = evaluation.scores
    for row in (*_label_time_rows(scores), *_calibration_rows(scores), *_test_rows(evaluation.test)):
        second.add_row(*row)
    return first, second


def comparison(against: Sequence[RivalScores]) -> Table:
    """One row per way to answer the stream, the most accurate of the last quarter first."""
    shown = Table(
        "same stream, labels and delays",
        "accuracy,\nall",
        "accuracy,\nlast quarter",
        "PR-AUC",
        "log loss",
        "CPU s",
        "fits",
        caption="refitted on all labels so far whenever they grew by 5 %, but streamlearn and the trees of river",
        caption_justify="left",
    )
    for column in shown.columns[1:]:
        column.justify = "right"
    for scores in sorted(against, key=lambda scores: -scores.last_accuracy):
        numbers = (scores.accuracy, scores.last_accuracy, scores.pr_auc, scores.log_loss)
        shown.add_row(scores.name, *(_number(value) for value in numbers), f"{scores.cpu_s:.1f}", str(scores.fits))
    return shown


def _events(guarding: GuardingReport) -> list[str]:
    """Alarms of the drift monitor and actions of the guard, if there were any."""
    counts = {f"drift, {source}": found.alarms for source, found in guarding.drift.items()}
    counts |= {f"guard, {action}": count for action, count in guarding.guard.actions.items()}
    shown = [f"{what.replace('_', ' ')}: {count}" for what, count in counts.items() if count and "good" not in what]
    return [f"alarms and actions: {'; '.join(shown)}"] if shown else []


def _headline(evaluation: Evaluation) -> str:
    share = 100 * evaluation.labels / max(evaluation.samples, 1)
    return (
        f"{escape(evaluation.plan.dataset)}: {evaluation.samples} samples, {evaluation.labels} labels ({share:.1f} %),"
        f" {evaluation.counts.labels_pending} not due, {evaluation.steps} steps"
        f" ({evaluation.config.batch.steps} per micro-batch)"
    )


def _label_time_rows(scores: ScoreReport) -> list[tuple[str, str, str]]:
    at_label, twin = scores.at_label, scores.oracle.twin if scores.oracle else None
    low, high = at_label.interval or (None, None)
    gain = _signed(at_label.gain) + ("" if low is None else f" [{low:+.4f}, {high:+.4f}]")
    count, paired = str(at_label.count), str(at_label.paired)
    return [
        ("oracle: label-only twin", _number(twin.twin if twin else None), str(twin.paired if twin else 0)),
        ("when the label comes: teacher", _number(at_label.teacher), count),
        ("when the label comes: label-only twin", _number(at_label.twin), paired),
        ("ssl_gain: teacher minus twin", gain, paired),
        ("first prediction minus at the label", _signed(scores.first_minus_at_label), count),
    ]


def _calibration_rows(scores: ScoreReport) -> list[tuple[str, str, str]]:
    found, count = scores.calibration, str(scores.calibration.count)
    return [
        ("when the label comes: ECE, network alone", _number(found.network.ece), count),
        ("when the label comes: ECE, corrected", _number(found.corrected.ece), count),
    ]


def _test_rows(test: Accuracy | None) -> list[tuple[str, str, str]]:
    if test is None:
        return [("held-out test", "none", "")]
    return [
        (f"held-out test: {title}", _number(getattr(test, name)), str(test.count)) for name, title in _NETWORKS.items()
    ]


def picture(evaluation: Evaluation) -> bytes:
    """The curves as a PNG."""
    plan = evaluation.plan
    drift = "" if plan.drift == "none" else f", drift {plan.drift}"
    passes = "" if plan.passes == 1 else f" in {plan.passes} passes"
    return draw(
        evaluation.curves,
        title=(
            f"{evaluation.dataset.name}: label probability {plan.label_probability:g}, delay {plan.delay},"
            f" window {plan.window}"
        ),
        subtitle=(
            f"{evaluation.samples:,} samples{passes}, {evaluation.labels:,} labels, order {plan.order}{drift},"
            f" seed {plan.seed}; {evaluation.config.learn.method}, {evaluation.config.model.factory},"
            f" {evaluation.steps:,} steps of {evaluation.config.batch.fresh}"
        ),
        window=plan.window,
        test_accuracy=None if evaluation.test is None else evaluation.test.teacher,
        drifts_at=sorted({at for d in parse_drift(plan.drift) for at in (d.start, d.end) if at is not None}),
    )


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _signed(value: float | None) -> str:
    return "–" if value is None else f"{value:+.4f}"
