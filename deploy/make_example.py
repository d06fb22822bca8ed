"""Write deploy/streamlearn.example.toml from the settings themselves: `python deploy/make_example.py`."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

from streamlearn.config import RECIPES, settings

HEAD = """\
# Every setting of streamlearn, with its default. Copy what you change into a file of your own:
#     streamlearn check --config streamlearn.toml
# Each can come from the environment, STREAMLEARN_SERVE__PORT=8000, and from the command line, --set serve.port=8000.
# A setting of the wrong kind or name is an error before anything is opened.
"""


def main() -> None:
    """One table after the other, each setting under what it does."""
    tables: dict[str, list[str]] = {}
    for key, (default, text) in settings().items():
        table, _, name = key.rpartition(".")
        lines = tables.setdefault(table, [])
        lines += textwrap.wrap(" ".join(text.split()), 116, initial_indent="# ", subsequent_indent="# ")
        lines.append(line(table, name, default))
    body = "\n\n".join(f"[{table}]\n" + "\n".join(lines) for table, lines in tables.items())
    Path(__file__).with_name("streamlearn.example.toml").write_text(f"{HEAD}\n{body}\n")


def line(table: str, name: str, default: Any) -> str:
    """A setting and its value; commented out where it has none, or where it is for a recipe to say."""
    if default is None:
        return f'# {name} = ""   # not set'
    of_recipes = {recipe: values[name] for recipe, values in RECIPES.items() if table == "learn" and name in values}
    if not of_recipes:
        return f"{name} = {toml(default)}"
    told = ", ".join(f"{recipe} {toml(value)}" for recipe, value in of_recipes.items())
    return f"# {name} = {toml(default)}   # by recipe: {told}"


def toml(value: Any) -> str:
    """A value as TOML has it: JSON does, but for tuples and paths."""
    return json.dumps(list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value)


if __name__ == "__main__":
    main()
