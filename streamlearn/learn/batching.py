"""Form micro-batches from records: merged by time across partitions, closed by count or by age (D7).

Records are merged by the log's timestamps, the older head first; within a partition, offsets keep their order. So a
learner that catches up still sees a label after earlier samples, and today's label cannot spoil yesterday's
predictions. A partition that is behind and has no record ready blocks the merge, up to a bound.

Published answers travel with the batch that is open. They open and close none, so a scorer changes no step. An answer
whose sample is in the log stays in its queue until the sample is taken.

Far behind, the caller lets batches grow, so that throughput grows with the backlog. Under overload a batch may be
closed wide, and `thin` picks the samples that are learned. It depends on the batch and the settings alone, so a replay
picks the same.

A pure state machine: the caller passes the time in. A log that is read from its start without concurrent writes gives
the same batches each time. Where the clock or the order of arrival decides, the journal records it (D4).
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from streamlearn.errors import OffsetOutOfRangeError
from streamlearn.records import Gap, Item, Offsets, PublishedAnswer, Sample, TopicPartition

MAX_LABELS = 1024
"""Label records of one step."""
MERGE_WAIT_S = 1.0
"""How long the merge by time waits for a partition that is behind, before it goes on without it."""

Queues = Mapping[TopicPartition, deque[Item]]


@dataclass(frozen=True, slots=True)
class Draft:
    """The records of one step by partition, and the offsets after them."""

    items: dict[TopicPartition, list[Item]]
    """Of the topics of samples and labels."""
    next_offsets: Offsets
    sample_topics: Collection[str]
    predictions: Sequence[Item] = ()
    """Of the predictions topic; those of one partition are in order."""

    def in_order(self) -> list[Item]:
        """All records of samples and labels in an order that depends on nothing but the records.

        By time; on a tie samples first (a label of the same millisecond finds its sample), then by partition. The
        order within a partition is kept.
        """

        def rank(entry: tuple[TopicPartition, Item]) -> tuple[float, bool, TopicPartition]:
            return _rank(*entry, self.sample_topics)

        queues = (zip(itertools.repeat(partition), items) for partition, items in self.items.items())
        return [item for _, item in heapq.merge(*queues, key=rank)]


def _rank(partition: TopicPartition, item: Item, sample_topics: Collection[str]) -> tuple[float, bool, TopicPartition]:
    return item.timestamp_s, partition.topic not in sample_topics, partition


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
    """Holds the open micro-batch: at most `fresh` samples or as many as `fill` names, and `max_labels` other records.

    In addition, at most `wide` + `max_labels` records of the predictions topic. `wide`: the most samples of any batch.
    """

    def __init__(
        self,
        next_offsets: Offsets,
        *,
        sample_topics: Collection[str],
        predictions_topic: str | None = None,
        fresh: int,
        wide: int | None = None,
        max_labels: int = MAX_LABELS,
        max_age_s: float,
        merge_wait_s: float = MERGE_WAIT_S,
    ) -> None:
        assert fresh > 0, fresh
        assert max_labels > 0, max_labels
        assert wide is None or wide >= fresh, (wide, fresh)
        self.sample_topics, self.predictions_topic = sample_topics, predictions_topic
        self._fresh, self.wide, self._max_labels = fresh, wide or fresh, max_labels
        self._max_age_s, self._merge_wait_s = max_age_s, merge_wait_s
        self._next_offsets = dict(next_offsets)
        self._blocked_since_s: float | None = None
        self.opened_at_s: float | None = None
        """When the first record of the open batch was taken; None while it is empty."""
        self._items: dict[TopicPartition, list[Item]] = {}
        self._samples = self._labelled = self._others = self._predictions = 0

    @property
    def next_offsets(self) -> Offsets:
        """Offsets after the last closed batch."""
        return dict(self._next_offsets)

    @property
    def takes_predictions(self) -> bool:
        """Whether the open batch has room for records of the predictions topic."""
        return self._predictions < self.wide + self._max_labels

    def fill(
        self,
        queues: Queues,
        behind: Callable[[TopicPartition], bool],
        now_s: float,
        *,
        most: int | None = None,
        most_labelled: int | None = None,
    ) -> Draft | None:
        """Take records off the queues. The batch once it is closed, else None: call again when there are more.

        `behind(partition)`: the log holds more of it than was read so far. `most`: samples in place of `fresh`, of
        which `most_labelled` may have a label inside.
        """
        most = most or self._fresh
        most_labelled = most_labelled or most
        # `behind` is asked before the queues are read: then the queue of a partition that is not behind is complete.
        waited_for = {partition for partition in queues if behind(partition)}
        aside: list[tuple[float, bool, TopicPartition]] = []
        heads = [_rank(partition, queue[0], self.sample_topics) for partition, queue in queues.items() if queue]
        heapq.heapify(heads)
        blocked = any(not queues[partition] for partition in waited_for)
        if not blocked:
            self._blocked_since_s = None  # here, since a batch that closes by count leaves the loop early
        while heads and not (blocked and self._must_wait(now_s)):
            partition = heads[0][-1]
            queue = queues[partition]
            if partition.topic == self.predictions_topic and self._is_early(queue[0], queues, waited_for):
                aside.append(heapq.heappop(heads))
                continue
            self._take(partition, queue.popleft(), now_s)
            if queue:
                heapq.heapreplace(heads, _rank(partition, queue[0], self.sample_topics))
            else:
                heapq.heappop(heads)
                blocked = blocked or partition in waited_for
            while aside:
                heapq.heappush(heads, aside.pop())
            if self._samples >= most or self._labelled >= most_labelled or self._others >= self._max_labels:
                return self.close()
        too_old = self.opened_at_s is not None and now_s - self.opened_at_s >= self._max_age_s
        return self.close() if too_old else None

    def close(self) -> Draft:
        """Close the open batch, even an empty one: at the end of a log, or for labels while no sample comes."""
        for partition in self._items:
            self._next_offsets[partition] = self._reached(partition)
        of_predictions = sorted(partition for partition in self._items if partition.topic == self.predictions_topic)
        predictions = [item for partition in of_predictions for item in self._items.pop(partition)]
        draft = Draft(self._items, dict(self._next_offsets), self.sample_topics, predictions)
        self._items, self.opened_at_s = {}, None
        self._samples = self._labelled = self._others = self._predictions = 0
        return draft

    def nothing(self) -> Draft:
        """A batch without records, for a further step on known rows. The open batch stays open."""
        return Draft({}, dict(self._next_offsets), self.sample_topics)

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
                if isinstance(queue[0], Gap) and partition.topic != self.predictions_topic:
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

    def _is_early(self, item: Item, queues: Queues, waited_for: Collection[TopicPartition]) -> bool:
        """Whether a record of the predictions topic must wait: for room, or for its sample, which is in the log."""
        if not self.takes_predictions:
            return True
        if not isinstance(item, PublishedAnswer):
            return False
        of_sample = item.sample.topic_partition
        is_in_log = of_sample in queues and (bool(queues[of_sample]) or of_sample in waited_for)
        return is_in_log and self._reached(of_sample) <= item.sample.offset

    def _take(self, partition: TopicPartition, item: Item, now_s: float) -> None:
        self._items.setdefault(partition, []).append(item)
        if partition.topic == self.predictions_topic:
            self._predictions += 1
            return
        if self.opened_at_s is None:
            self.opened_at_s = now_s
        if isinstance(item, Sample):
            self._samples += 1
            self._labelled += item.label is not None
        else:
            self._others += 1
