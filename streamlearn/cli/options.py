"""Options that several commands share, and the config that they make."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from streamlearn.errors import ConfigError

if TYPE_CHECKING:
    from streamlearn.config import Config

DatasetArgument = Annotated[
    str,
    typer.Argument(
        help="digits, fashion-mnist, shuttle, moons, rbf-drift; a .csv, .tsv, .jsonl or .parquet file of records, as "
        "[columns] and [source] describe them; or an .npz with x and y; optional: test_x, test_y, and classes (the "
        "names)."
    ),
]
LabelOption = Annotated[
    str | None,
    typer.Option(
        "--label",
        metavar="FIELD",
        help="Field of a file's records with the class; default: source.labels.label, source.samples.label, or label.",
    ),
]
ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", "-c", envvar="STREAMLEARN_CONFIG", help="TOML file; see deploy/streamlearn.example.toml."),
]
ParentOption = Annotated[
    int | None, typer.Option(hidden=True, help="Process id of the supervisor: exit when it exits.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="KEY=VALUE", help="Override one setting: `-s serve.port=8000`. Repeatable."),
]
OrderOption = Annotated[str, typer.Option(help="shuffle, file, or class-sorted.")]
DriftOption = Annotated[str, typer.Option(help="none, rotate:90@30000, permute-labels@N, noise:0.3@N, prior:20@N.")]
PassesOption = Annotated[
    int,
    typer.Option(min=1, help="Passes over the data set, each with its own ids; samples repeat from the second on."),
]
LimitOption = Annotated[int | None, typer.Option(min=1, help="At most this many samples of a pass.")]
DELAYS = "0, 500 (samples), geometric:5000, uniform:50:1000, 10s, exponential:10s."


def pairs_of(overrides: list[str] | None) -> dict[str, Any]:
    """The settings of `--set`, by dotted key. Raises ConfigError."""
    from streamlearn.sources import from_text

    pairs: dict[str, Any] = {}
    for override in overrides or []:
        key, equals, value = override.partition("=")
        if not equals or not key:
            msg = f"--set {override!r}: expected KEY=VALUE, such as serve.port=8000"
            raise ConfigError(msg)
        pairs[key.strip()] = from_text(value.strip())
    return pairs


def load(config: Path | None, overrides: list[str] | None) -> Config:
    """The config of a command.

    Raises:
        ConfigError: with all errors of the settings.
    """
    from streamlearn.config import load_config

    return load_config(config, overrides=pairs_of(overrides))


def start(
    config: Path | None, overrides: list[str] | None, *, parent: int | None = None, level: int = logging.INFO
) -> Config:
    """The config of a process, which logs from here on, at least lines of `level`, and exits with its parent."""
    from streamlearn.app.logs import set_up_logs
    from streamlearn.app.signals import exit_on_thread_error, exit_with_parent

    loaded = load(config, overrides)
    os.umask(os.umask(0o027) | 0o027)  # samples and labels are not for every user; SQLite chooses no mode of its own
    set_up_logs(level)
    exit_on_thread_error()
    if parent is not None:
        exit_with_parent(parent)
    return loaded


def child_arguments(config: Path | None, overrides: list[str] | None) -> list[str]:
    """Arguments with which a child process loads the same config."""
    arguments = ["--config", str(config)] if config else []
    for override in overrides or []:
        arguments += ["--set", override]
    return arguments


def duration_s(text: str | None) -> float | None:
    """Seconds of "90", "60s", "5m", "1h".

    Raises:
        ConfigError: none of these.
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
        msg = f"--for {text!r}: expected a time such as 60s, 5m or 1h"
        raise ConfigError(msg)
    return seconds
