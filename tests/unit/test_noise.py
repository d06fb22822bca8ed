"""Noise by its settings: which kinds, in which order, weak and strong, and configuration errors."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from streamlearn.errors import ConfigError
from streamlearn.learn.noise.build import in_order, make_noises, no_noise
from streamlearn.learn.noise.image import colour, cutout, resized_crop, shift
from streamlearn.learn.noise.table import feature_dropout, gaussian
from streamlearn.learn.settings import LearnConfig

TABLE = LearnConfig(noise="table", noise_options={"std": 0.3})
ALL_OF_TABLE = LearnConfig(noise="table", noise_options={"std": 0.3, "feature_dropout": 0.4})
IMAGE = LearnConfig(noise="image", noise_options={"flip": True})
ALL_OF_IMAGE = LearnConfig(
    noise="image",
    noise_options={"flip": True, "pixel_noise_std": 0.1, "crop_scale": 0.5, "colour": 0.2, "cutout_pixels": 3},
)
IMAGES = torch.rand((6, 3, 6, 7), generator=torch.Generator().manual_seed(8))
ROWS = torch.rand((6, 5), generator=torch.Generator().manual_seed(9))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class TestInOrder:
    def test_each_noise_gets_the_view_of_the_one_before(self):
        """And the same generator."""
        view = in_order(partial(gaussian, std=1.0), partial(feature_dropout, probability=0.5))(ROWS, seeded())

        generator = seeded()
        assert torch.equal(view, feature_dropout(gaussian(ROWS, generator, std=1.0), generator, probability=0.5))

    def test_no_noise_returns_the_sample(self):
        """Without a copy."""
        assert in_order()(ROWS, seeded()) is ROWS


class TestMakeNoises:
    @pytest.mark.parametrize("config", [TABLE, IMAGE, LearnConfig(noise="none")], ids=lambda config: config.noise)
    def test_without_strong_options_there_is_one_strength(self, config):
        """The same object twice, so that a method sees that one view serves both."""
        weak, strong = make_noises(config, shape=(3, 6, 7))

        assert weak is strong

    def test_image_is_shift_then_crop_colour_and_cutout_then_gaussian(self):
        """The weak noise has none of the three in the middle."""
        weak, strong = make_noises(ALL_OF_IMAGE, shape=(3, 6, 7))

        first, last = partial(shift, pixels=2, flip=True), partial(gaussian, std=0.1)
        assert torch.equal(weak(IMAGES, seeded()), in_order(first, last)(IMAGES, seeded()))
        middle = (partial(resized_crop, scale=0.5), partial(colour, strength=0.2), partial(cutout, pixels=3))
        assert torch.equal(strong(IMAGES, seeded()), in_order(first, *middle, last)(IMAGES, seeded()))

    @pytest.mark.parametrize(
        ("changed", "noise"),
        [
            ({"crop_scale": 0.5}, partial(resized_crop, scale=0.5)),
            ({"colour": 0.2}, partial(colour, strength=0.2)),
            ({"cutout_pixels": 3}, partial(cutout, pixels=3)),
        ],
    )
    def test_each_strong_kind_is_turned_on_by_its_option(self, changed, noise):
        """And no other kind with it."""
        _, strong = make_noises(LearnConfig(noise="image", noise_options={"flip": True, **changed}), shape=(3, 6, 7))

        expected = in_order(partial(shift, pixels=2, flip=True), noise)
        assert torch.equal(strong(IMAGES, seeded()), expected(IMAGES, seeded()))

    def test_table_is_dropout_then_gaussian(self):
        """The weak noise is Gaussian alone."""
        weak, strong = make_noises(ALL_OF_TABLE, shape=(5,))

        assert torch.equal(weak(ROWS, seeded()), gaussian(ROWS, seeded(), std=0.3))
        assert torch.equal(
            strong(ROWS, seeded()),
            in_order(partial(feature_dropout, probability=0.4), partial(gaussian, std=0.3))(ROWS, seeded()),
        )

    def test_table_works_for_images(self):
        """For networks that flatten them."""
        weak, _ = make_noises(ALL_OF_TABLE, shape=(3, 6, 7))

        assert torch.equal(weak(IMAGES, seeded()), gaussian(IMAGES, seeded(), std=0.3))

    def test_none_returns_the_sample_itself(self):
        """Without a copy."""
        assert make_noises(LearnConfig(noise="none"), shape=(5,)) == (no_noise, no_noise)
        assert no_noise(ROWS, seeded()) is ROWS

    def test_an_import_path_is_a_factory(self):
        """Without arguments it makes one strength."""
        weak, strong = make_noises(LearnConfig(noise=f"{__name__}:negated"), shape=(5,))

        assert weak is strong
        assert torch.equal(weak(ROWS, seeded()), -ROWS)

    def test_a_factory_with_a_strength_is_called_for_both(self):
        """The parameter `strength` is "weak" or "strong"."""
        weak, strong = make_noises(LearnConfig(noise=f"{__name__}:scaled"), shape=(5,))

        assert torch.equal(weak(ROWS, seeded()), 2 * ROWS)
        assert torch.equal(strong(ROWS, seeded()), 3 * ROWS)

    @pytest.mark.parametrize(
        ("config", "shape"),
        [
            (ALL_OF_IMAGE, (3, 6, 7)),
            (ALL_OF_TABLE, (5,)),
            (LearnConfig(noise=f"{__name__}:negated"), (5,)),
            (LearnConfig(noise=f"{__name__}:scaled"), (5,)),
        ],
    )
    def test_an_empty_batch_gives_an_empty_view(self, config, shape):
        """A noise that cannot take an empty batch is not called."""
        for view in make_noises(config, shape=shape):
            assert view(torch.zeros((0, *shape)), seeded()).shape == (0, *shape)

    @pytest.mark.parametrize(
        ("name", "error"),
        [
            ("image", "image needs samples"),
            ("loud", "none of auto"),
            ("no_such_package:noise", "cannot import"),
            (f"{__name__}:flattened", "view of the shape"),
            (f"{__name__}:weak_only", "view of the shape"),
            (f"{__name__}:ROWS", "expected a callable"),
            (f"{__name__}:seeded", "fails on samples"),
        ],
    )
    def test_a_noise_that_does_not_fit_is_a_config_error(self, name, error):
        """When it is built, not in the first step."""
        with pytest.raises(ConfigError, match=error):
            make_noises(LearnConfig(noise=name), shape=(5,))

    def test_a_cutout_of_the_whole_image_is_a_config_error(self):
        """6 pixels of 6 x 7; 5 leave a line."""
        whole, part = (LearnConfig(noise="image", noise_options={"cutout_pixels": pixels}) for pixels in (6, 5))

        with pytest.raises(ConfigError, match=r"learn\.noise_options\.cutout_pixels: 6"):
            make_noises(whole, shape=(3, 6, 7))

        make_noises(part, shape=(3, 6, 7))


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
