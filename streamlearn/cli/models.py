"""`streamlearn models`: which published version is served."""

from __future__ import annotations

from typing import Annotated

import typer

from streamlearn.cli.options import ConfigOption, SetOption, load, start

models = typer.Typer(no_args_is_help=True)


@models.callback()
def _group() -> None:
    """List the published versions, and choose the one that is served.

    Examples:

        streamlearn models list --config streamlearn.toml

        streamlearn models pin 1200 --config streamlearn.toml

        streamlearn models unpin --config streamlearn.toml
    """


@models.command("list")
def list_models(
    config: ConfigOption = None,
    overrides: SetOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """List the versions that can be served, each with its scores at publication. Safe while all runs.

    Accuracy is over the last `score.window` labelled predictions. Gain is the teacher's over its label-only twin.

    Examples:

        streamlearn models list --config streamlearn.toml

        streamlearn models list --config streamlearn.toml --json
    """
    import orjson
    from rich.console import Console

    from streamlearn.app import versions

    found = versions.list_versions(load(config, overrides))
    if as_json:
        typer.echo(orjson.dumps(found, option=orjson.OPT_INDENT_2).decode())
    elif found:
        Console().print(versions.table(found))
    else:
        typer.echo("no version is published yet")


@models.command()
def pin(
    version: Annotated[int, typer.Argument(min=0, help="A version of `streamlearn models list`.")],
    config: ConfigOption = None,
    overrides: SetOption = None,
) -> None:
    """Serve this version until `unpin`, whatever is published. Learning continues, and nothing is lost.

    Example:

        streamlearn models pin 1200 --config streamlearn.toml

    Running servers follow within a second. Over HTTP, with the admin token: POST /model/rollback {"version": 1200}.
    """
    from streamlearn.app import versions

    pinned = versions.pin_version(start(config, overrides), version)
    typer.echo(f"version {pinned.step} is pinned: servers answer with it until `streamlearn models unpin`")


@models.command()
def unpin(config: ConfigOption = None, overrides: SetOption = None) -> None:
    """Serve the newest version again.

    Example:

        streamlearn models unpin --config streamlearn.toml
    """
    from streamlearn.app import versions

    newest = versions.unpin_version(start(config, overrides))
    served = "none is published yet" if newest is None else f"now version {newest.step}"
    typer.echo(f"servers follow the newest version: {served}")
