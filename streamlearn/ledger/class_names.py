"""The class names of the ledger: those of the schema, and those that took a spare output.

grown    class index → the name that took it
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from streamlearn.errors import FROM_SCRATCH, ConfigError
from streamlearn.ledger.store import Store, Table
from streamlearn.records import Schema


class ClassNames:
    """Class indices by name. With `grow`, an unknown name takes a spare output, if there is one."""

    def __init__(self, store: Store, schema: Schema, *, grow: bool) -> None:
        self._store, self._schema, self._grow = store, schema, grow
        self._grown: Table[int, str] = store.tables["grown"]
        self.known: dict[str, int] = {}
        """In the order of their indices."""

    def load(self) -> None:
        """Read the names from schema and table."""
        self.known = {name: index for index, name in enumerate(self._schema.classes)}
        self.known |= {name: index for index, name in self._grown.items()}

    def index(self, name: str) -> int | None:
        """The index of a class; None if the name is unknown and there is no spare output for it."""
        index = self.known.get(name)
        if index is None and self._grow and len(self.known) < self._schema.capacity:
            index = self.known[name] = len(self.known)
            self._grown.insert(index, name)
        return index

    def check(self, path: Path) -> None:
        """Compare the store with the schema, and note the schema. Classes and columns may be added at the end.

        Raises:
            ConfigError: payloads of another shape or dtype, or of other columns, or classes of another meaning.
        """
        schema = self._schema
        expected: dict[str, Any] = {"dtype": schema.dtype.str, "classes": list(schema.classes)}
        if schema.columns:
            expected["columns"] = [[column.name, column.kind, column.size] for column in schema.columns]
        else:
            expected["shape"] = list(schema.shape)
        note = self._store.note("schema")
        found = expected if note is None else json.loads(note)
        before = dict(expected)
        for name in {"classes", "columns"} & expected.keys():
            before[name] = expected[name][: len(found.get(name, ()))]
        if found != before:
            msg = f"{path}: the store is of another schema: found {found}, expected {expected}"
            raise ConfigError(f"{msg}; restore the setting schema, or {FROM_SCRATCH}")
        for index, name in self._grown.items():
            named = index < len(schema.classes) or name in schema.classes
            if named and schema.classes[index : index + 1] != (name,):
                raise ConfigError(f"{path}: class {index} was learned as {name!r}: give it this name in schema.classes")
        self._store.note("schema", json.dumps(expected))
        self._store.flush()
