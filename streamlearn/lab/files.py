"""Data sets for `evaluate` and `simulate`: those of `lab.datasets`, and any file of the user's records.

A file is read once. Its rows, encoded as those of the log, and its records go to temporary files, so that memory does
not grow with it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path as FilePath
from typing import Any

import numpy as np
import orjson

from streamlearn.app.log import make_codec
from streamlearn.config import Config
from streamlearn.errors import ConfigError, RecordError, StreamlearnError
from streamlearn.lab.datasets import Dataset, load
from streamlearn.lab.held_out import Progress, no_progress
from streamlearn.lab.records import Records, Spool, put, without
from streamlearn.records import UNLABELLED, Array
from streamlearn.schema.files import SUFFIXES, BadRecords, read_records
from streamlearn.schema.paths import MISSING, Path

_PROGRESS_EVERY = 1000
_NUMBERED = "0"
"""Stands for the id of a record without one, while the record is tried."""


def open_dataset(
    config: Config,
    name: str,
    stopping: threading.Event,
    *,
    label: str | None = None,
    limit: int | None = None,
    report: Callable[[str], None] = lambda _: None,
    progress: Progress = no_progress,
) -> Dataset:
    """Open a data set by its name, or a file.

    Args:
        config: its schema, [source] and [columns] say what a record is.
        name: of a data set of `lab.datasets`, or a path.
        stopping: ends the reading of a file.
        label: path to the class in a file's records; None is that of [source.labels], of [source.samples], or "label".
        limit: keep only the first samples.
        report: called with a sentence for each of the first bad records of a file, and with their counts.
        progress: called with the records read so far.

    Raises:
        ConfigError: it cannot be read, or has no samples or classes.
        StreamlearnError: stopped.
    """
    suffix = FilePath(name).suffix.lower()
    if suffix == ".npz" or suffix not in SUFFIXES:
        if label is not None:
            raise ConfigError(f"--label {label}: {name} has its classes in y; only files of records have fields")
        return load(name, limit=limit)
    return _Loader(config, name, label, report).load(limit, stopping, progress)


class _Loader:
    """Reads one file."""

    def __init__(self, config: Config, name: str, label: str | None, report: Callable[[str], None]) -> None:
        self._name, self._codec = name, make_codec(config)
        self._max_bytes = config.log.max_record_bytes
        if not config.columns and FilePath(name).suffix.lower() in (".csv", ".tsv"):
            raise ConfigError(f"{name}: set [columns] in the config, which says what the inputs are")
        self._label = _label_path(config, label)
        self._check_leaks(config)
        mapped_id = config.source.samples.id
        self._needs_id = None if mapped_id is None or Path.parse(mapped_id).root != "value" else mapped_id
        self._bad, self._report = BadRecords(report), report
        self._fields: list[str] = []
        """Of the first record."""

    def _check_leaks(self, config: Config) -> None:
        """Check that no column is the class."""
        for column, settings in config.columns.items():
            parts = settings.path(column).parts
            if parts == self._label.parts[: len(parts)] or self._label.parts == parts[: len(self._label.parts)]:
                raise ConfigError(
                    f"columns.{column} is at {self._label.text}, which is the class: remove the column, or name the"
                    " class with --label"
                )

    def load(self, limit: int | None, stopping: threading.Event, progress: Progress) -> Dataset:
        """Read the file."""
        schema = self._codec.schema
        rows, content = Spool(), Spool()
        classes: list[int] = []
        values: dict[int, object] = {}
        with_ids = False
        try:
            for x, value, has_id, record in self._samples(stopping, progress):
                class_index = UNLABELLED if value is None else self._class_of(value)
                rows.append(x.tobytes())
                content.append(record)
                classes.append(class_index)
                values.setdefault(class_index, value)
                with_ids = with_ids or has_id
                if len(classes) == limit:
                    break
            rows.flush()
            content.flush()
        except OSError as error:
            raise ConfigError(f"{self._name}: no room for a copy of it: {error}; set TMPDIR, or --limit") from error
        if not classes:
            raise ConfigError(f"{self._name}: {self._bad.no_others}")
        y = np.array(classes, np.int64)
        for sentence in self._sentences(int((y == UNLABELLED).sum())):
            self._report(sentence)
        if not (y != UNLABELLED).any():
            raise ConfigError(
                f"{self._name}: no record has a class at {self._label.text}: name its field with --label; the first"
                f" record has {', '.join(self._fields)}"
            )
        x_N = rows.as_array(schema.dtype, (len(y), *schema.shape))
        values.pop(UNLABELLED, None)
        return Dataset(
            FilePath(self._name).stem,
            x_N,
            y,
            schema.classes,
            suggested={"schema": {"classes": list(schema.classes)}},
            records=Records(self._codec, content, values, with_ids),
        )

    def _sentences(self, unlabelled: int) -> list[str]:
        """What was not used."""
        bad = [f"{self._name}: {self._bad}"] if self._bad.total else []
        without_class = [f"{unlabelled} records have no class: they get no label"] if unlabelled else []
        counts = [] if self._codec.rows is None else self._codec.rows.counts().sentences
        return [*bad, *without_class, *counts]

    def _samples(self, stopping: threading.Event, progress: Progress) -> Iterator[tuple[Array, object, bool, bytes]]:
        """Row, value of the class, whether it has an id, and JSON without the class, of each good record."""
        for number, (line, fields) in enumerate(read_records(self._name, max_bytes=self._max_bytes), start=1):
            if number % _PROGRESS_EVERY == 0:
                progress(f"reading {FilePath(self._name).name}", number, None)
                if stopping.is_set():
                    raise StreamlearnError(f"{self._name}: stopped while it was read")
            try:
                if isinstance(fields, RecordError):
                    raise fields
                yield self._sample(fields)
            except RecordError as error:
                self._bad.add(line, error)

    def _sample(self, fields: dict[str, Any]) -> tuple[Array, object, bool, bytes]:
        codec = self._codec
        self._fields = self._fields or [name[:40] for name in fields][:20]
        value = _as_json(self._label.find(fields))
        if value is not None:
            self._class_of(value)
        record = without(fields, self._label)
        own = codec.id_in(record)
        if own is None and self._needs_id is not None:
            raise RecordError("no_id", f"expected an id at {self._needs_id}, got none")
        if codec.rows is None:
            only_id: dict[str, Any] = {}
            if own is not None:
                put(only_id, Path.in_value(self._needs_id or "id"), own)
            return codec.x_of(record), value, own is not None, orjson.dumps(only_id)
        new, sample = codec.encode_record(own or _NUMBERED, record)
        assert new.value is not None
        return sample.x, value, own is not None, new.value

    def _class_of(self, value: object) -> int:
        """The index of a class. Raises `unknown_class`, also where a learner would hold the label."""
        class_index, unknown = self._codec.classes.of_value(value)
        if unknown is not None:
            self._codec.schema.class_index(unknown)  # raises
        return class_index


def _label_path(config: Config, label: str | None) -> Path:
    """The path to the class in a record of a file."""
    text = label or config.source.labels.label or config.source.samples.label or "label"
    try:
        path = Path.parse(text)
    except ValueError as error:
        raise ConfigError(f"--label {text}: {error}") from error
    if path.root != "value":
        raise ConfigError(f"the class is at {text}, which records of a file do not have: name its field with --label")
    return path


def _as_json(value: object) -> object:
    """The value of a class as JSON would have it: pandas writes True and False into CSV; None if there is none."""
    if value is MISSING or value in (None, ""):
        return None
    return value.lower() if value in ("True", "False") and isinstance(value, str) else value
