"""Form micro-batches out of what has been read: by time across partitions, closed by count or by age (D7).

Records of several partitions are merged by the time at which the log took them, the older head first; within a
partition offsets keep their order. So a learner that catches up after an hour still sees a label after the samples that
came before it, and a score of yesterday's prediction is not spoilt by today's label. A partition that is behind and has
nothing ready is waited for, up to a bound.

Under overload a batch may be closed wider, and `thin` says which of its samples are learned: a function of the batch
and the settings alone, so a replay of the same cut learns the same.

Pure state machine: the caller passes the time in. Given the same log, read from its beginning with nobody writing, it
cuts the same batches every time; where the clock or arrival order decided, the journal remembers (D4).
"""

from __future__ import annotations

import heapq
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
    """The records of one step: what came from each partition, and where each partition goes on."""

    items: dict[TopicPartition, list[Item]]
    next_offsets: Offsets
    sample_topic: str

    def in_order(self) -> list[Item]:
        """All records in the one order that depends on nothing but which records they are.

        By time, the samples topic first among equals (a label of the same millisecond finds its sample), then by
        partition; a partition's own order is never broken.
        """
        heap = [
            (items[0].timestamp_s, partition.topic != self.sample_topic, partition, 0)
            for partition, items in self.items.items()
        ]
        heapq.heapify(heap)
        ordered: list[Item] = []
        while heap:
            _, rank, partition, n = heap[0]
            items = self.items[partition]
            ordered.append(items[n])
            if n + 1 < len(items):
                heapq.heapreplace(heap, (items[n + 1].timestamp_s, rank, partition, n + 1))
            else:
                heapq.heappop(heap)
        return ordered


def thin(samples: Sequence[Sample], most: int) -> tuple[list[Sample], list[Sample]]:
    """Part samples into those that are learned and those that are passed by, each in the order given.

    Learned are all with a label inside, and others at even distances until there are `most`.
    """
    plain = [n for n, sample in enumerate(samples) if sample.label is None]
    room = min(len(plain), max(0, most - (len(samples) - len(plain))))
    chosen = {plain[(2 * k + 1) * len(plain) // (2 * room)] for k in range(room)}
    passed = set(plain) - chosen
    learned = [sample for n, sample in enumerate(samples) if n not in passed]
    return learned, [samples[n] for n in sorted(passed)]


class MicroBatcher:
    """Holds the micro-batch that is being filled: at most `fresh` samples and `max_labels` other records.

    Under overload it holds `wide` samples, of which at most `fresh` have a label inside.
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
        self.sample_topic = sample_topic
        assert wide is None or wide >= fresh, (wide, fresh)
        self._fresh, self._wide, self._max_labels = fresh, wide or fresh, max_labels
        self._max_age_s, self._merge_wait_s = max_age_s, merge_wait_s
        self._next_offsets = dict(next_offsets)
        self._blocked_since_s: float | None = None
        self._opened_at_s: float | None = None
        self._items: dict[TopicPartition, list[Item]] = {}
        self._samples = self._labelled = self._others = 0

    @property
    def next_offsets(self) -> Offsets:
        """Where each partition goes on after the last batch that was closed."""
        return dict(self._next_offsets)

    @property
    def opened_at_s(self) -> float | None:
        """When the first record of the open batch was taken; None while it is empty."""
        return self._opened_at_s

    def fill(
        self, queues: Queues, behind: Callable[[TopicPartition], bool], now_s: float, *, overloaded: bool = False
    ) -> Draft | None:
        """Take records off the queues; the batch once it is closed, else None: call again when there are more.

        `behind(partition)` says that the log holds more of it than was read so far. `overloaded` closes it wide.
        """
        most = self._wide if overloaded else self._fresh
        # Asked before the queues are looked at: what is not behind has all its records in its queue by now.
        lagging = {tp for tp in queues if behind(tp)}
        heap = [(queue[0].timestamp_s, tp.topic != self.sample_topic, tp) for tp, queue in queues.items() if queue]
        heapq.heapify(heap)
        blocked = any(not queues[tp] for tp in lagging)
        if not blocked:
            self._blocked_since_s = None  # here, since a batch that closes by count never comes to the end
        while heap and not (blocked and self._must_wait(now_s)):
            _, rank, partition = heap[0]
            queue = queues[partition]
            self._take(partition, queue.popleft(), now_s)
            if self._samples >= most or self._labelled >= self._fresh or self._others >= self._max_labels:
                return self._close()
            if queue:
                heapq.heapreplace(heap, (queue[0].timestamp_s, rank, partition))
            else:
                heapq.heappop(heap)
                blocked = blocked or partition in lagging
        if self._opened_at_s is not None and now_s - self._opened_at_s >= self._max_age_s:
            return self._close()
        return None

    def close_now(self) -> Draft:
        """The batch that is open, as it is, empty perhaps: for the end of a log, or for labels while nothing comes."""
        return self._close()

    def nothing(self) -> Draft:
        """A batch of no records, for one more step on what is known; what is open stays open."""
        return Draft({}, dict(self._next_offsets), self.sample_topic)

    def take_exactly(self, queues: Queues, next_offsets: Offsets) -> Draft | None:
        """Take what a journaled step took; None while some of it has not been read yet.

        A batch that was open is never mixed with this: replay comes before anything else.

        Raises:
            OffsetOutOfRangeError: retention took some of it; what was taken so far stays in the open batch.
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
        return self._close() if complete else None

    def _reached(self, partition: TopicPartition) -> int:
        taken = self._items.get(partition)
        return taken[-1].position.offset + 1 if taken else self._next_offsets[partition]

    def _must_wait(self, now_s: float) -> bool:
        if self._blocked_since_s is None:
            self._blocked_since_s = now_s
        return now_s - self._blocked_since_s < self._merge_wait_s

    def _take(self, partition: TopicPartition, item: Item, now_s: float) -> None:
        if self._opened_at_s is None:
            self._opened_at_s = now_s
        self._items.setdefault(partition, []).append(item)
        if isinstance(item, Sample):
            self._samples += 1
            self._labelled += item.label is not None
        else:
            self._others += 1

    def _close(self) -> Draft:
        for partition in self._items:
            self._next_offsets[partition] = self._reached(partition)
        draft = Draft(self._items, dict(self._next_offsets), self.sample_topic)
        self._items, self._opened_at_s = {}, None
        self._samples = self._labelled = self._others = 0
        return draft
