"""`streamlearn predict`: answers to the records of a file, by a published teacher. It needs no running process.

Records are encoded as those of the log and of /predict. A bad record is reported and does not stop the run. Memory is
bounded by `CHUNK_ROWS` records. The output appears under its name when it is complete.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from streamlearn.app.answers import WRITERS, Answers, json_lines
from streamlearn.app.log import make_codec
from streamlearn.app.versions import find_version
from streamlearn.config import Config
from streamlearn.errors import ConfigError, RecordError, StreamlearnError
from streamlearn.log.codec import Codec
from streamlearn.models.answer import Thresholds
from streamlearn.records import Array
from streamlearn.schema.files import BadRecords, read_records
from streamlearn.serve.predictor import LoadedModel, load
from streamlearn.state.files import write_whole

CHUNK_ROWS = 256
"""Records of one forward pass."""
CHUNK_BYTES = 64 << 20


class Outcome(NamedTuple):
    """What became of the records of a file."""

    model_version: int
    answered: int
    bad: Mapping[str, int]
    """Records that were not answered, by reason."""


def predict_file(
    config: Config,
    source: str,
    *,
    out: Path | None = None,
    version: int | None = None,
    report: Callable[[str], None],
    progress: Callable[[int], None] = lambda _: None,
) -> Outcome:
    """Write the answers to `out`, whose suffix is the format, or as JSON lines to standard output.

    Args:
        config: with the `state.dir` of the teacher, and the [columns] and [source] of the records.
        source: a file that `schema.files.read_records` reads, or `-`.
        out: replaced when all is written; unchanged if that fails.
        version: of the teacher; None is the pinned one, else the newest.
        report: called with a sentence for each of the first bad records, and with the counts at the end.
        progress: called with the number of records read so far.

    Raises:
        ConfigError: source or output cannot be used, or there is no such version.
        StateError: the teacher cannot be loaded.
        StreamlearnError: no record could be answered. Nothing was written to `out`.
    """
    writer = json_lines if out is None else WRITERS.get(out.suffix.lower())
    if writer is None:
        raise ConfigError(f"--out {out}: expected a name that ends in {', '.join(WRITERS)}")
    if out is not None and out.exists() and Path(source).exists() and out.samefile(source):
        raise ConfigError(f"--out {out}: is the file that is read; choose another name")
    model = load(find_version(config, version), config.schema_.build(), factory=config.model.factory)
    thresholds = Thresholds(config.schema_.build(), config.score.thresholds)
    run = _Run(make_codec(config), model, thresholds, BadRecords(report), progress)
    content = writer(run.answers(source, config.log.max_record_bytes), model.classes, model.step)
    if out is None:
        for piece in content:
            sys.stdout.buffer.write(piece)
            sys.stdout.buffer.flush()
    else:
        try:
            write_whole(out, content)
        except OSError as error:
            raise ConfigError(f"--out {out}: cannot be written: {error.strerror or error}") from error
    for sentence in run.sentences():
        report(sentence)
    return Outcome(model.step, run.answered, run.bad.reasons)


class _Run:
    """One run over a file."""

    def __init__(
        self,
        codec: Codec,
        model: LoadedModel,
        thresholds: Thresholds,
        bad: BadRecords,
        progress: Callable[[int], None],
    ) -> None:
        self._codec, self._model, self._thresholds, self._progress = codec, model, thresholds, progress
        self.bad, self.answered = bad, 0

    def answers(self, source: str, max_bytes: int) -> Iterator[Answers]:
        """Answer the records in chunks.

        Raises:
            StreamlearnError: at the end, if none could be answered.
        """
        rows = self._codec.schema.rows_within(CHUNK_ROWS, CHUNK_BYTES)
        chunk: list[tuple[int, str | None, Array]] = []
        for line, fields in read_records(source, max_bytes=max_bytes):
            try:
                if isinstance(fields, RecordError):
                    raise fields
                chunk.append((line, self._codec.id_in(fields), self._codec.x_of(fields)))
            except RecordError as error:
                self.bad.add(line, error)
            if len(chunk) == rows:
                yield self._answer(chunk)
                chunk.clear()
        if chunk:
            yield self._answer(chunk)
        if not self.answered:
            raise StreamlearnError(f"{source}: {self.bad.no_others}")

    def _answer(self, chunk: list[tuple[int, str | None, Array]]) -> Answers:
        lines, ids, x = zip(*chunk, strict=True)
        probs_BC = self._model.probabilities(np.stack(x))
        finite_B = np.isfinite(probs_BC).all(axis=1)
        for row in np.flatnonzero(~finite_B).tolist():
            error = RecordError("not_finite", "the model has no finite answer; the values are too extreme")
            self.bad.add(lines[row], error)
        kept = np.flatnonzero(finite_B).tolist()
        probs_BC = probs_BC[kept]
        winners = self._thresholds.choose(probs_BC).tolist()
        self.answered += len(kept)
        self._progress(self.answered + self.bad.total)
        shown_BC = probs_BC[:, : len(self._model.classes)]
        return Answers([lines[row] for row in kept], [ids[row] for row in kept], winners, shown_BC)

    def sentences(self) -> list[str]:
        """How many records were answered, why others were not, and which columns had values that were not used."""
        bad = f"; {self.bad}" if self.bad.total else ""
        counts = [] if self._codec.rows is None else self._codec.rows.counts().sentences
        return [f"{self.answered} records answered by version {self._model.step}{bad}", *counts]
