"""Input noise: shape, spread, what it may move, and that chance comes from the generator alone."""

from __future__ import annotations

import pytest
import torch

from streamlearn.errors import ConfigError
from streamlearn.learn.noise import gaussian, image, make_noise, mixed_seed

GRID = torch.arange(2 * 3 * 6 * 7, dtype=torch.float32).reshape(2, 3, 6, 7)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def by_hand(x, rows: int, columns: int, mirrored: bool):
    """One image padded by reflection and cut at an offset, the slow way."""
    padded = torch.nn.functional.pad(x[None], (2, 2, 2, 2), mode="reflect")[0]
    cut = padded[:, 2 + rows : 2 + rows + x.shape[1], 2 + columns : 2 + columns + x.shape[2]]
    return cut.flip(2) if mirrored else cut


class TestGaussian:
    def test_has_the_spread_that_was_asked_for(self):
        """Mean 0, standard deviation .15, around the sample."""
        x = torch.full((100, 500), 3.0)

        noisy = gaussian(0.15)(x, seeded()) - x

        assert noisy.mean().item() == pytest.approx(0.0, abs=0.005)
        assert noisy.std().item() == pytest.approx(0.15, rel=0.02)

    def test_draws_anew_at_each_call_and_repeats_with_the_seed(self):
        """Eta and eta' differ; the same seed gives the same pair."""
        x, generator = torch.zeros(4, 5), seeded(1)

        eta, eta_prime = gaussian(1.0)(x, generator), gaussian(1.0)(x, generator)

        assert not torch.equal(eta, eta_prime)
        assert torch.equal(eta, gaussian(1.0)(x, seeded(1)))

    def test_leaves_its_input_and_the_global_generator_alone(self):
        """Noise is pure but for the generator that it is given."""
        x = torch.zeros(4, 5)
        before = torch.get_rng_state()

        gaussian(1.0)(x, seeded())

        assert torch.count_nonzero(x) == 0
        assert torch.equal(before, torch.get_rng_state())


class TestImage:
    def test_is_a_reflected_shift_and_a_mirror_of_each_image(self):
        """Every view equals one of the 5 x 5 x 2 that can be cut by hand, and images move apart from each other."""
        x = GRID[:1].expand(200, 3, 6, 7)
        possible = {
            by_hand(GRID[0], rows, columns, mirrored).numpy().tobytes()
            for rows in range(-2, 3)
            for columns in range(-2, 3)
            for mirrored in (False, True)
        }

        views = image(shift_pixels=2, flip=True, std=0.0)(x, seeded())

        seen = {view.contiguous().numpy().tobytes() for view in views}
        assert seen <= possible
        assert len(seen) > 40

    def test_without_shift_and_flip_is_the_image(self):
        """Nothing asked, nothing moved."""
        assert torch.equal(image(shift_pixels=0, flip=False, std=0.0)(GRID, seeded()), GRID)

    def test_shift_larger_than_the_image_stays_inside(self):
        """A reflection cannot reach further than the other edge."""
        view = image(shift_pixels=64, flip=True, std=0.0)(GRID, seeded())

        assert view.shape == GRID.shape
        assert torch.isin(view, GRID).all()

    def test_is_channels_last(self):
        """The layout that the convolutions want, so that nothing is copied again."""
        view = image(shift_pixels=2, flip=True, std=0.1)(GRID, seeded())

        assert view.is_contiguous(memory_format=torch.channels_last)


class TestMakeNoise:
    @pytest.mark.parametrize(("shape", "moves"), [((64,), False), ((3, 6, 7), True)])
    def test_auto_moves_images_only(self, shape, moves):
        """With std 0 a table stays as it is, an image is shifted."""
        noise = make_noise("auto", shape=shape, std=0.0, pixel_std=0.0, shift_pixels=2, flip=False)
        x = torch.randn((8, *shape), generator=seeded())

        assert torch.equal(noise(x, seeded()), x) != moves

    def test_none_is_the_sample_itself(self):
        """No noise is no work."""
        noise = make_noise("none", shape=(5,), std=1.0, pixel_std=0.0, shift_pixels=2, flip=True)

        assert noise(GRID, seeded()) is GRID

    def test_by_import_path_is_what_the_factory_returns(self):
        """A user's noise is a factory without arguments."""
        noise = make_noise(f"{__name__}:negated", shape=(5,), std=1.0, pixel_std=0.0, shift_pixels=0, flip=False)

        assert torch.equal(noise(GRID, seeded()), -GRID)

    @pytest.mark.parametrize(
        ("name", "said"),
        [
            ("image", "image wants samples"),
            ("loud", "none of auto"),
            ("no_such_package:noise", "cannot import"),
            (f"{__name__}:flattened", "view of the shape"),
            (f"{__name__}:GRID", "wanted something to call"),
            (f"{__name__}:seeded", "fails on samples"),
        ],
    )
    def test_that_does_not_fit_is_a_config_error(self, name, said):
        """Found when it is built, not in the first step."""
        with pytest.raises(ConfigError, match=said):
            make_noise(name, shape=(5,), std=1.0, pixel_std=0.0, shift_pixels=2, flip=True)


def negated():
    """A user's factory."""
    return lambda x, _generator: -x


def flattened():
    """A user's factory whose noise changes the shape."""
    return lambda x, _generator: x.flatten()


def test_mixed_seeds_differ_in_their_low_32_bits():
    """Torch's CPU generator sees no others."""
    seeds = {
        mixed_seed(seed, step, purpose) & 0xFFFFFFFF for seed in (0, 1) for step in range(500) for purpose in (1, 2)
    }

    assert len(seeds) == 2000
