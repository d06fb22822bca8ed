"""The commands. Each --help has examples. Modules with slow imports are imported by the commands that need them."""

from __future__ import annotations

import logging
import os
import socket
import sys
from pathlib import Path
from typing import Annotated

import typer

from streamlearn import __version__
from streamlearn.cli.models import models
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
    child_arguments,
    duration_s,
    load,
    start,
)
from streamlearn.cli.topics import check, init
from streamlearn.errors import StreamlearnError

app = typer.Typer(
    name="streamlearn",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help=(
        "Online semi-supervised learning from a stream, with late labels, and live serving.\n\n"
        "Start with `streamlearn demo`: a stream of handwritten digits on this machine, 5 % of them labelled, late."
    ),
)
app.add_typer(models, name="models")


@app.command()
def run(config: ConfigOption = None, overrides: SetOption = None) -> None:
    """Learn and serve: one learner, several servers and scorers under one supervisor. The container runs this.

    Examples:

        streamlearn run --config streamlearn.toml

        streamlearn run -c streamlearn.toml -s log.kind=kafka -s log.kafka.bootstrap_servers=kafka:9092

        STREAMLEARN_SERVE__TOKEN=secret streamlearn run -c streamlearn.toml -s serve.host=0.0.0.0

    SIGTERM or Ctrl-C stops cleanly: requests are answered, a checkpoint is saved. A second one exits at once.
    """
    from streamlearn.app.signals import stop_signals
    from streamlearn.app.supervisor import Supervisor

    loaded = start(config, overrides)
    with stop_signals() as stopping:
        supervisor = Supervisor(loaded, child_arguments(config, overrides))
        typer.echo(f"serving on http://{supervisor.address} (docs at /docs); stop with Ctrl-C", err=True)
        supervisor.run(stopping)


@app.command()
def learn(
    config: ConfigOption = None,
    overrides: SetOption = None,
    until_end: Annotated[bool, typer.Option("--until-end", help="Stop at the end of the log.")] = False,
    parent: ParentOption = None,
) -> None:
    """Learn only, without servers. The learner is the only process that changes model state.

    Examples:

        streamlearn learn --config streamlearn.toml

        streamlearn learn --config streamlearn.toml --until-end
    """
    from streamlearn.app.learner import learn as run_learner
    from streamlearn.app.signals import stop_signals

    loaded = start(config, overrides, parent=parent)
    with stop_signals() as stopping:
        run_learner(loaded, stopping, until_end=until_end)


@app.command()
def serve(
    config: ConfigOption = None,
    overrides: SetOption = None,
    name: Annotated[str, typer.Option(help="Name of this process in metrics and log lines.")] = "server-0",
    fd: Annotated[
        int | None, typer.Option(hidden=True, help="A listening socket, inherited from the supervisor.")
    ] = None,
    parent: ParentOption = None,
) -> None:
    """Serve only: one stateless server process that follows the published teacher.

    Example, next to a `streamlearn learn` with the same config:

        streamlearn serve --config streamlearn.toml --set serve.port=8081 --name server-1
    """
    from streamlearn.app.ports import listen
    from streamlearn.app.server import serve as run_server

    loaded = start(config, overrides, parent=parent)
    listener = socket.socket(fileno=fd) if fd is not None else listen(loaded)
    run_server(loaded, name=name, listener=listener)


@app.command()
def score(
    config: ConfigOption = None,
    overrides: SetOption = None,
    instance: Annotated[int, typer.Option(min=0, help="Number of this instance, from 0.")] = 0,
    of: Annotated[
        int | None, typer.Option("--of", min=1, help="Instances in all; default: source.predictions.scorers.")
    ] = None,
    parent: ParentOption = None,
) -> None:
    """Answer every sample of the log with the published teacher; write the answers to source.predictions.topic.

    `streamlearn run` starts scorers by itself where that topic is set. Each instance reads its share of the partitions,
    and each sample is answered exactly once. Stop all instances before you change their number.

    Examples:

        streamlearn score --config streamlearn.toml

        streamlearn score --config streamlearn.toml --instance 1 --of 3
    """
    from streamlearn.app.scorer import score as run_scorer
    from streamlearn.app.signals import stop_signals

    loaded = start(config, overrides, parent=parent)
    with stop_signals() as stopping:
        run_scorer(loaded, stopping, instance=instance, of=of)


@app.command()
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


@app.command()
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


@app.command()
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


@app.command()
def predict(
    file: Annotated[
        str, typer.Argument(help="A .csv, .tsv, .jsonl, .parquet or .npz file; - is standard input, as JSON lines.")
    ],
    config: ConfigOption = None,
    overrides: SetOption = None,
    out: Annotated[
        Path | None, typer.Option(help="A .jsonl, .csv or .parquet file; default: JSON lines to standard output.")
    ] = None,
    version: Annotated[
        int | None, typer.Option(min=0, help="Of the model; default: the pinned one, else the newest.")
    ] = None,
) -> None:
    """Predict the records of a file with a published model of `state.dir`. Nothing needs to run.

    Records are those of the samples topic: the fields of [columns], or id and x. A record that cannot be read is
    reported with its line, and the others are answered. Exit code 1 if none could be read.

    Examples:

        streamlearn predict new.csv --config streamlearn.toml --out answers.csv

        streamlearn predict new.parquet -c streamlearn.toml --out answers.parquet --version 400

        cat new.jsonl | streamlearn predict - -c streamlearn.toml > answers.jsonl
    """
    from streamlearn.app.bars import Bars
    from streamlearn.app.predict import predict_file

    loaded = start(config, overrides)
    if out is None and sys.stdout.isatty():  # bars and answers would mix
        predict_file(loaded, file, version=version, report=lambda line: typer.echo(line, err=True))
        return
    with Bars() as bars:
        predict_file(
            loaded,
            file,
            out=out,
            version=version,
            report=bars.say,
            progress=lambda count: bars("records", count, None),
        )


app.command()(init)
app.command()(check)


@app.command()
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


@app.command()
def inspect(
    topic: Annotated[str | None, typer.Argument(help="A topic; default: the state folder.")] = None,
    config: ConfigOption = None,
    overrides: SetOption = None,
    partition: Annotated[int, typer.Option(min=0)] = 0,
    offset: Annotated[int | None, typer.Option(min=0, help="First record; default: the last ones.")] = None,
    count: Annotated[int, typer.Option(min=1, max=10_000)] = 10,
    whole: Annotated[
        bool, typer.Option("--whole", help="Show long values whole, not only their first 200 bytes.")
    ] = False,
) -> None:
    """Show the state folder, or the records of a topic, as JSON. Safe while all runs.

    Bytes that are not text are in base64.

    Examples:

        streamlearn inspect --config streamlearn.toml

        streamlearn inspect dead-letters --config streamlearn.toml --count 3 --whole
    """
    import orjson

    from streamlearn.app import inspect

    loaded = load(config, overrides)
    if topic is None:
        typer.echo(orjson.dumps(inspect.state(loaded), option=orjson.OPT_INDENT_2).decode())
        return
    for record in inspect.records(loaded, topic, partition=partition, offset=offset, count=count):
        typer.echo(orjson.dumps(inspect.described(loaded, record, whole=whole)).decode())


def _version(value: bool) -> None:
    if value:
        typer.echo(f"streamlearn {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run a command. An error of streamlearn is one message and its exit code, not a stack trace."""
    # By default OpenMP's threads spin at barriers. The learner shares its cores with servers and a broker, so a barrier
    # often waits for a preempted thread: with one busy process on two cores, 81 samples/s spinning, 710 sleeping.
    # The variable is read when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        app()
    except StreamlearnError as error:
        typer.echo(f"streamlearn: {error}", err=True)
        sys.exit(error.exit_code)
