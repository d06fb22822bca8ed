"""Form micro-batches from records: merged by time across partitions, closed by count or by age (D7).

Records are merged by the log's timestamps, the older head first; within a partition, offsets keep their order. So a
learner that catches up still sees a label after earlier samples, and today's label cannot spoil yesterday's
predictions. A partition that is behind and has no record ready blocks the merge, up to a bound.

Under overload a batch may be closed wide, and `thin` picks the samples that are learned. It depends on the batch and
the settings alone, so a replay picks the same.

A pure state machine: the caller passes the time in. A log that is read from its start without concurrent writes gives
the same batches each time. Where the clock or the order of arrival decides, the journal records it (D4).
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from streamlearn.errors import OffsetOutOfRangeError
from streamlearn.records import Gap, Item, Offsets, Sample, TopicPartition

MAX_LABELS = 1024
"""Label records of one step."""
MERGE_WAIT_S = 1.0
"""How long the merge by time waits for a partition that is behind, before it goes on without it."""

Queues = Mapping[TopicPartition, deque[Item]]


@dataclass(frozen=True, slots=True)
class Draft:
    """The records of one step by partition, and the offsets after them."""

    items: dict[TopicPartition, list[Item]]
    next_offsets: Offsets
    sample_topic: str

    def in_order(self) -> list[Item]:
        """All records in an order that depends on nothing but the records.

        By time; on a tie samples first (a label of the same millisecond finds its sample), then by partition. The
        order within a partition is kept.
        """

        def rank(entry: tuple[TopicPartition, Item]) -> tuple[float, bool, TopicPartition]:
            return _rank(*entry, self.sample_topic)

        queues = (zip(itertools.repeat(partition), items) for partition, items in self.items.items())
        return [item for _, item in heapq.merge(*queues, key=rank)]


def _rank(partition: TopicPartition, item: Item, sample_topic: str) -> tuple[float, bool, TopicPartition]:
    return item.timestamp_s, partition.topic != sample_topic, partition


def thin(samples: Sequence[Sample], most: int) -> tuple[list[Sample], list[Sample]]:
    """Split samples into those to learn and those to skip, each in the given order.

    All with a label inside are learned, and others at even distances until there are `most`.
    """
    plain = [n for n, sample in enumerate(samples) if sample.label is None]
    room = min(len(plain), max(0, most - (len(samples) - len(plain))))
    chosen = {plain[(2 * k + 1) * len(plain) // (2 * room)] for k in range(room)}
    skipped = set(plain) - chosen
    learned = [sample for n, sample in enumerate(samples) if n not in skipped]
    return learned, [samples[n] for n in sorted(skipped)]


class MicroBatcher:
    """Holds the open micro-batch: at most `fresh` samples and `max_labels` other records.

    Under overload at most `wide` samples, of which at most `fresh` have a label inside.
    """

    def __init__(
        self,
        next_offsets: Offsets,
        *,
        sample_topic: str,
        fresh: int,
        wide: int | None = None,
        max_labels: int = MAX_LABELS,
        max_age_s: float,
        merge_wait_s: float = MERGE_WAIT_S,
    ) -> None:
        assert fresh > 0, fresh
        assert max_labels > 0, max_labels
        assert wide is None or wide >= fresh, (wide, fresh)
        self.sample_topic = sample_topic
        self._fresh, self._wide, self._max_labels = fresh, wide or fresh, max_labels
        self._max_age_s, self._merge_wait_s = max_age_s, merge_wait_s
        self._next_offsets = dict(next_offsets)
        self._blocked_since_s: float | None = None
        self.opened_at_s: float | None = None
        """When the first record of the open batch was taken; None while it is empty."""
        self._items: dict[TopicPartition, list[Item]] = {}
        self._samples = self._labelled = self._others = 0

    @property
    def next_offsets(self) -> Offsets:
        """Offsets after the last closed batch."""
        return dict(self._next_offsets)

    def fill(
        self, queues: Queues, behind: Callable[[TopicPartition], bool], now_s: float, *, overloaded: bool = False
    ) -> Draft | None:
        """Take records off the queues. The batch once it is closed, else None: call again when there are more.

        `behind(partition)`: the log holds more of it than was read so far. `overloaded`: close the batch wide.
        """
        most = self._wide if overloaded else self._fresh
        # `behind` is asked before the queues are read: then the queue of a partition that is not behind is complete.
        waited_for = {partition for partition in queues if behind(partition)}
        heads = [_rank(partition, queue[0], self.sample_topic) for partition, queue in queues.items() if queue]
        heapq.heapify(heads)
        blocked = any(not queues[partition] for partition in waited_for)
        if not blocked:
            self._blocked_since_s = None  # here, since a batch that closes by count leaves the loop early
        while heads and not (blocked and self._must_wait(now_s)):
            partition = heads[0][-1]
            queue = queues[partition]
            self._take(partition, queue.popleft(), now_s)
            if queue:
                heapq.heapreplace(heads, _rank(partition, queue[0], self.sample_topic))
            else:
                heapq.heappop(heads)
                blocked = blocked or partition in waited_for
            if self._samples >= most or self._labelled >= self._fresh or self._others >= self._max_labels:
                return self.close()
        too_old = self.opened_at_s is not None and now_s - self.opened_at_s >= self._max_age_s
        return self.close() if too_old else None

    def close(self) -> Draft:
        """Close the open batch, even an empty one: at the end of a log, or for labels while no sample comes."""
        for partition in self._items:
            self._next_offsets[partition] = self._reached(partition)
        draft = Draft(self._items, dict(self._next_offsets), self.sample_topic)
        self._items, self.opened_at_s = {}, None
        self._samples = self._labelled = self._others = 0
        return draft

    def nothing(self) -> Draft:
        """A batch without records, for a further step on known rows. The open batch stays open."""
        return Draft({}, dict(self._next_offsets), self.sample_topic)

    def take_exactly(self, queues: Queues, next_offsets: Offsets) -> Draft | None:
        """Take the records of a journaled step; None while some of them have not been read yet.

        Replay comes before anything else, so no other batch is open.

        Raises:
            OffsetOutOfRangeError: some were trimmed from the log. Those taken so far stay in the open batch.
        """
        complete = True
        for partition, end in next_offsets.items():
            queue = queues[partition]
            while self._reached(partition) < end and queue:
                if isinstance(queue[0], Gap):
                    msg = f"{partition.topic}[{partition.partition}]: records of a journaled step were trimmed"
                    raise OffsetOutOfRangeError(msg)
                self._take(partition, queue.popleft(), 0.0)
            complete = complete and self._reached(partition) >= end
        return self.close() if complete else None

    def _reached(self, partition: TopicPartition) -> int:
        taken = self._items.get(partition)
        return taken[-1].position.offset + 1 if taken else self._next_offsets[partition]

    def _must_wait(self, now_s: float) -> bool:
        if self._blocked_since_s is None:
            self._blocked_since_s = now_s
        return now_s - self._blocked_since_s < self._merge_wait_s

    def _take(self, partition: TopicPartition, item: Item, now_s: float) -> None:
        if self.opened_at_s is None:
            self.opened_at_s = now_s
        self._items.setdefault(partition, []).append(item)
        if isinstance(item, Sample):
            self._samples += 1
            self._labelled += item.label is not None
        else:
            self._others += 1
