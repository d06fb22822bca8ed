"""`streamlearn demo`, `simulate`, `evaluate` and `kafka`: to try it, and to measure what it learns."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from streamlearn.cli.options import (
    DELAYS,
    ConfigOption,
    DatasetArgument,
    DriftOption,
    LabelOption,
    LimitOption,
    OrderOption,
    ParentOption,
    PassesOption,
    SetOption,
    duration_s,
    start,
)


def demo(
    seconds: Annotated[str | None, typer.Option("--for", metavar="60s", help="Stop after this time.")] = None,
    port: Annotated[int, typer.Option(help="Port of the HTTP API; 0 takes a free one.")] = 8080,
    rate: Annotated[float, typer.Option(help="Samples per second.")] = 300.0,
    state: Annotated[Path, typer.Option(help="Folder for log and state; emptied at start.")] = Path("demo-state"),
) -> None:
    """Run a demonstration: digits as a stream, 5 % of them labelled, late; an embedded log; learner and servers.

    Examples:

        streamlearn demo

        streamlearn demo --for 60s --port 0

    It prints three curl commands to try while it runs.
    """
    from streamlearn.lab.demo import run_demo

    run_demo(seconds=duration_s(seconds), port=port, rate=rate, folder=state)


def simulate(
    dataset: DatasetArgument,
    config: ConfigOption = None,
    overrides: SetOption = None,
    rate: Annotated[float, typer.Option(help="Samples per second; 0: as fast as the log accepts them.")] = 0.0,
    label_share: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of samples that get a label.")] = 0.05,
    label_delay: Annotated[str, typer.Option(help=DELAYS)] = "geometric:500",
    label: LabelOption = None,
    order: OrderOption = "shuffle",
    passes: PassesOption = 1,
    limit: LimitOption = None,
    drift: DriftOption = "none",
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same records.")] = 0,
    id_prefix: Annotated[
        str | None,
        typer.Option(help="Prefix of the sample ids; default: data set, seed, order, drift."),
    ] = None,
    parent: ParentOption = None,
) -> None:
    """Send a labelled data set as a stream: samples, and later some of their labels.

    Records of a file are sent as they are, as JSON, and their class follows as a label that [source.labels] maps.

    Examples:

        streamlearn simulate digits --config streamlearn.toml --rate 200 --label-share 0.05 --label-delay geometric:500

        streamlearn simulate fashion-mnist -c streamlearn.toml --label-share 0.01 --label-delay geometric:5000

        streamlearn simulate mine.npz -c streamlearn.toml --drift rotate:90@10000 --seed 7

        streamlearn simulate history.csv -c streamlearn.toml --order file --label is_fraud
    """
    from streamlearn.app.signals import stop_signals
    from streamlearn.lab.simulate import run_simulation

    loaded = start(config, overrides, parent=parent)
    with stop_signals() as stopping:
        run_simulation(
            loaded,
            dataset,
            stopping,
            rate=rate or None,
            label_share=label_share,
            label_delay=label_delay,
            order=order,
            passes=passes,
            limit=limit,
            drift=drift,
            seed=seed,
            id_prefix=id_prefix,
            label=label,
        )


def evaluate(
    dataset: DatasetArgument,
    config: ConfigOption = None,
    overrides: SetOption = None,
    label_probability: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share of samples that get a label.")
    ] = 0.05,
    delay: Annotated[str, typer.Option(help=f"Of a label: {DELAYS}")] = "0",
    window: Annotated[
        int, typer.Option(min=10, max=1_000_000, help="Samples per point of the curves, and per windowed score.")
    ] = 1000,
    label: LabelOption = None,
    order: OrderOption = "shuffle",
    drift: DriftOption = "none",
    limit: LimitOption = None,
    passes: PassesOption = 1,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Same seed, same curves.")] = 0,
    rate: Annotated[
        float | None,
        typer.Option(
            min=0.001,
            help="Samples per second of the stream. As many steps are taken as a daemon on this machine has time for;"
            " default: batch.steps. Also for delays in seconds; default: 1000.",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for evaluation.json and curves.png; default evaluation-DATASET.")
    ] = None,
    keep_state: Annotated[
        Path | None, typer.Option(help="Keep the learner's state and log in this folder; default: remove them.")
    ] = None,
    plot: Annotated[bool, typer.Option("--plot/--no-plot", help="Plot the curves; needs `streamlearn[lab]`.")] = True,
    against: Annotated[
        str | None,
        typer.Option(
            help="refit: also run what a user would do instead on the same stream, labels and delays: eleven models of"
            " scikit-learn and river, refitted as labels come. Needs `streamlearn[lab]`."
        ),
    ] = None,
    offline: Annotated[
        bool, typer.Option("--offline", help="No stream: epochs over the data set, as in papers. See --labels.")
    ] = False,
    labels: Annotated[
        int, typer.Option(min=2, help="With --offline: number of labelled samples, over all classes.")
    ] = 1000,
    epochs: Annotated[int, typer.Option(min=1, help="With --offline: epochs.")] = 30,
) -> None:
    """Learn a labelled data set as a stream, as fast as possible; print the scores and plot the curves.

    Protocol of CapyMOA: every sample is predicted before it is learned; a few get a label, late. The report compares
    accuracy on all samples (ground truth) with accuracy on labelled samples (all that a service can observe), the
    label-only twin, and baselines. It runs the daemon's own loop without servers. Shape, classes and model default to
    those of the data set.

    Examples:

        streamlearn evaluate digits --label-probability 0.05 --delay 500 --window 500 --passes 10 --set batch.fresh=16

        streamlearn evaluate fashion-mnist --label-probability 0.01 --delay geometric:5000 --drift rotate:90@30000

        streamlearn evaluate mine.npz --config streamlearn.toml --set learn.method=supervised --out baseline

        streamlearn evaluate history.csv --config streamlearn.toml --order file --label is_fraud

        streamlearn evaluate fashion-mnist --offline --labels 500 --epochs 20 --set learn.method=pi
    """
    from streamlearn.app.signals import stop_signals
    from streamlearn.lab.evaluate import EvaluationPlan
    from streamlearn.lab.offline import OfflinePlan
    from streamlearn.lab.report import run_evaluation, run_offline

    loaded = start(config, overrides, level=logging.WARNING)  # more lines would break the progress bars
    plan = EvaluationPlan(
        dataset=dataset,
        label=label,
        label_probability=label_probability,
        delay=delay,
        window=window,
        order=order,
        drift=drift,
        limit=limit,
        passes=passes,
        seed=seed,
        rate=rate,
    )
    if against not in (None, "refit"):
        raise typer.BadParameter(f"expected refit, got {against}", param_hint="--against")
    if against and offline:
        raise typer.BadParameter("needs a stream: leave out --offline", param_hint="--against")
    once = OfflinePlan(dataset=dataset, labels=labels, epochs=epochs, limit=limit, seed=seed)
    with stop_signals() as stopping:
        if offline:
            run_offline(loaded, once, stopping, out=out)
        else:
            run_evaluation(
                loaded,
                plan,
                stopping,
                out=out,
                keep_state=keep_state,
                plot=plot,
                against_refit=against is not None,
            )


def kafka(
    port: Annotated[int, typer.Option(help="0 takes a free one.")] = 9092,
    folder: Annotated[Path, typer.Option("--dir", help="Folder for its data.")] = Path("kafka-data"),
) -> None:
    """Run a real Apache Kafka on this machine, without Docker: one node, on loopback. Needs `streamlearn[broker]`.

    Examples:

        streamlearn kafka

        streamlearn kafka --port 19092 --dir /tmp/kafka
    """
    from streamlearn.lab.broker import run_broker

    run_broker(folder, port=port, say=lambda line: typer.echo(line, err=True))
