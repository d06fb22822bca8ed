"""Recent samples: a bounded ring buffer whose draws a restart repeats."""

from __future__ import annotations

import numpy as np
import pytest

from streamlearn.learn.recent import RecentSamples
from streamlearn.records import Column, Schema

SCHEMA = Schema((2,), np.dtype(np.uint8), ("a", "b"))


def samples(first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    keys = np.arange(first, first + count)
    return np.stack((keys % 256, keys // 256), axis=1).astype(np.uint8), keys


def drawn(recent: RecentSamples, step: int, rows: int = 4) -> list[int]:
    x = np.zeros((rows, 2), np.uint8)
    keys = recent.draw_into(x, step)
    np.testing.assert_array_equal(x[: len(keys)], samples(0, 0)[0] if not len(keys) else np.stack(
        (keys % 256, keys // 256), axis=1))  # fmt: skip
    return keys.tolist()


class TestRecentSamples:
    @pytest.mark.parametrize("chunk", [1, 3, 7, 10, 25])
    def test_holds_the_newest(self, chunk):
        """Whatever the number of new samples, also more than the capacity."""
        recent = RecentSamples(10, SCHEMA, seed=1)
        for first in range(0, 50, chunk):
            recent.add(*samples(first, chunk))
        last = (49 // chunk + 1) * chunk

        assert len(recent) == 10
        assert sorted(drawn(recent, 1, rows=10)) == list(range(last - 10, last))

    @pytest.mark.parametrize("held", [5, 10, 23])
    def test_remove_drops_a_sample_and_overwrites_it(self, held):
        """At any position of the ring; the others keep their order, and the next sample replaces the oldest."""
        recent, other = RecentSamples(10, SCHEMA, seed=1), RecentSamples(10, SCHEMA, seed=1)
        recent.add(*samples(300, held))
        for _ in range(2):
            recent.remove(300 + held - 3)
        kept = [n for n in range(300 + max(0, held - 10), 300 + held) if n != 300 + held - 3]
        assert sorted(drawn(recent, 1, rows=10)) == kept
        assert 300 + held - 3 not in recent.state()["keys"].tolist()
        assert [(300 + held - 3) % 256, (300 + held - 3) // 256] not in recent.state()["x"].tolist()
        other.load(recent.state())

        for one in (recent, other):
            one.add(*samples(500, 3))

        assert sorted(drawn(recent, 2, rows=10)) == [*kept, 500, 501, 502][-10:]
        assert drawn(other, 2) == drawn(recent, 2)

    def test_draws_each_once_and_others_at_another_step(self):
        """A draw is a function of the step."""
        recent = RecentSamples(100, SCHEMA, seed=1)
        recent.add(*samples(0, 100))

        one, again, other = drawn(recent, 5, 50), drawn(recent, 5, 50), drawn(recent, 6, 50)

        assert one == again != other
        assert len(set(one)) == 50

    def test_gives_no_more_than_it_has(self):
        """At the start of a stream."""
        recent = RecentSamples(100, SCHEMA, seed=1)
        recent.add(*samples(0, 3))

        assert sorted(drawn(recent, 1, rows=8)) == [0, 1, 2]

    @pytest.mark.parametrize("count", [0, 4, 10, 13])
    def test_a_restart_equals_no_restart(self, count):
        """Empty, half full, full, and wrapped around."""
        one, other = RecentSamples(10, SCHEMA, seed=1), RecentSamples(10, SCHEMA, seed=1)
        one.add(*samples(0, count))
        other.load(one.state())
        for recent in (one, other):
            recent.add(*samples(100, 3))

        assert [drawn(one, step) for step in range(5)] == [drawn(other, step) for step in range(5)]

    @pytest.mark.parametrize(("size", "expected"), [(4, range(9, 13)), (40, range(3, 13))])
    def test_another_capacity_keeps_the_newest(self, size, expected):
        """After a change of batch.recent_rows."""
        one, other = RecentSamples(10, SCHEMA, seed=1), RecentSamples(size, SCHEMA, seed=1)
        for first in range(13):
            one.add(*samples(first, 1))

        other.load(one.state())

        assert sorted(drawn(other, 1, rows=40)) == list(expected)

    @pytest.mark.parametrize("capacity", [4, 3])
    def test_samples_of_fewer_columns_are_completed(self, capacity):
        """Added columns are missing in what was saved before."""
        columns = Column("a", "number"), Column("b", "category", 5)
        old, new = (
            RecentSamples(rows, Schema((width,), np.dtype(np.float32), ("a", "b"), columns=columns[:n]), seed=1)
            for n, width, rows in ((1, 2, 4), (2, 3, capacity))
        )
        old.add(np.arange(12, dtype=np.float32).reshape(6, 2), np.arange(6))

        new.load(old.state())

        x = np.zeros((capacity, 3), np.float32)
        keys = new.draw_into(x, 1)
        assert sorted(keys.tolist()) == list(range(6 - capacity, 6))
        assert np.array_equal(x, np.stack((2.0 * keys, 2.0 * keys + 1.0, 0.0 * keys), axis=1))
