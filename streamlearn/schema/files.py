"""Files of the user's records: CSV, JSON lines, Parquet and .npz, all read by `read_records`.

A record has the values of JSON, or those that Avro's logical types become. CSV values are text, and an empty field is
None. Files are read in pieces, so memory is bounded by the longest record, not by the file. pyarrow is imported here,
when a file is Parquet.
"""

from __future__ import annotations

import contextlib
import csv
import math
import sys
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from streamlearn.errors import ConfigError, RecordError
from streamlearn.schema.formats import json_object

STDIN = "-"
SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet", ".npz")
"""Of the files that can be read."""
BATCH_BYTES = 4 << 20
"""About as much of a Parquet or .npz file is decoded at a time; as Python objects it takes ten times that."""
BATCH_ROWS = 1024
MAX_REPORTED = 20
"""Bad records that are reported one by one; all are counted."""
_DELIMITERS = ",;\t|"
_BOM = b"\xef\xbb\xbf"
_BAD_NPZ = (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError)
"""What zipfile and numpy raise on a file that is no .npz. RuntimeError: it is encrypted."""


class FileRecord(NamedTuple):
    """One record of a file."""

    line: int
    """Where it starts, from 1: the line in text, the row in Parquet and .npz."""
    fields: dict[str, Any] | RecordError
    """Its fields, or why it cannot be read. The next one may be good."""


class BadRecords:
    """Counts the records that could not be used, and reports the first of them one by one."""

    def __init__(self, report: Callable[[str], None]) -> None:
        """`report` is called with a sentence."""
        self.reasons: Counter[str] = Counter()
        self._report, self._first = report, ""

    def add(self, line: int, error: RecordError) -> None:
        """Count one."""
        sentence = f"line {line}: {error.reason}: {error}"
        self._first = self._first or sentence
        self.reasons[error.reason] += 1
        if self.total <= MAX_REPORTED:
            self._report(sentence)

    @property
    def total(self) -> int:
        """All of them."""
        return self.reasons.total()

    def __str__(self) -> str:
        counts = ", ".join(f"{count} {reason}" for reason, count in self.reasons.most_common())
        return f"{self.total} could not be read: {counts}"

    @property
    def no_others(self) -> str:
        """Why a file has no good records, if it has none."""
        return f"none of {self.total} records could be read; {self._first}" if self.total else "it holds no records"


def read_records(source: str | Path, *, max_bytes: int) -> Iterator[FileRecord]:
    """Read the records of a file, which its suffix describes; `-` is standard input, as JSON lines.

    A line of JSON, a record of CSV and a row of .npz may have `max_bytes`. Of an .npz file a record is {"x"}, with "id"
    if it has an array of that name.

    Raises:
        ConfigError: the file cannot be read, or from some place on.
    """
    suffix = Path(source).suffix.lower()
    if str(source) == STDIN:
        yield from _json_lines(sys.stdin.buffer, max_bytes)
        return
    if suffix not in SUFFIXES:
        raise ConfigError(f"{source}: expected a file that ends in {', '.join(SUFFIXES)}, got {suffix or 'no suffix'}")
    path = Path(source)
    try:
        with path.open("rb") as file:
            if suffix == ".parquet":
                yield from _parquet(path, file)
            elif suffix == ".npz":
                yield from _npz(path, file, max_bytes)
            elif suffix in (".csv", ".tsv"):
                yield from _csv(path, file, max_bytes, "\t" if suffix == ".tsv" else None)
            else:
                yield from _json_lines(file, max_bytes)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from error


class _Lines:
    """Lines, of which one record may take `max_bytes`. Iteration can go on after an error, unlike a generator's."""

    def __init__(self, file: BinaryIO, max_bytes: int) -> None:
        self.number = 0
        """Lines read."""
        self._file, self._max_bytes, self._left = file, max_bytes, max_bytes

    def start(self) -> int:
        """A new record starts. Return the number of its first line."""
        self._left = self._max_bytes
        return self.number + 1

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> bytes:
        line = self._file.readline(self._left + 1)
        if not line:
            raise StopIteration
        if self.number == 0:
            line = line.removeprefix(_BOM)
        self.number += 1
        if len(line) > self._left:
            while line and not line.endswith(b"\n"):
                line = self._file.readline(1 << 16)
            raise RecordError("too_large", f"expected a record of at most {self._max_bytes} bytes, got a longer one")
        self._left -= len(line)
        return line


def _json_lines(file: BinaryIO, max_bytes: int) -> Iterator[FileRecord]:
    lines = _Lines(file, max_bytes)
    while True:
        start = lines.start()
        try:
            line = next(lines).strip()
            if line:
                yield FileRecord(start, json_object(line))
        except StopIteration:
            return
        except RecordError as error:
            yield FileRecord(start, error)


def _csv(path: Path, file: BinaryIO, max_bytes: int, delimiter: str | None) -> Iterator[FileRecord]:
    """Without a delimiter, the one that the header has most often."""
    csv.field_size_limit(max(csv.field_size_limit(), max_bytes))
    lines = _Lines(file, max_bytes)
    try:
        header = _text(next(lines, b""))
        delimiter = delimiter or max(_DELIMITERS, key=header.count)
        names = next(csv.reader([header], delimiter=delimiter, strict=True), [])
    except (RecordError, csv.Error) as error:
        expected = "expected CSV in UTF-8, with the names of the fields in its first line"
        raise ConfigError(f"{path}: {expected}: {error}") from error
    _check_names(path, names)
    # `map` goes on after an error, as `_Lines` does.
    rows = csv.reader(map(_text, lines), delimiter=delimiter, strict=True)
    while True:
        start = lines.start()
        try:
            values = next(rows)
        except StopIteration:
            return
        except RecordError as error:
            hint = "; is a quote not closed?" if lines.number > start else ""
            yield FileRecord(start, RecordError(error.reason, f"{error}{hint}"))
        except csv.Error as error:
            yield FileRecord(start, RecordError("bad_dtype", f"expected CSV: {error}"))
        else:
            if len(values) == len(names):
                fields = {name: value or None for name, value in zip(names, values, strict=True)}
                fields.pop("", None)  # pandas writes its index without a name
                yield FileRecord(start, fields)
            elif values:  # not an empty line
                got = f"expected {len(names)} fields, as in the first line, got {len(values)}"
                yield FileRecord(start, RecordError("bad_shape", got))


def _text(line: bytes) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError:
        raise RecordError("bad_dtype", f"expected UTF-8 text, got {line!r:.80}") from None


def _check_names(path: Path, names: list[str]) -> None:
    named = [name for name in names if name]
    if not named:
        raise ConfigError(f"{path}: expected the names of the fields, got none")
    if twice := [name for name in set(named) if named.count(name) > 1]:
        raise ConfigError(f"{path}: expected fields of different names, got {sorted(twice)[0]!r:.80} twice")


def _parquet(path: Path, file: BinaryIO) -> Iterator[FileRecord]:
    try:
        import pyarrow as pa  # noqa: PLC0415  of an extra
        from pyarrow import parquet  # noqa: PLC0415
    except ImportError as error:
        raise ConfigError(f"{path}: Parquet needs the extra: pip install 'streamlearn[parquet]' ({error})") from error
    number = 0
    try:
        opened = parquet.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False)
        _check_names(path, opened.schema_arrow.names)
        groups = (opened.metadata.row_group(index) for index in range(opened.num_row_groups))
        size_bytes = max((group.total_byte_size // max(1, group.num_rows) for group in groups), default=0)
        rows = min(BATCH_ROWS, max(1, BATCH_BYTES // max(1, size_bytes)))
        for batch in opened.iter_batches(batch_size=rows):
            for fields in _rows_of(_microseconds(pa, batch)):
                number += 1
                yield FileRecord(number, fields)
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        after = f" after row {number}" if number else ""
        raise ConfigError(f"{path}: cannot be read as Parquet{after}: {error!s:.200}") from error


def _microseconds(pa: Any, batch: Any) -> Any:
    """The batch without nanoseconds, which Python's datetime does not have."""
    for index, field in enumerate(batch.schema):
        if pa.types.is_timestamp(field.type) and field.type.unit == "ns":
            values = batch.column(index).cast(pa.timestamp("us", field.type.tz), safe=False)
            batch = batch.set_column(index, field.name, values)
    return batch


def _rows_of(batch: Any) -> list[dict[str, Any] | RecordError]:
    """The rows of a batch. A value that Python cannot hold, such as a date in the year 20000, costs only its row."""
    with contextlib.suppress(ValueError, OverflowError):
        rows: list[dict[str, Any] | RecordError] = batch.to_pylist()
        return rows
    rows = []
    for index in range(batch.num_rows):
        try:
            rows += batch.slice(index, 1).to_pylist()
        except (ValueError, OverflowError) as error:
            rows.append(RecordError("bad_dtype", f"expected values that Python can hold: {error!s:.200}"))
    return rows


def _npz(path: Path, file: BinaryIO, max_bytes: int) -> Iterator[FileRecord]:
    number = 0
    try:
        with zipfile.ZipFile(file) as archive, contextlib.ExitStack() as opened:
            names = [name for name in ("x", "id") if f"{name}.npy" in archive.namelist()]
            if names[:1] != ["x"]:
                raise ValueError(f"it has no array x, but {', '.join(archive.namelist()[:10]) or 'nothing'}")
            streams = [opened.enter_context(archive.open(f"{name}.npy")) for name in names]
            heads = [_npy_head(stream, name) for stream, name in zip(streams, names, strict=True)]
            counts = {shape[0] for shape, _ in heads}
            if len(counts) > 1:
                raise ValueError(f"x has {heads[0][0][0]} rows, id {heads[1][0][0]}")
            size_bytes = sum(dtype.itemsize * math.prod(shape[1:]) for shape, dtype in heads)
            if size_bytes > max_bytes:
                raise ValueError(f"expected rows of at most {max_bytes} bytes, got {size_bytes}")
            rows = min(BATCH_ROWS, max(1, BATCH_BYTES // size_bytes))
            for first in range(0, counts.pop(), rows):
                parts = [_npy_rows(stream, head, first, rows) for stream, head in zip(streams, heads, strict=True)]
                for values in zip(*parts, strict=True):
                    number += 1
                    yield FileRecord(number, dict(zip(names, values, strict=True)))
    except _BAD_NPZ as error:
        after = f" after row {number}" if number else ""
        raise ConfigError(f"{path}: cannot be read as .npz{after}: {error!s:.200}") from error


def _npy_head(stream: Any, name: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and dtype of an array. Nothing in a header is executed, and objects are refused."""
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(stream)
    kinds = "biuf" if name == "x" else "iuU"
    if dtype.kind not in kinds or dtype.itemsize == 0 or min(shape, default=0) < 1 or (fortran and len(shape) > 1):
        order = " in Fortran order" if fortran else ""
        raise ValueError(f"expected {name} as rows in C order, got {dtype} {shape}{order}")
    return shape, dtype


def _npy_rows(stream: Any, head: tuple[tuple[int, ...], np.dtype[Any]], first: int, rows: int) -> list[Any]:
    """Up to `rows` rows from number `first` on, as lists of numbers, or as ids."""
    shape, dtype = head
    shape = (min(rows, shape[0] - first), *shape[1:])
    content = stream.read(dtype.itemsize * math.prod(shape))
    values: list[Any] = np.frombuffer(content, dtype).reshape(shape).tolist()
    return values
