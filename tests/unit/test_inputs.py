"""The distance of inputs from those before: what moves it, what it forgets, and that a restart changes none."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamlearn.judge.inputs import FIRST_STEPS, MOST_FEATURES, InputDistance


def batches(count: int, *shape: int, seed: int = 0) -> np.ndarray:
    """(count, B, *shape), independent and normal, of means and scales that differ between features."""
    rng = np.random.default_rng(seed)
    width = int(np.prod(shape[1:]))
    scaled = rng.normal(size=(count, shape[0], width)) * np.geomspace(0.01, 100.0, width) + np.arange(width)
    return scaled.reshape(count, *shape)


def seen(x: np.ndarray, distance: InputDistance | None = None) -> list[float | None]:
    distance = distance or InputDistance()
    return [distance.update(batch) for batch in x]


class TestDistance:
    def test_is_one_in_the_mean_while_nothing_changes(self):
        """As Hotelling's T^2 over K is; none before the first steps."""
        found = seen(batches(1000, 32, 6))

        assert found[:FIRST_STEPS] == [None] * FIRST_STEPS
        assert np.mean(found[100:]) == pytest.approx(1.0, abs=0.1)

    def test_is_what_the_formula_says(self):
        """Worked out from all batches at once: while fewer were seen than the horizon, means are plain."""
        x = batches(FIRST_STEPS + 1, 8, 3)
        usual, squares, mean = x[0].mean(axis=0), np.zeros(6), np.zeros(6)
        for t, batch in enumerate(x):
            found = np.concatenate((batch.mean(axis=0), np.abs(batch - usual).mean(axis=0)))
            if t == FIRST_STEPS:
                expected = np.mean(8 * (found - mean) ** 2 / (squares / t))
            squares += 8 * t / (t + 1) * (found - mean) ** 2
            mean += (found - mean) / (t + 1)
            usual = mean[:3]

        assert seen(x)[-1] == pytest.approx(expected)

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
    def test_rises_at_once_with_the_first_batch_of_a_change(self, change):
        """Of features' places, mean or scale, in units from a hundredth to a hundred."""
        usual, other = batches(500, 32, 6), batches(5, 32, 6, seed=1)
        distance = InputDistance()
        before = seen(usual, distance)[100:]

        assert min(seen(change(other), distance)) > max(before)

    def test_is_none_of_inputs_that_never_move(self):
        """There is no deviation to measure in."""
        assert seen(np.ones((100, 4, 3))) == [None] * 100

    def test_leaves_a_feature_out_until_it_moves_and_counts_it_then(self):
        """A pixel that was always black is not a division by zero, and is noticed once it lives."""
        distance = InputDistance()
        usual, lively = batches(300, 8, 2), batches(300, 8, 2, seed=1)
        usual[:, :, 0] = 0.0
        before = seen(usual, distance)[100:]

        first, *after = seen(lively, distance)

        assert first <= max(before)
        assert max(after[:3]) > max(before)

    def test_follows_what_has_changed(self):
        """After a few horizons the new inputs are the usual ones."""
        distance = InputDistance()
        seen(batches(300, 8, 4), distance)

        found = seen(3.0 * batches(2000, 8, 4, seed=1), distance)

        assert found[0] > 3.0
        assert np.mean(found[-500:]) == pytest.approx(1.0, abs=0.2)

    def test_is_soon_well_again_after_one_wild_value(self):
        """1e15 in one sample counts as six deviations, so a change after it is seen."""
        x = batches(400, 8, 4)
        x[200, 3, 1] = 1e15
        distance = InputDistance()
        found = seen(x, distance)

        assert np.mean(found[250:]) == pytest.approx(1.0, abs=0.3)
        assert min(seen(batches(5, 8, 4, seed=1)[..., ::-1], distance)) > max(found[250:])

    @pytest.mark.parametrize("wild", [1e6, 1.8e19])
    def test_forgets_what_it_saw_where_a_wild_value_comes_before_the_first_distance(self, wild):
        """Or that value would be usual, and nothing else ever far."""
        x = batches(200, 32, 6)
        x[9, 0] = wild

        found = [value for value in seen(x)[100:] if value is not None]

        assert len(found) == 100
        assert np.mean(found) == pytest.approx(1.0, abs=0.2)

    @pytest.mark.parametrize("constant", [False, True])
    def test_begins_where_wild_values_are_common(self, constant):
        """Many features of which one or another is wild at any time, or constants whose deviation is rounding."""
        rng = np.random.default_rng(0)
        x = np.full((200, 64, 100), 0.1) if constant else rng.normal(size=(200, 64, 100)) * 1e-3
        x[rng.random(x.shape) < 1e-3] = 100.0

        found = seen([batch[: rng.integers(20, 65)] for batch in x])

        assert None not in found[2 * FIRST_STEPS + 1 :]

    def test_of_batches_of_any_size_is_in_deviations_of_that_size(self):
        """A mean of four samples is further off than one of 64, by chance."""
        few, many = batches(1000, 4, 4), batches(1000, 64, 4, seed=1)
        distance = InputDistance()
        found = [(distance.update(a), distance.update(b)) for a, b in zip(few, many, strict=True)][100:]

        assert np.mean(found, axis=0).tolist() == pytest.approx([1.0, 1.0], abs=0.25)

    def test_takes_integers_and_images(self):
        """Uint8 does not wrap round, and a shape is nothing but features."""
        x = np.random.default_rng(0).integers(0, 256, (100, 8, 1, 4, 4), np.uint8)

        assert seen(x) == seen(x.reshape(100, 8, 16).astype(np.float64))

    def test_changes_no_batch(self):
        """It is learned next."""
        x = batches(20, 4, 3)
        copy = x.copy()

        seen(x)

        assert np.array_equal(x, copy)


class TestBound:
    def test_the_state_is_as_large_for_a_photograph_as_for_a_few_hundred_features(self):
        """A change of its right edge is noticed all the same: what is watched is evenly spread."""
        distance, rng = InputDistance(), np.random.default_rng(0)
        before = seen(rng.normal(size=(60, 4, 3, 64, 64)), distance)[-20:]
        edge = rng.normal(size=(4, 3, 64, 64))
        edge[..., 56:] += 9.0

        assert distance.update(edge) > max(before)
        assert {len(array.reshape(-1)) for array in distance.state().values()} == {1, 2 * MOST_FEATURES}


class TestSaving:
    @given(st.integers(0, 60), st.integers(0, 3))
    @settings(deadline=None)
    def test_a_loaded_one_goes_on_as_the_saved_one(self, count, seed):
        """Before the first batch, before the first distance and after."""
        distance, other = InputDistance(), InputDistance()
        seen(batches(count, 4, 3, seed=seed), distance)

        other.load(distance.state())

        after = batches(30, 4, 3, seed=9)
        assert seen(after, other) == seen(after, distance)

    def test_the_state_is_a_copy(self):
        """It is written by another thread while batches come in."""
        distance = InputDistance()
        seen(batches(5, 4, 3), distance)
        state = distance.state()
        kept = {name: array.copy() for name, array in state.items()}

        seen(batches(5, 4, 3, seed=1), distance)

        assert all(np.array_equal(kept[name], state[name]) for name in kept)

    def test_begun_anew_knows_nothing(self):
        """As after an alarm: the next batches are what is usual."""
        distance = InputDistance()
        seen(batches(50, 4, 3), distance)

        distance.reset()

        assert seen(batches(50, 4, 3, seed=1) + 99.0, distance) == seen(batches(50, 4, 3, seed=1) + 99.0)
