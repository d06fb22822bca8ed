"""The user's records behind the rows of a data set, as they are sent to the log.

A sample is the record as JSON, unchanged but for its class, which follows in a label of the form of [source.labels].
Its id is where [source.samples] reads it; a record without one is numbered.
"""

from __future__ import annotations

import os
import tempfile
import weakref
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from streamlearn.log.codec import Codec
from streamlearn.records import Array, NewRecord
from streamlearn.schema.formats import parse_json
from streamlearn.schema.paths import MISSING, Path
from streamlearn.schema.reader import OWN_ID


class Spool:
    """Byte strings in a temporary file, by number. In memory each takes eight bytes."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="streamlearn-")  # noqa: SIM115  closed with this object
        weakref.finalize(self, self._file.close)
        self._ends = array("Q", [0])

    def append(self, content: bytes) -> None:
        """Add one. Raises OSError."""
        self._file.write(content)
        self._ends.append(self._ends[-1] + len(content))

    def flush(self) -> None:
        """Make all of them readable. Raises OSError."""
        self._file.flush()

    def as_array(self, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Array:
        """All of them as one read-only array, which stays in the file."""
        return np.asarray(np.memmap(self._file, dtype, "r", shape=shape))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, number: int) -> bytes:
        start, end = self._ends[number], self._ends[number + 1]
        return os.pread(self._file.fileno(), end - start, start)


@dataclass(frozen=True)
class Records:
    """The records of the rows of a data set. They are encoded by the codec of the config."""

    codec: Codec
    content: Spool
    """JSON, without the class."""
    values: Mapping[int, object]
    """For each class that occurs, a value that names it in the file."""
    with_ids: bool
    """Whether any record has an id of its own, which can be sent only once."""

    @property
    def have_columns(self) -> bool:
        """Whether rows are encoded by [columns]: then they are no plain numbers."""
        return self.codec.rows is not None

    def sample(
        self, row: int, numbered_id: str, x: Array, true_label: int | None, timestamp_ms: int | None
    ) -> NewRecord:
        """Return the sample of a row; `numbered_id` if the record has none."""
        codec, record = self.codec, self._record(row)
        own = codec.id_in(record)
        options: dict[str, Any] = {"true_label": true_label, "timestamp_ms": timestamp_ms}
        if codec.rows is None:
            return codec.encode_sample(own or numbered_id, x, **options)
        new, _ = codec.encode_record(own or numbered_id, record, **options)
        if own is None:
            return new
        return replace(new, headers=tuple(header for header in new.headers if header[0] != OWN_ID))

    def label(self, row: int, numbered_id: str, class_index: int, timestamp_ms: int | None) -> NewRecord:
        """Return the label of a row, in the form of [source.labels] if that maps a record."""
        codec, source = self.codec, self.codec.source.labels
        sample_id = codec.id_in(self._record(row)) or numbered_id
        id_path, label_path = (Path.parse(text) for text in (source.id or "id", source.label or "label"))
        if not source.paths or label_path.root != "value":
            return codec.labels.encode(sample_id, class_index, source="simulate", timestamp_ms=timestamp_ms)
        fields: dict[str, Any] = {}
        put(fields, id_path if id_path.root == "value" else Path.in_value("id"), sample_id)
        put(fields, label_path, self.values.get(class_index, codec.schema.classes[class_index]))
        new, _ = codec.labels.encode_users(fields)
        return replace(new, timestamp_ms=timestamp_ms)

    def _record(self, row: int) -> dict[str, Any]:
        record: dict[str, Any] = parse_json(self.content[row])
        return record


def without(fields: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return a record without what is at a path of its value. The record itself is not changed."""
    name, *deeper = path.parts
    rest = dict(fields)
    below = rest.pop(name, MISSING)
    if deeper and isinstance(below, dict):
        rest[name] = without(below, Path(path.text, "value", tuple(deeper)))
    elif deeper and below is not MISSING:
        rest[name] = below
    return rest


def put(fields: dict[str, Any], path: Path, value: object) -> None:
    """Put a value at a path of a record's value."""
    *outer, last = path.parts
    for name in outer:
        fields = fields.setdefault(name, {})
    fields[last] = value
