"""The text of a config file, setting by setting, each with a comment: what `streamlearn init` writes.

Names and values come from the records of others. They are quoted, and nothing in a comment ends its line.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Final

_BARE = re.compile(r"[A-Za-z0-9_-]+")
_SECRET = re.compile(r"passw|pwd|secret|token|credential", re.IGNORECASE)
_FIRST: Final = ("source.samples", "source.labels", "source.labels.values", "source.registry", "schema", "columns")
_COMMENT_CHARACTERS = 400


class ConfigDraft:
    """Settings as a tree and as text. A setting of the user is never changed."""

    def __init__(self, given: Mapping[str, Any], *, head: str) -> None:
        """`given` is the tree of the user's own settings, `head` the comment at the top."""
        self.tree: dict[str, Any] = {}
        self.unwritten: list[str] = []
        """Secrets among the user's settings, which are not written."""
        self._head = head
        self._tables: dict[str, list[str]] = {name: [] for name in _FIRST}
        self._given = {key for key, _ in _flat(given)}
        for key, value in _flat(given):
            self._put(key, value)
            table = self._tables.setdefault(_table_of(key), [])
            if _SECRET.search(key[-1]) and not str(value).startswith("file:"):
                self.unwritten.append(_variable(key))
                table.append(f"# {_name(key[-1])}: not written, because it is a secret; set {_variable(key)}")
            else:
                table.append(f"{_name(key[-1])} = {toml(value)}")

    def has(self, *key: str) -> bool:
        """Whether the user has set this."""
        return key in self._given

    def set(self, *key: str, to: Any, why: str = "") -> None:
        """Add a setting, unless the user has set it."""
        if not self.has(*key):
            self._put(key, to)
            self._tables.setdefault(_table_of(key), []).append(_line(f"{_name(key[-1])} = {toml(to)}", why))

    def suggest(self, *key: str, to: Any, why: str) -> None:
        """Add a setting as a comment."""
        if not self.has(*key):
            self._tables.setdefault(_table_of(key), []).append(_line(f"# {_name(key[-1])} = {toml(to)}", why))

    def note(self, table: str, text: str) -> None:
        """Add a comment."""
        self._tables.setdefault(table, []).append(f"# {_one_line(text)}")

    def text(self) -> str:
        """The file. Comments of an empty table stay."""
        parts = ["".join(f"# {_one_line(line)}\n" for line in self._head.splitlines())]
        for table, lines in self._tables.items():
            if lines:
                parts.append(f"[{'.'.join(map(_name, table.split('.')))}]\n" + "".join(f"{line}\n" for line in lines))
        return "\n".join(parts)

    def _put(self, key: tuple[str, ...], value: Any) -> None:
        node = self.tree
        for part in key[:-1]:
            node = node.setdefault(part, {})
        node[key[-1]] = value


def toml(value: Any) -> str:
    """A value as TOML has it."""
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{_name(name)} = {toml(each)}" for name, each in value.items()) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(toml, value)) + "]"
    if isinstance(value, bool | int | float):
        return json.dumps(value).replace("NaN", "nan").replace("Infinity", "inf")
    text = json.dumps(str(value), ensure_ascii=False)
    return "".join(each if each.isprintable() else _escaped(each) for each in text)


def _escaped(character: str) -> str:
    code = ord(character)
    return "\\uFFFD" if 0xD800 <= code < 0xE000 else f"\\u{code:04X}" if code < 1 << 16 else f"\\U{code:08X}"


def _name(name: str) -> str:
    return name if _BARE.fullmatch(name) else toml(name)


def _table_of(key: tuple[str, ...]) -> str:
    return ".".join(key[:-1])


def _variable(key: tuple[str, ...]) -> str:
    return f"STREAMLEARN_{'__'.join(key).upper()}"


def _flat(tree: Mapping[str, Any], above: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    """Keys and values of all settings; a column is one value."""
    found: list[tuple[tuple[str, ...], Any]] = []
    for name, value in tree.items():
        if isinstance(value, Mapping) and above != ("columns",):
            found += _flat(value, (*above, name))
        else:
            found.append(((*above, name), value))
    return found


def _line(setting: str, why: str) -> str:
    return f"{setting}  # {_one_line(why)}" if why else setting


def _one_line(text: str) -> str:
    clean = "".join(each if each.isprintable() else "\N{REPLACEMENT CHARACTER}" for each in text)
    return clean if len(clean) <= _COMMENT_CHARACTERS else f"{clean[:_COMMENT_CHARACTERS]}…"
