"""The distance of inputs from earlier ones: what raises it, what it forgets, and that a restart changes nothing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamlearn.judge.inputs import FIRST_STEPS, MOST_FEATURES, InputDistance
from streamlearn.records import Column
from tests.tables import COLUMNS, rows


def batches(count: int, *shape: int, seed: int = 0) -> np.ndarray:
    """(count, B, *shape), independent and normal, with means and scales that differ between features."""
    rng = np.random.default_rng(seed)
    width = int(np.prod(shape[1:]))
    scaled = rng.normal(size=(count, shape[0], width)) * np.geomspace(0.01, 100.0, width) + np.arange(width)
    return scaled.reshape(count, *shape)


def distances(x: np.ndarray, distance: InputDistance | None = None) -> list[float | None]:
    distance = distance or InputDistance()
    return [distance.update(batch) for batch in x]


class TestDistance:
    def test_is_one_on_average_while_nothing_changes(self):
        """As Hotelling's T^2 / K; None during the warm-up."""
        found = distances(batches(1000, 32, 6))

        assert found[:FIRST_STEPS] == [None] * FIRST_STEPS
        assert np.mean(found[100:]) == pytest.approx(1.0, abs=0.1)

    def test_equals_the_formula(self):
        """Computed from all batches at once: below the horizon the running means are plain means."""
        x = batches(FIRST_STEPS + 1, 8, 3)
        usual, squares, mean = x[0].mean(axis=0), np.zeros(6), np.zeros(6)
        for t, batch in enumerate(x):
            found = np.concatenate((batch.mean(axis=0), np.abs(batch - usual).mean(axis=0)))
            if t == FIRST_STEPS:
                expected = np.mean(8 * (found - mean) ** 2 / (squares / t))
            squares += 8 * t / (t + 1) * (found - mean) ** 2
            mean += (found - mean) / (t + 1)
            usual = mean[:3]

        assert distances(x)[-1] == pytest.approx(expected)

    @pytest.mark.parametrize(
        "change",
        [
            lambda x: x[..., ::-1],
            lambda x: x + np.array([0.02, 0, 0, 0, 0, 0]),
            lambda x: 3.0 * (x - np.arange(6)) + np.arange(6),
            lambda x: 0.1 * (x - np.arange(6)) + np.arange(6),
        ],
        ids=["places", "a mean by two deviations", "a wider scale", "a narrower scale"],
    )
    def test_rises_with_the_first_batch_of_a_change(self, change):
        """Of the features' order, mean or scale, in units from a hundredth to a hundred."""
        usual, other = batches(500, 32, 6), batches(5, 32, 6, seed=1)
        distance = InputDistance()
        before = distances(usual, distance)[100:]

        assert min(distances(change(other), distance)) > max(before)

    def test_is_none_for_constant_inputs(self):
        """They have no deviation."""
        assert distances(np.ones((100, 4, 3))) == [None] * 100

    def test_includes_a_constant_feature_after_its_first_change(self):
        """A pixel that was always black causes no division by zero, and counts once it varies."""
        distance = InputDistance()
        usual, varying = batches(300, 8, 2), batches(300, 8, 2, seed=1)
        usual[:, :, 0] = 0.0
        before = distances(usual, distance)[100:]

        first, *after = distances(varying, distance)

        assert first <= max(before)
        assert max(after[:3]) > max(before)

    def test_follows_a_change(self):
        """After a few horizons the new inputs are normal."""
        distance = InputDistance()
        distances(batches(300, 8, 4), distance)

        found = distances(3.0 * batches(2000, 8, 4, seed=1), distance)

        assert found[0] > 3.0
        assert np.mean(found[-500:]) == pytest.approx(1.0, abs=0.2)

    def test_recovers_soon_after_one_outlier(self):
        """1e15 in one sample counts as six deviations, so a later change is detected."""
        x = batches(400, 8, 4)
        x[200, 3, 1] = 1e15
        distance = InputDistance()
        found = distances(x, distance)

        assert np.mean(found[250:]) == pytest.approx(1.0, abs=0.3)
        assert min(distances(batches(5, 8, 4, seed=1)[..., ::-1], distance)) > max(found[250:])

    @pytest.mark.parametrize("outlier", [1e6, 1.8e19])
    def test_restarts_the_warm_up_after_an_outlier_in_it(self, outlier):
        """Otherwise the outlier would set the deviation, and nothing would be far from it."""
        x = batches(200, 32, 6)
        x[9, 0] = outlier

        found = [value for value in distances(x)[100:] if value is not None]

        assert len(found) == 100
        assert np.mean(found) == pytest.approx(1.0, abs=0.2)

    @pytest.mark.parametrize("constant", [False, True])
    def test_finishes_the_warm_up_where_outliers_are_common(self, constant):
        """Many features of which some have an outlier at any time, or constants whose deviation is rounding error."""
        rng = np.random.default_rng(0)
        x = np.full((200, 64, 100), 0.1) if constant else rng.normal(size=(200, 64, 100)) * 1e-3
        x[rng.random(x.shape) < 1e-3] = 100.0

        found = distances([batch[: rng.integers(20, 65)] for batch in x])

        assert None not in found[2 * FIRST_STEPS + 1 :]

    def test_is_in_deviations_of_the_batch_size(self):
        """The mean of four samples deviates more by chance than that of 64."""
        few, many = batches(1000, 4, 4), batches(1000, 64, 4, seed=1)
        distance = InputDistance()
        found = [(distance.update(a), distance.update(b)) for a, b in zip(few, many, strict=True)][100:]

        assert np.mean(found, axis=0).tolist() == pytest.approx([1.0, 1.0], abs=0.25)

    def test_accepts_integers_and_images(self):
        """Uint8 does not overflow, and the shape does not matter."""
        x = np.random.default_rng(0).integers(0, 256, (100, 8, 1, 4, 4), np.uint8)

        assert distances(x) == distances(x.reshape(100, 8, 16).astype(np.float64))

    def test_leaves_the_batch_unchanged(self):
        """It is learned next."""
        x = batches(20, 4, 3)
        copy = x.copy()

        distances(x)

        assert np.array_equal(x, copy)


class TestBound:
    def test_the_state_is_bounded_for_large_images(self):
        """A change at the right edge is detected: the watched features are evenly spaced."""
        distance, rng = InputDistance(), np.random.default_rng(0)
        before = distances(rng.normal(size=(60, 4, 3, 64, 64)), distance)[-20:]
        edge = rng.normal(size=(4, 3, 64, 64))
        edge[..., 56:] += 9.0

        assert distance.update(edge) > max(before)
        assert {len(array.reshape(-1)) for array in distance.state().values()} == {1, 2 * MOST_FEATURES}


class TestSaving:
    @given(st.integers(0, 60), st.integers(0, 3))
    @settings(deadline=None)
    def test_continuing_after_load_equals_an_uninterrupted_run(self, count, seed):
        """Before the first batch, during the warm-up and after it."""
        distance, other = InputDistance(), InputDistance()
        distances(batches(count, 4, 3, seed=seed), distance)

        other.load(distance.state())

        after = batches(30, 4, 3, seed=9)
        assert distances(after, other) == distances(after, distance)

    def test_the_state_is_a_copy(self):
        """Another thread writes it while batches arrive."""
        distance = InputDistance()
        distances(batches(5, 4, 3), distance)
        state = distance.state()
        kept = {name: array.copy() for name, array in state.items()}

        distances(batches(5, 4, 3, seed=1), distance)

        assert all(np.array_equal(kept[name], state[name]) for name in kept)

    def test_reset_discards_all_batches(self):
        """As after an alarm: the next batches are normal."""
        distance = InputDistance()
        distances(batches(50, 4, 3), distance)

        distance.reset()

        assert distances(batches(50, 4, 3, seed=1) + 99.0, distance) == distances(batches(50, 4, 3, seed=1) + 99.0)


class TestColumns:
    """Rows of every kind."""

    def test_is_one_on_average_while_nothing_changes(self):
        """With missing values, codes and flags."""
        x = rows(COLUMNS, 32 * 600).reshape(600, 32, -1)

        assert np.mean(distances(x, InputDistance(COLUMNS))[100:]) == pytest.approx(1.0, abs=0.1)

    def test_does_not_read_codes_as_numbers(self):
        """Other buckets of the same parity, however far away, are the same; the network sees no distance either."""
        columns = (Column("shop", "category", 1 << 20),)
        codes = np.random.default_rng(0).integers(1, 50, (100, 32, 1)).astype(np.float32)

        near, far = (distances(x, InputDistance(columns)) for x in (codes, codes + 2**19 * (codes > 25.0)))

        assert near == far

    @pytest.mark.parametrize(
        "changed",
        [
            lambda x: np.where(np.arange(x.shape[-1]) == 2, np.where(x == 0.0, 0.0, 1.0), x),
            lambda x: np.where(np.arange(x.shape[-1]) == 2, 0.0, x),
            lambda x: x + 60.0 * (np.arange(x.shape[-1]) == 0) * x[..., 1:2],
            lambda x: x * (np.arange(x.shape[-1]) > 1),
        ],
        ids=["one category", "no category", "a number by two deviations", "no number"],
    )
    def test_rises_with_the_first_batch_of_a_change(self, changed):
        """Of the distribution of a category, of missing values, of the present values of a column with gaps."""
        distance = InputDistance(COLUMNS)
        usual = distances(rows(COLUMNS, 32 * 300).reshape(300, 32, -1), distance)
        after = distances(changed(rows(COLUMNS, 32 * 3, seed=1).reshape(3, 32, -1)), distance)

        assert min(after) > 1.3 * np.quantile(usual[FIRST_STEPS:], 0.5)

    def test_missing_numbers_are_no_change_of_the_present_ones(self):
        """A column with half of its values missing has the mean of the others, not one between them and zero."""
        columns, distance = (Column("amount", "number"),), InputDistance((Column("amount", "number"),))
        distances(rows(columns, 32 * 100, missing=0.5).reshape(100, 32, -1), distance)

        assert distance.state()["mean"][0] == pytest.approx(100.0, abs=5.0)

    def test_an_added_column_restarts_the_warm_up(self):
        """A change of the config is no change of the stream."""
        distance, wider = InputDistance(COLUMNS[:3]), InputDistance(COLUMNS)
        distances(rows(COLUMNS[:3], 32 * 100).reshape(100, 32, -1), distance)
        wider.load(distance.state())

        found = distances(rows(COLUMNS, 32 * 100).reshape(100, 32, -1), wider)

        assert found[:FIRST_STEPS] == [None] * FIRST_STEPS
        assert max(found[FIRST_STEPS:]) < 5.0

    def test_continuing_after_load_equals_an_uninterrupted_run(self):
        """I3; with more places than are watched."""
        columns = (*COLUMNS, Column("embedding", "vector", 400))
        x = rows(columns, 8 * 60).reshape(60, 8, -1)
        whole, half, resumed = (InputDistance(columns) for _ in range(3))
        distances(x[:30], half)
        resumed.load(half.state())

        assert distances(x, whole)[30:] == distances(x[30:], resumed)
