"""`streamlearn check --sample`: what the config makes of real records, decoded as the learner decodes them."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any, Final, TypeVar

import numpy as np

from streamlearn.app.findings import Finding, Verdict
from streamlearn.app.log import log_exists, make_codec, open_log
from streamlearn.app.sampling import TopicSample, read_some
from streamlearn.app.sizing import horizon_parts
from streamlearn.config import Config
from streamlearn.errors import ConfigError, RecordError, SkippedError
from streamlearn.log.codec import Codec
from streamlearn.records import ERASED, RETRACTED, UNLABELLED, ColumnKind, Label, Record, Sample
from streamlearn.schema.fields import UNITS_PER_SECOND
from streamlearn.schema.profile import Profile, profile
from streamlearn.schema.settings import ColumnConfig
from streamlearn.state.paths import StatePaths

QUANTILES: Final = (0.0, 0.1, 0.5, 0.9, 0.99, 1.0)
_MANY = 0.05
"""A larger share of invalid values is a warning."""
_SHOWN = 12
Decoded = TypeVar("Decoded", Sample, Label)


@dataclass(frozen=True)
class Bad:
    """Records that cannot be decoded, for one reason."""

    count: int
    example: str


@dataclass(frozen=True)
class TopicReport:
    """What became of the records of some topics."""

    topics: tuple[str, ...]
    partitions: int
    held: int
    """Records in the topics, about."""
    read: int
    decoded: int
    skipped: int
    """Null values, and rows that were deleted."""
    bad: Mapping[str, Bad]
    """By reason."""
    rate: float | None
    """Records per second, from the log's times; None if all have one time."""
    oldest_s: float | None
    newest_s: float | None


@dataclass(frozen=True)
class ColumnReport:
    """The values of one column."""

    name: str
    kind: ColumnKind
    missing: float
    """Share of the decoded samples."""
    invalid: float
    """Share of the decoded samples."""
    distinct: int
    low: float | str | None
    """Smallest number, or earliest time."""
    high: float | str | None
    most_common: Sequence[str] = ()


@dataclass(frozen=True)
class JoinReport:
    """How labels meet samples, among the records that were read."""

    found: int
    """Labels whose sample was read too."""
    of: int
    """Labels with a class."""
    by: str
    """Which time delays are of: event time where both have one, else the log's."""
    delay_s: Mapping[str, float]
    """Quantiles of the delay from sample to label; empty if none was found."""
    example_sample: str | None
    example_label: str | None


@dataclass(frozen=True)
class RecordsReport:
    """All of it."""

    samples: TopicReport
    labels: TopicReport
    join: JoinReport
    classes: Mapping[str, int]
    """Labels by class, also of classes that were not seen."""
    unknown_classes: Mapping[str, int]
    retracted: int
    columns: Sequence[ColumnReport]
    unknown_fields: Mapping[str, int]
    """Fields at the top of samples that no setting names: how many records have them."""
    horizon_s: float
    horizon_samples: float | None
    """Samples within the horizon at the estimated rate."""
    max_ids: int
    horizon_bytes: Mapping[str, int] = field(default_factory=dict)
    """On disk, by part."""

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def findings(self) -> Iterator[Finding]:
        """The report line by line, without the columns' table."""
        yield from _of_topic("samples", self.samples)
        yield from _of_topic("labels", self.labels)
        yield self._ids()
        yield from self._delays()
        yield from self._classes()
        yield from self._columns()
        yield from self._horizon()

    def _ids(self) -> Finding:
        join = self.join
        whole = self.samples.read >= self.samples.held
        limit = "all samples" if whole else f"the {self.samples.read:,} samples read; the others' may be in the rest"
        text = f"{join.found} of {join.of} labels belong to {limit}"
        if join.of and not join.found:
            text += f". A label has the id {join.example_label!r:.60}, a sample {join.example_sample!r:.60}"
        return Finding("warning" if join.of and not join.found else "ok", "ids", text)

    def _delays(self) -> Iterator[Finding]:
        delays = self.join.delay_s
        if not delays:
            return
        text = ", ".join(f"{name} {_duration(value)}" for name, value in delays.items())
        late = delays["max"] > self.horizon_s
        if late:
            text += f": longer than labels.horizon_s = {_duration(self.horizon_s)}"
        yield Finding("warning" if late else "ok", "label delay", f"by {self.join.by}: {text}")

    def _classes(self) -> Iterator[Finding]:
        shown = [f"{name} {count}" for name, count in list(self.classes.items())[:_SHOWN]]
        more = f", … {len(self.classes) - _SHOWN} more" if len(self.classes) > _SHOWN else ""
        missing = [name for name, count in self.classes.items() if not count]
        text = ", ".join(shown) + more
        if missing and self.join.of:
            text += f"; not seen: {', '.join(missing[:_SHOWN])}"
        yield Finding("warning" if missing and self.join.of else "ok", "classes", text)
        if self.unknown_classes:
            names = ", ".join(f"{name!r:.40} {count}" for name, count in list(self.unknown_classes.items())[:_SHOWN])
            text = f"{names}: not in schema.classes; map them with source.labels.values, or add them"
            yield Finding("warning", "unknown classes", text)
        if self.retracted:
            yield Finding("ok", "retractions", f"{self.retracted} labels are null, and withdraw others")

    def _columns(self) -> Iterator[Finding]:
        for column in self.columns:
            if column.invalid > _MANY:
                text = f"{column.invalid:.0%} of the values are no {column.kind}, and are encoded as missing"
                yield Finding("warning", f"column {column.name}", text)
            if column.missing >= 1.0:
                yield Finding("warning", f"column {column.name}", "missing in all samples: is its path right?")
        if self.unknown_fields:
            names = sorted(self.unknown_fields, key=lambda name: (-self.unknown_fields[name], name))
            text = ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")
            yield Finding("ok", "unused fields", f"{len(names)} that no setting names: {text}")

    def _horizon(self) -> Iterator[Finding]:
        rate, samples = self.samples.rate, self.horizon_samples
        if rate is None or samples is None:
            return
        labels = "" if self.labels.rate is None else f" and {self.labels.rate:.3g} labels/s"
        parts = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in self.horizon_bytes.items())
        text = f"about {rate:.3g} samples/s{labels}; {_duration(self.horizon_s)} hold {samples:,.0f} samples: "
        text += f"{sum(self.horizon_bytes.values()) / 2**30:.2f} GiB on disk ({parts}); memory does not grow with them"
        full = samples > self.max_ids
        if full:
            text += f". More than labels.max_ids = {self.max_ids:,}: older ones are forgotten before the horizon"
        yield Finding("warning" if full else "ok", "rate", text)


def check_records(config: Config, count: int) -> RecordsReport:
    """Read about `count` records of samples and as many of labels, and decode them.

    Raises:
        ConfigError: there is no such log or topic, or the codec cannot be made.
        LogUnavailableError: the log is away.
        RegistryUnavailableError: the schema registry is away.
    """
    if not log_exists(config):
        msg = f"{StatePaths(config.state.dir).log}: there is no log yet, and so no records"
        raise ConfigError(msg)
    codec = make_codec(config)
    with contextlib.closing(open_log(config)) as log:
        samples = read_some(log, config.source.samples.topics, count)
        labels = read_some(log, [config.source.labels.topic], count)
    return examine(config, codec, samples, labels)


def examine(config: Config, codec: Codec, some_samples: TopicSample, some_labels: TopicSample) -> RecordsReport:
    """Decode records with a fresh codec, and report what they hold. Raises RegistryUnavailableError."""
    of_samples, samples, records = _decoded(some_samples, codec.decode_sample)
    of_labels, labels, _ = _decoded(some_labels, codec.labels.decode)
    taken = [label for label in labels if label.class_index not in (RETRACTED, ERASED)]
    counts = Counter(label.class_index for label in taken)
    horizon = of_samples.rate and of_samples.rate * config.labels.horizon_s
    return RecordsReport(
        samples=of_samples,
        labels=of_labels,
        join=_joined(samples, taken),
        classes={name: counts[index] for index, name in enumerate(codec.schema.classes)},
        unknown_classes=Counter(str(label.class_name) for label in taken if label.class_index == UNLABELLED),
        retracted=len(labels) - len(taken),
        columns=_columns(config, codec, records),
        unknown_fields={} if codec.rows is None else dict(codec.rows.counts().unknown),
        horizon_s=config.labels.horizon_s,
        horizon_samples=horizon,
        max_ids=config.labels.max_ids,
        horizon_bytes={} if horizon is None else dict(horizon_parts(config, horizon)),
    )


def _decoded(some: TopicSample, decode: Callable[[Record], Decoded]) -> tuple[TopicReport, list[Decoded], list[Record]]:
    """The report, what was decoded, and the records that it came from."""
    found: list[Decoded] = []
    records: list[Record] = []
    reasons: Counter[str] = Counter()
    examples: dict[str, str] = {}
    skipped = 0
    for record in some.records:
        try:
            found.append(decode(record))
            records.append(record)
        except SkippedError:
            skipped += 1
        except RecordError as error:
            reasons[error.reason] += 1
            examples.setdefault(error.reason, str(error))
    span = some.span_s or (None, None)
    report = TopicReport(
        topics=some.topics,
        partitions=some.partitions,
        held=some.held,
        read=len(some.records),
        decoded=len(found),
        skipped=skipped,
        bad={reason: Bad(number, examples[reason]) for reason, number in reasons.most_common()},
        rate=some.rate,
        oldest_s=span[0],
        newest_s=span[1],
    )
    return report, found, records


def _joined(samples: Sequence[Sample], labels: Sequence[Label]) -> JoinReport:
    known: dict[str, Sample] = {}
    for sample in samples:
        known.setdefault(sample.sample_id, sample)
    pairs = [(known[label.sample_id], label) for label in labels if label.sample_id in known]
    by_event = bool(pairs) and all(s.event_time_s is not None and b.event_time_s is not None for s, b in pairs)
    if by_event:
        delays = [(label.event_time_s or 0.0) - (sample.event_time_s or 0.0) for sample, label in pairs]
    else:
        delays = [label.timestamp_s - sample.timestamp_s for sample, label in pairs]
    names = ["min", *(f"{quantile:.0%}" for quantile in QUANTILES[1:-1]), "max"]
    values = np.quantile(delays, QUANTILES).tolist() if delays else []
    return JoinReport(
        found=len(pairs),
        of=len(labels),
        by="event time" if by_event else "the log's time",
        delay_s=dict(zip(names, values, strict=False)),
        example_sample=samples[0].sample_id if samples else None,
        example_label=labels[0].sample_id if labels else None,
    )


def _columns(config: Config, codec: Codec, records: Sequence[Record]) -> list[ColumnReport]:
    """The values of the columns in records that were decoded."""
    if codec.rows is None:
        return []
    counts, rows = codec.rows.counts(), [codec.fields_of_sample(record) for record in records]
    found = []
    for name, column in config.columns.items():
        path = column.path(name)
        seen = profile(path.find(fields) for fields in rows)
        number = max(1, counts.records)
        missing, invalid = counts.missing[name] / number, counts.invalid[name] / number
        found.append(
            ColumnReport(name, column.kind, missing, invalid, seen.distinct, *_range(seen, column), seen.most_common(3))
        )
    return found


def _range(seen: Profile, column: ColumnConfig) -> tuple[float | str | None, float | str | None]:
    """Smallest and largest number, or the earliest and latest time."""
    seconds = seen.seconds
    if column.kind == "timestamp" and not seconds:
        seconds = [number / UNITS_PER_SECOND[column.unit] for number in seen.numbers]
    if seconds:
        return _iso(seconds[0]), _iso(seconds[-1])
    return (seen.numbers[0], seen.numbers[-1]) if seen.numbers else (None, None)


def _iso(second: float) -> str:
    try:
        return datetime.fromtimestamp(second, UTC).isoformat(timespec="seconds")
    except (OverflowError, ValueError, OSError):
        return f"{second:g} s since 1970"


def _of_topic(subject: str, report: TopicReport) -> Iterator[Finding]:
    number, taken = report.read - report.skipped, report.decoded
    names = ", ".join(report.topics)
    head = f"{names}: {report.partitions} partitions, {report.held:,} records; {report.read:,} read"
    skipped = f", {report.skipped} null or deleted" if report.skipped else ""
    share = f"{taken / number:.1%} of them decode" if number else "none to decode"
    verdict: Verdict = "ok" if taken == number and report.read else "error" if number and not taken else "warning"
    yield Finding(verdict, subject, f"{head}{skipped}, {share}")
    for reason, bad in report.bad.items():
        yield Finding(verdict, f"{subject}: {reason}", f"{bad.count} records, such as {bad.example}")


def _duration(seconds: float) -> str:
    """Two digits in a unit that a reader can grasp."""
    for unit, size in (("d", 86_400.0), ("h", 3600.0), ("min", 60.0)):
        if abs(seconds) >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"
