"""Micro-batches: merged by time, closed by count or by age, and repeated exactly in a replay."""

from __future__ import annotations

from collections import deque

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from streamlearn.learn.batching import Draft, MicroBatcher, thin
from streamlearn.records import Gap, Item, Label, Position, Prediction, PublishedAnswer, Sample, Skipped, TopicPartition

S0, S1, L0 = TopicPartition("samples", 0), TopicPartition("samples", 1), TopicPartition("labels", 0)
P0 = TopicPartition("predictions", 0)
X = np.zeros(1, np.float32)


def sample(tp: TopicPartition, offset: int, time_s: float) -> Sample:
    return Sample(Position(*tp, offset), time_s, f"{tp.partition}-{offset}", X)


def label(offset: int, time_s: float, sample_id: str = "x") -> Label:
    return Label(Position(*L0, offset), time_s, sample_id, 0)


def answer(offset: int, time_s: float, to: int) -> PublishedAnswer:
    """To the sample at this offset of S0."""
    prediction = Prediction(0, np.ones(1, np.float32), 1)
    return PublishedAnswer(Position(*P0, offset), time_s, f"0-{to}", Position(*S0, to), prediction)


def batcher(*partitions: TopicPartition, **settings: float) -> MicroBatcher:
    chosen = {"fresh": 3, "max_labels": 4, "max_age_s": 10.0, "merge_wait_s": 1.0} | settings
    topics = {"sample_topics": ("samples",), "predictions_topic": "predictions"}
    return MicroBatcher(dict.fromkeys(partitions, 0), **topics, **chosen)  # type: ignore[arg-type]


def none_behind(_: TopicPartition) -> bool:
    return False


def where(draft: Draft | None) -> list[str]:
    assert draft is not None
    return [str(item.position) for item in draft.in_order()]


class TestCount:
    def test_a_batch_closes_with_its_last_sample(self) -> None:
        """Three fresh samples are a batch; the fourth waits for the next."""
        queues: dict[TopicPartition, deque[Item]] = {S0: deque(sample(S0, n, float(n)) for n in range(4))}

        draft = batcher(S0).fill(queues, none_behind, 0.0)

        assert where(draft) == ["samples[0]@0", "samples[0]@1", "samples[0]@2"]
        assert draft is not None
        assert draft.next_offsets == {S0: 3}
        assert len(queues[S0]) == 1

    def test_labels_alone_close_a_batch_at_their_own_bound(self) -> None:
        """Without samples, `max_labels` labels are enough."""
        queues: dict[TopicPartition, deque[Item]] = {S0: deque(), L0: deque(label(n, 1.0) for n in range(9))}

        draft = batcher(S0, L0).fill(queues, none_behind, 0.0)

        assert draft is not None
        assert draft.next_offsets == {S0: 0, L0: 4}


class TestPublishedAnswers:
    """They travel with the open batch, and change nothing else of it."""

    def test_are_apart_from_the_other_records(self) -> None:
        """In the offsets, not in the order of samples and labels."""
        queues: dict[TopicPartition, deque[Item]] = {
            S0: deque(sample(S0, n, float(n)) for n in range(3)),
            P0: deque([answer(0, 0.5, 0), Skipped(Position(*P0, 1), 0.6), answer(2, 2.5, 2)]),
        }

        draft = batcher(S0, P0).fill(queues, none_behind, 0.0)

        assert draft is not None
        assert where(draft) == ["samples[0]@0", "samples[0]@1", "samples[0]@2"]
        assert [item.position.offset for item in draft.predictions] == [0, 1]
        assert draft.next_offsets == {S0: 3, P0: 2}
        assert [item.position.offset for item in queues[P0]] == [2], "it was written after the last sample"

    def test_alone_open_and_close_no_batch(self) -> None:
        """However many and however old; beyond a bound they stay in their queue."""
        queues: dict[TopicPartition, deque[Item]] = {S0: deque(), P0: deque(answer(n, 1.0, n) for n in range(50))}
        fills = batcher(S0, P0, wide=3)

        assert fills.fill(queues, none_behind, 0.0) is None
        assert fills.fill(queues, none_behind, 1e6) is None
        assert (fills.opened_at_s, fills.takes_predictions) == (None, False)
        assert len(queues[P0]) == 50 - (3 + 4)
        queues[S0].extend(sample(S0, n, 9.0) for n in range(3))
        draft = fills.fill(queues, none_behind, 0.0)

        assert draft is not None
        assert draft.next_offsets == {S0: 3, P0: 7}
        assert fills.fill(queues, none_behind, 0.0) is None
        assert len(queues[P0]) == 50 - 14

    def test_wait_in_their_queue_for_a_sample_that_is_in_the_log(self) -> None:
        """Where the sample's clock is ahead, and where it has not been read yet; the samples wait for nothing."""
        queues: dict[TopicPartition, deque[Item]] = {
            S0: deque([sample(S0, 0, 9.0), sample(S0, 1, 1.0)]),
            P0: deque([answer(0, 1.1, 1), answer(1, 1.2, 2)]),
        }
        fills = batcher(S0, P0, merge_wait_s=0.0)

        assert fills.fill(queues, lambda tp: tp == S0, 0.0) is None

        assert (len(queues[S0]), [item.position.offset for item in queues[P0]]) == (0, [1])
        queues[S0].append(sample(S0, 2, 3.0))
        draft = fills.fill(queues, none_behind, 0.0)
        assert fills.fill(queues, none_behind, 0.0) is None
        assert draft is not None
        assert draft.next_offsets == {S0: 3, P0: 1}
        assert fills.close().next_offsets == {S0: 3, P0: 2}

    def test_to_a_sample_that_is_not_in_the_log_do_not_wait(self) -> None:
        """Else none behind it would be read."""
        queues: dict[TopicPartition, deque[Item]] = {S0: deque(), P0: deque([answer(0, 1.0, 1_000), answer(1, 1.0, 0)])}
        fills = batcher(S0, P0)

        fills.fill(queues, none_behind, 0.0)

        assert not queues[P0]

    def test_are_repeated_exactly(self) -> None:
        """Those that retention removed since are skipped."""
        queues: dict[TopicPartition, deque[Item]] = {
            S0: deque(sample(S0, n, float(n)) for n in range(3)),
            P0: deque([Gap(Position(*P0, 1), missing=2), answer(2, 2.5, 2), answer(3, 2.6, 0)]),
        }
        fills = batcher(S0, P0)

        first = fills.take_exactly(queues, {S0: 1, P0: 1})
        second = fills.take_exactly(queues, {S0: 3, P0: 3})

        assert first is not None
        assert first.predictions == [Gap(Position(*P0, 1), missing=2)]
        assert second is not None
        assert [item.position.offset for item in second.predictions] == [2]
        assert second.next_offsets == {S0: 3, P0: 3}


class TestAge:
    def test_counts_from_the_first_record_held(self) -> None:
        """Later records do not restart the clock of the open batch."""
        queues: dict[TopicPartition, deque[Item]] = {S0: deque([sample(S0, 0, 0.0)])}
        fills = batcher(S0, max_age_s=2.0)

        assert fills.fill(queues, none_behind, 100.0) is None
        queues[S0].append(sample(S0, 1, 1.5))
        assert fills.fill(queues, none_behind, 101.5) is None
        draft = fills.fill(queues, none_behind, 102.0)

        assert where(draft) == ["samples[0]@0", "samples[0]@1"]

    def test_an_empty_batch_never_closes(self) -> None:
        """However old it is."""
        fills = batcher(S0, max_age_s=2.0)

        assert fills.fill({S0: deque()}, none_behind, 0.0) is None
        assert fills.fill({S0: deque()}, none_behind, 1e6) is None

    def test_starts_with_each_batch(self) -> None:
        """The age of a closed batch is not inherited by the next."""
        queues: dict[TopicPartition, deque[Item]] = {S0: deque([sample(S0, 0, 0.0)])}
        fills = batcher(S0, max_age_s=2.0)
        fills.fill(queues, none_behind, 0.0)
        assert fills.fill(queues, none_behind, 2.0) is not None

        queues[S0].append(sample(S0, 1, 3.0))

        assert fills.fill(queues, none_behind, 3.0) is None


class TestMerge:
    def test_takes_the_older_record_first(self) -> None:
        """Partitions are merged by the log's timestamps."""
        queues: dict[TopicPartition, deque[Item]] = {
            S0: deque([sample(S0, 0, 2.0), sample(S0, 1, 5.0)]),
            S1: deque([sample(S1, 0, 1.0), sample(S1, 1, 3.0)]),
        }

        draft = batcher(S0, S1).fill(queues, none_behind, 0.0)

        assert where(draft) == ["samples[1]@0", "samples[0]@0", "samples[1]@1"]

    def test_a_label_of_the_same_moment_finds_its_sample(self) -> None:
        """With equal timestamps the sample comes first."""
        queues: dict[TopicPartition, deque[Item]] = {L0: deque([label(0, 7.0)]), S0: deque([sample(S0, 0, 7.0)])}

        draft = batcher(L0, S0, fresh=9, max_age_s=0.0).fill(queues, none_behind, 0.0)

        assert where(draft) == ["samples[0]@0", "labels[0]@0"]

    def test_waits_for_a_partition_that_is_behind(self) -> None:
        """Its queue is empty although the log has more records, and those may be older."""
        queues: dict[TopicPartition, deque[Item]] = {S0: deque(), S1: deque(sample(S1, n, 9.0) for n in range(5))}
        fills = batcher(S0, S1)

        assert fills.fill(queues, lambda tp: tp == S0, 0.0) is None
        assert len(queues[S1]) == 5
        queues[S0].extend([sample(S0, 0, 1.0), sample(S0, 1, 2.0), sample(S0, 2, 3.0)])
        draft = fills.fill(queues, none_behind, 0.1)

        assert where(draft) == ["samples[0]@0", "samples[0]@1", "samples[0]@2"]

    def test_stops_waiting_after_a_bound(self) -> None:
        """A silent partition blocks the others for `merge_wait_s` at most."""
        queues: dict[TopicPartition, deque[Item]] = {S0: deque(), S1: deque(sample(S1, n, 9.0) for n in range(5))}
        fills = batcher(S0, S1, merge_wait_s=1.0)
        fills.fill(queues, lambda tp: tp == S0, 0.0)

        draft = fills.fill(queues, lambda tp: tp == S0, 1.0)

        assert where(draft) == ["samples[1]@0", "samples[1]@1", "samples[1]@2"]

    def test_waits_once_for_a_partition_that_stays_silent(self) -> None:
        """It does not block every batch, until it has records again."""
        queues: dict[TopicPartition, deque[Item]] = {S0: deque(), S1: deque(sample(S1, n, 9.0) for n in range(9))}
        fills = batcher(S0, S1, merge_wait_s=1.0)
        fills.fill(queues, lambda tp: tp == S0, 0.0)

        drafts = [fills.fill(queues, lambda tp: tp == S0, 1.0) for _ in range(3)]

        assert [where(draft)[0] for draft in drafts] == ["samples[1]@0", "samples[1]@3", "samples[1]@6"]

    def test_waits_again_after_batches_that_closed_by_count(self) -> None:
        """A learner that catches up closes each batch by count; the next wait is a new one."""
        queues: dict[TopicPartition, deque[Item]] = {S0: deque(), S1: deque([sample(S1, 0, 5.0)])}
        fills = batcher(S0, S1, merge_wait_s=1.0)
        assert fills.fill(queues, lambda tp: tp == S0, 0.0) is None
        queues[S0].extend(sample(S0, n, float(n) / 10) for n in range(3))
        assert where(fills.fill(queues, lambda tp: tp == S0, 0.5)) == [f"samples[0]@{n}" for n in range(3)]

        assert fills.fill(queues, lambda tp: tp == S0, 2.0) is None
        assert fills.opened_at_s is None, "taken without waiting"
        assert len(queues[S1]) == 1

    def test_a_clock_that_jumps_back_keeps_offsets_in_order(self) -> None:
        """Timestamps order partitions, never the records of one partition."""
        queues: dict[TopicPartition, deque[Item]] = {S0: deque(sample(S0, n, t) for n, t in enumerate((9.0, 1.0, 5.0)))}

        draft = batcher(S0).fill(queues, none_behind, 0.0)

        assert where(draft) == ["samples[0]@0", "samples[0]@1", "samples[0]@2"]


class TestReplay:
    @given(
        times=st.lists(st.integers(0, 5), min_size=1, max_size=40),
        which=st.randoms(use_true_random=False),
        fresh=st.integers(1, 6),
    )
    def test_offsets_alone_repeat_the_same_batches_in_the_same_order(
        self, times: list[int], which: object, fresh: int
    ) -> None:
        """`take_exactly` of the journaled offsets forms the batches that clock and arrival had formed."""
        rng = which
        items: dict[TopicPartition, list[Item]] = {S0: [], S1: [], L0: []}
        for time_s in times:
            tp = rng.choice([S0, S1, L0])  # type: ignore[attr-defined]
            n = len(items[tp])
            items[tp].append(label(n, float(time_s)) if tp == L0 else sample(tp, n, float(time_s)))
        live_queues: dict[TopicPartition, deque[Item]] = {tp: deque() for tp in items}
        unread = {tp: deque(held) for tp, held in items.items()}
        fills = batcher(*items, fresh=fresh, max_age_s=3.0, merge_wait_s=0.0)
        live: list[Draft] = []
        for now in range(200):
            # A random choice may miss a partition for long: later the ones with unread records are chosen.
            tp = rng.choice([tp for tp in unread if unread[tp] or now < 100] or [S0])  # type: ignore[attr-defined]
            if unread[tp]:
                live_queues[tp].append(unread[tp].popleft())
            draft = fills.fill(live_queues, lambda tp: bool(unread[tp]), float(now))
            live += [draft] if draft else []

        again = batcher(*items, fresh=fresh, max_age_s=3.0, merge_wait_s=0.0)
        whole = {tp: deque(held) for tp, held in items.items()}
        replayed = [again.take_exactly(whole, draft.next_offsets) for draft in live]

        assert [where(draft) for draft in replayed] == [where(draft) for draft in live]
        assert sum(len(where(draft)) for draft in live) == len(times), "every record is in exactly one batch"

    def test_waits_until_all_records_were_read(self) -> None:
        """A step is never formed in part."""
        queues: dict[TopicPartition, deque[Item]] = {S0: deque([sample(S0, 0, 0.0)])}
        again = batcher(S0)

        assert again.take_exactly(queues, {S0: 2}) is None
        queues[S0].append(sample(S0, 1, 0.0))

        assert where(again.take_exactly(queues, {S0: 2})) == ["samples[0]@0", "samples[0]@1"]


class TestOverload:
    def test_a_batch_is_closed_wide(self) -> None:
        """Up to `most` samples in place of `fresh`."""
        queues: dict[TopicPartition, deque[Item]] = {S0: deque(sample(S0, n, float(n)) for n in range(9))}
        fills = batcher(S0, wide=5)

        wide, usual = fills.fill(queues, none_behind, 0.0, most=5), fills.fill(queues, none_behind, 0.0)

        assert wide is not None
        assert usual is not None
        assert (wide.next_offsets, usual.next_offsets) == ({S0: 5}, {S0: 8})

    def test_an_open_wide_batch_closes_after_the_overload(self) -> None:
        """It holds four of at most five samples; without overload three are enough."""
        queues: dict[TopicPartition, deque[Item]] = {S0: deque(sample(S0, n, float(n)) for n in range(4))}
        fills = batcher(S0, wide=5)

        assert fills.fill(queues, none_behind, 0.0, most=5) is None
        queues[S0].append(sample(S0, 4, 4.0))
        draft = fills.fill(queues, none_behind, 0.0)

        assert draft is not None
        assert draft.next_offsets == {S0: 5}

    def test_labels_inside_samples_keep_their_bound(self) -> None:
        """Samples with a label are never skipped, so there must not be more of them than learned rows."""
        items = [sample(S0, n, float(n)) for n in range(9)]
        for each in items[1::2]:
            each.label = 0
        fills = batcher(S0, fresh=3, wide=9)

        draft = fills.fill({S0: deque(items)}, none_behind, 0.0, most=9, most_labelled=3)

        assert draft is not None
        assert draft.next_offsets == {S0: 6}


class TestThin:
    def test_learns_at_even_distances(self) -> None:
        """Of ten samples three, from the middle of each third."""
        samples = [sample(S0, n, float(n)) for n in range(10)]

        learned, skipped = thin(samples, 3)

        assert [each.position.offset for each in learned] == [1, 5, 8]
        assert [each.position.offset for each in skipped] == [0, 2, 3, 4, 6, 7, 9]

    @given(st.lists(st.booleans(), max_size=60), st.integers(1, 20))
    def test_keeps_every_label_the_order_and_each_sample_once(self, labelled: list[bool], most: int) -> None:
        """Samples with a label are all learned; others fill up to the bound."""
        samples = [sample(S0, n, float(n)) for n in range(len(labelled))]
        for each, has in zip(samples, labelled, strict=True):
            each.label = 1 if has else None

        learned, skipped = thin(samples, most)

        offsets = [[each.position.offset for each in part] for part in (learned, skipped)]
        assert sorted(offsets[0] + offsets[1]) == list(range(len(samples)))
        assert all(part == sorted(part) for part in offsets)
        assert all(each.label is None for each in skipped)
        assert len(learned) == max(sum(labelled), min(most, len(samples)))
