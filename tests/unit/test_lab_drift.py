"""Drift: the grammar, its range of samples, its effect on samples and classes."""

from __future__ import annotations

import numpy as np
import pytest

from streamlearn.errors import ConfigError
from streamlearn.lab.datasets import Dataset
from streamlearn.lab.drift import Drift, Drifts, parse_drift, prior_of, rotate

RNG = np.random.default_rng(0)
IMAGES = Dataset("images", RNG.integers(0, 17, (50, 3, 6, 6), np.uint8), RNG.integers(0, 4, 50), ("a", "b", "c", "d"))
TABLE = Dataset("table", RNG.normal(5, 2, (400, 3)).astype(np.float32), RNG.integers(0, 2, 400), ("a", "b"))


class TestGrammar:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("none", ()),
            ("rotate:90@30000", (Drift("rotate", 90, 30_000),)),
            ("rotate:-22.5", (Drift("rotate", -22.5),)),
            ("permute-labels@5-10", (Drift("permute-labels", 0, 5, 10),)),
            ("prior:20@7", (Drift("prior", 20, 7),)),
            ("noise:0.3@2, none,permute-labels", (Drift("noise", 0.3, 2), Drift("permute-labels"))),
        ],
    )
    def test_names_changes_in_order(self, text: str, expected: tuple[Drift, ...]) -> None:
        """START defaults to 0, END to no end."""
        assert parse_drift(text) == expected

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "rotate",
            "rotate:",
            "rotate:ninety",
            "rotate:361",
            "noise:-1",
            "noise",
            "permute-labels:3",
            "prior",
            "prior:0.5",
            "melt:1",
            "none@5",
            "rotate:90@",
            "rotate:90@-5",
            "rotate:90@10-10",
            "rotate:90@10-5",
            "noise:1,",
            ",".join(["none"] * 101),
        ],
    )
    def test_refuses_everything_else(self, text: str) -> None:
        """A misspelt drift must not count as none."""
        with pytest.raises(ConfigError, match="drift"):
            parse_drift(text)


class TestDrifts:
    @pytest.mark.parametrize(("index", "changed"), [(0, False), (4, False), (5, True), (9, True), (10, False)])
    def test_a_change_holds_from_start_up_to_without_end(self, index: int, changed: bool) -> None:
        """A recurring concept is one drift with an END."""
        drifted = Drifts(TABLE, parse_drift("permute-labels@5-10"), seed=0)

        assert (drifted.show(index, TABLE.x[0], 0)[1] != 0) == changed

    def test_without_drift_samples_are_not_copied(self) -> None:
        """The sample is a view of the data set."""
        x, y = Drifts(TABLE, (), seed=0).show(7, TABLE.x[0], 1)

        assert x.base is TABLE.x
        assert y == 1

    def test_every_class_is_permuted(self) -> None:
        """The permutation has no fixed point."""
        for seed in range(10):
            drifted = Drifts(IMAGES, parse_drift("permute-labels"), seed=seed)

            moved = [drifted.show(0, IMAGES.x[0], y)[1] for y in range(4)]

            assert sorted(moved) == [0, 1, 2, 3]
            assert all(new != old for old, new in enumerate(moved))

    def test_noise_has_the_given_strength(self) -> None:
        """In standard deviations of the data set; the mean is 0."""
        drifted = Drifts(TABLE, parse_drift("noise:0.5"), seed=0)

        added = np.stack([drifted.show(i, x, 0)[0] for i, x in enumerate(TABLE.x)]) - TABLE.x

        assert added.std() == pytest.approx(0.5 * TABLE.x.std(), rel=0.1)
        assert abs(added.mean()) < 0.15

    def test_noise_on_integers_stays_in_the_range_of_the_data(self) -> None:
        """Values are clipped and do not wrap around."""
        drifted = Drifts(IMAGES, parse_drift("noise:2"), seed=0)

        shown = np.stack([drifted.show(i, x, 0)[0] for i, x in enumerate(IMAGES.x)])

        assert (shown.dtype, shown.min(), shown.max()) == (np.uint8, 0, 16)
        assert not np.array_equal(shown, IMAGES.x)

    def test_the_same_sample_number_gets_the_same_noise(self) -> None:
        """A function of (seed, number); the data set is not changed."""
        before = TABLE.x.copy()
        one, other = (Drifts(TABLE, parse_drift("noise:1"), seed=seed) for seed in (0, 1))

        first = one.show(3, TABLE.x[0], 0)[0]
        one.show(4, TABLE.x[0], 0)

        assert np.array_equal(first, one.show(3, TABLE.x[0], 0)[0])
        assert not np.array_equal(first, one.show(4, TABLE.x[0], 0)[0])
        assert not np.array_equal(first, other.show(3, TABLE.x[0], 0)[0])
        assert np.array_equal(TABLE.x, before)

    def test_changes_are_applied_in_the_order_given(self) -> None:
        """Two quarter turns are a half turn."""
        drifted = Drifts(IMAGES, parse_drift("rotate:90,rotate:90@5"), seed=0)

        assert np.array_equal(drifted.show(5, IMAGES.x[0], 0)[0], IMAGES.x[0][:, ::-1, ::-1])
        assert np.array_equal(drifted.show(4, IMAGES.x[0], 0)[0], np.rot90(IMAGES.x[0], axes=(1, 2)))

    @pytest.mark.parametrize("shape", [(4,), (1, 2, 3)])
    def test_an_impossible_rotation_is_refused(self, shape: tuple[int, ...]) -> None:
        """Tables cannot be rotated, and a quarter turn needs square images."""
        dataset = Dataset("d", np.zeros((2, *shape), np.uint8), np.array([0, 1]), ("a", "b"))

        with pytest.raises(ConfigError, match="drift rotate"):
            Drifts(dataset, parse_drift("rotate:90"), seed=0)


class TestPrior:
    def test_shares_fall_geometrically(self) -> None:
        """8, 4, 2 and 1 of 15, in any order of the classes."""
        shares = prior_of(4, 8.0, seed=3)

        assert sorted(shares * 15) == pytest.approx([1, 2, 4, 8])

    def test_the_seed_determines_the_most_frequent_class(self) -> None:
        """Otherwise it would be the same class in all runs."""
        assert len({int(prior_of(10, 20.0, seed=seed).argmax()) for seed in range(20)}) > 5

    def test_classes_are_resampled_to_the_given_shares(self) -> None:
        """Whatever their shares in the data set."""
        y = np.repeat(np.arange(4), [700, 100, 100, 100])
        dataset = Dataset("d", np.zeros((1000, 1), np.float32), y, ("a", "b", "c", "d"))
        drifted = Drifts(dataset, parse_drift("prior:8"), seed=0)

        shown = drifted.rows(np.tile(np.arange(1000), 7), y, first=0)

        assert np.bincount(y[shown]) / 7000 == pytest.approx(prior_of(4, 8.0, seed=0), abs=0.02)

    def test_only_samples_from_start_to_end_are_resampled(self) -> None:
        """The given rows are of the rare class, and nearly all drawn rows of the other."""
        drifted = Drifts(TABLE, parse_drift("prior:1000000@105-110"), seed=0)
        common = prior_of(2, 1e6, seed=0).argmax()
        given = np.flatnonzero(common != TABLE.y)[:20]

        shown = drifted.rows(given, TABLE.y, first=100)

        assert np.array_equal(np.flatnonzero(TABLE.y[shown] == common), np.arange(5, 10))
        assert np.array_equal(np.delete(shown, np.s_[5:10]), np.delete(given, np.s_[5:10]))

    def test_each_pass_has_its_own_draw(self) -> None:
        """A function of (seed, number)."""
        y, given = TABLE.y, np.arange(400)
        drifted = Drifts(TABLE, parse_drift("prior:3"), seed=0)

        assert np.array_equal(drifted.rows(given, y, first=0), drifted.rows(given, y, first=0))
        assert not np.array_equal(drifted.rows(given, y, first=0), drifted.rows(given, y, first=400))

    def test_neither_samples_nor_classes_are_changed(self) -> None:
        """Only their frequency."""
        x, y = Drifts(TABLE, parse_drift("prior:3"), seed=0).show(7, TABLE.x[0], 1)

        assert (x is TABLE.x[0] or np.array_equal(x, TABLE.x[0]), y) == (True, 1)


class TestRotate:
    @pytest.mark.parametrize("degrees", [0, 90, 180, 270, 360, -90])
    def test_quarter_turns_are_exact(self, degrees: int) -> None:
        """No pixel is lost or mixed, and the array is contiguous, as encoders need it."""
        turned = rotate(IMAGES.x[0], degrees)

        assert np.array_equal(turned, np.rot90(IMAGES.x[0], degrees // 90, axes=(1, 2)))
        assert turned.flags.c_contiguous

    @pytest.mark.parametrize("dtype", ["uint8", "int32", "float16", "float64"])
    def test_other_angles_rotate_in_the_same_direction(self, dtype: str) -> None:
        """A bar on the right moves to the upper right; values stay in their range."""
        image = np.zeros((1, 21, 21), dtype)
        image[0, 9:12, 14:20] = 100

        turned = rotate(image, 45)

        assert (turned.dtype, turned.shape) == (image.dtype, image.shape)
        assert turned[0, 3:8, 13:18].astype(float).sum() > 0.5 * turned.astype(float).sum()
        assert 0 <= turned.min() <= turned.max() <= 100
