"""The commands. Each --help has examples. Modules with slow imports are imported by the commands that need them."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path
from typing import Annotated

import typer

from streamlearn import __version__
from streamlearn.cli.lab import demo, evaluate, kafka, simulate
from streamlearn.cli.models import models
from streamlearn.cli.options import ConfigOption, ParentOption, SetOption, child_arguments, load, start
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


app.command()(demo)
app.command()(simulate)
app.command()(evaluate)


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
app.command()(kafka)


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
