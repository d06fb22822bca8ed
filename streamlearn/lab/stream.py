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
from typing import Literal, NamedTuple, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from streamlearn.errors import ConfigError
from streamlearn.lab.datasets import Dataset
from streamlearn.lab.delays import Delay, parse_delay
from streamlearn.lab.drift import Drift, Drifts
from streamlearn.lab.records import Records
from streamlearn.log.base import Log
from streamlearn.log.codec import Codec
from streamlearn.records import UNLABELLED, NewRecord, Schema

Order: TypeAlias = Literal["shuffle", "file", "class-sorted"]
Event: TypeAlias = tuple[Literal["sample", "label"], NewRecord]

MAX_RATE = 1e7
MAX_PENDING = 5_000_000
"""Most labels that wait until they are due."""
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
    """Passes over the data set."""
    label_share: float = 1.0
    """Share of labelled samples."""
    delay: Delay = field(default_factory=lambda: parse_delay("0"))
    """From a sample to its label."""
    drifts: tuple[Drift, ...] = ()
    id_prefix: str | None = None
    """Prefix of the ids, before the sample number; default: the name of the data set and a dash."""
    seed: int = 0
    drop_pending: bool = False
    """At the end of the stream, drop labels that are not due, instead of sending them at once."""
    start_time_ms: int | None = None
    """Timestamp of the first sample; None: the log sets the timestamps."""
    send_records: bool = False
    """Send the user's records as they are, if the data set has them, and not its rows."""

    def __post_init__(self) -> None:
        if self.order not in get_args(Order):
            raise ConfigError(f"order: wanted {', '.join(get_args(Order))}, got {self.order!r:.80}")
        if not 0.0 <= self.label_share <= 1.0:
            raise ConfigError(f"label_share: wanted a share from 0 to 1, got {self.label_share!r:.80}")
        for name, low in (("passes", 1), ("seed", 0), ("start_time_ms", 0)):
            value = getattr(self, name)
            if value is not None and value < low:
                raise ConfigError(f"{name}: wanted at least {low}, got {value!r:.80}")
        if self.schema is not None:
            self.dataset.check_fits(self.schema)
        Drifts(self.dataset, self.drifts, seed=self.seed)  # checks that they fit
        repeats = self.passes > 1 or any(drift.kind == "prior" for drift in self.drifts)
        if repeats and self.records is not None and self.records.with_ids:
            raise ConfigError(
                f"{self.dataset.name}: its records have ids, and a learner learns each id once: wanted one pass and no"
                " prior drift"
            )

    @property
    def records(self) -> Records | None:
        """The records to send; None if rows are sent."""
        return self.dataset.records if self.send_records else None


class Counts(NamedTuple):
    """Counts of a stream."""

    samples: int
    labels: int
    labels_pending: int
    """Labels of appended samples that were not due when the stream stopped, or were dropped at its end."""


class Stream:
    """The records of a plan, in order. Iterate once; `pending` counts the labels of yielded samples that are not due.

    `rate` (samples per second) determines the spacing of timestamps, and converts delays in time to samples.
    """

    def __init__(self, plan: StreamPlan, *, rate: float | None = None, max_pending: int = MAX_PENDING) -> None:
        if rate is not None and not 0.0 < rate <= MAX_RATE:
            raise ConfigError(f"rate: wanted more than 0 and at most {MAX_RATE:g} samples per second, got {rate!r:.80}")
        plan.delay.check_rate(rate)
        self._plan, self._max_pending = plan, max_pending
        self._rate = rate
        self._schema = plan.schema or plan.dataset.schema
        self._codec = Codec(self._schema)
        self._drifts = Drifts(plan.dataset, plan.drifts, seed=plan.seed)
        self._prefix = f"{plan.dataset.name}-" if plan.id_prefix is None else plan.id_prefix
        self._waiting: list[tuple[int, int, int, int]] = []
        """A heap of (number of the sample after which the label is due, number of its own sample, row, class)."""
        self._events = self._run()

    @property
    def pending(self) -> int:
        """Labels that are not due yet."""
        return len(self._waiting)

    def __iter__(self) -> Iterator[Event]:
        return self._events

    def _run(self) -> Iterator[Event]:
        number = 0
        for turn in range(self._plan.passes):
            rows, delays = self._draw(turn, first=number)
            for row, label_after in zip(rows.tolist(), delays.tolist(), strict=True):
                yield "sample", self._sample(number, row, label_after)
                while self._waiting and self._waiting[0][0] <= number:
                    yield "label", self._label(number)
                number += 1
        while self._waiting and not self._plan.drop_pending:
            yield "label", self._label(number - 1)

    def _draw(self, turn: int, *, first: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Draw one pass: row of each sample, delay of its label (-1: no label).

        Each kind of draw has its own generator, so that a change of one setting does not affect the other draws.
        """
        plan, count = self._plan, len(self._plan.dataset.y)
        order, share, delay = (np.random.default_rng((plan.seed, kind, turn)) for kind in (0, 1, 3))
        rows = np.arange(count)
        if plan.order == "shuffle":
            rows = order.permutation(count)
        elif plan.order == "class-sorted":
            rows = np.argsort(plan.dataset.y, kind="stable")
        rows = self._drifts.rows(rows, plan.dataset.y, first=first)
        labelled = share.random(count) < plan.label_share
        return rows, np.where(labelled, plan.delay.draw(count, delay, samples_per_s=self._rate), -1)

    def _sample(self, number: int, row: int, label_after: int) -> NewRecord:
        dataset, schema = self._plan.dataset, self._schema
        x, y = self._drifts.show(number, dataset.x[row], int(dataset.y[row]))
        if label_after >= 0 and y != UNLABELLED:
            if len(self._waiting) >= self._max_pending:
                raise ConfigError(f"label delay: more than {self._max_pending} labels would wait; use a shorter delay")
            heapq.heappush(self._waiting, (number + label_after, number, row, y))
        x = x.reshape(schema.shape).astype(schema.dtype, copy=False)
        true_label, timestamp_ms = None if y == UNLABELLED else y, self._timestamp_ms(number)
        name = f"{self._prefix}{number}"
        if (records := self._plan.records) is not None:
            return records.sample(row, name, x, true_label, timestamp_ms)
        return self._codec.encode_sample(name, x, true_label=true_label, timestamp_ms=timestamp_ms)

    def _label(self, now: int) -> NewRecord:
        """The label that is due first, with the timestamp of the sample before it."""
        _, number, row, y = heapq.heappop(self._waiting)
        timestamp_ms, name = self._timestamp_ms(now), f"{self._prefix}{number}"
        if (records := self._plan.records) is not None:
            return records.label(row, name, y, timestamp_ms)
        return self._codec.labels.encode(name, y, source="simulate", timestamp_ms=timestamp_ms)

    def _timestamp_ms(self, number: int) -> int | None:
        """Samples are spaced by the rate; without a rate, a millisecond apart."""
        if self._plan.start_time_ms is None:
            return None
        return self._plan.start_time_ms + int(number * 1000 / (self._rate or 1000))


def simulate(
    log: Log,
    plan: StreamPlan,
    *,
    samples_topic: str,
    labels_topic: str,
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
        samples_topic: of the config.
        labels_topic: of the config.
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
            log.append(samples_topic, new_samples)
        if new_labels:
            log.append(labels_topic, new_labels)
        samples, labels = samples + len(new_samples), labels + len(new_labels)
        if progress is not None:
            progress(samples, labels)
    return Counts(samples, labels, stream.pending)


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
