"""Write deploy/streamlearn.example.toml from the settings themselves: `python deploy/make_example.py`."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

from streamlearn.config import settings
from streamlearn.learn.recipes import RECIPES
from streamlearn.sources import CHOICES

HEAD = """\
# Every setting of streamlearn, with its default. Copy what you change into a file of your own:
#     streamlearn check --config streamlearn.toml
# Each can come from the environment, STREAMLEARN_SERVE__PORT=8000, and from the command line, --set serve.port=8000.
# A setting of the wrong kind or name is an error before anything is opened.
"""


def main() -> None:
    """Write the file."""
    Path(__file__).with_name("streamlearn.example.toml").write_text(example())


def example() -> str:
    """One table after the other, each setting under what it does."""
    tables: dict[str, list[str]] = {}
    for key, (default, text) in settings().items():
        table, _, name = key.rpartition(".")
        lines = tables.setdefault(table, [])
        described = " ".join(f"{owners(table, name)}{text}".split())
        lines += textwrap.wrap(described, 116, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False)
        lines.append(line(table, name, default))
    body = "\n\n".join(f"[{table}]\n" + "\n".join(lines) for table, lines in tables.items())
    return f"{HEAD}\n{body}\n"


def line(table: str, name: str, default: Any) -> str:
    """A setting and its value; commented out where it has none, or where another setting decides about it."""
    if default is None:
        return f'# {name} = ""   # not set'
    if found := [f"{recipe} {toml(values[name])}" for recipe, values in recipes(table).items() if name in values]:
        return f"# {name} = {toml(default)}   # by recipe: {', '.join(found)}"
    return f"{'# ' if table in CHOICES else ''}{name} = {toml(default)}"


def owners(table: str, name: str) -> str:
    """Which methods, or noises, have this option; empty for settings that are always there."""
    kinds = CHOICES.get(table, {})
    having = [kind for kind, section in kinds.items() if name in section.model_fields]
    others = [kind for kind in kinds if kind not in having]
    if not having:
        return ""
    return f"{', '.join(having)}: " if len(having) <= len(others) else f"all but {', '.join(others)}: "


def recipes(table: str) -> dict[str, dict[str, Any]]:
    """What each recipe sets in a table."""
    if table == "learn.options":
        return {name: dict(recipe.options) for name, recipe in RECIPES.items()}
    if table == "learn":
        shipped = {name: recipe for name, recipe in RECIPES.items() if name != "none"}
        return {name: {"method": recipe.method, "ema_decay": recipe.ema_decay} for name, recipe in shipped.items()}
    return {}


def toml(value: Any) -> str:
    """A value as TOML has it: JSON does, but for tuples and paths."""
    return json.dumps(list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value)


if __name__ == "__main__":
    main()
