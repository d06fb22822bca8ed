"""A labelled data set as a stream of samples and late labels, sent to a log.

A sample carries its class only as `true_label`, for oracle scores. The learner gets it as a label record, `delay`
samples later, for `label_share` of the samples. The same plan gives the same records, bit for bit: order, choice of
labels, delays and noise are functions of (seed, pass) or (seed, sample number).
"""

from __future__ import annotations

import heapq
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from streamlearn.errors import ConfigError
from streamlearn.lab.datasets import Dataset
from streamlearn.lab.delays import Delay, parse_delay
from streamlearn.lab.drift import Drift, Drifts
from streamlearn.log.base import Log
from streamlearn.log.codec import Codec
from streamlearn.records import NewRecord, Schema

Order: TypeAlias = Literal["shuffle", "file", "class-sorted"]
Payload: TypeAlias = Literal["raw", "npy", "json"]
Event: TypeAlias = tuple[Literal["sample", "label"], NewRecord]

MAX_RATE = 1e7
APPENDS_PER_S = 10
"""With a rate, the number of appends per second, which bounds the bursts."""
MAX_SLEEP_S = 0.2
"""Longest time without checking for a stop."""
MAX_BEHIND_S = 1.0
"""After a stall, at most this many seconds of the rate are made up for."""


@dataclass(frozen=True, kw_only=True)
class StreamPlan:
    """What to stream. Validated on construction.

    Raises:
        ConfigError: a value is out of bounds, or the data set does not fit the schema or the drifts.
    """

    dataset: Dataset
    schema: Schema | None = None
    """Schema of the records, including class names; default: that of the data set."""
    order: Order = "shuffle"
    """shuffle (in each pass), file, or class-sorted."""
    passes: int = 1
    """Passes over the data set; 0 means endless."""
    label_share: float = 1.0
    """Share of labelled samples."""
    inline_share: float = 0.0
    """Share of the labelled samples whose label is in the sample record itself, without a label record."""
    delay: Delay = field(default_factory=lambda: parse_delay("0"))
    """From a sample to its label."""
    drifts: tuple[Drift, ...] = ()
    payload: Payload = "raw"
    id_prefix: str | None = None
    """Prefix of the ids, before the sample number; default: the name of the data set and a dash."""
    seed: int = 0
    drop_pending: bool = False
    """At the end of the stream, drop labels that are not due, instead of sending them at once."""
    start_time_ms: int | None = None
    """Timestamp of the first sample; None: the log sets the timestamps."""
    max_pending: int = 5_000_000
    """Most labels that wait until they are due."""

    def __post_init__(self) -> None:
        for name, wanted in (("order", get_args(Order)), ("payload", get_args(Payload))):
            if getattr(self, name) not in wanted:
                raise ConfigError(f"{name}: wanted {', '.join(wanted)}, got {getattr(self, name)!r:.80}")
        for name in ("label_share", "inline_share"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ConfigError(f"{name}: wanted a share from 0 to 1, got {getattr(self, name)!r:.80}")
        for name, low in (("passes", 0), ("seed", 0), ("start_time_ms", 0), ("max_pending", 1)):
            value = getattr(self, name)
            if value is not None and value < low:
                raise ConfigError(f"{name}: wanted at least {low}, got {value!r:.80}")
        if self.schema is not None:
            self.dataset.check_fits(self.schema)
        Drifts(self.dataset, self.drifts, seed=self.seed)  # checks that they fit


class Topics(Protocol):
    """Topic names, as in `log.topics` of the config."""

    @property
    def samples(self) -> str: ...  # noqa: D102
    @property
    def labels(self) -> str: ...  # noqa: D102


class Counts(NamedTuple):
    """Counts of a stream."""

    samples: int
    labels: int
    """Label records."""
    labels_pending: int
    """Labels of appended samples that were not due when the stream stopped, or were dropped at its end."""
    labels_inline: int
    """Labels inside sample records; not counted in `labels`."""


class Stream:
    """The records of a plan, in order. Iterate once; `pending` and `inline` count what was yielded so far.

    `rate` (samples per second) determines the spacing of timestamps, and converts delays in time to samples.
    """

    def __init__(self, plan: StreamPlan, *, rate: float | None = None) -> None:
        if rate is not None and not 0.0 < rate <= MAX_RATE:
            raise ConfigError(f"rate: wanted more than 0 and at most {MAX_RATE:g} samples per second, got {rate!r:.80}")
        plan.delay.check_rate(rate)
        self.inline = 0
        self._plan = plan
        self._rate = rate
        self._schema = plan.schema or plan.dataset.schema
        self._codec = Codec(self._schema)
        self._drifts = Drifts(plan.dataset, plan.drifts, seed=plan.seed)
        self._prefix = f"{plan.dataset.name}-" if plan.id_prefix is None else plan.id_prefix
        self._waiting: list[tuple[int, int, int]] = []
        """A heap of (number of the sample after which the label is due, number of its own sample, class)."""
        self._events = self._run()

    @property
    def pending(self) -> int:
        """Labels that are not due yet."""
        return len(self._waiting)

    def __iter__(self) -> Iterator[Event]:
        return self._events

    def _run(self) -> Iterator[Event]:
        number = 0
        passes = itertools.count() if self._plan.passes == 0 else range(self._plan.passes)
        for turn in passes:
            draws = self._draw(turn, first=number)
            for row, label_after, inside in zip(*(array.tolist() for array in draws), strict=True):
                yield "sample", self._sample(number, row, label_after, inside=inside)
                while self._waiting and self._waiting[0][0] <= number:
                    yield "label", self._label(number)
                number += 1
        while self._waiting and not self._plan.drop_pending:
            yield "label", self._label(number - 1)

    def _draw(
        self, turn: int, *, first: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """Draw one pass: row of each sample, delay of its label (-1: no label), and whether the label is inline.

        Each kind of draw has its own generator, so that a change of one setting does not affect the other draws.
        """
        plan, count = self._plan, len(self._plan.dataset.y)
        order, share, inline, delay = (np.random.default_rng((plan.seed, kind, turn)) for kind in range(4))
        rows = np.arange(count)
        if plan.order == "shuffle":
            rows = order.permutation(count)
        elif plan.order == "class-sorted":
            rows = np.argsort(plan.dataset.y, kind="stable")
        rows = self._drifts.rows(rows, plan.dataset.y, first=first)
        labelled = share.random(count) < plan.label_share
        delays = np.where(labelled, plan.delay.draw(count, delay, samples_per_s=self._rate), -1)
        return rows, delays, labelled & (inline.random(count) < plan.inline_share)

    def _sample(self, number: int, row: int, label_after: int, *, inside: bool) -> NewRecord:
        dataset, schema = self._plan.dataset, self._schema
        x, y = self._drifts.show(number, dataset.x[row], int(dataset.y[row]))
        if inside:
            self.inline += 1
        elif label_after >= 0:
            if len(self._waiting) >= self._plan.max_pending:
                raise ConfigError(
                    f"label delay: more than {self._plan.max_pending} labels would wait; use a shorter delay"
                )
            heapq.heappush(self._waiting, (number + label_after, number, y))
        return self._codec.encode_sample(
            f"{self._prefix}{number}",
            x.reshape(schema.shape).astype(schema.dtype, copy=False),
            payload=self._plan.payload,
            label=y if inside else None,
            true_label=y,
            timestamp_ms=self._timestamp_ms(number),
        )

    def _label(self, now: int) -> NewRecord:
        """The label that is due first, with the timestamp of the sample before it."""
        _, number, y = heapq.heappop(self._waiting)
        timestamp_ms = self._timestamp_ms(now)
        return self._codec.encode_label(f"{self._prefix}{number}", y, source="simulate", timestamp_ms=timestamp_ms)

    def _timestamp_ms(self, number: int) -> int | None:
        """Samples are spaced by the rate; without a rate, a millisecond apart."""
        if self._plan.start_time_ms is None:
            return None
        return self._plan.start_time_ms + int(number * 1000 / (self._rate or 1000))


def simulate(
    log: Log,
    plan: StreamPlan,
    *,
    topics: Topics,
    rate: float | None = None,
    stop: Callable[[], bool] = lambda: False,
    progress: Callable[[int, int], None] | None = None,
    batch: int = 200,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Counts:
    """Append the records of a plan to a log in batches, samples before labels, until it ends or `stop()` is true.

    Args:
        log: target.
        plan: what to stream.
        topics: names of the topics.
        rate: samples per second; None: no limit.
        stop: checked before each batch and while waiting.
        progress: called after each batch with the samples and labels appended so far.
        batch: most records per append.
        clock: monotonic seconds.
        sleep: waits for seconds.

    Raises:
        ConfigError: the rate is out of bounds, or a delay in time has no rate.
        LogError: the log refused a batch or was unavailable; earlier batches are in the log.
    """
    if batch < 1:
        raise ConfigError(f"batch: wanted at least 1 record, got {batch}")
    stream = Stream(plan, rate=rate)
    events = iter(stream)
    pace = None if rate is None else _Pace(rate, clock, sleep, stop)
    if rate is not None:
        batch = max(1, min(batch, int(rate / APPENDS_PER_S)))
    samples = labels = 0
    while not stop() and (pace is None or pace.wait_for(samples)):
        taken = list(itertools.islice(events, batch))
        if not taken:
            break
        new_samples = [record for kind, record in taken if kind == "sample"]
        new_labels = [record for kind, record in taken if kind == "label"]
        if new_samples:
            log.append(topics.samples, new_samples)
        if new_labels:
            log.append(topics.labels, new_labels)
        samples, labels = samples + len(new_samples), labels + len(new_labels)
        if progress is not None:
            progress(samples, labels)
    return Counts(samples, labels, stream.pending, stream.inline)


class _Pace:
    """Limits a count to a rate."""

    def __init__(
        self, rate: float, clock: Callable[[], float], sleep: Callable[[float], None], stop: Callable[[], bool]
    ) -> None:
        self._rate, self._clock, self._sleep, self._stop = rate, clock, sleep, stop
        self._started_at_s = clock()

    def wait_for(self, count: int) -> bool:
        """Wait until number `count` is due; False if stopped first."""
        while True:
            early_s = self._started_at_s + count / self._rate - self._clock()
            if early_s <= 0:
                self._started_at_s += max(0.0, -early_s - MAX_BEHIND_S)
                return True
            if self._stop():
                return False
            self._sleep(min(early_s, MAX_SLEEP_S))
