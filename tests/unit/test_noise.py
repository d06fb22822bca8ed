"""Noise by its settings: which kinds, in which order, weak and strong, and what does not fit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from streamlearn.errors import ConfigError
from streamlearn.learn.noise import NoiseSettings, in_order, make_noises, mixed_seed, no_noise
from streamlearn.learn.noise.image import colour, cutout, resized_crop, shift
from streamlearn.learn.noise.table import feature_dropout, gaussian

PLAIN = NoiseSettings(noise="auto", noise_std=0.3, pixel_noise_std=0.0, shift_pixels=2, flip=True)
ALL = replace(PLAIN, pixel_noise_std=0.1, crop_scale=0.5, colour=0.2, cutout_pixels=3, feature_dropout=0.4)
IMAGES = torch.rand((6, 3, 6, 7), generator=torch.Generator().manual_seed(8))
ROWS = torch.rand((6, 5), generator=torch.Generator().manual_seed(9))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class TestInOrder:
    def test_passes_each_the_view_of_the_one_before(self):
        """And the same generator, which goes on from one to the next."""
        view = in_order(gaussian(1.0), feature_dropout(0.5))(ROWS, seeded())

        generator = seeded()
        assert torch.equal(view, feature_dropout(0.5)(gaussian(1.0)(ROWS, generator), generator))

    def test_of_none_is_the_sample(self):
        """No noise is no work."""
        assert in_order()(ROWS, seeded()) is ROWS


class TestMakeNoises:
    @pytest.mark.parametrize("settings", [PLAIN, replace(PLAIN, noise="table"), replace(PLAIN, noise="none")])
    @pytest.mark.parametrize("shape", [(5,), (3, 6, 7)])
    def test_has_one_strength_where_nothing_is_set(self, settings, shape):
        """The same object, so that a method sees that one view does for both."""
        weak, strong = make_noises(settings, shape=shape)

        assert weak is strong

    def test_of_images_is_shift_then_crop_colour_and_cutout_then_gaussian(self):
        """The weak one has neither of the three in the middle."""
        weak, strong = make_noises(ALL, shape=(3, 6, 7))

        first, last = shift(2, flip=True), gaussian(0.1)
        assert torch.equal(weak(IMAGES, seeded()), in_order(first, last)(IMAGES, seeded()))
        middle = (resized_crop(0.5), colour(0.2), cutout(3))
        assert torch.equal(strong(IMAGES, seeded()), in_order(first, *middle, last)(IMAGES, seeded()))

    @pytest.mark.parametrize(
        ("changed", "noise"),
        [
            ({"crop_scale": 0.5}, resized_crop(0.5)),
            ({"colour": 0.2}, colour(0.2)),
            ({"cutout_pixels": 3}, cutout(3)),
        ],
    )
    def test_of_images_takes_each_strong_kind_by_itself(self, changed, noise):
        """Its setting alone turns it on."""
        _, strong = make_noises(replace(PLAIN, **changed), shape=(3, 6, 7))

        wanted = in_order(shift(2, flip=True), noise)
        assert torch.equal(strong(IMAGES, seeded()), wanted(IMAGES, seeded()))

    def test_of_tables_is_dropout_then_gaussian(self):
        """The weak one is Gaussian alone, and settings of images do not matter."""
        weak, strong = make_noises(ALL, shape=(5,))

        assert torch.equal(weak(ROWS, seeded()), gaussian(0.3)(ROWS, seeded()))
        assert torch.equal(strong(ROWS, seeded()), in_order(feature_dropout(0.4), gaussian(0.3))(ROWS, seeded()))

    def test_table_takes_images_too(self):
        """For networks that flatten them."""
        weak, _ = make_noises(replace(ALL, noise="table"), shape=(3, 6, 7))

        assert torch.equal(weak(IMAGES, seeded()), gaussian(0.3)(IMAGES, seeded()))

    def test_none_is_the_sample_itself(self):
        """No noise is no work."""
        assert make_noises(replace(ALL, noise="none"), shape=(5,)) == (no_noise, no_noise)
        assert no_noise(ROWS, seeded()) is ROWS

    def test_by_import_path_is_what_the_factory_returns(self):
        """A user's noise is a factory without arguments: one strength."""
        weak, strong = make_noises(replace(ALL, noise=f"{__name__}:negated"), shape=(5,))

        assert weak is strong
        assert torch.equal(weak(ROWS, seeded()), -ROWS)

    def test_by_import_path_asks_for_both_strengths_where_the_factory_knows_them(self):
        """A parameter of that name says so."""
        weak, strong = make_noises(replace(ALL, noise=f"{__name__}:scaled"), shape=(5,))

        assert torch.equal(weak(ROWS, seeded()), 2 * ROWS)
        assert torch.equal(strong(ROWS, seeded()), 3 * ROWS)

    @pytest.mark.parametrize("noise", ["auto", "table", f"{__name__}:negated", f"{__name__}:scaled"])
    @pytest.mark.parametrize("shape", [(5,), (3, 6, 7)])
    def test_of_no_rows_is_no_rows(self, noise, shape):
        """A step without fresh rows has no strong view to make; a kind that cannot do without rows is not asked."""
        for view in make_noises(replace(ALL, noise=noise), shape=shape):
            assert view(torch.zeros((0, *shape)), seeded()).shape == (0, *shape)

    @pytest.mark.parametrize(
        ("name", "said"),
        [
            ("image", "image wants samples"),
            ("loud", "none of auto"),
            ("no_such_package:noise", "cannot import"),
            (f"{__name__}:flattened", "view of the shape"),
            (f"{__name__}:weak_only", "view of the shape"),
            (f"{__name__}:ROWS", "wanted something to call"),
            (f"{__name__}:seeded", "fails on samples"),
        ],
    )
    def test_that_does_not_fit_is_a_config_error(self, name, said):
        """Found when it is built, not in the first step."""
        with pytest.raises(ConfigError, match=said):
            make_noises(replace(PLAIN, noise=name), shape=(5,))

    def test_that_would_cover_the_whole_image_is_a_config_error(self):
        """6 pixels of 6 x 7; 5 leave a line."""
        with pytest.raises(ConfigError, match=r"learn\.cutout_pixels: 6"):
            make_noises(replace(PLAIN, cutout_pixels=6), shape=(3, 6, 7))

        make_noises(replace(PLAIN, cutout_pixels=5), shape=(3, 6, 7))


def negated():
    """A user's factory."""
    return lambda x, _generator: -x


def scaled(strength: str):
    """A user's factory of two strengths."""
    factor = {"weak": 2, "strong": 3}[strength]
    return lambda x, _generator: factor * x


def flattened():
    """A user's factory whose noise changes the shape."""
    return lambda x, _generator: x.flatten()


def weak_only(strength: str):
    """A user's factory whose strong noise changes the shape."""
    return negated() if strength == "weak" else flattened()


def test_mixed_seeds_differ_in_their_low_32_bits():
    """Torch's CPU generator sees no others."""
    seeds = {
        mixed_seed(seed, step, purpose) & 0xFFFFFFFF for seed in (0, 1) for step in range(500) for purpose in (1, 2)
    }

    assert len(seeds) == 2000
