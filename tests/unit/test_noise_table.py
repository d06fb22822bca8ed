"""Noise for tables: its spread, its values, and that all randomness is the generator's."""

from __future__ import annotations

import pytest
import torch

from streamlearn.learn.noise.table import feature_dropout, gaussian


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class TestGaussian:
    def test_has_the_specified_spread(self):
        """Mean 0, standard deviation .15, around the sample."""
        x = torch.full((100, 500), 3.0)

        noisy = gaussian(x, seeded(), std=0.15) - x

        assert noisy.mean().item() == pytest.approx(0.0, abs=0.005)
        assert noisy.std().item() == pytest.approx(0.15, rel=0.02)

    def test_differs_at_each_call_and_repeats_with_the_seed(self):
        """Eta and eta' differ; the same seed gives the same pair."""
        x, generator = torch.zeros(4, 5), seeded(1)

        eta, eta_prime = gaussian(x, generator, std=1.0), gaussian(x, generator, std=1.0)

        assert not torch.equal(eta, eta_prime)
        assert torch.equal(eta, gaussian(x, seeded(1), std=1.0))

    def test_leaves_its_input_and_the_global_generator_alone(self):
        """Only the given generator changes."""
        x = torch.zeros(4, 5)
        before = torch.get_rng_state()

        gaussian(x, seeded(), std=1.0)

        assert torch.count_nonzero(x) == 0
        assert torch.equal(before, torch.get_rng_state())


class TestFeatureDropout:
    def test_uses_the_same_feature_of_another_row(self):
        """No value of one feature moves to another, and none is new."""
        row, feature = torch.meshgrid(torch.arange(50), torch.arange(20), indexing="ij")
        x = (100 * feature + row).to(torch.float32)

        view = feature_dropout(x, seeded(), probability=0.4)

        assert torch.equal(view // 100, x // 100)
        assert set(view.unique().tolist()) <= set(x.unique().tolist())

    def test_replaces_the_specified_share_of_each_feature_independently(self):
        """30 % of 200 x 100 different values change, independently of each other."""
        x = torch.rand((200, 100), generator=seeded(1))

        changed = (feature_dropout(x, seeded(), probability=0.3) != x).double()

        assert changed.mean().item() == pytest.approx(0.3 * 199 / 200, abs=0.01)
        assert changed.mean(dim=0).std().item() == pytest.approx((0.3 * 0.7 / 200) ** 0.5, rel=0.3)
        assert changed.mean(dim=1).std().item() == pytest.approx((0.3 * 0.7 / 100) ** 0.5, rel=0.3)

    def test_donors_are_uniform_and_chosen_for_each_feature(self):
        """Each of 8 rows gives an eighth of the replaced values, and a row has several donors."""
        x = torch.arange(8.0)[:, None].expand(8, 4000)

        donors = feature_dropout(x, seeded(), probability=0.99)

        shares = torch.bincount(donors.flatten().long()) / donors.numel()
        assert shares.allclose(torch.full((8,), 1 / 8), atol=0.01)
        assert len(donors[3].unique()) == 8

    @pytest.mark.parametrize("shape", [(1, 6), (1, 3, 4)])
    def test_leaves_a_single_row_unchanged(self, shape):
        """It has no donor."""
        x = torch.rand(shape)

        assert torch.equal(feature_dropout(x, seeded(), probability=0.9), x)

    def test_is_pure_and_repeats_with_the_seed(self):
        """Input and torch's global generator do not change; the next call differs."""
        x, generator = torch.rand((5, 3, 4)), seeded(1)
        kept, before = x.clone(), torch.get_rng_state()

        first, second = (
            feature_dropout(x, generator, probability=0.5),
            feature_dropout(x, generator, probability=0.5),
        )

        assert first.shape == x.shape
        assert torch.equal(first, feature_dropout(x, seeded(1), probability=0.5))
        assert not torch.equal(first, second)
        assert torch.equal(x, kept)
        assert torch.equal(before, torch.get_rng_state())
