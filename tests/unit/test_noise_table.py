"""Noise for tables: spread, which values come in, and that chance comes from the generator alone."""

from __future__ import annotations

import pytest
import torch

from streamlearn.learn.noise.table import feature_dropout, gaussian


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


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


class TestFeatureDropout:
    def test_takes_the_same_feature_of_another_row(self):
        """No value of one feature becomes that of another, and none is made up."""
        row, feature = torch.meshgrid(torch.arange(50), torch.arange(20), indexing="ij")
        x = (100 * feature + row).to(torch.float32)

        view = feature_dropout(0.4)(x, seeded())

        assert torch.equal(view // 100, x // 100)
        assert set(view.unique().tolist()) <= set(x.unique().tolist())

    def test_replaces_the_share_that_was_asked_for_each_feature_by_itself(self):
        """Of a table whose rows all differ 30 % of 200 x 100 numbers change, and none of it in step."""
        x = torch.rand((200, 100), generator=seeded(1))

        changed = (feature_dropout(0.3)(x, seeded()) != x).double()

        assert changed.mean().item() == pytest.approx(0.3 * 199 / 200, abs=0.01)
        assert changed.mean(dim=0).std().item() == pytest.approx((0.3 * 0.7 / 200) ** 0.5, rel=0.3)
        assert changed.mean(dim=1).std().item() == pytest.approx((0.3 * 0.7 / 100) ** 0.5, rel=0.3)

    def test_donors_are_even_and_chosen_for_each_feature_by_itself(self):
        """Each of 8 rows gives an eighth of what is replaced, and a row does not take all from one other."""
        x = torch.arange(8.0)[:, None].expand(8, 4000)

        donors = feature_dropout(0.99)(x, seeded())

        shares = torch.bincount(donors.flatten().long()) / donors.numel()
        assert shares.allclose(torch.full((8,), 1 / 8), atol=0.01)
        assert len(donors[3].unique()) == 8

    @pytest.mark.parametrize("shape", [(1, 6), (1, 3, 4)])
    def test_leaves_a_row_alone_as_it_is(self, shape):
        """There is no other."""
        x = torch.rand(shape)

        assert torch.equal(feature_dropout(0.9)(x, seeded()), x)

    def test_is_pure_and_repeats_with_the_seed(self):
        """Its input, its shape and torch's own generator stay as they are; the next call is another."""
        x, generator = torch.rand((5, 3, 4)), seeded(1)
        kept, before = x.clone(), torch.get_rng_state()

        first, second = feature_dropout(0.5)(x, generator), feature_dropout(0.5)(x, generator)

        assert first.shape == x.shape
        assert torch.equal(first, feature_dropout(0.5)(x, seeded(1)))
        assert not torch.equal(first, second)
        assert torch.equal(x, kept)
        assert torch.equal(before, torch.get_rng_state())
