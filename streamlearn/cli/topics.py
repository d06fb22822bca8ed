"""`streamlearn init` and `streamlearn check`: what a config makes of the user's topics."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from streamlearn.cli.options import ConfigOption, SetOption, pairs_of, start

if TYPE_CHECKING:
    from streamlearn.app.check_records import RecordsReport
    from streamlearn.app.findings import Finding

_COLOURS = {"ok": "green", "warning": "yellow", "error": "red"}


def init(
    samples: Annotated[list[str], typer.Option(help="Topic of samples. Repeatable.")],
    labels: Annotated[str, typer.Option(help="Topic of labels.")],
    bootstrap_servers: Annotated[
        str | None, typer.Option(help="Of Kafka, host:port; default: log.kafka.bootstrap_servers.")
    ] = None,
    registry: Annotated[str | None, typer.Option(help="URL of a schema registry with Confluent's API.")] = None,
    out: Annotated[Path, typer.Option(help="The file to write.")] = Path("streamlearn.toml"),
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="TOML file with settings to keep; they are written too.")
    ] = None,
    overrides: SetOption = None,
    records: Annotated[int, typer.Option(min=10, max=10_000, help="How many to read of each side.")] = 500,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file.")] = False,
) -> None:
    """Write a config for your own topics: read some records, and infer format, id, time, label and columns.

    Examples:

        streamlearn init --samples transactions --labels chargebacks

        streamlearn init --samples transactions --labels frauds --bootstrap-servers kafka:9092 --registry http://registry:8081

        streamlearn init --samples web --samples app --labels clicks -c security.toml -s source.samples.id=event.id

    What you set with `--config` or `--set` is kept, and the rest is inferred. Passwords are not written. Edit the file,
    then look at it with `streamlearn check --sample 500`.
    """
    import logging

    from rich.console import Console

    from streamlearn.app.init import write_config
    from streamlearn.app.logs import set_up_logs

    set_up_logs(logging.WARNING)
    given: dict[str, Any] = pairs_of(overrides)
    given |= {"source.samples.topic": samples[0] if len(samples) == 1 else samples, "source.labels.topic": labels}
    if bootstrap_servers is not None:
        given |= {"log.kind": "kafka", "log.kafka.bootstrap_servers": bootstrap_servers}
    if registry is not None:
        given["source.registry.url"] = registry
    written = write_config(out, config, given, count=records, force=force)
    console = Console(highlight=False)
    wrong = print_findings(console, written.findings)
    console.print(f"\n{out} is written. With it, of the records that were read:", soft_wrap=True, markup=False)
    wrong = print_findings(console, written.report.findings()) or wrong
    if any(finding.verdict != "ok" for finding in written.findings):
        console.print("\nLook at the warnings, edit the file, then:")
    else:
        console.print("\nNext:")
    console.print(f"  streamlearn check --config {out} --sample 500", soft_wrap=True, markup=False)
    console.print(f"  streamlearn run --config {out}", soft_wrap=True, markup=False)
    if wrong:
        raise typer.Exit(1)


def check(
    config: ConfigOption = None,
    overrides: SetOption = None,
    sample: Annotated[
        int | None,
        typer.Option(min=1, max=100_000, metavar="N", help="Also decode about N records of samples and N labels."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Check whether it would run: settings, model, device, log, topics, retention, disk, port. Changes nothing.

    With `--sample` it also decodes real records: how many decode, and what is wrong with the others; ids, delays and
    classes of labels; missing and invalid values, range and distinct values of each column; the rate.

    Examples:

        streamlearn check --config streamlearn.toml

        streamlearn check --config streamlearn.toml --sample 500

        streamlearn check --config streamlearn.toml --sample 500 --json
    """
    import logging

    from rich.console import Console

    from streamlearn.app.check import check as all_findings
    from streamlearn.app.check_records import check_records
    from streamlearn.app.findings import Finding
    from streamlearn.errors import ConfigError, LogError, RecordError, RegistryUnavailableError

    loaded = start(config, overrides, level=logging.WARNING)
    console = Console(highlight=False)
    findings, report = list(all_findings(loaded)) if as_json else [], None
    wrong = print_findings(console, all_findings(loaded)) if not as_json else False
    if sample is not None:
        try:
            report = check_records(loaded, sample)
            more = list(report.findings())
        except (ConfigError, LogError, RecordError, RegistryUnavailableError) as error:
            more = [Finding("error", "records", str(error))]
        findings += more
        if not as_json:
            wrong = print_findings(console, more) or wrong
            if report is not None and report.columns:
                console.print(_columns(report))
    if as_json:
        _print_json(findings, report)
        wrong = any(finding.verdict == "error" for finding in findings)
    if wrong:
        raise typer.Exit(1)


def print_findings(console: Any, findings: Iterable[Finding]) -> bool:
    """Print one line each; whether one of them is an error."""
    from rich.markup import escape

    wrong = False
    for finding in findings:
        wrong = wrong or finding.verdict == "error"
        mark = f"[{_COLOURS[finding.verdict]}]{finding.verdict:8}[/]"
        console.print(f"{mark} [bold]{escape(finding.subject)}[/]: {escape(finding.text)}", soft_wrap=True)
    return wrong


def _print_json(findings: Iterable[Finding], report: RecordsReport | None) -> None:
    from dataclasses import asdict

    import orjson

    shown = {
        "findings": [asdict(finding) for finding in findings],
        "records": None if report is None else report.as_json(),
    }
    typer.echo(orjson.dumps(shown, option=orjson.OPT_INDENT_2 | orjson.OPT_NON_STR_KEYS).decode())


def _columns(report: RecordsReport) -> Any:
    """The table of the columns."""
    from rich.table import Table
    from rich.text import Text

    table = Table("column", "kind", "missing", "invalid", "distinct", "range or most common", box=None)
    for column in report.columns:
        span = f"{_shown(column.low)} to {_shown(column.high)}"
        common = ", ".join(text[:20] for text in column.most_common)
        text = span if column.low is not None and column.kind in ("number", "timestamp") else common
        shares = (f"{column.missing:.1%}", f"{column.invalid:.1%}", f"{column.distinct:,}")
        table.add_row(Text(column.name), column.kind, *shares, Text(text))
    return table


def _shown(value: float | str | None) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
