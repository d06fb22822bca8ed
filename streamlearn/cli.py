"""The commands. Each --help teaches by example; heavy imports wait until a command needs them."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from streamlearn import __version__
from streamlearn.errors import ConfigError, StreamlearnError

if TYPE_CHECKING:
    from streamlearn.config import Config

app = typer.Typer(
    name="streamlearn",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help=(
        "Learns for ever from a stream of mostly unlabelled samples, and serves what it knows while it learns.\n\n"
        "Begin with `streamlearn demo`: a stream of handwritten digits, 5 % of them labelled, late, on this machine."
    ),
)

DatasetArgument = Annotated[
    str,
    typer.Argument(
        help="digits, fashion-mnist, shuttle, moons, rbf-drift, or the path of an .npz with x and y, and perhaps "
        "test_x, test_y and classes, the names."
    ),
]
ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", "-c", envvar="STREAMLEARN_CONFIG", help="TOML file; see deploy/streamlearn.example.toml."),
]
ParentOption = Annotated[int | None, typer.Option(hidden=True, help="Process id of the supervisor to die with.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="KEY=VALUE", help="Override one setting: `-s serve.port=8000`. Repeatable."),
]


def _load(config: Path | None, overrides: list[str] | None) -> Config:
    from streamlearn.config import load_config
    from streamlearn.sources import from_text

    pairs: dict[str, Any] = {}
    for override in overrides or []:
        key, equals, value = override.partition("=")
        if not equals or not key:
            msg = f"--set {override!r}: wanted KEY=VALUE, such as serve.port=8000"
            raise ConfigError(msg)
        pairs[key.strip()] = from_text(value.strip())
    return load_config(config, overrides=pairs)


def _start(config: Path | None, overrides: list[str] | None, *, parent: int | None = None) -> Config:
    from streamlearn.app.logs import set_up_logs
    from streamlearn.app.signals import exit_on_thread_error, exit_with_parent

    loaded = _load(config, overrides)
    set_up_logs(loaded)
    exit_on_thread_error()
    if parent is not None:
        exit_with_parent(parent)
    return loaded


def _child_arguments(config: Path | None, overrides: list[str] | None) -> list[str]:
    arguments = ["--config", str(config)] if config else []
    for override in overrides or []:
        arguments += ["--set", override]
    return arguments


@app.command()
def run(config: ConfigOption = None, overrides: SetOption = None) -> None:
    """Learn and serve: one learner and some servers under one supervisor. What the container runs.

    Examples:

        streamlearn run --config streamlearn.toml

        streamlearn run -c streamlearn.toml -s log.kind=kafka -s log.kafka.bootstrap_servers=kafka:9092

        STREAMLEARN_SERVE__TOKEN=secret streamlearn run -c streamlearn.toml -s serve.host=0.0.0.0

    SIGTERM or Ctrl-C stops cleanly: requests are answered, a checkpoint is saved. A second one leaves at once.
    """
    from streamlearn.app.signals import stop_signals
    from streamlearn.app.supervisor import Supervisor

    loaded = _start(config, overrides)
    with stop_signals() as stopping:
        supervisor = Supervisor(loaded, _child_arguments(config, overrides))
        typer.echo(f"serving on http://{supervisor.address} (docs at /docs); stop with Ctrl-C", err=True)
        supervisor.run(stopping)


@app.command()
def learn(
    config: ConfigOption = None,
    overrides: SetOption = None,
    until_end: Annotated[
        bool, typer.Option("--until-end", help="Stop once all that the log holds is learned.")
    ] = False,
    parent: ParentOption = None,
) -> None:
    """Learn only, without servers: the one process that changes model state.

    Examples:

        streamlearn learn --config streamlearn.toml

        streamlearn learn --config streamlearn.toml --until-end
    """
    from streamlearn.app.learner import learn as run_learner
    from streamlearn.app.signals import stop_signals

    loaded = _start(config, overrides, parent=parent)
    with stop_signals() as stopping:
        run_learner(loaded, stopping, until_end=until_end)


@app.command()
def serve(
    config: ConfigOption = None,
    overrides: SetOption = None,
    name: Annotated[str, typer.Option(help="Of this process, in metrics and log lines.")] = "server-0",
    fd: Annotated[
        int | None, typer.Option(hidden=True, help="A listening socket that a supervisor hands down.")
    ] = None,
    parent: ParentOption = None,
) -> None:
    """Serve only: one stateless server process that follows the published teacher.

    Example, beside a `streamlearn learn` with the same config:

        streamlearn serve --config streamlearn.toml --set serve.port=8081 --name server-1
    """
    from streamlearn.app.ports import listen
    from streamlearn.app.server import serve as run_server

    loaded = _start(config, overrides, parent=parent)
    listener = socket.socket(fileno=fd) if fd is not None else listen(loaded)
    run_server(loaded, name=name, listener=listener)


@app.command()
def demo(
    seconds: Annotated[str | None, typer.Option("--for", metavar="60s", help="End by itself after so long.")] = None,
    port: Annotated[int, typer.Option(help="Of the HTTP side; 0 takes a free one.")] = 8080,
    rate: Annotated[float, typer.Option(help="Samples a second.")] = 300.0,
    state: Annotated[Path, typer.Option(help="Folder for everything; made anew.")] = Path("demo-state"),
) -> None:
    """Watch it learn: digits as a stream, 5 % of them labelled, late; an embedded log; learner and servers.

    Examples:

        streamlearn demo

        streamlearn demo --for 60s --port 0

    It prints three curl lines to try while it runs.
    """
    from streamlearn.lab.demo import run_demo

    run_demo(seconds=_duration_s(seconds), port=port, rate=rate, folder=state)


@app.command()
def simulate(
    dataset: DatasetArgument,
    config: ConfigOption = None,
    overrides: SetOption = None,
    rate: Annotated[float, typer.Option(help="Samples a second; 0 is as fast as the log takes them.")] = 0.0,
    label_share: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of samples that get a label.")] = 0.05,
    label_delay: Annotated[
        str, typer.Option(help="0, 500 (samples), geometric:5000, uniform:50:1000, 10s, exponential:10s.")
    ] = "geometric:500",
    order: Annotated[str, typer.Option(help="shuffle, file, or class-sorted.")] = "shuffle",
    passes: Annotated[int, typer.Option(min=1, help="Times through the data set, each with ids of its own.")] = 1,
    limit: Annotated[int | None, typer.Option(min=1, help="Samples of a pass, at most.")] = None,
    drift: Annotated[
        str, typer.Option(help="none, rotate:90@30000, permute-labels@N, noise:0.3@N, prior:20@N.")
    ] = "none",
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same records.")] = 0,
    id_prefix: Annotated[
        str | None,
        typer.Option(help="Before each sample's number in its id; default: data set, seed, order, drift."),
    ] = None,
    parent: ParentOption = None,
) -> None:
    """Send a labelled data set as a stream: samples, and some of their labels, later.

    Examples:

        streamlearn simulate digits --config streamlearn.toml --rate 200 --label-share 0.05 --label-delay geometric:500

        streamlearn simulate fashion-mnist -c streamlearn.toml --label-share 0.01 --label-delay geometric:5000

        streamlearn simulate mine.npz -c streamlearn.toml --drift rotate:90@10000 --seed 7
    """
    from streamlearn.app.signals import stop_signals
    from streamlearn.lab.simulate import run_simulation

    loaded = _start(config, overrides, parent=parent)
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
        )


@app.command()
def evaluate(
    dataset: DatasetArgument,
    config: ConfigOption = None,
    overrides: SetOption = None,
    label_probability: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share of samples that get a label.")
    ] = 0.05,
    delay: Annotated[
        str, typer.Option(help="Of a label: 0, 500 (samples), geometric:5000, uniform:50:1000, 10s, exponential:10s.")
    ] = "0",
    window: Annotated[
        int, typer.Option(min=10, max=1_000_000, help="Samples between two points, and in a windowed score.")
    ] = 1000,
    order: Annotated[str, typer.Option(help="shuffle, file, or class-sorted.")] = "shuffle",
    drift: Annotated[
        str, typer.Option(help="none, rotate:90@30000, permute-labels@N, noise:0.3@N, prior:20@N.")
    ] = "none",
    limit: Annotated[int | None, typer.Option(min=1, help="Samples of a pass, at most.")] = None,
    passes: Annotated[
        int, typer.Option(min=1, help="Times through the data set. From the second on, samples were seen before.")
    ] = 1,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Same seed, same curves.")] = 0,
    rate: Annotated[
        float, typer.Option(help="Samples a second of the stream's own time, for delays in time. Nobody waits.")
    ] = 1000.0,
    out: Annotated[
        Path | None, typer.Option(help="Folder for evaluation.json and curves.png; else evaluation-DATASET.")
    ] = None,
    keep_state: Annotated[
        Path | None, typer.Option(help="Keep the learner's state here, log and all; else it is removed.")
    ] = None,
    plot: Annotated[bool, typer.Option("--plot/--no-plot", help="Draw the curves; needs `streamlearn[lab]`.")] = True,
    offline: Annotated[
        bool, typer.Option("--offline", help="No stream: epochs over the data set, as papers have it. See --labels.")
    ] = False,
    labels: Annotated[int, typer.Option(min=2, help="With --offline: labelled samples in all, of all classes.")] = 1000,
    epochs: Annotated[int, typer.Option(min=1, help="With --offline: times through all samples.")] = 30,
) -> None:
    """Learn a labelled data set as a stream, offline, as fast as it goes; print the scores and plot the curves.

    CapyMOA's protocol: every sample is predicted before it is learned; a few get a label, late. Accuracy on all samples
    (oracle) stands beside that on labelled ones (observed, all that a service can see), the label-only twin, and
    baselines. It runs the daemon's own loop without servers. Shape, classes and model are the data set's own where the
    config does not say.

    Examples:

        streamlearn evaluate digits --label-probability 0.05 --delay 500 --window 500 --passes 10 --set batch.fresh=16

        streamlearn evaluate fashion-mnist --label-probability 0.01 --delay geometric:5000 --drift rotate:90@30000

        streamlearn evaluate mine.npz --config streamlearn.toml --set learn.method=supervised --out baseline

        streamlearn evaluate fashion-mnist --offline --labels 500 --epochs 20 --set learn.method=pi
    """
    from streamlearn.app.logs import set_up_logs
    from streamlearn.app.signals import exit_on_thread_error, stop_signals
    from streamlearn.lab.evaluate import EvaluationPlan
    from streamlearn.lab.offline import OfflinePlan
    from streamlearn.lab.report import quiet, run_evaluation, run_offline

    loaded = quiet(_load(config, overrides))
    set_up_logs(loaded)
    exit_on_thread_error()
    plan = EvaluationPlan(
        dataset=dataset,
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
    if offline:
        once = OfflinePlan(dataset=dataset, labels=labels, epochs=epochs, limit=limit, seed=seed)
        with stop_signals() as stopping:
            run_offline(loaded, once, stopping, out=out)
        return
    with stop_signals() as stopping:
        run_evaluation(loaded, plan, stopping, out=out, keep_state=keep_state, plot=plot)


@app.command()
def check(config: ConfigOption = None, overrides: SetOption = None) -> None:
    """Say whether it would run: settings, model, device, log, topics, retention, disk, port. Changes nothing.

    Example:

        streamlearn check --config streamlearn.toml
    """
    from rich.console import Console
    from rich.markup import escape

    from streamlearn.app.check import check as findings

    console, wrong = Console(highlight=False), False
    colours = {"ok": "green", "warning": "yellow", "error": "red"}
    for finding in findings(_start(config, overrides)):
        wrong = wrong or finding.verdict == "error"
        mark = f"[{colours[finding.verdict]}]{finding.verdict:8}[/]"
        console.print(f"{mark} [bold]{escape(finding.subject)}[/]: {escape(finding.text)}", soft_wrap=True)
    if wrong:
        raise typer.Exit(1)


@app.command()
def kafka(
    port: Annotated[int, typer.Option(help="0 takes a free one.")] = 9092,
    folder: Annotated[Path, typer.Option("--dir", help="Where it keeps its data.")] = Path("kafka-data"),
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
    topic: Annotated[str | None, typer.Argument(help="A topic; without one, the state folder.")] = None,
    config: ConfigOption = None,
    overrides: SetOption = None,
    partition: Annotated[int, typer.Option(min=0)] = 0,
    offset: Annotated[int | None, typer.Option(min=0, help="First record; else the last ones.")] = None,
    count: Annotated[int, typer.Option(min=1, max=10_000)] = 10,
    whole: Annotated[bool, typer.Option("--whole", help="All bytes of long values, not the first 200.")] = False,
) -> None:
    """Look into the state folder, or at the records of a topic, as JSON. Safe while everything runs.

    Bytes that are no text are in base64.

    Examples:

        streamlearn inspect --config streamlearn.toml

        streamlearn inspect dead-letters --config streamlearn.toml --count 3 --whole
    """
    import orjson

    from streamlearn.app import inspect

    loaded = _load(config, overrides)
    if topic is None:
        typer.echo(orjson.dumps(inspect.state(loaded), option=orjson.OPT_INDENT_2).decode())
        return
    for record in inspect.records(loaded, topic, partition=partition, offset=offset, count=count):
        typer.echo(orjson.dumps(inspect.described(loaded, record, whole=whole)).decode())


@app.command()
def models(
    config: ConfigOption = None,
    overrides: SetOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """List the published versions that can be served, each with the scores of its time. Safe while everything runs.

    Accuracy is that of the last `score.window` labelled predictions when the version was published, gain the teacher's
    over its label-only twin.

    Examples:

        streamlearn models --config streamlearn.toml

        streamlearn models --config streamlearn.toml --json
    """
    import orjson
    from rich.console import Console

    from streamlearn.app import versions

    found = versions.versions(_load(config, overrides))
    if as_json:
        typer.echo(orjson.dumps(found, option=orjson.OPT_INDENT_2).decode())
    elif found:
        Console().print(versions.table(found))
    else:
        typer.echo("no version is published yet")


@app.command()
def rollback(
    version: Annotated[int | None, typer.Argument(min=0, help="One of `streamlearn models`.")] = None,
    config: ConfigOption = None,
    overrides: SetOption = None,
    back: Annotated[int | None, typer.Option(min=1, help="So many versions before the one that is served.")] = None,
) -> None:
    """Serve an older version from now on. The learner learns on, and nothing is lost; `promote` returns.

    Examples:

        streamlearn rollback 1200 --config streamlearn.toml

        streamlearn rollback --back 1 --config streamlearn.toml

    Running servers follow within a second. Over HTTP, with the admin token: POST /model/rollback {"version": 1200}.
    """
    from streamlearn.app import versions

    if (version is None) == (back is None):
        msg = "rollback: wanted a version, as `streamlearn models` shows them, or --back; one of the two"
        raise ConfigError(msg)
    pinned = versions.roll_back(_start(config, overrides), version=version, back=back)
    typer.echo(f"version {pinned.step} is pinned: servers answer with it until `streamlearn promote`")


@app.command()
def promote(config: ConfigOption = None, overrides: SetOption = None) -> None:
    """Serve the newest version again, after a rollback.

    Example:

        streamlearn promote --config streamlearn.toml
    """
    from streamlearn.app import versions

    newest = versions.promote(_start(config, overrides))
    told = "none is published yet" if newest is None else f"now version {newest.step}"
    typer.echo(f"servers follow the newest version: {told}")


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


def _duration_s(text: str | None) -> float | None:
    """Seconds of "90", "60s", "5m", "1h".

    Raises:
        ConfigError: neither.
    """
    if text is None:
        return None
    units = {"s": 1.0, "m": 60.0, "h": 3600.0}
    number, unit = (text[:-1], units[text[-1]]) if text[-1:] in units else (text, 1.0)
    try:
        seconds = float(number) * unit
    except ValueError:
        seconds = 0.0
    if not 0.0 < seconds < 1e9:
        msg = f"--for {text!r}: wanted a time such as 60s, 5m or 1h"
        raise ConfigError(msg)
    return seconds


def main() -> None:
    """Run a command; an error of ours is one message and its exit code, never a stack trace."""
    # OpenMP's threads spin while they wait for each other. A daemon shares its cores with its own servers and a broker,
    # and then each of a step's many barriers waits for a thread that was pushed aside: measured, with one other busy
    # process on two cores, 81 and 183 samples a second spinning, 710 and 399 sleeping. Read when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        app()
    except StreamlearnError as error:
        typer.echo(f"streamlearn: {error}", err=True)
        sys.exit(error.exit_code)
