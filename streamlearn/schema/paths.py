"""Paths: where a value is in a record. They are compiled once, from the config.

`a.b.c` goes into the record's value, `key` is its key, `key.a.b` goes into a key that is an object, and `header:NAME`
is a header. A part that is a number is an index of a list.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

MAX_PARTS = 16


class Missing:
    """The type of `MISSING`."""

    def __repr__(self) -> str:
        return "MISSING"


MISSING: Final = Missing()
"""There is nothing at the path. A null is a value."""


@dataclass(frozen=True, slots=True)
class Path:
    """A compiled path."""

    text: str
    """As in the config."""
    root: Literal["value", "key", "header"]
    parts: tuple[str, ...]
    """Names of fields, from the outermost; of a header, its name in lower case."""

    @staticmethod
    def parse(text: str) -> Path:
        """Compile a path.

        Raises:
            ValueError: it has an empty part, or too many.
        """
        if text.startswith("header:"):
            name = text.removeprefix("header:").strip().lower()
            if not name:
                raise ValueError("expected a name after header:")
            return Path(text, "header", (name,))
        path = Path.in_value(text)
        return Path(text, "key", path.parts[1:]) if path.parts[0] == "key" else path

    @staticmethod
    def in_value(text: str) -> Path:
        """Compile a path into the record's value, where a field may also be called `key`. Raises as `parse`."""
        parts = tuple(text.split("."))
        if not all(parts) or len(parts) > MAX_PARTS:
            msg = (
                f"expected 1 to {MAX_PARTS} names with dots, such as after.id, or key, or header:NAME; got {text!r:.80}"
            )
            raise ValueError(msg)
        return Path(text, "value", parts)

    def find(self, fields: object) -> object:
        """Return what is at the parts below `fields`, or `MISSING`."""
        found = fields
        for part in self.parts:
            if type(found) is dict:
                found = found.get(part, MISSING)
            elif isinstance(found, list) and part.isascii() and part.isdigit() and len(part) < 8:
                found = found[int(part)] if int(part) < len(found) else MISSING
            else:
                return MISSING
        return found

    @property
    def after(self) -> Path | None:
        """The path to Debezium's `after`, if it is in this path: it is null in the record of a delete."""
        if self.root != "value" or "after" not in self.parts[:-1]:
            return None
        return Path(self.text, "value", self.parts[: self.parts.index("after") + 1])

    @property
    def before(self) -> Path:
        """The same path below Debezium's `before`, which holds the deleted row."""
        parts = tuple("before" if part == "after" else part for part in self.parts)
        return Path(self.text, self.root, parts)
