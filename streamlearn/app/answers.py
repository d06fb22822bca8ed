"""What `streamlearn predict` writes: answers as JSON lines, CSV or Parquet, piece by piece.

Each answer has the line or row of its record, its id if it has one, the class, the probabilities in the order of the
classes, and the version of the model. pyarrow is imported here, when Parquet is written.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import orjson

from streamlearn.errors import ConfigError
from streamlearn.records import Probabilities


@dataclass(frozen=True, slots=True)
class Answers:
    """Answers to n records."""

    lines: list[int]
    ids: list[str | None]
    winners: list[int]
    """Indices of the classes that are answered, by thresholds where there are any."""
    probs_BC: Probabilities
    """(n, C), without spare classes."""

    def rows(self) -> Iterator[tuple[int, str | None, int, Probabilities]]:
        """Line, id, index of the class, and probabilities (C,) of each."""
        return zip(self.lines, self.ids, self.winners, self.probs_BC, strict=True)


Writer = Callable[[Iterator[Answers], tuple[str, ...], int], Iterator[bytes]]
"""Answers, names of the classes and version of the model to the content of a file."""


def json_lines(answers: Iterator[Answers], classes: tuple[str, ...], version: int) -> Iterator[bytes]:
    """One object per line."""
    for some in answers:
        lines = []
        for line, sample_id, winner, probs_C in some.rows():
            answer = {"line": line} if sample_id is None else {"line": line, "id": sample_id}
            answer |= {"class": classes[winner], "probabilities": probs_C, "model_version": version}
            lines.append(orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE))
        yield b"".join(lines)


def csv_rows(answers: Iterator[Answers], classes: tuple[str, ...], version: int) -> Iterator[bytes]:
    """A column for the probability of each class. Nine digits are a float32, exactly."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["line", "id", "class", *(f"probability_{name}" for name in classes), "model_version"])
    for some in answers:
        for line, sample_id, winner, probs_C in some.rows():
            shown = [f"{probability:.9g}" for probability in probs_C.tolist()]
            writer.writerow([line, sample_id, classes[winner], *shown, version])
        yield text.getvalue().encode()
        text.seek(0)
        text.truncate()


def parquet(answers: Iterator[Answers], classes: tuple[str, ...], version: int) -> Iterator[bytes]:
    """Probabilities as a list; ids as text, null where there is none.

    Raises:
        ConfigError: the extra `parquet` is not installed.
    """
    try:
        import pyarrow as pa  # noqa: PLC0415  of an extra
        from pyarrow import parquet as files  # noqa: PLC0415
    except ImportError as error:
        raise ConfigError(f"Parquet needs the extra: pip install 'streamlearn[parquet]' ({error})") from error
    kinds = (pa.int64(), pa.string(), pa.string(), pa.list_(pa.float32()), pa.int64())
    names = ("line", "id", "class", "probabilities", "model_version")
    schema = pa.schema(list(zip(names, kinds, strict=True)))
    sink = _Sink()
    with files.ParquetWriter(pa.PythonFile(sink, mode="w"), schema) as writer:
        for some in answers:
            winners = [classes[winner] for winner in some.winners]
            probs = pa.FixedSizeListArray.from_arrays(some.probs_BC.ravel(), some.probs_BC.shape[1]).cast(kinds[3])
            columns = [some.lines, some.ids, winners, probs, [version] * len(winners)]
            arrays = [pa.array(values, kind) for values, kind in zip(columns, kinds, strict=True)]
            writer.write_batch(pa.record_batch(arrays, schema=schema))
            yield sink.take()
    yield sink.take()


class _Sink(io.RawIOBase):
    """A file to write to, whose content is taken away piece by piece."""

    def __init__(self) -> None:
        super().__init__()
        self._pieces: list[bytes] = []
        self._size = 0

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._size

    def write(self, content: object) -> int:
        piece = bytes(content)  # type: ignore[call-overload]  # anything with a buffer
        self._pieces.append(piece)
        self._size += len(piece)
        return len(piece)

    def take(self) -> bytes:
        """What was written since the last call."""
        content = b"".join(self._pieces)
        self._pieces.clear()
        return content


WRITERS: Mapping[str, Writer] = {".jsonl": json_lines, ".ndjson": json_lines, ".csv": csv_rows, ".parquet": parquet}
"""By the suffix of the file."""
